"""Short rows of next words joined to longer ones, in which each text still reads itself alone.

A joined row has `position_ids` that begin anew with each text and no attention mask: by that transformers' decoders
keep its texts apart. Not every model does, so `keep_apart` asks the model itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorForTokenClassification

from fastpeft.data.names import UNLABELLED
from fastpeft.errors import FastpeftError, first_line

POSITIONS = "position_ids"
_TOKENS = 8  # of each of the two texts that are tried
_ROUNDING = 0.1  # of what another text in sight would change; models that keep texts apart are below 1e-4


def pack(rows: Sequence[Mapping[str, list[int]]], max_length: int) -> list[dict[str, Any]]:
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
    joined: list[list[Mapping[str, list[int]]]] = []
    with_room: list[list[int]] = [[] for _ in range(max_length + 1)]  # joined rows, by how many tokens still fit
    for row in sorted(rows, key=lambda row: len(row["input_ids"]), reverse=True):
        length = len(row["input_ids"])
        room = next((room for room in range(length, max_length + 1) if with_room[room]), None)
        if room is None:
            room, place = max_length, len(joined)
            joined.append([])
        else:
            place = with_room[room].pop()
        joined[place].append(row)
        with_room[room - length].append(place)
    return [
        {
            **{name: [token for row in texts for token in row[name]] for name in ("input_ids", "labels")},
            POSITIONS: [position for row in texts for position in range(len(row["input_ids"]))],
        }
        for texts in joined
    ]


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
def keep_apart(model: Any, rows: Sequence[Mapping[str, list[int]]], name: str) -> None:
    """Let a model train on joined rows, without a cache, in which texts would not be kept apart.

    Raises:
        FastpeftError: even so a text does not get the same logits after another one as by itself.

    Args:
        model: a decoder.
        rows: texts, not joined, of which the first two are tried; one is tried after itself.
        name: what the error calls the model.
    """
    model.config.use_cache = False  # as the Trainer has it, from some version on
    first, second = (row["input_ids"][:_TOKENS] for row in (*rows, *rows)[:2])
    device, training = next(model.parameters()).device, model.training
    model.eval()

    def logits(tokens: list[int], **given: Any) -> Tensor:
        found: Tensor = model(input_ids=torch.tensor([tokens], device=device), **given).logits
        return found[0, -len(second) :].float()

    try:
        alone, seeing = logits(second), logits(first + second)
        positions = torch.tensor([[*range(len(first)), *range(len(second))]], device=device)
        apart = (logits(first + second, **{POSITIONS: positions}) - alone).abs().max()
    except Exception as error:  # a model that takes no positions raises almost any type
        raise FastpeftError(
            f"`packing` is on, but the model {name!r} cannot read joined texts: {first_line(error)} Leave it out."
        ) from error
    finally:
        model.train(training)
    if apart > _ROUNDING * (seeing - alone).abs().max():
        raise FastpeftError(
            f"`packing` is on, but in the model {name!r} a text would see those joined before it, whatever their "
            "positions. Leave it out."
        )
