"""Masked words: which words of a text are hidden, so that a model learns to tell them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import DataCollatorForLanguageModeling

from fastpeft.data.names import UNLABELLED
from fastpeft.data.token_rows import TokenRow, TokenRows
from fastpeft.errors import FastpeftError

SHARE = 0.15  # of a text's tokens, of which 80 % become the mask, 10 % another word, and 10 % stay as they are


class Masker:
    """Hides words of rows, always the same ones for one key.

    Tokens are chosen and replaced as transformers' `DataCollatorForLanguageModeling` does it. Where chance chose none
    of a row, which is common in short texts, one is hidden all the same, as in BERT's own code.

    Raises:
        FastpeftError: the tokenizer has no mask token.
    """

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.mask_token is None:
            raise FastpeftError(
                f"{type(tokenizer).__name__} has no mask token, which the objective mlm needs. Give a model that "
                "predicts masked words."
            )
        self._mask_id = tokenizer.mask_token_id
        self._collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=SHARE)

    def __call__(self, row: TokenRow, *key: int | str) -> TokenRow:
        """A row of an `Encoder` with words hidden, which its `labels` tell: token ids, and `UNLABELLED` elsewhere."""
        row = dict(row)
        special = torch.tensor([row.pop("special_tokens_mask")])
        seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "little")
        generator = self._collator.generator = torch.Generator().manual_seed(seed)
        tokens = torch.tensor([row["input_ids"]])
        masked, labels = self._collator.torch_mask_tokens(tokens.clone(), special_tokens_mask=special)
        if not (labels != UNLABELLED).any():
            words = (special[0] == 0).nonzero()[:, 0]
            place = words[torch.randint(len(words), (), generator=generator)]
            masked[0, place], labels[0, place] = self._mask_id, tokens[0, place]
        return {**row, "input_ids": masked[0].tolist(), "labels": labels[0].tolist()}

    def fixed(self, rows: Sequence[TokenRow]) -> TokenRows:
        """Rows to measure on: whatever the seed of a run, the same words of each are hidden."""
        return TokenRows(self(row, "fixed", index) for index, row in enumerate(rows))


class MaskedRows(Dataset[TokenRow]):
    """Rows to train on, of which every epoch hides other words.

    What is hidden is a function of the seed, the epoch and the row, so that a resumed run meets what it would have met.
    """

    def __init__(self, rows: Sequence[TokenRow], tokenizer: Any, seed: int) -> None:
        self.rows = rows
        self.mask = Masker(tokenizer)
        self.seed = seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> TokenRow:
        """The row of a key (epoch, index)."""
        epoch, index = key
        return self.mask(self.rows[index], self.seed, epoch, index)
