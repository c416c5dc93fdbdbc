"""The pictures of a report, as PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Points = Sequence[tuple[int, float]]  # (step, value)

TOGETHER = 5  # curves that one picture can hold
_COLUMNS = 2  # of pictures beside each other
_WIDTH = 6  # inches: on a phone, which shows a picture narrow, letters stay large enough
_SHORT = 36  # letters of a name, of which two have room beside each other
_COLOURS, _MARKERS = 10, "os^Dv"


@dataclass(frozen=True)
class Place:
    """A method in a picture of two measures: its name, where it is, and the interval of its height."""

    name: str
    x: float
    y: float
    interval: tuple[float, float] | None


def scatter(places: Sequence[Place], x_title: str, y_title: str) -> bytes:
    """Methods by two measures, the first on a scale of powers; numbered where colours alone would not tell them."""
    beside = _COLUMNS if max(len(place.name) for place in places) <= _SHORT else 1
    figure = _figure(4.2 + 0.21 * math.ceil(len(places) / beside))
    axes = figure.subplots()
    numbered = len(places) > TOGETHER
    for index, place in enumerate(places):
        colour = f"C{index % _COLOURS}"
        if place.interval:
            axes.vlines(place.x, *place.interval, color=colour, alpha=0.25, linewidth=2)
        label = f"{index + 1}  {place.name}" if numbered else place.name
        axes.scatter(place.x, place.y, marker=_MARKERS[index // _COLOURS % len(_MARKERS)], color=colour, label=label)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="x", which="both", labelsize="small", rotation=30)
    axes.set_xlabel(x_title)
    axes.set_ylabel(y_title)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=beside, fontsize="small", frameon=False)
    if numbered:
        _number(axes, [(place.x, place.y) for place in places])
    return _png(figure)


def _number(axes: Any, points: Sequence[tuple[float, float]]) -> None:
    """Write its number beside each point, on the side that is farthest from points and other numbers."""
    axes.figure.draw_without_rendering()  # which decides where the points are
    taken = [tuple(place) for place in axes.transData.transform(points)]
    reach = 9 * axes.figure.dpi / 72  # of 9 points
    sides = [(math.cos(turn), math.sin(turn)) for turn in (index * math.pi / 4 for index in range(8))]
    for number, (x, y) in enumerate(taken[: len(points)], 1):
        spots = [(x + reach * across, y + reach * up) for across, up in sides]
        spot = max(spots, key=lambda spot: min(math.dist(spot, other) for other in taken))
        taken.append(spot)
        where = axes.transData.inverted().transform(spot)
        axes.text(*where, str(number), fontsize="small", horizontalalignment="center", verticalalignment="center")


def curves(by_name: Mapping[str, Points], y_title: str) -> bytes:
    """Values as they were logged over the steps, none smoothed: in one picture, or where they are many in one each."""
    together = len(by_name) <= TOGETHER
    rows = 1 if together else math.ceil(len(by_name) / _COLUMNS)
    figure = _figure(4.2 if together else 1.2 + 1.7 * rows)
    ends = [points[-1][0] for points in by_name.values()]
    sharex = max(ends) <= 2 * min(ends)  # else the longest would press the others together
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
