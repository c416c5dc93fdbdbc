"""Many side networks on one backbone: a batch of many tasks in one pass, and many trained from one pass."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.errors import FastpeftError
from fastpeft.ladder.backbone import INPUTS, Backbone
from fastpeft.ladder.cache import DTYPES, FeatureCache, can_cache
from fastpeft.ladder.causality import decide_causal
from fastpeft.ladder.config import BackboneDtype, LadderConfig, check_backbone_dtype
from fastpeft.ladder.convert import convert
from fastpeft.ladder.frozen import conversion_of
from fastpeft.ladder.joint import (
    LABELS,
    Batch,
    Learner,
    RandomStream,
    Stepping,
    Stop,
    evaluating,
    join,
    source_of,
    steps_of,
)
from fastpeft.ladder.members import Members, ladder_of, layer_names, share_backbone, twin_of
from fastpeft.ladder.model import LadderModel
from fastpeft.ladder.saved import read_config
from fastpeft.ladder.side import SideRun

_MASKS = "mask_positions"  # what only members with a prompt take


class LadderPool:
    r"""Side networks for many tasks on one backbone.

    Requests for different tasks share a batch: the backbone makes one pass over all rows, side networks of one shape
    are computed as one, and each row gets the answer of its task's head. Several side networks train from one pass
    too. Every member is an ordinary `LadderModel`, or a `PromptModel` around one, whose backbone's weights are the
    pool's.

    Args:
        base: a transformers model of text with a head, or PEFT's wrapper of one. It is taken over: its backbone is
            frozen.
        feature_modules, backbone_dtype: as in `LadderConfig`; side networks of one pool share them.

    Raises:
        FastpeftError: as by `LadderModel`, or the base takes no text.

    Notes:
        Threads may call, add and remove at the same time: a call answers with the tasks of its start, and one pass runs
        at a time. They may call while one of them trains by `fit`: calls come between the members' steps. Weights of
        side networks of one shape lie together in memory: optimizers and `load_state_dict` may change them, but a
        member that shall move to another device or dtype must be removed first. Train no member while others are added
        or removed.

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
        feature_modules: Sequence[str] | None = None,
        backbone_dtype: BackboneDtype | None = None,
    ) -> None:
        check_backbone_dtype(backbone_dtype)
        self.backbone = Backbone(base, feature_modules)
        if self.backbone.input_name != "input_ids":
            raise FastpeftError(
                f"a {type(self.backbone.core).__name__} takes {self.backbone.input_name}; a pool is for transformers "
                "models of text, whose batches have input_ids. Give each task a LadderModel of its own."
            )
        # as members will; and RWKV scales its weights in its first pass, which must be before members share them
        decide_causal(self.backbone, True)
        found = conversion_of(self.backbone.core)
        self._backbone_dtype = backbone_dtype or (found.dtype if found else None)
        convert(self.backbone, self._backbone_dtype)
        self.base = base
        self.feature_cache: FeatureCache | None = None
        self._feature_modules = feature_modules
        base.requires_grad_(False)
        self.backbone.body.eval()
        self._members = Members({}, [])
        self._changing = threading.Lock()
        # a pass listens to the backbone by hooks, a call changes modes, and fit whose random numbers are drawn
        self._passing = threading.RLock()

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the members, in the order in which they were added."""
        return tuple(self._members.models)

    def __getitem__(self, name: str) -> Any:
        """The member of that name, a `LadderModel` or a `PromptModel` around one."""
        return self._members[name]

    # -- members -------------------------------------------------------------------------------------------------

    def add(self, name: str, side: str | os.PathLike[str] | nn.Module | LadderConfig) -> Any:
        """Take in a side network.

        Args:
            name: of its task.
            side: what `LadderModel.save_pretrained` or `PromptModel.save_pretrained` wrote (a folder or a hub id); or
                such a model, which may have another head than the pool's base, and whose backbone's weights, which must
                be equal, give way to the pool's; or the configuration of a new side network, whose head starts as that
                of the pool's base and has its labels.

        Returns:
            The member, in evaluation mode: train it, save it and load it as any `LadderModel`, or `PromptModel` where
            it has a prompt with label words.

        Raises:
            FastpeftError: the name is taken, the side network belongs to another backbone, other layers or another kind
                of head, its head is another member's too, a configuration asks for other labels, or nothing of this
                kind is there.

        Example:
            >>> pool.add("mood", LadderConfig())  # doctest: +SKIP
            >>> pool.add("mood", PromptModel(pool.remove("mood"), tokenizer, prompt))  # doctest: +SKIP
        """
        self._check_free(name)
        member: Any = side if isinstance(ladder_of(side), LadderModel) else self._beside_a_twin(side)
        self._check_layers(ladder_of(member))
        with self._changing:
            self._check_free(name)
            self._check_own_head(member)
            if member is side:
                share_backbone(ladder_of(member), self.backbone)
            member.eval()
            self._members = self._members.with_member(name, member)
        return member

    def remove(self, name: str) -> Any:
        """Give up a member; calls that have begun still answer for it.

        Returns:
            The member, which goes on to share the backbone's weights.

        Raises:
            FastpeftError: there is none of that name.
        """
        with self._changing:
            member = self._members[name]
            self._members = self._members.without(name)
            for parameter in ladder_of(member).side.parameters():
                parameter.data = parameter.data.clone()  # it was a slice of a stack
        return member

    def _beside_a_twin(self, side: Any) -> Any:
        """A saved or a new side network, on the pool's backbone."""
        if isinstance(side, LadderConfig):
            config = copy.copy(side)
            config.feature_modules = side.feature_modules or self._feature_modules
            config.backbone_dtype = side.backbone_dtype or self._backbone_dtype
            self._check_dtype(config)  # a twin's weights are the pool's
            self._check_labels(config)
            return LadderModel(self._twin(), config)
        if not isinstance(side, str | os.PathLike):
            around = "" if (inside := ladder_of(side)) is side else f" around a {type(inside).__name__}"
            raise FastpeftError(
                "a pool takes a folder, a LadderModel, a PromptModel around one, or a LadderConfig, not a "
                f"{type(side).__name__}{around}. Give one of these."
            )
        from fastpeft.prompts.model import PromptModel, holds_label_words  # which has use for all of this package

        source = os.fspath(side)
        config = read_config(source, {})
        _refuse_adapter(config)  # before it is put into the twin, whose weights are the pool's
        self._check_dtype(config)
        prompted = holds_label_words(source)
        if config.base_class != (own := type(self.backbone.core).__name__):
            raise FastpeftError(
                f"{source!r} has the head of a {config.base_class}, the pool's base is a {own}. Load it by "
                f"{'PromptModel' if prompted else 'LadderModel'}.from_pretrained, which brings its head along, and add "
                "that."
            )
        model = LadderModel.from_pretrained(source, base=self._twin(config))
        return PromptModel.from_pretrained(source, masked_lm=model) if prompted else model

    def _check_free(self, name: str) -> None:
        if name in self._members.models:
            raise FastpeftError(f"the pool has a task {name!r}. Remove it first, or give another name.")

    def _check_dtype(self, config: LadderConfig) -> None:
        own, other = self._backbone_dtype, config.backbone_dtype
        if own != other:
            raise FastpeftError(
                f"the side network goes beside a backbone with backbone_dtype={other!r}, the pool's has {own!r}, and "
                f"features differ. Add it to a LadderPool(base, backbone_dtype={other!r})."
            )

    def _check_labels(self, config: LadderConfig) -> None:
        own, asked = self.backbone.core.config.id2label, config.id2label
        if asked not in (own, LadderConfig().id2label):
            raise FastpeftError(
                f"the configuration asks for {len(asked)} labels, {', '.join(map(str, asked.values()))}, but the head "
                f"of a new side network is that of the pool's base, which has {len(own)}, "
                f"{', '.join(map(str, own.values()))}. Add a LadderModel on a base of its own, loaded with these "
                "labels, or a folder that one was saved to."
            )

    def _check_layers(self, model: LadderModel) -> None:
        _refuse_adapter(model.config)
        self._check_dtype(model.config)
        own, others = layer_names(self.backbone), layer_names(model.backbone)
        if own != others:
            raise FastpeftError(
                f"the side network reads {len(others)} layers, {others[0]} to {others[-1]}, the pool {len(own)}, "
                f"{own[0]} to {own[-1]}. Give both the same feature_modules."
            )

    def _check_own_head(self, model: nn.Module) -> None:
        trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        for name, other in self._members.models.items():
            if any(id(parameter) in trained for parameter in other.parameters()):
                raise FastpeftError(
                    f"the side network's head is that of {name!r} too: both were made on one base. Add a folder or a "
                    "LadderConfig, for which the pool makes a head, or make it on a base of its own."
                )

    def _twin(self, config: LadderConfig | None = None) -> Any:
        with self._passing:  # no hooks are copied
            return twin_of(self.backbone, config)

    # -- answers -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(self, batch: Batch, tasks: Sequence[str]) -> list[Any]:
        """Answer rows of different tasks by one pass of the backbone, in evaluation mode whatever the members' mode.

        Args:
            batch: `input_ids` `(B, T)` or `inputs_embeds` `(B, T, d)`, and as the base takes them `attention_mask`,
                `token_type_ids` and `position_ids`; no labels. Rows of a task with a prompt are those of its
                `prompt.encode`; where their masks are may be told by `mask_positions` `(B,)`, which means nothing to
                other rows.
            tasks: the task of every row, in any order.

        Returns:
            For every row what its task's model returns, without the dimension of the batch: an object with `logits`,
            `(classes,)` or `(T, classes)`, or with `start_logits` and `end_logits`.

        Raises:
            FastpeftError: a task is not in the pool, or the batch has other entries or another number of rows.
        """
        members = self._members
        batch = self._check_batch(batch)
        if len(tasks) != len(source_of(batch)):
            raise FastpeftError(f"the batch has {len(source_of(batch))} rows, but {len(tasks)} tasks were given.")
        if labels := [name for name in LABELS if name in batch]:
            raise FastpeftError(f"a call takes no {labels[0]}: leave it out, or train by outputs or fit.")
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(tasks):
            rows.setdefault(name, []).append(row)
        asked = {name: members[name] for name in rows}
        ladders = [ladder_of(member) for member in asked.values()]
        parts = (self.backbone.body, *(part for ladder in ladders for part in (ladder, ladder.side, ladder.base)))
        with self._passing, evaluating(parts):
            encoded = self._encode(members, batch, rows)
            answers: list[Any] = [None] * len(tasks)
            for name, output in encoded.items():
                part = {key: value[rows[name]] for key, value in batch.items()}
                with ladder_of(asked[name]).answering(output):
                    answer = _run(asked[name], part)
                for row, own in zip(rows[name], _by_row(answer)):
                    answers[row] = own
        return answers

    def _encode(self, members: Members, batch: Batch, rows: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """What every task's side network makes of its rows, `(its rows, T, d)` in the backbone's dtype."""
        source = source_of(batch)
        mask = batch.get("attention_mask")
        seen = torch.ones(source.shape[:2], dtype=torch.bool, device=source.device) if mask is None else mask.bool()
        runs: list[tuple[list[str], Tensor, SideRun]] = []
        for names, stack, places in members.batches(rows):
            most = max(len(rows[name]) for name in names)
            padded = [[*rows[name], *[rows[name][0]] * (most - len(rows[name]))] for name in names]
            index = torch.tensor(padded if len(names) > 1 else padded[0], device=source.device)  # (G, B') or (B',)
            # for one network no mask is cheaper; stacked ones take a tensor apart
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

        self.backbone.run_body(batch, feed, finish)
        return encoded

    # -- training ------------------------------------------------------------------------------------------------

    def outputs(self, batch: Batch | Mapping[str, Batch], tasks: Iterable[str] | None = None) -> Iterator[Any]:
        """What each member returns for a batch, from one pass of the backbone: for training loops of your own.

        Members run one after the other as the iterator is advanced, each as its model alone would, so that only one
        graph is alive where a loop calls `backward` on each loss.

        Args:
            batch: one for all members, with labels, or `{task: batch}`.
            tasks: which members, by default all or those that `batch` names.

        Yields:
            `(task, output)`, where the output has `loss` and `logits` with their graph.

        Raises:
            FastpeftError: a task is not in the pool, or batches have unknown entries.
        """
        members = self._members
        given: Any = batch
        by_task = bool(batch) and all(isinstance(value, Mapping) for value in batch.values())
        names = list(tasks if tasks is not None else batch if by_task else members.models)
        chosen = {name: members[name] for name in names}
        passed = self._features({name: given[name] if by_task else given for name in names})
        for name, member in chosen.items():
            yield name, self._train_pass(member, *passed[name])

    def fit(
        self,
        data: Iterable[Batch] | Mapping[str, Iterable[Batch]],
        optimizers: Mapping[str, Stepping],
        *,
        epochs: int = 1,
        seed: int | Mapping[str, int] = 0,
        max_grad_norm: float | None = None,
        stop: Stop | None = None,
    ) -> dict[str, list[float]]:
        """Train members together, each with its own optimizer, schedule and stop, from one backbone pass a step.

        Args:
            data: batches with labels, such as a DataLoader, that all members see (a search for a learning rate or a
                seed); or `{task: batches}` (many tasks), where a member whose batches end is done.
            optimizers: for every member that trains its optimizer, or a pair with its scheduler, stepped once a step; a
                `ReduceLROnPlateau` gets the step's loss.
            epochs: how often to go through `data`, which for more than once must be no iterator.
            seed: of what is drawn in training (dropout), for all or by task, 0 for one that is not named.
            max_grad_norm: where to clip each member's gradient norm; None does not.
            stop: called as `stop(task, step, loss)` after every step, from 1; True ends that member's training.

        Returns:
            The loss of every step, by task.

        Raises:
            FastpeftError: as by `outputs`, or a loss is not finite: that member's step is not made then.

        Notes:
            On batches for all, a member trains to the bit as its model alone in a loop after `torch.manual_seed(seed)`;
            on batches of their own to rounding, since they are padded to one length for the backbone.
        """
        members = self._members
        learners = {}
        for name, stepping in optimizers.items():
            own_seed = seed.get(name, 0) if isinstance(seed, Mapping) else seed
            stream = RandomStream(own_seed, self.backbone.core.device)
            learners[name] = Learner(name, members[name], stepping, stream, max_grad_norm)
        stopped: set[str] = set()
        try:
            with self._passing:
                for learner in learners.values():
                    learner.model.train()
            for batches in steps_of(data, tuple(learners), epochs, stopped):
                for name, passed in self._features(batches).items():
                    learner = learners[name]
                    with self._passing:  # calls see no half of a step, and draw nothing of its stream
                        learner.step(partial(self._train_pass, learner.model, *passed))
                    if stop is not None and stop(name, len(learner.losses), learner.losses[-1]):
                        stopped.add(name)
        finally:
            with self._passing:
                for learner in learners.values():
                    learner.model.eval()
        return {name: learner.losses for name, learner in learners.items()}

    def cache_features(
        self, folder: str | os.PathLike[str] | None, dtype: str = DTYPES[0], max_bytes: int | None = None
    ) -> FeatureCache | None:
        """From now on train on features that are read from a folder; the backbone runs on rows not yet there.

        So `fit` and `outputs` need no pass of the backbone for rows that any of its side networks has seen, in a pool
        or alone: the folder is that of `LadderModel.cache_features`, as the arguments are. Calls compute features.

        Returns:
            The cache, whose `hits` and `misses` count rows; None where caching ended.

        Raises:
            FastpeftError: an argument cannot be used, or the folder cannot be written.
        """
        self.feature_cache = None if folder is None else FeatureCache(self.backbone, folder, dtype, max_bytes)
        return self.feature_cache

    def _features(self, batches: Mapping[str, Batch]) -> dict[str, tuple[list[Tensor], Batch]]:
        """One pass over all batches, or none: for each its features `B_0 .. B_L` and what of it the models take."""
        if not batches:
            return {}
        distinct = {id(batch): self._check_batch(batch) for batch in batches.values()}
        joined, places = join(distinct, getattr(self.backbone.core.config, "pad_token_id", None) or 0)
        with self._passing, torch.no_grad():
            cache = self.feature_cache
            source: FeatureCache | Backbone = cache if cache is not None and can_cache(joined) else self.backbone
            features = source.features(joined)
        passed = {key: ([feature[places[key]] for feature in features], batch) for key, batch in distinct.items()}
        return {name: passed[id(batch)] for name, batch in batches.items()}

    def _train_pass(self, member: Any, features: Sequence[Tensor], batch: Batch) -> Any:
        """What the member's own pass returns, on features that are there."""
        # a call would change its mode, and the model may stand on the pool's base itself
        with self._passing, ladder_of(member).reading(features):
            return _run(member, batch)

    # -- batches -------------------------------------------------------------------------------------------------

    def _check_batch(self, batch: Batch) -> dict[str, Tensor]:
        """The batch on the backbone's device."""
        unknown = batch.keys() - {*INPUTS, *LABELS, _MASKS}
        if unknown or not ("input_ids" in batch or "inputs_embeds" in batch):
            raise FastpeftError(
                f"the batch has {', '.join(batch) or 'no entries'}; a pool takes input_ids or inputs_embeds, and "
                f"beside them {', '.join((*INPUTS[1:4], _MASKS))}, and to train {', '.join(LABELS)}."
            )
        mask, shape = batch.get("attention_mask"), source_of(batch).shape[:2]
        if mask is not None and mask.shape != shape:
            raise FastpeftError(
                f"attention_mask has the shape {tuple(mask.shape)}; a pool takes (B, T), here {tuple(shape)}, 1 for "
                "tokens and 0 for padding."
            )
        return {name: value.to(self.backbone.core.device) for name, value in batch.items()}


def _run(member: Any, batch: Batch) -> Any:
    """What a member returns for a batch, which may tell where the masks of other members' rows are."""
    own = batch if hasattr(member, "prompt") else {name: value for name, value in batch.items() if name != _MASKS}
    return member(**own, return_dict=True)


def _by_row(output: Any) -> list[Any]:
    """An output of B rows as B outputs."""
    fields = {name: value for name, value in output.items() if isinstance(value, Tensor)}
    return [type(output)(**dict(zip(fields, row))) for row in zip(*fields.values())]


def _refuse_adapter(config: LadderConfig) -> None:
    """Raise `FastpeftError` where an adapter changes the features that a side network reads."""
    if config.train_adapters:
        raise FastpeftError(
            "the side network trained together with an adapter inside the backbone, so its features are its own. Use "
            "it by itself, or train one without train_adapters (siva_layers)."
        )
