"""The charts of a report, as SVG: inside the page they take its style, as a file they have their own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

WIDE, NARROW = 1000, 360  # the widths of a chart: of a screen, and of a phone, where letters stay as large
MOST_POINTS = 120  # of a line; more logged values are joined

# A variant's mark is a colour and a shape: no two of the first 64 share both.
COLOURS = (  # in light and in dark; each has a contrast of 3 or more with the page
    ("#1f6fb2", "#6cb6f5"),
    ("#b8560b", "#f0a35e"),
    ("#2a7d3c", "#6cc581"),
    ("#c2273d", "#f58a97"),
    ("#7547b8", "#bf9df2"),
    ("#806000", "#d6b84a"),
    ("#b8338a", "#f08ecb"),
    ("#0b7a80", "#52c5cc"),
)
_SHAPES = (  # each about as large as a circle of radius 1
    "M-1 0a1 1 0 1 0 2 0a1 1 0 1 0-2 0z",
    "M-.89-.89h1.78v1.78h-1.78z",
    "M0-1.3 1.2.85h-2.4z",
    "M0-1.3 1.1 0 0 1.3-1.1 0z",
    "M-.42-1.2h.84v.78h.78v.84h-.78v.78h-.84v-.78h-.78v-.84h.78z",
    "M0 1.3 1.2-.85h-2.4z",
    "M0-.55 .6-1.15 1.15-.6.55 0 1.15.6.6 1.15 0 .55-.6 1.15-1.15.6-.55 0-1.15-.6-.6-1.15z",
    "M-1.2 0-.6-1.04H.6L1.2 0 .6 1.04H-.6z",
)
_LETTER, _LINE = 7.4, 16  # pixels: the mean width of a letter, and the height of a line
_LABEL = 30  # the most letters of a name beside its mark
_RADII = 4.5, 13.0  # of the smallest and the largest mark

# What a file has of the page's style. Programs that show files know neither variables nor light-dark().
_STYLE = """
svg { font: 13px system-ui, sans-serif; background: #fff; }
text { fill: #1c2024; stroke: #fff; stroke-width: 3px; paint-order: stroke; }
.soft, .soft text { fill: #5b6570; color: #5b6570; }
.grid { stroke: #d5dae0; } .mark { fill: currentColor; stroke: #fff; fill-opacity: .9; }
.line { fill: none; stroke: currentColor; stroke-width: 1.5; } .band { fill: currentColor; fill-opacity: .1; }
.thin { stroke: currentColor; stroke-opacity: .4; }
"""


@dataclass(frozen=True)
class Point:
    """A variant in a chart of two measures.

    Attributes:
        index: its place among the variants, which decides its mark.
        name: the variant.
        x, y: the two measures.
        interval: of the second.
        size: what the area of its mark shows; None where that is not known.
        told: further lines of its description.
    """

    index: int
    name: str
    x: float
    y: float
    interval: tuple[float, float] | None
    size: float | None
    told: Sequence[str] = ()


class Step(NamedTuple):
    """Values at one step: their mean and range over seeds."""

    step: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """Logged values of a variant over the steps, and the number of its seeds."""

    index: int
    name: str
    steps: Sequence[Step]
    seeds: int


@dataclass(frozen=True)
class Scatter:
    """A chart of variants by two measures, the first on a logarithmic scale; `size_unit` says what areas show."""

    points: Sequence[Point]
    x_title: str
    y_title: str
    size_unit: str

    def svg(self, alt: str, width: int = WIDE, *, file: bool = False) -> str:
        """The chart, `width` wide, described by `alt`; as a `file` with its own style."""
        height = 430 if width == WIDE else 330
        x = _Axis([point.x for point in self.points], 54, width - 24, log=True)
        ends = [end for point in self.points for end in (point.y, *(point.interval or ()))]
        y = _Axis(ends, height - 48, 44)
        spots = [(x(point.x), y(point.y), self._radius(point, width)) for point in self.points]
        labels = _place([point.name for point in self.points], spots, (x.start, y.end, width, y.start))
        parts = [*_axes(x, y, self.x_title, self.y_title), *self._sizes(width)]
        order = sorted(range(len(spots)), key=lambda number: -spots[number][2])  # small ones on top
        for number in order:
            point, (left, top, radius) = self.points[number], spots[number]
            inner = ""
            if point.interval:
                low, high = map(y, point.interval)
                inner = f'<path class="thin" d="M{left:.1f} {low:.1f}V{high:.1f}"/>'
            inner += mark(point.index, left, top, radius) + labels[number]
            parts.append(_series(point.index, "\n".join((point.name, *point.told)), inner))
        return _svg(parts, alt, width, height, file)

    def _radius(self, point: Point, width: int) -> float:
        largest = max((other.size or 0.0 for other in self.points), default=0.0)
        scale = 1.0 if width == WIDE else 0.7
        return scale * (max(_RADII[0], _RADII[1] * math.sqrt(point.size / largest)) if point.size else 6.0)

    def _sizes(self, width: int) -> Iterator[str]:
        """What the smallest and the largest mark mean, on the right above the chart."""
        sized = sorted((point for point in self.points if point.size), key=lambda point: point.size or 0.0)
        right = width - 8.0
        for point in (sized[-1], sized[0]) if len(sized) > 1 else ():
            text = f"{point.size:.3g} {self.size_unit if point is sized[-1] else ''}".strip()
            yield f'<text class="soft" x="{right:.1f}" y="20" text-anchor="end">{escape(text)}</text>'
            right -= _LETTER * len(text) + self._radius(point, width) + 4
            yield f'<g class="soft">{mark(0, right, 16, self._radius(point, width))}</g>'
            right -= self._radius(point, width) + 12


@dataclass(frozen=True)
class Curves:
    """A chart of logged values over the steps: a line a variant, with the range over its seeds as a band."""

    curves: Sequence[Curve]
    y_title: str

    def svg(self, alt: str, width: int = WIDE, *, file: bool = False) -> str:
        """The chart, `width` wide, described by `alt`; as a `file` with its own style."""
        beside = 0.0 if width == NARROW else 36 + _LETTER * max(len(_short(curve.name)) for curve in self.curves)
        height = max(320 if width == WIDE else 260, 60 + (_LINE - 1) * len(self.curves) * (width == WIDE))
        x = _Axis([step.step for curve in self.curves for step in curve.steps], 54, width - 12 - beside, margin=0)
        y = _Axis([end for curve in self.curves for step in curve.steps for end in step[1:]], height - 48, 44)
        ends = [(x(curve.steps[-1].step), y(curve.steps[-1].mean)) for curve in self.curves]
        tops = _apart([top for _, top in ends], y.end, y.start)
        parts = _axes(x, y, "step", self.y_title)
        for curve, (left, top), label_top in zip(self.curves, ends, tops):
            line = " ".join(f"{x(step.step):.1f},{y(step.mean):.2f}" for step in curve.steps)
            band = [(step.step, step.high) for step in curve.steps] + [(s.step, s.low) for s in reversed(curve.steps)]
            inner = ""
            if any(step.low < step.high for step in curve.steps):
                inner = f'<polygon class="band" points="{" ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in band)}"/>'
            inner += f'<polyline class="line" points="{line}"/>'
            if beside:
                inner += (
                    f'<path class="thin" d="M{left:.1f} {top:.1f}L{x.end + 18:.1f} {label_top:.1f}"/>'
                    f"{mark(curve.index, x.end + 24, label_top, 4.5)}"
                    f'<text x="{x.end + 33:.1f}" y="{label_top + 4:.1f}">{escape(_short(curve.name))}</text>'
                )
            else:
                inner += mark(curve.index, left, top, 4)
            last = curve.steps[-1]
            of_seeds = f", {last.low:.3f} to {last.high:.3f} over {curve.seeds} seeds" if last.low < last.high else ""
            told = f"{curve.name}\nlast value {last.mean:.3f} at step {last.step:,}{of_seeds}"
            parts.append(_series(curve.index, told, inner))
        scales = f'data-x="{x.inverse}" data-y="{y.inverse}"'
        return _svg(parts, alt, width, height, file, scales)


def over_seeds(curves: Iterable[Sequence[tuple[int, float]]]) -> list[Step]:
    """The mean and the range over seeds at each step; neighbours are joined where they are more than `MOST_POINTS`."""
    values: dict[int, list[float]] = {}
    for curve in curves:
        for step, value in curve:
            if math.isfinite(value):
                values.setdefault(step, []).append(value)
    order = sorted(values)
    size = math.ceil(len(order) / MOST_POINTS)
    joined = [order[start : start + size] for start in range(0, len(order), size or 1)]
    found = [(steps[-1], [value for step in steps for value in values[step]]) for steps in joined]
    return [Step(step, sum(of) / len(of), min(of), max(of)) for step, of in found]


def mark(index: int, x: float = 0.0, y: float = 0.0, radius: float = 6.0) -> str:
    """A variant's mark, in the colour of what it stands in."""
    shape = _SHAPES[(index + index // len(COLOURS)) % len(_SHAPES)]
    return (
        f'<path class="mark" transform="translate({x:.1f} {y:.1f}) scale({radius:.2f})" '
        f'vector-effect="non-scaling-stroke" d="{shape}"/>'
    )


def glyph(index: int) -> str:
    """A variant's mark in a line of text."""
    return f'<svg class="glyph {colour(index)}" viewBox="-9 -9 18 18" aria-hidden="true">{mark(index)}</svg>'


def colour(index: int) -> str:
    """The class of a variant's colour."""
    return f"c{index % len(COLOURS)}"


def palette(form: str = "light-dark({}, {})") -> str:
    """The style of the classes that `colour` names."""
    return "\n".join(f".{colour(index)} {{ color: {form.format(*pair)}; }}" for index, pair in enumerate(COLOURS))


class _Axis:
    """Values as pixels from `start` to `end`, with a margin, a share of the range, on both sides."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, log: bool = False, margin: float = 0.07):
        self.start, self.end, self._scale = start, end, math.log if log else float
        low, high = self._scale(min(values)), self._scale(max(values))
        wide = high - low or abs(high) * 0.2 or 1.0
        if high == low or margin:
            low, high = low - wide * max(margin, 0.07), high + wide * max(margin, 0.07)
        self._low, self._per = low, (end - start) / (high - low)
        self._ends = (math.exp(low), math.exp(high)) if log else (low, high)

    def __call__(self, value: float) -> float:
        return self.start + (self._scale(value) - self._low) * self._per

    @property
    def inverse(self) -> str:
        """What a pixel is multiplied by, and what is added, to have the value again."""
        return f"{1 / self._per:.9g} {self._low - self.start / self._per:.9g}"

    def ticks(self, apart: float) -> list[tuple[float, str]]:
        """The pixels of round values, at least `apart` from each other, and these values as they are written."""
        low, high = self._ends
        most = max(1.0, abs(self.end - self.start) / apart)
        rough = (high - low) / most if self._scale is float else (high - low) / (2 * most)
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough)
        form = f",.{len(f'{step:.10f}'.rstrip('0').partition('.')[2])}f" if 1e-6 < step < 1e6 else ".3g"
        found: list[tuple[float, str]] = []
        for number in range(math.ceil(low / step), math.floor(high / step) + 1):
            pixel = self(number * step)
            if not found or abs(pixel - found[-1][0]) >= apart:
                found.append((pixel, format(number * step, form)))
        return found


def _axes(x: _Axis, y: _Axis, x_title: str, y_title: str) -> list[str]:
    parts = []
    for pixel, text in x.ticks(62):
        parts.append(f'<path class="grid" d="M{pixel:.1f} {y.start}V{y.end}"/>')
        parts.append(f'<text x="{pixel:.1f}" y="{y.start + 18}" text-anchor="middle">{text}</text>')
    for pixel, text in y.ticks(36):
        parts.append(f'<path class="grid" d="M{x.start} {pixel:.1f}H{x.end}"/>')
        parts.append(f'<text x="{x.start - 7}" y="{pixel + 4:.1f}" text-anchor="end">{text}</text>')
    middle = (x.start + x.end) / 2
    titles = (
        f'<text x="{middle:.1f}" y="{y.start + 40}" text-anchor="middle">{escape(x_title)}</text>'
        f'<text x="8" y="20">{escape(y_title)}</text>'
    )
    return [f'<g aria-hidden="true"><g class="soft">{"".join(parts)}</g>{titles}</g>']


def _series(index: int, told: str, inner: str) -> str:
    """What a chart has of one variant."""
    return (
        f'<g class="{colour(index)}" data-variant="{index}" tabindex="0" role="img"><title>{escape(told)}</title>'
        f"{inner}</g>"
    )


def _svg(parts: Iterable[str], alt: str, width: int, height: float, file: bool, scales: str = "") -> str:
    inner = "\n".join(parts)
    name = f'viewBox="0 0 {width} {height}" role="group" aria-label="{escape(alt)}"'
    if file:
        start = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" {name}>'
        return f"{start}<style>{_STYLE}{palette('{}')}\n</style>\n{inner}\n</svg>\n"
    return f'<svg class="chart {"wide" if width == WIDE else "narrow"}" {scales} {name}>\n{inner}\n</svg>'


def _short(name: str) -> str:
    """A name of at most `_LABEL` letters, with its beginning and its end."""
    return name if len(name) <= _LABEL else f"{name[: _LABEL - 13]}…{name[-12:]}"


def _apart(tops: Sequence[float], first: float, last: float) -> list[float]:
    """The tops of lines of text, in their order, moved until none covers another."""
    order = sorted(range(len(tops)), key=tops.__getitem__)
    apart = min(_LINE - 1, (last - first) / max(1, len(tops) - 1))
    placed = list(tops)
    for before, number in zip([None, *order], order):
        placed[number] = max(placed[number], first if before is None else placed[before] + apart)
    for after, number in zip([None, *reversed(order)], reversed(order)):
        placed[number] = min(placed[number], last if after is None else placed[after] - apart)
    return placed


_Box = tuple[float, float, float, float]  # left, top, right, bottom


def _place(names: Sequence[str], spots: Sequence[tuple[float, float, float]], plot: _Box) -> list[str]:
    """The name of each mark beside it, at the nearest place where it covers nothing; none where there is no place."""
    taken = [(x - r, y - r, x + r, y + r) for x, y, r in spots]
    labels = [""] * len(names)
    directions = [(math.cos(turn * math.pi / 6), math.sin(turn * math.pi / 6)) for turn in (0, 6, 9, 3, 1, 11, 5, 7)]
    for number in sorted(range(len(names)), key=lambda index: spots[index][1]):  # the highest first
        (x, y, radius), text = spots[number], _short(names[number])
        wide, high = _LETTER * len(text), _LINE - 2
        for gap in (3, 16, 32, 48):
            centres = ((x + a * (radius + gap + wide / 2), y + b * (radius + gap + high / 2)) for a, b in directions)
            boxes = [(cx - wide / 2, cy - high / 2, cx + wide / 2, cy + high / 2) for cx, cy in centres]
            free = [box for box in boxes if _inside(box, plot) and not any(_overlap(box, other) for other in taken)]
            if free:
                left, top, right, bottom = free[0]
                taken.append(free[0])
                near = min(max(x, left), right), min(max(y, top), bottom)
                leader = f'<path class="thin" d="M{x:.1f} {y:.1f}L{near[0]:.1f} {near[1]:.1f}"/>' if gap > 3 else ""
                labels[number] = f'{leader}<text x="{left:.1f}" y="{bottom - 3:.1f}">{escape(text)}</text>'
                break
    return labels


def _inside(box: _Box, other: _Box) -> bool:
    return box[0] >= other[0] and box[1] >= other[1] and box[2] <= other[2] and box[3] <= other[3]


def _overlap(box: _Box, other: _Box) -> bool:
    return box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]
