"""Factors are kept, found again bit by bit, and made anew where the file is damaged."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest
import torch

from fastpeft.siva import cache
from fastpeft.siva.decompose import Factors, decompose

WEIGHT = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "deep" / "cache"))
    return tmp_path / "deep" / "cache"


def same(first: Factors, second: Factors) -> bool:
    return all(a.equal(b) for a, b in zip(first, second))


def test_off_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cache.VARIABLE, raising=False)
    assert cache.entry(WEIGHT, 2) is None


def test_a_hit_needs_no_decomposition(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = decompose(WEIGHT, 3)
    assert [path.name for path in folder.iterdir()] == [cache.entry(WEIGHT, 3).name]
    monkeypatch.setattr("fastpeft.siva.decompose._triplets", None)
    second = decompose(WEIGHT, 3)
    assert same(first.factors, second.factors)
    assert first.residual.equal(second.residual)


def test_entries_differ_by_weight_rank_and_dtype(folder: Path) -> None:
    changed = WEIGHT.clone()
    changed[3, 3] += 1e-6
    entries = {cache.entry(WEIGHT, 2), cache.entry(WEIGHT, 3), cache.entry(changed, 2), cache.entry(WEIGHT.half(), 2)}
    entries |= {cache.entry(WEIGHT, 2, niter=4), cache.entry(WEIGHT, 2, niter=0)}
    assert len(entries) == 6
    decompose(WEIGHT, 2, d=8)  # what leaves out a part on purpose is not kept
    assert not folder.exists()


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "other"])
def test_a_damaged_entry_is_made_anew(folder: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    first = decompose(WEIGHT, 3).factors
    path = cache.entry(WEIGHT, 3)
    content = path.read_bytes()
    last = bytes([content[-1] ^ 1])
    path.write_bytes({"cut": content[:-9], "bit": content[:-1] + last, "empty": b"", "other": b"x" * 99}[damage])
    with caplog.at_level(logging.WARNING, "fastpeft"):
        assert same(decompose(WEIGHT, 3).factors, first)
    assert str(path) in caplog.text
    assert path.read_bytes() == content


def test_a_folder_that_cannot_be_made_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "file" / "cache"))
    with caplog.at_level(logging.WARNING, "fastpeft"):
        decompose(WEIGHT, 3)
    assert "cannot keep factors in" in caplog.text


def test_many_writers_leave_one_whole_entry(folder: Path) -> None:
    threads = [threading.Thread(target=decompose, args=(WEIGHT, 3)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(folder.iterdir())) == 1
    assert cache.read(cache.entry(WEIGHT, 3)) is not None
