"""Each script of examples/ learns what its `--tiny` form shows, and leaves what it says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.docs


def run(script: str, *arguments: str) -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location(script, EXAMPLES / f"{script}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: dict[str, Any] = module.main([*arguments, "--tiny"])
    return found


@pytest.mark.parametrize("adapter", ["siva", "lora"])
def test_drop_in_peft(tmp_path: Path, adapter: str) -> None:
    loss = run("drop_in_peft", "--adapter", adapter, "--output", str(tmp_path))
    assert loss["after"] < loss["before"]
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_plain_loop(tmp_path: Path) -> None:
    loss = run("plain_loop", "--output", str(tmp_path), "--epochs", "5")
    assert loss["after"] < loss["before"]


def test_trainer(tmp_path: Path) -> None:
    loss = run("trainer", "--output", str(tmp_path), "--epochs", "4")
    assert loss["after"] < loss["before"]
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_mezo_decoder(tmp_path: Path) -> None:
    found = run("mezo_decoder", "--output", str(tmp_path))
    assert found["after"] < found["before"] - 0.5
    assert found["replayed"]


def test_embeddings(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers", reason="the extra `integrations` is not installed")
    score = run("embeddings", "--output", str(tmp_path), "--method", "lst")
    assert score["loaded"] == score["after"] != score["before"]
