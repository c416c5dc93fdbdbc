"""The decomposition: exact, ordered, with fixed signs, and refusing what has none."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpeft.errors import FastpeftError
from fastpeft.siva.decompose import add, belongs, decompose, subtract


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


def with_values(values: torch.Tensor, n: int) -> torch.Tensor:
    """A weight `(n, len(values))` with these singular values."""
    generator = torch.Generator().manual_seed(3)
    u, v = (torch.linalg.qr(torch.randn(k, len(values), generator=generator).double()).Q for k in (n, len(values)))
    return ((u * values) @ v.t()).float()


def check_against_svd(w: torch.Tensor, r: int) -> None:
    factors = decompose(w, r).factors
    u, s, vh = torch.linalg.svd(w.double(), full_matrices=False)
    torch.testing.assert_close(factors.s.double(), s[:r], rtol=1e-6, atol=0)
    torch.testing.assert_close(factors.product().double(), (u[:, :r] * s[:r]) @ vh[:r], rtol=0, atol=3e-6)


@pytest.mark.parametrize("r", [1, 4, 16])
@pytest.mark.parametrize("wide", [False, True])
def test_a_large_weight_takes_the_fast_way(r: int, wide: bool, caplog: pytest.LogCaptureFixture) -> None:
    w = with_values(torch.arange(1, 513).double() ** -0.7, 600)
    with caplog.at_level(logging.DEBUG, "fastpeft"):
        check_against_svd(w.t() if wide else w, r)
    assert not caplog.records
    assert all(a.equal(b) for a, b in zip(decompose(w, r).factors, decompose(w, r).factors))


def test_the_fast_way_looks_at_no_more_than_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: seen.append(len(matrix)) or eigh(matrix))
    decompose(with_values(torch.arange(1, 513).double() ** -0.7, 512), 4)
    assert seen
    assert max(seen) <= 128


def test_where_the_gap_is_too_small_all_are_computed(caplog: pytest.LogCaptureFixture) -> None:
    values = torch.linspace(1, 0.9, 512).double()
    with caplog.at_level(logging.DEBUG, "fastpeft"):
        factors = decompose(with_values(values, 512), 4, name="layer.3").factors
    assert "layer.3: singular values 4 and 5 are too close" in caplog.text
    torch.testing.assert_close(factors.s.double(), values[:4], rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (9, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_power_iterations_come_near_and_lose_nothing(shape: tuple[int, int], dtype: torch.dtype) -> None:
    w = weight(*shape, dtype)
    best = decompose(w, 5)
    error = {}
    for niter in (0, 2, 8):
        factors, rest = decompose(w, 5, niter=niter)
        assert all(part.dtype == torch.float32 for part in factors)
        assert rest.equal(subtract(w, factors))
        assert belongs(w, factors)
        assert not belongs(rest, factors)
        assert not belongs(weight(*shape, dtype, seed=1), factors)
        for part in (factors.u.t() @ factors.u, factors.v @ factors.v.t()):
            torch.testing.assert_close(part, torch.eye(5), rtol=0, atol=1e-5)
        error[niter] = float((w.float() - factors.product()).norm() / (w.float() - best.factors.product()).norm())
        assert all(a.equal(b) for a, b in zip(factors, decompose(w, 5, niter=niter).factors))
    assert 1 - 1e-6 < error[8] <= error[2] + 1e-6 <= error[0] + 2e-6
    assert error[8] < 1.002


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("size", [20, 520])
def test_weights_of_low_rank_have_orthonormal_factors(size: int, rank: int) -> None:
    values = (torch.arange(size) < rank).double()
    factors = decompose(with_values(values, size), 5).factors
    torch.testing.assert_close(factors.s, values[:5].float(), rtol=0, atol=1e-6)
    for part in (factors.u.t() @ factors.u, factors.v @ factors.v.t()):
        torch.testing.assert_close(part, torch.eye(5), rtol=0, atol=1e-5)


def test_a_weight_on_no_device_gives_shapes() -> None:
    factors, rest = decompose(torch.empty(6, 4, device="meta", dtype=torch.bfloat16), 2)
    assert [tuple(part.shape) for part in factors] == [(6, 2), (2,), (2, 4)]
    assert (factors.u.dtype, rest.dtype, rest.device.type) == (torch.float32, torch.bfloat16, "meta")


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_multiplies_factors_by_all_bits_of_float32() -> None:
    """Where a run has float32 products in TF32, a layer would start apart from its base, and load as another."""
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)).cuda()
    expected = decompose(weight, 4)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        found = expected.factors.product()
        assert belongs(weight, expected.factors)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    u, s, v = (part.double() for part in expected.factors)
    torch.testing.assert_close(found.double(), (u * s) @ v, rtol=1e-6, atol=1e-6)
