"""The times by which a GPU chooses between Triton's kernels and ATen's calls, for the package to bring.

`python -m bench.tune` on a machine with a GPU times each form of each op at the shapes below, in turns, and writes
`fastpeft/ops/tuned/ARCHITECTURE.json` as it goes: cut off, it goes on where it was. Delete the file to time all anew.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpeft.ops import backends
from fastpeft.ops.autotune import TUNED, Timings
from fastpeft.ops.define import OPS
from fastpeft.ops.dispatch import architecture, choosing

DTYPE = torch.bfloat16  # float16 is timed where it is used
LAYERS = [  # in_features, and out_features of the layers that share the input
    *[(768, (768,)), (768, (768, 768)), (768, (3072,)), (3072, (768,))],  # RoBERTa-base
    *[(1024, (1024,)), (1024, (1024, 1024)), (1024, (4096,)), (4096, (1024,))],  # RoBERTa-large
    *[(2048, (2048,)), (2048, (2048, 512, 512)), (2048, (8192, 8192)), (8192, (2048,))],  # Llama-3.2-1B
    *[(4096, (4096,)), (4096, (4096, 1024, 1024)), (4096, (14336, 14336)), (14336, (4096,))],  # Llama-3.1-8B
]
ROWS, RANKS = (32, 64, 256, 512, 2048, 8192, 16384), (16, 64)
WIDTHS, SLOTS, TOKENS, DROPOUTS = (96, 128, 256), (1, 3, 9), (64, 128, 512), (0.0, 0.2)
BATCH = 16
HEADS, HEAD_TOKENS = ((576, 49152), (2048, 128256), (4096, 128256)), (512, 2048, 8192)  # SmolLM2, Llama-3.2-1B, -3.1-8B
Call = tuple[str, tuple[Any, ...]]  # an op and its arguments


def siva_calls(k: int, columns: Sequence[int], rows: int, rank: int, dtype: torch.dtype, device: str) -> Iterator[Call]:
    """Layers of SiVA that share an input, forward and backward, as in training."""

    def ones(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.ones(shape, dtype=of, device=device)

    n = len(columns)
    x = ones(rows, k, of=dtype)
    weights, dhs = [ones(c, k, of=dtype) for c in columns], [ones(rows, c, of=dtype) for c in columns]
    us, ss, vs = [ones(c, rank) for c in columns], [ones(rank) for _ in columns], [ones(rank, k) for _ in columns]
    if n == 1:
        factors = us[0], ss[0], vs[0]
        yield "siva_linear", (x, weights[0], *factors, None)
        yield "siva_linear_backward", (dhs[0], x, weights[0], *factors, ones(rows, rank), True, True, True, False)
    else:
        yield "siva_linear_group", (x, weights, us, ss, vs, [None] * n)
        needs = True, [True] * n, True, [False] * n
        yield "siva_linear_group_backward", (dhs, x, weights, us, ss, vs, ones(n * rank, rows), *needs)


def window_calls(
    batch: int, tokens: int, width: int, slots: int, dropout: float, dtype: torch.dtype, device: str, padded: bool
) -> Iterator[Call]:
    """Window attention of one head, forward and backward."""
    mask = torch.ones(batch, tokens, dtype=torch.bool, device=device) if padded else None
    q = torch.ones(batch, 1, tokens, width, dtype=dtype, device=device)
    c = torch.ones(batch, slots, tokens, width, dtype=dtype, device=device)
    p = torch.ones(slots, width, dtype=dtype, device=device)
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    rest = list(range(slots)), False, dropout, seed, 0
    yield "window_attention", (q, c, p, mask, *rest)
    lse = torch.zeros(batch, 1, tokens, device=device)
    yield "window_attention_backward", (q, q, c, p, mask, q, lse, *rest, True, True, True)


def head_calls(width: int, words: int, tokens: int, dtype: torch.dtype, device: str) -> Iterator[Call]:
    """The loss of a frozen head with the gradient of its states, and without."""
    hidden, weight = (torch.ones(size, width, dtype=dtype, device=device) for size in (tokens, words))
    labels = torch.zeros(tokens, dtype=torch.int64, device=device)
    for need_dhidden in (True, False):
        yield "frozen_head_cross_entropy", (hidden, weight, labels, None, -100, need_dhidden)


def calls(device: str) -> Iterator[Call]:
    """Of all shapes."""
    for (k, columns), rows, rank in itertools.product(LAYERS, ROWS, RANKS):
        yield from siva_calls(k, columns, rows, rank, DTYPE, device)
    for width, slots, tokens, dropout, padded in itertools.product(WIDTHS, SLOTS, TOKENS, DROPOUTS, (False, True)):
        yield from window_calls(BATCH, tokens, width, slots, dropout, DTYPE, device, padded)
    for (width, words), tokens in itertools.product(HEADS, HEAD_TOKENS):
        yield from head_calls(width, words, tokens, DTYPE, device)


def tune(file: Path, timed: Iterator[Call]) -> int:
    """Time the forms of these calls into the file, but for those that it has; how many there are."""
    timings = Timings(file, rounds=50, enough=0.3)
    for op, arguments in timed:
        choosing(OPS[op], backends.gpu_forms(op), timings, times_all=True)(*arguments)
    file.with_suffix(".lock").unlink(missing_ok=True)
    return len(timings.used)


def main() -> None:
    if not torch.cuda.is_available():
        print("There is no GPU here, so there is nothing to time. On a machine with one, run this again.")
        return
    file = TUNED / f"{architecture(torch.device('cuda', 0))}.json"
    print(f"{tune(file, calls('cuda'))} questions are answered in {file}")


if __name__ == "__main__":
    main()
