"""Operation counts grow as they should, slopes are slopes, and every axis is recorded, on tiny sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import harness, plot, scaling
from bench.scaling import AXES, Sizes, exponent, features, operations
from fastpeft import LadderModel

TINY = Sizes(window=3, batch=2, length=6, layers=2, width=32)


def test_the_slope_of_a_power_is_its_exponent() -> None:
    sizes = [2, 3, 7, 20]
    assert exponent(sizes, [5.0 * size**1.7 for size in sizes]) == pytest.approx(1.7)
    assert exponent(sizes, [4.0] * 4) == pytest.approx(0.0)


@pytest.mark.parametrize("method", AXES)
def test_rows_and_layers_of_like_windows_count_once_each(method: str) -> None:
    sizes = Sizes(window=1)
    assert operations(method, replace(sizes, batch=16)) == 2 * operations(method, sizes)
    assert operations(method, replace(sizes, layers=16)) == 2 * operations(method, sizes)


def test_a_window_has_only_the_features_that_there_are() -> None:
    assert features(Sizes(window=1, layers=4)) == 1
    assert features(Sizes(window=3, layers=4)) == (3 + 3 + 3 + 2) / 4
    assert features(Sizes(window=99, layers=4)) == 5


def test_a_side_network_has_as_many_blocks_as_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[LadderModel] = []
    monkeypatch.setattr(scaling, "LadderModel", lambda *given: made.append(LadderModel(*given)) or made[-1])
    scaling.step("k-lst", replace(TINY, layers=8), torch.device("cpu"))
    assert len(made[0].side.blocks) == 8


@pytest.mark.parametrize(("method", "axis"), [(method, axis) for method, axes in AXES.items() for axis in axes])
def test_every_axis_is_recorded(tmp_path: Path, method: str, axis: str) -> None:
    file = tmp_path / "scaling.csv"
    points = (32, 64) if axis == "width" else (1, 3)
    scaling.record(file, method, axis, points, torch.device("cpu"), rounds=2, base=TINY)
    rows = harness.read_rows(file)
    assert [int(row["size"]) for row in rows] == [*points]
    counted = [operations(method, replace(TINY, **{axis: point})) for point in points]
    plot.plot_scaling(rows, file.with_suffix(".png"))
    assert file.with_suffix(".png").stat().st_size > 1_000
    assert float(rows[0]["exponent_predicted"]) == pytest.approx(exponent([*points], counted), abs=0.006)
