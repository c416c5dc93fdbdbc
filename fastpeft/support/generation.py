"""What a call of transformers' `generate` asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def option(name: str, arguments: Mapping[str, Any], *configs: Any) -> Any:
    """What a call says of an option, else the first of its generation configurations that does; None for nothing."""
    said = (arguments.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in said if value is not None), None)
