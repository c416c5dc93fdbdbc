"""A warning where an optimizer would decay the factors of SiVA.

Weight decay pulls an adapter that starts at zero back to the pretrained model. The factors of SiVA are the largest part
of the pretrained weight itself: decaying them shrinks it.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

logger = logging.getLogger(__name__)

_layers: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_checked: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def watch(layer: nn.Module) -> None:
    """Look at the optimizer of this layer's parameters when it takes its first step."""
    _layers.add(layer)


def _check(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if optimizer in _checked or not _layers:
        return
    _checked.add(optimizer)
    named = (each for layer in _layers for each in layer.named_parameters())
    factors = {id(p) for name, p in named if p.requires_grad and name.startswith("siva_")}  # a bias may train too
    for group in optimizer.param_groups:
        if group.get("weight_decay") and any(id(p) in factors for p in group["params"]):
            logger.warning(
                "weight_decay=%g acts on the factors of SiVA, which hold the largest part of the pretrained weight: it "
                "shrinks that weight instead of the change. Use weight_decay=0 for them.",
                group["weight_decay"],
            )
            _handle.remove()
            return


_handle = register_optimizer_step_pre_hook(_check)
