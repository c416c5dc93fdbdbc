"""What an import loads: this library alone loads no other, and registers with one when that is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LIBRARIES = ("torch", "transformers", "peft", "numpy")
LOADED = f"print(*sorted({set(LIBRARIES)} & sys.modules.keys()))"
# what waits for a library is done, and no import is looked at any more
REGISTERED = """
from transformers import AutoConfig, AutoModelForSequenceClassification as auto
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as adapters
assert "SIVA" in adapters
assert type(AutoConfig.for_model("fastpeft_ladder")) in auto._model_mapping.keys()
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("fastpeft")]
"""


def python(program: str) -> str:
    command = [sys.executable, "-c", f"import sys\n{program}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("module", ["fastpeft", "fastpeft.training.config", "fastpeft.cli"])
def test_an_import_alone_loads_no_other_library(module: str) -> None:
    assert python(f"import {module}\n{LOADED}") == ""


def test_transformers_loads_no_more_beside_it() -> None:
    """What registers with its Auto classes waits for these."""
    assert python(f"import fastpeft, transformers\n{LOADED}") == python(f"import transformers\n{LOADED}")


@pytest.mark.parametrize(
    "command",
    [
        "eval nowhere",
        "predict nowhere text",
        "export nowhere model",
        "train --data nowhere.csv --output new",
        "train --output .",
    ],
)
def test_a_wrong_path_is_told_before_libraries_load(command: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    program = f"""
import os
os.chdir({str(tmp_path)!r})
sys.argv[1:] = {command.split()!r}
from fastpeft.cli import main
try:
    main()
except SystemExit as stop:
    assert stop.code == 2, stop
{LOADED}
"""
    assert python(program) == ""


@pytest.mark.long
@pytest.mark.parametrize(
    "imports",
    [
        pytest.param("import fastpeft, peft, transformers", id="both after"),
        pytest.param("import fastpeft, transformers, peft", id="transformers first"),
        pytest.param("import peft, transformers, fastpeft", id="both before"),
        pytest.param("import transformers, fastpeft", id="one before"),
        pytest.param("from fastpeft.models import resolve_model", id="from our own modules"),
        pytest.param("from fastpeft import SivaConfig", id="by a name"),
        pytest.param("import fastpeft\nfrom transformers import Trainer", id="inside transformers"),
        pytest.param("import fastpeft\nfrom transformers import AutoConfig", id="an Auto class alone"),
        pytest.param("import fastpeft\nfrom transformers import RobertaModel", id="a model's class"),
    ],
)
def test_what_is_registered_in_any_order_of_imports(imports: str) -> None:
    python(f"{imports}\n{REGISTERED}")
