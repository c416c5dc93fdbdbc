"""Slices of data sets, on which learning rates are tried."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from samples import chats, completions, pairs, scores, tagged, write_jsonl

from fastpeft import FastpeftError
from fastpeft.comparison.learning_rates import rates, slice_sizes, take_slice, write_rows
from fastpeft.data.examples import Examples, TextData, load_data
from fastpeft.data.problems import CLASSIFICATION, NEXT_WORDS


def _data(folder: Path) -> Path:
    folder.mkdir()
    for name, rows in (("train", range(20)), ("dev", range(20, 24))):
        lines = [f"text {row}\t{row % 2}" for row in rows]
        (folder / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    return folder


def test_dev_rows_stay_or_are_other_training_rows(tmp_path: Path) -> None:
    data = str(_data(tmp_path / "data"))
    whole = load_data(data)
    write_rows(take_slice(whole, rows=8), tmp_path / "own")
    own = load_data(str(tmp_path / "own"))
    assert own.dev == whole.dev
    assert len(own.train) == 8
    assert set(own.train.texts) < set(whole.train.texts)
    write_rows(take_slice(whole, rows=8, dev_rows=6), tmp_path / "other")
    other = load_data(str(tmp_path / "other"))
    assert other.train == own.train
    assert take_slice(whole, rows=8, seed=1).train != take_slice(whole, rows=8).train
    assert len(set(other.dev.texts) & set(whole.train.texts)) == 6
    assert not set(other.dev.texts) & set(other.train.texts)
    pairs = dict(zip(whole.train.texts, whole.train.labels))
    assert all(pairs[text] == label for text, label in zip(other.dev.texts, other.dev.labels))


def test_a_slice_lacks_no_class() -> None:
    rows = Examples([f"a {row}" for row in range(9)] + ["b"], [0] * 9 + [1])
    data = TextData(rows, rows, ["common", "rare"], "rows", CLASSIFICATION)
    with pytest.raises(FastpeftError, match="a slice of 2 training rows has none of 'rare'"):
        take_slice(data, 2, 2)


@pytest.mark.parametrize("rows", [pairs(30), scores(30), tagged(30)], ids=["pairs", "scores", "tags"])
def test_every_kind_of_rows_is_read_as_it_was(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    whole = load_data(str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    write_rows(take_slice(whole, *slice_sizes(len(whole.train))), tmp_path / "slice")
    found = load_data(str(tmp_path / "slice"))
    assert (len(found.train), len(found.dev)) == (18, 9)
    assert found.problem is whole.problem
    assert found.train.is_pair == whole.train.is_pair
    known = {repr(text): label for text, label in zip(whole.train.texts, whole.train.labels)}
    for part in (found.train, found.dev):
        for text, label in zip(part.texts, part.labels):
            assert known[repr(text)] == label


@pytest.mark.parametrize("rows", [completions(30), chats(30), [{"text": f"a text {n}"} for n in range(30)]])
def test_rows_without_labels_are_read_as_they_were(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    whole = load_data(str(write_jsonl(tmp_path / "rows.jsonl", rows)), problem_type="next_words")
    write_rows(take_slice(whole, 12, 6), tmp_path / "slice")
    found = load_data(str(tmp_path / "slice"), problem_type="next_words")
    assert len(found.train) == 12
    assert {*map(repr, found.train.texts), *map(repr, found.dev.texts)} <= {*map(repr, whole.train.texts)}


def test_what_asks_the_same_is_on_one_side_of_a_slice() -> None:
    texts = [(f"prompt {number // 4}", f"completion {number}") for number in range(40)]
    data = TextData(Examples(texts, []), Examples(texts[:1], []), [], "rows", NEXT_WORDS)
    found = take_slice(data, 18, 10)
    asked, measured = ({prompt for prompt, _ in part.texts} for part in (found.train, found.dev))
    assert (len(found.train), len(found.dev)) == (16, 10), "of each prompt all rows, 18 at most"
    assert not asked & measured
    assert len(take_slice(data, 18).train) == 18, "the dev rows have their own prompts"
    alike = TextData(Examples([("prompt", f"completion {row}") for row in range(9)], []), data.dev, [], "", NEXT_WORDS)
    with pytest.raises(FastpeftError, match="so many have one text or prompt"):
        take_slice(alike, 6, 3)


def test_equal_texts_are_on_one_side_of_a_slice() -> None:
    texts = [f"text {number // 3}" for number in range(90)]
    data = TextData(
        Examples(texts, [number % 2 for number in range(90)]), Examples(["?"], [0]), ["a", "b"], "rows", CLASSIFICATION
    )
    found = take_slice(data, 40, 20)
    assert (len(found.train), len(found.dev)) == (39, 20)
    assert not set(found.train.texts) & set(found.dev.texts)


def test_rates_and_sizes() -> None:
    assert rates(2e-5) == [2e-5, 6.67e-6, 6e-5]
    assert slice_sizes(100_000) == (2_000, 1_000)
    assert slice_sizes(300) == (200, 100)
