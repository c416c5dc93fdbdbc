"""Products with a frozen weight, packed once or in int8, against PyTorch's, which know nothing of it.

`python -m bench.bench_frozen_linear` times one product into `bench/data/frozen_linear.csv`; `--encoder base` the
forward pass of a whole encoder, as in inference, into `bench/data/frozen_encoder.csv`. `pytest bench
--benchmark-enable --benchmark-only` shows each through pytest-benchmark. `F.linear` in float32 comes first: a ratio
below 1 is faster than that.

Predicted for one product of 1,024 rows before measuring, on a CPU whose vectors of 64 bytes multiply 1, 2 or 4 numbers
per 4 bytes in float32, bfloat16 and int8: `F.linear` in float32 at 0.85 to 0.95 of the processor's rate, packed at 1,
which is 1.1 to 1.2 times as fast; bfloat16 twice that. In int8 the product alone is four times as fast, and beside it
each element of x is read twice and each of h written: at 768 x 768 a fifth of the product's time, so 3.3 in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.backbones import MODELS
from bench.harness import DATA, ROUNDS, Candidates, columns_of, measure, option_parser
from fastpeft import pack_frozen
from fastpeft.functional import int8_linear
from fastpeft.ops.frozen_weight import Dense
from fastpeft.ops.packing import Packs, quantise_rows

FILE, ENCODER_FILE = DATA / "frozen_linear.csv", DATA / "frozen_encoder.csv"
SHAPES = [(384, 384), (768, 768), (768, 3072), (3072, 768), (1024, 4096)]  # K, N
FLOAT, HALF = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One layer and a batch of rows."""

    rows: int
    in_features: int
    out_features: int
    work: str  # "forward" as in inference, or "dx": forward and the gradient of x

    def __str__(self) -> str:
        return f"{self.rows}x{self.in_features}x{self.out_features}-{self.work}"


def cases() -> Iterator[Case]:
    for k, n in SHAPES:
        for rows in (8, 64, 1024):
            for work in ("forward", "dx"):
                yield Case(rows, k, n, work)


def candidates(case: Case) -> Candidates:
    """Each form of the product, ready to run."""
    torch.manual_seed(0)
    x = torch.randn(case.rows, case.in_features)
    dh = torch.randn(case.rows, case.out_features)
    weight, bias = torch.randn(case.out_features, case.in_features), torch.randn(case.out_features)
    codes, packs = quantise_rows(weight), Packs()

    def ready(form: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Callable[[], object]:
        rows, gradient = x.to(dtype), dh.to(dtype)
        if case.work == "forward":
            return lambda: form(rows)
        rows.requires_grad_()
        return lambda: torch.autograd.grad(form(rows), rows, gradient)

    half, half_bias = weight.to(HALF), bias.to(HALF)
    half_packs = Packs()
    found = {
        "F.linear float32": ready(lambda rows: F.linear(rows, weight, bias), FLOAT),
        "packed float32": ready(lambda rows: Dense(weight, packs).product(rows, bias), FLOAT),
        "F.linear bfloat16": ready(lambda rows: F.linear(rows, half, half_bias), HALF),
        "packed bfloat16": ready(lambda rows: Dense(half, half_packs).product(rows, half_bias), HALF),
    }
    if case.work == "forward":
        layer = nn.Linear(case.in_features, case.out_features)
        dynamic = torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear}, torch.qint8)
        found["dynamic int8 of PyTorch"] = ready(torch.no_grad()(dynamic), FLOAT)
        for name, dtype in (("int8, float32", FLOAT), ("int8, bfloat16", HALF)):
            found[name] = ready(lambda rows: int8_linear(rows, *codes, bias), dtype)
    return found


def encoders(model: str, tokens: int, batch: int) -> Candidates:
    """The forward pass of a model with each kind of linear layer, the same random text."""
    ids = torch.randint(5, 8_000, (batch, tokens), generator=torch.Generator().manual_seed(0))

    def ready(dtype: torch.dtype, change: Callable[[nn.Module], nn.Module]) -> Callable[[], object]:
        torch.manual_seed(0)
        base = change(MODELS[model]().to(dtype).eval().requires_grad_(False))
        return torch.no_grad()(lambda: base(input_ids=ids, attention_mask=torch.ones_like(ids)))

    return {
        "float32": ready(FLOAT, lambda base: base),
        "frozen float32": ready(FLOAT, pack_frozen),
        "bfloat16": ready(HALF, lambda base: base),
        "frozen bfloat16": ready(HALF, pack_frozen),
        "int8, float32": ready(FLOAT, lambda base: pack_frozen(base, "int8")),
        "int8, bfloat16": ready(HALF, lambda base: pack_frozen(base, "int8")),
    }


@pytest.mark.parametrize("name", candidates(Case(8, 384, 384, "forward")))
@pytest.mark.parametrize("case", [case for case in cases() if case.work == "forward"], ids=str)
def test_frozen_linear(benchmark: Any, case: Case, name: str) -> None:
    benchmark.group = str(case)
    benchmark(candidates(case)[name])


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("--encoder", choices=MODELS, help="a whole encoder of these shapes instead")
    parser.add_argument("--tokens", type=int, default=64, help="of the encoder, default 64")
    parser.add_argument("--batch", type=int, default=16, help="of the encoder, default 16")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default {ROUNDS}")
    given = parser.parse_args()
    device = torch.device("cpu")
    if given.encoder:
        case = {"model": given.encoder, "batch": str(given.batch), "tokens": str(given.tokens), "work": "inference"}
        measure(ENCODER_FILE, case, encoders(given.encoder, given.tokens, given.batch), device, given.rounds)
        return
    for each in cases():
        measure(FILE, columns_of(each), candidates(each), device, given.rounds)


if __name__ == "__main__":
    main()
