"""A tiny language model and its data in `MeZOTrainer`, for the tests of that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import RobertaConfig, RobertaForMaskedLM

from fastpeft import MeZOConfig, MeZOTrainer

LENGTH = 6
TINY = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 20,
    "initializer_range": 0.2,
}


def language_model(**changes: Any) -> RobertaForMaskedLM:
    torch.manual_seed(0)
    return RobertaForMaskedLM(RobertaConfig(**{**TINY, **changes}))


def rows(count: int = 20) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 30, (count, LENGTH), generator=generator)
    return [{"input_ids": row, "labels": row.roll(1)} for row in ids]


def config(folder: Path, **changes: Any) -> MeZOConfig:
    options: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return MeZOConfig(str(folder), **{**options, **changes})


def logged(trainer: MeZOTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]
