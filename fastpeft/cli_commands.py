"""What all commands share: how they show errors, help and progress."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from fastpeft.cli_options import HELP, typed
from fastpeft.errors import FastpeftError
from fastpeft.support.interrupts import signals_interrupt
from fastpeft.support.launcher import refuse_several

_UsageError: Any = typer.BadParameter.__base__  # of click, or of typer's own copy of it


class Group(TyperGroup):
    """Commands whose `FastpeftError` becomes one message and exit code 2, and an interruption exit code 130."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _without_types(super().get_params(ctx))

    def invoke(self, ctx: Any) -> Any:
        try:
            with signals_interrupt():
                if "FASTPEFT_BACKEND" in os.environ:
                    from fastpeft.ops import backends

                    backends.choices()  # raises where it asks for a back end that is not there
                return super().invoke(ctx)
        except FastpeftError as error:
            typer.echo(f"Error: {error.message_for(typed)}", err=True)
            raise typer.Exit(2) from None
        except _UsageError as error:
            _add_advice(error)
            raise
        except KeyboardInterrupt as interrupt:
            typer.echo(str(interrupt) or "Interrupted.", err=True)
            raise typer.Exit(130) from None


_IN_ONE_PROCESS = ("eval", "predict", "serve", "export", "compare")  # of several each would do the whole work


class Command(TyperCommand):
    """A command, whose `--help` is below its other options."""

    def __init__(self, *args: Any, help: str | None = None, **others: Any) -> None:
        # a paragraph is broken where the terminal ends, not where the source's line does
        paragraphs = (help or "").split("\n\n")
        super().__init__(*args, help="\n\n".join(" ".join(part.split()) for part in paragraphs), **others)

    def invoke(self, ctx: Any) -> Any:
        if self.name in _IN_ONE_PROCESS:
            refuse_several(f"`fastpeft {self.name}`")
        return super().invoke(ctx)

    def get_params(self, ctx: Any) -> list[Any]:
        return _without_types(super().get_params(ctx))

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)
        if option is not None:
            option.rich_help_panel = HELP
        return option


def _add_advice(error: Any) -> None:
    """Say what to write where the reader of the command line knows only what it cannot read."""
    rate = "--learning-rate"
    if getattr(error, "option_name", None) == "--lr":
        error.possibilities = [rate] if any(rate in option.opts for option in error.ctx.command.params) else []
    elif error.message.startswith("No such option") and error.ctx.info_name == "predict" and not error.possibilities:
        error.message += ". Write -- before texts of which one begins with a dash: fastpeft predict RUN -- TEXT"
    elif "extra argument" in error.message:
        error.message += ". A value follows the name of its option, as in --data reviews.csv; a list has no spaces."


def _without_types(parameters: list[Any]) -> list[Any]:
    """Options, of which help shows flags without a type."""
    for parameter in parameters:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    return parameters


@contextmanager
def showing() -> Iterator[None]:
    """Show how far the block has come, first that libraries load, and this library's own messages."""
    from fastpeft.progress import shown

    with shown(lines=False):
        from fastpeft import console

        console.show_messages(quiet=False)
        yield
