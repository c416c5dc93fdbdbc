"""How options of commands are shown, named and made of the fields of `TrainConfig`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any

import typer

from fastpeft.errors import FastpeftError
from fastpeft.training.config import ADVANCED, DATA, METHOD, MODEL, OUTPUT, TRAINING, Option, options, parse_value

FIELDS = {known.name for known in options()}
COMPARISON, HELP = "Comparison", "Help"
_METAVARS = {int: "N", float: "N", str: "NAME"}
_PANELS = (COMPARISON, DATA, MODEL, METHOD, TRAINING, OUTPUT, ADVANCED, HELP)  # the headings of help, in their order


def flag(name: str) -> str:
    """The option of a field of `TrainConfig`."""
    return f"--{name.replace('_', '-')}"


def _names(known: Option) -> str:
    """What is typed: of a flag that is not false by default also what refuses it."""
    refused = f"/{flag(f'no_{known.name}')}" if known.kind is bool and known.default is not False else ""
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


# options of more than one command, which are fields of none
SETTINGS = panel_option(
    None,
    "--set",
    panel=METHOD,
    metavar="KEY=VALUE",
    help="Set a field of the method's configuration or of TrainingArguments; may be given several times.",
)
QUIET = panel_option(False, "--quiet", "-q", panel=OUTPUT, help="Show nothing but errors.")
BUDGET = panel_option(
    None,
    panel=OUTPUT,
    metavar="MB",
    help="With --dry-run: show whether the tensors of a step, at their estimated peak, fit into this many MB; the "
    "process takes more.",
)


def parse_settings(items: list[str] | None) -> dict[str, Any]:
    """Parse the `key=value` items of `SETTINGS`."""
    parsed: dict[str, Any] = {}
    for item in items or []:
        name, separator, value = item.partition("=")
        if not separator or not name:
            raise FastpeftError(f"--set {item!r} is not of the form key=value. Write, for example, --set d=300.")
        parsed[name] = parse_value(value)
    return parsed


def check_budget(memory_budget: float | None, dry_run: bool) -> None:
    """Raise `FastpeftError` unless the budget is memory, and there is a dry run to compare with it."""
    if memory_budget is not None and not (dry_run and memory_budget > 0):
        raise FastpeftError(
            f"`memory_budget` is {memory_budget:g} MB; it must be above 0, and goes with --dry-run, which shows what "
            "fits. Correct it, or add --dry-run."
        )


def _offering(choices: Collection[str]) -> Callable[[], list[str]]:
    """What completes a value on the command line."""
    return lambda: list(choices)


def run_options(*excluded: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command `--help-all`, and an option for each field of `TrainConfig` but the `excluded`, as `**values`."""
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
                metavar=known.metavar or _METAVARS.get(known.kind),
                autocompletion=_offering(known.choices) if known.choices else None,
            )
            parameter = inspect.Parameter(known.name, inspect.Parameter.KEYWORD_ONLY, default=shown)
            made.append(parameter.replace(annotation=known.kind | None))
    asked = panel_option(
        False, "--help-all", panel=HELP, common=True, is_eager=True, callback=_show_all_help, help="Show every option."
    )
    made.append(inspect.Parameter("help_all", inspect.Parameter.KEYWORD_ONLY, default=asked, annotation=bool))

    def add(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        parameters = sorted([*made, *own], key=lambda each: _PANELS.index(each.default.rich_help_panel))
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return command

    return add
