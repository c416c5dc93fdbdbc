"""Reading labelled texts from data sets of the hub, and from what `datasets` saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
from samples import reviews, write_csv

from fastpeft import FastpeftError
from fastpeft.data import tables
from fastpeft.data.examples import load_data, load_rows
from fastpeft.data.problems import CLASSIFICATION, TAGGING


def make_dataset(**parts: list[dict[str, Any]]) -> datasets.DatasetDict:
    classes = datasets.ClassLabel(names=["negative", "positive"])
    features = datasets.Features({"sentence": datasets.Value("string"), "label": classes})
    return datasets.DatasetDict(
        {name: datasets.Dataset.from_list(rows, features=features) for name, rows in parts.items()}
    )


SENTENCES = [{"sentence": f"text {n}", "label": n % 2} for n in range(20)]


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "reachable", lambda: True)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("glue/sst2", ("nyu-mll/glue", "sst2")),
        ("nyu-mll/glue:sst2", ("nyu-mll/glue", "sst2")),
        ("stanfordnlp/sst2", ("stanfordnlp/sst2", None)),
    ],
)
@pytest.mark.usefixtures("online")
def test_data_sets_of_the_hub(monkeypatch: pytest.MonkeyPatch, name: str, asked: tuple[str, str | None]) -> None:
    parts = make_dataset(train=SENTENCES, validation=SENTENCES[:4], test=[{"sentence": "hidden", "label": -1}])
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *given: calls.append(given) or parts)
    data = load_data(name)
    assert calls == [asked]
    assert (len(data.train), len(data.dev), data.labels) == (20, 4, ["negative", "positive"])
    assert data.dev.labels == [0, 1, 0, 1]
    assert data.description == f"{Path(name).name} (train), {Path(name).name} (validation)"
    assert load_rows(name, data.labels, CLASSIFICATION).texts == [row["sentence"] for row in SENTENCES[:4]]


@pytest.mark.usefixtures("online")
def test_hub_parts_without_a_label_or_a_dev_part(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = [{"sentence": "hidden", "label": -1}] * 5
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: make_dataset(train=SENTENCES + hidden))
    data = load_data("some/reviews")
    assert (len(data.train), len(data.dev)) == (18, 2)
    assert "hidden" not in data.train.texts + data.dev.texts
    with pytest.raises(FastpeftError, match="'some/reviews' has no dev"):
        load_rows("some/reviews", data.labels, CLASSIFICATION)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: make_dataset(test=SENTENCES))
    with pytest.raises(FastpeftError, match="'some/reviews' has no part named train, only test"):
        load_data("some/reviews")


def test_a_data_set_is_found_in_the_cache_where_the_hub_is_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without asking again: the one request that tells was made, and `load_dataset` would make six for each file."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(tables, "reachable", lambda: False)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(FastpeftError, match=r"cannot load the data set 'some/reviews': .*with a network or after it"):
        load_data("some/reviews")
    rows = write_csv(tmp_path / "rows.csv", reviews(20))
    builder = datasets.load_dataset_builder("csv", data_files={"train": str(rows)}, cache_dir=str(tmp_path / "made"))
    builder.download_and_prepare()
    place = tmp_path / "cache" / "some___reviews" / "default" / "0.0.0" / "0a1b"  # as a load from the hub leaves it
    shutil.copytree(builder.cache_dir, place)
    (place / "csv-train.arrow").rename(place / "reviews-train.arrow")
    info = json.loads((place / "dataset_info.json").read_text())
    (place / "dataset_info.json").write_text(json.dumps(info | {"config_name": "default", "dataset_name": "reviews"}))
    assert load_data("some/reviews").labels == ["negative", "positive"]


def test_tags_of_a_data_set_have_the_names_of_its_features(tmp_path: Path) -> None:
    names = ["O", "B-PER", "B-LOC"]
    kind = datasets.List(datasets.ClassLabel(names=names))
    features = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "ner_tags": kind})
    rows = [{"tokens": ["Ann", "is", "in"], "ner_tags": [1, 0, 0]}] * 4
    part = datasets.Dataset.from_list(rows, features=features)
    datasets.DatasetDict(train=part, validation=part).save_to_disk(tmp_path / "names")
    data = load_data(str(tmp_path / "names"))
    assert (data.problem, data.labels, data.train.labels[0]) == (TAGGING, names, [1, 0, 0])


def test_a_parquet_file_of_a_data_set_has_the_names_of_its_features(tmp_path: Path) -> None:
    """As the hub's files are, where -1 is no label."""
    hidden = {"sentence": "hidden", "label": -1}
    make_dataset(train=[*SENTENCES, hidden])["train"].to_parquet(tmp_path / "rows.parquet")
    data = load_data(str(tmp_path / "rows.parquet"), split=False)
    assert (data.labels, data.train.texts) == (["negative", "positive"], [row["sentence"] for row in SENTENCES])


def test_a_saved_data_set_is_a_folder_of_data(tmp_path: Path) -> None:
    make_dataset(train=SENTENCES, validation=SENTENCES[:4]).save_to_disk(tmp_path / "both")
    make_dataset(train=SENTENCES)["train"].save_to_disk(tmp_path / "one")
    both, one = load_data(str(tmp_path / "both")), load_data(str(tmp_path / "one"))
    assert (len(both.train), len(both.dev), both.labels) == (20, 4, ["negative", "positive"])
    assert (len(one.train), len(one.dev), one.labels) == (18, 2, ["negative", "positive"])
    assert load_rows(str(tmp_path / "both"), both.labels, CLASSIFICATION) == both.dev


def test_a_saved_part_is_measured_as_a_whole(tmp_path: Path) -> None:
    """It has no file that could be given instead."""
    make_dataset(train=SENTENCES, test=SENTENCES[:4]).save_to_disk(tmp_path / "both")
    with pytest.raises(FastpeftError, match=r"no dev\.\*.* only .*\(train\)\. .* the folder of a saved part"):
        load_rows(str(tmp_path / "both"), ["negative", "positive"], CLASSIFICATION)
    rows = load_rows(str(tmp_path / "both" / "test"), ["negative", "positive"], CLASSIFICATION)
    assert rows.texts == [row["sentence"] for row in SENTENCES[:4]]
