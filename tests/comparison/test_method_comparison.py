"""A cell in the schema of PEFT's `method_comparison`: each number is that of the run, of every kind of run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from compared import config, finish

from fastpeft.comparison.cells import Cell
from fastpeft.comparison.report import method_comparison


@pytest.fixture
def cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cell:
    monkeypatch.chdir(tmp_path)
    (cell,) = config("k-lst:save_steps=7").cells()
    return cell


def told(cell: Cell) -> dict[str, Any]:
    metrics = cell.metrics()
    assert metrics is not None
    return method_comparison.result(cell, metrics)


@pytest.mark.parametrize("kind", ["", "weighted ", "smoothed "])
def test_every_point_has_the_last_training_loss_before_it(cell: Cell, kind: str) -> None:
    finish(cell, 100, 10.0, 1.0, steps=80)
    file = cell.folder.path / "curves.json"
    curves = json.loads(file.read_text())
    file.write_text(json.dumps({f"{kind}training loss": curves.pop("training loss"), **curves}))
    course = told(cell)["train_info"]["metrics"]
    assert [(point["step"], point["train loss"]) for point in course] == [
        (0, None),
        (40, 1 / 40),
        (80, 1 / 80),
        (80, 1 / 80),
    ]


def test_the_last_point_is_of_the_step_whose_weights_were_kept(cell: Cell) -> None:
    finish(cell, 100, 10.0, 1.0, steps=80, best_step=40)
    last = told(cell)["train_info"]["metrics"][-1]
    assert (last["step"], last["train loss"]) == (40, 1 / 40)


@pytest.mark.parametrize(("dtype", "is_mixed"), [("float32", False), ("bfloat16", True), ("float16", True)])
def test_amp_is_what_a_step_computes_in(cell: Cell, dtype: str, is_mixed: bool) -> None:
    finish(cell, 100, 10.0, 1.0, compute_dtype=dtype)
    assert told(cell)["run_info"]["train_config"]["use_amp"] is is_mixed


@pytest.mark.usefixtures("cell")
@pytest.mark.parametrize(
    ("options", "dtype"), [("", "float32"), (":dtype=bfloat16", "bfloat16"), (":backbone_dtype=nf4", "nf4")]
)
def test_the_dtype_is_that_of_the_frozen_weights(options: str, dtype: str) -> None:
    (cell,) = config(f"k-lst{options}").cells()
    finish(cell, 100, 10.0, 1.0)
    assert told(cell)["run_info"]["train_config"]["dtype"] == dtype


def test_dev_rows_are_measured_as_often_as_the_curve_says(cell: Cell) -> None:
    finish(cell, 100, 10.0, 1.0)
    assert told(cell)["run_info"]["train_config"]["eval_steps"] == 40, "not at the checkpoints, every 7 steps"
    (cell.folder.path / "curves.json").unlink()
    assert told(cell)["run_info"]["train_config"]["eval_steps"] is None


def test_the_size_is_that_of_the_whole_result(cell: Cell) -> None:
    finish(cell, 100, 10.0, 1.0)
    for name, size in (("model.safetensors", 100), ("adapter/adapter_model.safetensors", 20)):
        (cell.folder.path / name).parent.mkdir(exist_ok=True)
        (cell.folder.path / name).write_bytes(bytes(size))
    checkpoint = cell.folder.path / "checkpoints" / "checkpoint-7"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(bytes(3))
    assert told(cell)["train_info"]["file_size"] == 120
