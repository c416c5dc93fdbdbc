"""The harness of `versions`: what it installs, sees and counts, and which rows it runs."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from reliability import versions
from reliability.versions import COMPILERS, ENVIRONMENTS, ROOT, SELECTION, Environment

from bench.harness import read_rows

EVERYWHERE = dict.fromkeys((*versions.FOUND, "fault"), "")


def test_the_table_has_every_version_that_is_claimed() -> None:
    claimed = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for oldest, stated in (("torch==2.10.*", "torch>=2.10"), ("peft==0.18.*", "peft>=0.18")):
        assert f'"{stated}"' in claimed
        assert any(oldest in each.requirements for each in ENVIRONMENTS.values())
    compiled = [each.requirements for each in ENVIRONMENTS.values() if each.compiled]
    assert compiled
    assert all("torch==2.10.*" in each for each in compiled)
    assert 'requires-python = ">=3.11"' in claimed
    assert {each.python for each in ENVIRONMENTS.values()} >= {"3.11", "3.12", "3.13"}
    assert all((ROOT / name).exists() for name in (*SELECTION, *versions.OF_SOURCES, *versions.BESIDE_TESTS))


def test_programs_are_hidden_with_their_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, program in (("compilers", "c++"), ("others", "make")):
        (tmp_path / name).mkdir()
        (tmp_path / name / program).touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'compilers'}:{tmp_path / 'others'}")
    monkeypatch.setenv("CXX", "c++")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    there, hidden = (versions.surroundings(tmp_path / "new", programs) for programs in ((), COMPILERS))
    assert there["PATH"].split(os.pathsep) == [str(tmp_path / name) for name in ("new/bin", "compilers", "others")]
    assert hidden["PATH"].split(os.pathsep) == [str(tmp_path / name) for name in ("new/bin", "others")]
    assert not {"CXX", "PYTHONPATH"} & hidden.keys()


def test_what_pytest_reports_is_counted(tmp_path: Path) -> None:
    tests = {"passed": "pass", "failed": "assert False", "skipped": "pytest.skip()"}
    body = "".join(f"def test_{name}():\n    {code}\n" for name, code in tests.items())
    (tmp_path / "test_some.py").write_text(f"import pytest\n{body}def test_error(absent):\n    pass\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=report.xml"]
    subprocess.run(command, cwd=tmp_path, capture_output=True)
    assert versions.counts(tmp_path / "report.xml") == {"passed": 1, "failed": 2, "skipped": 1}


def unpacked(*_: Any) -> None:
    """In place of `install`: the package laid beside this environment's others, in a new one."""
    folder: Path = _[2]
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    shutil.copytree(ROOT / "fastpeft", packages / "fastpeft", ignore=shutil.ignore_patterns("demo", "__pycache__"))


@pytest.mark.long
def test_the_installed_library_is_tested_and_nothing_is_left(tmp_path: Path) -> None:
    before = set(Path(versions.tempfile.gettempdir()).glob("versions-*"))
    tests = ("tests/support/test_files.py", "tests/ops/test_backends.py")
    row = versions.examine(Environment(hidden=COMPILERS), Path(), tests, tmp_path / "log.txt", unpacked)
    assert row["fault"] == "", (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert row["failed"] == "0", (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert int(row["passed"]) > 10
    assert row["peft"] == importlib.metadata.version("peft")
    assert set(Path(versions.tempfile.gettempdir()).glob("versions-*")) <= before


@pytest.mark.long
def test_sources_in_the_place_of_the_installed_library_are_a_fault(tmp_path: Path) -> None:
    def install(*given: Any) -> None:
        unpacked(*given)
        (packages,) = given[2].glob("lib/python*/site-packages")
        shutil.rmtree(packages / "fastpeft")
        (packages / "shared.pth").write_text(f"{ROOT}\n{sysconfig.get_path('purelib')}\n")

    row = versions.examine(Environment(), Path(), SELECTION, tmp_path / "log.txt", install)
    assert "is not the installed one" in row["fault"]
    assert row["passed"] == ""


@pytest.mark.parametrize(
    ("refused", "fault"),
    [
        ("venv", versions.NO_INTERPRETER),
        ("install", "cannot be installed: no such version"),
        ("--no-build-isolation", "cannot be installed: no such version"),
        ("uninstall", "cannot"),
    ],
)
def test_what_cannot_be_installed_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str, fault: str
) -> None:
    program = f'#!/bin/sh\ncase " $* " in *" {refused} "*) echo "no such version" >&2; exit 2;; esac\n'
    (tmp_path / "uv").write_text(program)
    (tmp_path / "uv").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(versions, "build", lambda kind, folder, log: folder / f"some.{kind}")
    environment = Environment(removed=("triton",), compiled=True)
    row = versions.examine(environment, tmp_path / "some.whl", SELECTION, tmp_path / "log.txt")
    assert row["fault"].startswith(fault)
    assert versions.is_good(row) == (refused == "venv")
    assert "no such version" in (tmp_path / "log.txt").read_text(encoding="utf-8")


def test_what_was_compiled_there_has_to_load(tmp_path: Path) -> None:
    def install(*given: Any) -> None:
        (given[2] / "bin").mkdir(parents=True)
        (given[2] / "bin" / "python").write_text('#!/bin/sh\necho \'{"backend": "reference"}\'\n')
        (given[2] / "bin" / "python").chmod(0o755)

    for compiled, fault in ((True, "what was compiled there does not load"), (False, "the tests did not come to")):
        row = versions.examine(Environment(compiled=compiled), Path(), SELECTION, tmp_path / "log.txt", install)
        assert row["fault"].startswith(fault)
        assert not versions.is_good(row)


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examined: list[Environment] = []

    def examine(environment: Environment, *_: Any) -> dict[str, str]:
        examined.append(environment)
        if environment == ENVIRONMENTS["oldest"] and len(examined) < 3:
            raise KeyboardInterrupt
        if environment.python == "3.12":
            return EVERYWHERE | {"fault": versions.NO_INTERPRETER}
        return EVERYWHERE | {"passed": "9", "failed": "1" if environment.removed else "0"}

    monkeypatch.setattr(versions, "examine", examine)
    monkeypatch.setattr(versions, "LOGS", tmp_path / "logs")
    table = ["--wheel", str(tmp_path / "some.whl"), "--file", str(tmp_path / "versions.csv")]
    with pytest.raises(KeyboardInterrupt):
        versions.main(table)
    assert [row["environment"] for row in read_rows(tmp_path / "versions.csv")] == ["newest"]
    with pytest.raises(SystemExit, match="without Triton: see"):
        versions.main(table)
    assert examined[2:] == list(ENVIRONMENTS.values())[1:]
    assert len(read_rows(tmp_path / "versions.csv")) == len(ENVIRONMENTS)
    del examined[:]
    with pytest.raises(SystemExit, match="without Triton"):
        versions.main(table)
    assert examined == [ENVIRONMENTS["newest on Python 3.12"], ENVIRONMENTS["without Triton"]]
    with pytest.raises(SystemExit) as ended:
        versions.main(["newest", *table])
    assert not ended.value.code
    assert examined[2:] == [ENVIRONMENTS["newest"]]
    with pytest.raises(SystemExit) as ended:
        versions.main(["no such row", *table])
    assert ended.value.code == 2
