"""The attention over a window of features against its plain formula and one composed of PyTorch's operations.

`python -m bench.bench_window_attention` writes `bench/data/window_attention.csv`. The side network's width is that of a
RoBERTa-base: 768 / 8. No library has the op; composed is what one writes without it: dropout and positions for each
slot, the slots one after the other along the tokens, PyTorch's fused attention.

Predicted before measuring, of the C++ pass in float32 on a core with AVX2 and one thread, whose multiply-adds reach 102
GFLOPS: a pair of a query and a key costs 4.0 ns forward and 9.9 backward, and 0.3 each for the exponential; an element
of the keys 0.2 ns, each way. That makes 10.5 ms forward with 128 tokens and a window of 9, where ATen's calls take
11.1, and 35 ms in training, where they take 39.8. Composed should take 1.05 to 1.2 of the op's time, and padding save
the op the hidden keys. The plain formula has its scores in memory, several copies of them: 2 to 3. On a card the op
reads 2 bytes an element of C where composed moves 17: with 128 tokens and no dropout composed should take 2 to 4 times
as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.harness import Bench, Candidates, Run, ready_made
from fastpeft.functional import window_attention
from fastpeft.ops import reference

SEED, BLOCK = 5, 1


@dataclass(frozen=True)
class Case:
    """A batch of queries over the window of a block, all of whose slots are real."""

    model: str
    width: int
    batch: int
    tokens: int
    window: int
    dtype: str
    work: str  # "forward" as in inference, or "training": forward and the gradients of q, c and p
    padded: bool = False  # a quarter of the tokens of every second text
    dropout: float = 0.0


SIZES = (  # tokens, window, whether there is padding, dropout; that works in training alone
    *((64, 9, False, 0.0), (128, 9, False, 0.0), (512, 9, False, 0.0), (128, 3, False, 0.0)),
    *((128, 9, True, 0.0), (128, 9, False, 0.1)),
)


def cases(device: torch.device) -> Iterator[Case]:
    """Lengths with 9-LST's window, a smaller window, padding and dropout, at RoBERTa-base's width."""
    for dtype in ("float32",) if device.type == "cpu" else ("bfloat16", "float32"):
        for tokens, window, padded, dropout in SIZES:
            for work in ("forward", "training") if dropout == 0 else ("training",):
                yield Case("base", 96, 16, tokens, window, dtype, work, padded, dropout)


def composed(q: Tensor, c: Tensor, p: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """The window in memory, `(B, 1, k T, D)`, as keys and as values."""
    slots = [F.dropout(feature, dropout) + position for feature, position in zip(c.unbind(1), p.unbind(0))]
    window = torch.cat(slots, dim=1)[:, None]
    visible = None if mask is None else mask.repeat(1, len(slots))[:, None, None]  # (B, 1, 1, k T)
    return F.scaled_dot_product_attention(q, window, window, attn_mask=visible, scale=1.0)


def candidates(case: Case, device: torch.device) -> Candidates:
    """Each form of the same attention on the same tensors; training gives dq, dc and dp."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        tensor = scale * torch.randn(shape, device=device)
        return tensor.to(dtype).requires_grad_(case.work == "training")

    q = draw(case.batch, 1, case.tokens, case.width, scale=case.width**-0.5)
    c = draw(case.batch, case.window, case.tokens, case.width)
    p = draw(case.window, case.width, scale=0.02)
    mask = None
    if case.padded:
        mask = torch.ones(case.batch, case.tokens, dtype=torch.bool, device=device)
        mask[1::2, -(case.tokens // 4) :] = False
    dout = torch.randn(q.shape, device=device).to(dtype)
    seed = torch.tensor(SEED, device=q.device)
    fixed = (list(range(case.window)), False, case.dropout, seed, BLOCK)  # slots, causal, dropout, seed, block

    @torch.no_grad()
    def plain() -> Any:
        out, lse = reference.window_attention(q, c, p, mask, *fixed)
        if case.work == "forward":
            return out
        return reference.window_attention_backward(dout, q, c, p, mask, out, lse, *fixed, True, True, True)

    def ready(form: Callable[[], Tensor]) -> Run:
        return (lambda: torch.autograd.grad(form(), (q, c, p), dout)) if case.work == "training" else form

    def op() -> Tensor:
        return window_attention(q, c, p, mask, dropout=case.dropout, seed=SEED, block=BLOCK)

    return ready_made(
        {"op": ready(op), "reference": plain, "composed": ready(lambda: composed(q, c, p, mask, case.dropout))}
    )


BENCH = Bench(__doc__, "window_attention.csv", cases, candidates)

if __name__ == "__main__":
    BENCH.main()
