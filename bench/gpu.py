"""`python -m bench.gpu`: on a machine with a GPU, its tests and then every bench, in one call of under nine minutes.

Tests come first: nothing is timed unless they pass. Every row is written as it is measured, so a run that is cut off
keeps what it has.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
LIMIT_S = 8.5 * 60
TESTS_SHARE = 0.5  # of the limit, at most


def tests() -> list[list[str]]:
    """The kernels' tests, and in other files the tests that need a GPU."""
    marked = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "tests").rglob("test_*.py") if _needs_gpu(file))
    pytest = [sys.executable, "-m", "pytest", "-q"]
    commands = [[*pytest, "tests/kernels"]]
    if marked:
        commands.append([*pytest, "-m", "gpu", *marked])
    return commands


def _needs_gpu(file: Path) -> bool:
    return file.parent.name != "kernels" and "mark.gpu" in file.read_text(encoding="utf-8")


def benches() -> list[list[str]]:
    """Every bench of this folder, on the GPU."""
    names = sorted(file.stem for file in Path(__file__).parent.glob("bench_*.py"))
    return [[sys.executable, "-m", f"bench.{name}", "--device", "cuda"] for name in names]


def run(command: list[str], timeout_s: float) -> bool:
    """Run `command` from the repository's root; whether it ended well and in time."""
    print("$", *command, flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    try:
        return subprocess.run(command, cwd=ROOT, env=environment, timeout=timeout_s).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"stopped after {timeout_s:.0f} s; the rows so far are kept", flush=True)
        return False


def main() -> int:
    if not torch.cuda.is_available():
        print("There is no GPU here, so there is nothing to test or measure. On a machine with one, run this again.")
        return 0
    end = time.monotonic() + LIMIT_S
    tests_end = time.monotonic() + TESTS_SHARE * LIMIT_S
    for command in tests():
        if not run(command, tests_end - time.monotonic()):
            print("The tests did not pass, so nothing was timed.")
            return 1
    commands = benches()
    ended_well = [run(command, (end - time.monotonic()) / (len(commands) - i)) for i, command in enumerate(commands)]
    return 0 if all(ended_well) else 1


if __name__ == "__main__":
    sys.exit(main())
