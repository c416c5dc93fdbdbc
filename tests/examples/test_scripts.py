"""Each script of examples/ learns what its `--tiny` form shows, and leaves what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from script_files import EXAMPLES, load_script

pytestmark = pytest.mark.docs


def run(script: str, *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = load_script(EXAMPLES / f"{script}.py").main([*arguments, "--tiny"])
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
