"""One run: its configuration, its Trainer, its folder, and what is done with it once it is finished."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastpeft.training.config import TrainConfig

if TYPE_CHECKING:
    from fastpeft.training.run import train

__all__ = ["TrainConfig", "train"]


def __getattr__(name: str) -> Any:
    if name == "train":  # at its first use, for it imports the Trainer
        from fastpeft.training.run import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
