"""`fastpeft::mezo_perturb_`: seeded noise added to parameters in place, or to a copy of one."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft.ops import noise as noise_contract
from fastpeft.ops.define import define

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


def mezo_perturb_replay_reference(
    params: list[Tensor],
    offsets: list[int],
    seeds: Tensor,
    scales: Tensor,
    decay: float,
    noise: str = "gaussian",
    rounding: str = "nearest",
) -> None:
    """`mezo_perturb_` with its terms in tensors, int64 `(n,)` and float64 `(n,)`."""
    mezo_perturb_in_place_reference(params, offsets, seeds.tolist(), scales.tolist(), decay, noise, rounding)


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


# the same, with seeds (n,) int64 and scales (n,) float64 read from the device when the pass runs, so that a replay
# of a captured CUDA graph takes what they hold by then
define(
    "mezo_perturb_replay_",
    "(Tensor(a!)[] params, int[] offsets, Tensor seeds, Tensor scales, float decay, str noise='gaussian', "
    "str rounding='nearest') -> ()",
    shapes=lambda *_, **__: None,
    reference=mezo_perturb_replay_reference,
)


define(
    "mezo_perturb",
    "(Tensor param, int offset, int[] seeds, float[] scales, float decay, str noise='gaussian', "
    "str rounding='nearest') -> Tensor",
    shapes=lambda param, *_, **__: torch.empty_like(param),
    reference=mezo_perturb_reference,
)
