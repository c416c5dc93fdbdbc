"""Many texts are encoded some at a time, as they would be at once, and of a word the first token has its tag."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from samples import reviews, save_tiny_model

from fastpeft.data.examples import Examples
from fastpeft.data.names import UNLABELLED
from fastpeft.data.problems import CLASSIFICATION, MASKED_WORDS, NEXT_WORDS, TAGGING, Problem
from fastpeft.support.stages import listening
from fastpeft.training.encoding import Encoder, _first_tokens

TEXTS = [text for text, _ in reviews(10)]
WORDS = [text.split() for text in TEXTS]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return transformers.AutoTokenizer.from_pretrained(save_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize(
    ("problem", "examples"),
    [
        (CLASSIFICATION, Examples(TEXTS, [*range(10)])),
        (TAGGING, Examples(WORDS, [[*range(len(words))] for words in WORDS])),
        (MASKED_WORDS, Examples(TEXTS, [])),
        (NEXT_WORDS, Examples(TEXTS, [])),
    ],
    ids=lambda each: each.name if isinstance(each, Problem) else "",
)
def test_some_at_a_time(tokenizer: Any, monkeypatch: pytest.MonkeyPatch, problem: Problem, examples: Examples) -> None:
    encoder = Encoder(tokenizer, 5, None, problem)
    expected, cut = encoder.encode_counted(examples)
    assert (len(expected), cut > 0) == (10, True)
    monkeypatch.setattr("fastpeft.training.encoding._CHUNK", 4)
    monkeypatch.setattr("fastpeft.data.next_words._REPORT_EVERY", 4)
    told = []
    with listening(lambda stage, done, total, measured: told.append((stage, done, total))):
        rows, counted = encoder.encode_counted(examples)
    assert told == [("encoding texts", 4, 10), ("encoding texts", 8, 10)]
    assert ([*rows], counted) == ([*expected], cut)


def test_a_text_as_long_as_the_limit_is_not_cut(tokenizer: Any) -> None:
    length = len(tokenizer(TEXTS[0])["input_ids"])
    encoders = [Encoder(tokenizer, limit, None, CLASSIFICATION) for limit in (length - 1, length)]
    assert [encoder.encode_counted(Examples(TEXTS[:1], [0]))[1] for encoder in encoders] == [1, 0]


def test_a_word_of_several_tokens_counts_once() -> None:
    assert _first_tokens([None, 0, 0, 1, None], [5, 6]) == [UNLABELLED, 5, UNLABELLED, 6, UNLABELLED]
