"""What stands in for the cells of a comparison, and what it leaves."""

from __future__ import annotations

import csv
from pathlib import Path

from fastpeft import CompareConfig

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
