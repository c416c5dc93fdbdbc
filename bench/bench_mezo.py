"""A whole MeZO step of the bundled model, prompted, against the bare forward passes in it, and the reference's loop.

`python -m bench.bench_mezo` writes `bench/data/mezo_step.csv`. Text is random: only the shape of the batch matters. A
ratio is what a step costs over its forwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness import Bench, Candidates, Run
from fastpeft import Exact, InPlace, MeZO, Prompt
from fastpeft.mezo.estimator import estimator_of
from fastpeft.mezo.in_place import Rule
from fastpeft.prompts.model import load_prompted

LR, EPS = 1e-6, 1e-3


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
    """The forwards of a step, and steps with them."""
    batch = batch_of(case, device)

    def loss_of(model: nn.Module) -> Callable[[], float]:
        return lambda: float(model(**batch).loss)

    def forwards() -> Run:
        bare = loss_of(prompted(device))

        @torch.no_grad()
        def run() -> None:
            for _ in range(case.forwards):
                bare()

        return run

    def step(rule: Rule) -> Run:
        model = prompted(device)
        optimizer = MeZO(model, LR, EPS, estimator=estimator_of(vars(case)), rule=rule)
        closure = loss_of(model)
        optimizer.step(closure)  # the first looks twice
        return lambda: optimizer.step(closure)

    def loop() -> Run:
        model = prompted(device)
        return reference_step(model, loss_of(model))

    made: dict[str, Callable[[], Run]] = {
        "forwards": forwards,
        "step": lambda: step(InPlace()),
        "step, deferred": lambda: step(InPlace(defer=True)),
        "step, exact": lambda: step(Exact()),
    }
    if (case.estimator, case.noise) == ("spsa", "gaussian"):
        made["reference's loop"] = loop
    return made


def reference_step(model: nn.Module, closure: Callable[[], float]) -> Run:
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


BENCH = Bench(__doc__, "mezo_step.csv", lambda _: CASES, candidates, rounds=11)

if __name__ == "__main__":
    BENCH.main()
