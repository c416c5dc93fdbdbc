"""SiVA's linear layer against the frozen layer alone, its plain PyTorch form, and LoRA and PiSSA through PEFT.

`python -m bench.bench_siva_linear` times them side by side into `bench/data/siva_linear.csv`; `pytest bench
--benchmark-enable --benchmark-only` shows each through pytest-benchmark. Both run what `candidates` returns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import fastpeft
from bench.harness import DATA, Candidates, measure
from fastpeft import reference

FILE = DATA / "siva_linear.csv"
RANK = 4


@dataclass(frozen=True)
class Case:
    """A square layer of a model, such as its query, and the rows of a batch."""

    model: str
    features: int
    rows: int
    dtype: str
    work: str  # "forward" as in inference, or "training": forward and all gradients, that of x included

    def __str__(self) -> str:
        return f"{self.model}-{self.rows}-{self.dtype}-{self.work}"


ROBERTA = {"demo": 384, "base": 768, "large": 1024}
LLAMA = {"llama-8b": 4096}  # too wide for a CPU


def cases(models: dict[str, int] = ROBERTA, dtypes: tuple[str, ...] = ("float32",)) -> Iterator[Case]:
    """Batches of 16 short and 16 long texts."""
    for dtype in dtypes:
        for model, features in models.items():
            for rows in (16 * 32, 16 * 128):
                for work in ("forward", "training"):
                    yield Case(model, features, rows, dtype, work)


class _Holder(nn.Module):
    """What PEFT needs around a layer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


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
        return reference.siva_linear(x, self.weight, self.u, self.s, self.v, self.bias)[0]


def _through_peft(config: Any) -> Callable[[nn.Linear], nn.Module]:
    return lambda linear: peft.get_peft_model(_Holder(linear), config).get_base_model().linear


LAYERS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "siva": _through_peft(fastpeft.SivaConfig(r=RANK, target_modules=["linear"])),
    "siva implicit": _through_peft(fastpeft.SivaConfig(r=RANK, target_modules=["linear"], residual="implicit")),
    "plain siva": _Plain,
    "frozen linear": lambda linear: linear.requires_grad_(False),
    "lora": _through_peft(peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["linear"])),
    "pissa": _through_peft(
        peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["linear"], init_lora_weights="pissa")
    ),
}


def candidates(case: Case, device: torch.device) -> Candidates:
    """Each layer on the same weight and input, ready to run."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    x = torch.randn(case.rows, case.features, device=device, dtype=dtype, requires_grad=case.work == "training")
    dh = torch.randn(case.rows, case.features, device=device, dtype=dtype)
    weights = nn.Linear(case.features, case.features).state_dict()

    def ready(make: Callable[[nn.Linear], nn.Module]) -> Callable[[], object]:
        linear = nn.Linear(case.features, case.features)
        linear.load_state_dict(weights)
        layer = make(linear).to(device, dtype)
        if case.work == "training":
            inputs = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
            return lambda: torch.autograd.grad(layer(x), inputs, dh)
        return lambda: _infer(layer, x)

    return {name: ready(make) for name, make in LAYERS.items()}


@torch.no_grad()
def _infer(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("case", cases(), ids=str)
def test_siva_linear(benchmark: Any, case: Case, name: str) -> None:
    benchmark.group = str(case)
    benchmark(candidates(case, torch.device("cpu"))[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    device = torch.device(parser.parse_args().device)
    on_card = ROBERTA | LLAMA, ("float32", "bfloat16", "float16")
    for case in cases() if device.type == "cpu" else cases(*on_card):
        measure(FILE, {key: str(value) for key, value in asdict(case).items()}, candidates(case, device), device)


if __name__ == "__main__":
    main()
