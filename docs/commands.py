"""The reference of options: what `fastpeft COMMAND --help-all` says, the fields of `TrainConfig`, and recipes."""

from __future__ import annotations

import html
import re
from typing import Any

from table_rows import table

SIGNS = re.compile(r"([\\`*_\[\]|])")  # what Markdown would take for its own


def reference() -> str:
    """A section for each command: what it does, its arguments and its options."""
    import typer.main

    from fastpeft.cli import app  # here, since it loads PyTorch, which the other pages do without

    group: Any = typer.main.get_command(app)
    return "\n".join(section(name, command) for name, command in group.commands.items())


def fields() -> str:
    """A table of the fields of `TrainConfig`."""
    from fastpeft.training.config import options

    body = [[f"`{known.name}`", f"`{known.kind.__name__}`", plain(known.text())] for known in options()]
    return table(["field", "type", "what it does"], body)


def recipes() -> str:
    """With what each method trains if a person names nothing else."""
    from fastpeft.methods.registry import METHODS

    body = []
    for name, method in METHODS.items():
        own = method.recipe
        narrow, causal = own.for_model(hidden_size=768), own.for_model(causal_lm=True)
        rates = [own.learning_rate, narrow.learning_rate, causal.learning_rate, own.head_learning_rate]
        length = [own.weight_decay, own.warmup, own.epochs, own.least_steps]
        shown = ["the same" if each is None else f"{each:g}" for each in (*rates, *length)]
        body.append([f"`{name}`", *shown, own.schedule])
    heads = ["`--method`", "learning rate", "below a width of 1,024", "of next words", "of a new head"]
    return table([*heads, "weight decay", "warm-up", "epochs", "but steps at least", "schedule"], body)


def section(name: str, command: Any) -> str:
    for parameter in command.params:
        parameter.hidden = False  # as `--help-all` shows them
    context = command.make_context(f"fastpeft {name}", [], resilient_parsing=True)
    records = [parameter.get_help_record(context) for parameter in command.params]
    body = [[f"`{names}`", plain(text)] for names, text in records]
    parts = [f"## fastpeft {name}", plain(command.help), table(["option", "what it does"], body) if body else ""]
    return "\n\n".join(parts)


def plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return SIGNS.sub(r"\\\1", html.escape(text, quote=False))


# what stands in pages for what is made here
PARTS = {"<!-- commands -->": reference, "<!-- fields of TrainConfig -->": fields}
