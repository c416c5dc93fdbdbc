"""What a dry run said of a comparison against what its cells took: `python -m bench.dry_run PLAN FOLDER`.

PLAN is the text that `fastpeft compare ... --dry-run` printed, FOLDER the output of the same comparison, run in one go:
`bench/data/dry_run.csv`. Seconds are those of a cell's whole process, from its configuration's file to its
`metrics.json`; a plan shows 100 s and more in whole minutes, 100 minutes and more in tenths of an hour. Memory is
measured on a GPU alone. On a CPU it is simulated before and after alike, so that the two are one where the longest
batch is; there the process's peak of resident memory, libraries and data included, should rise from cell to cell as the
estimate does.
"""

from __future__ import annotations

from pathlib import Path
from statistics import linear_regression, mean

from bench.harness import DATA, Row, option_parser, put_row
from fastpeft.comparison.cells import Cell
from fastpeft.support import files

FILE = DATA / "dry_run.csv"
_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}


def planned(text: str) -> list[dict[str, str]]:
    """The rows of a printed plan: memory in MB and seconds of each cell that waited, in the order of the plan."""
    heads: list[str] = []
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.replace("┃", "│").split("│")[1:-1]]
        if cells[:2] == ["cell", "state"]:
            heads = cells
        elif heads and len(cells) == len(heads):
            row = dict(zip(heads, cells))
            if row["cell"]:  # else the rest of a long line
                number, _, unit = row["time"].partition(" ")
                known = unit in _UNITS
                seconds = f"{float(number.replace(',', '')) * _UNITS[unit]:.0f}" if known else ""
                found.append({"memory_mb": row["memory, MB"].replace(",", ""), "seconds": seconds})
    return found


def cells_of(folder: Path) -> list[Cell]:
    """The cells of a comparison in the order in which they ran."""
    made = [Cell.from_values(values) for values in files.read_json(folder / "comparison.json")["cells"]]
    for cell in made:  # the folder may have moved
        cell.values["output"] = str(folder / "cells" / cell.name)
    return sorted(made, key=lambda cell: cell.config_file.stat().st_mtime)


def took(cell: Cell) -> float:
    """Seconds of a finished cell's process."""
    return (cell.folder.path / "metrics.json").stat().st_mtime - cell.config_file.stat().st_mtime


def compared(plan: list[dict[str, str]], cells: list[Cell]) -> list[Row]:
    """A row for each cell: what was said, what it took, and the first over the second."""
    if len(plan) != len(cells):
        raise SystemExit(
            f"the plan has {len(plan)} cells and the folder {len(cells)}: these are not of one comparison."
        )
    rows = []
    for said, cell in zip(plan, cells):
        metrics = cell.metrics()
        if metrics is None:
            raise SystemExit(f"the cell {cell.name} is not finished.")
        seconds = took(cell)
        rows.append(
            {
                "variant": cell.variant,
                "seed": str(cell.seed),
                "estimated_s": said["seconds"],
                "took_s": f"{seconds:.0f}",
                "time_ratio": f"{float(said['seconds']) / seconds:.2f}" if said["seconds"] else "",
                "estimated_mb": said["memory_mb"],
                "peak_mb": f"{metrics['peak_memory_mb']:.0f}",
                "peak_source": metrics["peak_memory_source"],
                "rss_mb": f"{metrics['peak_rss_mb']:.0f}",
                "device": metrics["device"],
                "threads": str(metrics["threads"]),
                "torch": metrics["versions"]["torch"],
            }
        )
    return rows


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("plan", type=Path, help="what the dry run printed")
    parser.add_argument("folder", type=Path, help="output of the comparison")
    given = parser.parse_args()
    rows = compared(planned(given.plan.read_text(encoding="utf-8")), cells_of(given.folder))
    for row in rows:
        put_row(FILE, row, key=("variant", "seed", "device", "threads"))
    ratios = [float(row["time_ratio"]) for row in rows if row["time_ratio"]]
    total = [sum(float(row[name]) for row in rows if row["time_ratio"]) for name in ("estimated_s", "took_s")]
    print(f"of what cells took, the dry run said {mean(ratios):.2f} on average, {min(ratios):.2f} to {max(ratios):.2f}")
    print(f"all together: {total[0]:.0f} s were said, {total[1]:.0f} s it took")
    estimated, resident = ([float(row[name]) for row in rows] for name in ("estimated_mb", "rss_mb"))
    line = linear_regression(estimated, resident)
    print(f"resident memory: {line.intercept:.0f} MB and {line.slope:.2f} MB for each that was said")


if __name__ == "__main__":
    main()
