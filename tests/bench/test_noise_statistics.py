"""The statistics of a small sample hold, and each kind of fault fails the one that is for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from bench import noise_statistics
from bench.noise_statistics import MOMENTS, chunks, statistics

LENGTH = 2**15


@pytest.mark.parametrize("noise", MOMENTS)
def test_they_hold(noise: str) -> None:
    found = statistics(noise, seed=1, length=LENGTH)
    assert [each for each in found if not each.holds] == []
    assert all(each.samples >= LENGTH for each in found)


def heavy_tail(z: Tensor) -> Tensor:
    return torch.where(z > 3.5, z + 0.5, z)


def lanes_by_size(z: Tensor) -> Tensor:
    """Two lanes that do not correlate, but are large together."""
    quads = z.clone().view(-1, 4)
    quads[:, 1] = quads[:, 0].abs() * quads[:, 1].sign()
    return quads.view(z.shape)


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean of z^1": lambda z: z + 0.01,
    "mean of z^2": lambda z: z * 1.01,
    "mean of z^4": lambda z: z.clamp(-2.5, 2.5),
    "beyond 4 on either side": heavy_tail,
    "Kolmogorov-Smirnov": lambda z: (z * 8).round() / 8,
    "neighbours, 1 to 1024 apart": lambda z: 0.99 * z + (1 - 0.99**2) ** 0.5 * z.roll(1, dims=1),
    "lanes and their squares": lanes_by_size,
    "consecutive seeds": lambda z: torch.cat((z[1:2], z[1:])),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def faulty(noise: str, seed: int, length: int) -> Iterator[Tensor]:
        return map(FAULTS[name], chunks(noise, seed, length))

    monkeypatch.setattr(noise_statistics, "chunks", faulty)
    assert name in [each.statistic for each in statistics("gaussian", 1, LENGTH) if not each.holds]
