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
    from fastpeft.data.names import DEMO
    from fastpeft.methods.registry import METHODS

    body = []
    for name, method in METHODS.items():
        own, demo, causal = (
            method.recipe.for_model(model, name, causal_lm=causal_lm)
            for model, causal_lm in (("", False), (DEMO, False), ("", True))
        )
        cells = [own.learning_rate, own.weight_decay, own.warmup, own.epochs]
        rates = [f"{each.learning_rate:g}, {each.epochs:g}" for each in (causal, demo)]
        body.append([f"`{name}`", *map("{:g}".format, cells), own.schedule, *rates])
    heads = ["`--method`", "learning rate", "weight decay", "warm-up", "epochs", "schedule"]
    return table([*heads, "causal: rate, epochs", "bundled model: rate, epochs"], body)


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
