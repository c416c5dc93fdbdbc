"""`python -m bench.plot` draws each table of `bench/data` beside it: timings as ratios, compiled tiles as registers."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from bench.harness import DATA, Row, read_rows

MEASURED = ("ms_", "ratio_")
WHERE = ("device", "card", "threads", "python", "fastpeft", "torch", "triton", "peft")
REGISTERS = 255  # that a thread of an NVIDIA card can have


def plot_timings(rows: list[Row], file: Path) -> None:
    """One panel for each machine, dtype and kind of work; in it, each case's candidates against the first one."""
    panels = _grouped(rows, ("card", "dtype", "work"))
    figure, all_axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 6), squeeze=False, layout="constrained")
    for axes, (title, panel) in zip(all_axes[0], panels.items()):
        first = panel[0]["candidate"]
        candidates = list(dict.fromkeys(row["candidate"] for row in panel if row["candidate"] != first))
        labels = list(dict.fromkeys(_case(row) for row in panel))
        for offset, candidate in enumerate(candidates):
            chosen = [row for row in panel if row["candidate"] == candidate]
            middle = [float(row["ratio_p50"]) for row in chosen]
            whiskers = [
                [m - float(row["ratio_p20"]) for m, row in zip(middle, chosen)],
                [float(row["ratio_p80"]) - m for m, row in zip(middle, chosen)],
            ]
            height = [labels.index(_case(row)) + 0.8 * (offset / len(candidates) - 0.4) for row in chosen]
            axes.barh(height, middle, 0.7 / len(candidates), xerr=whiskers, label=candidate, error_kw={"lw": 0.8})
        axes.axvline(1, color="black", lw=1)
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        axes.set_title("\n".join(title), fontsize=9)
        axes.set_xlabel(f"time over that of {first} (median; 20th to 80th percentile)")
    all_axes[0][0].legend(fontsize=8)
    figure.suptitle(file.stem)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def plot_static(rows: list[Row], file: Path) -> None:
    """Registers of every tile on every architecture, one panel for each kernel and dtype."""
    panels = _grouped(rows, ("kernel", "dtype"))
    figure, all_axes = plt.subplots(
        len(panels), 1, figsize=(11, 2.6 * len(panels)), squeeze=False, layout="constrained"
    )
    architectures = list(dict.fromkeys(row["arch"] for row in rows))
    for axes, (title, panel) in zip(all_axes[:, 0], panels.items()):
        for tile, of_tile in _grouped(panel, ("tile",)).items():
            places = [architectures.index(row["arch"]) for row in of_tile]
            axes.plot(places, [int(row["registers"]) for row in of_tile], "o-", lw=0.8, ms=4, label=_short(tile[0]))
        axes.axhline(REGISTERS, color="black", lw=1)
        axes.set_xticks(range(len(architectures)), architectures)
        axes.set_ylim(0, 1.05 * REGISTERS)
        axes.set_title(" ".join(title), fontsize=9, loc="left")
        axes.set_ylabel("registers a thread")
        axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _grouped(rows: list[Row], columns: tuple[str, ...]) -> dict[tuple[str, ...], list[Row]]:
    """Rows by the values of `columns`, in order of appearance."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    return groups


def _case(row: Row) -> str:
    """The columns that tell a case from the others of its panel."""
    hidden = (*WHERE, "candidate", "dtype", "work")
    return " ".join(value for name, value in row.items() if name not in hidden and not name.startswith(MEASURED))


def _short(tile: str) -> str:
    return tile.replace("BLOCK_", "").replace("num_", "")


def main() -> None:
    for table in sorted(DATA.glob("*.csv")):
        rows = read_rows(table)
        if rows and "registers" in rows[0]:
            plot_static(rows, table.with_suffix(".png"))
        elif rows and "ratio_p50" in rows[0]:
            plot_timings(rows, table.with_suffix(".png"))


if __name__ == "__main__":
    main()
