"""Slices of data sets."""

from __future__ import annotations

from pathlib import Path

from bench.slices import write_slice
from fastpeft.data import load_data


def _data(folder: Path) -> Path:
    folder.mkdir()
    for name, rows in (("train", range(20)), ("dev", range(20, 24))):
        lines = [f"text {row}\t{row % 2}" for row in rows]
        (folder / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    return folder


def test_dev_rows_stay_or_are_other_training_rows(tmp_path: Path) -> None:
    data = str(_data(tmp_path / "data"))
    whole = load_data(data)
    write_slice(data, tmp_path / "own", rows=8)
    own = load_data(str(tmp_path / "own"))
    assert own.dev == whole.dev
    assert len(own.train) == 8
    assert set(own.train.texts) < set(whole.train.texts)
    write_slice(data, tmp_path / "other", rows=8, dev_rows=6)
    other = load_data(str(tmp_path / "other"))
    assert other.train == own.train
    assert len(set(other.dev.texts) & set(whole.train.texts)) == 6
    assert not set(other.dev.texts) & set(other.train.texts)
    pairs = dict(zip(whole.train.texts, whole.train.labels))
    assert all(pairs[text] == label for text, label in zip(other.dev.texts, other.dev.labels))
