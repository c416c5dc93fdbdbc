"""The cells of a comparison: one for each variant and seed, and those that try learning rates."""

from __future__ import annotations

import copy
import dataclasses
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastpeft.comparison.cells import CELLS, SLICE, Cell
from fastpeft.comparison.learning_rates import rates
from fastpeft.comparison.suites import get_suite, suite_names
from fastpeft.comparison.variants import (
    CHAIN,
    DECIDED,
    ZERO_SHOT,
    parse_variant,
    partition_chain,
    variant_message,
    with_prompts,
)
from fastpeft.data.problems import Problem
from fastpeft.errors import FastpeftError, did_you_mean
from fastpeft.methods.registry import METHODS, get_method
from fastpeft.support import files
from fastpeft.training.config import FOR_LABELS, TrainConfig, options
from fastpeft.training.lineage import check_output
from fastpeft.training.setup import resolve

_ZERO_SHOT_FIELDS = ("model", "data", "prompt", "label_words", "text_column", "label_column")
# fields that decide the rows, which all cells share
ROW_FIELDS = ("data", "problem_type", "text_column", "label_column", "split_seed")
_CHANGES_DEV_ROWS = ("split_seed", "max_length")  # fields of the dev rows that a zero-shot cell does not take

PROTOCOLS = {"quick": 1, "full": 3}  # their numbers of seeds
_LONGEST_NAME = 200  # bytes of a variant's folder; file systems take 255, with `search-`, the seed and a file's ending


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What to compare.

    A variant is the name of a method, or `zero-shot`, and its own options: `siva:targets=query+value:rank=8`. An option
    is a field of `TrainConfig`, or a setting of the method or the Trainer. In targets, label words, text columns and
    lists of JSON `+` stands for the comma. A value in double quotes is a string of JSON, as in
    `mezo:prompt="{a}? <mask>, {b}":label_words=Yes+No`. `init_from=VARIANT` comes last and names another variant of the
    comparison: each cell starts from the result of that variant with the same seed. `zero-shot` takes a prompt and
    `calibrate=true`.

    Attributes:
        output: folder of the comparison.
        methods: variants, beside those of the suite.
        suite: a name of `fastpeft.comparison.suites`: the rows of a table of the paper.
        protocol: `quick`: one seed, one epoch (MeZO, whose steps are many and small: its recipe's), the recipes' rates.
            `full`: three seeds, and for every variant without a learning rate three rates on a slice of the training
            rows, of which the best is taken where it beats the recipe's by a paired test. None: one seed, the recipes
            as they are.
        prompts: prompts that each variant without one, and the variant that it starts from, is combined with: names or
            templates, with fields of their own as `sst2:prompt_head=classifier`; `none` is no prompt. Empty: each
            variant as it is. With a suite at most one, for its prompted rows, which `none` leaves out.
        seeds: every variant runs with the seeds 0 to `seeds - 1`. None: as many as the protocol has.
        common: options that all cells share.

    Raises:
        FastpeftError: a variant cannot be read, or its configuration cannot be used.

    Example:
        >>> config = CompareConfig(output="runs/all", methods=["siva", "lora:rank=2"], seeds=2)
        >>> [cell.name for cell in config.cells()]
        ['siva-seed0', 'siva-seed1', 'lora-rank=2-seed0', 'lora-rank=2-seed1']
    """

    output: str
    methods: Sequence[str] = ()
    suite: str | None = None
    protocol: str | None = None
    prompts: Sequence[str] = ()
    seeds: int | None = None
    common: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.output, Path):
            object.__setattr__(self, "output", str(self.output))
        if not isinstance(self.output, str) or not self.output:
            raise FastpeftError(f"`output` is {self.output!r}; it must be the name of a folder.")
        for name in ("methods", "prompts"):
            given = getattr(self, name)
            listed = isinstance(given, Sequence) and not isinstance(given, str)
            if not (listed and all(isinstance(item, str) and item for item in given)):
                raise FastpeftError(f"{name} are {given!r}; they must be a list of texts that are not empty.")
        if not isinstance(self.common, Mapping):
            raise FastpeftError(f"common is {self.common!r}; it must be a dictionary of options and values.")
        for name in ("methods", "prompts", "common"):
            object.__setattr__(self, name, copy.deepcopy(getattr(self, name)))  # the caller may change it
        if self.protocol not in (None, *PROTOCOLS):
            close = did_you_mean(str(self.protocol), PROTOCOLS)
            raise FastpeftError(f"`protocol` is {self.protocol!r}; it must be one of {', '.join(PROTOCOLS)}.{close}")
        if self.suite is None and not self.methods:
            raise FastpeftError(
                "there is no method to compare. Give --methods with one or more of "
                f"{', '.join((*METHODS, ZERO_SHOT))}; or --suite with one of {', '.join(suite_names())}."
            )
        if self.suite is not None:
            get_suite(self.suite)  # raises where there is none of that name
            if len(self.prompts) > 1:
                raise FastpeftError(
                    f"prompts are {', '.join(self.prompts)}, but {self.suite} has rows with a prompt and rows without. "
                    "Give the one prompt of those with, auto, or none to leave them out."
                )
        if self.seeds is not None and (type(self.seeds) is not int or self.seeds < 1):
            raise FastpeftError(f"`seeds` is {self.seeds!r}; it must be a whole number from 1.")
        if self.prompts and "prompt" in self.common:
            raise FastpeftError(
                "both prompt, for all cells, and prompts, to combine the variants with, are given. Give one of the two."
            )
        if "init_from" in self.common and any(CHAIN in text for text in self._variants()):
            raise FastpeftError("`init_from` is given for all cells and by a variant. Give one of the two.")
        self.cells()

    @property
    def shared(self) -> dict[str, Any]:
        """Options that all cells share: those given, before those of the suite."""
        own = {} if self.suite is None else get_suite(self.suite).common
        if "max_steps" in self.common:
            own = {key: value for key, value in own.items() if key != "epochs"}
        return {**own, **self.common}

    def cells(self) -> list[Cell]:
        """Every cell, variant by variant; what tries learning rates for a variant comes before it."""
        variants = self._variants()
        made: dict[str, Cell] = {}
        for variant in variants:
            for cell in self._cells_of(variant, variants):
                other = made.setdefault(cell.name.casefold(), cell)
                if other is not cell:
                    raise FastpeftError(
                        f"the variants {other.variant!r} and {variant!r} are the same, or would write to the same "
                        f"folder {cell.name!r}. Remove one of them."
                    )
        return list(made.values())

    def _variants(self) -> list[str]:
        """The variants as written, each without a prompt of its own combined with every prompt."""
        if self.suite is not None:
            suite = get_suite(self.suite, self.prompts[0] if self.prompts else None)
            return [*(row.variant for row in suite.rows), *self.methods]
        return [variant for text in self.methods for variant in with_prompts(text, self.prompts)]

    def _cells_of(self, variant: str, variants: Sequence[str]) -> list[Cell]:
        """The cells of a variant: one for each seed and each rate to try, or the one of `zero-shot`."""
        try:
            method, own, earlier = parse_variant(variant)
            for key in own:
                if key in ROW_FIELDS:
                    raise FastpeftError(
                        f"it has {key}, but all cells share their rows. Give {key} once, for all of them."
                    )
            if earlier is not None and earlier not in variants:
                others = [text for text in variants if text != variant and text.partition(":")[0] != ZERO_SHOT]
                named = f"; or name one of {', '.join(others)}" if others else ""
                raise FastpeftError(
                    f"`init_from` names {earlier!r}, which is no variant of the comparison. Add it, as --methods "
                    f"{shlex.quote(f'{earlier},{variant}')}{named}."
                )
            if earlier is not None:
                start, of_start, _ = parse_variant(earlier)
                get_method(start, of_start).check_merges(f"what it starts from, {earlier!r},")
            if method == ZERO_SHOT:
                name = _folder_name(variant)
                return [Cell(name, variant, method, None, self._zero_shot_values(name, own))]
            tried, results = self._trained_cells(variant)
            names = tuple(cell.name for cell in tried)
            return [*tried, *(dataclasses.replace(cell, rates=names) for cell in results)]
        except FastpeftError as error:
            raise FastpeftError(f"the variant {variant!r} cannot be used: {variant_message(variant, error)}") from None

    def _trained_cells(self, variant: str) -> tuple[list[Cell], list[Cell]]:
        """The cells that try learning rates for a variant, and those that train it, one for each seed."""
        method, own, earlier = parse_variant(variant)
        start_tried, starts = ([], []) if earlier is None else self._trained_cells(earlier)
        name, seeds = _folder_name(variant), range(self.seeds or PROTOCOLS.get(self.protocol or "quick", 1))
        results = [self._trained_cell(f"{name}-seed{seed}", variant, seed, starts[seed : seed + 1]) for seed in seeds]
        if self.protocol != "full" or "learning_rate" in {**self.shared, **own}:
            return [], results
        if starts and not start_tried and starts[0].values["objective"] is None:  # else it learns no labels
            raise FastpeftError(
                f"it starts from {earlier!r}, whose learning rate is given. So that learns from all training rows, "
                f"also from those on which learning rates for {method} are compared. Give {method} a learning_rate, or "
                f"{earlier!r} none."
            )
        tried = []
        own_text, chain, rest = partition_chain(variant)
        for rate in rates(resolve(results[0].config).recipe.learning_rate):
            text = f"{own_text}:learning_rate={rate:g}{chain}{rest}"
            cell = self._trained_cell(f"search-{_folder_name(text)}", text, 0, start_tried or starts[:1])
            values = {**cell.values, "data": str(_slice(self.output)), "text_column": None, "label_column": None}
            tried.append(dataclasses.replace(cell, variant=variant, search=True, values=values))
        return tried, results

    def _trained_cell(self, name: str, variant: str, seed: int, starts: Sequence[Cell]) -> Cell:
        method, own, _ = parse_variant(variant)
        shared = {key: value for key, value in self.shared.items() if not (key == "max_steps" and "epochs" in own)}
        if "objective" in own:
            shared = {key: value for key, value in shared.items() if key not in FOR_LABELS}
        values = _train_values({**shared, **own})
        if starts:
            values = {"model": starts[0].values["model"], **values, "init_from": starts[0].values["output"]}
        values |= {"output": str(_cells_folder(self.output) / name), "method": method, "seed": seed}
        if self.protocol == "quick" and not METHODS[method].zeroth_order and "max_steps" not in values:
            values.setdefault("epochs", 1)
        config = TrainConfig.from_values(values)
        try:
            resolve(config)
        except FastpeftError as error:
            raise FastpeftError(f"{error.args[0]}{_meant(values['settings'])}") from None
        return Cell(name, variant, method, seed, config.values(), tuple(start.name for start in starts))

    def _zero_shot_values(self, name: str, own: dict[str, Any]) -> dict[str, Any]:
        calibrate = own.pop("calibrate", False)
        if not isinstance(calibrate, bool):
            raise FastpeftError(f"calibrate is {calibrate!r}; it must be true or false.")
        allowed = [name for name in _ZERO_SHOT_FIELDS if name not in ROW_FIELDS]
        for key in own:
            if key not in allowed:
                raise FastpeftError(f"{ZERO_SHOT} takes no {key}; allowed are {', '.join((*allowed, 'calibrate'))}.")
        for key in _CHANGES_DEV_ROWS:
            if key in self.common:
                raise FastpeftError(f"{ZERO_SHOT} takes no `{key}`, which the other cells are given. Leave one out.")
        given = {key: value for key, value in {**self.shared, **own}.items() if key in _ZERO_SHOT_FIELDS}
        config = TrainConfig.from_values({**given, "output": str(_cells_folder(self.output) / name)})
        if config.parse_prompt() is None and not config.awaits_prompt:
            raise FastpeftError(f"{ZERO_SHOT} needs a prompt; give one as {ZERO_SHOT}:prompt=sst2.")
        return {**config.values(), "method": ZERO_SHOT, "calibrate": calibrate}


def _train_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options as `TrainConfig.from_values` takes them: what is no field of it is a setting."""
    fields = [known.name for known in options()]
    for name in given:
        if name in DECIDED:
            raise FastpeftError(f"{name} cannot be given; {DECIDED[name]}.")
    settings = {name: value for name, value in given.items() if name not in fields}
    return {**{name: given[name] for name in given if name in fields}, "settings": settings}


def _meant(settings: Iterable[str]) -> str:
    """Advice on settings whose names are almost that of a field of `TrainConfig`; empty where none is."""
    fields = [known.name for known in options() if known.name not in DECIDED]
    close = next(filter(None, (did_you_mean(setting, fields, cutoff=0.7) for setting in settings)), "")
    return f"{close} A variant takes {', '.join(fields)} too." if close else ""


def _folder_name(variant: str) -> str:
    """A variant as the name of a folder."""
    name = re.sub(r"[^\w.+=-]+", "-", variant).strip("-")
    if (length := len(name.encode())) > _LONGEST_NAME:
        raise FastpeftError(
            f"it would name a folder of {length} bytes, in which a letter of some scripts takes two to four; allowed "
            f"are {_LONGEST_NAME}. Shorten what it is given."
        )
    return name


def _cells_folder(output: str | Path) -> Path:
    return files.path_of(output) / CELLS


def _slice(output: str | Path) -> Path:
    return files.path_of(output).resolve() / SLICE  # absolute, as `TrainConfig` keeps what is there


@dataclass(frozen=True)
class Plan:
    """The cells of a comparison's folder.

    Attributes:
        folder: of the comparison.
        cells: all that the folder is about, those of earlier comparisons in it included, in the order of the report.
        wanted: those that the present comparison asks for, each after the one that it starts from.
        commands: how all these comparisons were started.
        suites: names of those that they ran.
    """

    folder: Path
    cells: list[Cell]
    wanted: list[Cell]
    commands: list[str]
    suites: list[str]

    @classmethod
    def make(cls, config: CompareConfig, command: str) -> Plan:
        """The plan of `config`, in a folder that may hold other cells or finished ones. Writes nothing.

        Raises:
            FastpeftError: the folder holds something else, a cell of the same name with other values, or one of other
                rows.
        """
        folder = files.path_of(config.output)
        earlier = _read(folder)
        asked = [_in_one_precision(cell, earlier.cells) for cell in config.cells()]
        by_name = {cell.name: cell for cell in (*earlier.cells, *asked)}
        unsearched = {cell.name for cell in earlier.cells if not cell.rates and cell.folder.started}
        cells = [_filled_in(cell, by_name) for cell in asked]
        for cell in cells:
            try:
                if cell.rates and cell.name in unsearched:
                    raise FastpeftError("its learning rate was not searched, and is now to be. Give another output.")
                _check_resumable(cell)
            except FastpeftError as error:
                raise FastpeftError(f"the cell {cell.name!r} cannot be run in {str(folder)!r}: {error}") from None
        merged = by_name | {cell.name: cell for cell in cells}
        first = next(cell for cell in cells if not cell.search)
        for cell in merged.values():
            if not cell.search:
                _check_row_fields(cell, first)
        return cls(
            folder,
            list(merged.values()),
            _in_order(cells),
            list(dict.fromkeys([*earlier.commands, command])),
            list(dict.fromkeys([*earlier.suites, *([config.suite] if config.suite else [])])),
        )

    @property
    def results(self) -> list[Cell]:
        """The cells that the report is about."""
        return [cell for cell in self.cells if not cell.search]

    @property
    def searches(self) -> list[Cell]:
        """The cells that try learning rates."""
        return [cell for cell in self.cells if cell.search]

    @property
    def slice(self) -> Path:
        """Where the rows lie that learning rates are tried on."""
        return _slice(self.folder)

    def fill_in(self, cell: Cell) -> Cell:
        """The cell with what those before it have found; the plan then holds it so too.

        Raises:
            FastpeftError: the cells before it have failed.
        """
        filled = cell.filled_in({other.name: other for other in self.cells})
        self._replace(filled)
        return filled

    def tell_searches(self, problem: Problem) -> None:
        """Tell cells that try rates what the labels are: scores of a slice alone may all be whole, as classes are."""
        for cell in self.searches:
            if cell.values["objective"] is None:
                self._replace(dataclasses.replace(cell, values={**cell.values, "problem_type": problem.short}))

    def _replace(self, cell: Cell) -> None:
        for cells in (self.cells, self.wanted):
            cells[:] = [cell if other.name == cell.name else other for other in cells]

    def save(self) -> None:
        """Make the folder, and write `comparison.json` into it; runs of a folder that moved then name where it is."""
        with files.saving_into(self.folder):
            cells = _cells_folder(self.folder)
            cells.mkdir(parents=True, exist_ok=True)
            for folder in (self.folder, cells):
                files.clear_unfinished(folder)
            values = {
                "commands": self.commands,
                "suites": self.suites,
                "cells": [dataclasses.asdict(cell) for cell in self.cells],
            }
            files.write_json(self.folder / "comparison.json", values)
            for cell in self.cells:
                if cell.folder.started:
                    cell.folder.note_moved(cell.own_paths(cell.values))


def _in_one_precision(cell: Cell, earlier: Sequence[Cell]) -> Cell:
    """A cell with its precision, where nobody chose one: that of earlier cells in the folder, or else this machine's.

    So cells that other machines run, or that are added there, have the same precision.
    """
    if cell.method == ZERO_SHOT or cell.values["bf16"] is not None:
        return cell
    same = [other for other in earlier if other.name == cell.name]
    alike = [other for other in earlier if other.method in METHODS and _trains_alike(other, cell)]
    known = [*same, *alike]
    bf16 = known[0].values["bf16"] if known else resolve(cell.config).config.bf16
    return dataclasses.replace(cell, values={**cell.values, "bf16": bf16})


def _trains_alike(cell: Cell, other: Cell) -> bool:
    """Whether two cells both train by gradients or both without, with weights in one dtype, and the first does not say
    itself what it computes in.
    """
    kinds = [(METHODS[each.method].zeroth_order, each.values.get("dtype") == "bfloat16") for each in (cell, other)]
    return kinds[0] == kinds[1] and "bf16" not in parse_variant(cell.variant)[1]


def _filled_in(cell: Cell, by_name: Mapping[str, Cell]) -> Cell:
    """A cell with what those before it have found so far; where they failed, which are tried again, as it is."""
    try:
        return cell.filled_in(by_name)
    except FastpeftError:
        return cell


def _check_resumable(cell: Cell) -> None:
    """Raise `FastpeftError` unless a cell may run in its folder, where it may have begun."""
    check_output(cell.folder, cell.values, resume=True, overwrite=False, moved=cell.own_paths(cell.values))


def _read(folder: Path) -> Plan:
    """What a folder's `comparison.json` says; a plan of nothing where the folder is new or empty."""
    file = folder / "comparison.json"
    if not file.is_file():
        if folder.exists() and not folder.is_dir():
            raise FastpeftError(f"the output {str(folder)!r} is a file. Give the name of a new folder.")
        if folder.exists() and not files.is_empty(folder, CELLS):
            raise FastpeftError(
                f"the output {str(folder)!r} is no folder of a comparison and not empty, so it is left alone. Give the "
                "name of a new folder."
            )
        return Plan(folder, [], [], [], [])
    saved = files.read_json(file)
    try:
        cells = [Cell.from_values(item) for item in saved["cells"]]
        for cell in cells:  # the folder may have moved
            if Path(cell.name).name != cell.name or cell.name in ("", ".."):  # another's folder
                raise TypeError(f"a cell is named {cell.name!r}")
            cell.values["output"] = str(_cells_folder(folder) / cell.name)
            cell.values.update(cell.own_paths(cell.values))
        return Plan(folder, cells, [], list(saved["commands"]), list(saved["suites"]))
    except (KeyError, TypeError) as error:
        raise FastpeftError(f"{file} is not of a comparison ({error}). Restore it, or give another folder.") from None


def _check_row_fields(cell: Cell, other: Cell) -> None:
    """Refuse two cells of one table that do not have the same rows."""
    objective = cell.values.get("objective") or other.values.get("objective")
    excused = FOR_LABELS if objective else ("problem_type",)  # which zero-shot has of its own
    for name in ROW_FIELDS:
        before, now = cell.values[name], other.values[name]
        if before != now and name not in excused:
            raise FastpeftError(
                f"the cell {cell.name!r} has {name} {before!r}, but {other.name!r} has {now!r}, and one table is about "
                "the same rows. Give another output folder."
            )


def _in_order(cells: Sequence[Cell]) -> list[Cell]:
    """The cells, each after those that it needs."""
    by_name = {cell.name: cell for cell in cells}

    def with_needs(cell: Cell) -> list[Cell]:
        return [*(each for name in cell.needs for each in with_needs(by_name[name])), cell]

    return list({each.name: each for cell in cells for each in with_needs(cell)}.values())
