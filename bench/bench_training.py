"""A whole training step of the bundled model by each method of the README's table, side by side.

`python -m bench.bench_training` writes `bench/data/training.csv`; `pytest bench --benchmark-enable --benchmark-only`
shows each step through pytest-benchmark. Text is random: only the shape of the batch matters.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from bench.harness import DATA, Candidates, measure
from fastpeft.methods import Preparation, get_method, parse_targets
from fastpeft.models import load_classifier
from fastpeft.problems import CLASSIFICATION

FILE = DATA / "training.csv"
BATCH_SIZE, TOKENS = 16, 32  # what the demo data has on average
CASE = {"model": "demo", "work": "training step", "batch": str(BATCH_SIZE), "tokens": str(TOKENS), "dtype": "float32"}
RANK = 4
TARGETS = {"query, key": "query,key", "key, value": "key,value", "all linear": "all-linear"}


@dataclass(frozen=True)
class Cell:
    """One row of the table: a method, with the layers it adapts."""

    method: str
    targets: str = ""

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.method, self.targets.replace(", ", "-").replace(" ", "-"))))


CELLS = [
    Cell("full"),
    *(Cell("lora", targets) for targets in TARGETS),
    *(Cell("siva", targets) for targets in TARGETS),
    Cell("pissa", "query, key"),
    *(Cell(method) for method in ("k-lst", "lst", "last-n", "bitfit", "head")),
]


def training_step(cell: Cell, device: torch.device) -> Callable[[], object]:
    """Forward, backward and AdamW of one batch, ready to run."""
    torch.manual_seed(0)
    classifier = load_classifier("demo", ["negative", "positive"], CLASSIFICATION)
    preparation = (
        Preparation(classifier.head, RANK, parse_targets(TARGETS[cell.targets]))
        if cell.targets
        else Preparation(classifier.head)
    )
    model = get_method(cell.method).prepare(classifier.model, preparation).to(device).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=1e-5, weight_decay=get_method(cell.method).recipe.weight_decay, fused=True
    )
    ids = torch.randint(5, 8_000, (BATCH_SIZE, TOKENS), device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}

    def step() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    return step


def candidates(device: torch.device) -> Candidates:
    """Every row of the table; SiVA on query and key, its default, first."""
    default_first = sorted(CELLS, key=lambda cell: (cell.method, cell.targets) != ("siva", "query, key"))
    return {cell.name: training_step(cell, device) for cell in default_first}


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_training_step(benchmark: Any, cell: Cell) -> None:
    benchmark(training_step(cell, torch.device("cpu")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    device = torch.device(parser.parse_args().device)
    measure(FILE, CASE, candidates(device), device)


if __name__ == "__main__":
    main()
