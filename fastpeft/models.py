"""`resolve_model`, under its documented name."""

from fastpeft.data.models import resolve_model

__all__ = ["resolve_model"]
