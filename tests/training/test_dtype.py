"""Frozen weights that are kept in bfloat16: what trains stays in float32, and a run answers later as it did."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from samples import Interrupt, completions, reviews, save_tiny_decoder, save_tiny_model, write_csv, write_jsonl
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from fastpeft import FastpeftError, TrainConfig, train
from fastpeft.training.estimates import plan
from fastpeft.training.evaluation import evaluate
from fastpeft.training.export import export
from fastpeft.training.loading import FinishedRun, load_run
from fastpeft.training.task import Task

ADAPTERS = ({"method": "siva"}, {"method": "lora"}, {"method": "dora"}, {"method": "pissa"})
KINDS: tuple[dict[str, Any], ...] = (
    *ADAPTERS,
    {"method": "siva", "settings": {"residual": "implicit"}},
    {"method": "siva", "settings": {"residual_dtype": "nf4"}},
    {"method": "siva", "targets": "all-linear"},
    {"method": "siva", "objective": "mlm"},
    {"method": "siva", "prompt": "{text} So <mask>.", "label_words": "dull,lovely"},
    {"method": "prompt-tuning"},
    {"method": "ia3"},
    {"method": "lst"},
    {"method": "k-lst", "objective": "mlm"},
    {"method": "lst", "prompt": "{text} So <mask>.", "label_words": "dull,lovely"},
    {"method": "lst", "settings": {"siva_layers": 1}},
)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    model = save_tiny_model(tmp_path / "model")
    data = write_csv(tmp_path / "reviews.csv", reviews(40))
    return TrainConfig(
        output=str(tmp_path / "run"),
        method="siva",
        model=str(model),
        data=str(data),
        batch_size=8,
        max_steps=4,
        learning_rate=1e-2,
        dtype="bfloat16",
    )


def logits(model: Any, run: FinishedRun) -> torch.Tensor:
    rows = run.loaded.tokenizer([text for text, _ in reviews(12)], padding=True, return_tensors="pt")
    with torch.inference_mode():
        answer: torch.Tensor = model(**rows).logits
    return answer


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: " ".join(map(str, kind.values())))
def test_what_trains_is_in_float32_and_answers_are_the_same_later(config: TrainConfig, kind: dict[str, Any]) -> None:
    config = replace(config, **kind)
    parameters = dict(Task.load(config).model.named_parameters())
    assert {each.dtype for each in parameters.values() if each.requires_grad} == {torch.float32}
    frozen = {each.dtype for name, each in parameters.items() if not each.requires_grad and "embeddings." in name}
    assert frozen == {torch.bfloat16}
    result = train(config)
    saved = [load_file(file) for file in result.folder.rglob("*model.safetensors")]
    assert {tensor.dtype for tensors in saved for tensor in tensors.values()} <= {torch.float32, torch.uint8}
    again = evaluate(result.folder)
    measured = {name: value for name, value in again.items() if isinstance(value, float) and name in result.metrics}
    assert measured == pytest.approx({name: result.metrics[name] for name in measured}, rel=1e-9)
    assert "loss" in measured
    assert "load_run(" in (result.folder / "README.md").read_text()  # a plain call would round the head


def test_a_plan_counts_half_the_weights(config: TrainConfig) -> None:
    planned = [plan(replace(config, dtype=dtype, bf16=True)) for dtype in ("float32", "bfloat16")]
    sizes = [each.peak_memory_mb for each in planned]
    assert None not in sizes
    frozen = sum(each.numel() for each in Task.load(config).model.parameters() if not each.requires_grad)
    assert sizes[0] - sizes[1] == pytest.approx(2 * frozen / 2**20, abs=0.1)


def test_a_run_goes_on_in_the_dtype_it_began_with(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, save_steps=2)
    whole = train(replace(config, output=str(tmp_path / "whole")))
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[Interrupt(3)])
    resumed = train(config, resume=True)
    assert json.loads((resumed.folder / "run.json").read_text())["dtype"] == "bfloat16"
    found, expected = (load_file(each.folder / "adapter_model.safetensors") for each in (resumed, whole))
    assert all(found[name].equal(expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ADAPTERS, ids=lambda kind: kind["method"])
def test_a_merge_is_in_float32(config: TrainConfig, tmp_path: Path, kind: dict[str, Any]) -> None:
    """In bfloat16 it would lose what was trained: a change is smaller than a rounding of the weight."""
    run = load_run(train(replace(config, **kind)).folder)
    expected = logits(run.loaded.model.float(), run)
    export(config.output, tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert {each.dtype for each in merged.parameters()} == {torch.float32}
    assert (logits(merged.eval(), run) - expected).abs().max() < 1e-6


@pytest.mark.parametrize(("first", "later"), [("siva", "lora"), ("lst", "lst")])
def test_a_later_run_has_float32(config: TrainConfig, tmp_path: Path, first: str, later: str) -> None:
    earlier = load_run(train(replace(config, method=first)).folder)
    chained = replace(config, method=later, dtype=None, bf16=False, init_from=config.output, output=str(tmp_path / "b"))
    model = Task.load(chained).model.eval()
    assert {each.dtype for each in model.parameters()} == {torch.float32}
    difference = logits(model, earlier) - logits(earlier.loaded.model.float(), earlier)
    assert difference.abs().max() < (1e-6 if first == "siva" else 1e-2)  # a side network is beside the files' weights


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "full"}, "saves the whole model.*such as siva, lora or lst"),
        ({"method": "head"}, "saves the whole model"),
        ({"method": "mezo", "settings": {"over": "lora"}}, "less than a rounding to bfloat16"),
        ({"bf16": False}, "takes bf16, which is off"),
        ({"settings": {"fp16": True}}, "fp16 in its place"),
        ({"dtype": "float16"}, "dtype is 'float16'; it must be float32 or bfloat16"),
    ],
)
def test_where_it_would_not_serve_it_is_refused(config: TrainConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FastpeftError, match=message):
        replace(config, **changes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"dtype": None}, True), ({"dtype": "float32"}, False), ({"dtype": None, "method": "full"}, False)],
)
def test_a_model_that_is_stored_so_is_told(
    config: TrainConfig, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], told: bool
) -> None:
    model = AutoModelForMaskedLM.from_pretrained(config.model, dtype="bfloat16")
    model.save_pretrained(config.model)
    with caplog.at_level(logging.INFO, "fastpeft"):
        train(replace(config, max_steps=1, **changes))
    assert ("keeps its weights as they are" in caplog.text) is told


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_of_a_tied_decoder_train_and_are_saved(tmp_path: Path, dtype: str) -> None:
    model = save_tiny_decoder(tmp_path / "model", tie_word_embeddings=True)
    data = write_jsonl(tmp_path / "rows.jsonl", completions(24))
    given = {"model": str(model), "data": str(data), "output": str(tmp_path / "run")}
    settings = {"trainable_token_indices": [5, 6]}
    config = TrainConfig(**given, method="siva", objective="causal", max_steps=2, dtype=dtype, settings=settings)
    result = train(config)
    assert evaluate(result.folder)["loss"] == pytest.approx(result.metrics["loss"], rel=1e-6)


def test_biases_that_would_train_in_bfloat16_are_refused(config: TrainConfig) -> None:
    with pytest.raises(FastpeftError, match=r"LayerNorm\.bias would train in bfloat16"):
        train(replace(config, method="lora", settings={"bias": "all"}))


def test_a_start_from_another_run_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    train(config)
    with pytest.raises(FastpeftError, match="is merged into weights in float32"):
        replace(config, init_from=config.output, output=str(tmp_path / "later"))
