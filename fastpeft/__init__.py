"""Fine-tune transformers on little memory: SiVA, k-LST and MeZO on custom kernels.

Importing this package makes SIVA known to PEFT, so that `get_peft_model` and `PeftModel.from_pretrained` take it, and
side networks to the Auto classes of transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import fastpeft.support.quiet  # noqa: F401  # isort: skip  # before PEFT is imported
from fastpeft import functional
from fastpeft.errors import FastpeftError
from fastpeft.ladder import LadderConfig, LadderModel, LadderPool
from fastpeft.siva import SivaConfig, SivaLinear
from fastpeft.version import __version__ as __version__

if TYPE_CHECKING:
    from fastpeft.comparison.plan import CompareConfig
    from fastpeft.comparison.run import compare
    from fastpeft.mezo.optimizer import MeZO
    from fastpeft.mezo.trainer import MeZOConfig, MeZOTrainer
    from fastpeft.prompts.model import PromptCollator, PromptModel
    from fastpeft.prompts.template import Prompt
    from fastpeft.training.run import TrainConfig, train

__all__ = [
    "CompareConfig",
    "FastpeftError",
    "LadderConfig",
    "LadderModel",
    "LadderPool",
    "MeZO",
    "MeZOConfig",
    "MeZOTrainer",
    "Prompt",
    "PromptCollator",
    "PromptModel",
    "SivaConfig",
    "SivaLinear",
    "TrainConfig",
    "compare",
    "functional",
    "train",
]

# Names that are loaded at first use, to keep the import quick: most of their modules import the Trainer.
_LAZY = {
    "CompareConfig": "fastpeft.comparison.plan",
    "MeZO": "fastpeft.mezo.optimizer",
    "MeZOConfig": "fastpeft.mezo.trainer",
    "MeZOTrainer": "fastpeft.mezo.trainer",
    "Prompt": "fastpeft.prompts",
    "PromptCollator": "fastpeft.prompts.model",
    "PromptModel": "fastpeft.prompts.model",
    "TrainConfig": "fastpeft.training",
    "compare": "fastpeft.comparison.run",
    "train": "fastpeft.training",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
