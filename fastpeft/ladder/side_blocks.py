"""The blocks of a side network: how a block reads its window, and the encoder block that follows.

Dimension letters as in `side.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from fastpeft.functional import window_attention
from fastpeft.ladder.config import STATE, LadderConfig
from fastpeft.ladder.side_cache import SideLayer

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


def attends_in_float32(qkv: Tensor) -> bool:
    """Whether attention computes in float32: on a CPU PyTorch's is twice as fast in it as in bfloat16.

    A fake tensor simulates a GPU.
    """
    return qkv.is_cpu and qkv.dtype == torch.bfloat16 and type(qkv) is Tensor
