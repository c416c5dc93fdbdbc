"""What a dry run says that cells would take."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from samples import completions, reviews, save_tiny_decoder, save_tiny_model, write_csv, write_jsonl
from typer.testing import CliRunner

from fastpeft import CompareConfig, train
from fastpeft.cli import app
from fastpeft.comparison.run import Comparison
from fastpeft.training import estimates
from fastpeft.training.arguments import training_arguments
from fastpeft.training.estimates import Estimate, _padded_tokens, estimate, plan
from fastpeft.training.row_order import LengthGroupedOrder
from fastpeft.training.task import Task
from fastpeft.training.trainer import RunTrainer

TOO_HIGH = "siva:targets=query:rank=99"


@pytest.fixture
def config(tmp_path: Path) -> CompareConfig:
    save_tiny_model(tmp_path / "model")
    write_csv(tmp_path / "reviews.csv", reviews(60))
    common = {"model": str(tmp_path / "model"), "data": str(tmp_path / "reviews.csv"), "epochs": 2}
    methods = ["head", "lst:init_from=mezo:eps=1e-2", "mezo:eps=1e-2", TOO_HIGH, "zero-shot:prompt=sst2"]
    return CompareConfig(output=str(tmp_path / "out"), methods=methods, common=common, seeds=2)


def test_estimates(config: CompareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    stand_in = SimpleNamespace(run=lambda command, **options: started.append(command), DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr(estimates, "subprocess", stand_in)
    found = Comparison(config).estimates()
    assert [command[:2] for command in started] == [[sys.executable, "-c"]], "one process is timed for all"
    assert list(found) == ["head", "mezo:eps=1e-2", "lst:init_from=mezo:eps=1e-2", TOO_HIGH], "one for all seeds"
    assert found["head"].memory_mb == plan(config.cells()[0].config).peak_memory_mb
    for variant in ("head", "lst:init_from=mezo:eps=1e-2", "mezo:eps=1e-2"):
        few, many = (found[variant].seconds(rows) for rows in (10, 1000))
        assert few is not None
        assert many is not None
        assert 0 < few < many
    failed = found[TOO_HIGH]
    assert "99" in (failed.error or "")
    assert (failed.seconds(10), failed.fits(1000)) == (None, None)
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_the_process_that_is_timed_loads_its_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    ended, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: ended.append(run(*args, **options)))
    assert estimates.process_seconds() > 0
    assert [(process.returncode, process.stderr) for process in ended] == [(0, b"")]


def test_what_is_above_the_budget_is_not_run(config: CompareConfig) -> None:
    head = estimate(config.cells()[0].config, budget_mb=0.001)
    assert head.memory_mb is not None
    assert (head.fits(0.001), head.fits(head.memory_mb), head.seconds(10)) == (False, True, None)


def test_a_plan_loads_and_simulates_once(config: CompareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    load, simulated = Task.load, estimates.simulated_peak_mb
    monkeypatch.setattr(Task, "load", lambda config: [calls.append("load"), load(config)][1])
    monkeypatch.setattr(estimates, "simulated_peak_mb", lambda *args: [calls.append("peak"), simulated(*args)][1])
    head = config.cells()[0].config
    assert plan(head).estimate.seconds(10) is None
    assert calls == ["load", "peak"]
    timed = plan(head, timed=True)
    assert calls == ["load", "peak"] * 2
    assert timed.steps == 8, "of 54 rows in batches of 16, for two epochs"
    assert timed.estimate.seconds(10) is not None


@pytest.mark.parametrize("place", ["prediction_step", "training_step"])
def test_a_trial_that_runs_out_of_memory_leaves_the_estimate(
    config: CompareConfig, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(f"transformers.Trainer.{place}", fail)
    head = config.cells()[0].config
    found = plan(head, timed=True)
    assert found.peak_memory_mb == plan(head).peak_memory_mb
    assert "memory is not enough for batch_size 16" in (found.estimate.error or "")
    assert found.estimate.seconds(10) is None


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({"epochs": 1.5}, 81.0),
        ({"max_steps": 5}, 80.0),
        ({"max_steps": 5, "settings": {"gradient_accumulation_steps": 3}}, 240.0),
        ({"settings": {"gradient_accumulation_steps": 3}}, 108.0),
    ],
    ids=str,
)
def test_a_plan_and_a_comparison_count_the_same_rows(
    config: CompareConfig, changes: dict[str, Any], rows: float
) -> None:
    cell = config.cells()[0]
    assert plan(replace(cell.config, **changes)).rows == rows
    comparison, values = Comparison(config), {**cell.values, **changes}
    assert comparison.rows_trained(replace(cell, values=values)) == rows
    tried = replace(cell, values=values, search=True)  # it learns from two thirds of the training rows
    assert comparison.rows_trained(tried) == (rows if "max_steps" in changes else rows * 2 / 3)


def test_the_time_of_a_dry_run_is_of_all_rows(config: CompareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "_estimate", lambda *_: Estimate(1.0, 0.0, 1.0))
    values = config.cells()[0].values
    command = ["train", "--method", "head", "--model", values["model"], "--data", values["data"], "--dry-run"]
    command += ["--max-steps", "3", "--set", "gradient_accumulation_steps=50", "--output", values["output"]]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    assert re.search(r"estimated time\W+40 min", shown.stdout), "3 steps of 50 batches of 16 rows, each a second"


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({"max_steps": 2}, 0),
        ({"max_steps": 12}, 3 * 6),
        ({"max_steps": 12, "settings": {"eval_steps": 2}}, 5 * 6),
        ({"max_steps": 5, "save_steps": 2, "metric": "loss"}, 3 * 6),
    ],
    ids=str,
)
def test_the_time_counts_the_rows_that_a_run_measures(
    config: CompareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], rows: int
) -> None:
    measured: list[int] = []
    evaluate = RunTrainer.evaluate

    def counted(self: RunTrainer, rows: Any = None, **kwargs: Any) -> dict[str, float]:
        measured.append(len(self.eval_dataset if rows is None else rows))
        return evaluate(self, rows, **kwargs)

    monkeypatch.setattr(RunTrainer, "evaluate", counted)
    head = replace(config.cells()[0].config, output=str(tmp_path / "run"), batch_size=2, **changes)
    task = Task.load(head)
    assert estimates._measured_between(task, training_arguments(task, str(tmp_path))) == rows
    train(head)
    assert sum(measured) == 6 + rows + 6, "before, between and after"
    measured.clear()
    plan(head, timed=True)
    assert measured == [6], "the trial measures once"


@pytest.mark.parametrize("packing", [False, True])
def test_the_time_is_that_of_all_tokens_with_padding(
    config: CompareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: bool
) -> None:
    """By a clock that goes on by a second with each token of a step, and by ten with each dev row."""
    head = replace(config.cells()[0].config, batch_size=64, max_steps=2)
    if packing:
        model, data = save_tiny_decoder(tmp_path / "decoder"), write_jsonl(tmp_path / "pairs.jsonl", completions(60))
        head = replace(head, method="full", model=str(model), data=str(data), objective="causal", packing=True)
    now, tokens = [0.0], [0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    training_step, measure = RunTrainer.training_step, RunTrainer.measure

    def timed_step(self: RunTrainer, model: Any, inputs: Any, *others: Any) -> Any:
        tokens[0] = inputs["input_ids"].numel()
        now[0] += tokens[0] + 1e6 * (not self.state.global_step)  # the first step allocates
        return training_step(self, model, inputs, *others)

    def timed_measure(self: RunTrainer, rows: Any) -> Any:
        now[0] += 10 * len(rows)
        return measure(self, rows)

    monkeypatch.setattr(RunTrainer, "training_step", timed_step)
    monkeypatch.setattr(RunTrainer, "measure", timed_measure)
    told = plan(head, timed=True)
    assert told.estimate.row_seconds == tokens[0] / told.train_rows, "all texts are in one batch"
    assert told.estimate.start_seconds == 10 * 3 * told.dev_rows, "before, between and after"


def test_a_dry_run_of_masked_words(config: CompareConfig) -> None:
    found = plan(replace(config.cells()[0].config, method="lora", objective="mlm"), timed=True).estimate
    assert found.error is None
    assert (found.seconds(10) or 0) > 0


@pytest.mark.parametrize("settings", [{"optim": "x"}, {"eval_accumulation_steps": 0}], ids=str)
def test_settings_that_cannot_be_used_are_the_estimate(config: CompareConfig, settings: dict[str, Any]) -> None:
    found = estimate(replace(config.cells()[0].config, settings=settings))
    assert f"cannot take the settings {settings}" in (found.error or "")


@pytest.mark.long(but="None")
@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_activations_that_are_computed_again_take_less(config: CompareConfig, use_reentrant: bool | None) -> None:
    full = replace(config.cells()[0].config, method="full", bf16=False)  # activations are more of it in float32
    kwargs = {} if use_reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    again = plan(replace(full, settings={"gradient_checkpointing": True, **kwargs})).peak_memory_mb
    kept = plan(full).peak_memory_mb
    assert again is not None
    assert kept is not None
    assert again < 0.8 * kept


def test_packs_that_measuring_leaves_are_counted(
    config: CompareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny_model(tmp_path / "larger", hidden_size=256, intermediate_size=1024)
    lora = replace(config.cells()[0].config, method="lora", model=str(model), batch_size=1, bf16=False)

    def peak(least: int) -> float:
        monkeypatch.setattr("fastpeft.ops.packing.is_faster_packed", lambda rows, dtype: rows >= least)
        return plan(lora).peak_memory_mb or math.nan

    longest = plan(lora).longest_row
    assert peak(longest + 1) > peak(10**6) + 256 * 1024 * 4 / 2**20, "of six dev rows together, and of no training row"


def test_the_state_is_that_of_the_optimizer(config: CompareConfig, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "larger", hidden_size=256, intermediate_size=1024)
    full = replace(config.cells()[0].config, method="full", model=str(model), batch_size=1)

    def peak(**settings: Any) -> float:
        return plan(replace(full, settings=settings)).peak_memory_mb or math.nan

    weights = plan(full).parameters * 4 / 2**20
    none, whole = peak(optim="sgd", weight_decay=0.0), peak()
    assert whole == peak(optim="adamw_torch")
    assert whole - none == pytest.approx(2 * weights, rel=0.1), "the two moments"
    assert peak(optim="adamw_8bit") - none == pytest.approx(2 * weights / 4, rel=0.1)
    assert peak(optim="sgd", weight_decay=0.1) > none, "decay makes a temporary"
    assert math.isnan(peak(optim="adafactor"))
    assert math.isnan(peak(optim="sgd", optim_args="momentum=0.9"))
    assert plan(replace(full, method="mezo", settings={"optim": "adafactor"})).peak_memory_mb is not None


@pytest.mark.long
def test_rows_are_told_of_once_for_all_variants(config: CompareConfig, tmp_path: Path) -> None:
    common = [f"--{key}={config.common[key]}" for key in ("model", "data")]
    command = ["compare", "--methods", "head,bitfit", *common, "--output", str(tmp_path / "out"), "--dry-run"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    assert "".join(shown.stderr.split()).count("reviews.csv:60rows") == 1, "lines break where they are full"


def test_seconds_are_of_start_and_rows() -> None:
    assert Estimate(1.0, 2.0, 0.5).seconds(10) == 7.0


def test_tokens_with_padding() -> None:
    order = LengthGroupedOrder([3, 5, 9, 2, 7], batch_size=2, seed=0)
    tokens = _padded_tokens(order, 1)
    assert len(tokens) == 3
    assert 26 <= sum(tokens) <= 2 * 9 + 2 * 7 + 5
    assert sum(_padded_tokens(order, 2)) == sum(tokens)
    assert len(_padded_tokens(order, 2)) == 2
    assert _padded_tokens(LengthGroupedOrder([2, 3], batch_size=2, seed=0), 1) == [6]
    named = LengthGroupedOrder(order.lengths, batch_size=2, seed=0, with_epoch=True)
    assert list(named) == [(0, row) for row in order]
    assert _padded_tokens(named, 1) == tokens
