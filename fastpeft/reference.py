"""Each op in plain PyTorch: the oracle of the tests, the fallback where nothing faster runs, and the baseline of the
benches.

Dimension letters: M rows of x (all leading dimensions together), K in_features, N out_features, R rank.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def siva_linear(
    x: Tensor, weight: Tensor, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`h = x W^T + ((x V^T) * s) U^T + b`, and `p = x V^T`."""
    p = F.linear(x, v)
    h = F.linear(x, weight, bias) + F.linear(p * s, u)
    return h, p


def siva_linear_backward(
    dh: Tensor,
    x: Tensor,
    weight: Tensor,
    u: Tensor,
    s: Tensor,
    v: Tensor,
    p: Tensor,
    need_dx: bool,
    need_du: bool,
    need_dv: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `siva_linear`, with `dp = (dh U) * s`:

    `dx = dh W + dp V`, `dU = dh^T (p * s)`, `dV = dp^T x`, `db = sum of dh over rows`.
    """
    empty = dh.new_empty(0)
    rows = dh.reshape(-1, dh.shape[-1])  # (M, N)
    dp = (rows @ u) * s if need_dx or need_dv else empty  # (M, R)
    dx = (rows @ weight + dp @ v).view(*dh.shape[:-1], weight.shape[1]) if need_dx else empty
    du = rows.t() @ (p.reshape(rows.shape[0], -1) * s) if need_du else empty
    dv = dp.t() @ x.reshape(rows.shape[0], -1) if need_dv else empty
    dbias = rows.sum(0) if need_dbias else empty
    return dx, du, dv, dbias
