"""Fingerprints identify the values of a weight, not their storage."""

from __future__ import annotations

import tracemalloc

import pytest
import torch

from fastpeft.ops.quantise import QuantisedWeight
from fastpeft.support.fingerprints import fingerprint, fingerprints_agree

HALF = (torch.float16, torch.bfloat16)


def weight() -> torch.Tensor:
    return torch.randn(48, 33, generator=torch.Generator().manual_seed(1)) * 0.05


@pytest.mark.parametrize("first", [torch.float32, torch.float64, *HALF])
@pytest.mark.parametrize("second", [torch.float32, torch.float64, *HALF])
def test_casts_agree(first: torch.dtype, second: torch.dtype) -> None:
    w = weight()
    assert fingerprints_agree(fingerprint(w.to(first)), fingerprint(w.to(second)))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_one_changed_bit_is_seen_in_the_same_dtype(dtype: torch.dtype) -> None:
    w = weight().to(dtype)
    changed = w.clone()
    changed[17, 5] = torch.nextafter(w[17, 5], torch.tensor(1.0, dtype=dtype))
    assert not fingerprints_agree(fingerprint(w), fingerprint(changed))


@pytest.mark.parametrize("dtype", HALF)
def test_another_weight_is_seen_across_dtypes(dtype: torch.dtype) -> None:
    w = weight()
    assert not fingerprints_agree(fingerprint(w), fingerprint((w + 0.01 * w.abs().max()).to(dtype)))
    assert not fingerprints_agree(fingerprint(w), fingerprint((w * 1.05).to(dtype)))


def test_layout_does_not_matter_and_shape_does() -> None:
    w = weight()
    assert fingerprint(w) == fingerprint(w.t().contiguous().t())
    assert not fingerprints_agree(fingerprint(w), fingerprint(w.t()))


def test_small_and_empty_weights() -> None:
    for shape in [(0, 3), (1, 1), (2, 3)]:
        w = torch.ones(shape)
        assert fingerprints_agree(fingerprint(w), fingerprint(w.clone()))
        assert fingerprints_agree(fingerprint(w), fingerprint(w.half()))


def test_the_digest_copies_nothing() -> None:
    w = torch.zeros(1024, 256)
    fingerprint(w)
    tracemalloc.start()
    try:
        fingerprint(w)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < w.nbytes / 4


def in_4_bits(w: torch.Tensor) -> torch.Tensor:
    return QuantisedWeight(w, "nf4").dequantise(torch.float32)


def _few(w: torch.Tensor) -> str:
    return fingerprint(in_4_bits(w), in_4_bits=True)


@pytest.mark.parametrize("kind", ["Gaussian", "outliers", "heavy tails"])
def test_a_weight_agrees_with_itself_in_4_bits(kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        w = torch.randn(64, 128, generator=generator)
        if kind == "outliers":
            w[torch.rand(w.shape, generator=generator) < 1e-3] *= 12
        if kind == "heavy tails":
            w = w / w.roll(7, 1).abs().clamp(min=0.2)
        for full in (fingerprint(w), fingerprint(w.bfloat16())):
            assert fingerprints_agree(full, _few(w))
            assert fingerprints_agree(_few(w), full)
        assert fingerprints_agree(_few(w), _few(w * (1 + 1e-5)))


def test_another_weight_is_told_in_4_bits() -> None:
    pytest.importorskip("bitsandbytes")
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(64, 128, generator=generator) for _ in range(48)]
    pairs = list(zip(weights, [*weights[1:], weights[0]]))
    assert not all(fingerprints_agree(fingerprint(w), _few(other)) for w, other in pairs[:12])
    assert sum(fingerprints_agree(fingerprint(w), _few(other)) for w, other in pairs) < 16
    for w, other in pairs:
        assert not fingerprints_agree(_few(w), _few(other))
        assert not fingerprints_agree(_few(w), _few(w + 0.05 * other)), "trained further"
