"""What README.md shows can be done."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main

from fastpeft.cli import app
from fastpeft.data.examples import DEMO
from fastpeft.data.models import resolve_model

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The code blocks of a language, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.docs
def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other in one program, on the bundled model and on names that a reader brings along."""
    monkeypatch.chdir(tmp_path)
    row = {"input_ids": [0, 5, 6, 2], "attention_mask": [1, 1, 1, 1], "labels": 1}
    program: dict[str, Any] = {"dataset": [row] * 8, "linear": torch.nn.Linear(8, 6)}
    code = blocks("python")
    assert code
    for block in code:
        exec(block.replace("FacebookAI/roberta-large", resolve_model(DEMO)), program)
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.docs
def test_command_lines_parse() -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("fastpeft ")]
    assert len(lines) >= 5
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for line in lines:
        _, name, *arguments = shlex.split(line, comments=True)
        commands[name].make_context(name, arguments)  # raises where an option or argument is not known
