"""The forward pass of a whole encoder, as in inference, whose frozen weights are packed, in bfloat16 or in int8.

`python -m bench.bench_frozen_encoder` writes `bench/data/frozen_encoder.csv`, on a CPU alone. Text is random.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from bench.backbones import MODELS
from bench.harness import Bench, Candidates, Run
from fastpeft import pack_frozen

FLOAT, HALF = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Case:
    """An encoder and a batch of texts of one length."""

    model: str
    batch: int = 16
    tokens: int = 64
    work: str = "inference"


def candidates(case: Case, _device: torch.device) -> Candidates:
    """The model with each kind of linear layer, on the same text."""
    ids = torch.randint(5, 8_000, (case.batch, case.tokens), generator=torch.Generator().manual_seed(0))

    def ready(dtype: torch.dtype, change: Callable[[nn.Module], nn.Module]) -> Run:
        torch.manual_seed(0)
        base = change(MODELS[case.model]().to(dtype).eval().requires_grad_(False))
        return torch.no_grad()(lambda: base(input_ids=ids, attention_mask=torch.ones_like(ids)))

    def in_int8(base: nn.Module) -> nn.Module:
        return pack_frozen(base, "int8")

    return {
        "float32": partial(ready, FLOAT, lambda base: base),
        "frozen float32": partial(ready, FLOAT, pack_frozen),
        "bfloat16": partial(ready, HALF, lambda base: base),
        "frozen bfloat16": partial(ready, HALF, pack_frozen),
        "int8, float32": partial(ready, FLOAT, in_int8),
        "int8, bfloat16": partial(ready, HALF, in_int8),
    }


BENCH = Bench(__doc__, "frozen_encoder.csv", lambda _: map(Case, ("demo", "base")), candidates)

if __name__ == "__main__":
    BENCH.main()
