"""Accuracy and memory of each method on the bundled model and the demo data, for the README's table.

Every cell is tried with two learning rates on a slice of the training data (2,000 rows to learn from, 1,000 others to
choose by), then trained for one epoch on all of it with the better one; the dev rows are seen once, at the end. Each
run is a process of its own. Runs that are finished are not repeated, so an interrupted table continues where it was.
Speeds are measured side by side, by `bench.bench_training`.

    python -m bench.accuracy            # about half an hour on two cores; writes bench/data/accuracy.csv
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastpeft.data import Examples, load_data

TABLE = Path(__file__).parent / "data" / "accuracy.csv"
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
    if not (RUNS / "slice" / "dev.csv").exists():
        write_slice(RUNS / "slice")
    rows = []
    for cell in CELLS:
        rows.append(measure(cell))
        print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
        with TABLE.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
