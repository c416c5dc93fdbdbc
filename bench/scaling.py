"""How the time of a training step grows, against what operation counts predict: `python -m bench.scaling`.

One size is changed at a time, from a model of 8 layers of 256 on 8 rows of 32 tokens, SiVA of rank 4 on query and key,
a side network of window 9 and width 32 with a block for each layer; `bench/data/scaling.csv`. An exponent is the slope
of the logarithm of time over that of the size, by least squares over all points of an axis; the predicted one is the
same slope of the counted operations. So a size whose part is small beside a constant one, as a rank, has a predicted
exponent near 0, not 1.

Counted are the multiplications with an addition in matrix products, two operations each, for B T tokens and L blocks:

    backbone forward     12 d^2 + 2 T d              a block's products, scores and values
    SiVA's backward      12 d^2 + 4 T d              to inputs only: frozen weights have no gradient
    SiVA's factors       12 r d                      query and key: 6 products each, forward and backward
    side network         2 k d e + 45 e^2 + 3.5 (k + 1) T e     of width e: projections and their gradient;
                         products of queries, values and the side block, both ways; cross- and self-attention, both ways

k counts the features that a window has: at the ends of a backbone it has fewer than its size. A task of a pool is one
side network more on the same backbone. Not counted is all that moves memory without a product (norms, activations,
AdamW), and what it costs to call many small operations.

Axes that are in the table are not measured again: a run that is cut off goes on. `--axis` measures one anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import torch
from transformers import RobertaConfig, RobertaForSequenceClassification

from bench.bench_pool import adamw
from bench.harness import DATA, interleave, machine, percentiles, put_row, read_rows, timing_parser
from fastpeft import LadderConfig, LadderModel, LadderPool
from fastpeft.methods.preparation import Preparation
from fastpeft.methods.registry import get_method

FILE = DATA / "scaling.csv"
ROUNDS = 5
REDUCTION = 8
KEY = ("method", "axis", "size", "device", "card")


@dataclass(frozen=True)
class Sizes:
    """All that a step's time depends on."""

    rank: int = 4
    window: int = 9
    batch: int = 8
    length: int = 32
    layers: int = 8
    width: int = 256
    tasks: int = 1


_SHARED = {
    "batch": (4, 8, 16, 32),
    "length": (16, 32, 64, 128),
    "layers": (2, 4, 8, 16),
    "width": (128, 256, 512),
}
AXES: dict[str, dict[str, tuple[int, ...]]] = {
    "siva": {"rank": (4, 16, 64, 256), **_SHARED},
    "k-lst": {"window": (1, 3, 5, 9), **_SHARED},
    "pool": {"tasks": (1, 2, 4, 8)},
}


def features(sizes: Sizes) -> float:
    """Features in a block's window, on average over the blocks: none lies before the embeddings or after the end."""
    reach, last = sizes.window // 2, sizes.layers
    return sum(min(block + reach, last) - max(block - reach, 0) + 1 for block in range(1, last + 1)) / last


def operations(method: str, sizes: Sizes) -> float:
    """Operations of a training step, as the module's text counts them."""
    d, e, t = sizes.width, sizes.width // REDUCTION, sizes.length
    forward = 12 * d**2 + 2 * t * d
    if method == "siva":
        block = forward + 12 * d**2 + 4 * t * d + 2 * 6 * sizes.rank * d
    else:
        k = features(sizes)
        side = 2 * k * d * e + 45 * e**2 + 3.5 * (k + 1) * t * e
        block = forward + sizes.tasks * side
    return 2 * sizes.batch * t * sizes.layers * block


def step(method: str, sizes: Sizes, device: torch.device) -> Callable[[], object]:
    """Forward, backward and AdamW of one batch, ready to run."""
    torch.manual_seed(0)
    base = RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=1_000,
            hidden_size=sizes.width,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.width // 32,
            intermediate_size=4 * sizes.width,
            max_position_embeddings=sizes.length + 2,
        )
    ).to(device)
    ids = torch.randint(5, 1_000, (sizes.batch, sizes.length), device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}
    side = LadderConfig(window_size=sizes.window, reduction_factor=REDUCTION, layers_per_block=1)  # as counted
    if method == "pool":
        pool = LadderPool(base)
        optimizers = {str(task): adamw(pool.add(str(task), side)) for task in range(sizes.tasks)}
        return lambda: pool.fit([batch], optimizers)
    model: Any
    if method == "siva":
        model = get_method("siva").prepare(base, Preparation(["classifier"], sizes.rank, ["query", "key"], {}))
    else:
        model = LadderModel(base, side)
    model.to(device).train()
    optimizer = adamw(model)

    def run() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    return run


def exponent(sizes: list[int], costs: list[float]) -> float:
    """The slope of `log(cost)` over `log(size)` by least squares."""
    return linear_regression(*([math.log(value) for value in values] for values in (sizes, costs))).slope


def record(
    file: Path,
    method: str,
    axis: str,
    points: tuple[int, ...],
    device: torch.device,
    rounds: int = ROUNDS,
    base: Sizes = Sizes(),
) -> None:
    """Measure one axis of a method and put a row for each of its sizes into `file`."""
    at = {point: replace(base, **{axis: point}) for point in points}
    seconds = interleave({str(point): step(method, sizes, device) for point, sizes in at.items()}, device, rounds)
    medians = [median(seconds[str(point)]) for point in points]
    counted = {point: operations(method, sizes) for point, sizes in at.items()}
    fits = {
        "exponent": f"{exponent(list(points), medians):.2f}",
        "exponent_predicted": f"{exponent(list(points), list(counted.values())):.2f}",
    }
    for point in points:
        figures = percentiles("ms", [1e3 * t for t in seconds[str(point)]])
        case = {"method": method, "axis": axis, "size": str(point), **machine(device)}
        put_row(file, {**case, **figures, "gflop": f"{counted[point] / 1e9:.4g}", **fits}, KEY)
    print(f"{method:6} {axis:7} exponent {fits['exponent']}, predicted {fits['exponent_predicted']}", flush=True)


def main() -> None:
    parser = timing_parser(__doc__, ROUNDS)
    parser.add_argument("--method", choices=AXES, help="this one only")
    parser.add_argument("--axis", help="this one only, anew")
    given = parser.parse_args()
    there = {(row["method"], row["axis"], row["device"], row["card"]) for row in read_rows(FILE)}
    where = (machine(given.device)["device"], machine(given.device)["card"])
    for method, axes in AXES.items():
        for axis, points in axes.items():
            wanted = given.method in (None, method) and given.axis in (None, axis)
            if wanted and (given.axis is not None or (method, axis, *where) not in there):
                record(FILE, method, axis, points, given.device, given.rounds)


if __name__ == "__main__":
    main()
