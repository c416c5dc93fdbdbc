"""A smaller data set out of another: some of its training rows, and its dev rows or other training rows to measure on.

Learning rates are chosen on a slice whose dev part is of training rows too, so that nothing is chosen by the dev rows:

    python -m bench.slices demo runs/slice --rows 2000 --dev-rows 1000  # to learn from, and others to choose by
    python -m bench.slices path/to/sst2 runs/sst2 --rows 10000  # to learn from, and SST-2's own dev rows
"""

from __future__ import annotations

import argparse
import csv
import random
from pathlib import Path

from fastpeft.data import Examples, load_data


def write_slice(data: str, folder: Path, rows: int, dev_rows: int | None = None, seed: int = 0) -> None:
    """Write `train.csv` and `dev.csv` into `folder`.

    Args:
        data: as `fastpeft.data.load_data` takes it, one text a row.
        folder: where to.
        rows: training rows to take, in an order that `seed` decides.
        dev_rows: other training rows to measure on. None: the dev rows of `data`.
    """
    whole = load_data(data)
    order = list(range(len(whole.train)))
    random.Random(seed).shuffle(order)
    train = _rows(whole.train, order[:rows])
    dev = _rows(whole.train, order[rows : rows + dev_rows]) if dev_rows else _rows(whole.dev, range(len(whole.dev)))
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("dev", dev)):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            lines = ((text, whole.labels[label]) for text, label in part)
            csv.writer(file).writerows([("text", "label"), *lines])


def _rows(examples: Examples, chosen: list[int] | range) -> list[tuple[str, int]]:
    return [(examples.texts[index], examples.labels[index]) for index in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="as for fastpeft train --data")
    parser.add_argument("folder", type=Path, help="where to write train.csv and dev.csv")
    parser.add_argument("--rows", type=int, required=True, help="training rows to take")
    parser.add_argument("--dev-rows", type=int, help="other training rows to measure on (default: the dev rows)")
    arguments = parser.parse_args()
    write_slice(arguments.data, arguments.folder, arguments.rows, arguments.dev_rows)


if __name__ == "__main__":
    main()
