"""Where a NaN or an infinity began: a step that came upon one is computed once more, with a look at every module.

Ordinary steps have no hooks and cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def where_it_began(model: nn.Module, compute: Callable[[], Any]) -> str:
    """A sentence that names where in `model` the first value that is not finite is.

    The weights are those before the step. `compute` computes the loss of the batch again, with a backward pass where
    there is one; what it adds to gradients stays. Dropout draws anew, so what depends on it may not come again; the
    sentence then says so.
    """
    for name, weight in model.named_parameters():
        if not is_finite(weight):
            return f"The weight {name} was not finite before it."
    with _watching(model) as found:
        compute()
    return next(iter(found), "Computed again, all of it was finite.")


@contextmanager
def _watching(model: nn.Module) -> Iterator[list[str]]:
    """A list of what is not finite in what is computed inside it, from the first.

    A module's outputs come after those of the modules in it, so the first is of the innermost module. In a backward
    pass the gradients of outputs come from the last module to the first, each before those of the module's weights.
    """
    found: list[str] = []

    def note(what: str, tensor: Tensor) -> None:
        if not is_finite(tensor):
            found.append(f"The first value that is not finite is in {what}.")

    def look(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        for tensor in filter(torch.is_tensor, tree_leaves(output)):
            note(f"the output of {name}", tensor)
            if tensor.requires_grad:
                tensor.register_hook(partial(note, f"the gradient that reaches the output of {name}"))

    hooks = [
        module.register_forward_hook(partial(look, name or type(model).__name__))
        for name, module in model.named_modules()
    ]
    hooks += [
        weight.register_hook(partial(note, f"the gradient of {name}"))
        for name, weight in model.named_parameters()
        if weight.requires_grad
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def is_finite(tensor: Tensor) -> bool:
    """Whether the tensor has no NaN and no infinity."""
    tensor = tensor.to_dense() if tensor.is_mkldnn else tensor  # a frozen weight whose pack has taken its place
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())
