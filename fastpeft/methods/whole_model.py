"""Methods that train parameters of the model itself, and save it whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastpeft.errors import FastpeftError
from fastpeft.methods.method import Method
from fastpeft.methods.preparation import Preparation


@dataclass(frozen=True, kw_only=True)
class WholeModelMethod(Method):
    """A method that saves a whole model.

    Attributes:
        trains: sets what trains of a model.
        takes: what `config_fields` returns.
    """

    trains: Callable[[Any, Preparation], None]
    takes: Mapping[str, Any] = field(default_factory=dict)

    def config_fields(self) -> dict[str, Any]:
        return dict(self.takes)

    def prepare(self, model: Any, preparation: Preparation) -> Any:
        self.trains(model, preparation)
        return model

    def load(self, folder: Path, start: Callable[[], Any], whole: Callable[[], Any]) -> Any:
        return whole()

    def load_checkpoint(self, model: Any, checkpoint: Path) -> None:
        model.load_state_dict(type(model).from_pretrained(checkpoint, use_safetensors=True).state_dict())

    def resume(self, model: Any, checkpoint: Path) -> None:
        # the Trainer of transformers 5.0 silently skips LayerNorm weights, which its models save by their old names
        self.load_checkpoint(model, checkpoint)


def everything(model: Any, _: Preparation) -> None:
    """Every weight trains."""
    model.requires_grad_(True)


def head(model: Any, preparation: Preparation) -> None:
    """The head trains."""
    model.requires_grad_(False)
    for name in preparation.head:
        model.get_submodule(name).requires_grad_(True)


def biases(model: Any, preparation: Preparation) -> None:
    """The biases and the head train."""
    head(model, preparation)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name.endswith("bias"))


def last_layers(model: Any, preparation: Preparation) -> None:
    """The last `layers` blocks of the backbone (the paper's 3) and the head train."""
    from fastpeft.ladder.backbone import Backbone

    blocks = Backbone(model).layers
    count = preparation.settings.get("layers", min(3, len(blocks)))
    if not 1 <= count <= len(blocks):
        raise FastpeftError(f"layers is {count}; the model has {len(blocks)}. Give a number from 1 to that.")
    head(model, preparation)
    for block in blocks[-count:]:
        block.requires_grad_(True)
