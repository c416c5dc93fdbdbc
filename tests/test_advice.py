"""What the messages of errors tell people to use is there: options of commands, arguments, fields and methods."""

from __future__ import annotations

import ast
import contextlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import typer.main

import fastpeft
from fastpeft.cli import app
from fastpeft.methods.registry import METHODS
from fastpeft.mezo.journal import Journal
from fastpeft.siva.layer import SivaLinear
from fastpeft.siva.model import SivaModel
from fastpeft.training.config import options

RAISED = (
    "FastpeftError",
    "NotFiniteError",
    "LostProcessError",
    "NotEnoughMemoryError",
    "ValueError",
    "KeyboardInterrupt",
)


def messages() -> Iterator[tuple[str, str]]:
    """Each message with its place, its values as `{}`."""
    folder = Path(fastpeft.__file__).parent
    for file in sorted(folder.rglob("*.py")):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and _name(call.func) in (*RAISED, "warning") and call.args:
                parts = sorted(
                    (part for part in ast.walk(call.args[0]) if isinstance(part, (ast.Constant, ast.FormattedValue))),
                    key=lambda part: (part.lineno, part.col_offset),
                )
                text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts)
                yield f"{file.relative_to(folder)}:{call.lineno}", text


def _name(function: ast.expr) -> str:
    return getattr(function, "id", getattr(function, "attr", ""))


MESSAGES = dict(messages())
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
OPTIONS = {name: {flag for p in command.params for flag in p.opts} for name, command in COMMANDS.items()}
PUBLIC = [getattr(fastpeft, name) for name in fastpeft.__all__ if name != "functional"]
OTHERS = [
    *(peft.PeftModel, peft.LoraConfig, peft.PromptTuningConfig, peft.tuners.lora.LoraModel),
    *(
        transformers.BertConfig,
        transformers.TrainingArguments,
        transformers.Trainer,
        transformers.BitsAndBytesConfig,
        torch.Tensor,
        torch.nn.Module,
        torch.nn.TransformerEncoder,
        torch.nn.TransformerEncoderLayer,
        torch,
    ),
]
FORMS = {"key", "class", "negative", "positive"}  # what is written for what: --set key=value


def known() -> set[str]:
    """The names of attributes, and of what they take."""
    names = {setting for method in METHODS.values() for setting in method.settings()} | FORMS
    for owner in (*PUBLIC, *OTHERS, SivaModel, SivaLinear, Journal, fastpeft.MeZO):
        members = [owner, *(getattr(owner, name, None) for name in dir(owner))] if inspect.isclass(owner) else [owner]
        names |= set(dir(owner))
        for member in members:
            if callable(member):
                with contextlib.suppress(TypeError, ValueError):  # of what is written in C
                    names |= set(inspect.signature(member).parameters)
    return names | {name for module in (fastpeft, peft, transformers) for name in dir(module)}


def test_options_are_there() -> None:
    assert len(MESSAGES) > 300
    named = 0
    for place, text in MESSAGES.items():
        of_command = re.search(rf"fastpeft ({'|'.join(COMMANDS)}) [^`]*--", text)
        allowed = OPTIONS[of_command[1]] if of_command else set().union(*OPTIONS.values())
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", text):
            named += 1
            assert option in allowed, place
    assert named > 30


def test_names_in_backticks_are_options() -> None:
    """The command line shows them as they are typed."""
    of_commands = {option[2:].replace("-", "_") for option in set().union(*OPTIONS.values())}
    allowed = of_commands | {known.name for known in options()}
    of_runs = [(place, text) for place, text in MESSAGES.items() if place.startswith(("training/", "data/"))]
    found = [(name, place) for place, text in of_runs for name in re.findall(r"`(\w+)`", text)]
    assert len(found) >= 10
    assert [each for each in found if each[0] not in allowed] == []


@pytest.mark.parametrize(
    ("pattern", "least"),
    [(r"(?<![\w-])([a-z_]\w*)=(?!=)", 40), (r"(?:\b[a-z_]\w*\.)*\b([a-z_]\w*)\((?:\)|\.\.\.)", 10)],
    ids=["arguments", "methods"],
)
def test_names_are_there(pattern: str, least: int) -> None:
    names = known()
    found = [(name, place) for place, text in MESSAGES.items() for name in re.findall(pattern, text)]
    assert len(found) >= least
    assert [each for each in found if each[0] not in names] == []
