"""Fine-tune transformers with little memory: SiVA, k-LST and MeZO on custom kernels.

With this package imported, PEFT knows SiVA, so that `get_peft_model` and `PeftModel.from_pretrained` take it, and the
Auto classes of transformers know side networks. The import itself loads neither of the two, nor PyTorch: what is
registered with a library is registered when that is imported, before or after this.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import TYPE_CHECKING, Any

import fastpeft.support.quiet  # noqa: F401  # before PEFT is imported
from fastpeft.errors import FastpeftError
from fastpeft.support.import_hook import when_imported
from fastpeft.version import __version__ as __version__

if TYPE_CHECKING:
    from fastpeft import functional
    from fastpeft.comparison.plan import CompareConfig
    from fastpeft.comparison.run import compare
    from fastpeft.ladder import LadderConfig, LadderModel, LadderPool
    from fastpeft.mezo import FZOO, SPSA, Exact, InPlace, MeZO
    from fastpeft.mezo.trainer import MeZOConfig, MeZOTrainer
    from fastpeft.ops.frozen_linear import pack_frozen, unpack_frozen
    from fastpeft.ops.fused_head import fuse_head, unfuse_head
    from fastpeft.prompts.model import PromptCollator, PromptModel
    from fastpeft.prompts.template import Prompt
    from fastpeft.siva import SivaConfig, SivaLinear
    from fastpeft.training.config import TrainConfig
    from fastpeft.training.recipe import train

__all__ = [
    "FZOO",
    "SPSA",
    "CompareConfig",
    "Exact",
    "FastpeftError",
    "InPlace",
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
    "fuse_head",
    "pack_frozen",
    "train",
    "unfuse_head",
    "unpack_frozen",
]

# where the other names are, for their first use
_MODULES = {
    "FZOO": "fastpeft.mezo",
    "SPSA": "fastpeft.mezo",
    "CompareConfig": "fastpeft.comparison.plan",
    "Exact": "fastpeft.mezo",
    "InPlace": "fastpeft.mezo",
    "LadderConfig": "fastpeft.ladder",
    "LadderModel": "fastpeft.ladder",
    "LadderPool": "fastpeft.ladder",
    "MeZO": "fastpeft.mezo",
    "MeZOConfig": "fastpeft.mezo.trainer",
    "MeZOTrainer": "fastpeft.mezo.trainer",
    "Prompt": "fastpeft.prompts.template",
    "PromptCollator": "fastpeft.prompts.model",
    "PromptModel": "fastpeft.prompts.model",
    "SivaConfig": "fastpeft.siva",
    "SivaLinear": "fastpeft.siva",
    "TrainConfig": "fastpeft.training.config",
    "compare": "fastpeft.comparison.run",
    "fuse_head": "fastpeft.ops.fused_head",
    "pack_frozen": "fastpeft.ops.frozen_linear",
    "train": "fastpeft.training.recipe",
    "unfuse_head": "fastpeft.ops.fused_head",
    "unpack_frozen": "fastpeft.ops.frozen_linear",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = getattr(importlib.import_module(_MODULES[name]), name)
    elif name == "functional":
        value = importlib.import_module("fastpeft.functional")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# these packages register themselves
when_imported(
    {
        "peft": partial(importlib.import_module, "fastpeft.siva"),
        "transformers.models.auto": partial(importlib.import_module, "fastpeft.ladder"),
    }
)
