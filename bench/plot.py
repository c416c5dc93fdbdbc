"""`python -m bench.plot` draws the pictures that pages show of the tables in `bench/data`.

Those of one table lie beside it: timings as ratios, or over sizes. Two go to `docs/images`: memory against speed, and
accuracy against memory.
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
IMAGES = DATA.parents[1] / "docs" / "images"
OVERVIEW, PARETO = IMAGES / "memory-speed.png", IMAGES / "accuracy-memory.svg"

# A point of the overview: variant in compare_demo.csv, candidate in training.csv, label and where it stands.
POINTS = (
    ("mezo:prompt=sst2:learning_rate=1.5e-5:epochs=6", "mezo", "MeZO", (9, 4)),
    ("k-lst", "k-lst", "9-LST", (9, 4)),
    ("lst", "lst", "LST", (9, 4)),
    ("lora:rank=4", "lora-query-key", "LoRA, query and key", (8, 8)),
    ("siva:rank=4:targets=query+key", "siva-query-key", "SiVA, query and key", (-4, -16)),
    ("siva:rank=4:targets=all-linear:learning_rate=5e-4", "siva-all-linear", "SiVA, all linear layers", (4, 9)),
    ("head", "head", "head only", (-9, 4)),
    ("last-n", "last-n", "last 3 layers", (-7, 5)),
    ("bitfit", "bitfit", "BitFit", (-8, -7)),
    ("lora:rank=4:targets=all-linear", "lora-all-linear", "LoRA, all linear layers", (9, -12)),
    ("full", "full", "full fine-tuning", (0, 10)),
)
# A point of the other: cells of the evidence, candidate in training.csv, name.
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
OURS = ("siva", "k-lst", "lst", "mezo")


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


def plot_scaling(rows: list[Row], file: Path) -> None:
    """Time of a step over each size, a panel for each, with the counted operations as a dashed line from its start."""
    panels = _grouped(rows, ("axis",))
    columns = -(-len(panels) // 2)
    figure, all_axes = plt.subplots(2, columns, figsize=(4.2 * columns, 7), squeeze=False, layout="constrained")
    for spare in all_axes.flat[len(panels) :]:
        spare.axis("off")
    for axes, ((axis,), panel) in zip(all_axes.flat, panels.items()):
        for (method,), line in _grouped(panel, ("method",)).items():
            sizes = [int(row["size"]) for row in line]
            times, counted = ([float(row[name]) for row in line] for name in ("ms_p50", "gflop"))
            label = f"{method}: {line[0]['exponent']} (predicted {line[0]['exponent_predicted']})"
            (drawn,) = axes.loglog(sizes, times, "o-", ms=4, lw=1, label=label)
            axes.loglog(sizes, [times[0] * each / counted[0] for each in counted], "--", lw=1, color=drawn.get_color())
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.set_xlabel(axis)
        axes.set_ylabel("ms a step")
        axes.legend(fontsize=7, title="exponents", title_fontsize=7)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def plot_overview(file: Path) -> None:
    """Training speed over peak memory of the methods: the bundled model, float32, 16 x 32 tokens, two CPU cores.

    Memory is that of each method's run on the demo data, speed that of whole training steps.
    """
    memory = {row["variant"]: float(row["peak_memory_mb"] or 0) for row in read_rows(DATA / "compare_demo.csv")}
    steps = {row["candidate"]: row for row in read_rows(DATA / "training.csv") if row["model"] == "demo"}
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for variant, candidate, label, offset in POINTS:
        step = steps[candidate]
        place = memory[variant], 1e3 * int(step["batch"]) / float(step["ms_p50"])
        ours = variant.partition(":")[0] in OURS
        axes.plot(*place, "o" if ours else "s", ms=9 if ours else 7, color="#e65100" if ours else "#546e7a")
        axes.annotate(
            label,
            place,
            offset,
            textcoords="offset points",
            horizontalalignment="right" if offset[0] < 0 else "left",
            weight="bold" if ours else "normal",
            fontsize=9,
        )
    for label, marker, color in (("in fastpeft", "o", "#e65100"), ("for comparison", "s", "#546e7a")):
        axes.plot([], [], marker, color=color, label=label)
    axes.legend(fontsize=9)
    axes.set_xlim(0, 480)
    axes.set_ylim(0, 300)
    axes.set_xlabel("peak memory of a training step, MB (less is better)")
    axes.set_ylabel("samples a second (more is better)")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def plot_evidence(file: Path) -> None:
    """Accuracy over peak memory, and the time of a step, of the paper's methods on a pretrained model of base size.

    Accuracies are of the cells of sst2 and sst2-mezo that `python -m bench.evidence` has finished, with the interval of
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


PICTURES = {  # tables that a page shows as a picture, and what draws it
    "ladder": plot_timings,
    "scaling": plot_scaling,
    "siva_training": plot_timings,
}


def main() -> None:
    plot_overview(OVERVIEW)
    plot_evidence(PARETO)
    for name, draw in PICTURES.items():
        draw(read_rows(DATA / f"{name}.csv"), DATA / f"{name}.png")


if __name__ == "__main__":
    main()
