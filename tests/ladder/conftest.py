"""A pretrained model on the disk for all tests of side networks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from samples import save_tiny_model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a masked-word head, and its tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture(scope="session")
def half_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained masked-word model in bfloat16 on the disk."""
    folder = save_tiny_model(tmp_path_factory.mktemp("base"), dtype="float32")
    transformers.AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    return folder
