"""Which rows are held out: every class on both sides, equal texts on one, the same rows in every process."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from samples import write_csv, write_jsonl

from fastpeft import FastpeftError
from fastpeft.data.examples import TextData, count_labels, labels_in_words, load_data
from fastpeft.data.problems import MASKED_WORDS
from fastpeft.data.splitting import bins, digest, shuffled, stratified

SKEWED = [(f"{label} {row}", label) for label, rows in (("a", 340), ("b", 20), ("c", 3)) for row in range(rows)]


def sides(data: TextData) -> tuple[set[object], set[object]]:
    """The different texts to train on, and to measure on."""
    train, dev = ({str(text) for text in part.texts} for part in (data.train, data.dev))
    return set(train), set(dev)


@pytest.mark.parametrize("seed", range(4))
def test_every_class_is_on_both_sides(tmp_path: Path, seed: int) -> None:
    data = load_data(str(write_csv(tmp_path / "rows.csv", SKEWED)), split_seed=seed)
    assert count_labels(data) == [(307, 33), (18, 2), (2, 1)]
    assert labels_in_words(data) == "classes (training + dev): a 307 + 33, b 18 + 2, c 2 + 1"
    assert ", 36 rows held out by seed" in data.description
    train, dev = sides(data)
    assert train | dev == {text for text, _ in SKEWED}


@pytest.mark.parametrize("seed", range(4))
def test_equal_texts_are_on_one_side(tmp_path: Path, seed: int) -> None:
    data = load_data(str(write_csv(tmp_path / "rows.csv", SKEWED * 3)), split_seed=seed)
    train, dev = sides(data)
    assert not train & dev
    assert count_labels(data) == [(921, 99), (54, 6), (6, 3)]
    pairs = [{"sentence1": f"a {n % 9}", "sentence2": f"b {n % 7}", "label": n % 2} for n in range(200)]
    train, dev = sides(load_data(str(write_jsonl(tmp_path / "pairs.jsonl", pairs)), split_seed=seed))
    assert dev
    assert not train & dev
    unlabelled = load_data(str(write_csv(tmp_path / "rows.csv", SKEWED * 3)), problem_type=MASKED_WORDS.name)
    train, dev = sides(unlabelled)
    assert len(unlabelled.dev) == pytest.approx(109, abs=2)
    assert not train & dev


def test_a_text_of_two_classes_is_on_one_side(tmp_path: Path) -> None:
    rows = [(f"text {n % 30}", "yes" if n < 40 else "no") for n in range(60)]
    data = load_data(str(write_csv(tmp_path / "rows.csv", rows)))
    train, dev = sides(data)
    assert not train & dev
    assert all(count > 0 for counts in count_labels(data) for count in counts)


def test_what_is_too_rare_for_both_sides_is_trained_on(tmp_path: Path) -> None:
    once = [("alone", "rare"), *([("the same", "repeated")] * 9), *((f"text {n}", "common") for n in range(30))]
    data = load_data(str(write_csv(tmp_path / "rows.csv", once)))
    assert dict(zip(data.labels, count_labels(data))) == {"common": (26, 4), "rare": (1, 0), "repeated": (9, 0)}
    two = load_data(str(write_csv(tmp_path / "two.csv", [("a", "x"), ("b", "y")])))
    assert (len(two.train), len(two.dev)) == (1, 1), "there is something to measure on"
    with pytest.raises(FastpeftError, match="all rows have the same text"):
        load_data(str(write_csv(tmp_path / "same.csv", [("a", "x"), ("a", "y")] * 20)))


def test_white_space_makes_no_other_text(tmp_path: Path) -> None:
    rows = [(f"{before}text {n}{after}", "xy"[n % 2]) for n in range(30) for before, after in ("  ", " \n", "\t ")]
    data = load_data(str(write_csv(tmp_path / "rows.csv", rows)))
    trained, measured = ({text.strip() for text in part.texts} for part in (data.train, data.dev))
    assert measured
    assert not trained & measured


def test_a_text_that_fills_the_file_does_not_fill_the_dev_part(tmp_path: Path) -> None:
    rows = [*([("well", "x")] * 500), *((f"text {n}", "xy"[n % 2]) for n in range(100))]
    data = load_data(str(write_csv(tmp_path / "rows.csv", rows)))
    assert "well" not in data.dev.texts
    assert 10 <= len(data.dev) <= 60


def test_rare_tags_are_on_both_sides(tmp_path: Path) -> None:
    words = ["w", "x", "y"]
    rows = [{"tokens": [*words, f"{n}"], "ner_tags": ["O", "O", "O", "O"]} for n in range(200)]
    for n, tag in enumerate(["A", "A", "B", "B", "B", "C"]):
        rows[30 * n]["ner_tags"][n % 3] = tag
    for n in (0, 60):
        rows[n]["ner_tags"][3] = "D"
    file = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    for seed in range(4):
        data = load_data(file, split_seed=seed)
        counts = dict(zip(data.labels, count_labels(data)))
        assert all(min(counts[tag]) > 0 for tag in "ABDO"), counts
        assert counts["C"] == (1, 0)
        assert len(data.dev) == 20


def test_numbers_are_held_out_from_all_bins(tmp_path: Path) -> None:
    values = np.random.default_rng(0).exponential(size=300).round(3).tolist()
    rows = [{"text": f"text {n}", "score": value + 0.0001} for n, value in enumerate(values)]
    for seed in range(4):
        data = load_data(str(write_jsonl(tmp_path / "rows.jsonl", rows)), split_seed=seed)
        assert len(data.dev) == 30
        filled = Counter(np.digitize(data.dev.labels, np.quantile(values, np.linspace(0.1, 0.9, 9))))
        assert filled == dict.fromkeys(range(10), 3)


def test_few_numbers_have_few_bins() -> None:
    assert bins([3.0, 1.0, 2.0, 4.0], 2) == [1, 0, 0, 1]
    assert bins([3.0, 1.0, 2.0, 4.0], 1) == [0, 0, 0, 0]
    assert set(bins([0.0] * 50 + [1.0], 5)) <= set(range(5))


class Salted(str):
    """A text whose hash is that of another process."""

    salt = ""

    def __hash__(self) -> int:
        return hash((self.salt, str(self)))


def test_the_split_is_that_of_its_seed_in_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for salt in "abcd":
        monkeypatch.setattr(Salted, "salt", salt)
        tags = [(Salted("O"), Salted("abcdefg"[n % 7]), Salted("xyz"[n % 3])) for n in range(300)]
        found.append(stratified([Salted(n % 250) for n in range(300)], tags, 30, 5))
    assert found[1:] == found[:1] * 3


def test_shuffled_is_what_it_was() -> None:
    """The demo's rows depend on it."""
    assert shuffled(10, 3, 0) == ([5, 3, 4, 2, 0, 9, 6], [7, 8, 1])


def test_strata_that_overlap_are_on_both_sides() -> None:
    keys, strata = "1234", [("A", "B"), ("A",), ("B", "C"), ("C",)]
    for seed in range(20):
        for side in stratified(keys, strata, 1, seed):
            assert {stratum for row in side for stratum in strata[row]} == set("ABC")


def test_digests_tell_texts_apart() -> None:
    texts = ["a b", "a  b", "A b", ("a", "b"), ("b", "a"), "\ud800", ""]
    assert len({digest(text) for text in texts}) == len(texts)
    assert digest(["a", "b"]) == digest("a b"), "words, as those that were pre-trained on as a text"
    assert digest(" a\n") == digest("a")
    assert len(digest("a")) == 12
