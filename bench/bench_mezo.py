"""A whole MeZO step of the bundled model, prompted, against the bare forward passes in it.

`python -m bench.bench_mezo` writes `bench/data/mezo_step.csv`. Text is random: only the shape of the batch matters. The
first candidate is the forwards alone, so a ratio is what a step costs over them: at best 1. Before this library's
engine there was the reference's loop, which draws each noise four times, into tensors of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.harness import DATA, Candidates, columns_of, measure, timing_parser
from fastpeft import Exact, InPlace, MeZO, Prompt
from fastpeft.mezo.estimator import estimator_of
from fastpeft.mezo.in_place import Rule
from fastpeft.prompts.model import load_prompted

FILE = DATA / "mezo_step.csv"
LR, EPS = 1e-6, 1e-3
ROUNDS = 11


@dataclass(frozen=True)
class Case:
    """How a step estimates, how many forward passes that takes, and on what batch."""

    estimator: str
    num_estimates: int
    noise: str
    forwards: int
    batch: int = 16
    tokens: int = 32  # what the demo data has on average
    model: str = "demo"
    dtype: str = "float32"
    work: str = "one step"

    def __str__(self) -> str:
        return f"{self.estimator}-{self.num_estimates}-{self.noise}"


CASES = [
    Case("spsa", 1, "gaussian", 2),
    Case("spsa", 1, "rademacher", 2),
    Case("fzoo", 8, "rademacher", 9),
]


def prompted(device: torch.device) -> Any:
    """The bundled model with a prompt, a copy of its own for each candidate, whose weights move."""
    prompt = Prompt("{text} It was <mask>.", ["terrible", "great"])
    return load_prompted("demo", prompt).model.to(device).eval()


def batch_of(case: Case, device: torch.device) -> dict[str, Tensor]:
    """Random ids, a mask at the end of each row, and classes."""
    ids = torch.randint(5, 8_000, (case.batch, case.tokens), generator=torch.Generator().manual_seed(0))
    masks = torch.full((case.batch,), case.tokens - 2)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mask_positions": masks, "labels": ids[:, 0] % 2}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def candidates(case: Case, device: torch.device) -> Candidates:
    """The forwards of a step, and steps with them, ready to run."""
    batch = batch_of(case, device)

    def loss_of(model: nn.Module) -> Callable[[], float]:
        return lambda: float(model(**batch).loss)

    bare = loss_of(prompted(device))

    @torch.no_grad()
    def forwards() -> None:
        for _ in range(case.forwards):
            bare()

    def step(rule: Rule) -> Callable[[], object]:
        model = prompted(device)
        optimizer = MeZO(model, LR, EPS, estimator=estimator_of(vars(case)), rule=rule)
        closure = loss_of(model)
        optimizer.step(closure)  # the first looks twice
        return lambda: optimizer.step(closure)

    made = {
        "forwards": forwards,
        "step": step(InPlace()),
        "step, deferred": step(InPlace(defer=True)),
        "step, exact": step(Exact()),
    }
    if (case.estimator, case.noise) == ("spsa", "gaussian"):
        model = prompted(device)
        made["reference's loop"] = reference_step(model, loss_of(model))
    return made


def reference_step(model: nn.Module, closure: Callable[[], float]) -> Callable[[], object]:
    """A step as the reference makes it: the same noise drawn anew for each of four passes over every tensor."""
    params = [p for p in model.parameters() if p.requires_grad]

    def add(seed: int, scale: float) -> None:
        torch.manual_seed(seed)
        for param in params:
            param.data = param.data + scale * torch.normal(0, 1, size=param.shape, device=param.device)

    @torch.no_grad()
    def step() -> None:
        add(1, EPS)
        above = closure()
        add(1, -2 * EPS)
        below = closure()
        add(1, EPS)
        add(1, -LR * (above - below) / (2 * EPS))

    return step


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", ["forwards", "step, deferred"])
def test_mezo_step(benchmark: Any, case: Case, name: str) -> None:
    benchmark.group = str(case)
    benchmark(candidates(case, torch.device("cpu"))[name])


def main() -> None:
    given = timing_parser(__doc__, ROUNDS).parse_args()
    for case in CASES:
        measure(FILE, columns_of(case), candidates(case, given.device), given.device, given.rounds)


if __name__ == "__main__":
    main()
