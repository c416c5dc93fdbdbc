"""A pool of side networks at RoBERTa-base's shapes: 64 rows of one task or of 16, and training one member or 8 at once.

`python -m bench.bench_pool` writes `bench/data/pool.csv`. Weights and text are random: only shapes matter.

Predicted before measuring, with a block for each layer: rows of 16 tasks take 1.02 times as long as rows of one, and a
training step of eight members 3.1 times as long as of one. With cached features what the backbone takes goes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.backbones import MODELS
from bench.harness import Bench, Candidates, Run, ready_made
from fastpeft import LadderConfig, LadderPool

TASKS, MEMBERS = 16, 8  # that answer, and that train


@dataclass(frozen=True)
class Case:
    """What a pool does, "answer" or "train", the window of its side networks and the batch."""

    model: str
    work: str
    window: int
    rows: int
    tokens: int = 32
    dtype: str = "float32"


CASES = Case("base", "answer", 9, 64), Case("base", "train", 9, 16)


def candidates(case: Case, device: torch.device) -> Candidates:
    """Of a pool that all of them share."""
    members = TASKS if case.work == "answer" else MEMBERS
    pool = LadderPool(MODELS[case.model]().to(device))
    for number in range(members):
        pool.add(str(number), LadderConfig(window_size=case.window))
    ids = torch.randint(5, 1_000, (case.rows, case.tokens), device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    @torch.no_grad()
    def forward() -> None:
        pool.backbone.body(**batch)

    runs = (answers if case.work == "answer" else training)(pool, batch)
    return ready_made({**runs, "backbone forward": forward})


def answers(pool: LadderPool, batch: dict[str, Tensor]) -> dict[str, Run]:
    """Rows of one task, and rows of all tasks in turn."""
    rows = len(batch["input_ids"])
    spread = [pool.tasks[row % len(pool.tasks)] for row in range(rows)]
    return {
        "one task": lambda: pool(batch, [pool.tasks[0]] * rows),
        f"{len(pool.tasks)} tasks": lambda: pool(batch, spread),
    }


def training(pool: LadderPool, batch: dict[str, Tensor]) -> dict[str, Run]:
    """A step of one member, of all from one pass and from cached features, and of one alone."""
    given = {**batch, "labels": torch.arange(len(batch["input_ids"]), device=batch["input_ids"].device) % 2}
    optimizers = {name: adamw(pool[name]) for name in pool.tasks}
    first = pool.tasks[0]
    folder = tempfile.TemporaryDirectory()
    cache = pool.cache_features(folder.name)
    pool.feature_cache = None

    def train(tasks: Sequence[str]) -> None:
        for name, output in pool.outputs(given, tasks):
            output.loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()

    def from_cache() -> None:
        pool.feature_cache = cache
        train(pool.tasks)
        pool.feature_cache = None
        _ = folder  # which is there as long as this function is

    def alone() -> None:
        model = pool[first].train()
        model(**given).loss.backward()
        optimizers[first].step()
        optimizers[first].zero_grad()

    return {
        "one member": lambda: train([first]),
        f"{len(pool.tasks)} members": lambda: train(pool.tasks),
        f"{len(pool.tasks)} members, features cached": from_cache,
        "LadderModel alone": alone,
    }


def adamw(model: nn.Module) -> Any:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)


BENCH = Bench(__doc__, "pool.csv", lambda _: CASES, candidates, rounds=5)

if __name__ == "__main__":
    BENCH.main()
