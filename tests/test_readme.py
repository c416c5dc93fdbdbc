"""What README.md shows can be done, and so can the examples of the command line's page."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from fastpeft.cli import app
from fastpeft.data.examples import DEMO
from fastpeft.models import resolve_model

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
WORDS = 1_000  # that a person reads before deciding


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a language, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_it_is_short_and_links_to_what_is_there() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.split()) <= WORDS
    links = re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", text)
    local = [link for link in links if not link.startswith("https://arxiv.org/abs/")]
    assert local
    assert not [link for link in local if not (ROOT / link).exists()]


@pytest.mark.docs
def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other in one program, on the bundled model and on names that a reader brings along."""
    monkeypatch.chdir(tmp_path)
    program: dict[str, Any] = {"rows": [("a charming journey", 1)] * 8}
    code = blocks(README, "python")
    assert code
    for block in code:
        exec(block.replace("FacebookAI/roberta-large", resolve_model(DEMO)), program)
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "reference" / "cli.md"], ids=["readme", "cli"])
def test_command_lines_parse(page: Path) -> None:
    lines = [line for block in blocks(page, "sh") for line in block.splitlines() if line.startswith("fastpeft ")]
    assert len(lines) >= 5
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for line in lines:
        _, name, *arguments = shlex.split(line, comments=True)
        commands[name].make_context(name, arguments)  # raises where an option or argument is not known
