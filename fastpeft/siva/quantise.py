"""A frozen residual in 8 or 4 bits: `W0 = Q + (U * s) V` to rounding, Q being what a format makes of the rest.

The factors take out the largest directions, so the rest has a smaller range and is rounded more finely (QPiSSA: Meng,
Wang, Zhang 2024). Given Q, the best factors are the top triplets of `W0 - Q`; given the factors, Q is another. So the
two are made in turns, as LoftQ does from factors of zero (Li, Yu, Liang, He, Karampatziakis, Chen, Zhao 2023). A turn
ends with Q. So Q follows from the pretrained weight and the factors in a file, and no file holds it. The gain is in
`bench/data/siva_quantised.csv`; the formats are those of `fastpeft/ops/quantise.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft.ops.quantise import Format, QuantisedWeight
from fastpeft.siva.decompose import Factors, decompose, near_triplets, subtract

ITERATIONS = 5
_FIRST = 4  # power iterations


def decompose_quantised(
    weight: Tensor, r: int, kind: Format, iterations: int = ITERATIONS, name: str = "weight", niter: int | None = None
) -> tuple[Factors, QuantisedWeight]:
    """Split `weight` into factors of rank r that train and a quantised rest.

    Args:
        weight: `(N, K)`, any floating dtype.
        r: 1 to min(N, K).
        kind: the format of the rest.
        iterations: how often the factors are made again from the weight less the quantised rest. 0: they are the top
            triplets of the weight.
        name: what error messages call the weight.
        niter: as `decompose` has it, of the first factors. None is 4 where others follow: the last are as good then.

    Returns:
        Factors in float32, and the rest `quant(W0 - (U * s) V)`. Beside 4 bits u and v are rounded to bfloat16, in
        which they can be kept: the rest makes up for it. In 8 bits it would be rounded less finely for that.

    Raises:
        FastpeftError: as `decompose` does.
    """
    niter = _FIRST if niter is None and iterations else niter
    factors = _kept(decompose(weight, r, name=name, niter=niter).factors, kind)
    exact = weight.detach().float()
    rest = QuantisedWeight(subtract(exact, factors), kind)
    for _ in range(iterations if weight.device.type != "meta" else 0):
        # one multiplication: the factors of the turn before are near, and the turns converge together
        factors = near_triplets(exact - rest.dequantise(torch.float32), r, start=factors.v.t())
        factors = _kept(factors, kind)
        rest = QuantisedWeight(subtract(exact, factors), kind)
    return factors, rest


def _kept(factors: Factors, kind: Format) -> Factors:
    if kind == "int8":
        return factors
    return factors._replace(u=factors.u.bfloat16().float(), v=factors.v.bfloat16().float())
