"""What stands in for the cells of a comparison, and what it leaves."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastpeft import CompareConfig
from fastpeft.comparison.cells import Cell

ROWS = 200

# In the place of a training process: what it leaves depends on its learning rate and its seed.
STAND_IN = """
import json, os, pathlib, sys, time
values = json.loads(pathlib.Path(sys.argv[1]).read_text())
folder = pathlib.Path(values["output"])
with (folder.parent / "started").open("a") as file:
    file.write(folder.name + "\\n")
if values["learning_rate"] == 0.5:
    sys.exit("Traceback ...\\nZeroDivisionError: division by zero")
if values["learning_rate"] == 0.25:
    sys.exit("a warning\\nError: the rate is not to its taste.")
if values["learning_rate"] == 0.125:
    (folder.parent / "pid").write_text(str(os.getpid()))
    time.sleep(60)
folder.mkdir()
(folder / "run.json").write_text(json.dumps({"fastpeft_version": "0", **values}))
(folder / "written").write_text(json.dumps({
    "method": values["method"], "model": values["model"], "data": values["data"], "labels": ["a", "b"],
    "problem_type": "single_label_classification",
    "accuracy": 0.5 + values["seed"] / 10, "f1": 0.25, "samples_per_second": 8.0, "peak_memory_mb": 1234.5,
    "train_rows": 5000, "dev_rows": 50, "trainable_parameters": 1234, "learning_rate": 1e-5, "seed": values["seed"],
    "device": "a chip", "versions": {"python": "3.11", "torch": "2.10"}, "command": "fastpeft train",
}))
(folder / "written").replace(folder / "metrics.json")
"""


def started() -> list[str]:
    """The cells whose process was started, in order."""
    return Path("out/cells/started").read_text().splitlines()


def results(folder: Path = Path("out")) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def config(*methods: str, **changes: int) -> CompareConfig:
    return CompareConfig(output="out", methods=methods, **changes)  # type: ignore[arg-type]


def finish(cell: Cell, right: int | Sequence[int], memory: float, speed: float, **changes: Any) -> None:
    """Let a cell's folder hold a finished run, which answers the first `right` of `ROWS` rows, or those, rightly."""
    answers = [int(row < right) for row in range(ROWS)] if isinstance(right, int) else list(right)
    share = sum(answers) / len(answers)
    cell.folder.path.mkdir(parents=True)
    metrics = {
        "model": "demo",
        "data": "reviews.csv",
        "problem_type": "single_label_classification",
        "accuracy": share,
        "f1": 0.5,
        "samples_per_second": speed,
        "peak_memory_mb": memory,
        "estimated_memory_mb": memory * 1.1,
        "peak_memory_source": "CUDA allocator",
        "train_rows": 1000,
        "dev_rows": len(answers),
        "trainable_parameters": 12,
        "learning_rate": 1e-3,
        "device": "a chip",
        "versions": {"python": "3.11"},
        **changes,
    }
    reached = 80 if "lora" in cell.method else 40  # the step at which it has come to its end
    curve = [(step, 0.5 + (share - 0.5) * min(1.0, step / reached)) for step in (0, 40, 80)]
    curves = {"training loss": [(step, 1 / step) for step in range(1, 81)], "dev accuracy": curve}
    labels = [row % 2 for row in range(len(answers))]
    told = [label if right else 1 - label for label, right in zip(labels, answers)]
    predictions = {"labels": labels, "predictions": told}
    written = {"run": {"fastpeft_version": "0", **cell.values}, "curves": curves, "predictions": predictions}
    for name, values in {**written, "metrics": metrics}.items():
        (cell.folder.path / f"{name}.json").write_text(json.dumps(values))
