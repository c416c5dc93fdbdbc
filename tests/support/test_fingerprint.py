"""Fingerprints identify the values of a weight, not their storage."""

from __future__ import annotations

import pytest
import torch

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
