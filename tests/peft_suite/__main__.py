"""PEFT's own tests with SiVA in their tables: `make peft-suite`.

The tests are those of the source distribution of the PEFT that is installed, which the package index gives. The models
that they name are on the hub; here tiny random ones stand in for them, so that the tests run offline. All is kept in
build/peft-suite. Arguments go to pytest.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

from .cases import FILES
from .stand_ins import fill

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "peft-suite"


def fetch_tests(folder: Path, peft_version: str) -> None:
    """Unpack PEFT's tests as the package `folder`."""
    with tempfile.TemporaryDirectory() as temporary:
        download = ["download", "--quiet", "--no-deps", "--no-build-isolation", "--no-binary", "peft"]
        subprocess.run([sys.executable, "-m", "pip", *download, "-d", temporary, f"peft=={peft_version}"], check=True)
        with tarfile.open(next(Path(temporary).glob("peft-*.tar.gz"))) as archive:
            archive.extractall(temporary, filter="data")
        tests = Path(temporary) / f"peft-{peft_version}" / "tests"
        (tests / "__init__.py").touch()
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(tests, folder)


def main(arguments: list[str]) -> int:
    peft_version = version("peft")
    tests, cache = BUILD / peft_version / "peft_tests", BUILD / "hub"
    if not tests.exists():
        fetch_tests(tests, peft_version)
    fill(cache)
    settings = BUILD / "pytest.ini"
    settings.write_text("[pytest]\nfilterwarnings = ignore\nmarkers = bitsandbytes\n", encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-c", settings, "-p", "peft_suite.plugin", "-p", "no:cacheprovider"]
    files = [tests / f"{name}.py" for name in FILES]
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    return subprocess.run([*command, *arguments, *files], env=environment, cwd=BUILD).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
