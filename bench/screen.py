"""Variants tried once each on a slice of rows, as one comparison; `bench/data` gets the table of it:

    python -m bench.slices demo runs/slice --rows 2000 --dev-rows 1000
    python -m bench.screen ladder_options runs/slice runs/ladder_options
    python -m bench.slices path/to/sst2 runs/sst2 --rows 4000
    python -m bench.screen siva_rates runs/sst2 runs/rates --name MPNet-base --set model=models/mpnet
    python -m bench.slices path/to/e2e runs/e2e --rows 640 --dev-rows 160 --e2e
    python -m bench.screen words_rates runs/e2e runs/words_rates --set model=models/smollm2

`ladder_options` is each option of a side network against the default. On a pretrained model of base size cached
features make each variant after the first three times as fast:

    python -m bench.slices path/to/sst2 runs/slice --rows 4000 --dev-rows 2000
    python -m bench.screen ladder_options runs/slice runs/options --name "SST-2, MPNet-base" \\
        --variants k-lst k-lst:layer_drop=0.1 --set model=models/mpnet epochs=1 cache_features=runs/features

`siva_rates` is whether one learning rate of SiVA serves several models and sets of layers, for each form of its step,
in 250 batches of 16. `words_rates` is the rates and widths of side networks on a decoder's next words, on rows of other
meanings.

What has finished in the folder is not run again. Of 1,000 rows, an accuracy of 0.7 has a standard error of 0.0145, and
the difference of two models that err independently one of 0.02: a screening finds what is far ahead and nothing else.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from bench.harness import DATA, Row, option_parser, put_row, read_rows
from fastpeft import CompareConfig, compare
from fastpeft.training.config import parse_value


@dataclass(frozen=True)
class Screen:
    """One table: what is tried, and what is kept of it.

    Attributes:
        variants: as `fastpeft compare --methods` takes them.
        key: the columns that tell a row from all others. `data` and `model` are the name that the command is given, an
            option of the variant is as written there.
        figures: columns of the comparison's `results.csv`, and the standard error of the accuracy. With `error` among
            them, a cell that failed has a row too.
        common: options of all cells. All compute in float32, so that rows of several machines compare.
    """

    variants: tuple[str, ...]
    key: tuple[str, ...]
    figures: tuple[str, ...]
    common: dict[str, Any] = field(default_factory=dict)


_OPTIONS = (
    "residual=true",
    "prompt=sst2",
    "layer_drop=0.1",
    "share_projections=true",
    "output_mix=add",
)
_SIVA = product(("1e-3", "5e-4", "2e-3"), ("spectral", "plain"), ("query+key", "all-linear"))
SCREENS = {
    "ladder_options": Screen(
        ("k-lst", *(f"k-lst:window={size}" for size in (1, 3, 5)), "lst", *(f"k-lst:{option}" for option in _OPTIONS)),
        ("data", "variant", "seed"),
        (
            *("accuracy", "entity_f1", "loss", "steps", "train_rows", "dev_rows", "trainable_parameters"),
            *("learning_rate", "versions", "standard_error"),
        ),
    ),
    "siva_rates": Screen(
        tuple(f"siva:rank=4:targets={layers}:scaling={form}:learning_rate={rate}" for rate, form, layers in _SIVA),
        ("model", "targets", "scaling", "learning_rate"),
        ("accuracy", "loss", "dev_rows", "steps", "versions"),
        {"max_steps": 250},
    ),
    "words_rates": Screen(
        (
            *(f"lst:layers_per_block=1:learning_rate={rate}" for rate in ("0.001", "0.003", "0.01")),
            *(f"k-lst:window=9:layers_per_block=1:learning_rate={rate}" for rate in ("0.001", "0.003")),
            *("lst", "lst:normalise_features=false", "k-lst:window=9", "k-lst:window=9:residual=state"),
            *("lst:reduction=4:learning_rate=0.002", "lst:reduction=2:learning_rate=0.001"),
            *(f"lst:siva_layers={layers}:rank=4:targets=q_proj+k_proj" for layers in (4, 15)),
            "siva:rank=8:targets=all-linear",
            f"siva:rank=4:targets=q_proj+k_proj:layers_to_transform={[*range(14, 30)]}".replace(" ", ""),
        ),
        ("variant", "seed", "train_rows"),
        (
            *("learning_rate", "steps", "dev_rows", "next_accuracy_before", "next_accuracy", "loss"),
            *("compute_dtype", "peak_memory_mb", "error", "versions"),
        ),
        {"objective": "causal", "epochs": 1},
    ),
}


def row(screen: Screen, name: str, found: Row) -> Row:
    """The row of a table, given one of `results.csv`."""
    written = dict(part.partition("=")[::2] for part in found["variant"].split(":")[1:])
    told = {**found, "data": name, "model": name, **written}
    figures = {column: found.get(column, "") for column in screen.figures}
    if "standard_error" in figures:
        accuracy, dev_rows = float(found["accuracy"]), int(found["dev_rows"])
        figures["standard_error"] = f"{math.sqrt(accuracy * (1 - accuracy) / dev_rows):.4f}"
    return {**{column: told.get(column, "") for column in screen.key}, **figures}


def main(arguments: list[str]) -> int:
    parser = option_parser(__doc__)
    parser.add_argument("table", choices=SCREENS)
    parser.add_argument("data", help="folder that bench.slices wrote; else as for fastpeft train --data")
    parser.add_argument("folder", help="of the comparison")
    parser.add_argument("--name", default="demo", help="what a table of several data or models calls this (demo)")
    parser.add_argument("--variants", nargs="+", help="these alone (default: all of the table)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each, with the seeds 0, 1, ...")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="options of all cells")
    given = parser.parse_args(arguments)
    screen = SCREENS[given.table]
    own = {name: parse_value(value) for name, _, value in (item.partition("=") for item in given.set)}
    common = {"bf16": False, **screen.common, "data": given.data, **own}
    methods = given.variants or screen.variants
    for variant, name in product(methods, screen.key):
        if name not in ("data", "model", "seed", "variant", "train_rows") and f":{name}=" not in variant:
            parser.error(f"the table {given.table} tells its rows apart by {name}: write it in {variant!r}")
    result = compare(CompareConfig(output=given.folder, methods=methods, seeds=given.seeds, common=common))
    for found in read_rows(result.folder / "results.csv"):
        if found["state"] == "finished" or (found["state"] == "failed" and "error" in screen.figures):
            put_row(DATA / f"{given.table}.csv", row(screen, given.name, found), screen.key)
    for name, error in result.failed.items():
        print(f"{name} failed: {error}", file=sys.stderr)
    return 1 if result.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
