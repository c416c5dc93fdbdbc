"""Products with a frozen weight, packed once or in int8, against PyTorch's, which know nothing of it.

`python -m bench.bench_frozen_linear` times one product, on a CPU alone, into `bench/data/frozen_linear.csv`. `F.linear`
in float32 comes first: a ratio below 1 is faster than that.

Predicted for one product of 1,024 rows before measuring, on a CPU whose vectors of 64 bytes multiply 1, 2 or 4 numbers
per 4 bytes in float32, bfloat16 and int8: packed in float32 1.1 to 1.2 times as fast, in bfloat16 twice that, and in
int8 3.3 times at 768 x 768, where it also reads x twice and writes h.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.harness import Bench, Candidates, Run
from fastpeft.functional import int8_linear
from fastpeft.ops.frozen_weight import Dense
from fastpeft.ops.packing import Packs, quantise_rows

SHAPES = [(384, 384), (768, 768), (768, 3072), (3072, 768), (1024, 4096)]  # K, N
FLOAT, HALF = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One layer and a batch of rows."""

    rows: int
    in_features: int
    out_features: int
    work: str  # "forward" as in inference, or "dx": forward and the gradient of x


def cases(_device: torch.device) -> Iterator[Case]:
    for (k, n), rows, work in itertools.product(SHAPES, (8, 64, 1024), ("forward", "dx")):
        yield Case(rows, k, n, work)


def candidates(case: Case, _device: torch.device) -> Candidates:
    """Each form of the product."""
    torch.manual_seed(0)
    x = torch.randn(case.rows, case.in_features)
    dh = torch.randn(case.rows, case.out_features)
    weight, bias = torch.randn(case.out_features, case.in_features), torch.randn(case.out_features)
    codes, packs = quantise_rows(weight), Packs()

    def ready(form: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Run:
        rows, gradient = x.to(dtype), dh.to(dtype)
        if case.work == "forward":
            return lambda: form(rows)
        rows.requires_grad_()
        return lambda: torch.autograd.grad(form(rows), rows, gradient)

    half, half_bias = weight.to(HALF), bias.to(HALF)
    half_packs = Packs()
    found = {
        "F.linear float32": partial(ready, lambda rows: F.linear(rows, weight, bias), FLOAT),
        "packed float32": partial(ready, lambda rows: Dense(weight, packs).product(rows, bias), FLOAT),
        "F.linear bfloat16": partial(ready, lambda rows: F.linear(rows, half, half_bias), HALF),
        "packed bfloat16": partial(ready, lambda rows: Dense(half, half_packs).product(rows, half_bias), HALF),
    }
    if case.work == "forward":
        layer = nn.Linear(case.in_features, case.out_features)
        dynamic = torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear}, torch.qint8)
        found["dynamic int8 of PyTorch"] = partial(ready, torch.no_grad()(dynamic), FLOAT)
        for name, dtype in (("int8, float32", FLOAT), ("int8, bfloat16", HALF)):
            found[name] = partial(ready, lambda rows: int8_linear(rows, *codes, bias), dtype)
    return found


BENCH = Bench(__doc__, "frozen_linear.csv", cases, candidates)

if __name__ == "__main__":
    BENCH.main()
