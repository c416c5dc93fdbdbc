"""The charts of a report, drawn by matplotlib as SVG."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_POINTS = 120  # of a line; more logged values are joined
COLOURS = ("#1f6fb2", "#b8560b", "#2a7d3c", "#c2273d", "#7547b8", "#806000", "#b8338a", "#0b7a80")
MARKS = "osD^vPX<"
_LABEL = 40  # the most letters of a name in the legend
_WIDE = 4.0  # the ratio of values from which an axis is logarithmic


@dataclass(frozen=True)
class Point:
    """A variant in a chart of two measures.

    Attributes:
        index: its place among the variants, which decides its mark.
        name: the variant.
        x, y: the two measures.
        interval: of the second.
        size: what the area of its mark shows; None where that is not known.
    """

    index: int
    name: str
    x: float
    y: float
    interval: tuple[float, float] | None
    size: float | None


class Step(NamedTuple):
    """Values at one step: their mean and range over seeds."""

    step: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """Logged values of a variant over the steps."""

    index: int
    name: str
    steps: Sequence[Step]


def style(index: int) -> dict[str, str]:
    """The colour and the mark of a variant: no two of the first 64 share both."""
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKS[(index + index // len(COLOURS)) % len(MARKS)]}


def scatter(points: Sequence[Point], x_title: str, y_title: str) -> str:
    """A chart of variants by two measures; areas of marks show their `size`."""
    largest = max((point.size or 0.0 for point in points), default=0.0)

    def draw(axes: Axes) -> None:
        for point in points:
            low, high = point.interval or (point.y, point.y)
            whiskers = [[max(0.0, point.y - low)], [max(0.0, high - point.y)]]
            width = 16 * math.sqrt(point.size / largest) if point.size else 8.0
            look: dict[str, Any] = {**style(point.index), "linestyle": "none", "label": _short(point.name)}
            axes.errorbar([point.x], [point.y], whiskers, **look, markersize=max(5.0, width), elinewidth=1, alpha=0.85)
        if max(point.x for point in points) > _WIDE * min(point.x for point in points) > 0:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.4g}")

    return _svg(draw, x_title, y_title)


def curves(lines: Sequence[Curve], y_title: str) -> str:
    """A chart of logged values over the steps: a line a variant, with the range over its seeds as a band."""

    def draw(axes: Axes) -> None:
        for line in lines:
            steps, means, lows, highs = zip(*line.steps)
            look: dict[str, Any] = style(line.index)
            axes.plot(steps, means, **look, label=_short(line.name), linewidth=1.2, markevery=[-1], markersize=5)
            if lows != highs:
                axes.fill_between(steps, lows, highs, color=look["color"], alpha=0.12, linewidth=0)

    return _svg(draw, "step", y_title)


def over_seeds(seeds: Iterable[Sequence[tuple[int, float]]]) -> list[Step]:
    """The mean and the range over seeds at each step; neighbours are joined where they are more than `MOST_POINTS`."""
    values: dict[int, list[float]] = {}
    for curve in seeds:
        for step, value in curve:
            if math.isfinite(value):
                values.setdefault(step, []).append(value)
    order = sorted(values)
    size = math.ceil(len(order) / MOST_POINTS)
    joined = [order[start : start + size] for start in range(0, len(order), size or 1)]
    found = [(steps[-1], [value for step in steps for value in values[step]]) for steps in joined]
    return [Step(step, sum(of) / len(of), min(of), max(of)) for step, of in found]


def _short(name: str) -> str:
    """A name of at most `_LABEL` letters, with its beginning and its end."""
    return name if len(name) <= _LABEL else f"{name[: _LABEL - 13]}…{name[-12:]}"


def _svg(draw: Callable[[Axes], None], x_title: str, y_title: str) -> str:
    """The chart that `draw` puts on axes. Names stay text, in which `$` begins no formula."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastpeft", "text.parse_math": False}):
        figure = Figure(figsize=(10, 4.5), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.set_xlabel(x_title)
        axes.set_ylabel(y_title)
        axes.grid(alpha=0.3)
        found: tuple[list[Any], list[str]] = axes.get_legend_handles_labels()
        marks = [handle[0] if isinstance(handle, tuple) else handle for handle in found[0]]  # without whiskers
        figure.legend(marks, found[1], loc="outside right upper", fontsize=8, markerscale=0.7)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
