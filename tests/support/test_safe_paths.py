"""Folders of others whose JSON names files elsewhere: refused before any of them is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from peft import get_peft_model
from samples import reviews, save_tiny_model, write_csv
from torch import nn
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from fastpeft import CompareConfig, FastpeftError, LadderConfig, LadderModel, Prompt, PromptModel, SivaConfig, compare
from fastpeft.data.examples import load_data
from fastpeft.data.problems import CLASSIFICATION
from fastpeft.methods.saved_adapters import load_adapter
from fastpeft.mezo import Journal
from fastpeft.models import load_classifier
from fastpeft.ops.noise import NAMES
from fastpeft.support.adapter_files import check_adapter
from fastpeft.support.safe_paths import check_named_files


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in several files, and an adapter and a side network on it."""
    place = tmp_path_factory.mktemp("place")
    save_tiny_model(place / "model")
    masked = AutoModelForMaskedLM.from_pretrained(place / "model")
    (place / "model" / "model.safetensors").unlink()
    masked.save_pretrained(place / "model", max_shard_size="5KB")
    bases = (AutoModelForSequenceClassification.from_pretrained(place / "model") for _ in range(2))
    LadderModel(next(bases), LadderConfig(window_size=3)).save_pretrained(place / "side")
    get_peft_model(next(bases), SivaConfig(r=2, task_type="SEQ_CLS")).save_pretrained(str(place / "adapter"))
    part = datasets.Dataset.from_list([{"text": text, "label": label} for text, label in reviews(20)])
    part.save_to_disk(place / "rows")
    return place


def load_whole(folder: Path) -> Any:
    return load_classifier(str(folder), ["a", "b"], CLASSIFICATION)


LOADERS: dict[str, Callable[[Path], Any]] = {
    "model": load_whole,
    "adapter": load_adapter,
    "side": LadderModel.from_pretrained,
    "rows": lambda folder: load_data(str(folder)),
}


def rename_shard(values: dict[str, Any], name: str) -> None:
    first = min(values["weight_map"].values())
    values["weight_map"] = {key: name if file == first else file for key, file in values["weight_map"].items()}


def put(*path: Any) -> Callable[[dict[str, Any], str], None]:
    """A change that puts the name at a place in the JSON."""

    def change(values: Any, name: str) -> None:
        for key in path[:-1]:
            values = values[key]
        values[path[-1]] = name

    return change


def put_list(key: str) -> Callable[[dict[str, Any], str], None]:
    return lambda values, name: values.update({key: [name]})


# which folder, the file in it, and where that file names others
CASES: list[tuple[str, str, Callable[[dict[str, Any], str], None], str]] = [
    ("model", "model.safetensors.index.json", rename_shard, "x.safetensors"),
    ("model", "config.json", put("transformers_weights"), "x.safetensors"),
    ("model", "config.json", put_list("configuration_files"), "config.4.0.0.json"),
    ("model", "tokenizer_config.json", put_list("fast_tokenizer_files"), "tokenizer.4.0.0.json"),
    ("model", "tokenizer_config.json", put("vocab_file"), "vocab.json"),
    ("adapter", "tokenizer_config.json", put_list("fast_tokenizer_files"), "tokenizer.4.0.0.json"),
    ("side", "config.json", put_list("configuration_files"), "config.4.0.0.json"),
    ("rows", "state.json", put("_data_files", 0, "filename"), "x.arrow"),
]


@pytest.fixture(params=["relative", "absolute", "link"])
def elsewhere(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Path, str], str]:
    """Makes a file outside of a folder, and tells by which name the folder leads to it."""

    def make(folder: Path, name: str) -> str:
        outside = tmp_path / "outside" / name
        outside.parent.mkdir()
        outside.write_text("{}")
        if request.param == "link":
            (folder / name).symlink_to(outside)
            return name
        return f"../outside/{name}" if request.param == "relative" else str(outside)

    return make


@pytest.mark.parametrize(("kind", "file", "change", "name"), CASES, ids=[f"{case[0]}-{case[3]}" for case in CASES])
def test_names_that_lead_out_of_a_folder_are_refused(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    elsewhere: Callable[[Path, str], str],
    kind: str,
    file: str,
    change: Callable[[dict[str, Any], str], None],
    name: str,
) -> None:
    folder = shutil.copytree(place / kind, tmp_path / kind)
    monkeypatch.chdir(folder)  # from where early versions of transformers open a vocabulary
    LOADERS[kind](folder)
    values = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    found = elsewhere(folder, name)
    change(values, found)
    (folder / file).write_text(json.dumps(values))
    with pytest.raises(FastpeftError) as raised:
        LOADERS[kind](folder)
    assert f"{file} names {found!r}, which lies outside of its folder" in str(raised.value)


def test_files_that_are_named_for_others_stay_in_their_folder_too(place: Path, tmp_path: Path) -> None:
    """An index in a folder of its own, and a configuration for later versions of transformers."""
    model = shutil.copytree(place / "model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "parts").mkdir()
    (model / "parts" / "a.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"a": "../x.safetensors"}})
    )
    (model / "config.json").write_text(json.dumps({**config, "transformers_weights": "parts/a.safetensors.index.json"}))
    with pytest.raises(FastpeftError, match=r"parts/a\.safetensors\.index\.json names '\.\./x\.safetensors'"):
        load_whole(model)
    (tmp_path / "x.safetensors").write_text("")
    (model / "x.safetensors").symlink_to(tmp_path / "x.safetensors")
    (model / "config.5.0.0.json").write_text(json.dumps({**config, "transformers_weights": "x.safetensors"}))
    (model / "config.json").write_text(json.dumps({**config, "configuration_files": ["config.5.0.0.json"]}))
    with pytest.raises(FastpeftError, match=r"config\.5\.0\.0\.json names 'x\.safetensors', which lies outside"):
        load_whole(model)


def test_the_base_of_a_prompted_adapter_stays_in_its_folder(place: Path, tmp_path: Path) -> None:
    base = shutil.copytree(place / "model", tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    masked_lm = get_peft_model(AutoModelForMaskedLM.from_pretrained(base), SivaConfig(r=2))
    prompt = Prompt("{text} <mask>", {0: "and", 1: "a"})
    PromptModel(masked_lm, tokenizer, prompt).save_pretrained(tmp_path / "prompted")
    PromptModel.from_pretrained(tmp_path / "prompted")
    index = base / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    rename_shard(values, "../x.safetensors")
    index.write_text(json.dumps(values))
    with pytest.raises(FastpeftError, match=r"names '\.\./x\.safetensors', which lies outside"):
        PromptModel.from_pretrained(tmp_path / "prompted")


def test_no_kernel_of_the_hub_is_loaded_that_a_model_names_for_its_attention(place: Path, tmp_path: Path) -> None:
    """transformers would fetch its code, or where the package kernels is missing say so."""
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    masked_lm = AutoModelForMaskedLM.from_pretrained(place / "model")
    PromptModel(masked_lm, tokenizer, Prompt("{text} <mask>", {0: "and", 1: "a"})).save_pretrained(tmp_path)
    config = place / "model" / "config.json"
    before = config.read_text()
    named = before.replace("{", '{"attn_implementation": "owner/kernel",', 1)
    (tmp_path / "config.json").write_text(named)
    config.write_text(named)
    try:
        for kind in ("model", "adapter", "side"):
            LOADERS[kind](place / kind)
        PromptModel.from_pretrained(tmp_path)
    finally:
        config.write_text(before)


def test_parts_of_a_data_set_stay_in_their_folders(tmp_path: Path) -> None:
    part = datasets.Dataset.from_list([{"text": text, "label": label} for text, label in reviews(20)])
    datasets.DatasetDict(train=part).save_to_disk(tmp_path / "rows")
    load_data(str(tmp_path / "rows"))
    state = tmp_path / "rows" / "train" / "state.json"
    values = json.loads(state.read_text())
    values["_data_files"][0]["filename"] = "../data.arrow"
    state.write_text(json.dumps(values))
    with pytest.raises(FastpeftError, match=r"state\.json names '\.\./data\.arrow', which lies outside"):
        load_data(str(tmp_path / "rows"))


def test_links_inside_a_folder_and_in_the_cache_of_the_hub_are_followed(place: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(place / "model", tmp_path / "models--a--b" / "snapshots" / "0a1b")
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))
    load_whole(folder)
    folder = shutil.copytree(place / "model", tmp_path / "own")
    shard = min(folder.glob("model-*.safetensors"))
    shard.rename(folder / "kept")
    shard.symlink_to("kept")
    load_whole(folder)


@pytest.mark.parametrize("name", ["a\0b", "../" * 40 + "etc/passwd", "//etc/passwd", "a/../../x", "~/../../x"])
def test_names_as_attackers_write_them_are_outside(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight": name}}))
    with pytest.raises(FastpeftError, match="outside of its folder"):
        check_named_files(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": 5}', '{"weight_map": [[{"a": null}]]}', "[" * 10**5])
def test_what_is_no_index_is_left_to_its_reader(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    check_named_files(tmp_path)
    check_named_files(tmp_path / "absent")


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("XLORA", {"adapters": {"0": "some/adapter"}}),
        ("SHADOW", {"shadow_model": "some/model"}),
        ("SIVA", {"pissa": "some/adapter"}),
        ("MULTITASK_PROMPT_TUNING", {"prompt_tuning_init_state_dict_path": "some/file"}),
        ("LORA", {"megatron_config": {"from": "some/module"}}),
    ],
)
def test_adapters_that_are_made_of_others_are_refused(
    place: Path, tmp_path: Path, kind: str, named: dict[str, Any]
) -> None:
    folder = shutil.copytree(place / "adapter", tmp_path / "adapter")
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**values, "peft_type": kind, **named}))
    with pytest.raises(FastpeftError, match=rf"of the type {kind} and names others .*some/"):
        check_adapter(folder)
    model = shutil.copytree(place / "model", tmp_path / "model")
    shutil.copy(folder / "adapter_config.json", model)  # which transformers then loads with the model
    with pytest.raises(FastpeftError, match=rf"of the type {kind} and names others .*some/"):
        load_whole(model)


def test_a_journal_names_parameters_and_no_files(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"secret")
    header = {"seed": 0, "noise": "gaussian", "estimator": "spsa", "num_estimates": 1, "restore": "in_place"}
    described = {"name": "../weights", "shape": [2], "dtype": "torch.float32", "offset": 0}
    groups = [{"eps": 1e-3, "weight_decay": 0.0, "parameters": [described]}]
    header |= {"rounding": "nearest", "groups": groups, "first_step": 0, "dropped": 0}
    header |= {"weights": "0" * 16, "drawn_by": NAMES["gaussian"]}
    (tmp_path / "run").mkdir()
    Journal.create(tmp_path / "run" / "mezo.journal", header)
    with pytest.raises(FastpeftError, match=r"the model has no parameter '\.\./weights'"):
        Journal.open(tmp_path / "run" / "mezo.journal").replay(nn.Linear(2, 2))


def test_a_comparison_reads_its_own_cells_alone(place: Path, tmp_path: Path) -> None:
    """And unlinks and writes none of another folder's files."""
    write_csv(tmp_path / "reviews.csv", reviews(20))
    common = {"model": str(place / "model"), "data": str(tmp_path / "reviews.csv"), "max_steps": 1}
    config = CompareConfig(output=str(tmp_path / "out"), methods=["head"], common=common)
    (tmp_path / "out").mkdir()
    cell = {"variant": "head", "method": "head", "seed": 0, "values": {}, "after": [], "rates": []}
    for name in ("../../victim", str(tmp_path / "victim"), "..", ".", "", 5):
        values = {"commands": [], "suites": [], "cells": [{**cell, "name": name}]}
        (tmp_path / "out" / "comparison.json").write_text(json.dumps(values))
        with pytest.raises(FastpeftError, match=r"comparison\.json is not of a comparison"):
            compare(config)
    assert {file.name for file in tmp_path.iterdir()} == {"reviews.csv", "out"}
