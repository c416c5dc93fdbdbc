"""A pool of side networks at RoBERTa-base's shapes: 64 rows of one task or of 16, and training one member or 8 at once.

`python -m bench.bench_pool` writes `bench/data/pool.csv`; `pytest bench --benchmark-enable --benchmark-only` shows the
same through pytest-benchmark. Weights and text are random: only shapes matter.

Predicted before measuring, with a block for each layer, at the 105 GFLOPS that this CPU's matrix products reach.
Answers (64 rows of 32 tokens, 9-LST): 3.3 s for the backbone, 0.45 for a side network's products and 0.2 for its
attention; over 16 tasks products of 128 rows are as fast when stacked, and 16 heads in place of one cost 50 ms: 1.02
times as long, 1.1 with side networks one after another. A training step (16 rows): 0.83 s for the backbone, and for
each member 0.22 for products, 0.1 for attention and the small rest, 0.03 for AdamW: eight take 3.65 s and one 1.18, 3.1
times. With cached features what the backbone takes goes, and reading 10 MB of them comes in its place.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench.backbones import MODELS
from bench.harness import DATA, Candidates, measure, timing_parser
from fastpeft import LadderConfig, LadderPool

FILE = DATA / "pool.csv"
TOKENS, ANSWER_ROWS, TRAIN_ROWS = 32, 64, 16
ANSWER_TASKS, TRAIN_MEMBERS = 16, 8
ROUNDS = 5  # of seconds each
WORKS = ("answer", "train")


def pool_of(
    members: int, window: int, device: torch.device, make: Callable[[], nn.Module] = MODELS["base"]
) -> LadderPool:
    pool = LadderPool(make().to(device))
    for number in range(members):
        pool.add(str(number), LadderConfig(window_size=window))
    return pool


def batch(rows: int, device: torch.device) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 1_000, (rows, TOKENS), device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def answers(pool: LadderPool, device: torch.device) -> Candidates:
    """Rows of one task, rows of all tasks in turn, and the bound."""
    given = batch(ANSWER_ROWS, device)
    spread = [pool.tasks[row % len(pool.tasks)] for row in range(ANSWER_ROWS)]
    return {
        "one task": lambda: pool(given, [pool.tasks[0]] * ANSWER_ROWS),
        f"{len(pool.tasks)} tasks": lambda: pool(given, spread),
        "backbone forward": lambda: forward(pool, given),
    }


@torch.no_grad()
def forward(pool: LadderPool, given: dict[str, torch.Tensor]) -> None:
    pool.backbone.body(**given)


def training(pool: LadderPool, device: torch.device, folder: Path) -> Candidates:
    """A step of one member, of all from one pass and from features cached in `folder`, of one alone, and the bound."""
    given = {**batch(TRAIN_ROWS, device), "labels": torch.arange(TRAIN_ROWS, device=device) % 2}
    optimizers = {name: adamw(pool[name]) for name in pool.tasks}
    first = pool.tasks[0]
    cache = pool.cache_features(folder)
    pool.feature_cache = None

    def from_cache() -> None:
        pool.feature_cache = cache
        pool.fit([given], optimizers)
        pool.feature_cache = None

    def alone() -> None:
        model = pool[first].train()
        model(**given).loss.backward()
        optimizers[first].step()
        optimizers[first].zero_grad()

    return {
        "one member": lambda: pool.fit([given], {first: optimizers[first]}),
        f"{len(pool.tasks)} members": lambda: pool.fit([given], optimizers),
        f"{len(pool.tasks)} members, features cached": from_cache,
        "LadderModel alone": alone,
        "backbone forward": lambda: forward(pool, {name: given[name] for name in ("input_ids", "attention_mask")}),
    }


def adamw(model: nn.Module) -> Any:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)


@pytest.mark.parametrize("name", ["one task", f"{ANSWER_TASKS} tasks"])
def test_answer(benchmark: Any, name: str) -> None:
    device = torch.device("cpu")
    benchmark(answers(pool_of(ANSWER_TASKS, 9, device), device)[name])


@pytest.mark.parametrize(
    "name", ["one member", f"{TRAIN_MEMBERS} members", f"{TRAIN_MEMBERS} members, features cached"]
)
def test_training_step(benchmark: Any, tmp_path: Path, name: str) -> None:
    device = torch.device("cpu")
    benchmark(training(pool_of(TRAIN_MEMBERS, 9, device), device, tmp_path)[name])


def record(
    file: Path,
    work: str,
    window: int,
    device: torch.device,
    rounds: int = ROUNDS,
    make: Callable[[], nn.Module] = MODELS["base"],
) -> None:
    """Measure one kind of work and put it into `file`."""
    members, rows = (ANSWER_TASKS, ANSWER_ROWS) if work == "answer" else (TRAIN_MEMBERS, TRAIN_ROWS)
    pool = pool_of(members, window, device, make)
    case = {
        "model": "roberta-base",
        "work": work,
        "window": str(window),
        "rows": str(rows),
        "tokens": str(TOKENS),
        "dtype": "float32",
    }
    with tempfile.TemporaryDirectory() as folder:
        candidates = answers(pool, device) if work == "answer" else training(pool, device, Path(folder))
        measure(file, case, candidates, device, rounds)


def main() -> None:
    parser = timing_parser(__doc__, ROUNDS)
    parser.add_argument("--work", choices=WORKS, nargs="+", default=WORKS)
    parser.add_argument("--window", type=int, default=9)
    given = parser.parse_args()
    for work in given.work:
        record(FILE, work, given.window, given.device, given.rounds)


if __name__ == "__main__":
    main()
