"""What `push_to_hub` uploads, with the hub's API put aside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file
from samples import save_tiny_model
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from fastpeft import LadderConfig, LadderModel, Prompt, PromptModel

REPOSITORY = "someone/something"
PROMPT = Prompt("{text} the film is <mask>", {"negative": "awful", "positive": "lovely"})


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that takes what is uploaded."""
    uploaded = tmp_path / "hub"
    uploaded.mkdir()

    def create_repo(*_: Any, **arguments: Any) -> Any:
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{REPOSITORY}")

    def create_commit(*_: Any, operations: Any, **arguments: Any) -> str:
        for operation in operations:
            with operation.as_file() as file:
                (uploaded / operation.path_in_repo).write_bytes(file.read())
        return "uploaded"

    def no_card(*_: Any, **__: Any) -> Any:
        return huggingface_hub.ModelCard("")

    for name, function in (("create_repo", create_repo), ("create_commit", create_commit)):
        monkeypatch.setattr(huggingface_hub.HfApi, name, function)
        monkeypatch.setattr(transformers.utils.hub, name, function, raising=False)  # how transformers 5.0 calls it
    for module in (transformers.utils.hub, transformers.modeling_utils):
        monkeypatch.setattr(module, "create_and_tag_model_card", no_card, raising=False)
    return uploaded


def ladder(checkpoint: Path, head: Any) -> LadderModel:
    return LadderModel(head.from_pretrained(checkpoint, dtype=torch.float32), LadderConfig(window_size=3)).eval()


def test_a_side_network_is_uploaded_without_its_backbone(checkpoint: Path, hub: Path) -> None:
    model = ladder(checkpoint, AutoModelForSequenceClassification)
    assert model.push_to_hub(REPOSITORY) == "uploaded"
    assert {file.name for file in hub.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert load_file(hub / "model.safetensors").keys() == model._trained
    batch = {"input_ids": torch.tensor([[0, 5, 6, 2]])}
    assert torch.equal(LadderModel.from_pretrained(hub)(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "with a side network"])
def test_a_prompted_model_is_uploaded_with_its_prompt_and_tokenizer(checkpoint: Path, hub: Path, beside: bool) -> None:
    masked_lm = ladder(checkpoint, AutoModelForMaskedLM) if beside else AutoModelForMaskedLM.from_pretrained(checkpoint)
    model = PromptModel(masked_lm, AutoTokenizer.from_pretrained(checkpoint), PROMPT).eval()
    assert model.push_to_hub(REPOSITORY) == "uploaded"
    names = {file.name for file in hub.iterdir()}
    assert {"config.json", "model.safetensors", "prompt.json", "tokenizer.json", "tokenizer_config.json"} <= names
    texts = ["a dull plot", "a lovely film"]
    assert torch.equal(PromptModel.from_pretrained(hub).predict_logits(texts), model.predict_logits(texts))
