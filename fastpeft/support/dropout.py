"""Evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fastpeft.support.interrupts import uninterrupted


@contextmanager
def dropout_off(model: nn.Module | None) -> Iterator[None]:
    """Put the model, if one is given, in eval mode; afterwards each module is as it was."""
    training = [] if model is None else [module for module in model.modules() if module.training]
    try:
        if model is not None:
            model.eval()
        yield
    finally:
        with uninterrupted():
            for module in training:
                module.training = True  # not train(), which would change the modules below it as well
