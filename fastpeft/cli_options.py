"""How options of commands are shown, named and made of the fields of `TrainConfig`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any

import typer
from typer.core import TyperCommand

from fastpeft.training.config import ADVANCED, DATA, METHOD, MODEL, OUTPUT, TRAINING, Option, options

FIELDS = {known.name for known in options()}
COMPARISON, _HELP = "Comparison", "Help"
_PANELS = (COMPARISON, DATA, MODEL, METHOD, TRAINING, OUTPUT, ADVANCED, _HELP)  # the headings of help, in their order


def without_types(parameters: list[Any]) -> list[Any]:
    """Options, of which help shows flags without a type."""
    for parameter in parameters:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    return parameters


class Command(TyperCommand):
    """A command, whose `--help` is below its other options."""

    def __init__(self, *args: Any, help: str | None = None, **others: Any) -> None:
        # a paragraph is broken where the terminal ends, not where the source's line does
        paragraphs = (help or "").split("\n\n")
        super().__init__(*args, help="\n\n".join(" ".join(part.split()) for part in paragraphs), **others)

    def get_params(self, ctx: Any) -> list[Any]:
        return without_types(super().get_params(ctx))

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)
        if option is not None:
            option.rich_help_panel = _HELP
        return option


def flag(name: str) -> str:
    """The option of a field of `TrainConfig`."""
    return f"--{name.replace('_', '-')}"


def _names(known: Option) -> str:
    """What is typed: of true, false and nothing given, the two that can be."""
    refused = f"/--no-{known.name.replace('_', '-')}" if known.kind is bool and known.default is None else ""
    return flag(known.name) + refused


# what messages name, and is typed
_TYPED = {*FIELDS, "jobs", "executor", "protocol", "seeds", "memory_budget", "max_new_tokens"}


def typed(name: str) -> str:
    """A name in a message, as the command line has it."""
    return flag(name) if name in _TYPED else name


def _show_all_help(context: typer.Context, asked: bool) -> None:
    if asked:
        for parameter in context.command.params:
            parameter.hidden = False  # type: ignore[attr-defined]
        typer.echo(context.get_help())
        raise typer.Exit


def panel_option(default: Any, *names: str, panel: str, common: bool = False, **others: Any) -> Any:
    """An option under a heading of help; of a command with many, help shows the common ones unless asked for all."""
    return typer.Option(default, *names, rich_help_panel=panel, hidden=not common, **others)


def _offering(choices: Collection[str]) -> Callable[[], list[str]]:
    """What completes a value on the command line."""
    return lambda: list(choices)


def run_options(*excluded: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each field of `TrainConfig`, which it takes as `**values`, and `--help-all`.

    Args:
        excluded: names of fields for which it has none.
    """
    made = []
    for known in options():
        if known.name not in excluded:
            shown = panel_option(
                None,
                _names(known),
                *([f"-{known.letter}"] if known.letter else []),
                panel=known.panel,
                common=known.common,
                help=known.text(flag),
                metavar=known.metavar,
                autocompletion=_offering(known.choices) if known.choices else None,
            )
            parameter = inspect.Parameter(known.name, inspect.Parameter.KEYWORD_ONLY, default=shown)
            made.append(parameter.replace(annotation=known.kind | None))
    asked = panel_option(
        False, "--help-all", panel=_HELP, common=True, is_eager=True, callback=_show_all_help, help="Show every option."
    )
    made.append(inspect.Parameter("help_all", inspect.Parameter.KEYWORD_ONLY, default=asked, annotation=bool))

    def add(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        parameters = sorted([*made, *own], key=lambda each: _PANELS.index(each.default.rich_help_panel))
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return command

    return add
