"""Texts as rows of tokens with their labels, and rows as batches."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import DataCollatorForTokenClassification

from fastpeft.data import next_words
from fastpeft.data.examples import Examples
from fastpeft.data.names import UNLABELLED
from fastpeft.data.packed_rows import PackedCollator
from fastpeft.data.problems import MASKED_WORDS, NEXT_WORDS, Problem
from fastpeft.data.token_rows import TokenRow, TokenRows
from fastpeft.errors import FastpeftError
from fastpeft.prompts.model import PromptCollator
from fastpeft.prompts.template import Prompt
from fastpeft.support.stages import report

logger = logging.getLogger(__name__)

DEFAULT_MAX_LENGTH = 128  # tokens
DEFAULT_MAX_LENGTH_CAUSAL = 512  # tokens, where a decoder learns next words: prompts and turns are in it
_CHUNK = 1_000  # texts that are encoded at one time: a tokenizer keeps far more of each than its tokens


@dataclass(frozen=True)
class Encoder:
    """Makes texts rows of tokens, put into `prompt` where there is one and cut at `max_length` tokens."""

    tokenizer: Any
    max_length: int
    prompt: Prompt | None
    problem: Problem

    def encode_counted(self, examples: Examples) -> tuple[TokenRows, int]:
        """Examples as rows that are learned or measured, as `encode` makes them, and how many texts were cut.

        Of masked words and tags, rows without a word that has a token are left out: their loss would be the mean of
        nothing. Next words are encoded by `next_words.encode_counted`.
        """
        if self.prompt is None and self.problem is NEXT_WORDS:
            return next_words.encode_counted(self.tokenizer, examples.texts, self.max_length)
        kept, cut = TokenRows(), 0
        for start in range(0, len(examples), _CHUNK):
            if start:
                report("encoding texts", start, len(examples))
            some = examples.take(range(len(examples))[start : start + _CHUNK])
            rows = self.encode(some)
            cut += self.count_cut(some, rows)
            for row in filter(self._is_worth_learning, rows):
                kept.append(row)
        if not kept:
            raise FastpeftError(
                f"no text has a word among its first {self.max_length} tokens. Give longer texts or a larger "
                "`max_length`."
            )
        return kept, cut

    def encode(self, examples: Examples) -> list[TokenRow]:
        """Each example as a row of token ids with its label or labels, cut at `max_length` tokens and not padded.

        Of two texts the longer is cut first. Where words have tags, the first token of each word is labelled. Where
        masked words are learned, rows have no labels yet but `special_tokens_mask`.
        """
        if self.prompt is not None:
            return self.prompt.encode(self.tokenizer, examples.texts, examples.labels, self.max_length)
        texts = zip(*examples.texts) if examples.is_pair else [examples.texts]
        unlabelled = self.problem is MASKED_WORDS
        encoded = self.tokenizer(
            *map(list, texts),
            truncation=True,
            max_length=self.max_length,
            is_split_into_words=self.problem.per_token and not unlabelled,
            return_special_tokens_mask=unlabelled,
        )
        rows = [{name: column[i] for name, column in encoded.items()} for i in range(len(examples))]
        if unlabelled:
            return rows
        labels = examples.labels
        if self.problem.per_token:
            labels = [_first_tokens(encoded.word_ids(i), tags) for i, tags in enumerate(labels)]
        return [{**row, "labels": label} for row, label in zip(rows, labels)]

    def count_cut(self, examples: Examples, rows: Sequence[TokenRow]) -> int:
        """How many texts were cut, given the row of each; of next words see `encode_counted`."""
        one_longer = replace(self, max_length=self.max_length + 1)
        full = [index for index, row in enumerate(rows) if len(row["input_ids"]) == self.max_length]
        longer = one_longer.encode(examples.take(full)) if full else []
        return sum(len(row["input_ids"]) > self.max_length for row in longer)

    def warn_of_texts(self, examples: Examples, rows: Sequence[TokenRow]) -> None:
        """Warn of empty texts, and of words without a token in their rows, which are not learned or measured."""
        if self.problem.of_texts_alone:  # of which the empty ones are left out
            return
        texts = examples.texts
        if empty := sum(not any(map(str.strip, [text] if isinstance(text, str) else text)) for text in texts):
            logger.warning("%d of %d texts are empty; they are learned and measured as the others", empty, len(texts))
        if not self.problem.per_token:
            return
        words = sum(map(len, texts))
        read = sum(label != UNLABELLED for row in rows for label in row["labels"])
        if read < words:
            logger.warning(
                "%d of %d words have no token within the maximum length of %d and are left out; a larger `max_length` "
                "(up to the model's) or shorter rows keep them, but for those of signs that the tokenizer drops",
                words - read,
                words,
                self.max_length,
            )

    def _is_worth_learning(self, row: TokenRow) -> bool:
        """Of masked words a row that has a word to hide, of tags one with a word that has a token; else any."""
        if self.problem is MASKED_WORDS:
            return 0 in row["special_tokens_mask"]
        return not self.problem.per_token or {*row["labels"]} != {UNLABELLED}


def _first_tokens(words: Sequence[int | None], tags: Sequence[int]) -> list[int]:
    """A label for each token, given the word that it is of: the word's tag where a word begins."""
    before = [None, *words]
    return [UNLABELLED if word is None or word == last else tags[word] for word, last in zip(words, before)]


def collator(tokenizer: Any, problem: Problem, pad_to_multiple_of: int | None = None) -> Any:
    """What makes a batch of rows of an `Encoder`."""
    if problem is NEXT_WORDS:
        return PackedCollator(tokenizer, pad_to_multiple_of=pad_to_multiple_of)
    kind = DataCollatorForTokenClassification if problem.per_token else PromptCollator
    return kind(tokenizer, pad_to_multiple_of=pad_to_multiple_of)
