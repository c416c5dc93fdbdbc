"""The picture of a run."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastpeft import TrainConfig, train
from fastpeft.training.curves import Points, draw_curves

BLUE, ORANGE = (31, 119, 180), (255, 127, 14)


@pytest.fixture(autouse=True)
def curves() -> None:
    """Drawn, as nowhere else."""


def rows_with(color: tuple[int, int, int], file: Path) -> list[int]:
    return (np.asarray(Image.open(file).convert("RGB")) == color).all(-1).any(-1).nonzero()[0].tolist()


@pytest.mark.parametrize(
    ("loss", "metric", "drawn"),
    [
        ([(1, 0.7), (2, 0.4), (3, 0.3)], [(0, 0.5), (3, 0.9)], (True, True)),
        ([], [(0, 0.5)], (False, True)),
        ([(1, math.nan), (2, math.inf)], [(0, 0.5), (2, 0.5)], (False, True)),
        ([(1, 1e12), (2, -1e12)], [(0, math.nan), (2, math.nan)], (True, False)),
    ],
    ids=["a run", "no step", "no finite loss", "no metric"],
)
def test_the_loss_is_above_the_metric(tmp_path: Path, loss: Points, metric: Points, drawn: tuple[bool, bool]) -> None:
    file = tmp_path / "curves.png"
    draw_curves(file, "title", loss, metric, "loss", "accuracy")
    assert Image.open(file).size == (840, 720)
    blue, orange = (rows_with(color, file) for color in (BLUE, ORANGE))
    assert (blue != [], orange != []) == drawn
    assert all(row < 360 for row in blue)
    assert all(row > 360 for row in orange)


def test_a_run_leaves_its_own(config: TrainConfig) -> None:
    file = train(config).folder / "curves.png"
    assert rows_with(BLUE, file) != [] != rows_with(ORANGE, file)
