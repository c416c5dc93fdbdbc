"""Evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from fastpeft.support.interrupts import uninterrupted


@contextmanager
def in_eval_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put each of these modules, not those inside it, in eval mode; afterwards each is as it was.

    Give `model.modules()` for a whole model.
    """
    training = [module for module in modules if module.training]
    try:
        for module in training:
            module.training = False  # not eval(), which would change the modules below it as well
        yield
    finally:
        with uninterrupted():
            for module in training:
                module.training = True
