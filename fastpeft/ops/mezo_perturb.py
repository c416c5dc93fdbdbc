"""`fastpeft::mezo_perturb_`: seeded noise added to parameters in place, or to a copy of one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastpeft.errors import FastpeftError
from fastpeft.ops import noise as noise_contract
from fastpeft.ops.define import define
from fastpeft.ops.dtypes import FLOATS
from fastpeft.ops.noise import NOISE, ROUNDINGS

NOISE_CHUNK = 2**20  # elements whose noise exists at one time


@torch.no_grad()
def mezo_perturb_in_place_reference(
    params: list[Tensor],
    offsets: list[int],
    seeds: list[int],
    scales: list[float],
    decay: float,
    noise: str = "gaussian",
    rounding: str = "nearest",
) -> None:
    """`p <- round(fl(fl(a p) + fl(scale z)))` for each (seed, scale) in order, `a = 1 - decay` with the first only.

    `fl` is float32 (float64 for float64 parameters, with z widened), `round` is to the storage dtype.
    """
    draw = noise_contract.NOISE[noise]
    for param, offset in zip(params, offsets, strict=True):
        flat = param.reshape(-1)  # C order of the logical tensor: a view, or a copy that is written back
        compute = torch.float64 if param.dtype == torch.float64 else torch.float32
        for start in range(0, flat.numel(), NOISE_CHUNK):
            chunk = flat[start : start + NOISE_CHUNK]
            first, a = offset + start, 1.0 - decay
            for seed, scale in zip(seeds, scales, strict=True):
                z = draw(first, chunk.numel(), seed, param.device).to(compute)
                value = chunk.to(compute) * a + z * scale
                if rounding == "stochastic":
                    value = noise_contract.round_stochastic(value, param.dtype, first, seed)
                chunk.copy_(value)
                a = 1.0
        if not param.is_contiguous():
            param.copy_(flat.view(param.shape))


def mezo_perturb_reference(
    param: Tensor,
    offset: int,
    seeds: list[int],
    scales: list[float],
    decay: float,
    noise: str = "gaussian",
    rounding: str = "nearest",
) -> Tensor:
    """`mezo_perturb_` on a copy of `param`."""
    out = param.detach().clone()
    mezo_perturb_in_place_reference([out], [offset], seeds, scales, decay, noise, rounding)
    return out


# terms (seed, scale) are applied in order; decay goes with the first
define(
    "mezo_perturb_",
    "(Tensor(a!)[] params, int[] offsets, int[] seeds, float[] scales, float decay, str noise='gaussian', "
    "str rounding='nearest') -> ()",
    shapes=lambda *_, **__: None,
    reference=mezo_perturb_in_place_reference,
)


define(
    "mezo_perturb",
    "(Tensor param, int offset, int[] seeds, float[] scales, float decay, str noise='gaussian', "
    "str rounding='nearest') -> Tensor",
    shapes=lambda param, *_, **__: torch.empty_like(param),
    reference=mezo_perturb_reference,
)


def mezo_perturb_(
    params: Sequence[Tensor],
    offsets: Sequence[int],
    seeds: Sequence[int],
    scales: Sequence[float],
    decay: float = 0.0,
    noise: str = "gaussian",
    rounding: str = "nearest",
) -> None:
    r"""Add seeded noise to parameters in place; z is made where it is used and never stored.

    For each term (seed, scale) in order: `p <- (1 - decay) * p + scale * z(seed, offset + e)`, decay with the first
    term only. e counts the parameter's elements in C order of its shape, whatever its strides.

    Args:
        params: float16, bfloat16, float32 or float64, any strides, no two sharing memory.
        offsets: one per parameter, from 0: where its elements stand in the noise.
        seeds: one per term, 0 to 2^63 - 1.
        scales: one per term; rounded once to float32 (not for float64 parameters).
        decay: weight decay of this update, for instance learning rate times weight decay; default 0.
        noise: "gaussian" (standard normal) or "rademacher" (+1 or -1, each with probability a half).
        rounding: to the storage dtype, "nearest" (even) or "stochastic" (unbiased; half precision only, float32 and
            float64 are stored as computed).

    Raises:
        FastpeftError: lengths differ, an argument is out of its range, or tensors overlap in memory.

    Notes:
        z depends on (seed, flat index) alone: the same bits on every device, in every dtype, whatever the threads or
        the order of the parameters. Each term is rounded to storage before the next. Autograd sees new versions of the
        parameters and no gradient.

    Example:
        >>> weight = torch.zeros(2, 3)
        >>> mezo_perturb_([weight], [0], seeds=[7], scales=[1e-3])
        >>> mezo_perturb_([weight], [0], seeds=[7], scales=[-1e-3])
        >>> weight.abs().max().item()
        0.0
    """
    _check_perturbation(params, offsets, seeds, scales, decay, noise, rounding)
    _check_no_overlap(params)
    terms, perturb = (list(seeds), list(scales)), torch.ops.fastpeft.mezo_perturb_
    with torch.no_grad():
        # a list goes to what is registered for one of its kinds of devices, which may pass over the others
        kinds = dict.fromkeys(param.device.type for param in params)
        for kind in kinds:
            here = [i for i, param in enumerate(params) if len(kinds) == 1 or param.device.type == kind]
            perturb([params[i] for i in here], [offsets[i] for i in here], *terms, decay, noise, rounding)
    torch.autograd.graph.increment_version(params)


def mezo_perturb(
    param: Tensor,
    offset: int,
    seeds: Sequence[int],
    scales: Sequence[float],
    decay: float = 0.0,
    noise: str = "gaussian",
    rounding: str = "nearest",
) -> Tensor:
    """A perturbed copy of one parameter, which itself stays as it is.

    Args and Raises are those of `mezo_perturb_`. The copy has the parameter's
    shape, dtype and, where they are dense, strides. No gradient flows through it.

    Example:
        >>> weight = torch.zeros(2, 3)
        >>> mezo_perturb(weight, 0, seeds=[7], scales=[1.0]).shape
        torch.Size([2, 3])
    """
    _check_perturbation([param], [offset], seeds, scales, decay, noise, rounding)
    with torch.no_grad():
        return torch.ops.fastpeft.mezo_perturb(param, offset, list(seeds), list(scales), decay, noise, rounding)


def _check_perturbation(
    params: Sequence[Tensor],
    offsets: Sequence[int],
    seeds: Sequence[int],
    scales: Sequence[float],
    decay: float,
    noise: str,
    rounding: str,
) -> None:
    if len(params) != len(offsets) or len(seeds) != len(scales):
        raise FastpeftError(
            f"mezo_perturb takes one offset per parameter and one scale per seed; got {len(params)} parameters with "
            f"{len(offsets)} offsets, and {len(seeds)} seeds with {len(scales)} scales."
        )
    for param in params:
        if param.dtype not in FLOATS or param.layout != torch.strided:
            raise FastpeftError(
                f"mezo_perturb got a parameter of {param.dtype} and {param.layout}; allowed are dense float16, "
                "bfloat16, float32 and float64. Leave quantised and integer tensors out of the trained parameters."
            )
    for integer in (*offsets, *seeds):
        if isinstance(integer, (float, Tensor)) or not 0 <= integer < 2**63:
            raise FastpeftError(
                f"mezo_perturb: an offset or seed is {integer!r}; allowed are whole numbers of Python, 0 to 2^63 - 1."
            )
    for number in (*scales, decay):
        if not abs(number) <= torch.finfo(torch.float32).max:  # NaN fails this too
            raise FastpeftError(
                f"mezo_perturb: a scale or decay is {number}; allowed are finite float32 numbers. A loss that is not "
                "finite gives such a step: skip it or lower the learning rate."
            )
    if decay and not seeds:
        raise FastpeftError(
            f"mezo_perturb: decay is {decay}. It is applied with the first term, but no term was given. Give one; a "
            "term of scale 0 adds no noise."
        )
    if noise not in NOISE:
        raise FastpeftError(f"mezo_perturb: noise is {noise!r}; allowed are {', '.join(NOISE)}.")
    if rounding not in ROUNDINGS:
        raise FastpeftError(f"mezo_perturb: rounding is {rounding!r}; allowed are {', '.join(ROUNDINGS)}.")


def _check_no_overlap(params: Sequence[Tensor]) -> None:
    """An element reached twice would be perturbed twice, by two values of z."""
    ranges: dict[torch.device, list[tuple[int, int, int]]] = {}
    for index, param in enumerate(params):
        if param.numel() == 0 or param.is_meta:
            continue
        extent = 1  # elements from the first to the last in memory
        for stride, size in sorted(zip(param.stride(), param.shape)):
            if size > 1 and stride < extent:
                raise FastpeftError(
                    f"mezo_perturb_: parameter {index} of shape {tuple(param.shape)} and strides {param.stride()} "
                    "reaches some of its own elements twice; pass a contiguous copy."
                )
            extent += (size - 1) * stride
        start = param.data_ptr()
        ranges.setdefault(param.device, []).append((start, start + extent * param.element_size(), index))
    for spans in ranges.values():
        spans.sort()
        for (_, end, one), (start, _, other) in itertools.pairwise(spans):
            if start < end:
                raise FastpeftError(
                    f"mezo_perturb_: parameters {one} and {other} share memory or interleave in it; pass tied weights "
                    "once, and of a tensor either the whole or its views that do not cross."
                )
