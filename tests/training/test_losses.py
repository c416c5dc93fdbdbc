"""Losses for classes out of balance: against their formulas, in runs, and the threshold that goes with them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from samples import reviews, save_tiny_model, scores, tagged, write_csv, write_jsonl
from sklearn.utils.class_weight import compute_class_weight
from torch import nn
from transformers import TrainerCallback
from typer.testing import CliRunner

from fastpeft import FastpeftError, TrainConfig, train
from fastpeft.cli import app
from fastpeft.data.examples import load_data
from fastpeft.data.problems import CLASSIFICATION, MASKED_WORDS, MULTI_LABEL, TAGGING, best_threshold
from fastpeft.training.evaluation import evaluate
from fastpeft.training.loading import load_run
from fastpeft.training.losses import TrainingLoss, balanced, training_loss
from fastpeft.training.prediction import Predictor, outputs_of, predict
from fastpeft.training.task import data_for
from fastpeft.training.trainer import RunTrainer

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(7, 3, generator=GENERATOR, dtype=torch.float64)
CLASSES = torch.tensor([0, 2, 1, 1, 0, 2, 2])
FLAGS = torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 0, 0], [1, 1, 1], [0, 0, 1], [1, 0, 0], [0, 0, 1]])
WEIGHTS = torch.tensor([0.5, 2.0, 1.25])
SKEWED = [*reviews(40, ("negative",)), *reviews(8, ("positive",), seed=1)]


# -- formulas --------------------------------------------------------------------------------------------------------


def test_without_weights_and_gamma_it_is_the_cross_entropy() -> None:
    for logits in (LOGITS, LOGITS.float()):
        found = TrainingLoss(CLASSIFICATION)(logits, CLASSES)
        torch.testing.assert_close(found, F.cross_entropy(logits, CLASSES), rtol=1e-7, atol=1e-7)
        found = TrainingLoss(MULTI_LABEL)(logits, FLAGS)
        torch.testing.assert_close(
            found, F.binary_cross_entropy_with_logits(logits, FLAGS.to(logits)), rtol=1e-7, atol=1e-7
        )


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_weights_and_gamma_follow_the_formula(gamma: float) -> None:
    chosen = LOGITS.softmax(-1)[torch.arange(7), CLASSES]
    each = WEIGHTS.double()[CLASSES] * (1 - chosen) ** gamma * -chosen.log()
    found = TrainingLoss(CLASSIFICATION, WEIGHTS, gamma)(LOGITS, CLASSES)
    torch.testing.assert_close(found, each.mean())
    p = torch.where(FLAGS.bool(), LOGITS.sigmoid(), 1 - LOGITS.sigmoid())
    each = torch.where(FLAGS.bool(), WEIGHTS.double(), 1.0) * (1 - p) ** gamma * -p.log()
    torch.testing.assert_close(TrainingLoss(MULTI_LABEL, WEIGHTS, gamma)(LOGITS, FLAGS), each.mean())
    # tokens without a label are left out
    labels = torch.cat([CLASSES, torch.tensor([-100])]).view(2, 4)
    logits = torch.cat([LOGITS, torch.full((1, 3), 9.0)]).view(2, 4, 3)
    torch.testing.assert_close(TrainingLoss(TAGGING, WEIGHTS, gamma)(logits, labels), found)
    assert TrainingLoss(TAGGING, WEIGHTS, gamma)(logits.bfloat16(), labels).dtype is torch.float32


def test_label_weights_are_those_of_torch() -> None:
    found = TrainingLoss(MULTI_LABEL, WEIGHTS)(LOGITS, FLAGS)
    torch.testing.assert_close(found, nn.BCEWithLogitsLoss(pos_weight=WEIGHTS.double())(LOGITS, FLAGS.double()))


@pytest.mark.parametrize(("problem", "labels"), [(CLASSIFICATION, CLASSES), (MULTI_LABEL, FLAGS)])
def test_gradients(problem: Any, labels: torch.Tensor) -> None:
    logits = LOGITS.clone().requires_grad_()
    loss = TrainingLoss(problem, WEIGHTS, 0.5)
    assert torch.autograd.gradcheck(lambda given: loss(given, labels), (logits,))
    # where the answer is certain, a power below 1 has no slope
    certain = torch.full((7, 3), -200.0).scatter(1, CLASSES[:, None], 200.0).requires_grad_()
    TrainingLoss(CLASSIFICATION, None, 0.5)(certain, CLASSES).backward()
    assert certain.grad is not None
    assert certain.grad.isfinite().all()


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
    weighted = replace(config, class_weights="balanced", focal_gamma=2.0, max_steps=1, settings={"logging_steps": 1})
    losses = Losses()
    result = train(weighted, callbacks=[losses])
    rows, loss = data_for(weighted), training_loss(weighted, data_for(weighted))
    assert loss.weights is not None
    assert loss.weights[1] > 2 * loss.weights[0]
    # at first each class has about half a chance: a focal loss of about a quarter of log 2
    assert losses.found[0] == pytest.approx(0.25 * 0.69, abs=0.12)
    assert len(rows.train) == result.metrics["train_rows"]
    plain = evaluate(result.folder)
    assert result.metrics["loss"] == pytest.approx(plain["loss"], abs=1e-4)
    curves = json.loads((result.folder / "curves.json").read_text())
    assert "weighted focal training loss" in curves
    assert "training loss" not in curves
    card = (result.folder / "README.md").read_text()
    assert "| class_weights | balanced |" in card
    assert "| focal_gamma | 2.0 |" in card


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
        ({"data": "scores", "focal_gamma": 2.0}, "focal_gamma is 2.0, which is for classes"),
        ({"data": "tagged", "threshold": "auto"}, "for two classes, .* but the data has 4 tags"),
        ({"data": "scores", "threshold": "auto"}, "but the data has numbers"),
        ({"class_weights": "heavy"}, "class_weights is 'heavy'; it must be balanced"),
        ({"focal_gamma": -1.0}, "focal_gamma is -1.0; it must be a number above 0"),
        ({"threshold": "0.5"}, "threshold is '0.5'; it must be auto"),
        ({"objective": "mlm", "focal_gamma": 2.0}, "the objective 'mlm' learns from texts without labels"),
        ({"focal_gamma": 2.0, "settings": {"label_smoothing_factor": 0.1}}, "does not go with class_weights"),
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


# -- threshold -------------------------------------------------------------------------------------------------------


def test_the_best_threshold_lies_between_two_rows() -> None:
    logits = np.array([-3.0, -2.0, -1.0, 0.5, 1.0])
    labels = np.array([0, 1, 1, 0, 1])
    outputs = np.stack([np.zeros(5), logits], axis=1)
    threshold = best_threshold(CLASSIFICATION, outputs, labels)
    sigmoid = 1 / (1 + np.exp(-logits))
    assert threshold == pytest.approx((sigmoid[0] + sigmoid[1]) / 2)
    # no other does better
    f1 = [
        CLASSIFICATION.score(CLASSIFICATION.decided(outputs, t), labels, ["no", "yes"])["f1"]
        for t in (threshold, *np.linspace(0.01, 0.99, 99))
    ]
    assert f1[0] == max(f1) == pytest.approx(6 / 7)
    assert best_threshold(CLASSIFICATION, outputs, np.ones(5)) == 0.5
    flat = best_threshold(MULTI_LABEL, logits[:, None], labels[:, None].astype(float))
    assert flat == pytest.approx(threshold)


@pytest.mark.parametrize("logits", [[17.6, 18.2, 19.0, 20.0], [21.0, 22.0, 25.0, 26.0], [-26.0, -25.0, -22.0, -21.0]])
def test_a_threshold_near_one_decides_between_the_same_rows_wherever_it_is_used(logits: list[float]) -> None:
    outputs = np.stack([np.zeros(4), logits], axis=1).astype(np.float32)
    labels = np.array([0, 0, 1, 1])
    threshold = best_threshold(CLASSIFICATION, outputs, labels)
    assert CLASSIFICATION.answers(CLASSIFICATION.decided(outputs, threshold)).tolist() == labels.tolist()
    predictor = object.__new__(Predictor)
    predictor.run = SimpleNamespace(problem=CLASSIFICATION, threshold=threshold, labels=["no", "yes"])
    said = [predictor.answer(each)[0] for each in predictor.scores_of([], list(outputs))]
    assert said == ["no", "no", "yes", "yes"]


def test_a_threshold_is_chosen_on_rows_apart_by_processes_that_persist(config: TrainConfig) -> None:
    """They load the rows of each evaluation, not those of the first."""
    config = replace(config, threshold="auto", max_steps=2)
    settings = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    found = train(replace(config, output=f"{config.output}-persist", settings=settings)).metrics
    expected = train(config).metrics
    assert [found[name] for name in ("threshold", "loss")] == [expected[name] for name in ("threshold", "loss")]


def test_a_threshold_is_chosen_on_rows_apart_and_used_after(config: TrainConfig, tmp_path: Path) -> None:
    # a model that answers each text otherwise
    shape = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = str(save_tiny_model(tmp_path / "model", initializer_range=0.3, **shape))
    config = replace(config, model=model, threshold="auto", max_steps=2, learning_rate=3e-3)
    result = train(config)
    metrics, data = result.metrics, data_for(config)
    assert data.threshold_data is not None
    assert not set(data.threshold_data.texts) & {*data.train.texts, *data.dev.texts}
    assert (metrics["train_rows"], metrics["threshold_rows"]) == (len(data.train), len(data.threshold_data))
    assert len(data.train) + len(data.threshold_data) == len(load_data(config.data).train.texts)
    run, apart = load_run(result.folder), data.threshold_data
    outputs = np.stack(outputs_of(run, run.encoder.encode(apart)))
    chosen = best_threshold(CLASSIFICATION, outputs, np.array(apart.labels))
    assert metrics["threshold"] == pytest.approx(chosen, abs=1e-4), "by these rows alone"
    assert metrics["threshold"] != 0.5
    found = evaluate(result.folder)
    for name in ("accuracy", "f1", "loss", "threshold"):
        assert metrics[name] == pytest.approx(found[name], abs=1e-4)
    answers = json.loads((result.folder / "predictions.json").read_text())
    said = [data.labels.index(name) for name, _ in predict(result.folder, data.dev.texts)]
    assert answers == {"labels": data.dev.labels, "predictions": said}, "for paired tests: by row, and the threshold"
    assert {*said} == {0, 1}
    few = [[text for text in each["warnings"] if "threshold" in text] for each in (metrics, found)]
    assert few[0] == few[1] != []
    # a text is answered by the threshold, not by what is likelier
    kept = json.loads((result.folder / "metrics.json").read_text())
    said = predict(result.folder, ["a dull film", "a lovely film"])
    second = [p if name == "positive" else 1 - p for name, p in said]
    for threshold, name in ((min(second) / 2, "positive"), ((1 + max(second)) / 2, "negative")):
        (result.folder / "metrics.json").write_text(json.dumps({**kept, "threshold": threshold}))
        assert {name for name, _ in predict(result.folder, ["a dull film", "a lovely film"])} == {name}
        shown = CliRunner().invoke(app, ["predict", str(result.folder), "a dull film"])
        assert shown.output.startswith(f"{name}\t"), shown.output
    shown = CliRunner().invoke(app, ["eval", str(result.folder)])
    assert f"chosen on {len(data.threshold_data)} training rows" in " ".join(shown.output.replace("│", " ").split())
    card = (result.folder / "README.md").read_text()
    answered = f"positive where its probability is above {metrics['threshold']:.3f}, chosen on"
    assert answered in card
    (result.folder / "metrics.json").write_text(json.dumps(kept))
    shown = CliRunner().invoke(app, ["export", str(result.folder), str(result.folder.parent / "exported")])
    assert f"knows nothing of the threshold {metrics['threshold']:.3f}" in " ".join(shown.output.split())
    assert answered in (result.folder.parent / "exported" / "README.md").read_text()
