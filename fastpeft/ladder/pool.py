"""Many side networks on one backbone: a batch of many tasks in one pass, and many trained from one pass."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from fastpeft.errors import FastpeftError
from fastpeft.ladder.backbone import Backbone, autocast_of
from fastpeft.ladder.config import BackboneDtype, LadderConfig, check_backbone_dtype
from fastpeft.ladder.frozen import conversion_of, convert
from fastpeft.ladder.joint import INPUTS, Batch, RandomStream, evaluating, join, source_of, steps_of
from fastpeft.ladder.model import LadderModel
from fastpeft.ladder.saved import read_config, task_fields
from fastpeft.ladder.side import SideRun
from fastpeft.ladder.stack import SideStack, shape_of

_LABELS = ("labels", "start_positions", "end_positions")

Stop: TypeAlias = Callable[[str, int, float], bool]


@dataclass(frozen=True)
class _Members:
    """The side networks of a pool at one time; a change makes another one, and calls keep theirs.

    Attributes:
        models: by task.
        stacks: those of one shape together, with the tasks in the stack's order.
    """

    models: Mapping[str, LadderModel]
    stacks: Sequence[tuple[tuple[str, ...], SideStack]]

    def with_member(self, name: str, model: LadderModel) -> _Members:
        return self._changed({**self.models, name: model}, shape_of(model.side))

    def without(self, name: str) -> _Members:
        left = {task: model for task, model in self.models.items() if task != name}
        return self._changed(left, shape_of(self.models[name].side))

    def _changed(self, models: Mapping[str, LadderModel], shape: Any) -> _Members:
        """With `models`, of which only those of one shape are others than before."""
        stacks = [(names, stack) for names, stack in self.stacks if shape_of(stack.sides[0]) != shape]
        names = tuple(name for name, model in models.items() if shape_of(model.side) == shape)
        if names:
            stacks.append((names, SideStack([models[name].side for name in names])))
        return _Members(models, stacks)

    def batches(self, rows: Mapping[str, Sequence[int]]) -> Iterator[tuple[list[str], SideStack, list[int]]]:
        """Which tasks are computed together, with their stack and their places in it.

        They are padded to as many rows as the first of them has, so those with fewer than half as many wait.
        """
        for names, stack in self.stacks:
            waiting = sorted((name for name in names if name in rows), key=lambda name: -len(rows[name]))
            while waiting:
                chosen = {name for name in waiting if 2 * len(rows[name]) >= len(rows[waiting[0]])}
                waiting = [name for name in waiting if name not in chosen]
                places = [place for place, name in enumerate(names) if name in chosen]
                yield [names[place] for place in places], stack, places


class LadderPool:
    r"""Side networks for many tasks on one backbone.

    Requests for different tasks share a batch: the backbone makes one pass over all rows, side networks of one shape
    are computed as one, and each row gets the answer of its task's head. Several side networks train from one pass
    too. Every member is an ordinary `LadderModel`, whose backbone's weights are the pool's.

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
        if backbone_dtype is not None:
            convert(self.backbone, backbone_dtype)
        self.base = base
        self._feature_modules = feature_modules
        self._backbone_dtype = self._found_dtype
        base.requires_grad_(False)
        self.backbone.body.eval()
        self._members = _Members({}, [])
        self._changing = threading.Lock()
        # a pass listens to the backbone by hooks, a call changes modes, and fit whose random numbers are drawn
        self._passing = threading.RLock()

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the members, in the order in which they were added."""
        return tuple(self._members.models)

    def __getitem__(self, name: str) -> LadderModel:
        """The member of that name."""
        return _look_up(self._members, name)

    # -- members -------------------------------------------------------------------------------------------------

    def add(self, name: str, side: str | os.PathLike[str] | LadderModel | LadderConfig) -> LadderModel:
        """Take in a side network.

        Args:
            name: of its task.
            side: what `LadderModel.save_pretrained` wrote (a folder or a hub id); or a model, which may have another
                head than the pool's base, and whose backbone's weights, which must be equal, give way to the pool's;
                or the configuration of a new side network, whose head starts as that of the pool's base and has its
                labels.

        Returns:
            The member, in evaluation mode: train it, save it and load it as any `LadderModel`.

        Raises:
            FastpeftError: the name is taken, the side network belongs to another backbone, other layers or another kind
                of head, its head is another member's too, a configuration asks for other labels, or nothing of this
                kind is there.
        """
        self._check_free(name)
        model = side if isinstance(side, LadderModel) else self._beside_a_twin(side)
        self._check_layers(model)
        with self._changing:
            self._check_free(name)
            self._check_own_head(model)
            if model is side:
                self._share_backbone(model)
            model.eval()
            self._members = self._members.with_member(name, model)
        return model

    def remove(self, name: str) -> LadderModel:
        """Give up a member; calls that have begun still answer for it.

        Returns:
            The member, which goes on to share the backbone's weights.

        Raises:
            FastpeftError: there is none of that name.
        """
        with self._changing:
            model = _look_up(self._members, name)
            self._members = self._members.without(name)
            for parameter in model.side.parameters():
                parameter.data = parameter.data.clone()  # it was a slice of a stack
        return model

    def _beside_a_twin(self, side: str | os.PathLike[str] | LadderConfig) -> LadderModel:
        """A saved or a new side network, on the pool's backbone."""
        if isinstance(side, LadderConfig):
            config = copy.copy(side)
            config.feature_modules = side.feature_modules or self._feature_modules
            config.backbone_dtype = side.backbone_dtype or self._backbone_dtype
            self._check_dtype(config)  # a twin's weights are the pool's
            self._check_labels(config)
            return LadderModel(self._twin(), config)
        if not isinstance(side, str | os.PathLike):
            raise FastpeftError(
                f"a pool takes a folder, a LadderModel or a LadderConfig, not a {type(side).__name__}. Give one of "
                "these; of a PromptModel its masked_lm, which answers with the logits of the vocabulary."
            )
        config = read_config(os.fspath(side), {})
        _refuse_adapter(config)  # before it is put into the twin, whose weights are the pool's
        self._check_dtype(config)
        if config.base_class != (own := type(self.backbone.core).__name__):
            raise FastpeftError(
                f"{os.fspath(side)!r} has the head of a {config.base_class}, the pool's base is a {own}. Load it by "
                "LadderModel.from_pretrained, which brings its head along, and add that."
            )
        return LadderModel.from_pretrained(side, base=self._twin(config))

    def _check_free(self, name: str) -> None:
        if name in self._members.models:
            raise FastpeftError(f"the pool has a task {name!r}. Remove it first, or give another name.")

    @property
    def _found_dtype(self) -> BackboneDtype | None:
        """The base's `backbone_dtype` as it is now, whoever brought it there."""
        converted = conversion_of(self.backbone.core)
        return converted.dtype if converted else None

    def _check_dtype(self, config: LadderConfig) -> None:
        own, other = self._backbone_dtype, config.backbone_dtype
        if (found := self._found_dtype) != own:
            raise FastpeftError(
                f"a LadderModel on the pool's own base brought it from backbone_dtype={own!r} to {found!r}, and with "
                f"it all tasks. Load the base once more and make a LadderPool(base, backbone_dtype={found!r})."
            )
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
        own, others = _layer_names(self.backbone), _layer_names(model.backbone)
        if own != others:
            raise FastpeftError(
                f"the side network reads {len(others)} layers, {others[0]} to {others[-1]}, the pool {len(own)}, "
                f"{own[0]} to {own[-1]}. Give both the same feature_modules."
            )

    def _check_own_head(self, model: LadderModel) -> None:
        trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        for name, other in self._members.models.items():
            if any(id(parameter) in trained for parameter in other.parameters()):
                raise FastpeftError(
                    f"the side network's head is that of {name!r} too: both were made on one base. Add a folder or a "
                    "LadderConfig, for which the pool makes a head, or make it on a base of its own."
                )

    def _share_backbone(self, model: LadderModel) -> None:
        """Let a model's backbone have the pool's weights in place of its own, which must be equal."""
        own = dict(self.backbone.body.named_parameters(remove_duplicate=False))
        replaced = {}
        for name, theirs in model.backbone.body.named_parameters(remove_duplicate=False):
            if theirs.requires_grad:  # a pooler, which belongs to the head
                continue
            if name not in own or not _equal(theirs, own[name]):
                raise FastpeftError(
                    f"the side network stands on another backbone: its {name} differs from the pool's. Make a pool of "
                    f"{model.config.base_model_name_or_path or 'the model it was trained on'}."
                )
            replaced[id(theirs)] = own[name]
        for module in model.base.modules():  # all of them: a decoder may be tied to the embeddings
            for key, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) in replaced:
                    setattr(module, key, replaced[id(parameter)])

    def _twin(self, config: LadderConfig | None = None) -> nn.Module:
        """The base once more: a head of its own, for the labels of `config`, and for the rest the pool's tensors."""
        head = {id(parameter) for parameter in self.backbone.head_parameters().values()}
        tensors = itertools.chain(self.base.parameters(), self.base.buffers())
        with self._passing:  # no hooks are copied
            twin = copy.deepcopy(self.base, {id(tensor): tensor for tensor in tensors if id(tensor) not in head})
        if config is not None:
            _relabel(Backbone(twin, self._feature_modules).core, task_fields(config))
        return twin

    # -- answers -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(self, batch: Batch, tasks: Sequence[str]) -> list[Any]:
        """Answer rows of different tasks by one pass of the backbone, in evaluation mode whatever the members' mode.

        Args:
            batch: `input_ids` `(B, T)` or `inputs_embeds` `(B, T, d)`, and as the base takes them `attention_mask`,
                `token_type_ids` and `position_ids`; no labels.
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
        if labels := [name for name in _LABELS if name in batch]:
            raise FastpeftError(f"a call takes no {labels[0]}: leave it out, or train by outputs or fit.")
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(tasks):
            _look_up(members, name)
            rows.setdefault(name, []).append(row)
        asked = [members.models[name] for name in rows]
        parts = (self.backbone.body, *(part for model in asked for part in (model.side, model.base)))
        with self._passing, evaluating(parts):
            encoded = self._encode(members, batch, rows)
            answers: list[Any] = [None] * len(tasks)
            for name, output in encoded.items():
                part = {key: value[rows[name]] for key, value in batch.items()}
                for row, answer in zip(rows[name], _by_row(_answer(members.models[name], output, part))):
                    answers[row] = answer
        return answers

    def _encode(self, members: _Members, batch: Batch, rows: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
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

        self._pass(batch, feed, finish)
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
        models = {name: _look_up(members, name) for name in names}
        passed = self._features({name: given[name] if by_task else given for name in names})
        for name, model in models.items():
            yield name, self._train_pass(model, *passed[name])

    def fit(
        self,
        data: Iterable[Batch] | Mapping[str, Iterable[Batch]],
        optimizers: Mapping[str, Optimizer | tuple[Optimizer, LRScheduler]],
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
        models = {name: _look_up(members, name) for name in optimizers}
        stepping = {name: given if isinstance(given, tuple) else (given, None) for name, given in optimizers.items()}
        seeds = {name: seed.get(name, 0) if isinstance(seed, Mapping) else seed for name in models}
        streams = {name: RandomStream(seeds[name], self.backbone.core.device) for name in models}
        losses: dict[str, list[float]] = {name: [] for name in models}
        stopped: set[str] = set()
        try:
            with self._passing:
                for model in models.values():
                    model.train()
            for batches in steps_of(data, tuple(models), epochs, stopped):
                for name, passed in self._features(batches).items():
                    optimizer, scheduler = stepping[name]
                    with self._passing, streams[name]:  # calls see no half of a step, and draw nothing of its stream
                        loss = self._train_pass(models[name], *passed).loss
                        if loss is None:
                            raise FastpeftError(f"a batch for {name!r} has no labels. Give {', '.join(_LABELS)}.")
                        loss.backward()
                        losses[name].append(loss.item())
                        if not math.isfinite(losses[name][-1]):
                            optimizer.zero_grad()
                            raise FastpeftError(
                                f"the loss of {name!r} is {losses[name][-1]} at step {len(losses[name])}. Lower its "
                                "learning rate, give max_grad_norm, or look at that batch."
                            )
                        if max_grad_norm is not None:
                            trained = [parameter for parameter in models[name].parameters() if parameter.requires_grad]
                            nn.utils.clip_grad_norm_(trained, max_grad_norm)
                        optimizer.step()
                        optimizer.zero_grad()
                        if isinstance(scheduler, ReduceLROnPlateau):
                            scheduler.step(losses[name][-1])
                        elif scheduler is not None:
                            scheduler.step()
                    if stop is not None and stop(name, len(losses[name]), losses[name][-1]):
                        stopped.add(name)
        finally:
            with self._passing:
                for model in models.values():
                    model.eval()
        return losses

    def _features(self, batches: Mapping[str, Batch]) -> dict[str, tuple[list[Tensor], Batch]]:
        """One pass over all batches: for each its features `B_0 .. B_L` and what of it the models take."""
        if not batches:
            return {}
        distinct = {id(batch): self._check_batch(batch) for batch in batches.values()}
        features: list[Tensor] = []
        joined, places = join(distinct, getattr(self.backbone.core.config, "pad_token_id", None) or 0)
        with self._passing, torch.no_grad():
            self._pass(joined, lambda layer, feature: features.append(feature), lambda feature: feature)
        passed = {key: ([feature[places[key]] for feature in features], batch) for key, batch in distinct.items()}
        return {name: passed[id(batch)] for name, batch in batches.items()}

    def _train_pass(self, model: LadderModel, features: Sequence[Tensor], batch: Batch) -> Any:
        """What the model's own pass returns, on features that are there."""
        mask = batch.get("attention_mask")
        with self._passing:  # a call would change its mode, and the model may stand on the pool's base itself
            seed = model.draw_seed()
            output = model.side(features, None if mask is None else mask.bool(), seed)
            return _answer(model, output.to(features[-1].dtype), batch)

    # -- the backbone --------------------------------------------------------------------------------------------

    def _pass(self, batch: Batch, feed: Callable[[int, Tensor], None], end: Callable[[Tensor], Tensor]) -> None:
        """The backbone's pass over the inputs of `batch`, without its head; `feed` and `end` as of `listen`."""
        body = self.backbone.body
        given: dict[str, Any] = {name: batch[name] for name in INPUTS if name in batch}
        if "use_cache" in inspect.signature(body.forward).parameters:
            given["use_cache"] = False

        def checked(layer: int, feature: Tensor) -> None:
            expected = (*source_of(batch).shape[:2], self.backbone.hidden_size)
            if feature.shape != expected:
                raise FastpeftError(
                    f"the feature of layer {layer} has the shape {tuple(feature.shape)}; it must be (B, T, d), here "
                    f"{expected}. Load the base with attn_implementation='sdpa', and name in feature_modules only "
                    "layers of the backbone's width."
                )
            feed(layer, feature)

        with self.backbone.listen(checked, end):
            body(**given)

    def _check_batch(self, batch: Batch) -> dict[str, Tensor]:
        """The batch on the backbone's device, without token types where the base knows none."""
        unknown = batch.keys() - {*INPUTS, *_LABELS}
        if unknown or not ("input_ids" in batch or "inputs_embeds" in batch):
            raise FastpeftError(
                f"the batch has {', '.join(batch) or 'no entries'}; a pool takes input_ids or inputs_embeds, and "
                f"beside them {', '.join(INPUTS[1:4])}, and to train {', '.join(_LABELS)}."
            )
        mask, shape = batch.get("attention_mask"), source_of(batch).shape[:2]
        if mask is not None and mask.shape != shape:
            raise FastpeftError(
                f"attention_mask has the shape {tuple(mask.shape)}; a pool takes (B, T), here {tuple(shape)}, 1 for "
                "tokens and 0 for padding."
            )
        accepted = inspect.signature(self.backbone.core.forward).parameters
        device = self.backbone.core.device
        return {name: value.to(device) for name, value in batch.items() if name != "token_type_ids" or name in accepted}


# -- one member ----------------------------------------------------------------------------------------------------


def _answer(model: LadderModel, output: Tensor, batch: Batch) -> Any:
    """What the model returns where its encoder's output is `output`, in the backbone's dtype."""
    given: dict[str, Any] = dict(batch)
    if "use_cache" in inspect.signature(model.backbone.core.forward).parameters:
        given["use_cache"] = False
    with model.backbone.skip_layers(output), autocast_of(output):
        return model.base(**given, return_dict=True)


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


def _look_up(members: _Members, name: str) -> LadderModel:
    if name not in members.models:
        there = ", ".join(map(repr, members.models)) or "none"
        raise FastpeftError(f"the pool has no task {name!r}; its tasks are {there}. Add it first.")
    return members.models[name]


def _layer_names(backbone: Backbone) -> list[str]:
    names = {module: name for name, module in backbone.body.named_modules()}
    return [names[layer] for layer in backbone.layers]


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two weights are the same, or one is a cast of the other."""
    if a.shape != b.shape:
        return False
    if a.dtype != b.dtype and a.is_floating_point() and b.is_floating_point():
        least = max(a.dtype, b.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        a, b = a.to(least), b.to(least)
    return a.dtype == b.dtype and torch.equal(a, b.to(a.device))


def _relabel(core: Any, fields: Mapping[str, Any]) -> None:
    """Give a model's head the outputs that other labels need; its weights are to be loaded."""
    for name, value in fields.items():
        setattr(core.config, name, value)
    if getattr(core, "num_labels", core.config.num_labels) == core.config.num_labels:
        return
    core.num_labels = core.config.num_labels
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in type(core)(core.config).named_parameters()}
    for name, parameter in list(core.named_parameters()):
        if shapes.get(name, parameter.shape) != parameter.shape:
            module, _, key = name.rpartition(".")
            setattr(core.get_submodule(module), key, nn.Parameter(parameter.new_empty(shapes[name])))
