"""SiVA's linear layer against the frozen layer alone, its plain PyTorch form, and LoRA and PiSSA through PEFT.

`python -m bench.bench_siva_linear` times them side by side into `bench/data/siva_linear.csv`; `pytest bench
--benchmark-enable --benchmark-only` shows each through pytest-benchmark. Both run what `candidates` returns.
A case of several layers is one of layers that read the same x, which SiVA runs as one group. No weight is packed, of
SiVA's neither: what packs gain is in `bench.bench_frozen_linear`.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import fastpeft
from bench.harness import DATA, Candidates, columns_of, is_on_card, measure, timing_parser
from fastpeft.ops import reference
from fastpeft.siva import grouping

FILE = DATA / "siva_linear.csv"
RANK = 4
QUERY, ATTENTION = "query", "query, key, value"


@dataclass(frozen=True)
class Case:
    """A square layer of a model, or several that read the same x, and the rows of a batch."""

    model: str
    features: int
    rows: int
    dtype: str
    work: str  # "forward" as in inference, or "training": forward and all gradients, that of x included
    layers: str = QUERY

    def __str__(self) -> str:
        return f"{self.model}-{self.rows}-{self.dtype}-{self.work}-{self.layers}"


ROBERTA = {"demo": 384, "base": 768, "large": 1024}
LLAMA = {"llama-8b": 4096}  # too wide for a CPU


def cases(models: dict[str, int] = ROBERTA, dtypes: tuple[str, ...] = ("float32",)) -> Iterator[Case]:
    """Batches of 16 short and 16 long texts."""
    for dtype in dtypes:
        for model, features in models.items():
            for rows in (16 * 32, 16 * 128):
                for work, layers in itertools.product(("forward", "training"), (QUERY, ATTENTION)):
                    yield Case(model, features, rows, dtype, work, layers)


class Layers(nn.Module):
    """Layers that read the same x, by name; what PEFT needs around them."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.children())


class _Plain(nn.Module):
    """SiVA by the reference formula, differentiated by PyTorch."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        u, s, v = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
        u, s, v = u[:, :RANK], s[:RANK], v[:RANK]
        self.register_buffer("weight", linear.weight.detach() - (u * s) @ v)
        self.register_buffer("s", s)
        self.register_buffer("bias", linear.bias.detach())
        self.u, self.v = nn.Parameter(u.contiguous()), nn.Parameter(v.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        (h,), _ = reference.siva_linear(x, [self.weight], [None], [self.u], [self.s], [self.v], [self.bias])
        return h


def _through_peft(make: Callable[..., Any], **settings: Any) -> Callable[[Layers], nn.Module]:
    def adapt(layers: Layers) -> nn.Module:
        targets = [name for name, _ in layers.named_children()]
        return peft.get_peft_model(layers, make(r=RANK, target_modules=targets, **settings)).get_base_model()

    return adapt


def _siva(**settings: Any) -> Callable[[Layers], nn.Module]:
    return _through_peft(fastpeft.SivaConfig, pack_weights=False, **settings)


def _siva_alone(layers: Layers) -> nn.Module:
    model = _siva()(layers)
    grouping.part(model)
    return model


LAYERS: dict[str, Callable[[Layers], nn.Module]] = {
    "siva": _siva(),
    "siva implicit": _siva(residual="implicit"),
    "siva layer by layer": _siva_alone,
    "plain siva": lambda layers: Layers({name: _Plain(layer) for name, layer in layers.named_children()}),
    "frozen linear": lambda layers: layers.requires_grad_(False),
    "lora": _through_peft(peft.LoraConfig, lora_alpha=RANK),
    "pissa": _through_peft(peft.LoraConfig, lora_alpha=RANK, init_lora_weights="pissa"),
    "dora": _through_peft(peft.LoraConfig, lora_alpha=RANK, use_dora=True),
}


def forms(case: Case) -> dict[str, Callable[[Layers], nn.Module]]:
    """Those of a case: layer by layer is one of several layers."""
    return {name: make for name, make in LAYERS.items() if case.layers != QUERY or make is not _siva_alone}


def candidates(case: Case, device: torch.device) -> Candidates:
    """Each form of the same layers on the same input, ready to run."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    x = torch.randn(case.rows, case.features, device=device, dtype=dtype, requires_grad=case.work == "training")
    linears = Layers({name: nn.Linear(case.features, case.features) for name in case.layers.split(", ")})
    dhs = [torch.randn(case.rows, case.features, device=device, dtype=dtype) for _ in linears.children()]

    def ready(make: Callable[[Layers], nn.Module]) -> Callable[[], object]:
        layers = make(copy.deepcopy(linears)).to(device, dtype)
        if case.work == "training":
            inputs = [x, *(parameter for parameter in layers.parameters() if parameter.requires_grad)]
            return lambda: torch.autograd.grad(layers(x), inputs, dhs)
        return torch.no_grad()(lambda: layers(x))

    return {name: ready(make) for name, make in forms(case).items()}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("case", cases(), ids=str)
def test_siva_linear(benchmark: Any, case: Case, name: str) -> None:
    benchmark.group = str(case)
    benchmark(candidates(case, torch.device("cpu"))[name])


def main() -> None:
    parser = timing_parser(__doc__)
    parser.add_argument("--models", help="some of the models only, as demo,base")
    given = parser.parse_args()
    device = given.device
    models, dtypes = (
        (ROBERTA, ("float32",)) if device.type == "cpu" else (ROBERTA | LLAMA, ("float32", "bfloat16", "float16"))
    )
    wanted = given.models.split(",") if given.models else list(models)
    for case in cases({model: models[model] for model in wanted}, dtypes):
        if device.type == "cuda" and is_on_card(FILE, columns_of(case), forms(case), device):
            continue  # to make them takes longer than to time them
        measure(FILE, columns_of(case), candidates(case, device), device, given.rounds)


if __name__ == "__main__":
    main()
