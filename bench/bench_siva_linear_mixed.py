"""SiVA's linear layer over rows of different adapters, against its plain formula, gathered factors and PEFT's LoRA.

`python -m bench.bench_siva_linear_mixed` times them side by side into `bench/data/siva_linear_mixed.csv`; `pytest
bench --benchmark-enable --benchmark-only` shows each through pytest-benchmark. Both run what `candidates` returns.
PEFT's is its own layer with `adapter_names`, which for each adapter indexes x, and adds to the output by index; its
factors are V and U diag(s), so that all compute the same. PEFT's model refuses `adapter_names` in training; its
layer, timed here, does not. One adapter for all rows is the bound.

Predicted before measuring, of the CPU in float32 with one thread, which does about 60 GFLOPS in matrix products and
moves about 10 GB a second beyond its caches, for 64 rows of 32 tokens (M = 2048, K = N = 768, rank 4, 8 adapters).
The large product is 1.2 billion multiply-adds, 40 ms, and again for dx; those of rank 4 are 1 % of it. A pass over a
tensor of the size of x or h moves 6.3 MB, 0.6 ms. Passes beside the large product's:

    forward      the op 3 (x for p; h, read and written, for p U^T), and 4 where rows are to be sorted
                 gathered factors 5 (x; the small product written; three to add it)
                 reference 11, PEFT 13 (x gathered 3; small product 1, scaled 2; h gathered 2, added 3, put back 2)
    backward     the op 5, and 6 to sort
                 PEFT, for each adapter, since autograd makes a tensor of all rows of what one index reads: 10

So to the op's 42 ms with sorted rows PEFT's should be 48, 1.15 times as long, and 1.08 with rows in disorder; the
reference 1.1, gathered factors 1.05 (more, if a batched product of rank 4 is slow), one adapter 0.99. With backward
PEFT's 80 passes should make it 1.6 times as long. In a batch of 16 rows a tensor of 1.6 MB stays in cache, and PEFT
takes 1.05 and 1.3 times as long. With one token a row, 64 in all, weights are read once, 1.3 ms, and calls decide:
the op's are 3 an adapter, PEFT's about 12 and two lists of rows to search, 1.3 times as long.

On a card the op is one launch over all rows for each direction, here 4 and 3 a step in all, where PEFT launches
about ten an adapter and copies each index from the host: for 16 rows it should take 5 times as long.

Measured of ATen's calls on the CPU, 64 rows of 32 tokens: PEFT's 1.06 sorted and 0.80 in disorder, with backward 1.5
and 1.4. What seems wrong is that every pass goes to memory: an adapter's rows are 0.8 MB, which stay in cache from one
pass to the next, and the op's sorted copy of all rows does not.

Predicted of C++, which sorts and copies nothing: 3 passes forward and 5 with backward in any order, so in disorder the
ratios of sorted rows: the reference 1.1, gathered factors 1.05 or more, PEFT 1.15, with backward 1.6, and one adapter
1.00. With one token a row it makes few calls: the reference 1.1, gathered 1.03, PEFT 1.3, one adapter 0.95.

Measured with AVX2, beside other work, medians of 31 rounds, sorted and in disorder; with 16 rows first, then with 64:

                     forward                   with backward             one token
    reference        1.25 1.16   1.14 1.08     1.25 1.32   1.17 1.21     1.41 1.34
    gathered         1.03 1.01   1.46 1.46     1.13 1.14   1.22 1.28     1.19 1.14
    PEFT             1.38 1.26   1.26 1.10     1.59 1.96   1.84 2.04     1.83 1.62
    one adapter      0.99 1.00   1.01 0.96     1.05 0.96   0.97 1.02     0.88 0.79

Order no longer matters. Too low was PEFT with backward. Of one token a row, 0.1 ms is Python's checks and the lists of
factors, which one adapter has not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from bench.bench_siva_linear import RANK, Layers
from bench.harness import DATA, Candidates, time_operation
from fastpeft.functional import siva_linear, siva_linear_mixed
from fastpeft.ops import reference

FILE = DATA / "siva_linear_mixed.csv"
FEATURES = {"base": 768}
ADAPTERS = 8
SHAPES = ((16, 32), (64, 32), (64, 1))  # rows and their tokens: a training batch, many requests, their next token
NAMES = ("op", "reference", "gathered", "peft lora", "one adapter")


@dataclass(frozen=True)
class Case:
    """A square layer of a model, and a batch whose rows are divided evenly among adapters."""

    model: str
    features: int
    rows: int
    tokens: int
    adapters: int
    order: str  # of the rows: "sorted" by adapter, or "mixed"
    dtype: str
    work: str  # "forward" as in inference, or "training": forward and all gradients, that of x included

    def __str__(self) -> str:
        return f"{self.model}-{self.rows}x{self.tokens}-{self.order}-{self.dtype}-{self.work}"


def cases(dtypes: tuple[str, ...] = ("float32",)) -> Iterator[Case]:
    for dtype in dtypes:
        for model, features in FEATURES.items():
            for (rows, tokens), order in itertools.product(SHAPES, ("sorted", "mixed")):
                for work in ("forward", "training") if tokens > 1 else ("forward",):
                    yield Case(model, features, rows, tokens, ADAPTERS, order, dtype, work)


def lora(linear: nn.Linear, us: list[Tensor], ss: list[Tensor], vs: list[Tensor]) -> nn.Module:
    """PEFT's layer with an adapter for each of the factors, named by its number; all of them train."""
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["query"])
    model = peft.get_peft_model(Layers({"query": linear}), config, adapter_name="0")
    for number in range(1, len(us)):
        model.add_adapter(str(number), config)
    layer: nn.Module = model.get_base_model().query
    with torch.no_grad():
        for number, (u, s, v) in enumerate(zip(us, ss, vs)):
            layer.lora_A[str(number)].weight.copy_(v)
            layer.lora_B[str(number)].weight.copy_(u * s)
    for factors in (layer.lora_A, layer.lora_B):
        factors.requires_grad_(True)  # PEFT lets one adapter train
    return layer.to(us[0].device, us[0].dtype)


def candidates(case: Case, device: torch.device) -> Candidates:
    """Each form of the same layer on the same input, ready to run.

    Training gives dx, each dV and each dU, of LoRA those of its B = U diag(s).
    """
    torch.manual_seed(0)
    dtype, number, features = getattr(torch, case.dtype), case.adapters, case.features

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, device=device)).to(dtype)

    linear = nn.Linear(features, features).to(device, dtype).requires_grad_(False)
    weight, bias = linear.weight.detach(), linear.bias.detach()
    x, dh = (draw(case.rows, case.tokens, features) for _ in range(2))
    us = [draw(features, RANK, scale=features**-0.5) for _ in range(number)]
    ss = [draw(RANK).abs() + 0.5 for _ in range(number)]
    vs = [draw(RANK, features, scale=features**-0.5) for _ in range(number)]
    peer = lora(linear, us, ss, vs).requires_grad_(case.work == "training")
    peer.base_layer.requires_grad_(False)
    for tensor in (x, *us, *vs):
        tensor.requires_grad_(case.work == "training")

    adapter = torch.arange(case.rows) * number // case.rows  # of each row
    if case.order == "mixed":
        adapter = adapter[torch.randperm(case.rows)]
    sizes = adapter.bincount(minlength=number).tolist()
    order = None if case.order == "sorted" else adapter.argsort(stable=True).to(device)
    places, names = adapter.to(device), [str(i) for i in adapter.tolist()]
    operands = (x, weight, us, ss, vs)

    def gathered() -> Tensor:
        u, s, v = (torch.stack(each)[places] for each in (us, ss, vs))  # (B, N, R), (B, R), (B, R, K)
        p = x @ v.mT
        return nn.functional.linear(x, weight, bias) + (p * s[:, None]) @ u.mT

    @torch.no_grad()
    def plain() -> Any:
        layer = x, [weight], [None], us, ss, vs
        (h,), p = reference.siva_linear(*layer, [bias], sizes, order)
        if case.work == "forward":
            return h
        needs = True, [True] * number, True, [False]
        dx, dus, dv, _ = reference.siva_linear_backward([dh], *layer, p, *needs, sizes, order)
        return dx, *dv.split(RANK), *dus

    def ready(form: Callable[[], Tensor], inputs: tuple[Tensor, ...] = (x, *vs, *us)) -> Callable[[], object]:
        return (lambda: torch.autograd.grad(form(), inputs, dh)) if case.work == "training" else form

    of_peer = [factors[str(i)].weight for factors in (peer.lora_A, peer.lora_B) for i in range(number)]
    forms = (
        ready(lambda: siva_linear_mixed(*operands, sizes, order, bias)),
        plain,
        ready(gathered),
        ready(lambda: peer(x, adapter_names=names), (x, *of_peer)),
        ready(lambda: siva_linear(x, weight, us[0], ss[0], vs[0], bias), (x, vs[0], us[0])),
    )
    return dict(zip(NAMES, forms))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", cases(), ids=str)
def test_siva_linear_mixed(benchmark: Any, case: Case, name: str) -> None:
    benchmark.group = str(case)
    benchmark(candidates(case, torch.device("cpu"))[name])


if __name__ == "__main__":
    time_operation(__doc__, FILE, cases, candidates)
