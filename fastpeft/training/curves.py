"""The picture of a run: training loss and a metric over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

Points = Sequence[tuple[int, float]]  # (step, value)


def draw_curves(file: Path, title: str, loss: Points, metric: Points, loss_name: str, metric_name: str) -> None:
    """Draw the loss and a metric of the dev rows, one above the other, into a PNG `file`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, metric_axes = figure.subplots(2, 1, sharex=True)
    loss_axes.plot(*zip(*loss), color="tab:blue", linewidth=1)
    loss_axes.set_ylabel(loss_name)
    metric_axes.plot(*zip(*metric), color="tab:orange", marker="o")
    step, last = metric[-1]
    metric_axes.annotate(f"{last:.3f}", (step, last), textcoords="offset points", xytext=(-6, -14), ha="right")
    metric_axes.set_ylabel(f"dev {metric_name}")
    metric_axes.set_xlabel("step")
    for axes in (loss_axes, metric_axes):
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(file)
