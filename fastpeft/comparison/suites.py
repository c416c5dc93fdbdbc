"""The report's tables and its figure of training curves, as variants to run and figures to hold ours against."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fastpeft.errors import FastpeftError
from fastpeft.support import files

_FILE = Path(__file__).with_name("suites.json")
_PROMPT = "PROMPT"  # in the file's variants stands for a prompt as written


@dataclass(frozen=True)
class PaperRow:
    """A row of the report's tables.

    Attributes:
        key: what orderings call it.
        variant: what it is here.
        title: as written in tables.
        accuracy: in percent; two where the report's own tables differ.
        f1: in percent, None where the report has none.
        memory_mb, samples_per_second: as the report measured them, None likewise.
    """

    key: str
    variant: str
    title: str
    accuracy: tuple[float, ...]
    f1: float | None = None
    memory_mb: float | None = None
    samples_per_second: float | None = None


@dataclass(frozen=True)
class Suite:
    """What the report shows in one place.

    Attributes:
        name: as given to `--suite`.
        title: what it is, in words.
        rows: what is compared.
        common: keys and values that its cells share where a person gives no others.
    """

    name: str
    title: str
    rows: tuple[PaperRow, ...]
    common: dict[str, Any]


@cache
def _values() -> dict[str, Any]:
    return files.read_json(_FILE)


def measured_with() -> str:
    """What the report's figures were measured with."""
    text: str = _values()["measured_with"]
    return text


def suite_names() -> list[str]:
    """What `--suite` takes."""
    return list(_values()["suites"])


def get_suite(name: str, prompt: str | None = None) -> Suite:
    """The suite called `name`, its prompted rows with `prompt`.

    Args:
        name: one of `suite_names()`.
        prompt: as in a variant. None: that of film reviews. `none`: the prompted rows are left out.

    Raises:
        FastpeftError: there is none.

    Example:
        >>> [row.variant for row in get_suite("figure5").rows]
        ['full', 'lora:rank=4:targets=query+key', 'siva', 'k-lst:window=9']
    """
    if name not in suite_names():
        raise FastpeftError(f"unknown suite {name!r}; allowed are {', '.join(suite_names())}. Choose one of these.")
    values = _values()["suites"][name]
    rows = [key for key in values["rows"] if prompt != "none" or _PROMPT not in _values()["rows"][key]["variant"]]
    prompt = _values()["default_prompt"] if prompt is None else prompt
    return Suite(
        name,
        values["title"],
        tuple(_row(key, prompt) for key in rows),
        dict(values.get("common", {})),
    )


def paper_row(key: str) -> PaperRow:
    """The row that orderings call `key`."""
    return _row(key, _values()["default_prompt"])


def prompt_of(key: str, variant: str) -> str | None:
    """The prompt, as written, with which `variant` was made of the row `key`; None where that has none.

    Example:
        >>> prompt_of("lst+mezo", "lst:init_from=mezo:prompt=MR:label_words=bad+good")
        'MR:label_words=bad+good'
    """
    template = _values()["rows"][key]["variant"]
    before, *rest = template.split(_PROMPT)
    if not rest:
        return None
    length = (len(variant) - len(template.replace(_PROMPT, ""))) // len(rest)
    return variant[len(before) :][:length]


def orderings(measure: str) -> list[tuple[str, str]]:
    """Keys of rows of which the report has the first above the second in `measure`; in `memory_mb`, below."""
    return [(first, second) for first, second in _values()["orderings"][measure]]


def _row(key: str, prompt: str) -> PaperRow:
    values = _values()["rows"][key]
    return PaperRow(
        **{
            **values,
            "key": key,
            "variant": values["variant"].replace(_PROMPT, prompt),
            "accuracy": tuple(values["accuracy"]),
        }
    )
