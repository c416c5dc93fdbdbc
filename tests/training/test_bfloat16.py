"""What a run computes in where nobody says it: decided once, by the machine, kept, and told."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from samples import Interrupt, reviews, save_tiny_model, write_csv
from typer.testing import CliRunner

from fastpeft import TrainConfig, train
from fastpeft.cli import app
from fastpeft.ops.frozen_linear import PackedLinear
from fastpeft.prompts.template import Prompt
from fastpeft.training.estimates import plan
from fastpeft.training.evaluation import evaluate
from fastpeft.training.loading import load_run
from fastpeft.training.prediction import Predictor
from fastpeft.training.session import tell_of_precision
from fastpeft.training.setup import RunSetup, resolve
from fastpeft.training.task import Task


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    model = save_tiny_model(tmp_path / "model")
    data = write_csv(tmp_path / "reviews.csv", reviews(40))
    return TrainConfig(output=str(tmp_path / "run"), method="lora", model=str(model), data=str(data), batch_size=8)


def on_a_machine(monkeypatch: pytest.MonkeyPatch, has: bool, device: Any = "cpu") -> None:
    monkeypatch.setattr("fastpeft.training.setup.prefers_bfloat16", lambda: has)
    monkeypatch.setattr("fastpeft.training.setup.best_device", lambda: device)


@pytest.mark.parametrize(
    ("has", "changes", "expected"),
    [
        (True, {}, True),
        (True, {"method": "k-lst"}, True),
        (True, {"deterministic": True}, True),
        (False, {}, False),
        (True, {"bf16": False}, False),
        (False, {"bf16": True}, True),
        (True, {"method": "mezo"}, False),
        (True, {"method": "mezo", "bf16": True}, True),
        (True, {"settings": {"fp16": True}}, False),
    ],
)
def test_the_machine_decides_where_nobody_does(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, has: bool, changes: dict[str, Any], expected: bool
) -> None:
    on_a_machine(monkeypatch, has)
    assert resolve(replace(config, **changes)).config.bf16 is expected


@pytest.mark.parametrize(("settings", "expected"), [({}, False), ({"use_cpu": True}, True)])
def test_on_a_gpu_nothing_changes(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], expected: bool
) -> None:
    on_a_machine(monkeypatch, True, torch.device("cuda"))
    assert resolve(replace(config, settings=settings)).config.bf16 is expected


def test_a_run_keeps_and_tells_what_it_computes_in(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    on_a_machine(monkeypatch, True)
    with caplog.at_level(logging.INFO, "fastpeft"):
        result = train(replace(config, max_steps=3))
    assert "computing in bfloat16" in caplog.text
    assert json.loads((result.folder / "run.json").read_text())["bf16"] is True
    assert result.metrics["compute_dtype"] == "bfloat16"
    assert "| bf16 | True |" in (result.folder / "README.md").read_text()
    assert all(
        weight.dtype == torch.float32 for weight in load_file(result.folder / "adapter_model.safetensors").values()
    )
    on_a_machine(monkeypatch, False)  # the same answers elsewhere
    assert load_run(result.folder).config.bf16 is True
    assert evaluate(result.folder)["accuracy"] == result.metrics["accuracy"]


@pytest.mark.parametrize(
    ("changes", "slow"),
    [({"bf16": True}, True), ({"method": "lst", "settings": {"backbone_dtype": "bfloat16"}}, True), ({}, False)],
)
@pytest.mark.parametrize("has", [True, False])
def test_that_it_is_slow_is_said(
    config: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    has: bool,
    changes: dict[str, Any],
    slow: bool,
) -> None:
    on_a_machine(monkeypatch, has)
    monkeypatch.setattr("fastpeft.training.session.has_bfloat16", lambda: has)
    train(replace(config, max_steps=1, **changes))
    assert ("no bfloat16 instructions" in caplog.text) is (slow and not has)


@pytest.mark.parametrize("has", [True, False])
def test_a_gpu_that_emulates_it_is_told(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, has: bool
) -> None:
    monkeypatch.setattr("fastpeft.training.setup.best_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has or including_emulation)
    for bf16, use_cpu in product((True, False), repeat=2):
        caplog.clear()
        given = replace(config, bf16=bf16, settings={"use_cpu": use_cpu})
        tell_of_precision(given, given)
        assert ("emulates them slowly" in caplog.text) is (bf16 and not (has or use_cpu))


@pytest.mark.parametrize("use_cpu", [True, False])
def test_weights_are_packed_where_a_cpu_trains(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, use_cpu: bool
) -> None:
    on_a_machine(monkeypatch, has=False, device=torch.device("cuda"))
    task = Task.load(replace(config, settings={"use_cpu": use_cpu}))
    assert any(isinstance(module, PackedLinear) for module in task.model.modules()) is use_cpu


@pytest.mark.parametrize("has", [True, False])
def test_a_run_goes_on_with_what_it_began_with(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, has: bool
) -> None:
    config = replace(config, max_steps=6, save_steps=2)
    on_a_machine(monkeypatch, has)
    whole = train(replace(config, output=str(tmp_path / "whole")))
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[Interrupt(3)])
    on_a_machine(monkeypatch, not has)
    resumed = train(config, resume=True)
    assert resumed.metrics["compute_dtype"] == whole.metrics["compute_dtype"] == ("bfloat16" if has else "float32")
    expected = load_file(whole.folder / "adapter_model.safetensors")
    found = load_file(resumed.folder / "adapter_model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_plan_is_of_what_the_run_would_compute_in(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_machine(monkeypatch, True)
    planned, float32 = plan(config), plan(replace(config, bf16=False))
    assert (planned.compute_dtype, float32.compute_dtype) == ("bfloat16", "float32")
    assert planned.peak_memory_mb == plan(replace(config, bf16=True)).peak_memory_mb
    assert planned.peak_memory_mb != float32.peak_memory_mb


@pytest.mark.parametrize(
    ("options", "expected"), [([], "bfloat16"), (["--bf16"], "bfloat16"), (["--no-bf16"], "float32")]
)
def test_the_command_line(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, options: list[str], expected: str
) -> None:
    on_a_machine(monkeypatch, True)
    command = ["train", "--method", "head", "--model", config.model, "--data", config.data, "--max-steps", "1"]
    shown = CliRunner().invoke(app, [*command, "--output", config.output, *options])
    assert shown.exit_code == 0, shown.output
    assert json.loads((Path(config.output) / "metrics.json").read_text())["compute_dtype"] == expected
    assert "compute dtype" in shown.stdout
    assert expected in shown.stdout


def test_a_run_that_finds_its_prompt_keeps_it_too(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_machine(monkeypatch, True)
    monkeypatch.setattr(
        "fastpeft.training.task.search_prompt",
        lambda given, *_: replace(given, found_prompt=Prompt("{text} So <mask>", ["dull", "lovely"]).values()),
    )
    prompted = replace(config, prompt="auto")

    def load(setup: RunSetup) -> None:
        raise _LoadedError(setup)

    monkeypatch.setattr("fastpeft.training.task.load_start", load)
    with pytest.raises(_LoadedError) as loaded:
        Task.load(prompted)
    assert loaded.value.args[0].config.bf16 is True


class _LoadedError(Exception):
    """Ends a task where its model would be loaded."""


@pytest.mark.parametrize("method", ["full", "siva", "k-lst"])
def test_numbers_have_more_digits_than_bfloat16(config: TrainConfig, tmp_path: Path, method: str) -> None:
    """Else of 200 texts 56 had numbers of their own, and steps of 8 lay between those above 1,000."""
    rows = [(text, str(row + 0.25)) for row, (text, _) in enumerate(reviews(40))]
    data = write_csv(tmp_path / "numbers.csv", rows)
    run = train(replace(config, method=method, data=str(data), max_steps=2, bf16=True))
    predictor = Predictor(run.folder)
    (number,) = predictor.scores([predictor.encode("a good film")])[0]
    assert torch.tensor(number).bfloat16().item() != number
