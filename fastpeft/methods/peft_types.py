"""PEFT's own types of adapters, each as a method `peft:TYPE`."""

from __future__ import annotations

from functools import cache
from typing import Any

from fastpeft.methods.adapter import AdapterMethod
from fastpeft.methods.recipes import Recipe

PREFIX = "peft:"  # of a method's name

# types that need more than a configuration: calls of the training loop, other inputs, or layers by another field
_LEFT_OUT = ("adalora", "adaption_prompt", "poly", "shadow", "siva", "trainable_tokens", "xlora")


@cache
def types() -> dict[str, Any]:
    """The configuration of each type that goes onto layers of a model, by its name."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    found = {str(kind.value).lower(): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    return {
        name: config
        for name, config in sorted(found.items())
        if name not in _LEFT_OUT and "target_modules" in config.__dataclass_fields__
    }


def method_of(name: str, recipe: Recipe) -> AdapterMethod:
    """The method of a type, with PEFT's own defaults but for the `recipe`."""
    config = types()[name.removeprefix(PREFIX)]
    return AdapterMethod(
        name=name,
        title=config.__name__.removesuffix("Config"),
        description=f"{config.__name__} of PEFT",
        recipe=recipe,
        config=config.__name__,
        options=("targets", "rank") if "r" in config.__dataclass_fields__ else ("targets",),
    )
