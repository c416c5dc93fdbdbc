"""Repeating the steps of a journal on the weights before them, bit for bit and with no loss computed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.errors import FastpeftError
from fastpeft.functional import mezo_perturb_
from fastpeft.mezo.estimator import HOME, Estimator, moves, update
from fastpeft.mezo.journal_format import Kind, Record
from fastpeft.mezo.sharding import local_part, names_of, plain_name, without_parallel

_BLOCK = 2**16  # elements: 256 KiB in float32 stay in cache while all steps are repeated on them


def describe_groups(groups: Iterable[tuple[Mapping[str, Any], Sequence[int]]]) -> list[dict[str, Any]]:
    """What a header says of an optimizer's groups, each given with the offsets of its parameters in the noise."""
    described = []
    for group, offsets in groups:
        parameters = [
            {"name": name, "shape": list(param.shape), "dtype": str(param.dtype), "offset": offset}
            for name, param, offset in zip(names_of(group), group["params"], offsets)
        ]
        described.append({"eps": group["eps"], "weight_decay": group["weight_decay"], "parameters": parameters})
    return described


def described_params(
    groups: Sequence[Mapping[str, Any]], model: nn.Module | Sequence[Tensor], path: Path
) -> list[list[Tensor]]:
    """The parameters, in `model` or given in their order, of each group in the header of the journal `path`.

    Raises:
        FastpeftError: one is missing, or they differ in number, shape or dtype.
    """
    described = [each for group in groups for each in group["parameters"]]
    if isinstance(model, nn.Module):
        named = {plain_name(name): param for name, param in without_parallel(model).named_parameters()}
        missing = [each["name"] for each in described if each["name"] not in named]
        if missing and missing[0].isdecimal():
            raise FastpeftError(
                f"the run of {path} trained parameters without names, so a model does not tell which they are. Pass a "
                "list of them, in the order in which the optimizer had them."
            )
        if missing:
            raise FastpeftError(
                f"the model has no parameter {missing[0]!r}, which the run of {path} trained. Load the model of that "
                "run, by the version of the library that made it."
            )
        given: list[Tensor] = [named[each["name"]] for each in described]
    else:
        given = list(model)
    if [(list(p.shape), str(p.dtype)) for p in given] != [(each["shape"], each["dtype"]) for each in described]:
        raise FastpeftError(
            f"the parameters differ in number, shape or dtype from those that the run of {path} trained. Load the "
            "model of that run."
        )
    rest = iter(given)
    return [[next(rest) for _ in group["parameters"]] for group in groups]


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
    estimator = Estimator(header["estimator"], header["num_estimates"])
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
