"""Whether fewer bits cost accuracy: the same runs in float32, in bfloat16 and with an int8 backbone, paired by seed.

    python -m bench.pretrained mpnet models/mpnet
    python -m bench.slices path/to/sst2 runs/sst2 --rows 5000
    python -m bench.frozen_accuracy models/mpnet runs/sst2 runs/frozen

One epoch of 9-LST over each `backbone_dtype`, computed in float32 but for the backbone, and of SiVA on query and key in
float32 and in bfloat16; seeds 0 to 2. `bench/data/frozen_accuracy.csv` gets a row for each: dev accuracy, its
difference to the float32 run of the same method and seed, and seconds of training, in which other processes had a part.
Cut off, the same command goes on where it was.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from bench.harness import DATA, Row, machine, option_parser, put_row, read_rows
from fastpeft import TrainConfig, train
from fastpeft.support.environment import best_device

FILE = DATA / "frozen_accuracy.csv"
KEY = ("model", "method", "dtype", "seed")
SEEDS = 3
_QUERY_KEY = {"targets": "query,key"}
# what differs from the method's defaults in float32; the first of a method is what the others are paired with
CELLS: dict[str, dict[str, dict[str, Any]]] = {
    "k-lst": {
        "float32": {},
        "bfloat16": {"settings": {"backbone_dtype": "bfloat16"}},
        "int8": {"settings": {"backbone_dtype": "int8"}},
    },
    "siva": {"float32": _QUERY_KEY, "bfloat16": {**_QUERY_KEY, "bf16": True}},
}


def measure(file: Path, model: str, data: str, folder: Path, method: str, dtype: str, seed: int, **changes: Any) -> Row:
    """Train one cell, or go on with it, and put its row into the table, unless it is there.

    Args:
        file: the table, which has the float32 cell of the method and seed if `dtype` is another.
        model, data: as for fastpeft train.
        folder: of the runs.
        method, dtype: keys of `CELLS`.
        seed: of the run.
        changes: further fields of `TrainConfig`, for all cells.
    """
    key = {"model": Path(model).name, "method": method, "dtype": dtype, "seed": str(seed)}
    for row in read_rows(file):
        if key.items() <= row.items():
            return row
    output = folder / "-".join(key.values())
    values = {"output": str(output), "model": model, "data": data, "method": method, "seed": seed, "epochs": 1}
    config = TrainConfig(**{**values, "bf16": False, **changes, **CELLS[method][dtype]})
    metrics = train(config, resume=output.exists()).metrics
    paired = [row for row in read_rows(file) if {**key, "dtype": next(iter(CELLS[method]))}.items() <= row.items()]
    base = float(paired[0]["accuracy"]) if paired else metrics["accuracy"]
    figures = {
        "train_rows": str(metrics["train_rows"]),
        "dev_rows": str(metrics["dev_rows"]),
        "accuracy": f"{metrics['accuracy']:.4f}",
        "difference": f"{metrics['accuracy'] - base:+.4f}",
        "loss": f"{metrics['loss']:.4f}",
        "seconds": f"{metrics['train_seconds']:.1f}",
    }
    row = {**key, **figures, **machine(torch.device(best_device()))}
    put_row(file, row, KEY)
    shutil.rmtree(output)
    return row


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("model", help="as for fastpeft train --model")
    parser.add_argument("data", help="as for fastpeft train --data")
    parser.add_argument("folder", type=Path, help="of the runs, while they run")
    parser.add_argument("--file", type=Path, default=FILE, help=f"the table (default: bench/data/{FILE.name})")
    parser.add_argument("--methods", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    given = parser.parse_args()
    for seed in range(given.seeds):
        for method in given.methods:
            for dtype in CELLS[method]:
                row = measure(given.file, given.model, given.data, given.folder, method, dtype, seed)
                print(", ".join(row.values()), flush=True)


if __name__ == "__main__":
    main()
