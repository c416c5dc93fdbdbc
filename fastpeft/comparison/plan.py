"""What a comparison is made of: variants as written, and the cells (a variant with a seed) that they stand for."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastpeft import files
from fastpeft.config import FOR_LABELS, TrainConfig, parse_value
from fastpeft.errors import FastpeftError
from fastpeft.methods import METHODS
from fastpeft.runs import RunFolder
from fastpeft.task import method_options

ZERO_SHOT = "zero-shot"  # the row with no training
_ZERO_SHOT_FIELDS = ("model", "data", "prompt", "label_words", "text_column", "label_column")
ROWS = (
    "data",
    "problem_type",
    "text_column",
    "label_column",
    "split_seed",
)  # what decides the rows, of all cells alike
_CHANGES_DEV_ROWS = ("split_seed", "max_length")  # what a zero-shot row cannot follow

_CHAIN = ":init_from="  # comes last in a variant, since what follows is a variant itself
_LISTS = ("targets", "label_words", "text_column")  # in whose values + is a comma, as in lists of JSON
_DECIDED = {
    "output": "the comparison's output decides it",
    "method": "it is the first word of a variant",
    "seed": "the number of seeds decides it",
    "settings": "name each setting by itself",
}
LOCK = ".lock"  # the file that a running comparison holds in its folder
_LONGEST_NAME = 200  # characters; file systems take 255 bytes


@dataclass(frozen=True)
class Cell:
    """One process of a comparison.

    Attributes:
        name: of its folder.
        variant: as written.
        method: name of its method, or `ZERO_SHOT`.
        seed: its seed; None for `ZERO_SHOT`, which has none.
        values: its configuration, as `run.json` holds it.
        after: name of the cell whose result it starts from.
    """

    name: str
    variant: str
    method: str
    seed: int | None
    values: dict[str, Any]
    after: str | None = None

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.values["output"])

    @property
    def config(self) -> TrainConfig:
        """Its configuration; of a `ZERO_SHOT` cell, that of a run with its data and prompt."""
        own = ("method", "calibrate") if self.method == ZERO_SHOT else ()
        return TrainConfig.from_values({name: value for name, value in self.values.items() if name not in own})

    @property
    def config_file(self) -> Path:
        """What its process reads."""
        return Path(f"{self.values['output']}.json")

    @property
    def log(self) -> Path:
        """What its latest process said, with a last line `Error: ...` where it failed."""
        return Path(f"{self.values['output']}.log")

    def metrics(self) -> dict[str, Any] | None:
        """What was measured; None while it is not finished."""
        folder = self.folder
        return folder.metrics() if folder.finished else None

    def error(self) -> str | None:
        """Why its latest try failed; None where it did not fail."""
        if self.folder.finished or not self.log.is_file():
            return None
        last = self.log.read_text(encoding="utf-8", errors="replace").rstrip().rpartition("\n")[2]
        return last.removeprefix("Error: ") if last.startswith("Error: ") else None

    @property
    def state(self) -> str:
        """`finished`, `failed` or `waiting`, by what its folder holds."""
        if self.folder.finished:
            return "finished"
        return "waiting" if self.error() is None else "failed"


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What to compare.

    A variant is a method's name, or `zero-shot`, and what it is to have of its own: `siva:targets=query+value:rank=8`.
    Its keys are those of `TrainConfig`, or settings of the method or the Trainer. In targets, label words, text columns
    and lists of JSON `+` stands for the comma. A value in double quotes, a text of JSON, is taken as it stands, as in
    `mezo:prompt="{a}? <mask>, {b}":label_words=Yes+No`.
    `init_from=VARIANT` comes last and names another variant of the comparison: each of its cells starts from the
    result of that variant with the same seed. `zero-shot` takes a prompt and `calibrate=true`.

    Attributes:
        output: folder of the comparison.
        methods: variants.
        prompts: prompts that each variant without one is combined with, and the variant that it starts from likewise:
            names or templates, with fields of their own as `sst2:prompt_head=classifier`; `none` is no prompt. Empty:
            each variant as it is.
        seeds: every variant runs with the seeds 0 to `seeds - 1`.
        common: keys and values that all cells share.

    Raises:
        FastpeftError: a variant cannot be read, or its configuration cannot be used.

    Example:
        >>> config = CompareConfig(output="runs/all", methods=["siva", "lora:rank=2"], seeds=2)
        >>> [cell.name for cell in config.cells()]
        ['siva-seed0', 'siva-seed1', 'lora-rank=2-seed0', 'lora-rank=2-seed1']
    """

    output: str
    methods: Sequence[str]
    prompts: Sequence[str] = ()
    seeds: int = 1
    common: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.output, str) or not self.output:
            raise FastpeftError(f"output is {self.output!r}; it must be the name of a folder.")
        for name in ("methods", "prompts"):
            given = getattr(self, name)
            if isinstance(given, str) or not all(isinstance(item, str) and item for item in given):
                raise FastpeftError(f"{name} are {given!r}; they must be a list of texts that are not empty.")
        if not self.methods:
            raise FastpeftError(f"there is no method to compare. Name some of {', '.join((*METHODS, ZERO_SHOT))}.")
        if type(self.seeds) is not int or self.seeds < 1:
            raise FastpeftError(f"seeds is {self.seeds!r}; it must be a whole number from 1.")
        if self.prompts and "prompt" in self.common:
            raise FastpeftError(
                "a prompt is given for all cells and prompts to combine them with. Give one of the two."
            )
        if "init_from" in self.common and any(_CHAIN in text for text in self.methods):
            raise FastpeftError("init_from is given for all cells and by a variant. Give one of the two.")
        self.cells()

    def cells(self) -> list[Cell]:
        """Every cell, variant by variant."""
        variants = self._variants()
        made: dict[str, Cell] = {}
        for variant in variants:
            for cell in self._cells_of(variant, variants):
                other = made.setdefault(cell.name.casefold(), cell)
                if other is not cell:
                    raise FastpeftError(
                        f"the variants {other.variant!r} and {variant!r} are one, or would share the folder "
                        f"{cell.name!r}. Leave one out."
                    )
        return list(made.values())

    def _variants(self) -> list[str]:
        """The variants as written, each without a prompt of its own combined with every prompt."""
        made: list[str] = []
        for text in self.methods:
            prompts = () if _has_prompt(text) else self.prompts
            if text.partition(":")[0] == ZERO_SHOT and any(prompt != "none" for prompt in prompts):
                prompts = [prompt for prompt in prompts if prompt != "none"]
            made += [text if prompt == "none" else _with_prompt(text, prompt) for prompt in prompts or ("none",)]
        return made

    def _cells_of(self, variant: str, variants: Sequence[str]) -> list[Cell]:
        """The cells of a variant: one for each seed, or the one of `zero-shot`."""
        try:
            method, own, earlier = parse_variant(variant)
            for key in own:
                if key in ROWS:
                    raise FastpeftError(
                        f"it has {key}, but all cells share their rows. Give {key} once, for all of them."
                    )
            if earlier is not None and earlier not in variants:
                raise FastpeftError(
                    f"init_from names {earlier!r}, but the comparison has {', '.join(variants)}. Name one of them."
                )
            if method == ZERO_SHOT:
                name = _folder_name(variant)
                return [Cell(name, variant, method, None, self._zero_shot_values(name, own))]
            return [self._trained_cell(variant, seed) for seed in range(self.seeds)]
        except FastpeftError as error:
            raise FastpeftError(f"the variant {variant!r} cannot be used: {error}") from None

    def _trained_cell(self, variant: str, seed: int) -> Cell:
        method, own, earlier = parse_variant(variant)
        name = f"{_folder_name(variant)}-seed{seed}"
        shared = {key: value for key, value in self.common.items() if not (key == "max_steps" and "epochs" in own)}
        if "objective" in own:
            shared = {key: value for key, value in shared.items() if key not in FOR_LABELS}
        values = _train_values({**shared, **own})
        start = None if earlier is None else self._trained_cell(earlier, seed)
        if start is not None:
            values = {"model": start.values["model"], **values, "init_from": start.values["output"]}
        values |= {"output": str(self._cell_folder(name)), "method": method, "seed": seed}
        config = TrainConfig.from_values(values)
        method_options(config)
        return Cell(name, variant, method, seed, config.values(), None if start is None else start.name)

    def _zero_shot_values(self, name: str, own: dict[str, Any]) -> dict[str, Any]:
        calibrate = own.pop("calibrate", False)
        if not isinstance(calibrate, bool):
            raise FastpeftError(f"calibrate is {calibrate!r}; it must be true or false.")
        allowed = [name for name in _ZERO_SHOT_FIELDS if name not in ROWS]
        for key in own:
            if key not in allowed:
                raise FastpeftError(f"{ZERO_SHOT} takes no {key}; allowed are {', '.join((*allowed, 'calibrate'))}.")
        for key in _CHANGES_DEV_ROWS:
            if key in self.common:
                raise FastpeftError(f"{ZERO_SHOT} takes no {key}, which the other cells are given. Leave one out.")
        given = {key: value for key, value in {**self.common, **own}.items() if key in _ZERO_SHOT_FIELDS}
        config = TrainConfig.from_values({**given, "output": str(self._cell_folder(name))})
        if config.parse_prompt() is None:
            raise FastpeftError(f"{ZERO_SHOT} needs a prompt; give one as {ZERO_SHOT}:prompt=sst2.")
        return {**config.values(), "method": ZERO_SHOT, "calibrate": calibrate}

    def _cell_folder(self, name: str) -> Path:
        return _cells_folder(self.output) / name


def parse_variant(text: str) -> tuple[str, dict[str, Any], str | None]:
    """A variant's method, its own keys and values, and the variant that it starts from.

    Raises:
        FastpeftError: it cannot be read, or there is no such method.

    Example:
        >>> parse_variant("lst:targets=query+value:rank=8:init_from=mezo:prompt=sst2")
        ('lst', {'targets': 'query,value', 'rank': 8}, 'mezo:prompt=sst2')
    """
    own, chain, earlier = _partition_chain(text)
    method, *items = _split(own, r":(?=\w+=)")
    if method not in (*METHODS, ZERO_SHOT):
        raise FastpeftError(
            f"unknown method {method!r}; allowed are {', '.join((*METHODS, ZERO_SHOT))}. Write a variant as siva or "
            'siva:targets=query+value:rank=8, where + is a comma; put a value that has a comma itself in "".'
        )
    if chain and ZERO_SHOT in (method, earlier.partition(":")[0]):
        raise FastpeftError(f"{ZERO_SHOT} neither starts from a run nor leaves one.")
    values: dict[str, Any] = {}
    for item in items:
        name, _, value = item.partition("=")
        if not value or name in values:
            raise FastpeftError(f"{name} has {'two values' if name in values else 'no value'}; give it one.")
        values[name] = _value(name, value)
    return method, values, earlier if chain else None


def split_items(text: str) -> list[str]:
    """Variants or prompts as written on a command line, joined by commas; a comma in double quotes joins nothing.

    Example:
        >>> split_items('none, "{a}? <mask>, {b}":label_words=Yes+No')
        ['none', '"{a}? <mask>, {b}":label_words=Yes+No']
    """
    return [item.strip() for item in _split(text, ",")]


def _has_prompt(variant: str) -> bool:
    """Whether a variant has a prompt of its own, or an objective, which has none."""
    return any(item.startswith(("prompt=", "objective=")) for item in _split(_partition_chain(variant)[0], ":"))


def _with_prompt(variant: str, prompt: str) -> str:
    """A variant that has no prompt with one; what it starts from, where that has none, is the one with the same."""
    own, chain, earlier = _partition_chain(variant)
    if chain and not _has_prompt(earlier):
        earlier = _with_prompt(earlier, prompt)
    return f"{own}:prompt={prompt}{chain}{earlier}"


def _value(name: str, text: str) -> Any:
    """The value of a variant's key as written."""
    if not text.startswith('"') and (name in _LISTS or text.startswith("[")):
        text = ",".join(_split(text, r"\+"))
    value = parse_value(text)
    if text.startswith('"') and value == text:
        raise FastpeftError(
            f'{name} is {text}, which is no text of JSON. Close the quotes, and write \\" and \\\\ inside.'
        )
    return value


def _partition_chain(text: str) -> tuple[str, str, str]:
    """A variant as written, cut around the first `_CHAIN`, as `str.partition` does."""
    own, *earlier = _split(text, _CHAIN)
    return own, _CHAIN if earlier else "", _CHAIN.join(earlier)


def _split(text: str, separator: str) -> list[str]:
    """`text`, cut at the regular expression `separator` where that is not in double quotes, as JSON has them."""
    bare = re.sub(r'"(\\.|[^"\\])*"', lambda quoted: "_" * len(quoted[0]), text)
    cuts = [0, *(place for found in re.finditer(separator, bare) for place in found.span()), len(text)]
    return [text[start:end] for start, end in zip(cuts[::2], cuts[1::2])]


def _train_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keys and values as `TrainConfig.from_values` takes them: what is no field of it is a setting."""
    fields = [item.name for item in dataclasses.fields(TrainConfig)]
    values: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for name, value in given.items():
        if name in _DECIDED:
            raise FastpeftError(f"{name} cannot be given; {_DECIDED[name]}.")
        (values if name in fields else settings)[name] = value
    return {**values, "settings": settings}


def _folder_name(variant: str) -> str:
    """A variant as the name of a folder."""
    name = re.sub(r"[^\w.+=-]+", "-", variant).strip("-")
    if len(name) > _LONGEST_NAME:
        raise FastpeftError(f"it would name a folder of {len(name)} characters; allowed are {_LONGEST_NAME}.")
    return name


def _cells_folder(output: str | Path) -> Path:
    return Path(output).expanduser() / "cells"


@dataclass(frozen=True)
class Plan:
    """The cells of a comparison's folder.

    Attributes:
        folder: of the comparison.
        cells: all that the folder is about, those of earlier comparisons in it included, in the order of the report.
        wanted: those that the present comparison asks for, each after the one that it starts from.
        commands: how all these comparisons were started.
    """

    folder: Path
    cells: list[Cell]
    wanted: list[Cell]
    commands: list[str]

    @classmethod
    def make(cls, config: CompareConfig, command: str) -> Plan:
        """The plan of `config`, in a folder that may hold other cells or finished ones. Writes nothing.

        Raises:
            FastpeftError: the folder holds something else, a cell of the same name with other values, or one of other
                rows.
        """
        folder = Path(config.output).expanduser()
        cells = config.cells()
        earlier, commands = _read(folder)
        for cell in cells:
            try:
                cell.folder.check(cell.values, resume=True, overwrite=False)
            except FastpeftError as error:
                raise FastpeftError(f"the cell {cell.name!r} cannot be run in {str(folder)!r}: {error}") from None
        merged = {cell.name: cell for cell in (*earlier, *cells)}
        for cell in merged.values():
            _check_rows(cell, cells[0])
        return cls(folder, list(merged.values()), _in_order(cells), list(dict.fromkeys([*commands, command])))

    def save(self) -> None:
        """Make the folder, and write `comparison.json` into it."""
        try:
            _cells_folder(self.folder).mkdir(parents=True, exist_ok=True)
            values = {"commands": self.commands, "cells": [dataclasses.asdict(cell) for cell in self.cells]}
            files.write_json(self.folder / "comparison.json", values)
        except OSError as error:
            raise FastpeftError(
                f"cannot write to the output folder {str(self.folder)!r} ({error.strerror}). Give one that can be "
                "written."
            ) from error


def _read(folder: Path) -> tuple[list[Cell], list[str]]:
    """The cells and commands in a folder's `comparison.json`; none where the folder is new or empty."""
    file = folder / "comparison.json"
    if not file.is_file():
        if folder.exists() and (not folder.is_dir() or any(child.name != LOCK for child in folder.iterdir())):
            raise FastpeftError(
                f"the output {str(folder)!r} is no folder of a comparison and not empty, so it is left alone. Give the "
                "name of a new folder."
            )
        return [], []
    saved = files.read_json(file)
    try:
        cells = [Cell(**item) for item in saved["cells"]]
        for cell in cells:  # the folder may have moved
            cell.values["output"] = str(_cells_folder(folder) / cell.name)
        return cells, list(saved["commands"])
    except (KeyError, TypeError) as error:
        raise FastpeftError(f"{file} is not of a comparison ({error}). Restore it, or give another folder.") from None


def _check_rows(cell: Cell, other: Cell) -> None:
    """Refuse two cells of one table that do not have the same rows."""
    objective = cell.values.get("objective") or other.values.get("objective")
    excused = FOR_LABELS if objective else ("problem_type",)  # which zero-shot has of its own
    for name in ROWS:
        before, now = cell.values[name], other.values[name]
        if before != now and name not in excused:
            raise FastpeftError(
                f"the cell {cell.name!r} has {name} {before!r}, but {other.name!r} has {now!r}, and one table is about "
                "the same rows. Give another output folder."
            )


def _in_order(cells: Iterable[Cell]) -> list[Cell]:
    """The cells, each after the one that it starts from."""
    by_name = {cell.name: cell for cell in cells}
    ordered: dict[str, Cell] = {}

    def add(cell: Cell) -> None:
        if cell.after is not None:
            add(by_name[cell.after])
        ordered.setdefault(cell.name, cell)

    for cell in by_name.values():
        add(cell)
    return list(ordered.values())
