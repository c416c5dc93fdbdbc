"""Pools of side networks on tiny backbones, and what their answers must be."""

from __future__ import annotations

from typing import Any

import torch
from backbones import IDS, MASK, trainable
from torch import Tensor, nn

from fastpeft import LadderConfig, LadderPool

BATCH = {"input_ids": IDS, "attention_mask": MASK}
SMALL = {"window_size": 3, "reduction_factor": 2}
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}


def shuffled(model: nn.Module, seed: int) -> Any:
    """Other weights for all that trains, large enough to tell models apart."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in trainable(model).values():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model.eval()


def pool_of(base: nn.Module, *configs: dict[str, Any]) -> LadderPool:
    """Members 0, 1, ... of these configurations, all with weights of their own."""
    pool = LadderPool(base)
    for number, config in enumerate(configs):
        shuffled(pool.add(str(number), LadderConfig(**{**SMALL, **config})), number)
    return pool


def answers(pool: LadderPool, tasks: list[str]) -> Tensor:
    """The logits for `BATCH`."""
    return torch.stack([row.logits for row in pool(BATCH, tasks)])


def rows_of(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: value[row : row + 1] for name, value in batch.items()}


def assert_answers_are_the_models(pool: LadderPool, batch: dict[str, Tensor], tasks: list[str]) -> None:
    answers = pool(batch, tasks)
    assert len(answers) == len(tasks)
    for row, (task, answer) in enumerate(zip(tasks, answers)):
        with torch.no_grad():
            expected = pool[task](**rows_of(batch, row))
        assert answer.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(answer[name], value[0], **ROUNDING)
