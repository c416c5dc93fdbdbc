"""Masked words as what is learned: which are hidden, a run on texts alone, and runs on labels that go on from it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import PROMPT, WORDS, Interrupt, pairs, reviews, save_tiny_model, tagged, write_csv, write_jsonl
from torch.nn.functional import cross_entropy
from transformers import AutoModelForMaskedLM, AutoTokenizer

from fastpeft import FastpeftError, LadderModel, TrainConfig, train
from fastpeft.comparison.plan import CompareConfig
from fastpeft.comparison.run import Comparison
from fastpeft.data import scores
from fastpeft.data.examples import Examples, load_data
from fastpeft.data.masking import SHARE, MaskedRows, Masker
from fastpeft.data.names import UNLABELLED
from fastpeft.data.problems import MASKED_WORDS
from fastpeft.ops.fused_head import FusedLinear, LazyLogits
from fastpeft.training.encoding import Encoder
from fastpeft.training.estimates import plan
from fastpeft.training.evaluation import evaluate
from fastpeft.training.loading import load_run
from fastpeft.training.prediction import predict
from fastpeft.training.task import Task


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, labelled texts, and the same texts a line each."""
    place = tmp_path_factory.mktemp("place")
    save_tiny_model(place / "model")
    write_csv(place / "reviews.csv", reviews(90))
    (place / "texts.txt").write_text("".join(f"{text}\n\n" for text, _ in reviews(90)))
    return place


@pytest.fixture
def config(tmp_path: Path, place: Path) -> TrainConfig:
    return TrainConfig(
        output=str(tmp_path / "words"),
        method="k-lst",
        objective="mlm",
        window=3,
        model=str(place / "model"),
        data=str(place / "texts.txt"),
        batch_size=8,
        max_steps=4,
        learning_rate=1e-2,
    )


@pytest.fixture(scope="module")
def tokenizer(place: Path) -> Any:
    return AutoTokenizer.from_pretrained(place / "model")


@pytest.mark.parametrize("method", ["k-lst", "siva", "mezo"])
def test_the_loss_of_a_run_makes_no_logits(config: TrainConfig, method: str) -> None:
    changes: dict[str, Any] = {} if method == "k-lst" else {"window": None}
    task = Task.load(replace(config, method=method, **changes))
    cores = [module for module in task.model.modules() if hasattr(module, "lm_head")]
    assert type(cores[-1].get_output_embeddings()) is FusedLinear


def test_nothing_that_a_run_measures_makes_logits(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(logits: LazyLogits, name: str) -> Any:
        raise AssertionError(f"{name} makes all logits")

    kinds: list[Any] = []
    digest = scores.digest_words
    monkeypatch.setattr(
        scores, "digest_words", lambda logits, *others: kinds.append(type(logits)) or digest(logits, *others)
    )
    monkeypatch.setattr(LazyLogits, "make", make)
    metrics = train(replace(config, method="siva", window=None)).metrics
    assert evaluate(config.output)["loss"] == pytest.approx(metrics["loss"], abs=1e-5)
    assert {*kinds} == {LazyLogits}


# -- which words ---------------------------------------------------------------------------------------------------


def row(tokenizer: Any, words: int) -> dict[str, list[int]]:
    return dict(tokenizer(" ".join(["film"] * words), return_special_tokens_mask=True))


def test_a_share_of_the_words_is_hidden_in_three_ways(tokenizer: Any) -> None:
    text = row(tokenizer, 4_000)
    masked = Masker(tokenizer)(text, 0)
    film, hidden = tokenizer.convert_tokens_to_ids("film"), torch.tensor(masked["labels"]) != UNLABELLED
    ids = torch.tensor(masked["input_ids"])
    assert set(masked) == {*text, "labels"} - {"special_tokens_mask"}
    assert not hidden[0]
    assert not hidden[-1]
    assert set(torch.tensor(masked["labels"])[hidden].tolist()) == {film}
    assert (ids[~hidden][1:-1] == film).all()
    shares = hidden.float().mean(), (ids[hidden] == tokenizer.mask_token_id).float().mean()
    for share, expected, count in zip(shares, (SHARE, 0.8), (4_000, int(hidden.sum()))):
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / count)
    others = ids[hidden & (ids != tokenizer.mask_token_id)]
    assert 0.2 < (others != film).float().mean() < 0.8  # the half of what is no mask


def test_what_is_hidden_depends_on_the_key_alone_and_is_never_nothing(tokenizer: Any) -> None:
    mask, text = Masker(tokenizer), row(tokenizer, 3)
    before = {name: list(values) for name, values in text.items()}
    found = [mask(text, seed, epoch, 7) for seed in range(9) for epoch in range(9)]
    assert text == before
    assert found == [Masker(tokenizer)(text, seed, epoch, 7) for seed in range(9) for epoch in range(9)]
    hidden = [tuple(label != UNLABELLED for label in masked["labels"]) for masked in found]
    assert len(set(hidden)) >= 3
    assert all(any(places) and not places[0] and not places[-1] for places in hidden)
    expected = 3 * SHARE + (1 - SHARE) ** 3  # of three words, and one where that is none
    assert sum(map(sum, hidden)) == pytest.approx(81 * expected, abs=9)  # four standard errors


def test_epochs_and_seeds_hide_other_words_and_dev_rows_always_the_same(config: TrainConfig, tokenizer: Any) -> None:
    task, other = Task.load(config), Task.load(replace(config, seed=1))
    assert [*task.dev_rows] == [*other.dev_rows]
    rows = [MaskedRows(task.train_rows, tokenizer, seed) for seed in (0, 1)]
    read = {(seed, epoch): [rows[seed][epoch, i] for i in range(20)] for seed in (0, 1) for epoch in (0, 1)}
    assert all(read[one] != read[two] for one in read for two in read if one != two)


# -- texts -----------------------------------------------------------------------------------------------------------


def texts_of(data: Any) -> list[Any]:
    loaded = load_data(str(data), problem_type=MASKED_WORDS.name)
    assert loaded.labels == loaded.train.labels == loaded.dev.labels == []
    return sorted([*loaded.train.texts, *loaded.dev.texts])


def test_texts_are_found_in_any_data_and_labels_are_not_read(tmp_path: Path, place: Path) -> None:
    expected = sorted(text for text, _ in reviews(90))
    assert texts_of(place / "texts.txt") == texts_of(place / "reviews.csv") == expected
    odd = write_csv(tmp_path / "odd.csv", [(text,) for text, _ in reviews(90)], header=["phrase"])
    empty = write_csv(tmp_path / "empty.csv", [*reviews(90), ("  ", "x")], header=["text", "label"])
    assert texts_of(odd) == texts_of(empty) == expected
    two = pairs(20)
    assert texts_of(write_jsonl(tmp_path / "pairs.jsonl", two)) == sorted((r["sentence1"], r["sentence2"]) for r in two)
    words = tagged(20)
    assert texts_of(write_jsonl(tmp_path / "tags.jsonl", words)) == sorted(" ".join(r["tokens"]) for r in words)


def test_rows_without_a_word_are_left_out(tokenizer: Any) -> None:
    rows, _ = Encoder(tokenizer, 8, None, MASKED_WORDS).encode_counted(Examples(["the film", " "], []))
    assert [row["input_ids"] for row in rows] == [tokenizer("the film")["input_ids"]]
    with pytest.raises(FastpeftError, match="no text has a word among its first 2 tokens"):
        Encoder(tokenizer, 2, None, MASKED_WORDS).encode_counted(Examples(["the film"], []))


# -- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.long(but="mezo")
@pytest.mark.parametrize("method", ["k-lst", "full", "siva", "lora", "mezo", "last-n", "bitfit", "head"])
def test_a_run_is_measured_as_it_was_trained(config: TrainConfig, method: str) -> None:
    own = {"window": None, "method": method, "settings": {"layers": 1} if method == "last-n" else {}}
    result = train(config if method == "k-lst" else replace(config, **own))
    metrics = result.metrics
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    assert 0 <= metrics["masked_accuracy"] <= 1
    assert "masked_accuracy_before" in metrics
    again = evaluate(result.folder)
    for name in ("loss", "perplexity", "masked_accuracy"):
        assert again[name] == pytest.approx(metrics[name], abs=1e-4), name
    card = (result.folder / "README.md").read_text()
    assert "masked-token accuracy" in card
    assert "| objective | mlm |" in card
    with pytest.raises(FastpeftError, match="is of a masked language model and predicts no classes"):
        predict(result.folder, ["the film"])


@pytest.mark.long(but="full")
@pytest.mark.parametrize("method", ["k-lst", "full", "siva"])
def test_the_card_says_how_to_load_the_model(config: TrainConfig, method: str) -> None:
    result = train(config if method == "k-lst" else replace(config, method=method, window=None))
    snippet = (result.folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    found: dict[str, Any] = {}
    exec(snippet, found)
    ids = found["tokenizer"]("the film is <mask>", return_tensors="pt")["input_ids"]
    expected = load_run(result.folder).loaded.model
    with torch.no_grad():
        assert torch.equal(found["model"].eval()(ids).logits, expected(ids).logits)


def test_metrics_are_the_means_over_hidden_words(config: TrainConfig) -> None:
    config = replace(config, bf16=False)
    result = train(config)
    run, task = load_run(result.folder), Task.load(config)
    losses, hits = [], []
    for item in task.dev_rows:
        ids, labels = torch.tensor([item["input_ids"]]), torch.tensor(item["labels"])
        with torch.no_grad():
            logits = run.loaded.model(ids).logits[0]
        hidden = labels != UNLABELLED
        losses += cross_entropy(logits[hidden], labels[hidden], reduction="none").tolist()
        hits += (logits[hidden].argmax(-1) == labels[hidden]).tolist()
    assert result.metrics["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    assert result.metrics["masked_accuracy"] == pytest.approx(sum(hits) / len(hits))


def test_masked_words_are_learned(config: TrainConfig) -> None:
    metrics = train(replace(config, method="full", window=None, max_steps=60)).metrics
    assert metrics["masked_accuracy"] > metrics["masked_accuracy_before"] + 0.1


@pytest.mark.long(but="settings0")
@pytest.mark.parametrize("settings", [{}, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}])
def test_a_resumed_run_ends_with_the_same_bits(config: TrainConfig, tmp_path: Path, settings: dict[str, Any]) -> None:
    config = replace(config, max_steps=None, epochs=2, batch_size=27, save_steps=1)  # three steps an epoch
    whole = train(config)
    config = replace(config, output=str(tmp_path / "resumed"), settings=settings)
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[Interrupt(4)])
    resumed = train(config, resume=True)
    files = [(result.folder / "model.safetensors").read_bytes() for result in (whole, resumed)]
    assert files[0] == files[1]


def test_a_dry_run_shows_memory(config: TrainConfig) -> None:
    assert plan(config).peak_memory_mb is not None


# -- from words to labels ----------------------------------------------------------------------------------------------


@pytest.mark.long(but="prompt1")
@pytest.mark.parametrize("prompt", [{}, {"prompt": "{text} it is <mask>", "label_words": "awful,lovely"}])
def test_a_side_network_goes_on_with_labels(config: TrainConfig, place: Path, tmp_path: Path, prompt: Any) -> None:
    words = train(config)
    then = replace(
        config,
        **prompt,
        objective=None,
        init_from=str(words.folder),
        output=str(tmp_path / "run"),
        data=str(place / "reviews.csv"),
    )
    start = Task.load(then).model
    trained = LadderModel.from_pretrained(words.folder)
    side = start.masked_lm.side if prompt else start.side
    assert all(value.equal(trained.side.state_dict()[name]) for name, value in side.state_dict().items())
    if prompt:  # its head is that of masked words
        head = start.masked_lm.base.lm_head.dense.weight
        assert head.equal(trained.base.lm_head.dense.weight)
        assert not head.equal(AutoModelForMaskedLM.from_pretrained(place / "model").lm_head.dense.weight)
    result = train(then)
    assert evaluate(result.folder)["accuracy"] == pytest.approx(result.metrics["accuracy"])
    assert predict(result.folder, ["a lovely film"])[0][0] in WORDS


@pytest.mark.long(but="siva")
@pytest.mark.parametrize("method", ["full", "siva"])
def test_a_model_goes_on_with_labels_by_any_method(
    config: TrainConfig, place: Path, tmp_path: Path, method: str
) -> None:
    words = train(replace(config, method=method, window=None))
    then = replace(
        config,
        objective=None,
        init_from=str(words.folder),
        output=str(tmp_path / "run"),
        data=str(place / "reviews.csv"),
    )
    start = Task.load(then).model
    trained = load_run(words.folder).loaded.model
    name = "encoder.layer.0.attention.self.query.weight"
    merged = (trained.merge_and_unload() if method == "siva" else trained).roberta.state_dict()[name]
    assert start.base.roberta.state_dict()[name].equal(merged)
    result = train(then)
    assert evaluate(result.folder)["accuracy"] == pytest.approx(result.metrics["accuracy"])


def test_a_comparison_chains_them(config: TrainConfig, place: Path, tmp_path: Path) -> None:
    made = CompareConfig(
        output=str(tmp_path / "all"),
        methods=["k-lst:objective=mlm", "k-lst:init_from=k-lst:objective=mlm"],
        prompts=["none", "{text} it is <mask>:label_words=awful+lovely"],
        common={"model": config.model, "data": str(place / "reviews.csv"), "window": 3, "label_column": "label"},
    )
    words, labels, prompted = made.cells()
    assert (words.config.objective, words.config.label_column) == ("mlm", None)
    assert (labels.config.objective, labels.config.label_column) == (None, "label")
    assert labels.after == prompted.after == (words.name,)
    Comparison(made)  # accepts the cells' rows


def test_a_comparison_searches_rates_where_there_are_labels_or_none(
    config: TrainConfig, place: Path, tmp_path: Path
) -> None:
    words = "k-lst:objective=mlm:learning_rate=0.001"
    common = {"model": config.model, "data": str(place / "reviews.csv"), "window": 3}
    chained = CompareConfig(
        output=str(tmp_path / "all"), methods=[words, f"k-lst:init_from={words}"], protocol="full", common=common
    )
    assert any(cell.search for cell in Comparison(chained).plan.cells)
    alone = CompareConfig(
        output=str(tmp_path / "alone"), methods=["k-lst:objective=mlm"], protocol="full", common=common
    )
    assert any(cell.search for cell in Comparison(alone).plan.cells)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "clm"}, "objective is 'clm'; it must be mlm"),
        ({"label_column": "label"}, "label_column is 'label', but the objective 'mlm' learns from texts without"),
        ({"problem_type": "regression"}, "problem_type is 'regression', but the objective"),
        ({"prompt": "sst2"}, "prompt is 'sst2', but the objective"),
        ({"objective": None, "problem_type": "masked_words"}, "Give objective mlm instead"),
        ({"metric": "accuracy", "save_steps": 1}, "'accuracy' is not measured in masked_words; allowed are masked_acc"),
    ],
)
def test_what_does_not_fit_is_refused(config: TrainConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FastpeftError, match=message):
        Task.load(replace(config, **changes))


@pytest.mark.parametrize("head", ["ForMaskedLM", "Model"])
def test_an_adapter_trains_a_head_that_the_model_lacked(config: TrainConfig, tmp_path: Path, head: str) -> None:
    model = str(save_tiny_model(tmp_path / "model", head=head))
    task = Task.load(replace(config, model=model, method="siva", window=None))
    trained = [name for name, parameter in task.model.named_parameters() if parameter.requires_grad]
    assert any("lm_head.dense" in name for name in trained) == (head == "Model")


@pytest.mark.parametrize("kind", ["MPNet", "Bert"])
def test_a_model_without_a_head_gets_one_that_label_words_take(
    config: TrainConfig, place: Path, tmp_path: Path, kind: str
) -> None:
    bare = save_tiny_model(tmp_path / "bare", kind, head="Model")
    by_words = replace(config, output=str(tmp_path / "labels"), objective=None, data=str(place / "reviews.csv"))
    by_words = replace(by_words, method="head", window=None, **PROMPT)
    with pytest.raises(FastpeftError, match=r"Train one on texts \(fastpeft train --objective mlm --method head\)"):
        train(replace(by_words, model=str(bare)))
    result = train(replace(config, model=str(bare), method="head", window=None))
    before = AutoModelForMaskedLM.from_pretrained(bare).state_dict()
    after = AutoModelForMaskedLM.from_pretrained(result.folder).state_dict()
    changed = {name.rpartition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 2  # the dense layer and the norm; the vocabulary's layer is the embeddings
    assert not any(name.startswith(("mpnet.", "bert.")) for name in changed)
    train(replace(by_words, model=str(result.folder)))  # its label words are read by that head


def test_a_model_of_a_kind_without_a_head_or_without_a_mask_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    causal = save_tiny_model(tmp_path / "causal", "GPT2", head="LMHeadModel")
    with pytest.raises(FastpeftError, match="has no masked-word head, which label words and the objective mlm need"):
        Task.load(replace(config, model=str(causal)))
    maskless = save_tiny_model(tmp_path / "maskless")
    tokenizer = AutoTokenizer.from_pretrained(maskless)
    tokenizer.mask_token = None
    tokenizer.save_pretrained(maskless)
    with pytest.raises(FastpeftError, match="has no mask token, which the objective mlm needs"):
        Task.load(replace(config, model=str(maskless)))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("blank.txt", "\n \n", "is empty: it has no rows. Give a file with a text in each row"),
        ("blank.csv", 'text,label\n"  ",x\n', "all texts of .* in text are empty"),
        ("one.txt", "a film\n", "1 row is too few"),
        ("two.csv", "first,second\na film,a plot\n", "cannot tell which column"),
    ],
)
def test_data_without_texts_is_refused(config: TrainConfig, tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(FastpeftError, match=message):
        Task.load(replace(config, data=str(tmp_path / name)))
