"""Making a run's weights again from its journal, against making its steps.

`python -m bench.mezo_replay` writes `bench/data/mezo_replay.csv` for the bundled model with a prompt, on batches of the
demo data's size. A replay computes no loss, and a block of the weights takes all steps while it is in cache; a step
has two forward passes. The check that the base model is the run's, made once whatever the steps, is not in it.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch

from bench.bench_mezo import EPS, LR, Case, batch_of, prompted
from bench.harness import DATA, Candidates, measure, timing_parser
from fastpeft import MeZO
from fastpeft.mezo import InPlace, Journal
from fastpeft.mezo.estimator import estimator_of
from fastpeft.mezo.journal import FILE_NAME

FILE = DATA / "mezo_replay.csv"
STEPS, ROUNDS = 20, 5


def candidates(case: Case, device: torch.device, folder: Path, steps: int = STEPS) -> Candidates:
    """Steps with a journal in `folder`, and the replay of as many, ready to run again and again."""
    batch = batch_of(case, device)
    trained, again = prompted(device), prompted(device)
    optimizer = MeZO(trained, LR, EPS, estimator=estimator_of(vars(case)), rule=InPlace(defer=True))
    optimizer.record(folder / FILE_NAME)

    def train() -> None:
        for _ in range(steps):
            optimizer.step(lambda: float(trained(**batch).loss))
        optimizer.settle()

    train()
    journal = Journal.open(Path(shutil.copyfile(folder / FILE_NAME, folder / "first steps")))
    journal.replay(again)
    return {"training": train, "replay": lambda: journal.replay(again, start=0)}


def main() -> None:
    given = timing_parser(__doc__, ROUNDS).parse_args()
    case = Case("spsa", 1, "gaussian", 2)
    columns = {
        "model": case.model,
        "work": f"{STEPS} steps",
        "batch": str(case.batch),
        "tokens": str(case.tokens),
        "dtype": case.dtype,
    }
    with tempfile.TemporaryDirectory() as folder:
        measure(FILE, columns, candidates(case, given.device, Path(folder)), given.device, given.rounds)


if __name__ == "__main__":
    main()
