"""A decoder as a classifier: label words are read as the next word, after the line up to the mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from causal_models import causal_model
from peft import get_peft_model
from samples import WORDS, reviews, save_tiny_model, write_csv
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithPadding

from fastpeft import (
    FastpeftError,
    LadderConfig,
    LadderModel,
    Prompt,
    PromptCollator,
    PromptModel,
    SivaConfig,
    TrainConfig,
    train,
)
from fastpeft.data.examples import load_data
from fastpeft.prompts.model import load_prompted
from fastpeft.training.evaluation import evaluate, evaluate_zero_shot
from fastpeft.training.loading import load_run
from fastpeft.training.memory import simulate_training_step
from fastpeft.training.prompt_search import find_prompt

WORD = {label: words[0] for label, words in WORDS.items()}
PROMPT = Prompt("{text} the film was <mask>, and a story", WORD)
TEXTS = ["the film", "a very lovely story with a rather dull end", "", "the plot is funny"]
KINDS = {"Llama": "ForCausalLM", "GPT2": "LMHeadModel"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("decoders")
    for kind, head in KINDS.items():
        save_tiny_model(place / kind, kind, head)
    write_csv(place / "reviews.csv", reviews(120, tuple(WORDS)))
    return place


def own(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer as their user loads them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.mask_token = None
    return AutoModelForCausalLM.from_pretrained(folder).eval(), tokenizer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_are_those_of_the_next_word(place: Path, kind: str, side: str) -> None:
    model, tokenizer = own(place / kind)
    tokenizer.padding_side = side
    prompted = PromptModel(model, tokenizer, PROMPT).eval()
    rows = PROMPT.encode(tokenizer, TEXTS, labels=[0, 1, 0, 1])
    words = tokenizer.convert_tokens_to_ids([*WORD.values()])
    batch = PromptCollator(tokenizer)(rows)
    found = prompted(**batch)
    full = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    for index, (text, row) in enumerate(zip(TEXTS, rows)):
        said = tokenizer.decode(row["input_ids"])
        assert said.split() == ["<s>", *text.split(), "the", "film", "was"], "up to the mask"
        torch.testing.assert_close(found.logits[index], full[index, len(row["input_ids"]) - 1, words])
        alone = model(torch.tensor([row["input_ids"]])).logits[0, -1, words]
        torch.testing.assert_close(found.logits[index], alone)
    batch.pop("mask_positions")
    assert torch.equal(prompted(**batch).logits, found.logits), "positions are found"


@pytest.mark.parametrize("kind", ["mamba", "mixtral"])
def test_decoders_of_other_kinds(place: Path, kind: str) -> None:
    """Mamba has no attentions to return, Mixtral has experts."""
    tokenizer = own(place / "GPT2")[1]
    model = causal_model(kind, vocab_size=len(tokenizer)).eval()
    (row,) = PROMPT.encode(tokenizer, ["the film"])
    scores = model(torch.tensor([row["input_ids"]])).logits[0, -1, PROMPT.label_ids(tokenizer)]
    prompted = PromptModel(model, tokenizer, PROMPT).eval()
    torch.testing.assert_close(prompted.predict_logits(["the film"])[0], scores)


def test_the_texts_alone_are_cut(place: Path) -> None:
    _, tokenizer = own(place / "Llama")
    (row,) = PROMPT.encode(tokenizer, ["the film is " * 9], max_length=9)
    assert tokenizer.decode(row["input_ids"]).split() == ["<s>", "the", "film", "is", "the", "the", "film", "was"]
    assert row["mask_positions"] == len(row["input_ids"]) - 1


def test_a_tokenizer_with_a_mask_is_refused(place: Path) -> None:
    model, tokenizer = own(place / "Llama")
    tokenizer.mask_token = "<mask>"
    with pytest.raises(FastpeftError, match=r"LlamaForCausalLM is a decoder.*set tokenizer.mask_token = None"):
        PromptModel(model, tokenizer, PROMPT)


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_the_head_computes_the_last_token_alone(place: Path, task_type: str | None) -> None:
    model, tokenizer = own(place / "Llama")
    shapes: list[tuple[int, ...]] = []
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    adapted = get_peft_model(model, SivaConfig(r=2, target_modules=["q_proj"], task_type=task_type))
    PromptModel(adapted, tokenizer, PROMPT)(**PromptCollator(tokenizer)(PROMPT.encode(tokenizer, TEXTS)))
    assert shapes == [(len(TEXTS), 1, model.config.vocab_size)]


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"])
def test_vectors_before_the_words_move_what_is_read(place: Path, kind: str) -> None:
    model, tokenizer = own(place / "Llama")
    config = getattr(peft, kind)(num_virtual_tokens=5, task_type="CAUSAL_LM")
    tuned = get_peft_model(model, config).eval()
    found = PromptModel(tuned, tokenizer, PROMPT).eval().predict_logits(TEXTS)
    words = tokenizer.convert_tokens_to_ids([*WORD.values()])
    for logits, row in zip(found, PROMPT.encode(tokenizer, TEXTS)):
        ids = torch.tensor([row["input_ids"]])
        torch.testing.assert_close(logits, tuned(ids, attention_mask=torch.ones_like(ids)).logits[0, -1, words])


def test_masks_that_padding_has_moved_are_refused(place: Path) -> None:
    """As by the collator that a Trainer takes where none is given."""
    model, tokenizer = own(place / "Llama")
    tokenizer.padding_side = "left"
    rows = PROMPT.encode(tokenizer, TEXTS)
    prompted = PromptModel(model, tokenizer, PROMPT)
    with pytest.raises(FastpeftError, match=r"mask_positions are not where the masks stand.*PromptCollator"):
        prompted(**DataCollatorWithPadding(tokenizer)(rows))
    batch = {**PromptCollator(tokenizer)(rows), "labels": torch.zeros(len(rows), dtype=torch.long)}
    assert simulate_training_step(prompted, batch).peak > 0  # of tensors without values


def test_long_texts_are_cut_to_what_the_model_reads(place: Path) -> None:
    """Whatever a person allows, and less where vectors stand before the words."""
    model, tokenizer = own(place / "GPT2")
    long = ["the film is " * model.config.n_positions]
    plain = PromptModel(model, tokenizer, PROMPT)
    assert plain.predict_logits(long, max_length=9_999).equal(plain.predict_logits(long))
    tuned = get_peft_model(model, peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"))
    assert PromptModel(tuned, tokenizer, PROMPT).predict_logits(long).isfinite().all()


def _wraps() -> dict[str, Any]:
    return {
        "plain": lambda model: model,
        "siva": lambda model: get_peft_model(model, SivaConfig(r=2, target_modules=["q_proj", "v_proj"])),
        "9-LST": lambda model: LadderModel(model, LadderConfig(reduction_factor=2, window_size=3)),
    }


@pytest.mark.parametrize("way", ["plain", "siva", "9-LST"])
def test_saved_and_loaded(place: Path, tmp_path: Path, way: str) -> None:
    model, tokenizer = own(place / "Llama")
    prompted = PromptModel(_wraps()[way](model), tokenizer, PROMPT, calibrate=True).eval()
    prompted.save_pretrained(tmp_path / "saved")
    loaded = PromptModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded.predict_logits(TEXTS), prompted.predict_logits(TEXTS))


def _trained(place: Path, output: Path, **settings: Any) -> dict[str, Any]:
    words = ",".join(f"{label}={word}" for label, word in WORD.items())
    own = {"prompt": PROMPT.template, "label_words": words, "learning_rate": 2e-2, "epochs": 1, "batch_size": 8}
    config = {"model": str(place / "Llama"), "data": str(place / "reviews.csv"), "output": str(output)}
    return train(TrainConfig(**{**config, **own, **settings})).metrics


@pytest.fixture(scope="module")
def learned(place: Path) -> Path:
    """A run that tells the classes apart; a random model that is frozen teaches others nothing."""
    assert _trained(place, place / "learned", method="full", epochs=24, learning_rate=1e-2)["accuracy"] >= 0.9
    return place / "learned"


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("siva", {"learning_rate": 1e-3}),
        ("k-lst", {"window": 3, "learning_rate": 1e-3}),
        ("mezo", {"learning_rate": 1e-6}),
    ],
)
def test_methods_go_on_from_a_decoder_that_learned(
    place: Path, learned: Path, tmp_path: Path, method: str, settings: dict[str, Any]
) -> None:
    output = tmp_path / "run"
    metrics = _trained(place, output, method=method, init_from=str(learned), **settings)
    assert min(metrics["accuracy_before"], metrics["accuracy"]) >= 0.9
    assert evaluate(output, str(place / "reviews.csv"))["accuracy"] >= 0.9


def test_the_card_loads_an_adapter(place: Path, tmp_path: Path) -> None:
    _trained(place, tmp_path / "run", method="siva")
    card = (tmp_path / "run" / "README.md").read_text()
    names: dict[str, Any] = {}
    exec(card[card.index("```python") + 9 : card.rindex("```")], names)
    expected = load_run(tmp_path / "run").loaded.model.predict_logits(TEXTS)
    assert torch.equal(names["model"].get_base_model().predict_logits(TEXTS), expected)


def test_with_no_training_and_found(place: Path) -> None:
    data = load_data(str(place / "reviews.csv"))
    measured = evaluate_zero_shot(str(place / "Llama"), PROMPT.for_labels(data.labels), str(place / "reviews.csv"))
    assert 0 <= measured["accuracy"] <= 1
    found = find_prompt(str(place / "Llama"), data)
    assert found.prompt.template.endswith(" <mask>")
    assert found.templates == 8
    assert len(load_prompted(str(place / "Llama"), found.prompt).model.label_ids) == len(data.labels)
