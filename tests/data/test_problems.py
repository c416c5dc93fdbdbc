"""Every kind of problem from its rows to predictions, and what is measured of each."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from samples import (
    SMALL,
    Interrupt,
    pairs,
    reviews,
    sampled,
    save_tiny_decoder,
    save_tiny_model,
    scores,
    tagged,
    weights_of,
    write_csv,
    write_jsonl,
)
from scipy.stats import pearsonr, spearmanr
from tokenizers import normalizers
from transformers import AutoTokenizer, TrainerCallback

from fastpeft import FastpeftError, TrainConfig, train
from fastpeft.comparison.report.output import headline
from fastpeft.console import measured
from fastpeft.data.examples import Examples, load_data
from fastpeft.data.names import UNLABELLED
from fastpeft.data.problems import (
    CLASSIFICATION,
    MASKED_WORDS,
    MULTI_LABEL,
    NEXT_WORDS,
    PROBLEMS,
    REGRESSION,
    TAGGING,
    Problem,
    describe,
    in_order,
    most_frequent,
    title_of,
)
from fastpeft.data.scores import entities
from fastpeft.models import load_classifier
from fastpeft.training.encoding import Encoder
from fastpeft.training.evaluation import evaluate
from fastpeft.training.loading import load_run
from fastpeft.training.prediction import predict

LABELS = ("negative", "positive", "mixed")
ROWS: dict[str, Callable[[Path], Path]] = {
    "three classes": lambda folder: write_csv(folder / "reviews.csv", reviews(60, LABELS)),
    "pairs": lambda folder: write_jsonl(folder / "pairs.jsonl", pairs(60)),
    "regression": lambda folder: write_jsonl(folder / "scores.jsonl", scores(60)),
    "tagging": lambda folder: write_jsonl(folder / "tagged.jsonl", tagged(60)),
}
PROBLEM = {"regression": REGRESSION, "tagging": TAGGING}
INPUTS: dict[str, list[Any]] = {
    "three classes": ["a lovely film", "the plot is dull and the scene is awful"],
    "pairs": [("a lovely film", "the plot is dull"), ("awful", "a tedious story with a very clumsy end")],
    "regression": ["a lovely film", "the plot is dull and the scene is awful"],
    "tagging": [["a", "lovely", "film"], ["the", "plot", "is", "dull", "and", "the", "end", "funny"]],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def config(tmp_path: Path, checkpoint: str) -> TrainConfig:
    return TrainConfig(output=str(tmp_path / "run"), method="lora", model=checkpoint, batch_size=8)


@pytest.mark.parametrize(
    ("kind", "method"),
    sampled(
        [
            *(("regression", method) for method in SMALL),
            *(("tagging", method) for method in SMALL if method != "prompt-tuning"),
            *((kind, method) for kind in ("three classes", "pairs") for method in ("siva", "k-lst", "full")),
        ],
        but=("tagging", "mezo"),
    ),
)
def test_a_run_is_measured_and_used_as_it_was_trained(
    config: TrainConfig, tmp_path: Path, kind: str, method: str
) -> None:
    # a larger rate makes outputs of full fine-tuning one number but for rounding, whose correlation is noise
    config = replace(config, method=method, data=str(ROWS[kind](tmp_path)), max_steps=2, learning_rate=1e-3)
    folder, metrics = (result := train(config)).folder, result.metrics
    problem = PROBLEM.get(kind, CLASSIFICATION)
    assert (metrics["problem_type"], metrics["pairs"]) == (problem.name, kind == "pairs")
    found = evaluate(folder)
    with pytest.raises(FastpeftError, match="columns are those of other data"):
        evaluate(folder, label_column="nonsense")
    names = (*problem.metrics, "loss")
    assert {name: metrics[name] for name in names} == pytest.approx({name: found[name] for name in names}, abs=1e-4)
    assert f"{problem.primary}_before" in metrics
    assert metrics["peak_memory_mb"] > 0
    # the code in the model card loads what predict uses
    card = (folder / "README.md").read_text()
    assert ", ".join(metrics["labels"]) in card
    loaded: dict[str, Any] = {}
    exec(card.split("```python\n")[1].split("```")[0], loaded)
    for given, said in zip(INPUTS[kind], predict(folder, INPUTS[kind]), strict=True):
        texts = given if kind == "pairs" else [given]
        inputs = loaded["tokenizer"](*texts, is_split_into_words=kind == "tagging", return_tensors="pt")
        with torch.no_grad():
            (logits,) = loaded["model"].eval()(**inputs).logits
        if kind == "regression":
            assert said == ("score", pytest.approx(logits.item(), abs=1e-5))
            assert loaded["model"].config.problem_type == "regression"  # else a pipeline answers by a sigmoid
            continue
        likely = logits.softmax(-1).max(-1)
        if kind == "tagging":
            expected = [(metrics["labels"][tag], p) for p, tag in zip(likely.values[1:-1], likely.indices[1:-1])]
            assert said == [(tag, pytest.approx(p.item(), abs=1e-5)) for tag, p in expected]
        else:
            expected = (metrics["labels"][likely.indices], pytest.approx(likely.values.item(), abs=1e-5))
            assert said == expected


@pytest.mark.long(but="tagging-0.95")
@pytest.mark.parametrize(("kind", "least"), [("regression", 0.9), ("tagging", 0.95)])
def test_numbers_and_tags_are_learned(config: TrainConfig, tmp_path: Path, kind: str, least: float) -> None:
    data = str(ROWS[kind](tmp_path))
    given = {"epochs": 40, "learning_rate": 1e-2, "head_learning_rate": 1e-2}
    metrics = train(replace(config, method="full", data=data, **given)).metrics
    assert metrics[PROBLEM[kind].primary] > least > metrics[f"{PROBLEM[kind].primary}_before"]


def test_bf16_and_a_prompted_head_with_numbers(config: TrainConfig, tmp_path: Path) -> None:
    data = str(ROWS["regression"](tmp_path))
    prompt = {"prompt": "{text} the film is", "prompt_head": "classifier"}
    result = train(replace(config, data=data, bf16=True, max_steps=2, **prompt))
    assert evaluate(result.folder)["pearson"] == pytest.approx(result.metrics["pearson"], abs=1e-2)


# -- rows of tokens --------------------------------------------------------------------------------------------------


def test_only_the_first_token_of_a_word_is_labelled() -> None:
    tokenizer = load_classifier("demo", LABELS, TAGGING).tokenizer  # byte-level: a word can be several tokens
    words = ["unbelievablyish", "lovely", "film"]
    (row,) = Encoder(tokenizer, 64, None, TAGGING).encode(Examples([words], [[1, 2, 0]]))
    starts = [index for index, label in enumerate(row["labels"]) if label != UNLABELLED]
    assert [row["labels"][index] for index in starts] == [1, 2, 0]
    pieces = tokenizer.convert_ids_to_tokens(row["input_ids"])
    assert len(pieces) > 5
    assert [pieces[index][0] for index in starts] == ["\u0120"] * 3, "each begins a word"


def test_words_that_are_cut_off_are_told_of(
    config: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"tokens": ["the", "film", "end"], "ner_tags": ["O", "B-film", "O"]}] * 18
    data = str(write_jsonl(tmp_path / "rows.jsonl", [*rows, *[{"tokens": ["a"] * 9, "ner_tags": ["O"] * 9}] * 2]))
    config = replace(config, data=data, max_length=6, max_steps=1)  # four words and two special tokens
    folder = train(config).folder
    counts = [record.args[:3] for record in caplog.records if "words have no token within" in record.msg]
    assert sum(cut for cut, _, _ in counts) == 2 * 5
    assert sum(words for _, words, _ in counts) <= 18 * 3 + 2 * 9
    caplog.clear()
    evaluate(folder, data)
    assert "10 of 72 words have no token within the maximum length of 6" in caplog.text
    caplog.clear()
    train(replace(config, output=f"{config.output}-longer", max_length=11))
    assert "words have no token" not in caplog.text


def test_a_row_of_words_without_a_token_is_left_out(
    config: TrainConfig, checkpoint: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Alone in a batch its loss would be the mean of nothing."""
    model = shutil.copytree(checkpoint, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("@", "")
    tokenizer.save_pretrained(model)
    empty = {"tokens": ["@", "@"], "ner_tags": ["O", "O"]}
    (tmp_path / "rows").mkdir()
    for name, rows in (("train", [*tagged(5), empty]), ("dev", [*tagged(9)[5:], empty])):
        write_jsonl(tmp_path / "rows" / f"{name}.jsonl", rows)
    config = replace(config, model=str(model), data=str(tmp_path / "rows"), batch_size=1, max_steps=6)
    result = train(replace(config, method="full"))
    assert (result.metrics["train_rows"], result.metrics["dev_rows"]) == (5, 4)
    assert any("2 of " in each and "or none at all" in each for each in result.metrics["warnings"])
    assert "but for those of signs that the tokenizer drops" in caplog.text
    assert "tag of its first token" in (result.folder / "README.md").read_text()
    with pytest.raises(FastpeftError, match="no text has a word"):
        evaluate(result.folder, write_jsonl(tmp_path / "empty.jsonl", [empty]))


@pytest.mark.parametrize("prompt", [None, "{text} it is <mask>"])
def test_texts_that_are_cut_or_empty_are_told_of(
    config: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, prompt: str | None
) -> None:
    texts = ["the film", "a lovely story of a film", "the plot the plot the plot the plot the plot", " "] * 6
    data = str(write_csv(tmp_path / "rows.csv", [(text, f"{n % 2}") for n, text in enumerate(texts)]))
    words = {} if prompt is None else {"prompt": prompt, "label_words": "dull,lovely"}
    config = replace(config, method="full", data=data, max_length=8 if prompt is None else 11, max_steps=1, **words)
    folder = train(config).folder
    caplog.clear()
    evaluate(folder, data)
    longest = "8" if prompt is None else "11"
    assert f"6 of 24 texts (25 %) are longer than {longest} tokens and were truncated" in caplog.text
    assert "6 of 24 texts are empty" in caplog.text


def test_of_a_pair_the_longer_text_is_cut(checkpoint: str) -> None:
    tokenizer = load_classifier(checkpoint, LABELS, CLASSIFICATION).tokenizer
    examples = Examples([("a film", "the plot is very very very very long story")], [0])
    (row,) = Encoder(tokenizer, 10, None, CLASSIFICATION).encode(examples)
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == [
        *("<s>", "a", "film", "</s>", "</s>", "the", "plot", "is", "very", "</s>")
    ]


# -- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_of_numbers_are_those_of_scipy() -> None:
    generator = np.random.default_rng(0)
    guesses = generator.integers(0, 6, 50) / 2  # with ties
    labels = guesses + generator.normal(size=50)
    found = REGRESSION.score(guesses[:, None], labels, ["score"])
    assert found["pearson"] == pytest.approx(pearsonr(guesses, labels).statistic)
    assert found["spearman"] == pytest.approx(spearmanr(guesses, labels).statistic)
    assert found["mse"] == pytest.approx(((guesses - labels) ** 2).mean())
    constant = REGRESSION.score(np.zeros((3, 1)), np.arange(3.0), ["score"])
    assert (constant["pearson"], constant["spearman"]) == (0, 0)


def test_metrics_of_tags_leave_out_what_is_outside() -> None:
    names = ["B-film", "O", "B-plot"]
    labels, guesses = np.array([[0, 1, 1, 0, 1]]), np.array([[0, 1, 1, 1, 1]])
    found = TAGGING.score(np.eye(3)[guesses], labels, names)
    assert found == {
        "word_f1": pytest.approx(2 / 3),
        "entity_f1": pytest.approx(2 / 3),
        "accuracy": pytest.approx(0.8),
    }
    told = TAGGING.score(np.eye(3)[[[0, 2]]], np.array([[0, 1]]), names)
    assert told["word_f1"] == 0.5, "a tag that no word has, told of one, counts"
    nothing = TAGGING.score(np.eye(3)[[[1, 1]]], np.array([[1, 1]]), names)
    assert nothing == {"word_f1": 0, "entity_f1": 0, "accuracy": 1}
    numbered = TAGGING.score(np.eye(3)[guesses], labels, ["0", "1", "2"])
    assert numbered["word_f1"] == pytest.approx((2 / 3 + 6 / 7) / 2), "none of them is outside"


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O B-a I-a O", {(1, 2, "a")}),
        ("I-a I-a B-a", {(0, 1, "a"), (2, 2, "a")}),
        ("B-a I-b I-b", {(0, 0, "a"), (1, 2, "b")}),
        ("B-a E-a I-a S-a", {(0, 1, "a"), (2, 2, "a"), (3, 3, "a")}),
        ("B-a I-a L-a U-a", {(0, 2, "a"), (3, 3, "a")}),
        ("B-a M-a E-a W-a", {(0, 2, "a"), (3, 3, "a")}),
        ("a-b a-b O c", {(0, 1, "a-b"), (3, 3, "c")}),
        ("B I I O B B I", {(0, 2, ""), (4, 4, ""), (5, 6, "")}),
        ("S B E I BE BE", {(0, 0, ""), (1, 2, ""), (3, 3, ""), (4, 5, "BE")}),
        ("B M E S B L U", {(0, 2, ""), (3, 3, ""), (4, 5, ""), (6, 6, "")}),
        ("O O", set()),
    ],
)
def test_entities_of_tags(tags: str, expected: set[tuple[int, int, str]]) -> None:
    """The rules of seqeval 1.2.2, with which 20,000 rows of random tags agreed."""
    assert entities(tags.split()) == expected


def test_an_entity_is_right_as_a_whole_and_counts_once() -> None:
    names = ["O", "B-a", "I-a"]
    labels = np.array([[1, 2, 2, 0], [1, 0, 1, UNLABELLED]])
    guesses = np.array([[1, 2, 0, 0], [1, 0, 1, 1]])
    found = TAGGING.score(np.eye(3)[guesses], labels, names)
    assert found["entity_f1"] == pytest.approx(2 / 3)  # of 3 entities 2 are right, of 3 told likewise
    assert found["accuracy"] == pytest.approx(6 / 7)


def test_metrics_of_classes() -> None:
    labels, guesses = np.array([0, 1, 1, 0]), np.array([0, 1, 0, 0])
    found = CLASSIFICATION.score(np.eye(2)[guesses], labels, ["no", "yes"])
    assert found == {
        "accuracy": 0.75,
        "f1": pytest.approx(2 / 3),
        "matthews": pytest.approx(1 / 3**0.5),
    }
    three = CLASSIFICATION.score(np.eye(3)[[0, 1, 1]], np.array([0, 1, 2]), list("abc"))
    assert three["f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_f1_is_the_mean_over_the_classes_that_rows_have() -> None:
    labels, answers = np.array([0, 0, 1, 1]), np.eye(3)[[0, 2, 1, 1]]
    found = CLASSIFICATION.score(answers, labels, ["bad", "good", "never seen"])
    assert found["f1"] == pytest.approx((2 / 3 + 1) / 2)


def test_classes_are_described_one_by_one() -> None:
    labels, names = np.array([0, 0, 0, 1, 2, 1]), ["a", "b", "c", "never"]
    outputs = np.eye(4)[[0, 0, 1, 1, 0, 0]]
    found = describe(CLASSIFICATION, outputs, labels, names, most_frequent([1, 0, 1, 0, 2], CLASSIFICATION))
    assert found["most_frequent_class"] == {
        "class": "a",
        "accuracy": 0.5,
        "f1": pytest.approx(2 / 9),  # 2/3 of the first class, over the three that there are
        "matthews": 0.0,
    }
    assert found["confusion_matrix"] == [[2, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert found["per_class"]["a"] == {
        "precision": 0.5,
        "recall": pytest.approx(2 / 3),
        "f1": pytest.approx(4 / 7),
        "support": 3,
    }
    assert found["per_class"]["never"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    assert json.loads(json.dumps(found)) == found
    assert "most_frequent_class" not in describe(CLASSIFICATION, outputs, labels, names, None)
    assert most_frequent([[0, 2], [2]], TAGGING) == [2]
    assert most_frequent([0.5], REGRESSION) is None
    assert describe(REGRESSION, outputs[:, :1], labels, ["score"], None) == {}
    many = describe(CLASSIFICATION, np.eye(201), np.arange(201), [f"{n}" for n in range(201)], [0])
    assert (many["confusion_matrix"], len(many["per_class"])) == (None, 201)


def test_every_problem_has_metrics_to_choose_by() -> None:
    for name, problem in PROBLEMS.items():
        assert problem.short == name
        problem.check_metric(problem.primary)
        problem.check_metric("loss")
        with pytest.raises(FastpeftError, match=f"'bleu' is not measured in {name}; allowed are {problem.primary}"):
            problem.check_metric("bleu")


def test_first_comes_what_was_chosen_by_or_what_a_problem_is_about() -> None:
    tags = {"train_rows": 3, "word_f1": 0.5, "accuracy": 0.75, "loss": 0.1, "metric": None}
    assert (in_order(tags), headline(tags)) == (["word_f1", "accuracy"], "word F1 0.500")
    assert [row for row, _ in measured(tags)] == ["word F1", "accuracy"]
    classes = {"accuracy": 0.75, "f1": 0.5, "matthews": 0.25, "loss": 0.1}
    assert headline({**classes, "metric": "matthews"}) == "Matthews correlation 0.250"
    assert in_order({**classes, "metric": "loss"}) == ["loss", "accuracy", "f1", "matthews"]
    assert headline({}) == ""


# -- the best checkpoint ---------------------------------------------------------------------------------------------


class Forge(TrainerCallback):
    """Makes what is measured of the checkpoints what the test needs."""

    def __init__(self, metric: str, values: dict[int, float]) -> None:
        self.metric = f"eval_{metric}"
        self.values = values

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        metrics[self.metric] = state.log_history[-1][self.metric] = self.values.get(state.global_step, 0.5)


PROMPT = {"prompt": "{text} the film is <mask>", "label_words": "awful,lovely"}
RISING, FALLING = {2: 0.1, 4: 0.9, 6: 0.9, 8: 0.2, 10: 0.8}, {2: 0.9, 4: 0.1, 6: 0.1, 8: 0.8, 10: 0.2}


@pytest.mark.long(but="k-lst-accuracy-values7-more7")
@pytest.mark.parametrize(
    ("method", "metric", "values", "more"),
    [
        ("siva", "accuracy", RISING, {}),
        ("lora", "loss", FALLING, {}),
        ("full", "matthews", RISING, {}),
        ("k-lst", "loss", FALLING, {}),
        ("mezo", "loss", FALLING, {}),
        ("siva", "f1", RISING, PROMPT),
        ("full", "loss", FALLING, PROMPT),
        ("k-lst", "accuracy", RISING, PROMPT),
    ],
)
def test_the_best_checkpoint_is_the_result(
    config: TrainConfig, tmp_path: Path, method: str, metric: str, values: dict[int, float], more: Any
) -> None:
    data = str(write_csv(tmp_path / "reviews.csv", reviews(60)))
    config = replace(config, method=method, data=data, max_steps=10, save_steps=2, metric=metric, **more)
    forge = Forge(metric, values)
    with pytest.raises(KeyboardInterrupt):  # a resumed run knows which was best before
        train(config, callbacks=[forge, Interrupt(9)])
    result = train(config, callbacks=[forge], resume=True)
    assert result.metrics["best_step"] == 4, "the earliest of the best"
    checkpoints = result.folder / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {f"checkpoint-{step}" for step in (4, 8, 10)}
    saved, best, last = (weights_of(folder) for folder in (result.folder, *map(checkpoints.joinpath, BEST_AND_LAST)))
    assert all(torch.equal(tensor, best[name]) for name, tensor in saved.items())
    assert not all(torch.equal(tensor, last[name]) for name, tensor in saved.items())
    assert evaluate(result.folder)["dev_rows"] == 6
    assert result.metrics["metric"] == metric
    assert f"the best by {title_of(metric)} on the dev rows" in (result.folder / "README.md").read_text()


BEST_AND_LAST = ("checkpoint-4", "checkpoint-10")


def test_checkpoints_are_measured_on_all_dev_rows(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastpeft.training.trainer.CURVE_ROWS", 2)
    data = str(write_csv(tmp_path / "reviews.csv", reviews(60)))
    config = replace(config, method="head", data=data, max_steps=5, save_steps=5, learning_rate=1e-2, metric="loss")
    result = train(config)
    state = json.loads((result.folder / "checkpoints" / "checkpoint-5" / "trainer_state.json").read_text())
    assert [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry] == [result.metrics["loss"]]
    assert result.metrics["best_step"] == 5


def test_losses_are_those_of_training() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, numbers = torch.randn(40, 3, generator=generator), torch.randn(40, 1, generator=generator)
    classes = torch.randint(3, (40,), generator=generator)
    tags = classes.view(8, 5).clone()
    tags[0, 2:] = UNLABELLED
    of_tags = torch.nn.functional.cross_entropy(logits, tags.flatten(), ignore_index=UNLABELLED)
    for problem, outputs, labels, expected in (
        (CLASSIFICATION, logits, classes, torch.nn.functional.cross_entropy(logits, classes)),
        (TAGGING, logits.view(8, 5, 3), tags, of_tags),
        (REGRESSION, numbers, logits[:, 0], torch.nn.functional.mse_loss(numbers[:, 0], logits[:, 0])),
    ):
        assert problem.loss is not None
        assert problem.loss(outputs.numpy(), labels.numpy()) == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("problem", [*PROBLEMS.values(), MASKED_WORDS], ids=lambda problem: problem.short)
def test_a_pickle_is_the_problem_itself(problem: Problem) -> None:
    assert pickle.loads(pickle.dumps(problem)) is problem


@pytest.mark.parametrize(
    "problem", [CLASSIFICATION, TAGGING, MULTI_LABEL, MASKED_WORDS, NEXT_WORDS], ids=lambda p: p.short
)
def test_the_tested_metric_is_a_ratio_of_sums_over_rows(problem: Problem) -> None:
    assert problem.tested is not None
    assert problem.parts is not None
    generator = np.random.default_rng(0)
    names = ["O", "B-x", "I-x", "B-y"]
    outputs = generator.normal(size=(30, 7, 4) if problem.per_token else (30, 4)).astype(np.float32)
    labels = generator.integers(0, 4, outputs.shape[:-1])
    if problem is MULTI_LABEL:
        labels = generator.integers(0, 2, outputs.shape).astype(np.float32)
        outputs[:5, 0] = 0.0  # a probability of a half is not above it
    if problem.per_token:
        labels[generator.random(labels.shape) < 0.3] = UNLABELLED
        labels[0] = UNLABELLED  # a row that says nothing
    if problem.digest is not None:
        outputs = np.stack([generator.random(labels.shape), generator.integers(0, 2, labels.shape)], axis=-1)
    above, below = problem.parts(outputs, labels, names).T
    assert len(above) == 30
    assert above.sum() / below.sum() == pytest.approx(problem.score(outputs, labels, names)[problem.tested])
    assert above[:10].sum() / below[:10].sum() == pytest.approx(
        problem.score(outputs[:10], labels[:10], names)[problem.tested]
    ), "each row adds its own"


@pytest.mark.parametrize("kind", ["tagging", "next_words"])
def test_a_run_keeps_what_each_dev_row_scored_in_their_order(config: TrainConfig, tmp_path: Path, kind: str) -> None:
    changes: dict[str, Any] = {"data": str(write_jsonl(tmp_path / "rows.jsonl", tagged(60))), "method": "head"}
    if kind == "next_words":
        rows = [{"prompt": "a b", "completion": " ".join("ab" * (1 + number % 5))} for number in range(40)]
        rows = [{**row, "prompt": f"{row['prompt']} {number}"} for number, row in enumerate(rows)]
        data, model = write_jsonl(tmp_path / "rows.jsonl", rows), save_tiny_decoder(tmp_path / "decoder")
        changes = {"data": str(data), "model": str(model), "objective": "causal", "method": "lora"}
    metrics = train(replace(config, **changes, max_steps=2)).metrics
    kept = json.loads((tmp_path / "run" / "row_scores.json").read_text())
    assert sum(kept["above"]) / max(1, sum(kept["below"])) == pytest.approx(metrics[kept["metric"]])
    assert len(kept["below"]) == metrics["dev_rows"]
    if kind == "next_words":
        run = load_run(tmp_path / "run")
        dev = load_data(str(tmp_path / "rows.jsonl"), problem_type="next_words").dev
        rows, _ = Encoder(run.loaded.tokenizer, 512, None, NEXT_WORDS).encode_counted(dev)
        assert kept["below"] == [sum(label != UNLABELLED for label in row["labels"]) for row in rows]
        assert len({*kept["below"]}) > 1
