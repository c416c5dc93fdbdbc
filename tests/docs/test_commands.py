"""The page of the command line has every command and option, each with what it is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import commands
import pytest
import typer.main

from fastpeft.cli import app
from fastpeft.training.config import options

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", COMMANDS)
def test_each_option_is_a_row_that_says_what_it_is_for(name: str) -> None:
    title, *lines = commands.section(name, COMMANDS[name]).splitlines()
    assert title == f"## fastpeft {name}"
    rows = [line.removeprefix("| ").removesuffix(" |").split("` | ") for line in lines if line.startswith("| `")]
    assert len(rows) == len(COMMANDS[name].params)
    for parameter, (option, text) in zip(COMMANDS[name].params, rows):
        assert option.startswith("`-") is (parameter.param_type_name == "option")
        assert parameter.param_type_name == "argument" or option[1:].split()[0].rstrip(",") in parameter.opts
        assert text.strip(), option


def test_text_is_shown_as_it_is() -> None:
    assert commands.plain("train.* of '<mask>' [a|b]") == r"train.\* of '&lt;mask&gt;' \[a\|b\]"


def test_pages_are_filled_in() -> None:
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    import hooks

    folder = Path(hooks.__file__).parent / "reference"
    pages = [hooks.on_page_markdown((folder / name).read_text(encoding="utf-8")) for name in ("cli.md", "training.md")]
    assert not any(marker in page for marker in commands.PARTS for page in pages)
    assert all(f"\n## fastpeft {name}\n" in pages[0] for name in COMMANDS)
    assert all(f"\n| `{known.name}` | `" in pages[1] for known in options())
