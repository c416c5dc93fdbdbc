"""The C++ tests of csrc, built plainly; `make sanitize` and `make sanitize-thread` build them with sanitizers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.long
@pytest.mark.skipif(not (shutil.which("make") and shutil.which("c++")), reason="needs make and a C++ compiler")
def test_host_code(tmp_path: Path) -> None:
    command = ["make", "--silent", "-C", str(ROOT), "native", f"NATIVE={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "baseline" in done.stdout
