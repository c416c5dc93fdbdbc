"""The singular value decomposition that SiVA starts from.

Only the top r singular triplets of a weight are needed. They come from the Gram matrix of its shorter side, in float64,
by a randomised block Krylov method (Halko, Martinsson, Shkolnisky, Tygert 2011): the space grows from a seeded start
until the leading singular vectors in it are known to `_ACCURACY`. Where the singular values lie too close for that, all
eigenvectors are computed. `bench/data/siva_init.csv` has the measurements behind these choices.

Nearly these triplets come from a few power iterations, in a small part of the time.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch import Tensor

from fastpeft.errors import FastpeftError

logger = logging.getLogger(__name__)

_ACCURACY = 1e-8  # of the subspace (the sine of its largest angle): float32 resolves 6e-8
_BLOCK = 8  # vectors that the Krylov space grows by; fewer waste products, more need a larger space
_BLOCKS_A_CHECK = 4
_LARGEST_SHARE = 0.25  # of all directions; a Krylov space beyond it costs as much as all eigenvectors
_SMALL = 512  # shorter sides below it have all eigenvectors computed in a few hundredths of a second
_NEAR = 8  # vectors beyond r that power iterations carry along
_SEED = 0


class Factors(NamedTuple):
    """The top-r singular triplets of a weight, in float32: `u (N, r)`, `s (r,)`, `v (r, K)`."""

    u: Tensor
    s: Tensor
    v: Tensor

    def product(self) -> Tensor:
        """`(u * s) v`, `(N, K)`."""
        return ((exact(self.u) * exact(self.s)) @ exact(self.v)).to(self.u.dtype)


class Decomposition(NamedTuple):
    """A weight split in two: the factors that train, and the rest `(N, K)` in the dtype of the weight."""

    factors: Factors
    residual: Tensor


def decompose(
    weight: Tensor, r: int, d: int | None = None, name: str = "weight", niter: int | None = None
) -> Decomposition:
    r"""Split `weight` into its top-r singular triplets and the rest.

    `W0 = U0 diag(S0) V0`; the triplets 1..r become the factors. With `d` None the rest is `W0 - (U0 * s) V0`,
    otherwise it consists of the triplets r+1..d, and those above d are dropped on purpose.

    Args:
        weight: `(N, K)`, any floating dtype.
        r: 1 to min(N, K).
        d: r to min(N, K), or None for the full rank.
        name: what error messages call the weight.
        niter: None computes the triplets to the precision of float32. A number computes them nearly, by that many power
            iterations (Halko, Martinsson, Tropp 2011); d is None then.

    Returns:
        Factors in float32, ordered by singular value, the largest-magnitude entry of each column of u positive;
        and the rest in the dtype of `weight`, computed in float32 (float64 for float64) and rounded once.

    Notes:
        Two calls on one machine agree bit by bit, and as a rule with another number of threads too, since float64 is
        rounded to float32 last. Two machines agree to rounding, which a small gap between singular values magnifies.

    Raises:
        FastpeftError: the weight is not a finite floating matrix, or r or d is out of range.
    """
    check_decomposable(weight, r, d, name)
    weight = weight.detach()
    if weight.device.type == "meta":
        n, k = weight.shape
        factors = Factors(*(weight.new_empty(shape, dtype=torch.float32) for shape in ((n, r), (r,), (r, k))))
        return Decomposition(factors, torch.empty_like(weight))
    if (d := lossy_rank(weight.shape, d)) is not None:
        u, s, v = _triplets(weight, d, name)
        rest = (u[:, r:] * s[r:]) @ v[r:]
        factors = _fix_signs(u[:, :r], s[:r], v[:r], weight.device)
        return Decomposition(factors, rest.to(weight.dtype).to(weight.device))
    factors = top_triplets(weight, r, name, niter)
    return Decomposition(factors, subtract(weight, factors))


def top_triplets(weight: Tensor, r: int, name: str = "weight", niter: int | None = None) -> Factors:
    """The factors that `decompose` gives for a weight of full rank, without the rest."""
    if niter is None:
        return _fix_signs(*_triplets(weight, r, name), weight.device)
    generator = torch.Generator().manual_seed(_SEED)
    start = torch.randn(weight.shape[1], min(r + _NEAR, *weight.shape), generator=generator)
    return near_triplets(weight, r, start, niter)


def near_triplets(weight: Tensor, r: int, start: Tensor, niter: int = 0) -> Factors:
    """Nearly the top-r triplets, by power iterations from the span of the columns of `start` `(K, r or more)`.

    They are triplets of what the iterations found of the weight, so `U^T W = diag(s) V` holds to rounding, and
    `W V^T = U diag(s)` nearly.
    """
    matrix = exact(_where_solvable(weight).float())
    basis = start.to(matrix)
    for _ in range(niter + 1):
        q = torch.linalg.qr(matrix @ basis).Q
        found = q.t() @ matrix
        basis = found.t()
    u, s, v = torch.linalg.svd(found, full_matrices=False)
    return _fix_signs((q @ u)[:, :r], s[:r], v[:r], weight.device)


def _where_solvable(weight: Tensor) -> Tensor:
    """The weight, on the CPU where its device has neither float64 nor all of `torch.linalg`."""
    return weight.cpu() if weight.device.type == "mps" else weight


def _triplets(weight: Tensor, count: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """The top `count` singular triplets u, s, v in float64, on the CPU where the device of `weight` lacks float64.

    They are computed in the span of the leading singular vectors of the shorter side, so u and v are orthonormal even
    where singular values are 0.
    """
    matrix = _where_solvable(weight).double()
    wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.t() if wide else matrix
    basis = _leading_eigenvectors(tall.t() @ tall, count, name)
    q, small = torch.linalg.qr(tall @ basis)
    u, s, vh = torch.linalg.svd(small)
    long, short = q @ u, basis @ vh.t()
    return (short, s, long.t()) if wide else (long, s, short.t())


def _leading_eigenvectors(gram: Tensor, count: int, name: str) -> Tensor:
    """An orthonormal basis `(n, count)` of the span of the eigenvectors of the largest eigenvalues."""
    if len(gram) >= _SMALL and count + _BLOCK * _BLOCKS_A_CHECK <= _LARGEST_SHARE * len(gram):
        basis = _krylov_basis(gram, count)
        if basis is not None:
            return basis
        logger.debug(  # of a decoder's weights half are so
            "%s: singular values %d and %d are too close for the fast decomposition, so all are computed",
            name,
            count,
            count + 1,
        )
    return torch.linalg.eigh(gram).eigenvectors[:, -count:]


def _krylov_basis(gram: Tensor, count: int) -> Tensor | None:
    """The same basis, to `_ACCURACY`, from a block Krylov space; None if that would grow too large.

    By Davis and Kahan, the angle to the true span is at most the residual of the eigenpairs over the gap behind them.
    """
    generator = torch.Generator().manual_seed(_SEED)
    start = torch.randn(len(gram), _BLOCK, dtype=gram.dtype, generator=generator)
    block = torch.linalg.qr(start.to(gram.device)).Q
    space = images = gram[:, :0]
    while space.shape[1] < _LARGEST_SHARE * len(gram):
        for _ in range(_BLOCKS_A_CHECK):
            image = gram @ block
            space, images = torch.cat([space, block], 1), torch.cat([images, image], 1)
            for _ in range(2):  # the second time removes what rounding left
                image = torch.linalg.qr(image - space @ (space.t() @ image)).Q
            block = image
        if space.shape[1] <= count:
            continue
        values, vectors = torch.linalg.eigh(space.t() @ images)
        top = vectors[:, -count:]
        residual = torch.linalg.matrix_norm(images @ top - space @ top * values[-count:])
        if residual < _ACCURACY * (values[-count] - values[-count - 1]):
            return space @ top
    return None


def lossy_rank(shape: tuple[int, int] | torch.Size, d: int | None) -> int | None:
    """d where a decomposition of this rank leaves out a part of a weight of this shape, else None."""
    return d if d is not None and d < min(shape) else None


def exact(part: Tensor) -> Tensor:
    """An operand of a product that all bits of float32 must reach: a run may let a GPU multiply float32 in TF32."""
    return part.double() if part.is_cuda else part


def subtract(weight: Tensor, factors: Factors) -> Tensor:
    """`weight - (u * s) v`, computed in float32 (float64 for float64) and rounded once to the dtype of `weight`.

    Creating an adapter and loading it both call this, so on one machine their results are equal bit by bit.
    """
    precision = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(precision) - factors.product().to(precision)).to(weight.dtype)


def add(weight: Tensor, factors: Factors) -> Tensor:
    """`weight + (u * s) v`, with the roundings of `subtract`."""
    return subtract(weight, factors._replace(s=-factors.s))


def belongs(weight: Tensor, factors: Factors) -> bool:
    """Whether `factors` were made of `weight`, to the precision of its dtype."""
    s = factors.s.to(weight.device, torch.float32)
    return bool(mismatch(weight, factors) <= max(1e-4, 4 * torch.finfo(weight.dtype).eps) * torch.linalg.vector_norm(s))


def mismatch(weight: Tensor, factors: Factors) -> Tensor:
    """`|U^T W - diag(s) V|`, which is 0 to rounding for the weight that the factors were made of, also nearly."""
    u, s, v = (part.to(weight.device, torch.float32) for part in factors)
    return torch.linalg.matrix_norm(exact(u).t() @ exact(weight.float()) - s[:, None] * v)


def check_decomposable(weight: Tensor, r: int, d: int | None, name: str) -> None:
    """Raise `FastpeftError`, naming the weight, unless `decompose` can split it."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise FastpeftError(
            f"{name} is a {weight.dim()}-d {weight.dtype} tensor; SiVA decomposes 2-d floating-point weights. Load the "
            "model unquantised, or leave the layer out with exclude_modules."
        )
    check_ranks(weight.shape, r, d, name)
    if weight.device.type != "meta" and not torch.isfinite(weight).all():
        raise FastpeftError(
            f"{name} holds NaN or infinite values and has no singular value decomposition. Check the model file, or "
            "leave the layer out with exclude_modules."
        )


def check_ranks(shape: torch.Size, r: int, d: int | None, name: str) -> None:
    """The part of `check_decomposable` that asks for no numbers."""
    full = min(shape)
    if not 1 <= r <= full:
        raise FastpeftError(
            f"r={r} for {name} of shape {tuple(shape)}; allowed are 1 to {full}. Choose another r, or set this "
            "layer's own with rank_pattern."
        )
    if d is not None and not r <= d <= full:
        raise FastpeftError(
            f"d={d} for {name} of shape {tuple(shape)} with r={r}; allowed are {r} to {full}, or None for the "
            "full rank."
        )


def _fix_signs(u: Tensor, s: Tensor, v: Tensor, device: torch.device) -> Factors:
    """Make the largest-magnitude entry of each column of u positive: an SVD leaves each pair's sign open."""
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))
    signs = torch.where(largest < 0, -1, 1).to(u.dtype)
    return Factors(*(part.float().contiguous().to(device) for part in (u * signs, s, v * signs.t())))
