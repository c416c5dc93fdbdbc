"""Each option of a side network once against the default, on 2,000 training rows and 1,000 others to choose by:

    python -m bench.slices demo runs/slice --rows 2000 --dev-rows 1000
    python -m bench.ladder_options demo runs/slice runs/ladder_options

On a pretrained model of base size, where cached features make each variant after the first three times as fast; what
this command does not know goes to `fastpeft compare`:

    python -m bench.slices path/to/sst2 runs/slice --rows 4000 --dev-rows 2000
    python -m bench.ladder_options "SST-2, MPNet-base" runs/slice runs/options --variants k-lst k-lst:num_heads=4 \\
        --model models/mpnet --no-bf16 --protocol quick --cache-features runs/features

`bench/data/ladder_options.csv` gets a row for each variant; those that are finished in the folder are not run again.
The F1 of entities is there for tags alone.
Of 1,000 rows, an accuracy of 0.7 has a standard error of 0.0145, and the difference of two models that err
independently one of 0.02: a screening finds what is far ahead and nothing else.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.harness import DATA, put_row, read_rows

FILE = DATA / "ladder_options.csv"
DEFAULT = "k-lst"
VARIANTS = (
    DEFAULT,
    *(f"{DEFAULT}:window={window}" for window in (1, 3, 5)),
    "lst",
    *(
        f"{DEFAULT}:{option}"
        for option in (
            "residual=true",
            "num_heads=4",
            "prompt=sst2",
            "init=pruned",
            "init=pruned:residual=true",
            "layer_drop=0.1",
            "share_projections=true",
            "output_mix=true",
        )
    ),
)
COLUMNS = ("accuracy", "entity_f1", "loss", "steps", "train_rows", "dev_rows", "trainable_parameters", "learning_rate")
COLUMNS += ("versions",)


def screen(variant: str, source: str, data: Path, folder: Path, seeds: int = 1, options: Sequence[str] = ()) -> None:
    """Train `variant` in the comparison in `folder`, if it is not there yet, and put a row a seed into the table."""
    given = ["--methods", variant, "--data", data, "--output", folder, "--seeds", seeds, "--quiet", *options]
    command = ["compare", *given]
    subprocess.run([sys.executable, "-m", "fastpeft", *map(str, command)], check=True)
    for row in read_rows(folder / "results.csv"):
        if row["variant"] == variant:
            accuracy, dev_rows = float(row["accuracy"]), int(row["dev_rows"])
            found = {
                "data": source,
                "variant": variant,
                "seed": row["seed"],
                **{name: row.get(name, "") for name in COLUMNS},
            }
            found["standard_error"] = f"{math.sqrt(accuracy * (1 - accuracy) / dev_rows):.4f}"
            put_row(FILE, found, key=("data", "variant", "seed"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="what the slice is of, for the table")
    parser.add_argument("data", type=Path, help="folder that bench.slices wrote")
    parser.add_argument("folder", type=Path, help="of the comparison")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, help="these alone (default: all)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each, with the seeds 0, 1, ...")
    given, options = parser.parse_known_args()
    for variant in given.variants:
        screen(variant, given.source, given.data, given.folder, given.seeds, options)


if __name__ == "__main__":
    main()
