"""An answer, token by token: what of it is delivered, and where it ends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BatchEncoding

from fastpeft.serving.generation import GenerationRequest, RequestCriteria, generate_batch


class Letters:
    """A tokenizer of bytes."""

    def decode(self, tokens: list[int], **_: Any) -> str:
        return bytes(tokens).decode(errors="replace")


def generated(text: str, *, end: bool = True, **options: Any) -> tuple[GenerationRequest, list[str]]:
    """What is delivered after each byte of a text, and its end."""
    delivered: list[Any] = []
    options = {"max_tokens": 99, **options}
    generation = GenerationRequest(None, Letters(), [7], eos_token_ids={0}, deliver=delivered.append, **options)
    for token in text.encode() + bytes(end):
        generation.append(token)
    *parts, last = delivered
    assert last is None
    assert "".join(parts) == generation.text
    return generation, parts


def test_an_answer_is_delivered_as_it_comes() -> None:
    generation, parts = generated("  two words ")
    assert (generation.text, generation.finish_reason, generation.count) == ("two words", "stop", 12)
    assert parts == ["t", "w", "o", " w", "o", "r", "d", "s"]


def test_space_around_what_goes_on_from_a_prompt_is_delivered() -> None:
    generation, parts = generated(" a b\n", strip=False)
    assert generation.text == " a b\n"
    assert parts == [" ", "a", " ", "b", "\n"]


def test_no_half_character_is_delivered() -> None:
    _, parts = generated("a\u00e9\U0001f600b")
    assert parts == ["a", "\u00e9", "\U0001f600", "b"]


@pytest.mark.parametrize(
    ("said", "stop", "text", "ended"),
    [
        ("one END two", ["END"], "one", "stop"),
        ("one EN two", ["END"], "one EN two", "stop"),
        ("one EN", ["END"], "one EN", "stop"),
        ("abcabd.", ["abd"], "abc", "stop"),
        ("one EEND", ["EEND"], "one", "stop"),
        ("a b c", ["c", "b"], "a", "stop"),
        ("END", ["END"], "", "stop"),
    ],
)
def test_nothing_of_a_stop_is_delivered(said: str, stop: list[str], text: str, ended: str) -> None:
    generation, _ = generated(said, stop=stop)
    assert (generation.text, generation.finish_reason) == (text, ended)


def test_an_answer_has_no_more_tokens_than_it_may() -> None:
    generation, _ = generated("abcdef", max_tokens=3, stop=["cx"], end=False)
    assert (generation.text, generation.finish_reason, generation.count) == ("abc", "length", 3)


@pytest.mark.parametrize(
    ("sampling", "drawn"),
    [
        # from all words: transformers leaves out all but 50 where no top_k is given
        ((0.7, 0.9), {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0}),
        ((0.0, 0.9), {"do_sample": False}),
    ],
)
def test_words_are_drawn_as_is_asked(sampling: tuple[float, float], drawn: dict[str, Any]) -> None:
    tokenizer = SimpleNamespace(pad=lambda rows, **_: BatchEncoding(), pad_token_id=0)
    requests = [
        GenerationRequest(None, tokenizer, [7], eos_token_ids={0}, max_tokens=most, sampling=sampling)
        for most in (3, 9, 5)
    ]
    given: dict[str, Any] = {}
    generate_batch(lambda batch, **options: given.update(options), tokenizer, "cpu", requests)
    assert given.items() >= {**drawn, "max_new_tokens": 9}.items()


def test_rows_end_by_themselves() -> None:
    first, second = (GenerationRequest(None, Letters(), [7], eos_token_ids={0}, max_tokens=9) for _ in range(2))
    criteria = RequestCriteria([first, second])
    assert criteria(torch.tensor([[97], [98]]), None).tolist() == [False, False]
    assert criteria(torch.tensor([[0], [99]]), None).tolist() == [True, False]
    second.abandoned = True
    assert criteria(torch.tensor([[97], [99]]), None).tolist() == [True, True]
    assert (first.text, second.text) == ("a", "bcc")
