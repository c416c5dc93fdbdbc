"""Operands of SiVA's ops for the tests of their kernels, and what a comparison with float64 makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tolerances import GRADIENT, assert_as_accurate
from torch import Tensor


def operands(m: int, k: int, n: int, r: int, dtype: torch.dtype, device: str, bias: bool = True) -> list[Tensor | None]:
    """x, weight, u, s, v, bias, of the size that layers have: h is about 1 and the low-rank part is half of it."""
    generator = torch.Generator().manual_seed(m + 1_000 * k + 1_000_000 * n + r)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(device, dtype)

    root_k, root_r = max(k, 1) ** -0.5, max(r, 1) ** -0.5
    return [
        normal(m, k),
        normal(n, k, scale=root_k),
        normal(n, r, scale=root_r),
        normal(r).abs(),
        normal(r, k, scale=root_k),
        normal(n) if bias else None,
    ]


def as_group(x: Any, *layer: Any) -> list[Any]:
    """The operands of a layer as those of a group of one."""
    weight, *rest = layer
    return [x, [weight], [None], *([each] for each in rest)]


def as_group_backward(
    dh: Any, x: Any, weight: Any, u: Any, s: Any, v: Any, p: Any, dx: bool, du: bool, dv: bool, dbias: bool
) -> list[Any]:
    """The same of backward, with p^T."""
    return [[dh], x, [weight], [None], [u], [s], [v], p, dx, [du], dv, [dbias]]


def layers(
    shape: tuple[int, ...],
    ns: tuple[int, ...],
    ranks: tuple[int, ...],
    sizes: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    sort: bool = True,
) -> list[Any]:
    """All operands of `siva_linear`: x of this shape, and layers of these out_features and ranks, or with `sizes` one
    layer and adapters. Every second layer has no bias; without `sort` rows stand in the order of adapters.
    """
    *leading, k = shape
    found = [operands(0, k, n, r, dtype, device) for n, r in zip(ns * len(ranks) if sizes else ns, ranks)]
    weights, us, ss, vs, biases = (list(each) for each in zip(*(one[1:] for one in found)))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*leading, k, generator=generator).to(weights[0])
    if not sizes:
        return [x, weights, [None] * len(ns), us, ss, vs, [b if i % 2 == 0 else None for i, b in enumerate(biases)]]
    order = torch.randperm(len(x), generator=generator).to(device) if sort else None
    return [x, weights[:1], [None], us, ss, vs, biases[:1], list(sizes), order]


def gradients_of(args: Sequence[Any]) -> list[Tensor]:
    """Some gradient of each output."""
    generator = torch.Generator().manual_seed(7)
    outputs = [torch.randn(*args[0].shape[:-1], len(u), generator=generator) for u, _ in zip(args[3], args[1])]
    return [dh.to(args[0]) for dh in outputs]


def backward_of(
    dhs: list[Tensor], args: Sequence[Any], p: Tensor, needs: Sequence[Any] | None = None, weights: Any = None
) -> list[Any]:
    """The operands of the gradients' op: all gradients, without `needs`."""
    x, of_forward, scales, us, ss, vs, biases, *rows = args
    needs = needs or [True, [True] * len(us), True, [True] * len(biases)]
    return [dhs, x, of_forward if weights is None else weights, scales, us, ss, vs, p, *needs, *rows]


def each(function: Callable[[Tensor], Tensor], args: Sequence[Any]) -> list[Any]:
    """The floating tensors among `args`, and in lists among them, by `function`; the rest as it is."""
    return [
        function(a)
        if isinstance(a, Tensor) and a.is_floating_point()
        else each(function, a)
        if isinstance(a, (list, tuple))
        else a
        for a in args
    ]


def in_double(args: Sequence[Any]) -> list[Any]:
    return each(Tensor.double, args)


def absolute(args: Sequence[Any]) -> list[Any]:
    return each(Tensor.abs, args)


def in_order(args: Sequence[Any]) -> list[Any]:
    """Contiguous copies: PyTorch 2.10's own bfloat16 products read the NaN beside a column of one."""
    return each(lambda a: a.clone(memory_format=torch.contiguous_format), args)


def flat(results: Sequence[Any]) -> list[Any]:
    """What ops return, or flags for it, with lists among it opened."""
    return [one for result in results for one in (result if isinstance(result, (list, tuple)) else [result])]


def expected_of(op: Callable[..., Any], args: Sequence[Any]) -> list[list[Tensor]]:
    """What `assert_as_accurate` compares with: the op plain, in float64, and there on absolute values."""
    double = in_double(args)
    return [flat(op(*some)) for some in (in_order(args), double, absolute(double))]


def assert_outputs(actual: Sequence[Any], expected: list[list[Tensor]]) -> None:
    """Compare a kernel's outputs with those of `expected_of`."""
    for ours, *others in zip(flat(actual), *expected, strict=True):
        assert_as_accurate(ours, *others)
        assert ours.is_contiguous()


def assert_gradients(
    actual: Sequence[Any], again: Sequence[Any], needs: Sequence[Any], expected: list[list[Tensor]]
) -> None:
    """The same for gradients, twice the same bits; those that nothing needs are empty."""
    for ours, repeated, need, *others in zip(flat(actual), flat(again), flat(needs), *expected, strict=True):
        assert ours.is_contiguous()
        assert torch.equal(ours, repeated)
        if need:
            assert_as_accurate(ours, *others, factor=GRADIENT)
        else:
            assert ours.shape == (0,)
