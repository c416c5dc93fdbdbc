"""SiVA's linear layer against the frozen layer alone, its plain PyTorch form, and LoRA and PiSSA through PEFT.

`python -m bench.bench_siva_linear` writes `bench/data/siva_linear.csv`. A case of several layers is one of layers that
read the same x, which SiVA runs as one group. No weight is packed, of SiVA's neither: what packs gain is in
`bench.bench_frozen_linear`.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import peft
import torch
from torch import Tensor, nn

import fastpeft
from bench.harness import Bench, Candidates, Run
from fastpeft.ops import reference
from fastpeft.siva import grouping

RANK = 4
QUERY, ATTENTION = "query", "query, key, value"


@dataclass(frozen=True)
class Case:
    """A square layer of a model, or several that read the same x, and the rows of a batch."""

    model: str
    rows: int
    dtype: str
    work: str  # "forward" as in inference, or "training": forward and all gradients, that of x included
    layers: str = QUERY


FEATURES = {"demo": 384, "base": 768, "large": 1024, "llama-8b": 4096}


def cases(device: torch.device) -> Iterator[Case]:
    """Batches of 16 short and 16 long texts; on a card in three dtypes and of a width that is too large for a CPU."""
    is_cpu = device.type == "cpu"
    dtypes = ("float32",) if is_cpu else ("float32", "bfloat16", "float16")
    models = [model for model in FEATURES if not is_cpu or model != "llama-8b"]
    fields = models, (16 * 32, 16 * 128), dtypes, ("forward", "training"), (QUERY, ATTENTION)
    return itertools.starmap(Case, itertools.product(*fields))


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


def candidates(case: Case, device: torch.device) -> Candidates:
    """Each form of the same layers on the same input; layer by layer is one of several layers."""
    torch.manual_seed(0)
    dtype, features = getattr(torch, case.dtype), FEATURES[case.model]
    x = torch.randn(case.rows, features, device=device, dtype=dtype, requires_grad=case.work == "training")
    linears = Layers({name: nn.Linear(features, features) for name in case.layers.split(", ")})
    dhs = [torch.randn(case.rows, features, device=device, dtype=dtype) for _ in linears.children()]

    def ready(make: Callable[[Layers], nn.Module]) -> Run:
        layers = make(copy.deepcopy(linears)).to(device, dtype)
        if case.work == "training":
            inputs = [x, *(parameter for parameter in layers.parameters() if parameter.requires_grad)]
            return lambda: torch.autograd.grad(layers(x), inputs, dhs)
        return torch.no_grad()(lambda: layers(x))

    made = {name: make for name, make in LAYERS.items() if case.layers != QUERY or make is not _siva_alone}
    return {name: partial(ready, make) for name, make in made.items()}


BENCH = Bench(__doc__, "siva_linear.csv", cases, candidates)

if __name__ == "__main__":
    BENCH.main()
