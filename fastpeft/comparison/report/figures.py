"""The pictures of a report, as PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Curve = Sequence[tuple[int, float]]  # (step, value)

TOGETHER = 5  # the most curves in one picture
_COLUMNS = 2  # of small pictures or of names in a legend
_WIDTH = 6  # inches: letters stay legible where a phone shows the picture narrow
_SHORT = 36  # the most letters of names that stand in two columns
_COLOURS, _MARKERS = 10, "os^Dv"


@dataclass(frozen=True)
class Point:
    """A variant in a picture of two measures, with the interval of the second."""

    name: str
    x: float
    y: float
    interval: tuple[float, float] | None


def scatter(points: Sequence[Point], x_title: str, y_title: str) -> bytes:
    """Variants by two measures, the first on a logarithmic scale; numbered where they are too many for colours."""
    beside = _COLUMNS if max(len(point.name) for point in points) <= _SHORT else 1
    figure = _figure(4.2 + 0.21 * math.ceil(len(points) / beside))
    axes = figure.subplots()
    numbered = len(points) > TOGETHER
    for index, point in enumerate(points):
        colour = f"C{index % _COLOURS}"
        if point.interval:
            axes.vlines(point.x, *point.interval, color=colour, alpha=0.25, linewidth=2)
        label = f"{index + 1}  {point.name}" if numbered else point.name
        axes.scatter(point.x, point.y, marker=_MARKERS[index // _COLOURS % len(_MARKERS)], color=colour, label=label)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="x", which="both", labelsize="small", rotation=30)
    axes.set_xlabel(x_title)
    axes.set_ylabel(y_title)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=beside, fontsize="small", frameon=False)
    if numbered:
        _number(axes, [(point.x, point.y) for point in points])
    return _png(figure)


def _number(axes: Any, points: Sequence[tuple[float, float]]) -> None:
    """Write its number beside each point, on the side that is farthest from points and other numbers."""
    axes.figure.draw_without_rendering()  # which places the points
    taken = [tuple(pixels) for pixels in axes.transData.transform(points)]
    reach = 9 * axes.figure.dpi / 72  # of 9 points
    sides = [(math.cos(turn), math.sin(turn)) for turn in (index * math.pi / 4 for index in range(8))]
    for number, (x, y) in enumerate(taken[: len(points)], 1):
        spots = [(x + reach * across, y + reach * up) for across, up in sides]
        spot = max(spots, key=lambda spot: min(math.dist(spot, other) for other in taken))
        taken.append(spot)
        where = axes.transData.inverted().transform(spot)
        axes.text(*where, str(number), fontsize="small", horizontalalignment="center", verticalalignment="center")


def curves(by_name: Mapping[str, Curve], y_title: str) -> bytes:
    """Logged values over the steps, not smoothed: in one picture, or with a picture for each of many curves."""
    together = len(by_name) <= TOGETHER
    rows = 1 if together else math.ceil(len(by_name) / _COLUMNS)
    figure = _figure(4.2 if together else 1.2 + 1.7 * rows)
    ends = [points[-1][0] for points in by_name.values()]
    sharex = max(ends) <= 2 * min(ends)  # else the longest would squeeze the others
    grid = figure.subplots(rows, 1 if together else _COLUMNS, sharex=sharex, sharey=True, squeeze=False).flatten()
    for index, (name, points) in enumerate(by_name.items()):
        axes = grid[0 if together else index]
        steps, values = zip(*points)
        dotted = "o" if len(points) <= 50 else None
        axes.plot(steps, values, color=f"C{index % _COLOURS}", linewidth=0.8, marker=dotted, markersize=3, label=name)
        if not together:
            axes.set_title(name, fontsize="small")
    for axes in grid[len(by_name) if not together else 1 :]:
        axes.set_visible(False)
    for axes in grid:
        axes.grid(alpha=0.3)
    if together:
        grid[0].legend(fontsize="small")
    figure.supxlabel("step", fontsize="medium")
    figure.supylabel(y_title, fontsize="medium")
    return _png(figure)


def _figure(height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()
