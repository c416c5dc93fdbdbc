"""What the state dict of a MeZO holds beside the groups that every optimizer has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from fastpeft.errors import FastpeftError
from fastpeft.mezo.journal_format import Position
from fastpeft.ops.noise import NAMES


@dataclass(frozen=True)
class SavedState:
    """Where a run stood and how its noise is drawn, under the names of `MeZO`'s arguments and attributes."""

    seed: int
    steps_done: int
    noise: str
    estimator: str
    num_estimates: int
    drawn_by: str
    dropped: int  # estimates since the last step

    @classmethod
    def read(cls, state_dict: Mapping[str, Any]) -> SavedState:
        """Read a state dict.

        Raises:
            FastpeftError: another optimizer wrote it, or its noise was drawn otherwise than now.
        """
        names = {field.name for field in fields(cls)}
        if not state_dict.keys() >= names:
            raise FastpeftError(
                f"MeZO: the state has {', '.join(map(str, state_dict))} but not {', '.join(sorted(names))}, so "
                "another optimizer wrote it. Load the state of a MeZO optimizer, or begin anew."
            )
        noise, drawn_by = state_dict["noise"], state_dict["drawn_by"]
        if drawn_by != NAMES.get(noise):
            raise FastpeftError(
                f"MeZO: the state is of a run whose {noise} noise was drawn by {drawn_by!r}; this version draws it by "
                f"{NAMES.get(noise)!r}, so it would go on as another run. Use the version of fastpeft that wrote it, "
                "or load the weights alone and begin anew."
            )
        return cls(**{name: state_dict[name] for name in names})

    @property
    def settings(self) -> dict[str, Any]:
        """The entries that the header of a journal has too."""
        return {name: value for name, value in asdict(self).items() if name not in ("steps_done", "dropped")}

    @property
    def position(self) -> Position:
        return self.steps_done, self.dropped
