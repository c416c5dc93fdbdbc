"""The page of the command line has every command and option, each with what it is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import commands
import pytest
import typer.main

from fastpeft.cli import app

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", COMMANDS)
def test_each_option_is_a_row_that_says_what_it_is_for(name: str) -> None:
    title, *lines = commands.section(name, COMMANDS[name]).splitlines()
    assert title == f"## fastpeft {name}"
    rows = [line.removeprefix("| ").removesuffix(" |").split("` | ") for line in lines if line.startswith("| `")]
    assert len(rows) == len(COMMANDS[name].params)
    for parameter, (option, text) in zip(COMMANDS[name].params, rows):
        assert option.startswith("`--") is (parameter.param_type_name == "option")
        assert parameter.param_type_name == "argument" or option[1:].split()[0] in parameter.opts
        assert text.strip(), option


def test_text_is_shown_as_it_is() -> None:
    assert commands.plain("train.* of '<mask>' [a|b]") == r"train.\* of '&lt;mask&gt;' \[a\|b\]"


def test_the_page_is_filled_in() -> None:
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    import hooks

    page = Path(hooks.__file__).parent / "reference" / "cli.md"
    filled = hooks.on_page_markdown(page.read_text(encoding="utf-8"))
    assert hooks.COMMANDS not in filled
    for name in COMMANDS:
        assert f"\n## fastpeft {name}\n" in filled
