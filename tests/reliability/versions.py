"""The one wheel beside every version that it claims to run with: installed, and the tests run there.

`make version-test` builds a wheel. For each of `ENVIRONMENTS` it makes a virtual environment, installs the wheel there
with the versions that are named, and runs the tests on it, away from the sources; two environments compile the sources
with their own torch instead. What it finds is a row of bench/data/versions.csv, from which docs/reliability.md has
its table. What passed there is not run again unless it is named, so a run that was cut off goes on.

uv (`pip install uv`) makes the environments. It finds or fetches the interpreters; a torch for CPUs only comes from
where uv is told to look for packages (`UV_FIND_LINKS`, `UV_INDEX`), since the usual index has none.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bench.harness import DATA, Row, put_row, read_rows

ROOT = Path(__file__).parents[2]
FILE = DATA / "versions.csv"
LOGS = ROOT / "build" / "versions"
EXTRAS = "integrations,nf4,test"
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "nvcc")


@dataclass(frozen=True)
class Environment:
    """What is installed beside the wheel, and what is missing there.

    Attributes:
        python: the interpreter's version.
        requirements: in the place of the newest versions.
        removed: packages that are uninstalled again.
        hidden: programs that are in no folder of the PATH.
        compiled: the sources are compiled there, as by `pip install --no-build-isolation`, in place of the wheel.
    """

    python: str = "3.11"
    requirements: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    compiled: bool = False


TORCH, TRANSFORMERS, PEFT = "torch==2.10.*", "transformers==5.0.*", "peft==0.18.*"
ENVIRONMENTS = {
    "newest": Environment(),
    "oldest": Environment(requirements=(TORCH, TRANSFORMERS, PEFT), compiled=True),
    "newest on Python 3.13": Environment("3.13"),
    "oldest on Python 3.13": Environment("3.13", (TORCH, TRANSFORMERS, PEFT)),
    "newest on Python 3.12": Environment("3.12"),
    "torch for CPUs only": Environment(requirements=("torch==2.13.0+cpu",)),
    "without Triton": Environment(removed=("triton",)),
    "without compilers and CUDA toolkit": Environment(hidden=COMPILERS),
    "torch 2.10": Environment(requirements=(TORCH,), compiled=True),
    "transformers 5.0": Environment(requirements=(TRANSFORMERS,)),
    "PEFT 0.18": Environment(requirements=(PEFT,)),
}

# what stands for all tests: each method as a module and through its library, operations, kernels, files, commands
SELECTION = (
    "tests/siva/test_model.py",
    "tests/siva/test_targets.py",
    "tests/siva/test_conventions.py",
    "tests/siva/test_entries.py",
    "tests/ladder/test_generation.py",
    "tests/ladder/test_model.py",
    "tests/ladder/test_saving.py",
    "tests/mezo/test_optimizer.py",
    "tests/mezo/test_resuming.py",
    "tests/kernels/test_siva_linear.py",
    "tests/kernels/test_mezo_perturb.py",
    "tests/ops/test_backends.py",
    "tests/test_cli.py",
    "tests/test_cli_resume.py",
    "tests/training/test_export.py",
    "tests/support/test_files.py",
    "tests/integrations",
)
# tests of the sources, which are not there, and of pages that are made of them
OF_SOURCES = ("tests/docs", "tests/test_packaging.py", "tests/test_safety.py", "tests/reliability/test_versions.py")
EVERYTHING = ("tests", *(f"--ignore={name}" for name in OF_SOURCES))
BESIDE_TESTS = ("bench", "csrc", "docs", "examples", "tests", "Makefile", "README.md", "pyproject.toml")

# run by an environment's own Python: the versions there, and what runs the library's operations on a CPU
LOOK = """
import importlib.metadata, json, platform, sys
from pathlib import Path
import fastpeft
from fastpeft.ops import backends

assert Path(fastpeft.__file__).is_relative_to(sys.prefix), f"{fastpeft.__file__} is not the installed one"
installed = {each.name.lower(): each.version for each in importlib.metadata.distributions()}
(chosen,) = (each for each in backends.choices() if (each.op, each.device) == ("mezo_perturb_", "cpu"))
versions = {name: installed.get(name, "") for name in ("torch", "transformers", "peft", "triton")}
print(json.dumps({"python": platform.python_version(), **versions, "backend": chosen.backend}))
"""
FOUND = ("python", "torch", "transformers", "peft", "triton", "backend", "passed", "failed", "skipped", "seconds")
NO_INTERPRETER = "not run"


class UntestedError(Exception):
    """Why nothing can be said of an environment."""


def run(command: list[Any], log: Path, **given: Any) -> subprocess.CompletedProcess[str]:
    """`command`, with what it says appended to `log`."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **given)
    with log.open("a", encoding="utf-8") as lines:
        lines.write(f"$ {' '.join(map(str, command))}\n{done.stdout}{done.stderr}\n")
    return done


def install(environment: Environment, wheel: Path, folder: Path, log: Path) -> None:
    """Make a virtual environment in `folder` with the wheel and all that it and its tests need."""
    if run(["uv", "venv", "--python", environment.python, folder], log).returncode:
        raise UntestedError(NO_INTERPRETER)
    pip = ["uv", "pip"]
    into = ["--python", folder / "bin" / "python"]
    wanted = [f"fastpeft[{EXTRAS}] @ {wheel.resolve().as_uri()}", str(ROOT / "demo"), *environment.requirements]
    done = run([*pip, "install", *into, *wanted], log)
    if not done.returncode and environment.compiled:
        here = ["--no-build-isolation", "--no-deps", "--no-cache", build("sdist", folder, log)]
        done = run([*pip, "install", *into, *here], log)
    if not done.returncode and environment.removed:
        done = run([*pip, "uninstall", *into, *environment.removed], log)
    if done.returncode:
        raise UntestedError(f"cannot be installed: {' '.join(done.stderr.split())[-300:]}")


def surroundings(folder: Path, hidden: tuple[str, ...]) -> dict[str, str]:
    """The variables of this process for one of the environment in `folder`, without what would lead back to here."""
    foreign = ("FASTPEFT_", "PYTHON", "VIRTUAL_ENV", "CUDA_HOME", "CC", "CXX")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    path = [each for each in os.get_exec_path() if not any((Path(each) / program).exists() for program in hidden)]
    return kept | {"PATH": os.pathsep.join([str(folder / "bin"), *path])}


def counts(report: Path) -> dict[str, int]:
    """What pytest's report in JUnit's form says."""
    totals = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        totals = {name: total + int(suite.get(name, 0)) for name, total in totals.items()}
    failed = totals["failures"] + totals["errors"]
    return {"passed": totals["tests"] - failed - totals["skipped"], "failed": failed, "skipped": totals["skipped"]}


def examine(
    environment: Environment,
    wheel: Path,
    tests: tuple[str, ...],
    log: Path,
    install: Callable[[Environment, Path, Path, Path], None] = install,
) -> dict[str, str]:
    """Install the wheel into a new environment, run the tests on it, and leave nothing but `log`.

    Returns:
        The columns `FOUND`, and `fault`: empty, or why some of them are.
    """
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="versions-") as place:
        folder, copied, report = Path(place, "environment"), Path(place, "tests"), Path(place, "report.xml")
        try:
            install(environment, wheel, folder, log)
            copied.mkdir()
            for name in BESIDE_TESTS:
                source = ROOT / name
                (shutil.copytree if source.is_dir() else shutil.copy)(source, copied / name)
            given: dict[str, Any] = {"cwd": copied, "env": surroundings(folder, environment.hidden)}
            python = folder / "bin" / "python"
            look = run([python, "-c", LOOK], log, **given)
            if look.returncode:
                raise UntestedError(f"does not import: {look.stderr.strip().rpartition(chr(10))[2]}")
            found |= json.loads(look.stdout)
            if environment.compiled and found["backend"] != "cpp":
                raise UntestedError("what was compiled there does not load")
            began = time.monotonic()
            run([python, "-m", "pytest", "-q", f"--junitxml={report}", *tests], log, **given)
            if not report.exists():
                raise UntestedError("the tests did not come to their end")
            found |= counts(report) | {"seconds": f"{time.monotonic() - began:.0f}"}
        except UntestedError as fault:
            found["fault"] = str(fault)
    return {name: str(found.get(name, "")) for name in (*FOUND, "fault")}


def build(kind: str, folder: Path, log: Path) -> Path:
    """The `sdist` of these sources, or their `wheel` with what this machine can compile."""
    done = run([sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", folder, ROOT], log)
    if done.returncode:
        raise SystemExit(f"the {kind} cannot be built, see {log}")
    (built,) = folder.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


def is_good(row: Row) -> bool:
    return row["failed"] == "0" or row["fault"] == NO_INTERPRETER


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environments", nargs="*", metavar="ENVIRONMENT", help=f"of {', '.join(ENVIRONMENTS)}")
    parser.add_argument("--wheel", type=Path, help="this one, instead of one that is built")
    parser.add_argument("--all-tests", action="store_true", help="instead of a selection")
    parser.add_argument("--file", type=Path, default=FILE, help="the table that the rows go to")
    given = parser.parse_args(arguments)
    if unknown := set(given.environments) - set(ENVIRONMENTS):
        parser.error(f"no environment is called {', '.join(sorted(unknown))}")
    kind, tests = ("all", EVERYTHING) if given.all_tests else ("selection", SELECTION)
    finished = {row["environment"] for row in read_rows(given.file) if row["tests"] == kind and row["failed"] == "0"}
    wanted = given.environments or [name for name in ENVIRONMENTS if name not in finished]
    bad = []
    with tempfile.TemporaryDirectory() as folder:
        LOGS.mkdir(parents=True, exist_ok=True)
        wheel = given.wheel or (build("wheel", Path(folder), LOGS / "wheel.txt") if wanted else Path())
        for name in wanted:
            log = LOGS / f"{re.sub('[^a-z0-9.]+', '-', name.lower())}.txt"
            log.unlink(missing_ok=True)
            row = {"environment": name, "tests": kind, **examine(ENVIRONMENTS[name], wheel, tests, log)}
            put_row(given.file, row, key=("environment", "tests"))
            print(", ".join(f"{column} {value}" for column, value in row.items() if value), flush=True)
            bad += [] if is_good(row) else [f"{name}: see {log}"]
    raise SystemExit("\n".join(bad) or 0)


if __name__ == "__main__":
    main()
