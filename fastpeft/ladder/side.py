"""The side network: narrow blocks, each of which reads a window of the backbone's features.

Dimension letters: B batch, T tokens, d width of the backbone, D width of the side network, L layers of the backbone, N
blocks of the side network, k slots of a window, S of them real, w = (k - 1) / 2.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from fastpeft.errors import FastpeftError
from fastpeft.functional import window_attention
from fastpeft.ladder.config import STATE, LadderConfig
from fastpeft.ladder.generation import SideLayer
from fastpeft.ladder.side_run import SideRun, attends_in_float32

_HEAD_WIDTH = 64  # of the self-attention, at least
_GATE_TEMPERATURE = 0.1
_POSITION_STD = 0.02


class WindowFusion(nn.Module):
    r"""Cross-attention of the side state over a window of projected features.

    `X = softmax((theta Wq) (C~ Wk)^T / sqrt(D)) (C~ Wv)`, `C~_i = dropout(C_i) + p_i`

    It has one head. Keys and values are never made: queries are `theta (Wq Wk^T)`, and Wv is applied to the result.
    With `residual` the token's own `C_i + p_i` of the middle slot is added, without dropout, and with
    `residual="state"` theta too.

    Args:
        config: the side network's configuration.
        width: D.
        block: number of the block, from 1.
        slots: the slots of the window that are inside the backbone.
        causal: whether tokens see only those before them.
    """

    def __init__(self, config: LadderConfig, width: int, block: int, slots: Sequence[int], causal: bool) -> None:
        super().__init__()
        self.config = config  # a model that takes over another's weights also takes over its `residual`
        self.dropout = nn.Dropout(config.dropout)  # a module, which trainers of preferences turn off
        self.block, self.slots, self.causal = block, list(slots), causal
        self.middle = config.window_size // 2
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.positions = nn.Parameter(torch.randn(config.window_size, width) * _POSITION_STD)

    def forward(
        self,
        theta: Tensor,
        window: Tensor,
        mask: Tensor | None,
        visible: Tensor | None,
        seed: int | Tensor,
        cache: SideLayer | None,
    ) -> Tensor:
        """As `SideBlock.forward`: theta `(B, T, D)`, window `(B, S, T, D)` -> `(B, T, D)`."""
        q = F.linear(theta, self.folded())[:, None]  # (B, 1, T, D)
        if cache is not None and cache.get_seq_length() > 0:
            attended = self._attend_to_all(q, cache.add_window(self._keys(window)), visible)
        else:
            if cache is not None:
                cache.add_window(self._keys(window))
            attended = window_attention(
                q,
                window,
                self.positions,
                mask,
                slots=self.slots,
                causal=self.causal,
                dropout=self.dropout.p if self.training else 0.0,
                seed=seed,
                block=self.block,
            )
        return self.finish(theta, window[:, self.slots.index(self.middle)], self.value(attended[:, 0]))

    def folded(self) -> Tensor:
        """The matrix of the queries with that of the keys in it, `Wk^T Wq`, scaled: `(D, D)`."""
        return self.key.weight.mT @ (self.query.weight * self.query.out_features**-0.5)

    def _keys(self, window: Tensor) -> Tensor:
        """The keys of all slots, token after token: `(B, S, T, D)` -> `(B, T, k D)`."""
        batch, _, tokens, width = window.shape
        keys = self.positions.flatten().repeat(batch, tokens, 1)
        inside = slice(self.slots[0] * width, (self.slots[-1] + 1) * width)
        keys[..., inside] += window.transpose(1, 2).flatten(2)
        return keys

    def _attend_to_all(self, q: Tensor, keys: Tensor, visible: Tensor | None) -> Tensor:
        """Attention of new tokens' queries to the keys of all tokens: `(B, 1, N, D)`, `(B, T, k D)` -> `(B, 1, N, D)`.

        A slot outside the backbone has a key for each token here.
        """
        number = len(self.positions)
        keys = keys.unflatten(-1, (number, -1)).flatten(1, 2)[:, None].to(q.dtype)
        if visible is not None:
            visible = visible[..., None].expand(*visible.shape, number).flatten(-2)
        return F.scaled_dot_product_attention(q, keys, keys, attn_mask=visible, scale=1.0)

    def finish(self, theta: Tensor, own: Tensor, x: Tensor) -> Tensor:
        """What follows the attention: `(B, T, D)`, as theta and the middle slot's C."""
        if self.config.residual:
            x = x + own + self.positions[self.middle].to(x.dtype)
        return x + theta if self.config.residual == STATE else x


class GatedFusion(nn.Module):
    """The gate of LST: `g * theta + (1 - g) * C`, `g = sigmoid(alpha / 0.1)`, where alpha trains and starts at 0."""

    def __init__(self, config: LadderConfig) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.dropout)
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, theta: Tensor, window: Tensor, *_: Any) -> Tensor:
        """theta `(B, T, D)`, window `(B, 1, T, D)` -> `(B, T, D)`; a token reads no other."""
        gate = self.gate()
        return gate * theta + (1 - gate) * self.dropout(window[:, 0])

    def gate(self) -> Tensor:
        """g, of one element."""
        return torch.sigmoid(self.alpha / _GATE_TEMPERATURE)


class SideBlock(nn.Module):
    """The fusion with the window, then a post-norm encoder block with a feed-forward width of 4 D."""

    def __init__(self, fusion: nn.Module, width: int, num_heads: int, activation: str, causal: bool) -> None:
        super().__init__()
        self.fusion = fusion
        self.num_heads, self.causal = num_heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_output = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width)
        self.feed_forward_in = nn.Linear(width, 4 * width)
        self.activation = ACT2FN[activation]
        self.feed_forward_out = nn.Linear(4 * width, width)
        self.feed_forward_norm = nn.LayerNorm(width)

    def forward(
        self,
        theta: Tensor,
        window: Tensor,
        mask: Tensor | None,
        visible: Tensor | None,
        seed: int | Tensor,
        cache: SideLayer | None,
    ) -> Tensor:
        """theta `(B, T, D)`, window `(B, S, T, D)`, bool mask `(B, T)`, visible as of `SideRun` -> `(B, T, D)`.

        Tokens follow those of `cache`, if there are any, and are added to it; `visible` and the mask are of all.
        """
        return self.encode(self.fusion(theta, window, mask, visible, seed, cache), visible, cache)

    def encode(self, x: Tensor, visible: Tensor | None, cache: SideLayer | None = None) -> Tensor:
        """The encoder block, after the fusion: `(B, T, D)` -> `(B, T, D)`."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x)
        dtype = qkv.dtype
        in_float32 = attends_in_float32(qkv)
        with torch.autocast("cpu", enabled=False) if in_float32 else contextlib.nullcontext():
            qkv = qkv.float() if in_float32 else qkv
            q, states = qkv.split((width, 2 * width), dim=-1)
            if cache is not None:
                states = cache.add_states(states)
            q = q.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, T, D / H)
            k, v = states.unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            causal = self.causal and visible is None and tokens > 1
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=causal).to(dtype)
        x = self.attention_norm(x + self.attention_output(attended.transpose(1, 2).reshape(batch, tokens, width)))
        return self.feed_forward_norm(x + self.feed_forward_out(self.activation(self.feed_forward_in(x))))


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
        hidden_size: d, or the widths of the L + 1 features if they differ; D is a fraction of the widest.
        num_layers: L.
        activation: name of the feed-forward activation in transformers.
        causal: whether tokens see only those before them.

    Attributes:
        places: the layer of each block.
        readers: of each layer that is read, the (block, slot) that read it, in the order of its matrix's rows.
        completes: of a layer, the blocks of which it is the last to be read.

    Raises:
        FastpeftError: the widths do not divide, the backbone has fewer layers than `layers_per_block`, or projections
            are to be shared by features of different widths.

    Example:
        >>> side = SideNetwork(LadderConfig(window_size=3), hidden_size=64, num_layers=2)
        >>> side([torch.randn(1, 5, 64) for _ in range(3)]).shape
        torch.Size([1, 5, 64])
    """

    def __init__(
        self,
        config: LadderConfig,
        hidden_size: int | Sequence[int],
        num_layers: int,
        activation: str = "gelu",
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # transformers sets it, and the function that does it
        self._gradient_checkpointing_func: Any = None
        self.num_layers, self.activation, self.causal = num_layers, activation, causal
        self.feature_sizes = (num_layers + 1) * [hidden_size] if isinstance(hidden_size, int) else list(hidden_size)
        if config.share_projections and len(set(self.feature_sizes)) > 1:
            raise FastpeftError(
                f"share_projections=True with features of the widths {', '.join(map(str, self.feature_sizes))}: one "
                "matrix reads one width. Leave it out, or name in feature_modules layers of one width."
            )
        widest = max(self.feature_sizes)
        self.width = _divide("reduction_factor", config.reduction_factor, "the backbone's width", widest)
        heads = max(each for each in range(1, max(1, self.width // _HEAD_WIDTH) + 1) if self.width % each == 0)
        step = config.step(num_layers)
        if step > num_layers:
            raise FastpeftError(
                f"layers_per_block={step}, but the backbone has {num_layers} layers. Give a number from 1 to that."
            )
        self.places = range(num_layers, 0, -step)[::-1]
        windows = self._place_windows(config.window_size)
        gated = config.fusion == "gated"  # a gate has no position vectors, so its projection keeps a bias
        self.down = nn.Linear(self.feature_sizes[0], self.width)
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
        self.up = nn.Linear(self.width, self.feature_sizes[-1])
        if config.output_mix == "add":
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)
        self.register_state_dict_post_hook(_detach_from_stack)

    def _make_projections(self, step: int, bias: bool) -> None:
        """Make `projections`, or `shared_projection` in their place."""
        # one layer is read by slots that are `step` apart
        slots = {slot for readers in self.readers.values() for _, slot in readers}
        in_order = sorted(slots, key=lambda slot: (slot % step, -slot))
        self._shared_rows = {slot: row * self.width for row, slot in enumerate(in_order)}  # slot -> its first row
        self.shared_projection: nn.Linear | None = None
        self.projections = nn.ModuleDict()
        if self.config.share_projections:
            self.shared_projection = nn.Linear(self.feature_sizes[0], len(slots) * self.width, bias=bias)
            return
        for layer, readers in sorted(self.readers.items()):
            rows = len(readers) * self.width
            self.projections[str(layer)] = nn.Linear(self.feature_sizes[layer], rows, bias=bias)

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


def _detach_from_stack(side: SideNetwork, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Copy weights that are slices of a pool's: `torch.save` would write those of all networks of the stack."""
    for key, value in state.items():
        if key.startswith(prefix) and type(value) is Tensor and value.untyped_storage().nbytes() > value.nbytes:
            state[key] = value.clone()


def _divide(name: str, divisor: int, what: str, width: int) -> int:
    """`width / divisor`, which must be a whole number."""
    if width % divisor:
        divisors = [number for number in range(1, width + 1) if width % number == 0]
        raise FastpeftError(
            f"{name}={divisor} does not divide {what}, {width}. Choose one of {', '.join(map(str, divisors))}."
        )
    return width // divisor
