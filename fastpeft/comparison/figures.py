"""The pictures of a report, as PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Points = Sequence[tuple[int, float]]  # (step, value)

TOGETHER = 5  # curves that one picture can hold
_COLUMNS = 3  # of pictures beside each other
_COLOURS, _MARKERS = 10, "os^Dv"


@dataclass(frozen=True)
class Place:
    """A method in a picture of two measures: its name, where it is, and the interval of its height."""

    name: str
    x: float
    y: float
    interval: tuple[float, float] | None


def scatter(places: Sequence[Place], x_title: str, y_title: str) -> bytes:
    """Methods by two measures, the first on a scale of powers."""
    figure = _figure(8, max(4.5, 0.28 * len(places)))
    axes = figure.subplots()
    for index, place in enumerate(places):
        low, high = place.interval or (place.y, place.y)
        axes.errorbar(
            place.x,
            place.y,
            yerr=[[max(0.0, place.y - low)], [max(0.0, high - place.y)]],
            fmt=_MARKERS[index // _COLOURS % len(_MARKERS)],
            color=f"C{index % _COLOURS}",
            label=place.name,
            capsize=3,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="x", which="both", labelsize="small", rotation=30)
    axes.set_xlabel(x_title)
    axes.set_ylabel(y_title)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    return _png(figure)


def curves(by_name: Mapping[str, Points], y_title: str) -> bytes:
    """Values as they were logged over the steps, none smoothed: in one picture, or where they are many in one each."""
    together = len(by_name) <= TOGETHER
    rows = 1 if together else math.ceil(len(by_name) / _COLUMNS)
    figure = _figure(8, 4.5 if together else 1.2 + 2 * rows)
    ends = [points[-1][0] for points in by_name.values()]
    sharex = max(ends) <= 2 * min(ends)  # else the longest would press the others together
    grid = figure.subplots(rows, 1 if together else _COLUMNS, sharex=sharex, sharey=True, squeeze=False).flatten()
    for index, (name, points) in enumerate(by_name.items()):
        axes = grid[0 if together else index]
        steps, values = zip(*points)
        dotted = "o" if len(points) <= 50 else None
        axes.plot(steps, values, color=f"C{index % _COLOURS}", linewidth=0.8, marker=dotted, markersize=3, label=name)
        if not together:
            axes.set_title(name, fontsize="x-small")
    for axes in grid[len(by_name) if not together else 1 :]:
        axes.set_visible(False)
    for axes in grid:
        axes.grid(alpha=0.3)
    if together:
        grid[0].legend(fontsize="small")
    figure.supxlabel("step", fontsize="medium")
    figure.supylabel(y_title, fontsize="medium")
    return _png(figure)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()
