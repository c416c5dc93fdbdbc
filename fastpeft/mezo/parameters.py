"""What an optimizer's parameters are called, whatever wraps their model, and how a journal describes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fastpeft.errors import FastpeftError


def names_of(group: Mapping[str, Any]) -> list[str]:
    """Names of the parameters of an optimizer's group, or their numbers in it."""
    return [*map(plain_name, group.get("param_names") or ())] or [str(number) for number in range(len(group["params"]))]


def plain_name(name: str) -> str:
    """A parameter's name without what `torch.compile` puts into it."""
    return name.replace("_orig_mod.", "")


def without_parallel(model: nn.Module) -> nn.Module:
    """The model that DistributedDataParallel or DataParallel wraps, in which parameters have the names of one process.

    Any other model is given back.
    """
    outermost: Any = getattr(model, "_orig_mod", model)  # of a model that torch.compile wraps
    wraps = isinstance(outermost, (DataParallel, DistributedDataParallel))
    return without_parallel(outermost.module) if wraps else model


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
