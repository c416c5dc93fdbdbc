"""What a side network gains by masked words learned first, alone or jointly with the backbone, and by SiVA beside it.

`python -m bench.ladder_pretraining runs/pretraining [CELL ...]` trains 9-LST on 2,000 training rows of the demo data,
measures it on 1,000 others (the slice that `bench.slices` makes, so nothing is chosen by the dev rows), each cell after
the one that it starts from, and fills `bench/data/ladder_pretraining.csv`. Masked words are learned on all the training
texts that are not in the slice. SiVA adapts query and key. Cut off, the same command goes on where it was.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch

from bench.harness import DATA, machine, option_parser, put_row
from fastpeft import TrainConfig, train
from fastpeft.comparison.learning_rates import take_slice, write_rows
from fastpeft.data.examples import load_data

FILE = DATA / "ladder_pretraining.csv"
ALL_LAYERS = 6
WORDS: dict[str, Any] = {"objective": "mlm"}


def _with_siva(layers: int) -> dict[str, Any]:
    """What lets SiVA train in so many of the last layers."""
    return {"targets": "query,key", "settings": {"siva_layers": layers}}


# each cell: what differs from 9-LST by the defaults, and the cell that it starts from
CELLS: dict[str, tuple[dict[str, Any], str | None]] = {
    "9-LST": ({}, None),
    "words": (WORDS, None),
    "words, then 9-LST": ({}, "words"),
    "words jointly with SiVA in all layers": ({**WORDS, **_with_siva(ALL_LAYERS)}, None),
    "words jointly, then 9-LST": ({}, "words jointly with SiVA in all layers"),
    "9-LST + SiVA in the last 2 layers": (_with_siva(2), None),
}
MEASURED = ("accuracy", "masked_accuracy", "perplexity", "loss", "learning_rate", "steps", "train_rows", "dev_rows")
COUNTED = ("trainable_parameters", "peak_memory_mb")


def write_texts(folder: Path) -> None:
    """Write the slice, and in `texts` all other training texts, with the slice's dev texts to measure on."""
    data = load_data("demo")
    part = take_slice(data, rows=2_000, dev_rows=1_000)
    write_rows(part, folder / "slice")
    used = {*part.train.texts, *part.dev.texts}
    others = [text for text in data.train.texts if text not in used]
    (folder / "texts").mkdir(exist_ok=True)
    for name, texts in (("train", others), ("dev", part.dev.texts)):
        with (folder / "texts" / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text",), *((text,) for text in texts)])


def run(folder: Path, cell: str, seed: int, epochs: float) -> None:
    """Train a cell, unless that was done, and write its row."""
    changes, start = CELLS[cell]
    place = folder / f"{epochs:g}-epochs-seed{seed}"
    config = TrainConfig(
        output=str(place / cell),
        init_from=None if start is None else str(place / start),
        data=str(folder / ("texts" if "objective" in changes else "slice")),
        **{"method": "k-lst", "epochs": epochs, "seed": seed, "save_steps": 25, **changes},
    )
    metrics = train(config, resume=True).metrics
    row = {"cell": cell, "seed": str(seed), "epochs": f"{config.epochs:g}", "after": start or ""}
    row |= {name: "" if (value := metrics.get(name)) is None else f"{value:.4g}" for name in MEASURED}
    row |= {name: str(metrics[name]) for name in COUNTED} | machine(torch.device("cpu"))
    put_row(FILE, row, key=("cell", "seed", "epochs"))


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("folder", type=Path, help="where to put the slice and the runs")
    parser.add_argument("cells", nargs="*", default=list(CELLS), metavar="CELL", help="in this order (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=float, default=1, help="of every cell")
    given = parser.parse_args()
    if not (given.folder / "texts" / "dev.csv").exists():
        write_texts(given.folder)
    for cell in given.cells:
        run(given.folder, cell, given.seed, given.epochs)


if __name__ == "__main__":
    main()
