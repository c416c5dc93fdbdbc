"""How many tokens a model reads, how its tokenizer reads words and pads, and how wide it is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
import transformers
from backbones import ladder, tiny
from samples import save_tiny_model

from fastpeft.data.problems import CLASSIFICATION
from fastpeft.errors import FastpeftError
from fastpeft.models import (
    _read_words_after_a_space,
    hidden_size,
    load_classifier,
    load_for_next_words,
    longest_input,
)

SIZE = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 8,
    "vocab_size": 20,
    "max_position_embeddings": 40,
}


@pytest.mark.parametrize(("told", "read"), [(30, 30), (39, 38), (100_000, 38), (int(1e30), 38)])
@pytest.mark.parametrize("kind", ["Roberta", "MPNet"])
def test_places_of_padding_are_not_for_tokens(kind: str, told: int, read: int) -> None:
    assert most(kind, told) == read


@pytest.mark.parametrize(("told", "read"), [(30, 30), (40, 40), (100_000, 40), (int(1e30), 40)])
@pytest.mark.parametrize("kind", ["Bert", "Llama"])
def test_no_more_than_there_are_positions(kind: str, told: int, read: int) -> None:
    assert most(kind, told) == read


@pytest.mark.parametrize("told", [40, int(1e30)])
def test_a_context_takes_positions(told: int) -> None:
    model = ladder(tiny(kind="Llama", head="ForCausalLM", max_position_embeddings=40), context=[7, 9, 11])
    assert longest_input(model, SimpleNamespace(model_max_length=told)) == 37


T5 = transformers.T5Config(d_model=8, num_layers=1, num_heads=1, d_ff=8, d_kv=8, vocab_size=20)
XLNET = transformers.XLNetConfig(d_model=8, n_layer=1, n_head=1, d_inner=8, vocab_size=20)


@pytest.mark.parametrize("told", [30, int(1e30)])
@pytest.mark.parametrize("config", [T5, XLNET], ids=["T5", "XLNet"])
def test_a_model_of_relative_positions_reads_what_its_tokenizer_says(config: Any, told: int) -> None:
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    assert longest_input(model, SimpleNamespace(model_max_length=told)) == told


def most(kind: str, told: int) -> int:
    """The longest input of a model whose tokenizer tells a limit."""
    config = getattr(transformers, f"{kind}Config")(**SIZE)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    return longest_input(model, SimpleNamespace(model_max_length=told))


@pytest.mark.parametrize(
    ("config", "width"),
    [
        (transformers.RobertaConfig(**SIZE), 8),
        (T5, 8),
        (transformers.MusicgenConfig(text_encoder=T5, audio_encoder=transformers.EncodecConfig(), decoder={}), None),
        (None, None),
    ],
    ids=["RoBERTa", "T5", "two text parts", "no configuration"],
)
def test_the_width_of_a_model_is_that_of_its_text_part(config: Any, width: int | None, tmp_path: Path) -> None:
    if config is not None:
        config.save_pretrained(tmp_path)
    assert hidden_size(str(tmp_path)) == width


def test_words_of_a_list_are_read_as_after_a_space() -> None:
    """A byte-level tokenizer without `add_prefix_space` read them as if they had none before them."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(show_progress=False, initial_alphabet=alphabet)
    made.train_from_iterator(["the cat sat"], trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made)
    for _ in range(2):  # once more it changes nothing
        _read_words_after_a_space(fast)
        words = fast(["the", "cat"], is_split_into_words=True)
        assert "".join(fast.convert_ids_to_tokens(words["input_ids"])) == "\u0120the\u0120cat"
        assert {*words.word_ids()} == {0, 1}


@pytest.mark.parametrize("kind", ["Roberta", "GPT2", "MPNet"])
def test_a_model_without_its_tokenizer_is_refused(kind: str, tmp_path: Path) -> None:
    """transformers makes one that knows no words, by which all texts are alike."""
    tiny(kind).save_pretrained(tmp_path)
    with pytest.raises(FastpeftError, match="its tokenizer knows no words, only special tokens"):
        load_classifier(str(tmp_path), ["no", "yes"], CLASSIFICATION)


def test_a_decoder_pads_as_its_tokenizer_says_or_by_its_end(tmp_path: Path) -> None:
    folder = str(save_tiny_model(tmp_path / "model", "Llama", "ForCausalLM"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    decoder = load_for_next_words(folder)
    assert decoder.tokenizer.padding_side == "right", "to train on"
    for loaded in (decoder, load_classifier(folder, ["no", "yes"], CLASSIFICATION)):
        assert loaded.model.config.pad_token_id == loaded.tokenizer.pad_token_id == tokenizer.eos_token_id
