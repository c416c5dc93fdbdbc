"""`python -m bench.plot` draws the pictures that pages show of the tables in `bench/data`.

Timings of one table, as ratios, lie beside it. Accuracy against memory goes to `docs/images`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from bench.harness import DATA, VERSIONS, Row, read_rows
from fastpeft.comparison.report.figures import Point, scatter
from fastpeft.comparison.significance import interval
from fastpeft.support.files import read_json, write_text

MEASURED = ("ms_", "ratio_")
WHERE = ("device", "card", "threads", *VERSIONS)
PARETO = DATA.parents[1] / "docs" / "images" / "accuracy-memory.svg"

# A point: cells of the evidence, candidate in training.csv, name.
EVIDENCE = (
    ("sst2/full", "full", "full fine-tuning"),
    ("sst2/lora-rank=4-targets=query+key", "lora-query-key", "LoRA"),
    ("sst2/lora-rank=4-targets=key+value", "lora-key-value", "LoRA, key and value"),
    ("sst2/siva-rank=4-targets=query+key", "siva-query-key", "SiVA"),
    ("sst2/siva-rank=4-targets=key+value", "siva-key-value", "SiVA, key and value"),
    ("sst2/siva-rank=4-targets=all-linear", "siva-all-linear", "SiVA, all linear"),
    ("sst2/k-lst-window=9", "k-lst", "9-LST"),
    ("sst2/lst", "lst", "LST"),
    ("sst2/last-n", "last-n", "last 3 layers"),
    ("sst2/head", "head", "head only"),
    ("sst2-mezo/mezo-prompt=sst2-learning_rate=6e-6-epochs=5", "mezo", "MeZO, five epochs"),
)


def plot_timings(rows: list[Row], file: Path) -> None:
    """A panel for each machine, dtype and kind of work: candidates, each in one colour, against the first one."""
    panels = _grouped(rows, ("card", "dtype", "work"))
    colors = {name: f"C{place}" for place, name in enumerate(dict.fromkeys(row["candidate"] for row in rows))}
    heights = [1 + 0.25 * len(panel) for panel in panels.values()]  # inches: as thick a bar in each
    size = (7, 0.5 + sum(heights))
    figure, all_axes = plt.subplots(
        len(panels), 1, figsize=size, height_ratios=heights, squeeze=False, layout="constrained"
    )
    for axes, (title, panel) in zip(all_axes[:, 0], panels.items()):
        _plot_ratios(axes, panel, colors)
        axes.set_title(", ".join(title), fontsize=9)
    drawn = {
        label: bars for axes in all_axes[:, 0] for bars, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(list(drawn.values()), list(drawn), loc="outside upper center", ncols=4, fontsize=8)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _plot_ratios(axes: Axes, rows: list[Row], colors: Mapping[str, str]) -> None:
    """Bars of the candidates' times over that of the first, with the 20th and 80th percentile."""
    first, *others = dict.fromkeys(row["candidate"] for row in rows)
    cases = list(dict.fromkeys(_case(row) for row in rows))
    for place, candidate in enumerate(others):
        chosen = [row for row in rows if row["candidate"] == candidate]
        low, middle, high = ([float(row[f"ratio_p{p}"]) for row in chosen] for p in (20, 50, 80))
        whiskers = [[m - a for a, m in zip(low, middle)], [b - m for m, b in zip(middle, high)]]
        heights = [cases.index(_case(row)) + 0.8 * ((place + 0.5) / len(others) - 0.5) for row in chosen]
        style = {"color": colors[candidate], "label": candidate, "error_kw": {"lw": 0.8}}
        axes.barh(heights, middle, 0.7 / len(others), xerr=whiskers, **style)
    axes.axvline(1, color="black", lw=1)
    axes.set_yticks(range(len(cases)), cases, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"time over that of {first} (median, 20th to 80th percentile)", fontsize=8)


def plot_evidence(file: Path) -> None:
    """Accuracy over peak memory, and the time of a step, of the paper's methods on a pretrained model of base size.

    Accuracies are of the cells of sst2 and sst2-mezo in `bench/data/evidence`, with the interval of
    reports, for new sentences and seeds, and memory is simulated for them. A step is of RoBERTa-base's shapes, 16 x 32
    tokens, in float32; of a method that was not timed so, its mark has the usual size.
    """
    steps = {row["candidate"]: row for row in read_rows(DATA / "training.csv") if row["model"] == "base"}
    points = []
    for index, (variant, candidate, name) in enumerate(EVIDENCE):
        cells = [read_json(cell) for cell in sorted((DATA / "evidence").glob(f"{variant}-seed*.json"))]
        if not cells:
            continue
        answers = np.stack([np.equal(*map(cell["predictions"].get, ("labels", "predictions"))) for cell in cells])
        found = interval(answers)
        ends = None if found is None else (100 * found[0], 100 * found[1])
        step = float(steps[candidate]["ms_p50"]) / 1000 if candidate in steps else None
        points.append(
            Point(index, name, cells[0]["metrics"]["peak_memory_mb"], 100 * float(answers.mean()), ends, step)
        )
    write_text(file, scatter(points, "peak memory of a training step, MB", "accuracy on SST-2, %"))


def _grouped(rows: list[Row], columns: tuple[str, ...]) -> dict[tuple[str, ...], list[Row]]:
    """Rows by the values of `columns`, in order of appearance."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    return groups


def _case(row: Row) -> str:
    """The columns that tell a case from the others of its panel."""
    hidden = (*WHERE, "candidate", "dtype", "work")
    columns = {name: value for name, value in row.items() if name not in hidden and not name.startswith(MEASURED)}
    return " ".join(f"{name} {value}" if value.isdigit() else value for name, value in columns.items())


TIMINGS = ("ladder", "siva_training")  # tables that a page shows as a picture


def main() -> None:
    plot_evidence(PARETO)
    for name in TIMINGS:
        plot_timings(read_rows(DATA / f"{name}.csv"), DATA / f"{name}.png")


if __name__ == "__main__":
    main()
