"""Repeating the steps of a journal on the weights before them, bit for bit and with no loss computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastpeft.functional import mezo_perturb_
from fastpeft.mezo.estimator import HOME, estimator_of, moves, update
from fastpeft.mezo.journal_format import Kind, Record
from fastpeft.mezo.sharding import local_part

_BLOCK = 2**16  # elements: 256 KiB in float32 stay in cache while all steps are repeated on them


@torch.no_grad()
def repeat(header: Mapping[str, Any], records: Sequence[Record], params: Sequence[Sequence[Tensor]]) -> None:
    """Repeat on the parameters of each group what `records` did to them.

    A block of the weights takes all steps while it is in cache, then comes the next block.
    """
    how = header["noise"], header["rounding"]
    for index, group in enumerate(header["groups"]):
        passes = list(_passes(header, records, index))
        for param, described in zip(params[index], group["parameters"]):
            part, offset = local_part(param.detach(), described["offset"], described["name"])
            for block in part.flatten().split(_BLOCK) if part.is_contiguous() else [part]:
                for seeds, scales, decay in passes:
                    mezo_perturb_([block], [offset], seeds, scales, decay, *how)
                offset += block.numel()


def _passes(
    header: Mapping[str, Any], records: Sequence[Record], index: int
) -> Iterator[tuple[list[int], list[float], float]]:
    """All that `records` added to the parameters of one group: seeds, scales and the decay before the first."""
    estimator = estimator_of(header)
    group, first_eps = header["groups"][index], header["groups"][0]["eps"]
    eps, in_place = group["eps"], header["restore"] == "in_place"
    seeds: list[int] = []
    scales: list[float] = []
    decay = 0.0
    for record in records:
        drawn = estimator.seeds(header["seed"], record.step)
        at = HOME
        for point in estimator.points[: record.points]:
            point = point if in_place else (point[0], 0)
            for draw, scale in moves(at, point):
                seeds.append(drawn[draw])
                scales.append(scale * eps)
            at = point
        if record.kind == Kind.MADE:
            decays = record.rates[index] * group["weight_decay"]
            terms = update(at, record.slopes, first_eps, record.rates[index], eps, decays)
            if decays:
                yield seeds, scales, decay
                seeds, scales, decay = [], [], decays
        else:
            terms = [(draw, scale * eps) for draw, scale in moves(at, HOME)]
        seeds += [drawn[draw] for draw, _ in terms]
        scales += [scale for _, scale in terms]
    yield seeds, scales, decay
