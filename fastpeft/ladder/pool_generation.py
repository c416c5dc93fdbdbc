"""Generation by a pool: the rows of a batch stand beside one decoder, each with the side network of its task.

Each pass runs the backbone over all rows, every side network over those of its task, and the backbone's head over all.

Dimension letters as in `side.py`; B rows, N tokens of a pass.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from fastpeft.errors import FastpeftError
from fastpeft.ladder.backbone import CACHE, Backbone
from fastpeft.ladder.config import LadderConfig
from fastpeft.ladder.generation import LadderCache, prepare_pass, with_own_cache
from fastpeft.ladder.inputs import LadderInputs, WithInputsOfBase
from fastpeft.ladder.passes import LadderPass
from fastpeft.ladder.side import SideNetwork, SideRun
from fastpeft.ladder.side_step import run_of
from fastpeft.support.eval_mode import in_eval_mode
from fastpeft.support.generation import option

TaskRows: TypeAlias = slice | Tensor  # of a batch, those of one task: a slice where they follow each other


class PoolCache(LadderCache):
    """A `LadderCache` whose side networks each read some of the rows.

    `tasks` has the task of each prompt; side networks are in the order in which they come there.
    """

    def __init__(self, backbone: Backbone, tasks: Sequence[str]) -> None:
        super().__init__(backbone, len(set(tasks)))
        self.tasks = tuple(tasks)
        self.rows: list[TaskRows] = []

    def begin(self, batch: int, device: torch.device) -> None:
        """Find the rows of each task; a prompt has several that follow each other, as beams or several samples."""
        each = batch // len(self.tasks)
        numbered = [task for task in self.tasks for _ in range(each)]
        self.rows = [
            rows_at([row for row, own in enumerate(numbered) if own == task], device)
            for task in dict.fromkeys(self.tasks)
        ]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows; a row takes the place of one of its own prompt only."""
        places = torch.empty_like(beam_idx)
        for rows, side in zip(self.rows, self.sides):
            places[rows] = torch.arange(len(places[rows]), device=places.device, dtype=places.dtype)
            for layer in side.layers:
                layer.reorder_cache(places[beam_idx[rows]])
        for layer in self.layers[: self._own]:
            layer.reorder_cache(beam_idx)


def rows_at(places: list[int], device: torch.device) -> TaskRows:
    """The rows at these places, which are sorted."""
    if places[-1] - places[0] == len(places) - 1:
        return slice(places[0], places[-1] + 1)
    return torch.tensor(places, device=device)


class PoolRun:
    """A pass of several side networks, each over its rows: what `LadderPass` wants of a `SideRun`."""

    mask = None  # each run has that of its rows

    def __init__(self, runs: Sequence[tuple[TaskRows, SideRun]]) -> None:
        self._runs = runs
        self.side, self.past = runs[0][1].side, runs[0][1].past
        self._rows = 0

    def feed(self, layer: int, feature: Tensor) -> None:
        """Read a feature, as `SideRun.feed` does."""
        self._rows = len(feature)
        for rows, run in self._runs:
            run.feed(layer, feature[rows])

    def output(self) -> Tensor:
        """The outputs of all rows, `(B, N, d)`."""
        outputs = [(rows, run.output()) for rows, run in self._runs]
        found = outputs[0][1].new_empty(self._rows, *outputs[0][1].shape[1:])
        for rows, output in outputs:
            found[rows] = output
        return found


class PoolDecoder(PreTrainedModel, GenerationMixin):
    """A pool's backbone beside which each row of a batch has a side network: a model that generates.

    The side networks are in the order of those of the cache. `lock` is held during a pass, so that others may run
    between two tokens.
    """

    config_class = LadderConfig
    base_model_prefix = "base"
    main_input_name = "input_ids"

    def __init__(self, backbone: Backbone, sides: Sequence[SideNetwork], lock: AbstractContextManager[Any]) -> None:
        super().__init__(LadderConfig())
        self.training = False
        self.backbone = backbone
        self.base: Any = backbone.model
        self._sides, self._lock = sides, lock
        self._parts = [*nn.ModuleList([backbone.body, *sides]).modules()]  # found once: each token asks for their mode
        self.generation_config = copy.deepcopy(backbone.core.generation_config)
        self.generation_config.cache_implementation = None  # a `PoolCache` takes its place

    def can_generate(self) -> bool:
        """Always: the pool has asked its backbone before it makes this."""
        return True

    @WithInputsOfBase
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As `LadderModel.forward`, which explains the arguments; there is always a cache."""
        given, backbone = LadderInputs.of(*args, **kwargs), self.backbone
        cache: PoolCache = given.cache
        text: Any = given.text
        if not cache.rows:
            cache.begin(len(text), text.device)
        past = cache.get_seq_length()
        given.check(backbone, past)
        mask = None if given.attention_mask is None else given.attention_mask.bool()
        step = past > 0 and text.shape[1] == 1
        arguments = given.for_base(backbone, cache)
        with self._lock, in_eval_mode(self._parts):
            runs: list[tuple[TaskRows, SideRun]] = []
            for rows, side, side_cache in zip(cache.rows, self._sides, cache.sides, strict=True):
                runs.append((rows, run_of(side, None if mask is None else mask[rows], side_cache, step)))
            run: Any = PoolRun(runs)
            called = backbone.after_context(arguments)
            with LadderPass(backbone, run, arguments, len(backbone.layers) + 1).around_base():
                return with_own_cache(self.base(**called, return_dict=True), cache)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """As that of `LadderModel`."""
        return prepare_pass(self.backbone.core, input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)


def check_cache(cache: Any, tasks: Sequence[str]) -> None:
    """Raise `FastpeftError` unless a cache is of a pool, and of rows of these tasks."""
    if not isinstance(cache, PoolCache):
        raise FastpeftError(
            f"{CACHE} is a {type(cache).__name__}, which holds nothing of the side networks. Give what "
            "this pool's generate returned, or leave it out."
        )
    if cache.tasks != tuple(tasks):
        own, other = (", ".join(map(repr, each)) for each in (cache.tasks, tasks))
        raise FastpeftError(
            f"{CACHE} was read for the tasks {own}, and the rows are of {other}: a side network cannot continue from "
            "what another one has kept. Give the rows the tasks of the cache, or leave it out."
        )


def check_shared_head(task: str, head: Backbone, backbone: Backbone) -> None:
    """Raise `FastpeftError` unless a member scores words as the pool's base does."""
    own, other = head.decoder, backbone.decoder
    same = own is not None and other is not None and all(a is b for a, b in zip(own.parameters(), other.parameters()))
    if head.head_parameters() or not same:
        raise FastpeftError(
            f"the task {task!r} has a head of its own, but a pool generates by that of its base. Call generate of "
            f"pool[{task!r}] for rows of this task alone."
        )


# ways to generate that pass over other rows than the batch's or by another model, or that return for all rows what each
# side network has in a shape of its own
_MODES = (
    *("assistant_model", "prompt_lookup_num_tokens", "guidance_scale", "penalty_alpha", "dola_layers"),
    "output_hidden_states",
)


def check_mode(options: Mapping[str, Any], *configs: Any) -> None:
    """Raise `FastpeftError` unless a call of `generate` is greedy, samples or has beams."""
    for name in _MODES:
        if (value := option(name, options, *configs)) is not None and value is not False:
            raise FastpeftError(
                f"{name}={value!r}: a pool generates greedily, by sampling and with beams. Leave it out, or call "
                "generate of one task's model."
            )
