"""The runs that a server answers for.

Side networks on equal backbones share one, and adapters of SiVA on equal bases; one batch goes over their tasks. Other
models share equal weights.
"""

from __future__ import annotations

import itertools
import logging
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from fastpeft.data.batches import compute_by_length
from fastpeft.data.conversations import USER, Conversation
from fastpeft.data.next_words import prompt_tokens
from fastpeft.data.problems import NEXT_WORDS
from fastpeft.errors import FastpeftError, NotEnoughMemoryError, is_out_of_memory
from fastpeft.ladder import LadderModel, LadderPool
from fastpeft.prompts.model import PromptCollator, inside_prompt
from fastpeft.serving.generation import GenerationRequest, generate_batch
from fastpeft.serving.shared_weights import content_of, share_weights
from fastpeft.serving.siva_pool import SivaPool, is_siva
from fastpeft.support.files import path_of
from fastpeft.support.resident import keep_in_file
from fastpeft.support.stages import report
from fastpeft.training.generation import depends_on_padding, eos_token_ids, generates_text, keeps_tokens
from fastpeft.training.loading import EncodedText, FinishedRun, load_run
from fastpeft.training.prediction import Predictor

logger = logging.getLogger(__name__)

_MOST_ON_CPU = 16  # texts of a pass: more take as long each there, and are padded to the longest of more
_MAX_TOKENS = 256  # that are generated, where a client names no number
_NO_MODEL = ("model", "model_not_found")  # `param` and `code` of a task that is not there, or generates no text
NAME = r"[\w.-]{1,100}"  # of a task: it stands in addresses and in metrics


class RefusedError(FastpeftError):
    """What a client asked for cannot be done.

    `status` is the code of HTTP that says so. `param` and `code` are what OpenAI's form of an error names: the part of
    the request, and the kind of the error.
    """

    def __init__(self, message: str, status: int, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


@dataclass(frozen=True)
class Shared:
    """A backbone that several runs share.

    Attributes:
        pool: their side networks or their adapters, by `Task.member`.
        tokenizer: of the first of them.
        common: what they have in common beside the backbone, by its name, see `_common`.
    """

    pool: LadderPool | SivaPool
    tokenizer: Any
    common: dict[str, Any]

    def scores(self, rows: Sequence[tuple[Task, EncodedText]]) -> list[np.ndarray]:
        """What `Predictor.scores` gives for each row, by one pass of the backbone."""
        encoded = [{name: value for name, value in text.row.items() if name != "labels"} for _, text in rows]
        if any("mask_positions" in row for row in encoded):  # tasks without a prompt do not read it
            encoded = [{"mask_positions": 0, **row} for row in encoded]
        batch = PromptCollator(self.tokenizer)(encoded)
        masks = batch["attention_mask"].bool()
        with rows[0][0].run.autocast():
            answers = self.pool(batch, [task.member for task, _ in rows])
        found = []
        for (task, text), answer, mask in zip(rows, answers, masks):
            output = answer.logits.float().cpu().numpy()
            output = output[mask.numpy()] if task.run.problem.per_token else output
            found += _predictor(task).scores_of([text], [output])
        return found


def _common(run: FinishedRun) -> dict[str, Any]:
    """What all rows of a batch have in common, by the name of it."""
    generates, tokenizer = run.problem is NEXT_WORDS, run.loaded.tokenizer
    return {
        "kind of answer": generates,
        "precision": bool(run.config.bf16),
        "dtype of weights": run.config.in_bfloat16,
        "padding": (tokenizer.pad_token_id, tokenizer.padding_side),
        "generation_config": run.loaded.model.generation_config if generates else None,
    }


@dataclass(frozen=True)
class Task:
    """A run that is served.

    Attributes:
        predictor: the run in use, where it tells classes, numbers or tags; None where it generates text.
        shared: the backbone that it shares. None: its model is its own.
        reason: why its backbone is its own; empty where others may share it.
        member: its name in the pool. No later task gets it, so that what was encoded for this one is never answered by
            another of the same name.
        alone: whether each text is generated alone, see `fastpeft.training.generation.depends_on_padding`.
        held: the bytes of its own model that other tasks hold too.
    """

    name: str
    run: FinishedRun
    predictor: Predictor | None
    shared: Shared | None
    reason: str = ""
    member: str = ""
    alone: bool = False
    held: int = 0

    def generate(self, requests: Sequence[GenerationRequest]) -> None:
        """Generate text for requests, of this task and of others on its backbone, until each has ended."""
        model, tokenizer = self.run.loaded.model, self.run.loaded.tokenizer
        uncached = {} if keeps_tokens(model) else {"use_cache": False}
        generate: Callable[..., Any] = lambda batch, **options: model.generate(**batch, **uncached, **options)  # noqa: E731
        if self.shared is not None:
            requests = sorted(requests, key=lambda request: request.task.member)  # rows of a task follow each other
            assert isinstance(self.shared.pool, LadderPool)  # see `_placed`
            generate = partial(self.shared.pool.generate, tasks=[request.task.member for request in requests])
        with torch.inference_mode(), self.run.autocast():
            generate_batch(generate, tokenizer, model.device, requests)

    def request(self, asked: Conversation | str, max_tokens: int | None = None, **options: Any) -> GenerationRequest:
        """A request for generated text, encoded.

        Args:
            asked: a conversation, which the chat template of the task's model writes, or a text to go on from.
            max_tokens: the most tokens to generate. None: 256, or what the model has room for.
            options: of `GenerationRequest`.

        Raises:
            RefusedError: it is a conversation and the run learned from texts, or the model reads fewer tokens.
        """
        chats, tokenizer = isinstance(asked, Conversation), self.run.loaded.tokenizer
        param = "messages" if chats else "prompt"
        if chats and not self.run.chats:
            raise RefusedError(
                f"the task {self.name!r} learned from texts, not from conversations. Send it a prompt, by POST "
                "/v1/completions.",
                400,
                param,
            )
        try:
            tokens = prompt_tokens(tokenizer, asked)
            eos = eos_token_ids(self.run.loaded.model, tokenizer, chats=chats)
        except FastpeftError as error:  # of the template
            raise RefusedError(str(error), 400, param) from error
        if not tokens:
            raise RefusedError("the prompt has no tokens to continue from. Give a text.", 400, param)
        limit, count = self.run.max_length, len(tokens)
        room = limit - count
        if room < (max_tokens or 1):
            raise RefusedError(
                f"the task {self.name!r} reads {limit} tokens; here are {count}, and {max_tokens or 1} more for the "
                "answer. Send less, or ask for fewer.",
                400,
                param,
                "context_length_exceeded",
            )
        most = max_tokens or min(_MAX_TOKENS, room)
        # a text that goes on may begin with a space
        return GenerationRequest(self, tokenizer, tokens, eos_token_ids=eos, max_tokens=most, strip=chats, **options)

    def describe(self) -> dict[str, Any]:
        """The task in the list of tasks. Messages and prompts alone are not cut to its `max_length`."""
        run, generates = self.run, self.predictor is None
        reads = "pair" if run.is_pair else "words" if run.problem.per_token else "string"
        return {
            "name": self.name,
            "method": run.config.method,
            "problem": run.problem.name,
            "labels": [] if generates else run.labels,
            "reads": ("messages" if run.chats else "prompt") if generates else reads,
            "max_length": run.max_length,
        }


@dataclass(frozen=True)
class EncodedRequest:
    """Texts for one task, encoded, and how many of them go on after what it reads."""

    task: Task
    texts: list[EncodedText]
    cut: int = 0


class Tasks:
    """Runs by name. Threads may answer, add and remove at the same time.

    Args:
        runs: folders of finished runs, by the names of their tasks.
        device: where the models are put. None: the best device there is.
        max_length: where to cut texts that a run would read further, in tokens; of a run on next words the most of a
            request with its answer, above which it is refused.
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
        self._tokenizers: WeakValueDictionary[str, Any] = WeakValueDictionary()  # by what they are made of
        for name, folder in runs.items():
            report(f"loading {name}")
            self.add(name, folder)

    def __iter__(self) -> Iterator[Task]:
        return iter(list(self._tasks.values()))

    def __getitem__(self, name: str) -> Task:
        task = self._tasks.get(name)
        if task is None:
            there = ", ".join(map(repr, list(self._tasks))) or "none"
            said = f"there is no task {name!r}; the tasks are {there}. Name one of them."
            raise RefusedError(said, 404, *_NO_MODEL)
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
            predictor = None if generates_text(folder) else Predictor(folder, self._device, self._max_length)
            if predictor is None:  # prompts are not cut, so the model may read more than the run did
                run = load_run(folder, self._device)
                run = replace(run, max_length=min(run.loaded.max_length, self._max_length or run.loaded.max_length))
            else:
                run = predictor.run
            tokenizer = self._tokenizers.setdefault(content_of(run.loaded.tokenizer), run.loaded.tokenizer)
            run = replace(run, loaded=replace(run.loaded, tokenizer=tokenizer))
            if predictor is not None:
                predictor.run = run
            # asked before it shares a backbone, whose answers to others the passes would disturb
            alone = predictor is None and depends_on_padding(run.loaded.model)
            with self._changing:
                task = replace(self._placed(name, run, predictor), alone=alone)
                try:
                    if predictor is None:
                        task.generate([task.request(Conversation(((USER, "a"),)) if run.chats else "a", 1)])
                    else:
                        text = ("a", "a") if run.is_pair else "a"
                        self._together([EncodedRequest(task, [predictor.encode(text)])])
                except BaseException:
                    self._leave(task)
                    raise
                self._tasks = {**self._tasks, name: task}
        finally:
            self._loading.discard(name)
        return task

    def _placed(self, name: str, run: FinishedRun, predictor: Predictor | None) -> Task:
        """The run on a backbone that is here already, where there is one that it can share."""
        model = inside_prompt(run.loaded.model)
        alone = Task(name, run, predictor, None)
        if isinstance(model, LadderModel):
            if predictor is None and not keeps_tokens(model):
                why = f"beside a {model.backbone.class_name} no earlier tokens are kept"
                return replace(alone, reason=why)
            return self._pooled(alone, LadderPool, partial(_pool_of, model, generates=predictor is None))
        model.requires_grad_(False)  # what trained in one run is frozen in another, and both only answer
        task = replace(alone, reason=f"{run.config.method} has no side network")
        if predictor is not None and is_siva(model):
            task = self._pooled(alone, SivaPool, partial(SivaPool, model))
            if task.shared is not None and task.run.loaded.model is not model:
                return task
        models = [inside_prompt(other.run.loaded.model) for other in self]
        # not with a side network's, whose packs replace weights
        held = share_weights(model, [each for each in models if not isinstance(each, LadderModel)])
        return replace(task, held=held)

    def _pooled(self, alone: Task, kind: type, new: Callable[[], LadderPool | SivaPool]) -> Task:
        """The run in the first pool of a kind that takes it, or in a new one; alone, if it can be in none."""
        run, reason, member = alone.run, "", f"{alone.name} {next(self._numbers)}"
        common = _common(run)
        for shared in {id(task.shared): task.shared for task in self}.values():
            if shared is None or not isinstance(shared.pool, kind):
                continue
            if unlike := [what for what, value in common.items() if shared.common[what] != value]:
                reason = reason or f"its {unlike[0]} is not that of other runs"
                continue
            try:
                shared.pool.add(member, run.loaded.model)
            except FastpeftError as error:  # it names what differs; of one that is alike no more is told
                reason = str(error).partition(". ")[0]
            else:
                keep_in_file(_own_tensors(shared.pool, member))
                return replace(_on(alone, shared.pool), shared=shared, member=member)
        try:
            pool = new()
            pool.add(member, run.loaded.model)
        except FastpeftError as error:  # as of an adapter that trained inside the backbone
            return replace(alone, reason=str(error).partition(". ")[0])
        return replace(alone, shared=Shared(pool, run.loaded.tokenizer, common), reason=reason, member=member)

    def remove(self, name: str) -> None:
        """Forget a run."""
        with self._changing:
            task = self[name]
            self._tasks = {other: each for other, each in self._tasks.items() if other != name}
            self._leave(task)

    def _leave(self, task: Task) -> None:
        if task.shared is not None:
            task.shared.pool.remove(task.member)

    # -- answers -------------------------------------------------------------------------------------------------

    def answer(
        self, asked: Sequence[tuple[str, Sequence[Any]]]
    ) -> list[tuple[EncodedRequest, list[np.ndarray]] | Exception]:
        """Answer requests, each the name of a task and its texts, together where they can be.

        For each there is what was read and, as `Predictor.scores` has them, the scores; or why it has none.
        """
        found: list[Any] = []
        for name, texts in asked:
            try:
                found.append(self._encode(name, texts))
            except Exception as error:  # the other requests must be answered
                found.append(error)
        groups: dict[int, list[int]] = defaultdict(list)
        for place, each in enumerate(found):
            if isinstance(each, EncodedRequest):
                groups[id(each.task.shared or each.task)].append(place)
        for places in groups.values():
            for place, answer in zip(places, self._answers([found[place] for place in places])):
                found[place] = answer if isinstance(answer, Exception) else (found[place], answer)
        return found

    def _encode(self, name: str, texts: Sequence[Any]) -> EncodedRequest:
        task = self[name]
        if task.predictor is None:
            how = "messages by POST /v1/chat/completions" if task.run.chats else "a prompt by POST /v1/completions"
            raise RefusedError(f"the task {name!r} generates text and predicts no classes. Send it {how}.", 422)
        encoded = []
        for number, text in enumerate(texts, start=1):
            try:
                encoded.append(task.predictor.encode(text))
            except FastpeftError as error:
                raise RefusedError(f"text {number}: {error}", 422) from error
        return EncodedRequest(task, encoded, task.predictor.count_cut(encoded))

    def _answers(self, asked: Sequence[EncodedRequest]) -> list[list[np.ndarray] | Exception]:
        """The answers together, or each alone where that fails, so that one fails by itself."""
        try:
            return list(self._together(asked))
        except Exception as error:  # such as a task that was removed meanwhile, or too little memory for all
            if len(asked) == 1:
                return [self._why(asked[0].task, error)]
        # not before here: the error held what was computed
        return [answer for each in asked for answer in self._answers([each])]

    def _why(self, task: Task, error: Exception) -> Exception:
        """The error of a task, that memory is not enough, or that the task is there no more."""
        if self._tasks.get(task.name) is not task:
            return RefusedError(f"there is no task {task.name!r} any more: it was removed or replaced.", 404)
        if not (isinstance(error, NotEnoughMemoryError) or is_out_of_memory(error)):
            return error
        logger.warning("%s: %s", task.name, error)
        return RefusedError("memory is not enough for the request. Send shorter texts, or try again later.", 503)

    def _most_rows(self, task: Task) -> int:
        on_cpu = task.run.loaded.model.device.type == "cpu"
        return min(self.max_rows, _MOST_ON_CPU) if on_cpu else self.max_rows

    def _together(self, asked: Sequence[EncodedRequest]) -> list[list[np.ndarray]]:
        """The answers of requests that share a model."""
        rows = [(each.task, text) for each in asked for text in each.texts]
        scores: dict[int, np.ndarray] = {}

        def compute(places: list[int]) -> None:
            chosen = [rows[place] for place in places]
            task = chosen[0][0]
            if task.shared is not None:
                found = task.shared.scores(chosen)
            else:
                found = _predictor(task).scores([text for _, text in chosen])
            scores.update(zip(places, found))

        compute_by_length(compute, [text.row for _, text in rows], self._most_rows(asked[0].task))
        ordered = (scores[place] for place in range(len(rows)))
        return [[next(ordered) for _ in each.texts] for each in asked]

    # -- generated text ------------------------------------------------------------------------------------------

    def generative(self, name: str) -> Task:
        """The task of that name, which generates text; otherwise `RefusedError` is raised."""
        task = self[name]
        if task.predictor is not None:
            raise RefusedError(f"the task {name!r} generates no text. Send it texts by POST /predict.", 404, *_NO_MODEL)
        return task

    def generate(self, asked: Sequence[tuple[str, Sequence[GenerationRequest]]]) -> list[GenerationRequest | Exception]:
        """Answer requests for generated text together where they share a model and their sampling.

        For each there is the request, which has ended; or why it could not be answered.
        """
        requests = [request for _, each in asked for request in each]
        groups: dict[Any, list[GenerationRequest]] = defaultdict(list)
        for request in requests:
            groups[id(request.task.shared or request.task), request.sampling].append(request)
        failed: dict[int, Exception] = {}
        for group in groups.values():
            for batch in self._batches(group):
                failed |= self._generate(batch)
        return [failed.get(id(request), request) for request in requests]

    def _batches(self, group: list[GenerationRequest]) -> Iterator[list[GenerationRequest]]:
        """Requests to answer together: no more than rows of a pass, and none that others would pad beyond its model."""
        size = 1 if group[0].task.alone else self._most_rows(group[0].task)
        limit = min(request.task.run.loaded.max_length for request in group)
        batch: list[GenerationRequest] = []
        for request in sorted(group, key=lambda request: len(request.tokens)):
            most = max(each.max_tokens for each in (*batch, request))
            if batch and (len(batch) == size or len(request.tokens) + most > limit):
                yield batch
                batch = []
            batch.append(request)
        yield batch

    def _generate(self, batch: list[GenerationRequest]) -> dict[int, Exception]:
        """Answer a batch; where that fails, each alone that has no token yet, so that one fails by itself."""
        try:
            batch[0].task.generate(batch)
            return {}
        except Exception as error:
            left = [request for request in batch if request.finish_reason is None]
            begun = [request for request in left if request.count or len(batch) == 1]
            failed = {id(request): self._why(request.task, error) for request in begun}
        # not before here: the error held what was computed
        for request in left:
            if id(request) not in failed:
                failed |= self._generate([request])
        return failed


def _pool_of(ladder: LadderModel, generates: bool) -> LadderPool:
    """A pool on the backbone of a side network, which is no member yet."""
    config = ladder.config
    pool = LadderPool(ladder.base, config.feature_modules, config.backbone_dtype, config.context)
    if generates:  # by its base's
        pool.backbone.core.generation_config = ladder.generation_config
    return pool


def _own_tensors(pool: LadderPool | SivaPool, member: str) -> Iterable[Tensor]:
    """What a member of a pool has of its own."""
    if isinstance(pool, SivaPool):
        return pool.own_tensors(member)
    shared = {id(parameter) for parameter in pool.backbone.model.parameters()}
    return [parameter for parameter in pool[member].parameters() if id(parameter) not in shared]


def _on(task: Task, pool: LadderPool | SivaPool) -> Task:
    """A task whose model is the pool's from now on: of its own it gave the adapter."""
    if not isinstance(pool, SivaPool):
        return task
    predictor = _predictor(task)
    predictor.run = replace(task.run, loaded=replace(task.run.loaded, model=pool.model))
    return replace(task, run=predictor.run)


def _predictor(task: Task) -> Predictor:
    assert task.predictor is not None  # only such a task is asked for scores
    return task.predictor


def parse_runs(items: Iterable[str]) -> dict[str, str]:
    """The folders that a command line names, RUN or NAME=RUN, by the names of their tasks.

    Raises:
        FastpeftError: a name cannot be one, or two are alike.
    """
    found: dict[str, str] = {}
    for item in items:
        name, separator, folder = item.partition("=")
        if not separator or Path(item).is_dir():
            name, folder = path_of(item).resolve().name, item
        if not re.fullmatch(NAME, name) or not folder:
            raise FastpeftError(
                f"{item!r} does not name a task; a name has letters, digits, '.', '_' and '-', 100 at most, and a "
                "folder follows it. Write NAME=RUN, where RUN is the folder of a finished run."
            )
        if name in found:
            raise FastpeftError(f"{found[name]!r} and {folder!r} would both be the task {name!r}. Name one, NAME=RUN.")
        found[name] = folder
    return found
