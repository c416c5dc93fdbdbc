"""A smaller data set out of another: some of its training rows, and its dev rows or other training rows to measure on.

Learning rates are chosen on a slice whose dev part is of training rows too, so that nothing is chosen by the dev rows:

    python -m bench.slices demo runs/slice --rows 2000 --dev-rows 1000  # to learn from, and others to choose by
    python -m bench.slices path/to/sst2 runs/sst2 --rows 10000  # to learn from, and SST-2's own dev rows
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fastpeft.comparison.learning_rates import take_slice, write_rows
from fastpeft.data.examples import load_data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="as for fastpeft train --data")
    parser.add_argument("folder", type=Path, help="where to write train.jsonl and dev.jsonl")
    parser.add_argument("--rows", type=int, required=True, help="training rows to take")
    parser.add_argument("--dev-rows", type=int, help="other training rows to measure on (default: the dev rows)")
    arguments = parser.parse_args()
    write_rows(take_slice(load_data(arguments.data), arguments.rows, arguments.dev_rows), arguments.folder)


if __name__ == "__main__":
    main()
