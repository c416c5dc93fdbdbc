"""Memory that a further SiVA run takes of a server: `python -m bench.serve_memory MODEL`.

It writes `bench/data/serve_memory.csv`. Runs of one step are loaded one after the other, as `fastpeft serve` loads
them, and each answers a text, so that its packs are made. Counted is the memory of the process without the pages of
files (Linux's RssAnon): those of the model's file are there once for all runs, and the system may drop them. On a GPU a
model that shares nothing would take all its weights once more. "alone" is a server whose models share nothing.

Predicted for MPNet-base by autocast in bfloat16, adapters on query and key: alone 227 MB, the packs of 85 million
weights in bfloat16 and the 57 MB that W_r takes; shared 85, W_r and its packs, and where the pretrained weights stay
(`residual="implicit"`) 6, the factors and the head. Found: alone 253 and 221, shared 50 for both. W_r is equal too in
runs that adapt the same layers at one rank, and of the 50 MB 10 are the tokenizer.
"""

from __future__ import annotations

import gc
import multiprocessing
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch

from bench.harness import DATA, Row, machine, option_parser, put_row, resident
from fastpeft import TrainConfig, train
from fastpeft.data.examples import load_data
from fastpeft.serving.tasks import Tasks
from fastpeft.support.files import write_csv
from fastpeft.training.memory import MEBIBYTE

FILE = DATA / "serve_memory.csv"
RUNS = 4  # of each kind; the first loads what all need
ROWS = 40


def made_runs(model: str, residual: str, folder: Path) -> list[str]:
    """Runs of one step, each from another seed."""
    data, some = folder / "rows.csv", load_data("demo").train.take(range(ROWS))
    rows = [{"text": text, "label": label} for text, label in zip(some.texts, some.labels)]
    write_csv(data, rows, ("text", "label"))
    runs = [str(folder / str(seed)) for seed in range(RUNS)]
    for seed, run in enumerate(runs):
        given = {"model": model, "data": str(data), "output": run, "settings": {"residual": residual}}
        train(TrainConfig(**given, method="siva", targets="query,key", max_steps=1, seed=seed))
    return runs


def memory_after_each(runs: list[str], shares: bool) -> list[tuple[float, float]]:
    """What this process takes after it has loaded each run, in MB, and how many MB of the run others hold too."""
    found = []
    with ExitStack() as stack:
        if not shares:
            stack.enter_context(patch("fastpeft.serving.tasks.share_weights", return_value=0))
        tasks = Tasks({})
        for number, run in enumerate(runs):
            task = tasks.add(str(number), run)
            gc.collect()
            found.append((resident("RssAnon") / MEBIBYTE, task.held / MEBIBYTE))
    return found


def record(file: Path, model: str, residuals: Sequence[str] = ("frozen", "implicit")) -> list[Row]:
    """Measure each kind of run, in a process of its own for each way to serve it."""
    rows = []
    for residual in residuals:
        with tempfile.TemporaryDirectory() as folder:
            runs = made_runs(model, residual, Path(folder))
            for shares in (True, False):
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                    (first, _), *others = process.submit(memory_after_each, runs, shares).result()
                case = {"model": Path(model).name, "residual": residual, "weights": "shared" if shares else "alone"}
                last, held = others[-1]
                further = (last - first) / len(others)
                figures = {"first_mb": f"{first:.0f}", "further_mb": f"{further:.0f}", "held_mb": f"{held:.0f}"}
                rows.append({**case, **figures, **machine(torch.device("cpu"))})
                put_row(file, rows[-1], (*case, "card"))
    return rows


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("model", help="as for fastpeft train --model")
    for row in record(FILE, parser.parse_args().model):
        print(", ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
