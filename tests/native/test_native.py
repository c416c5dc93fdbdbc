"""The C++ tests of csrc, built plainly; `make sanitize` and `make sanitize-thread` build them with sanitizers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_what_torch_2_10_lacks_is_in_our_header() -> None:
    """The oldest torch that setup.py builds for is not the one that is installed here."""
    name, header = "STABLE_TORCH_ERROR_CODE_CHECK", "checked.h"
    texts = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "csrc").rglob("*.[ch]*")}
    using = [file for file, text in texts.items() if name in text and file != header]
    assert using
    assert not [file for file in using if f'#include "{header}"' not in texts[file]]


def test_a_word_that_clang_does_not_know_is_in_one_header() -> None:
    """It would ignore the whole attribute that has the word, and compile for any processor."""
    files = [path.name for path in (ROOT / "csrc").rglob("*.*") if "prefer-vector-width" in path.read_text("utf-8")]
    assert files == ["wide.h"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("target", "compiler", "runner"),
    [("native", "c++", "make"), ("native-aarch64", "aarch64-linux-gnu-g++", "qemu-aarch64")],
)
def test_host_code(target: str, compiler: str, runner: str, tmp_path: Path) -> None:
    for program in ("make", compiler, runner):
        if not shutil.which(program):
            pytest.skip(f"needs {program}")
    command = ["make", "--silent", "-C", str(ROOT), target, f"NATIVE={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "baseline" in done.stdout
