"""A training step of SiVA against other adapters of the same layers, and against the limit of them all.

The limit is the same layers frozen but passing gradients. SiVA and the limit pack these layers, PEFT's adapters do not;
where a candidate is called packed, all frozen layers are. `python -m bench.bench_adapters` writes
`bench/data/siva_training.csv`. `--dtype bfloat16` casts the base before adapters are made of it, which keep the dtype
that their library gives them, and `--dtype autocast` keeps float32 weights, computing in bfloat16.

Predicted for SiVA before measuring, for blocks of width d = 384 and M = 512 rows: query and key need 6 products of M, d
and 8 more (p, h, dp, dx, dU, dV), 19 million operations beside the 604 million of their 4 products with W, 3 % of these
and 0.5 % of the step; 16 kB of p are stored a block, and one addition of two dx (2.4 MB moved) is saved. All linears: 2
to 3 % of products.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch

from bench.bench_training import LIMIT, Cell, Step, training_step
from bench.harness import Bench, Candidates

CELLS = (
    Cell("siva"),
    Cell(LIMIT),
    Cell("lora"),
    Cell("siva", variant="packed"),
    Cell("lora", variant="packed"),
    Cell("lora", variant="compiled"),
    Cell("pissa"),
    Cell("lora", variant="dora"),
)


@dataclass(frozen=True)
class Case(Step):
    """A step, and the layers that are adapted."""

    targets: str = "query, key"


def candidates(case: Case, device: torch.device) -> Candidates:
    """SiVA, the limit and other adapters on the same layers."""
    return {
        cell.name: partial(
            training_step, replace(cell, targets=case.targets), device, case.model, case.tokens, case.dtype
        )
        for cell in CELLS
    }


BENCH = Bench(
    __doc__, "siva_training.csv", lambda _: [Case(targets=each) for each in ("query, key", "all linear")], candidates
)

if __name__ == "__main__":
    BENCH.main()
