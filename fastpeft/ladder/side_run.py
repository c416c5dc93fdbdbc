"""A pass of a side network over the backbone's features, as they come.

Dimension letters as in `side.py`.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpeft.errors import FastpeftError
from fastpeft.ladder.generation import SideLayer
from fastpeft.ops.dtypes import autocast_dtype
from fastpeft.support.processor import has_bfloat16

if TYPE_CHECKING:
    from fastpeft.ladder.side import SideNetwork

TINY = 1e-6  # beside the mean square of a feature


class SideRun:
    """One pass of a side network over features as the backbone makes them.

    Without gradients each feature is projected at once, and each block runs when its window is complete: projections
    of at most k layers are alive, and no feature. With gradients backward keeps the features anyway, and the blocks run
    after the last feature: what they keep for backward then takes no memory while the backbone's layers run.

    Args:
        side: a `SideNetwork`; that of a `SideStack` has one more dimension in front of every tensor.
        mask: bool `(B, T)`, or None.
        seed: decides, in training, which features and blocks are dropped, as of `SideNetwork.forward`.
        keep_states: whether to keep every side state in `states`.
        blocks_seed: decides which blocks are dropped, instead of `seed`.
        cache: of each block, with the tokens before those of this pass, which are added to it; the mask is of all.
    """

    def __init__(
        self,
        side: SideNetwork,
        mask: Tensor | None,
        seed: int | Tensor,
        keep_states: bool = False,
        blocks_seed: int | None = None,
        cache: Sequence[SideLayer] | None = None,
    ) -> None:
        self.side, self.mask, self.seed, self.cache = side, mask, seed, cache
        self.past = cache[0].get_seq_length() if cache else 0  # the number of cached tokens
        self.states: list[Tensor] = []  # theta_0 .. theta_N, if they are kept
        self._keep_states = keep_states
        self._theta: Tensor  # the latest state
        self._last_feature: Tensor | None = None  # B_L, if the output is added to it
        self._waiting: list[tuple[int, Tensor]] = []  # features that are not projected yet
        self._windows: dict[int, list[Tensor]] = {}  # block -> its projections so far, by slot
        # what the self-attention sees, (B or 1, 1, N, T): bool where there is a cache, else to be added to its scores;
        # None where `causal` says all
        self._visible: Tensor | None = None
        self._next = 0
        self._in_bfloat16 = False
        self._dropped: set[int] = set()
        if side.config.layer_drop and side.training and (number := int(seed if blocks_seed is None else blocks_seed)):
            draw = random.Random(number)
            self._dropped = {block for block, _ in enumerate(side.places, 1) if draw.random() < side.config.layer_drop}

    def feed(self, layer: int, feature: Tensor) -> None:
        """Read `B_layer`, `(B, T, d)`; features come in order, from 0 to L."""
        feature = self._accept(layer, feature)
        if layer in self.side.readers:
            self._waiting.append((layer, feature))
        if layer == self.side.num_layers or not torch.is_grad_enabled():
            with self._products():
                for waiting in self._waiting:
                    self._read(*waiting)
            self._waiting.clear()

    def _read(self, layer: int, feature: Tensor) -> None:
        """Project a feature, and run the blocks whose windows it completes."""
        side = self.side
        for (block, _), part in zip(side.readers[layer], side.project(layer, feature)):
            self._windows.setdefault(block, []).append(part)
        for block in side.completes.get(layer, []):
            parts = self._windows.pop(block)
            if block in self._dropped:
                self._advance(self._theta)
            elif side.gradient_checkpointing and side.training and torch.is_grad_enabled():
                run = partial(self._run, block)
                self._advance(side._gradient_checkpointing_func(run, self._theta, *parts))
            else:
                self._advance(self._run(block, self._theta, *parts))

    def _run(self, block: int, theta: Tensor, *parts: Tensor) -> Tensor:
        """The state after a block, for the projections of its window by slot."""
        window = parts[0].unsqueeze(-3) if len(parts) == 1 else torch.stack(parts, dim=-3)
        cache = None if self.cache is None else self.cache[block - 1]
        state: Tensor = self.side.blocks[block - 1](theta, window, self.mask, self._visible, self.seed, cache)
        return state

    def _accept(self, layer: int, feature: Tensor) -> Tensor:
        """The feature in the side network's dtype; `B_0` gives the first side state."""
        if layer != self._next:
            raise FastpeftError(
                f"the feature of layer {layer} came where that of layer {self._next} was expected. Name in "
                "feature_modules layers that run once each, in their order."
            )
        side = self.side
        self._next += 1
        if layer == 0:
            # for the few tokens of a cached pass casting the weights would take longest
            self._in_bfloat16 = self.cache is None and _computes_in_bfloat16(feature, side.down.weight)
        if not (self._in_bfloat16 or autocast_dtype(feature.device)):
            feature = feature.to(side.down.weight.dtype)
        if layer == side.num_layers and side.config.output_mix == "add":
            self._last_feature = feature
        if side.config.normalise_features:
            # on a GPU autocast would keep it in float32
            feature = F.rms_norm(feature, feature.shape[-1:], eps=TINY).to(feature.dtype)
        if layer == 0:
            if self.mask is not None or self.past:  # else causal attention needs no mask
                self._visible = visibility(self.mask, feature.shape[-2], side.causal, feature.device, self.past)
            with self._products():
                self._advance(side.down(feature))
                if self._visible is not None and self.cache is None:
                    self._visible = _to_add(self._visible, self._theta)
        return feature

    def _products(self) -> contextlib.AbstractContextManager[Any]:
        """What the side network runs under: autocast, where that is on or the backbone computes in bfloat16 on a CPU.

        Autocast keeps its copies of weights until it ends. A pass reads each weight once, but for a shared projection.
        """
        device = self.side.up.weight.device
        keep = self.side.config.share_projections
        if self._in_bfloat16:
            return torch.autocast(device.type, torch.bfloat16, cache_enabled=keep)
        if not keep and (dtype := autocast_dtype(device)):
            return torch.autocast(device.type, dtype, cache_enabled=False)
        return contextlib.nullcontext()

    def _advance(self, theta: Tensor) -> None:
        self._theta = theta
        if self._keep_states:
            self.states.append(theta)

    def output(self) -> Tensor:
        """The up-projection of the last state, `(B, T, d)`, with `output_mix` added to `B_L`."""
        self._check_complete()
        with self._products():
            output: Tensor = self.side.up(self._theta)
        last = self._last_feature
        if last is None:
            return output
        return last + torch.linalg.vector_norm(last, dim=-1, keepdim=True) * last.shape[-1] ** -0.5 * output

    def _check_complete(self) -> None:
        if self._next != self.side.num_layers + 1:
            raise FastpeftError(
                f"the side network read {self._next} features of {self.side.num_layers + 1}. Name the backbone's "
                "layers in feature_modules."
            )


def _computes_in_bfloat16(feature: Tensor, weight: Tensor) -> bool:
    """Whether products are computed in bfloat16, which a feature has: on a processor that is fast at them."""
    kinds = feature.device.type, feature.dtype, weight.dtype
    return kinds == ("cpu", torch.bfloat16, torch.float32) and has_bfloat16()


def visibility(mask: Tensor | None, tokens: int, causal: bool, device: torch.device, past: int = 0) -> Tensor | None:
    """Which tokens a query's self-attention sees: bool `(B or 1, 1, N, T)`, None for all.

    The N queries follow `past` tokens. A query always sees itself, so that the state of padding is finite.
    """
    if mask is None and (tokens == 1 or not causal):
        return None
    places = torch.arange(past + tokens, device=device)
    own = places[past:, None]
    visible = (places <= own if causal else places >= 0)[None, None]
    if mask is not None:
        visible = visible & mask[..., None, None, :]
    return visible | (places == own)


def _to_add(visible: Tensor, like: Tensor) -> Tensor:
    """What attention adds to its scores, made once: it would make it of bools in each block, and keep it for backward.

    `like`, the output of a linear layer, has the dtype of queries.
    """
    dtype = torch.float32 if attends_in_float32(like) else like.dtype
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -torch.inf)


def attends_in_float32(qkv: Tensor) -> bool:
    """Whether attention computes in float32: on a CPU PyTorch's is twice as fast in it as in bfloat16.

    A fake tensor simulates a GPU.
    """
    return qkv.is_cpu and qkv.dtype == torch.bfloat16 and type(qkv) is Tensor
