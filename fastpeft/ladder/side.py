"""The side network: narrow blocks, each of which reads a window of the backbone's features.

Dimension letters: B batch, T tokens, d width of the backbone, D width of the side network, L layers of the backbone, N
blocks of the side network, k slots of a window, S of them real, w = (k - 1) / 2.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastpeft.errors import FastpeftError
from fastpeft.ladder.config import LadderConfig
from fastpeft.ladder.side_blocks import GatedFusion, SideBlock, WindowFusion, attends_in_float32
from fastpeft.ladder.side_cache import SideLayer
from fastpeft.ops.dtypes import autocast_dtype
from fastpeft.support.processor import has_bfloat16

_HEAD_WIDTH = 64  # of the self-attention, at least
TINY = 1e-6  # beside the mean square of a feature


class SideNetwork(nn.Module):
    r"""The network that trains beside a frozen backbone: `theta_0 = down(B_0)`, N side blocks, an up-projection.

    With n `layers_per_block` there are `N = ceil(L / n)` blocks, and block j stands at layer `L - n (N - j)`. It reads
    the k features centred there, each by its own projection. The projections of one feature for all blocks are the rows
    of one matrix, `projections[layer]`, so that each feature is read once. Shared projections are the rows of
    `shared_projection`, the last slots' first: so those of one feature are next to each other. A slot outside
    `B_0 .. B_L` has no projection.

    With `output_mix="add"` the output is `B_L + |B_L| up(theta_N)`, where `up` starts at zero and `|B_L|` is a token's
    root mean square. Its size is 33 in one decoder and 0.1 in an encoder, so without it no learning rate fits both.
    Weight decay then pulls towards the backbone.

    Args:
        config: the configuration of the side network.
        hidden_size: d, of which D is a fraction.
        num_layers: L.
        activation: name of the feed-forward activation in transformers.
        causal: whether tokens see only those before them.

    Attributes:
        places: the layer of each block.
        readers: of each layer that is read, the (block, slot) that read it, in the order of its matrix's rows.
        completes: of a layer, the blocks of which it is the last to be read.

    Raises:
        FastpeftError: the widths do not divide, or the backbone has fewer layers than `layers_per_block`.

    Example:
        >>> side = SideNetwork(LadderConfig(window_size=3), hidden_size=64, num_layers=2)
        >>> side([torch.randn(1, 5, 64) for _ in range(3)]).shape
        torch.Size([1, 5, 64])
    """

    def __init__(
        self,
        config: LadderConfig,
        hidden_size: int,
        num_layers: int,
        activation: str = "gelu",
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # transformers sets it, and the function that does it
        self._gradient_checkpointing_func: Any = None
        self.num_layers, self.activation, self.causal = num_layers, activation, causal
        self.hidden_size = hidden_size
        self.width = _divide("reduction_factor", config.reduction_factor, "the backbone's width", hidden_size)
        heads = max(each for each in range(1, max(1, self.width // _HEAD_WIDTH) + 1) if self.width % each == 0)
        step = config.step(num_layers)
        if step > num_layers:
            raise FastpeftError(
                f"layers_per_block={step}, but the backbone has {num_layers} layers. Give a number from 1 to that."
            )
        self.places = range(num_layers, 0, -step)[::-1]
        windows = self._place_windows(config.window_size)
        gated = config.fusion == "gated"  # a gate has no position vectors, so its projection keeps a bias
        self.down = nn.Linear(hidden_size, self.width)
        self._make_projections(step, bias=gated)
        self.blocks = nn.ModuleList(
            SideBlock(
                GatedFusion(config) if gated else WindowFusion(config, self.width, block, windows[block], causal),
                self.width,
                heads,
                activation,
                causal,
            )
            for block in windows
        )
        self.up = nn.Linear(self.width, hidden_size)
        if config.output_mix == "add":
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def _make_projections(self, step: int, bias: bool) -> None:
        """Make `projections`, or `shared_projection` in their place."""
        # one layer is read by slots that are `step` apart
        slots = {slot for readers in self.readers.values() for _, slot in readers}
        in_order = sorted(slots, key=lambda slot: (slot % step, -slot))
        self._shared_rows = {slot: row * self.width for row, slot in enumerate(in_order)}  # slot -> its first row
        self.shared_projection: nn.Linear | None = None
        self.projections = nn.ModuleDict()
        if self.config.share_projections:
            self.shared_projection = nn.Linear(self.hidden_size, len(slots) * self.width, bias=bias)
            return
        for layer, readers in sorted(self.readers.items()):
            self.projections[str(layer)] = nn.Linear(self.hidden_size, len(readers) * self.width, bias=bias)

    def _place_windows(self, window_size: int) -> dict[int, list[int]]:
        """Find `readers` and `completes`, and for each block its slots inside the backbone."""
        reach = window_size // 2
        self.readers: dict[int, list[tuple[int, int]]] = {}
        self.completes: dict[int, list[int]] = {}
        windows: dict[int, list[int]] = {}
        for block, place in enumerate(self.places, 1):
            self.completes.setdefault(min(place + reach, self.num_layers), []).append(block)
            first = place - reach  # the layer of slot 0
            windows[block] = [slot for slot in range(window_size) if 0 <= first + slot <= self.num_layers]
            for slot in windows[block]:
                self.readers.setdefault(first + slot, []).append((block, slot))
        return windows

    def projection(self, layer: int) -> tuple[Tensor, Tensor | None]:
        """Weight and bias that project `B_layer`, D rows for each of `readers[layer]`."""
        shared = self.shared_projection
        if shared is None:
            own: Any = self.projections[str(layer)]
            return own.weight, own.bias
        first = self._shared_rows[self.readers[layer][0][1]]  # slots go down as blocks go up
        rows = slice(first, first + len(self.readers[layer]) * self.width)
        return shared.weight[rows], None if shared.bias is None else shared.bias[rows]

    def project(self, layer: int, feature: Tensor) -> Sequence[Tensor]:
        """Project `B_layer`, `(B, T, d)`, by one product: a `(B, T, D)` for each of `readers[layer]`."""
        readers = self.readers.get(layer, [])
        if not readers:
            return ()
        if self.shared_projection is not None:
            projected = F.linear(feature, *self.projection(layer))
        else:
            projected = self.projections[str(layer)](feature)
        return projected.chunk(len(readers), dim=-1)

    def forward(self, features: Sequence[Tensor], mask: Tensor | None = None, seed: int | Tensor = 0) -> Tensor:
        """The output `(B, T, d)` for features that are all there.

        Args:
            features: `B_0 .. B_L`, each `(B, T, d)`.
            mask: bool `(B, T)`, True for tokens and False for padding; None is all True.
            seed: decides, in training, which features and blocks are dropped; 0 drops no block. A number, or an int64
                tensor of one element on the device of the features.
        """
        run = SideRun(self, mask, seed)
        for layer, feature in enumerate(features):
            run.feed(layer, feature)
        return run.output()


class SideRun:
    """One pass of a side network over features as the backbone makes them.

    Without gradients each feature is projected at once, and each block runs when its window is complete: projections
    of at most k layers are alive, and no feature. With gradients backward keeps the features anyway, and the blocks run
    after the last feature: what they keep for backward then takes no memory while the backbone's layers run.

    Args:
        side: the side network; that of a `SideStack` has one more dimension in front of every tensor.
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


def _divide(name: str, divisor: int, what: str, width: int) -> int:
    """`width / divisor`, which must be a whole number."""
    if width % divisor:
        divisors = [number for number in range(1, width + 1) if width % number == 0]
        raise FastpeftError(
            f"{name}={divisor} does not divide {what}, {width}. Choose one of {', '.join(map(str, divisors))}."
        )
    return width // divisor
