"""The decomposition: exact, ordered, with fixed signs, and refusing what has none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpeft.errors import FastpeftError
from fastpeft.siva.decompose import add, decompose, subtract


def weight(n: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 20), k=st.integers(1, 20), data=st.data())
def test_parts_sum_to_the_weight(n: int, k: int, data: st.DataObject) -> None:
    r = data.draw(st.integers(1, min(n, k)))
    w = weight(n, k)
    factors, rest = decompose(w, r)
    assert (factors.u.shape, factors.s.shape, factors.v.shape) == ((n, r), (r,), (r, k))
    torch.testing.assert_close(rest + factors.product(), w, rtol=1e-5, atol=1e-5)


def test_factors_are_the_top_triplets_with_fixed_signs() -> None:
    w = weight(30, 20)
    factors, rest = decompose(w, 5)
    singular_values = torch.linalg.svdvals(w.double())
    torch.testing.assert_close(factors.s.double(), singular_values[:5], rtol=1e-5, atol=0)
    assert factors.s.equal(factors.s.sort(descending=True).values)
    torch.testing.assert_close(factors.u.t() @ factors.u, torch.eye(5), rtol=0, atol=1e-5)
    assert (factors.u.gather(0, factors.u.abs().argmax(0, keepdim=True)) > 0).all()
    torch.testing.assert_close(torch.linalg.matrix_norm(rest.double(), 2), singular_values[5], rtol=1e-5, atol=0)
    negated, _ = decompose(-w, 5)
    torch.testing.assert_close(negated.u, factors.u, rtol=0, atol=1e-4)  # u keeps its sign, v takes the change
    torch.testing.assert_close(negated.v, -factors.v, rtol=0, atol=1e-4)


def test_a_lower_rank_keeps_only_the_triplets_up_to_d() -> None:
    w = weight(30, 20)
    factors, rest = decompose(w, 3, d=8)
    u, s, vh = torch.linalg.svd(w)
    torch.testing.assert_close(rest + factors.product(), (u[:, :8] * s[:8]) @ vh[:8], rtol=0, atol=1e-4)


def test_d_of_full_rank_loses_nothing() -> None:
    w = weight(12, 20)
    assert decompose(w, 3, d=12).residual.equal(decompose(w, 3).residual)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_storage_dtypes(dtype: torch.dtype) -> None:
    w = weight(24, 16, dtype)
    factors, rest = decompose(w, 4)
    assert factors.u.dtype == factors.s.dtype == factors.v.dtype == torch.float32
    assert rest.dtype == dtype
    assert rest.equal(subtract(w, factors))  # rounded once
    back = add(rest, factors).double()
    assert (back - w.double()).abs().max() <= 2 * torch.finfo(dtype).eps * w.double().abs().max() + 1e-15


@pytest.mark.parametrize(
    ("r", "d", "message"),
    [(0, None, "r=0"), (5, None, "allowed are 1 to 4"), (3, 2, "allowed are 3 to 4"), (1, 5, "d=5")],
)
def test_ranks_out_of_range(r: int, d: int | None, message: str) -> None:
    with pytest.raises(FastpeftError, match=message):
        decompose(weight(6, 4), r, d)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    w = weight(6, 4)
    w[2, 1] = bad
    with pytest.raises(FastpeftError, match=r"layer\.7 holds NaN or infinite"):
        decompose(w, 2, name="layer.7")


def test_quantised_weights_are_refused() -> None:
    with pytest.raises(FastpeftError, match="unquantised"):
        decompose(torch.zeros(4, 4, dtype=torch.int8), 2)
