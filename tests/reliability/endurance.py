"""Long runs of a tiny model, in which a growth of memory or of open files shows.

`make endurance-test` puts, of eleven moments of each run, the resident memory, the open files and the live tensors into
bench/data/endurance.csv.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from samples import reviews, save_tiny_model, write_csv
from transformers import TrainerCallback
from transformers.utils import logging

from bench.harness import DATA, put_row
from fastpeft import TrainConfig, train

FILE = DATA / "endurance.csv"


@dataclass(frozen=True)
class Sample:
    """What the process held after so many steps: `resident` in bytes, `handles` and `tensors` as numbers."""

    step: int
    resident: int
    handles: int
    tensors: int

    @classmethod
    def take(cls, step: int) -> Sample:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        tensors = sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
        return cls(step, pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd")), tensors)


class Sampling(TrainerCallback):
    """Takes a sample every so many steps."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.samples: list[Sample] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step and state.global_step % self.every == 0:
            self.samples.append(Sample.take(state.global_step))


def endure(folder: Path, method: str, steps: int, samples: int = 10) -> list[Sample]:
    """Train by `method` for so many steps, with a checkpoint now and then, and look at the process on the way."""
    model = save_tiny_model(folder / "model", hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    data = write_csv(folder / "reviews.csv", reviews(64))
    sampling = Sampling(max(1, steps // (samples + 1)))
    config = TrainConfig(
        output=str(folder / method),
        method=method,
        model=str(model),
        data=str(data),
        batch_size=1,
        learning_rate=1e-6,
        max_steps=steps,
        save_steps=max(1, steps // 20),
    )
    train(config, callbacks=[sampling])
    return sampling.samples


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method")
    parser.add_argument("steps", type=int)
    parser.add_argument("--file", type=Path, default=FILE, help="the table that the rows go to")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        for sample in endure(Path(folder), given.method, given.steps):
            numbers = {"open_files": sample.handles, "live_tensors": sample.tensors}
            row = {"method": given.method, "steps": str(given.steps), "step": str(sample.step)}
            row |= {"resident_mb": f"{sample.resident / 2**20:.1f}", **{name: str(n) for name, n in numbers.items()}}
            put_row(given.file, row, key=("method", "steps", "step"))
            print(", ".join(f"{column} {value}" for column, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
