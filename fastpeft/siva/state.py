"""The state of an adapter in a layer."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from fastpeft.ops.quantise import Format
from fastpeft.siva.config import Residual


class State(IntEnum):
    """What the stored weight of a layer holds of an adapter. A state dict holds it too, in `states`."""

    EMPTY = 0  # made with init_weights="saved", it has no factors yet: the weight is as if it were not there
    IMPLICIT = 1  # the weight is the pretrained W0, so that the initial triplets are subtracted at run time
    FROZEN = 2  # the weight is W_r, which is without the initial triplets
    MERGED = 3  # the weight has the trained triplets, and acts alone


@dataclass
class Adapter:
    """How an adapter of a layer was made, and its state."""

    r: int
    d: int | None
    residual: Residual
    residual_dtype: Format | None
    step: float | None
    state: State = State.EMPTY

    @property
    def loaded(self) -> State:
        """The state in which its factors act beside the stored weight."""
        return State.FROZEN if self.residual == "frozen" else State.IMPLICIT

    @property
    def decomposition(self) -> dict[str, Any]:
        """What adapters that share a frozen residual have in common."""
        return {name: getattr(self, name) for name in ("r", "d", "residual", "residual_dtype")}
