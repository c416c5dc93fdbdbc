"""Many side networks on one backbone: one pass answers a batch of many tasks, and one pass trains many."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor, nn

from fastpeft.errors import FastpeftError
from fastpeft.ladder.backbone import CACHE, INPUTS, Backbone
from fastpeft.ladder.cache import FeatureCache
from fastpeft.ladder.config import BackboneDtype, LadderConfig
from fastpeft.ladder.context import Context
from fastpeft.ladder.conversion import convert, converted_to
from fastpeft.ladder.generation import with_cache
from fastpeft.ladder.passes import Known, features_of, run_body
from fastpeft.ladder.pool_generation import PoolCache, PoolDecoder, check_cache, check_mode, check_shared_head
from fastpeft.ladder.pool_members import Admission, Members, leave_backbone, share_backbone
from fastpeft.ladder.probe import check_generates, decide_causal
from fastpeft.ladder.side import SideRun
from fastpeft.ops.quantise import check_format
from fastpeft.prompts.model import inside_prompt
from fastpeft.support.eval_mode import in_eval_mode
from fastpeft.support.four_bits import keep_form

LABELS = ("labels", "start_positions", "end_positions")
_MASKS = "mask_positions"  # an input of members with a prompt only

Batch: TypeAlias = Mapping[str, Tensor]


class LadderPool:
    r"""Side networks for many tasks on one backbone.

    Requests for different tasks share a batch: the backbone makes one pass over all rows, side networks of one shape
    are computed as one, and each row gets the answer of its task's head. Several side networks can train from one pass
    too, see `outputs`. Beside a decoder they generate text, see `generate`. Each member is an ordinary `LadderModel`,
    or a `PromptModel` around one, on the pool's backbone.

    Args:
        base: a transformers model of text with a head, or PEFT's wrapper of one. It is not copied; its backbone is
            frozen.
        feature_modules, backbone_dtype, context: as in `LadderConfig`; the side networks of one pool share them.

    Raises:
        FastpeftError: as by `LadderModel`, or the base does not read text.

    Notes:
        Threads may call, add and remove at the same time: one pass runs at a time, and a call answers with the tasks
        that were there at its start. A member that is called by itself does not wait: no other call may
        run meanwhile. A base has one pool. Remove a member before you move it to another device, dtype or process.

    Example:
        >>> pool = fastpeft.LadderPool(base)  # doctest: +SKIP
        >>> pool.add("sentiment", "runs/sst2")  # doctest: +SKIP
        >>> pool.add("topic", "runs/topic")  # doctest: +SKIP
        >>> batch = tokenizer(["Good fun.", "Shares fell."], padding=True, return_tensors="pt")  # doctest: +SKIP
        >>> [row.logits for row in pool(batch, tasks=["sentiment", "topic"])]  # doctest: +SKIP
    """

    def __init__(
        self,
        base: nn.Module,
        feature_modules: Sequence[str] | str | None = None,
        backbone_dtype: BackboneDtype | None = None,
        context: Sequence[int] | None = None,
    ) -> None:
        check_format("backbone_dtype", backbone_dtype, "bfloat16")
        feature_modules = [feature_modules] if isinstance(feature_modules, str) else feature_modules
        self.backbone = Backbone(base, feature_modules)
        keep_form(base)
        if self.backbone.input_name != "input_ids":
            raise FastpeftError(
                f"a {self.backbone.class_name} takes {self.backbone.input_name}; a pool is for transformers "
                "models of text, whose batches have input_ids. Give each task a LadderModel of its own."
            )
        # as members will; and some scale their weights in their first pass, which must be before members share them
        decide_causal(self.backbone, True)
        dtype = backbone_dtype or converted_to(self.backbone.core)
        convert(self.backbone, dtype)
        if context is not None:
            self.backbone.context = Context(self.backbone, context)
        self.base = base
        self.feature_cache: FeatureCache | None = None
        base.requires_grad_(False)
        self.backbone.body.eval()
        self._members = Members({}, [])
        self._changing = threading.Lock()
        self._passing = (
            threading.RLock()
        )  # one at a time: a pass listens to the backbone's layers, a call changes modes
        self._admission = Admission(self.backbone, dtype, feature_modules, self._passing)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the members, in the order in which they were added."""
        return tuple(self._members.models)

    def __getitem__(self, name: str) -> Any:
        """The member of that name, a `LadderModel` or a `PromptModel` around one."""
        return self._members[name]

    def __contains__(self, name: object) -> bool:
        return name in self._members.models

    # -- members -------------------------------------------------------------------------------------------------

    def add(self, name: str, side: str | os.PathLike[str] | nn.Module | LadderConfig) -> Any:
        """Add a side network.

        Args:
            name: the name of its task.
            side: a folder or hub id that `LadderModel.save_pretrained` or `PromptModel.save_pretrained` wrote; or such
                a model with any head, whose backbone's weights must equal the pool's and are replaced by them; or the
                configuration of a new side network, which starts with the head and the labels of the pool's base.

        Returns:
            The member, in evaluation mode: an ordinary `LadderModel`, or a `PromptModel` if it has label words.

        Raises:
            FastpeftError: the name is taken; the side network has another backbone, other layers, another kind of head
                or another member's head; a configuration asks for other labels; or there is no such file.

        Example:
            >>> pool.add("mood", LadderConfig())  # doctest: +SKIP
            >>> pool.add("mood", PromptModel(pool.remove("mood"), tokenizer, prompt))  # doctest: +SKIP
        """
        self._check_free(name)
        member = self._admission.member(side)
        with self._changing:
            self._check_free(name)
            trained = {id(parameter) for parameter in member.parameters() if parameter.requires_grad}
            for other, model in self._members.models.items():
                if any(id(parameter) in trained for parameter in model.parameters()):
                    raise FastpeftError(
                        f"the side network's head is that of {other!r} too: both were made on one base. Add a folder "
                        "or a LadderConfig, for which the pool makes a head, or make it on a base of its own."
                    )
            if member is side:
                share_backbone(inside_prompt(member), self.backbone)
            inside_prompt(member).backbone.context = self.backbone.context
            member.eval()
            self._members = Members.of({**self._members.models, name: member})
        return member

    def _check_free(self, name: str) -> None:
        if name in self._members.models:
            raise FastpeftError(f"the pool has a task {name!r}. Remove it first, or give another name.")

    def remove(self, name: str) -> Any:
        """Remove a member and return it. Running calls still answer for it.

        It still shares the memory of the backbone's weights, until it is cast or moved. A `LadderModel` that was made
        on the pool's own base stays on it.

        Raises:
            FastpeftError: there is no member of that name.
        """
        with self._changing:
            member = self._members[name]
            left = {task: model for task, model in self._members.models.items() if task != name}
            self._members = Members.of(left)
            leave_backbone(inside_prompt(member), self.backbone)
        return member

    # -- answers -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(self, batch: Batch, tasks: Sequence[str]) -> list[Any]:
        """Answer rows of different tasks by one pass of the backbone, in evaluation mode whatever the members' mode.

        Args:
            batch: `input_ids` `(B, T)` or `inputs_embeds` `(B, T, d)`, and as the base takes them `attention_mask`,
                `token_type_ids` and `position_ids`; no labels. The rows of a task with a prompt come from its
                `prompt.encode`; `mask_positions` `(B,)` may say where their masks are, and other rows ignore it.
            tasks: the task of each row, in any order.

        Returns:
            For each row the output of its task's model, without the batch dimension: an object with `logits`,
            `(classes,)` or `(T, classes)`, or with `start_logits` and `end_logits`.

        Raises:
            FastpeftError: a task is not in the pool, or the batch has other entries or another number of rows.
        """
        members = self._members
        batch = self._check_rows(batch, tasks)
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(tasks):
            rows.setdefault(name, []).append(row)
        asked = {name: members[name] for name in rows}
        ladders = [inside_prompt(member) for member in asked.values()]
        parts = (self.backbone.body, *(part for ladder in ladders for part in (ladder, ladder.side, ladder.base)))
        # one in training says so itself: to ask every module of every member would take a tenth of a small call
        modules = (module for part in parts if part.training for module in part.modules())
        with self._passing, in_eval_mode(modules):
            encoded = self._encode(members, batch, rows)
            answers: list[Any] = [None] * len(tasks)
            for name, output in encoded.items():
                part = {key: value[rows[name]] for key, value in batch.items()}
                answer = _run(asked[name], part, output)
                for row, own in zip(rows[name], _by_row(answer)):
                    answers[row] = own
        return answers

    @torch.no_grad()
    def generate(self, batch: Batch, tasks: Sequence[str], **options: Any) -> Any:
        """Generate text for rows of different tasks, beside a decoder, as each task's `LadderModel.generate` does.

        Each new token takes one pass of the backbone over all rows, and one of each task's side network over its own.
        Rows of a task that follow each other save copies. Calls run between two tokens, and members come and go.

        Args:
            batch: as a call takes it. Pad prompts on the left.
            tasks: the task of each row, in any order.
            options: as for `GenerationMixin.generate`, greedy, sampling or with beams. `generation_config` is at first
                that of the base.

        Returns:
            Token ids `(B, T)`, the prompt first, or what `return_dict_in_generate` asks for.

        Raises:
            FastpeftError: as by a call; the base does not generate text; a task has a head of its own; the cache is of
                other tasks; or another kind of cache or another way to generate is asked for.

        Example:
            >>> batch = tokenizer(["The sea", "Dear Sir"], padding=True, return_tensors="pt")  # doctest: +SKIP
            >>> pool.generate(batch, ["tales", "letters"], max_new_tokens=20)  # doctest: +SKIP
        """
        check_generates(self.backbone)
        members = self._members
        batch = self._check_rows(batch, tasks)
        ladders = {name: inside_prompt(members[name]) for name in tasks}
        for name, ladder in ladders.items():
            check_shared_head(name, ladder.backbone, self.backbone)
        decoder = PoolDecoder(self.backbone, [ladder.side for ladder in ladders.values()], self._passing)
        configs = options.get("generation_config"), decoder.generation_config
        check_mode(options, *configs)
        options = with_cache(partial(PoolCache, self.backbone, tasks), options, *configs)
        if CACHE not in options:
            raise FastpeftError("use_cache=False: a pool generates with a cache only. Leave it out.")
        check_cache(options[CACHE], tasks)
        return decoder.generate(**batch, **options)

    def _encode(self, members: Members, batch: Batch, rows: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """The output of each task's side network for its rows, `(rows of the task, T, d)` in the backbone's dtype."""
        source = source_of(batch)
        mask = batch.get("attention_mask")
        seen = torch.ones(source.shape[:2], dtype=torch.bool, device=source.device) if mask is None else mask.bool()
        runs: list[tuple[list[str], Tensor, SideRun]] = []
        for names, stack, places in members.batches(rows):
            most = max(len(rows[name]) for name in names)
            padded = [[*rows[name], *[rows[name][0]] * (most - len(rows[name]))] for name in names]
            index = torch.tensor(padded if len(names) > 1 else padded[0], device=source.device)  # (G, B') or (B',)
            # no mask is cheaper for one network; stacked networks need a tensor to slice
            own = None if mask is None and len(names) == 1 else seen[index]
            runs.append((names, index, SideRun(stack.select(places), own, seed=0)))
        encoded = {}

        def feed(layer: int, feature: Tensor) -> None:
            for _, index, run in runs:
                run.feed(layer, feature[index])

        def finish(feature: Tensor) -> Tensor:
            for names, _, run in runs:
                output = run.output().to(feature.dtype)
                for name, part in zip(names, output if len(names) > 1 else output[None]):
                    encoded[name] = part[: len(rows[name])]
            return feature

        run_body(self.backbone, batch, feed, finish)
        return encoded

    # -- training ------------------------------------------------------------------------------------------------

    def outputs(self, batch: Batch, tasks: Iterable[str] | None = None) -> Iterator[Any]:
        """The output of each member for a batch, from one pass of the backbone: for training loops of your own.

        Members run one after the other as the iterator advances, each as its model alone would. So only one graph is
        alive if the loop calls `backward` on each loss.

        Args:
            batch: with labels, for all members.
            tasks: which members; by default all.

        Yields:
            `(task, output)`, where the output has `loss` and `logits` with their graph.

        Raises:
            FastpeftError: a task is not in the pool, or the batch has unknown entries.
        """
        members = self._members
        chosen = {name: members[name] for name in (members.models if tasks is None else tasks)}
        batch = self._check_batch(batch)
        body = self.backbone.body
        with self._passing, torch.no_grad(), in_eval_mode(body.modules() if body.training else ()):
            features = None if self.feature_cache is None else self.feature_cache.features(batch)
            if features is None:
                features = features_of(self.backbone, batch)
        for name, member in chosen.items():
            with self._passing:  # a call would change its mode, and the model may stand on the pool's base itself
                output = _run(member, batch, features)
            yield name, output

    @overload
    def cache_features(self, folder: None, max_bytes: int | None = ...) -> None: ...

    @overload
    def cache_features(self, folder: str | os.PathLike[str], max_bytes: int | None = ...) -> FeatureCache: ...

    def cache_features(
        self, folder: str | os.PathLike[str] | None, max_bytes: int | None = None
    ) -> FeatureCache | None:
        """From now on `outputs` reads features from a folder, and runs the backbone only on new rows.

        It is the folder of `LadderModel.cache_features`, with the same arguments, result and errors. A `LadderModel`
        with this backbone shares its rows. Calls of the pool do not use the cache.
        """
        self.feature_cache = None if folder is None else FeatureCache(self.backbone, folder, max_bytes)
        return self.feature_cache

    # -- batches -------------------------------------------------------------------------------------------------

    def _check_rows(self, batch: Batch, tasks: Sequence[str]) -> dict[str, Tensor]:
        """The batch of a call on the backbone's device."""
        batch = self._check_batch(batch)
        if len(tasks) == 0:  # of an array `not` tells nothing
            raise FastpeftError("no tasks are given. Give a batch of one row or more, and the task of each.")
        if len(tasks) != len(source_of(batch)):
            raise FastpeftError(
                f"the batch has {len(source_of(batch))} rows, but {len(tasks)} tasks were given. Give that of each row."
            )
        return batch

    def _check_batch(self, batch: Batch) -> dict[str, Tensor]:
        """The batch on the backbone's device; an input `(1, T)` is that of each row."""
        if not isinstance(batch, Mapping) or not all(isinstance(value, Tensor) for value in batch.values()):
            raise FastpeftError(
                'a pool takes a batch as a dictionary of tensors, such as tokenizer(texts, return_tensors="pt"). Give '
                "it one."
            )
        unknown = batch.keys() - {*INPUTS, *LABELS, _MASKS}
        if unknown or not ("input_ids" in batch or "inputs_embeds" in batch):
            raise FastpeftError(
                f"the batch has {', '.join(batch) or 'no entries'}; a pool takes input_ids or inputs_embeds, and "
                f"beside them {', '.join((*INPUTS[1:4], _MASKS))}, and to train {', '.join(LABELS)}."
            )
        batch, shape = dict(batch), source_of(batch).shape[:2]
        for name in ("attention_mask", "token_type_ids", "position_ids"):
            if (given := batch.get(name)) is None:
                continue
            if given.shape not in (shape, (1, shape[1])):
                raise FastpeftError(
                    f"{name} has the shape {tuple(given.shape)}; a pool takes (B, T), here {tuple(shape)}, or (1, T) "
                    "for all rows. In a mask 1 is for tokens and 0 for padding."
                )
            batch[name] = given.expand(shape)
        return {name: value.to(self.backbone.core.device) for name, value in batch.items()}


def source_of(batch: Batch) -> Tensor:
    """The input whose shape gives the rows and tokens of a batch."""
    return batch["input_ids"] if "input_ids" in batch else batch["inputs_embeds"]


def _run(member: Any, batch: Batch, known: Known) -> Any:
    """The output of a member for a batch, which may hold positions of masks for the prompts of other members."""
    own = batch if hasattr(member, "prompt") else {name: value for name, value in batch.items() if name != _MASKS}
    with inside_prompt(member).knowing(known):
        return member(**own, return_dict=True)


def _by_row(output: Any) -> list[Any]:
    """An output of B rows as B outputs."""
    fields = {name: value for name, value in output.items() if isinstance(value, Tensor)}
    return [type(output)(**dict(zip(fields, row))) for row in zip(*fields.values())]
