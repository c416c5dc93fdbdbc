"""What an import loads: the command line and the options answer without PyTorch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fastpeft

# the package without its own `__init__`, whose names for users load PyTorch
PROGRAM = """
import importlib, sys, types
package = types.ModuleType("fastpeft")
package.__path__ = [sys.argv[1]]
sys.modules["fastpeft"] = package
importlib.import_module(sys.argv[2])
print(*({"torch", "transformers", "peft"} & sys.modules.keys()))
"""


@pytest.mark.parametrize("module", ["fastpeft.training.config", "fastpeft.cli"])
def test_options_are_known_without_pytorch(module: str) -> None:
    command = [sys.executable, "-c", PROGRAM, str(Path(fastpeft.__file__).parent), module]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("", "")
