"""Prompts that are found: words chosen as by brute force, planted answers, and runs that keep what they found."""

from __future__ import annotations

import html
import json
import logging
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from samples import WORDS, pairs, reviews, save_tiny_model, scores, write_csv, write_jsonl
from tokenizers_for_prompts import FAMILIES, make_tokenizer
from typer.testing import CliRunner

from fastpeft import FastpeftError, Prompt, TrainConfig, train
from fastpeft.cli import app
from fastpeft.comparison import zero_shot
from fastpeft.comparison.plan import CompareConfig
from fastpeft.comparison.run import Comparison
from fastpeft.data.examples import load_data
from fastpeft.support import files
from fastpeft.training import prompt_search
from fastpeft.training.estimates import plan
from fastpeft.training.evaluation import evaluate, evaluate_zero_shot
from fastpeft.training.export import export
from fastpeft.training.prediction import predict
from fastpeft.training.prompt_search import best_words, draw_rows, find_prompt, score, templates, whole_words


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny models and data."""
    folder = tmp_path_factory.mktemp("auto")
    save_tiny_model(folder / "model")
    save_tiny_model(folder / "classifier", head="ForSequenceClassification")
    write_csv(folder / "reviews.csv", reviews(90))
    write_csv(folder / "few.csv", reviews(12))
    write_jsonl(folder / "pairs.jsonl", pairs(90))
    write_jsonl(folder / "scores.jsonl", scores(60))
    return folder


@pytest.fixture
def config(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    short_grammar(monkeypatch)
    return TrainConfig(
        output=str(tmp_path / "run"),
        method="head",
        model=str(place / "model"),
        data=str(place / "reviews.csv"),
        prompt="auto",
        max_steps=2,
    )


def short_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_search, "templates", lambda is_pair, **kind: templates(is_pair, **kind)[:6])


def forbid_search(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("searched again")

    monkeypatch.setattr(prompt_search, "find_prompt", refuse)


# -- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3])
def test_the_beam_search_finds_what_trying_everything_finds(classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    labels = torch.arange(4 * classes) % classes
    logits = torch.randn(len(labels), 7, generator=generator, dtype=torch.float64)
    candidates = [torch.randperm(7, generator=generator)[:5] for _ in range(classes)]
    every = [choice for choice in product(*(words.tolist() for words in candidates)) if len({*choice}) == classes]
    expected = sorted(every, key=lambda choice: -float(score(logits[:, list(choice)], labels)))
    found = best_words(logits, labels, candidates, width=125)
    assert [choice for choice, _ in found] == expected[:125]
    assert [value for _, value in found] == pytest.approx([float(score(logits[:, list(c)], labels)) for c, _ in found])


def test_a_narrow_beam_gives_different_words_to_all_classes() -> None:
    labels = torch.arange(12) % 4
    logits = torch.zeros(12, 9, dtype=torch.float64)
    logits[torch.arange(12), labels + 2] = 3.0  # the right words; all classes have the same candidates
    (best, value), *_ = best_words(logits, labels, [torch.arange(9)] * 4, width=9)
    assert best == (2, 3, 4, 5)
    assert 11 < value < 12  # all right, less the loss's part


def test_more_right_rows_beat_a_lower_loss() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    barely = torch.tensor([[0.1, 0.0], [0.1, 0.0], [0.0, 0.1], [0.0, 0.1]], dtype=torch.float64)
    mostly = torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.0, 9.0], [0.1, 0.0]], dtype=torch.float64)
    assert 3 < score(barely, labels) < 4
    assert 2 < score(mostly, labels) < 3
    assert score(10 * barely, labels) > score(barely, labels)
    assert -1 < score(torch.zeros_like(barely), labels) < 0, "words that are as likely tell nothing"


def test_the_accuracy_that_is_told_is_the_share_of_right_rows() -> None:
    logits = torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.0, 9.0], [90.0, 0.0]], dtype=torch.float64)
    choice = prompt_search._Choice("{text} <mask>", (5, 6), float(score(logits, torch.tensor([0, 0, 1, 1]))))
    search: Any = SimpleNamespace(labels=["no", "yes"], _words=lambda template: {5: "dull", 6: "lovely"})
    assert prompt_search._Search._described(search, choice, 4)["accuracy"] == 0.75


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("template", ["{text} It was <mask>.", "<mask>: {text}"])
def test_every_whole_word_is_one_that_a_prompt_takes(family: str, template: str) -> None:
    tokenizer = make_tokenizer(family)
    words = whole_words(tokenizer, at_start=template.startswith("<mask>"))
    assert {"great", "dull"} <= {*words.values()} or family == "byte-level"
    tokens = [*words][:40]
    assert Prompt(template, [words[token] for token in tokens]).label_ids(tokenizer) == tokens
    assert not {*tokenizer.all_special_ids} & {*words}


# -- templates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_pair", [False, True])
def test_the_grammar_has_valid_templates_once_each(is_pair: bool) -> None:
    made = templates(is_pair)
    assert len({*made}) == len(made)
    assert all(Prompt(template, ["no", "yes"]).is_pair == is_pair for template in made)
    assert ("{a}? <mask>, {b}" if is_pair else "{text} It was <mask>.") in made


# -- the search ------------------------------------------------------------------------------------------------------


def test_planted_answers_are_found(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that only in one template expects `dull` and `lovely` where they are meant, calibrated."""
    data = load_data(str(place / "reviews.csv"))
    planted = "It is about <mask>. {text}"
    favoured = dict(zip(["dull", "lovely"], [4.0, -4.0]))

    def logits(search: Any, template: str, tokens: list[int], rows: Any) -> tuple[torch.Tensor, torch.Tensor]:
        words = [search._words(template)[token] for token in tokens]
        seed = torch.Generator().manual_seed(len(template))
        made = torch.randn(len(rows), len(tokens), generator=seed, dtype=torch.float64)
        if template == planted:
            for row, text in enumerate(rows.texts):
                opinion = "lovely" if {*text.split()} & {*WORDS["positive"]} else "dull"
                made[row, words.index(opinion)] += 5
        favour = torch.tensor([favoured.get(word, 0.0) for word in words], dtype=torch.float64)
        return made + favour, favour

    monkeypatch.setattr(prompt_search._Search, "_logits", logits)
    found = find_prompt(str(place / "model"), data)
    assert found.prompt == Prompt(planted, {"negative": "dull", "positive": "lovely"})
    assert found.accuracy == 1.0
    assert (found.rows, found.ranked_rows, found.templates) == (32, 49, 45)
    assert all(other["accuracy"] <= 1.0 for other in found.runners_up)


@pytest.mark.long(but="False")
@pytest.mark.parametrize("calibrate", [False, True])
def test_what_is_said_of_a_prompt_is_what_it_does(
    place: Path, monkeypatch: pytest.MonkeyPatch, calibrate: bool
) -> None:
    """The accuracy of the ranking is that of `evaluate_zero_shot` on the same rows; twice the same is found."""
    short_grammar(monkeypatch)
    data = load_data(str(place / "reviews.csv"))
    drawn = []
    draw = prompt_search.draw_rows
    monkeypatch.setattr(prompt_search, "draw_rows", lambda *given: drawn.append(draw(*given)) or drawn[-1])
    found = find_prompt(str(place / "model"), data, seed=3, calibrate=calibrate)
    assert find_prompt(str(place / "model"), data, seed=3, calibrate=calibrate) == found
    chosen, ranked = drawn[0]
    assert not {*chosen.texts} & {*ranked.texts}
    assert not ({*chosen.texts} | {*ranked.texts}) - {*data.train.texts}
    rows = [(text, data.labels[label]) for text, label in zip(ranked.texts, ranked.labels)]
    same = write_csv(place / "ranked.csv", rows)
    (place / "ranked").mkdir(exist_ok=True)
    write_csv(place / "ranked" / "train.csv", rows)
    same.replace(place / "ranked" / "dev.csv")
    measured = evaluate_zero_shot(str(place / "model"), found.prompt, str(place / "ranked"), calibrate=calibrate)
    assert measured["accuracy"] == pytest.approx(found.accuracy, abs=1e-4)


def test_another_seed_draws_other_rows(place: Path) -> None:
    data = load_data(str(place / "reviews.csv"))
    first, again, other = (draw_rows(data, seed) for seed in (0, 0, 1))
    assert first == again
    assert first[0].texts != other[0].texts


def test_a_run_searches_by_its_seed_and_on_texts_as_long_as_it_reads(
    config: TrainConfig, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FastpeftError, match="max_length 3 leaves no room for the template"):
        find_prompt(config.model, load_data(config.data), max_length=3)

    def found(*given: Any, **options: Any) -> None:
        raise FastpeftError(f"asked for {options}")

    monkeypatch.setattr(prompt_search, "find_prompt", found)
    with pytest.raises(FastpeftError, match=r"asked for \{'seed': 3, 'max_length': 20\}"):
        train(replace(config, seed=3, max_length=20))


def test_pairs_get_a_template_for_pairs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short_grammar(monkeypatch)
    assert find_prompt(str(place / "model"), load_data(str(place / "pairs.jsonl"))).prompt.is_pair


# -- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_keeps_what_it_found_and_is_repeated_without_searching(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = train(config)
    written = json.loads((result.folder / "run.json").read_text())
    found = written["found_prompt"]
    assert written["prompt"] == "auto"
    assert result.metrics["found_prompt"] == found
    assert Prompt.load(result.folder) == Prompt(found["template"], found["label_words"])
    for folder in (result.folder, export(result.folder, tmp_path / "exported")):
        card = (folder / "README.md").read_text()
        assert f"| prompt | {html.escape(found['template'], quote=False)} |" in card
        assert f"| label_words | {', '.join(f'{k}={v}' for k, v in found['label_words'].items())} |" in card
    assert evaluate(result.folder)["accuracy"] == result.metrics["accuracy"]
    assert len(predict(result.folder, ["a lovely film"])) == 1

    forbid_search(monkeypatch)
    again = replace(TrainConfig.from_file(result.folder / "run.json"), output=f"{config.output}-again")
    repeated = train(again)
    assert repeated.metrics["loss"] == result.metrics["loss"]
    assert repeated.metrics["found_prompt"] == found
    assert train(config, resume=True).metrics == result.metrics


def test_what_makes_figures_doubtful_is_told_with_no_training_too(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_csv(tmp_path / "rows.csv", [*reviews(12), (" ", reviews(1)[0][1])])
    with caplog.at_level(logging.WARNING):
        measured = evaluate_zero_shot(str(place / "model"), Prompt("{text} So <mask>", ["dull", "lovely"]), data)
    assert "1 of 13 texts are empty" in caplog.text
    assert measured["warnings"]
    assert {*measured["warnings"]} <= {*caplog.messages}


def test_a_run_that_was_cut_off_goes_on_with_the_prompt_it_found(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(config)
    (whole.folder / "metrics.json").unlink()
    forbid_search(monkeypatch)
    assert train(config, resume=True).metrics["found_prompt"] == whole.metrics["found_prompt"]
    (whole.folder / "metrics.json").unlink()
    with pytest.raises(FastpeftError, match=r"prompt 'auto' -> '\{text\} So <mask>'"):
        train(replace(config, prompt="{text} So <mask>", label_words="dull,lovely"), resume=True)


def test_another_prompt_drops_what_was_found(config: TrainConfig) -> None:
    found = {**Prompt("{text} So <mask>", ["dull", "lovely"]).values()}
    assert replace(config, found_prompt=found).parse_prompt() == Prompt.from_values(found)
    assert replace(config, found_prompt=found, prompt=None).found_prompt is None


def test_zero_shot_on_the_command_line(config: TrainConfig) -> None:
    given = ["eval", "--model", config.model, "--data", config.data, "--prompt", "auto", "--calibrate"]
    shown = CliRunner().invoke(app, given)
    assert shown.exit_code == 0, shown.output
    assert "accuracy" in shown.stdout


def test_a_comparison_has_trained_and_zero_shot_cells_with_it(config: TrainConfig, tmp_path: Path) -> None:
    """Cells as their processes run them; what they found does not make them other cells."""
    compared = CompareConfig(
        output=str(tmp_path / "all"),
        methods=["head:prompt=auto", "zero-shot:prompt=auto"],
        common={"model": config.model, "data": config.data, "max_steps": 1},
    )
    plan = Comparison(compared).plan
    plan.save()
    for cell in plan.wanted:
        files.write_json(cell.config_file, cell.values)
        if cell.method == "zero-shot":
            zero_shot.main(cell.config_file)
        else:
            train(TrainConfig.from_file(cell.config_file), resume=True)
    cells = Comparison(compared).plan.wanted
    assert [cell.state for cell in cells] == ["finished", "finished"]
    first, second = (cell.metrics() for cell in cells)
    assert first is not None
    assert second is not None
    assert first["found_prompt"] == second["found_prompt"]  # the same rows by the same seed


# -- what cannot be done ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "scores.jsonl"}, "the prompt 'auto' finds label words, which stand for classes, but this is regres"),
        ({"data": "few.csv"}, r"the class '\w+' has \d training rows; .* at least 8"),
        ({"model": "classifier"}, "has no masked-word head"),
    ],
)
def test_what_cannot_be_searched(
    config: TrainConfig, place: Path, tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    config = replace(config, **{name: str(place / value) for name, value in changes.items()})
    for start in (train, plan):
        with pytest.raises(FastpeftError, match=message):
            start(config)
    assert not Path(config.output).exists()


def test_a_tokenizer_without_enough_words(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_search, "whole_words", lambda tokenizer, at_start: {5: "film"})
    with pytest.raises(FastpeftError, match="the tokenizer has 1 whole words for 2 classes"):
        find_prompt(str(place / "model"), load_data(str(place / "reviews.csv")))


def test_no_label_words_go_with_auto(config: TrainConfig) -> None:
    with pytest.raises(FastpeftError, match="the prompt 'auto' finds a template and label words together"):
        replace(config, label_words="bad,good")
    with pytest.raises(FastpeftError, match="'words'"):
        replace(config, prompt_head="words")


def test_a_classification_head_takes_the_template_alone(config: TrainConfig) -> None:
    found = train(replace(config, prompt_head="classifier")).metrics["found_prompt"]
    assert (
        found["template"] == train(replace(config, output=f"{config.output}-words")).metrics["found_prompt"]["template"]
    )
    assert (found["head"], found["label_words"]) == ("classifier", None)
    assert Prompt.load(config.output) == Prompt(found["template"], None, "classifier")
