"""The attention over a window of features against its plain formula and one composed of PyTorch's operations.

`python -m bench.bench_window_attention` times them side by side into `bench/data/window_attention.csv`; `pytest
bench --benchmark-enable --benchmark-only` shows each through pytest-benchmark. Both run what `candidates` returns.
The side network's width is that of a RoBERTa-base: 768 / 8. No library has the op; composed is what one writes
without it: dropout and positions for each slot, the slots one after the other along the tokens, PyTorch's fused
attention.

Predicted before measuring, of the CPU in float32 with one thread, which does about 60 GFLOPS in matrix products and
moves about 10 GB a second from memory. A pair of a query and a key costs 2 D multiply-adds forward, here as
composed, and 5 D backward, for both make the scores again: with D = 96 6.4 and 16 ns. Both run PyTorch's kernel, which
has a tile of the scores in cache, so what differs belongs to the keys. For each of their elements composed moves 16
bytes forward (positions added 8, slots joined 8) and 32 more backward (zeros for the gradients of keys and of values 8,
their sum 12, positions 4, slots apart 8); the op 8 forward, and backward 8 for the same keys again, 8 + 12 and 4. So
composed should take

- without dropout 1.1 of the op's time forward with 128 tokens and less with more, and 1.0 to 1.05 with backward;
- with padding the same: the mask is one row for each sentence in both;
- with dropout 1.1 to 1.2: PyTorch draws it at about 4 ns an element, the op at 1, three times.

The plain formula has its scores in memory, several copies of them, and makes masks where there are none: 2 to 3. On a
card the op reads 2 bytes an element of C where composed moves 17 (docs/methods/kernels.md): with 128 tokens and no
dropout composed should take 2 to 4 times as long.

Measured of ATen's calls by the time of the processor, which other work disturbs less than the clock on the wall, 15
rounds, 5 with 512 tokens: composed 1.02 of the op's forward, 1.07 with 64 tokens, 0.96 with a window of 3; with
backward 1.08 with 512 tokens, 1.1 to 1.2 with 128, 1.33 with 64, 0.95 with a window of 3 or padding; with dropout 1.2.
More than was predicted, for pages that are new to the process were not counted: about 1.8 microseconds each, which is
4.5 of 15 ms with 64 tokens. The op needs few, as backward goes a few sentences at a time. Before, with the scores in
memory, it took 1.1 to 1.6 times as long as now forward, 1.1 to 1.4 with backward.

Predicted of the float32 pass in C++ before measuring it, on a core with AVX2 and one thread, whose multiply-adds reach
102 GFLOPS. Its products run at 97 in blocks of 4 rows by 2 or 3 registers, a BLAS at 76 in the strips of 32 queries
that PyTorch's kernel gives it. So a pair of a query and a key costs 4.0 ns forward and 9.9 backward, and 0.3 each for
the exponential; an element of the keys 0.2 ns, each way. That makes 10.5 ms forward with 128 tokens and a window of 9,
where ATen's calls take 11.1, and 35 ms in training, where they take 39.8; with a window of 3 3.5 (4.2) and 11.8 (14.1).
Composed should take 1.05 to 1.2 of the op's time, and padding save the op the hidden keys.

Measured by the time of the processor, 21 rounds, 7 with 512 tokens, on a machine with other work, of 32 to 128 tokens:
ATen's calls take 1.17 to 1.3 of the op's time forward and 1.2 to 1.5 in training, with padding 1.4 to 1.5, twice with
32 tokens and a window of 9; composed 1.07 to 1.35 forward, 1.06 to 2 in training, and with padding or dropout 1.4 to
1.7. With 512 tokens these are 1.03 to 1.11 and 1.04 to 1.3. Bfloat16, widened: ATen's calls 1.26 to 1.4. More than was
predicted, for a cause that was not looked for. Products are 85 % of the time, the
exponential and maxima 6 (training) to 12 (forward), making keys 3 to 5. With GCC the loops over sums need a pragma to
unroll them: without it the sums are in memory, at a third of the speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.harness import DATA, Candidates, time_operation
from fastpeft.functional import window_attention
from fastpeft.ops import reference

FILE = DATA / "window_attention.csv"
WIDTHS = {"base": 96}  # of the side network, an eighth of the model's
BATCH, SEED, BLOCK = 16, 5, 1
NAMES = ("op", "reference", "composed")


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

    def __str__(self) -> str:
        extras = "-padded" * self.padded + "-dropout" * (self.dropout > 0)
        return f"{self.model}-{self.tokens}-{self.window}-{self.dtype}-{self.work}{extras}"


def cases(dtypes: tuple[str, ...] = ("float32",)) -> Iterator[Case]:
    """Lengths with 9-LST's window, a smaller window, padding, and dropout where it works: in training."""
    for dtype in dtypes:
        for model, width in WIDTHS.items():
            for tokens, window, padded, dropout in (
                *((64, 9, False, 0.0), (128, 9, False, 0.0), (512, 9, False, 0.0), (128, 3, False, 0.0)),
                *((128, 9, True, 0.0), (128, 9, False, 0.1)),
            ):
                for work in ("forward", "training") if dropout == 0 else ("training",):
                    yield Case(model, width, BATCH, tokens, window, dtype, work, padded, dropout)


def composed(q: Tensor, c: Tensor, p: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """The window in memory, `(B, 1, k T, D)`, as keys and as values."""
    slots = [F.dropout(feature, dropout) + position for feature, position in zip(c.unbind(1), p.unbind(0))]
    window = torch.cat(slots, dim=1)[:, None]
    visible = None if mask is None else mask.repeat(1, len(slots))[:, None, None]  # (B, 1, 1, k T)
    return F.scaled_dot_product_attention(q, window, window, attn_mask=visible, scale=1.0)


def candidates(case: Case, device: torch.device) -> Candidates:
    """Each form of the same attention on the same tensors, ready to run; training gives dq, dc and dp."""
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

    def ready(form: Callable[[], Tensor]) -> Callable[[], object]:
        return (lambda: torch.autograd.grad(form(), (q, c, p), dout)) if case.work == "training" else form

    op = ready(lambda: window_attention(q, c, p, mask, dropout=case.dropout, seed=SEED, block=BLOCK))
    return dict(zip(NAMES, (op, plain, ready(lambda: composed(q, c, p, mask, case.dropout)))))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", cases(), ids=str)
def test_window_attention(benchmark: Any, case: Case, name: str) -> None:
    benchmark.group = str(case)
    benchmark(candidates(case, torch.device("cpu"))[name])


if __name__ == "__main__":
    time_operation(__doc__, FILE, cases, candidates)
