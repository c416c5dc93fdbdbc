"""Accuracy and memory of each method on the bundled model and the demo data, for the README's table.

Every cell is tried with two learning rates on a slice of the training data (2,000 rows to learn from, 1,000 others to
choose by), then trained for one epoch on all of it with the better one; nothing is chosen by the dev rows. Each
run is a process of its own. Runs that are finished are not repeated, so an interrupted table continues where it was.
Speeds are measured side by side, by `bench.bench_training`.

    python -m bench.accuracy            # about half an hour on two cores; writes bench/data/accuracy.csv
    python -m bench.accuracy k-lst lst  # some rows only
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harness import DATA, put_row
from fastpeft.data import Examples, load_data

TABLE = DATA / "accuracy.csv"
RUNS = Path("runs/accuracy")
SLICE_ROWS, SLICE_DEV_ROWS = 2_000, 1_000
RANK = 4

TARGETS = {"query, key": "query,key", "key, value": "key,value", "all linear": "all-linear"}


@dataclass(frozen=True)
class Cell:
    """One row of the table."""

    method: str
    learning_rates: tuple[float, float]
    targets: str = ""

    @property
    def options(self) -> list[str]:
        options = ["--method", self.method]
        return [*options, "--targets", TARGETS[self.targets], "--rank", str(RANK)] if self.targets else options

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.method, self.targets.replace(", ", "-").replace(" ", "-"))))


CELLS = [
    Cell("full", (5e-5, 1e-4)),
    *(Cell("lora", (1e-3, 3e-3), targets) for targets in TARGETS),
    *(Cell("siva", (5e-4, 1e-3), targets) for targets in TARGETS),
    Cell("pissa", (5e-4, 1e-3), "query, key"),
    Cell("k-lst", (1e-3, 3e-3)),
    Cell("lst", (1e-3, 3e-3)),
    Cell("last-n", (1e-4, 3e-4)),
    Cell("bitfit", (1e-3, 3e-3)),
    Cell("head", (1e-3, 3e-3)),
]


def run(output: Path, *options: str) -> dict[str, Any]:
    """Metrics of one run, made now unless it is finished."""
    command = [sys.executable, "-m", "fastpeft", "train", *options, "--output", str(output), "--resume", "--quiet"]
    subprocess.run(command, check=True)
    metrics: dict[str, Any] = json.loads((output / "metrics.json").read_text())
    return metrics


def write_slice(folder: Path) -> None:
    """The slice of the training rows by which learning rates are chosen."""
    data = load_data("demo")
    parts = {
        "train": Examples(data.train.texts[:SLICE_ROWS], data.train.labels[:SLICE_ROWS]),
        "dev": Examples(data.train.texts[-SLICE_DEV_ROWS:], data.train.labels[-SLICE_DEV_ROWS:]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        with (folder / f"{name}.csv").open("w", newline="") as file:
            rows = ((text, data.labels[label]) for text, label in zip(part.texts, part.labels))
            csv.writer(file).writerows([("text", "label"), *rows])


def measure(cell: Cell) -> dict[str, Any]:
    """The row of a cell."""
    tried = {
        rate: run(
            RUNS / f"{cell.name}-{rate:g}-slice",
            *cell.options,
            "--learning-rate",
            str(rate),
            "--data",
            str(RUNS / "slice"),
        )
        for rate in cell.learning_rates
    }
    best = max(tried, key=lambda rate: (tried[rate]["accuracy"], -rate))
    metrics = run(RUNS / cell.name, *cell.options, "--learning-rate", str(best))
    return {
        "method": cell.method,
        "targets": cell.targets,
        "rank": RANK if cell.targets else "",
        "slice_accuracy": " ".join(f"{rate:g}:{tried[rate]['accuracy']:.4f}" for rate in tried),
        "learning_rate": f"{best:g}",
        **{name: metrics[name] for name in ("accuracy", "f1", "peak_memory_mb")},
        "trainable_parameters": metrics["trainable_parameters"],
        "seed": metrics["seed"],
        "device": metrics["device"],
        "torch": metrics["versions"]["torch"],
    }


def main() -> None:
    wanted = sys.argv[1:] or [cell.name for cell in CELLS]
    if not (RUNS / "slice" / "dev.csv").exists():
        write_slice(RUNS / "slice")
    for cell in CELLS:
        if cell.name in wanted:
            row = {name: str(value) for name, value in measure(cell).items()}
            put_row(TABLE, row, key=("method", "targets"))
            print(row, flush=True)


if __name__ == "__main__":
    main()
