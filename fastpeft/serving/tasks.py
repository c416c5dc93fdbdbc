"""The runs that a server answers for. Side networks on equal backbones share one, and one batch over their tasks."""

from __future__ import annotations

import itertools
import re
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastpeft.errors import FastpeftError
from fastpeft.ladder import LadderModel, LadderPool
from fastpeft.prompts.model import PromptCollator, inside_prompt
from fastpeft.support.stages import report
from fastpeft.training.evaluation import Predictor, Taken

_MOST_ON_CPU = 16  # texts of a pass: more take as long each there, and are padded to the longest of more
NAME = r"[\w.-]{1,100}"  # of a task: it stands in addresses and in metrics


class RefusedError(FastpeftError):
    """What a client asked for cannot be done; `status` is the code of HTTP that says so."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Shared:
    """A backbone that several runs share.

    Attributes:
        pool: their side networks, by `Task.member`.
        tokenizer: of the first of them.
        bf16: whether they compute in bfloat16 where autocast does.
    """

    pool: LadderPool
    tokenizer: Any
    bf16: bool

    def fits(self, run: Any) -> bool:
        """Whether rows of a run can stand in one batch with those that are here."""
        own, other = self.tokenizer, run.classifier.tokenizer
        padding = (own.pad_token_id, own.padding_side) == (other.pad_token_id, other.padding_side)
        return padding and self.bf16 == run.config.bf16

    def scores(self, rows: Sequence[tuple[Task, Taken]]) -> list[np.ndarray]:
        """What `Predictor.scores` gives for each row, by one pass of the backbone."""
        encoded = [{name: value for name, value in taken.row.items() if name != "labels"} for _, taken in rows]
        if any("mask_positions" in row for row in encoded):  # tasks without a prompt do not read it
            encoded = [{"mask_positions": 0, **row} for row in encoded]
        batch = PromptCollator(self.tokenizer)(encoded)
        masks = batch["attention_mask"].bool()
        with torch.autocast(self.pool.backbone.core.device.type, torch.bfloat16, enabled=self.bf16):
            answers = self.pool(batch, [task.member for task, _ in rows])
        found = []
        for (task, taken), answer, mask in zip(rows, answers, masks):
            output = answer.logits.float().cpu().numpy()
            output = output[mask.numpy()] if task.predictor.run.problem.per_token else output
            found += task.predictor.scores_of([taken], [output])
        return found


@dataclass(frozen=True)
class Task:
    """A run that is served.

    Attributes:
        name: its name.
        predictor: the run.
        shared: the backbone that it shares. None: its model is its own.
        reason: why its backbone is its own; empty where others may share it.
        member: its name in the pool. No later task gets it, so that what was encoded for this one is never answered by
            another of the same name.
    """

    name: str
    predictor: Predictor
    shared: Shared | None
    reason: str = ""
    member: str = ""


@dataclass(frozen=True)
class Ready:
    """What is asked of one task, read and encoded."""

    task: Task
    taken: list[Taken]


class Tasks:
    """Runs by name. Threads may answer, add and remove at the same time.

    Args:
        runs: folders of finished runs, by the names of their tasks.
        device: where the models are put. None: the best device there is.
        max_length: where to cut texts that a run would read further, in tokens.
        max_rows: texts of one pass; on a CPU 16 at most.

    Raises:
        FastpeftError: a run cannot be loaded, or cannot answer.
    """

    def __init__(
        self,
        runs: Mapping[str, str | Path],
        *,
        device: str | None = None,
        max_length: int | None = None,
        max_rows: int = 64,
    ) -> None:
        self.max_rows = max_rows
        self._device, self._max_length = device, max_length
        self._tasks: dict[str, Task] = {}
        self._loading: set[str] = set()
        self._changing = threading.RLock()
        self._numbers = itertools.count()
        for name, folder in runs.items():
            report(f"loading {name}")
            self.add(name, folder)

    def __iter__(self) -> Iterator[Task]:
        return iter(list(self._tasks.values()))

    def __getitem__(self, name: str) -> Task:
        task = self._tasks.get(name)
        if task is None:
            there = ", ".join(map(repr, list(self._tasks))) or "none"
            raise RefusedError(f"there is no task {name!r}; the tasks are {there}. Name one of them.", 404)
        return task

    def beside(self, task: Task) -> list[str]:
        """The names of the other tasks on the backbone of one."""
        if task.shared is None:
            return []
        return [other.name for other in self if other.shared is task.shared and other.name != task.name]

    # -- changes -------------------------------------------------------------------------------------------------

    def add(self, name: str, folder: str | Path) -> Task:
        """Load a run and let it answer one text, by which a damaged one is found.

        Raises:
            RefusedError: there is a task of that name.
            FastpeftError: the run cannot be loaded, or cannot answer.
        """
        with self._changing:
            if name in self._tasks or name in self._loading:
                raise RefusedError(f"there is a task {name!r}. Remove it first, or give another name.", 409)
            self._loading.add(name)
        try:
            predictor = Predictor(folder, self._device, self._max_length)
            with self._changing:
                task = self._placed(name, predictor)
                try:
                    self._together([Ready(task, [predictor.take(_example(predictor))])])
                except BaseException:
                    self._leave(task)
                    raise
                self._tasks = {**self._tasks, name: task}
        finally:
            self._loading.discard(name)
        return task

    def _placed(self, name: str, predictor: Predictor) -> Task:
        """The run on a backbone that is here already, where there is one that it can share."""
        run = predictor.run
        ladder = inside_prompt(run.classifier.model)
        if not isinstance(ladder, LadderModel):
            return Task(name, predictor, None, f"{run.config.method} has no side network")
        reason, member = "", f"{name} {next(self._numbers)}"
        here = {id(task.shared): task.shared for task in self if task.shared is not None and task.shared.fits(run)}
        for shared in here.values():
            try:
                shared.pool.add(member, run.classifier.model)
                return Task(name, predictor, shared, member=member)
            except FastpeftError as error:  # it names what differs
                reason = str(error).partition(". ")[0]
        try:
            pool = LadderPool(ladder.base, ladder.config.feature_modules, ladder.config.backbone_dtype)
            pool.add(member, run.classifier.model)
        except FastpeftError as error:  # as of an adapter that trained inside the backbone
            return Task(name, predictor, None, str(error).partition(". ")[0])
        return Task(name, predictor, Shared(pool, run.classifier.tokenizer, bool(run.config.bf16)), reason, member)

    def remove(self, name: str) -> None:
        """Forget a run.

        Raises:
            RefusedError: there is no task of that name.
        """
        with self._changing:
            task = self[name]
            self._tasks = {other: each for other, each in self._tasks.items() if other != name}
            self._leave(task)

    def _leave(self, task: Task) -> None:
        if task.shared is not None:
            task.shared.pool.remove(task.member)

    # -- answers -------------------------------------------------------------------------------------------------

    def answer(self, asked: Sequence[tuple[str, Sequence[Any]]]) -> list[tuple[Ready, list[np.ndarray]] | Exception]:
        """Answer requests, each the name of a task and its texts, together where they can be.

        Returns:
            For each what was read and, as `Predictor.scores` has them, the scores; or why it has none.
        """
        found: list[Any] = [self._ready(name, texts) for name, texts in asked]
        groups: dict[int, list[int]] = defaultdict(list)
        for place, ready in enumerate(found):
            if isinstance(ready, Ready):
                groups[id(ready.task.shared or ready.task)].append(place)
        for places in groups.values():
            for place, answer in zip(places, self._answers([found[place] for place in places])):
                found[place] = answer if isinstance(answer, Exception) else (found[place], answer)
        return found

    def _ready(self, name: str, texts: Sequence[Any]) -> Ready | Exception:
        try:
            task = self[name]
        except RefusedError as error:
            return error
        taken = []
        for number, text in enumerate(texts, start=1):
            try:
                taken.append(task.predictor.take(text))
            except FastpeftError as error:
                return RefusedError(f"text {number}: {error}", 422)
            except Exception as error:  # the other requests must be answered
                return error
        return Ready(task, taken)

    def _answers(self, asked: Sequence[Ready]) -> list[list[np.ndarray] | Exception]:
        """The answers together, or each alone where that fails, so that one fails by itself."""
        try:
            return list(self._together(asked))
        except Exception as error:  # such as a task that was removed meanwhile, or too little memory for all
            if len(asked) == 1:
                task = asked[0].task
                if self._tasks.get(task.name) is task:
                    return [error]
                return [RefusedError(f"there is no task {task.name!r} any more: it was removed or replaced.", 404)]
            return [answer for each in asked for answer in self._answers([each])]

    def _together(self, asked: Sequence[Ready]) -> list[list[np.ndarray]]:
        """The answers of requests that share a model."""
        rows = [(each.task, taken) for each in asked for taken in each.taken]
        order = sorted(range(len(rows)), key=lambda place: len(rows[place][1].row["input_ids"]))  # pads little
        scores: dict[int, np.ndarray] = {}
        device = asked[0].task.predictor.run.classifier.model.device.type
        size = min(self.max_rows, _MOST_ON_CPU) if device == "cpu" else self.max_rows
        for start in range(0, len(rows), size):
            places = order[start : start + size]
            chosen = [rows[place] for place in places]
            task = chosen[0][0]
            if task.shared is not None:
                found = task.shared.scores(chosen)
            else:
                found = task.predictor.scores([taken for _, taken in chosen])
            scores |= dict(zip(places, found))
        ordered = (scores[place] for place in range(len(rows)))
        return [[next(ordered) for _ in each.taken] for each in asked]


def _example(predictor: Predictor) -> Any:
    """A text as the run reads one."""
    return ("a", "a") if predictor.run.is_pair else "a"


def parse_runs(items: Iterable[str]) -> dict[str, str]:
    """The folders that a command line names, RUN or NAME=RUN, by the names of their tasks.

    Raises:
        FastpeftError: a name cannot be one, or two are alike.
    """
    found: dict[str, str] = {}
    for item in items:
        name, separator, folder = item.partition("=")
        if not separator or Path(item).is_dir():
            name, folder = Path(item).expanduser().resolve().name, item
        if not re.fullmatch(NAME, name) or not folder:
            raise FastpeftError(
                f"{item!r} does not name a task; a name has letters, digits, '.', '_' and '-', 100 at most, and a "
                "folder follows it. Write NAME=RUN, where RUN is the folder of a finished run."
            )
        if name in found:
            raise FastpeftError(
                f"{found[name]!r} and {folder!r} would both be the task {name!r}. Name them apart, NAME=RUN."
            )
        found[name] = folder
    return found
