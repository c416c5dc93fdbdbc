"""Adapters that training has moved, for the tests of SiVA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
RESIDUALS = pytest.mark.parametrize("residual", ["frozen", "implicit"])
SHAPE = {  # of a transformers configuration
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}


def tiny(kind: str = "Roberta", head: str = "ForSequenceClassification", **changes: Any) -> Any:
    """A randomly initialised model in eval mode, the same at every call."""
    config = getattr(transformers, f"{kind}Config")(**{**SHAPE, **changes})
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}{head}")(config).eval()


def token_ids(rows: int = 3) -> Tensor:
    """Nine tokens a row, of those that `tiny` knows."""
    return torch.randint(3, 50, (rows, 9), generator=torch.Generator().manual_seed(2))


def answers(model: nn.Module) -> Tensor:
    """What a model says of three fixed texts."""
    with torch.no_grad():
        found: Tensor = model(token_ids()).logits
    return found


def move(model: nn.Module, seed: int = 0, size: float = 0.02) -> Any:
    """Change what trains, by normal numbers of that size, and return the model."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += size * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def trained(model: nn.Module) -> set[str]:
    """The names of what trains."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def without_dropout(model: nn.Module) -> Any:
    """The model in training mode, with every dropout set to 0."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()
