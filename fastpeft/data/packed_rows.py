"""Short rows of next words joined to longer ones, in which each text still reads itself alone.

A joined row has `position_ids` that begin anew with each text and no attention mask: by that transformers' decoders
keep its texts apart. Not every model does, so `prepare_for_joined_rows` asks the model itself.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorForTokenClassification

from fastpeft.data.names import UNLABELLED
from fastpeft.data.token_rows import TokenRow, TokenRows
from fastpeft.errors import FastpeftError, first_line
from fastpeft.support.eval_mode import in_eval_mode

POSITIONS = "position_ids"
_TOKENS = 8  # of each of the two texts that are tried
# What another text before it may change of a text's logits, as a share of the largest: experts group tokens in another
# way, 1e-7; models that keep texts apart have 0, also in half precision. One that carries a state over had 3e-3.
_UNSEEN = 1e-5
_AT_ITS_PLACE = 0.1  # of what other positions would change


def pack(rows: Sequence[TokenRow], max_length: int) -> TokenRows:
    """The texts of `rows`, each whole in one joined row of at most `max_length` tokens.

    Each goes, the longest first, where it leaves the least room (best fit by decreasing length).

    Args:
        rows: with `input_ids`, and `labels` of which the first is none; none longer than `max_length`.
        max_length: in tokens.

    Example:
        >>> rows = [{"input_ids": [7] * n, "labels": [-100] * n} for n in (2, 5, 3)]
        >>> [row["position_ids"] for row in pack(rows, 6)]
        [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1]]
    """
    joined: list[list[int]] = []  # places of rows
    left: list[tuple[int, int]] = []  # how many tokens still fit, and in which joined row, in order
    lengths = [len(row["input_ids"]) for row in rows]
    for row in sorted(range(len(rows)), key=lengths.__getitem__, reverse=True):
        length = lengths[row]
        found = bisect.bisect_left(left, (length, 0))
        if found < len(left):
            room, place = left.pop(found)
        else:
            room, place = max_length, len(joined)
            joined.append([])
        joined[place].append(row)
        if room > length:
            bisect.insort(left, (room - length, place))
    return TokenRows(_join([rows[row] for row in texts]) for texts in joined)


def _join(texts: Sequence[TokenRow]) -> TokenRow:
    return {
        **{name: [token for row in texts for token in row[name]] for name in ("input_ids", "labels")},
        POSITIONS: [position for row in texts for position in range(len(row["input_ids"]))],
    }


def texts_of(row: Mapping[str, Any]) -> int:
    """How many texts a row of `input_ids` has, joined or not; of a batch of tensors, how many its rows have."""
    positions = row.get(POSITIONS)
    if positions is None:
        return len(row["input_ids"]) if isinstance(row["input_ids"], Tensor) else 1
    return int((torch.as_tensor(positions) == 0).sum())


class PackedCollator(DataCollatorForTokenClassification):
    """Makes batches of joined rows, and of others as its base class does.

    What fills a joined row up goes on with the positions of its last text, which comes before it and cannot see it.
    """

    def torch_call(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        if POSITIONS not in features[0]:
            batch: dict[str, Tensor] = super().torch_call(features)
            return batch
        multiple = self.pad_to_multiple_of or 1
        width = -(-max(len(row["input_ids"]) for row in features) // multiple) * multiple

        def filled(name: str, row: dict[str, Any]) -> list[int]:
            missing = width - len(row[name])
            if name == POSITIONS:
                return [*row[name], *range(row[name][-1] + 1, row[name][-1] + 1 + missing)]
            return row[name] + [UNLABELLED if name == "labels" else self.tokenizer.pad_token_id] * missing

        return {name: torch.tensor([filled(name, row) for row in features]) for name in features[0]}


@torch.no_grad()
def prepare_for_joined_rows(model: Any, rows: Sequence[Mapping[str, list[int]]], name: str) -> None:
    """Prepare a model for joined rows, and try on two texts whether it keeps them apart.

    Two things must hold of a text that stands after another. What that one says must not change its logits; and these
    are those of the text by itself, so it is read at its own positions. Passes with a cache do not keep texts apart: it
    is turned off, as the Trainer of transformers does too.

    Args:
        model: a decoder.
        rows: texts, not joined, of which the first two are tried; one is tried after itself.
        name: what the error calls the model.

    Raises:
        FastpeftError: one of the two does not hold.
    """
    model.config.use_cache = False
    first, second = (rows[place]["input_ids"][:_TOKENS] for place in (0, min(1, len(rows) - 1)))
    other = [token + 1 if token == min(first) else token - 1 for token in first]  # all of them tokens
    device = next(model.parameters()).device

    def logits(tokens: list[int], **given: Any) -> Tensor:
        found: Tensor = model(input_ids=torch.tensor([tokens], device=device), **given).logits
        return found[0, -len(second) :].float()

    try:
        with in_eval_mode(model.modules()):
            positions = {POSITIONS: torch.tensor([[*range(len(first)), *range(len(second))]], device=device)}
            apart, after_other = (logits(before + second, **positions) for before in (first, other))
            alone, seeing = logits(second), logits(first + second)
    except Exception as error:  # a model that takes no positions raises almost any type
        raise FastpeftError(
            f"`packing` is on, but the model {name!r} cannot read joined texts: {first_line(error)} Leave it out."
        ) from error
    seen = (apart - after_other).abs().max() > _UNSEEN * apart.abs().max()
    if seen or (apart - alone).abs().max() > _AT_ITS_PLACE * (seeing - alone).abs().max():
        raise FastpeftError(
            f"`packing` is on, but in the model {name!r} a text would see those joined before it, whatever their "
            "positions. Leave it out."
        )
