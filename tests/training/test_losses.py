"""The loss for classes out of balance: against its formula, and in runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from samples import reviews, save_tiny_model, scores, tagged, write_csv, write_jsonl
from sklearn.utils.class_weight import compute_class_weight
from torch import nn
from transformers import TrainerCallback

from fastpeft import FastpeftError, TrainConfig, train
from fastpeft.data.problems import CLASSIFICATION, MASKED_WORDS, MULTI_LABEL, TAGGING
from fastpeft.training.evaluation import evaluate
from fastpeft.training.losses import TrainingLoss, balanced, training_loss
from fastpeft.training.task import data_for
from fastpeft.training.trainer import RunTrainer

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(7, 3, generator=GENERATOR, dtype=torch.float64)
CLASSES = torch.tensor([0, 2, 1, 1, 0, 2, 2])
FLAGS = torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 0, 0], [1, 1, 1], [0, 0, 1], [1, 0, 0], [0, 0, 1]])
WEIGHTS = torch.tensor([0.5, 2.0, 1.25])
SKEWED = [*reviews(40, ("negative",)), *reviews(8, ("positive",), seed=1)]


# -- formulas --------------------------------------------------------------------------------------------------------


def test_weights_follow_the_formula() -> None:
    chosen = LOGITS.softmax(-1)[torch.arange(7), CLASSES]
    each = WEIGHTS.double()[CLASSES] * -chosen.log()
    found = TrainingLoss(CLASSIFICATION, WEIGHTS)(LOGITS, CLASSES)
    torch.testing.assert_close(found, each.mean())
    p = torch.where(FLAGS.bool(), LOGITS.sigmoid(), 1 - LOGITS.sigmoid())
    each = torch.where(FLAGS.bool(), WEIGHTS.double(), 1.0) * -p.log()
    torch.testing.assert_close(TrainingLoss(MULTI_LABEL, WEIGHTS)(LOGITS, FLAGS), each.mean())
    # tokens without a label are left out
    labels = torch.cat([CLASSES, torch.tensor([-100])]).view(2, 4)
    logits = torch.cat([LOGITS, torch.full((1, 3), 9.0)]).view(2, 4, 3)
    torch.testing.assert_close(TrainingLoss(TAGGING, WEIGHTS)(logits, labels), found)
    assert TrainingLoss(TAGGING, WEIGHTS)(logits.bfloat16(), labels).dtype is torch.float32


def test_label_weights_are_those_of_torch() -> None:
    found = TrainingLoss(MULTI_LABEL, WEIGHTS)(LOGITS, FLAGS)
    torch.testing.assert_close(found, nn.BCEWithLogitsLoss(pos_weight=WEIGHTS.double())(LOGITS, FLAGS.double()))


@pytest.mark.parametrize(("problem", "labels"), [(CLASSIFICATION, CLASSES), (MULTI_LABEL, FLAGS)])
def test_gradients(problem: Any, labels: torch.Tensor) -> None:
    logits = LOGITS.clone().requires_grad_()
    loss = TrainingLoss(problem, WEIGHTS)
    assert torch.autograd.gradcheck(lambda given: loss(given, labels), (logits,))


def test_balanced_weights() -> None:
    labels = [0] * 6 + [1] * 3 + [3]
    weights = balanced(CLASSIFICATION, labels, 4)
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=labels)
    assert weights[[0, 1, 3]].tolist() == pytest.approx(expected.tolist())
    assert weights[2] == 1, "no row has it"
    assert balanced(TAGGING, [labels[:4], labels[4:]], 4).tolist() == weights.tolist()
    flags = [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]
    assert balanced(MULTI_LABEL, flags, 3).tolist() == [3.0, 1.0, 1.0]


# -- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    save_tiny_model(folder / "model", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    write_csv(folder / "skewed.csv", SKEWED)
    write_jsonl(folder / "tagged.jsonl", tagged(40))
    write_jsonl(folder / "scores.jsonl", scores(40))
    return folder


@pytest.fixture
def config(tmp_path: Path, place: Path) -> TrainConfig:
    given: dict[str, Any] = {"model": str(place / "model"), "data": str(place / "skewed.csv"), "learning_rate": 1e-2}
    return TrainConfig(output=str(tmp_path / "run"), method="full", max_steps=3, batch_size=8, **given)


class Losses(TrainerCallback):
    """Keeps the training losses that are logged."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.found += [logs["loss"]] if "loss" in logs else []


def test_training_lowers_it_and_reports_have_the_cross_entropy(config: TrainConfig) -> None:
    weighted = replace(config, class_weights="balanced", batch_size=48, max_steps=1, settings={"logging_steps": 1})
    losses = Losses()
    result = train(weighted, callbacks=[losses])
    rows, loss = data_for(weighted), training_loss(data_for(weighted))
    assert loss.weights[1] > 2 * loss.weights[0]
    # at first each class has about half a chance
    assert losses.found[0] == pytest.approx(0.69, abs=0.12)
    assert len(rows.train) == result.metrics["train_rows"]
    plain = evaluate(result.folder)
    assert result.metrics["loss"] == pytest.approx(plain["loss"], abs=1e-4)
    curves = json.loads((result.folder / "curves.json").read_text())
    assert "weighted training loss" in curves
    assert "training loss" not in curves
    card = (result.folder / "README.md").read_text()
    assert "| class_weights | balanced |" in card


@pytest.mark.parametrize("method", ["full", "mezo"])
def test_accumulated_batches_are_one_batch(config: TrainConfig, tmp_path: Path, method: str) -> None:
    # all rows in every step, of which some micro-batches have one class alone
    for name, rows in ("train", [*SKEWED[:6], *SKEWED[-2:]]), ("dev", SKEWED[6:16]):
        (tmp_path / "data").mkdir(exist_ok=True)
        write_csv(tmp_path / "data" / f"{name}.csv", rows)
    config = replace(config, method=method, data=str(tmp_path / "data"), class_weights="balanced", learning_rate=1e-3)
    losses, logged = {8: Losses(), 2: Losses()}, {"logging_steps": 1}
    for size, kept in losses.items():
        settings = {**logged, "gradient_accumulation_steps": 8 // size}
        train(replace(config, output=str(tmp_path / f"{size}"), batch_size=size, settings=settings), callbacks=[kept])
    assert len(losses[8].found) == 3
    assert losses[2].found == pytest.approx(losses[8].found, abs=1e-5)
    # a class has half of the loss, be it of 6 rows or of 2: a model that knows nothing has log 2
    assert losses[8].found[0] == pytest.approx(np.log(2), abs=0.05)


@pytest.mark.parametrize(
    ("accumulated", "processes", "instead"),
    [(2, 1, "with a larger batch_size instead"), (1, 2, "in one process without gradient accumulation")],
)
def test_a_warning_says_how_all_tokens_get_the_same_weight(
    caplog: pytest.LogCaptureFixture, accumulated: int, processes: int, instead: str
) -> None:
    """Processes share a batch of any size, and each has the mean of its part."""
    trainer = RunTrainer.__new__(RunTrainer)
    trainer.args = SimpleNamespace(gradient_accumulation_steps=accumulated)
    trainer.ranks, trainer.problem = SimpleNamespace(size=processes), MASKED_WORDS
    trainer.model_accepts_loss_kwargs = True
    trainer._weigh_tokens(zeroth_order=False)
    assert "each of the 2 micro-batches of a step has the same weight" in caplog.text
    assert f"{instead}, every token has the same weight" in caplog.text


def test_tags_take_weights(config: TrainConfig, place: Path) -> None:
    tags = replace(config, data=str(place / "tagged.jsonl"), method="siva", class_weights="balanced")
    result = train(tags)
    assert result.metrics["loss"] == pytest.approx(evaluate(result.folder)["loss"], abs=1e-4)


def test_tags_are_smoothed(config: TrainConfig, place: Path) -> None:
    tags = replace(config, data=str(place / "tagged.jsonl"), method="lora", settings={"label_smoothing_factor": 0.1})
    result = train(tags)
    assert "smoothed training loss" in json.loads((result.folder / "curves.json").read_text())
    assert result.metrics["loss"] == pytest.approx(evaluate(result.folder)["loss"], abs=1e-4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"data": "scores", "class_weights": "balanced"}, "class_weights is 'balanced', which is for classes"),
        ({"class_weights": "heavy"}, "class_weights is 'heavy'; it must be balanced"),
        ({"objective": "mlm", "class_weights": "balanced"}, "the objective 'mlm' learns from texts without labels"),
        ({"class_weights": "balanced", "settings": {"label_smoothing_factor": 0.1}}, "does not go with class_weights"),
    ],
)
def test_what_does_not_go_with_the_data_is_refused(
    config: TrainConfig, place: Path, given: dict[str, Any], said: str
) -> None:
    if "data" in given:
        given = {**given, "data": str(place / f"{given['data']}.jsonl")}
    with pytest.raises(FastpeftError, match=said):
        train(replace(config, **given))
    assert not Path(config.output).exists()
