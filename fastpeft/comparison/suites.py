"""The tables of the paper, and its figure of training curves: variants to run, and the paper's results for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastpeft.errors import FastpeftError, did_you_mean
from fastpeft.support import files

_PAPER: dict[str, Any] = files.read_json(Path(__file__).with_name("suites.json"))
_PROMPT = "PROMPT"  # stands for a prompt in the variants of the file

MEASURED_WITH: str = _PAPER["measured_with"]  # model, data and batch of the paper's results


@dataclass(frozen=True)
class PaperRow:
    """A row of the paper's tables.

    Attributes:
        variant: what runs here.
        title: as written in tables.
        accuracy: in percent; two where the paper's own tables differ.
        f1: in percent; None where the paper has none.
        memory_mb, samples_per_second: as measured in the paper; None where it has none.
    """

    variant: str
    title: str
    accuracy: list[float]
    f1: float | None = None
    memory_mb: float | None = None
    samples_per_second: float | None = None


@dataclass(frozen=True)
class Suite:
    """A table or a figure of the paper.

    Attributes:
        title: what it is, in words.
        rows: what is compared.
        common: options that its cells share where no others are given.
    """

    title: str
    rows: list[PaperRow]
    common: dict[str, Any]


def suite_names() -> list[str]:
    """What `--suite` takes."""
    return list(_PAPER["suites"])


def get_suite(name: str, prompt: str | None = None) -> Suite:
    """The suite called `name`, its prompted rows with `prompt`.

    Args:
        name: one of `suite_names()`.
        prompt: as in a variant. None: that for film reviews. `none`: the prompted rows are left out.

    Raises:
        FastpeftError: there is none.

    Example:
        >>> [row.variant for row in get_suite("figure5").rows]
        ['full', 'lora:rank=4:targets=query+key', 'siva:rank=4:targets=query+key', 'k-lst:window=9:layers_per_block=1']
    """
    if name not in suite_names():
        raise FastpeftError(
            f"unknown suite {name!r}; allowed are {', '.join(suite_names())}. Choose one of these."
            f"{did_you_mean(name, suite_names())}"
        )
    suite = _PAPER["suites"][name]
    keys = [key for key in suite["rows"] if prompt != "none" or _PROMPT not in _PAPER["rows"][key]["variant"]]
    return Suite(suite["title"], [paper_row(key, prompt) for key in keys], suite.get("common", {}))


def paper_row(key: str, prompt: str | None = None) -> PaperRow:
    """The row called `key`, with `prompt` as in `get_suite`."""
    row = _PAPER["rows"][key]
    variant = row["variant"].replace(_PROMPT, _PAPER["default_prompt"] if prompt is None else prompt)
    return PaperRow(**{**row, "variant": variant})


def paper_accuracy(variant: str) -> str:
    """The accuracy of a variant in the paper, in percent; both where its tables have two, and `-` where it has none."""
    rows = map(paper_row, _PAPER["rows"])
    return next((" / ".join(f"{value:.2f}" for value in row.accuracy) for row in rows if row.variant == variant), "-")
