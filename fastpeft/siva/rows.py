"""Batches whose rows belong to different adapters: PEFT's `adapter_names`.

While a model runs with a name for each row, every adapted layer holds the `AdapterRows` and uses the factors of each
row's adapter. Modules that adapters save whole, such as classification heads, and embeddings of which they train tokens
run once for each adapter, on its rows.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastpeft.errors import FastpeftError
from fastpeft.siva.base import AdaptedLayer

BASE = "__base__"  # PEFT's name for rows without an adapter
_STARTING = threading.Lock()
_CHECKPOINT = "_gradient_checkpointing_func"  # modules of transformers call this to checkpoint


class AdapterRows:
    """The adapter of each row of a batch.

    Args:
        names: One a row.
        device: Where the layers are.
        copies: How often `generate` repeats each row of its input, as for beams.

    Attributes:
        sizes: Number of rows of each adapter, in the order of the adapters' names.
        order: int64 `(B,)`, which sorts the rows into that order; None if they are sorted already.
    """

    def __init__(self, names: Sequence[str], device: torch.device, copies: int = 1) -> None:
        self._names = list(names)
        self._repeated = AdapterRows([name for name in names for _ in range(copies)], device) if copies > 1 else None
        order = sorted(range(len(names)), key=self._names.__getitem__)
        self.sizes: dict[str, int] = dict(Counter(self._names[row] for row in order))
        self.order = None if order == list(range(len(names))) else torch.tensor(order, device=device)

    def of(self, x: Tensor, reader: str) -> AdapterRows:
        """The rows of x `(B, *, K)`, the input of `reader`: these, or these repeated.

        Raises:
            FastpeftError: x has another number of rows.
        """
        for rows in (self, self._repeated):
            if rows is not None and x.dim() > 1 and len(x) == len(rows._names):
                return rows
        raise FastpeftError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(self._names)} names, and {reader} reads an input of shape {tuple(x.shape)}. Give one name for each "
            "row of the batch; a model whose layers do not keep the batch as their first dimension must run once for "
            "each adapter instead."
        )

    def each(self, x: Tensor, functions: Iterable[Callable[[Tensor], Tensor]]) -> Tensor:
        """The results of `functions`, one for each adapter on its rows of x, in the order of x.

        Results of fewer outputs than others, as of a head for fewer classes, end in -inf.
        """
        parts = (x if self.order is None else x[self.order]).split(list(self.sizes.values()))
        results = [function(part) for function, part in zip(functions, parts, strict=True)]
        outputs = {result.shape[-1] for result in results if result.dim() > 1}
        if len(outputs) > 1:
            most = max(outputs)
            results = [F.pad(result, (0, most - result.shape[-1]), value=-torch.inf) for result in results]
        found = torch.cat(results)
        return found if self.order is None else found[self.order.argsort()]


def outside_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()`, but for what is in adapted layers and in modules saved whole: hundreds of adapters."""
    seen: set[nn.Module] = set()  # torch.compile cannot trace `set[nn.Module]()`
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        yield name, module
        if not isinstance(module, (AdaptedLayer, AuxiliaryTrainingWrapper)):
            prefix = f"{name}." if name else ""
            waiting += [
                (f"{prefix}{own}", child) for own, child in reversed(module._modules.items()) if child is not None
            ]


@contextmanager
def acting(model: nn.Module, rows: AdapterRows) -> Iterator[None]:
    """Inside it the layers of SiVA in `model`, and modules that adapters saved whole, use each row's adapter.

    Blocks that transformers checkpoints meanwhile use the same rows when backward runs them again.

    Raises:
        FastpeftError: other rows act meanwhile, which would stay.
    """
    changes: list[tuple[nn.Module, str, Any]] = []
    for name, module in outside_adapters(model):
        if isinstance(module, AdaptedLayer):
            changes.append((module, "rows", rows))
        elif isinstance(module, AuxiliaryTrainingWrapper):
            changes.append((module, "forward", partial(_run_saved, module, name, rows)))
        if _CHECKPOINT in module.__dict__:
            changes.append((module, _CHECKPOINT, partial(_checkpoint, module.__dict__[_CHECKPOINT], module, rows)))
    compiling = torch.compiler.is_compiling()
    with nullcontext() if compiling else _STARTING:
        before = [module.__dict__.get(name) for module, name, _ in changes]
        if not compiling and any(
            name == "rows" and each not in (None, rows) for (_, name, _), each in zip(changes, before)
        ):
            raise FastpeftError(
                "another thread runs this model with adapter_names. Which row has which adapter is noted in its "
                "layers, so give threads a lock."
            )
        for module, name, value in changes:
            setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(changes, before, strict=True):
            if value is None:
                module.__dict__.pop(name)  # the class has its own
            else:
                setattr(module, name, value)


def _checkpoint(function: Callable[..., Any], module: nn.Module, rows: AdapterRows, run: Any, *args: Any) -> Any:
    """`function(run, *args)`, where `run` knows the rows in backward too, when the model no longer holds them."""

    def run_by_rows(*args: Any, **kwargs: Any) -> Any:
        with acting(module, rows):
            return run(*args, **kwargs)

    return function(run_by_rows, *args)


def _run_saved(wrapper: Any, name: str, rows: AdapterRows, *args: Any, **kwargs: Any) -> Tensor:
    """Run each row by the module that its adapter saved, or by the pretrained one if it saved none.

    Raises:
        FastpeftError: the module takes or returns anything but one tensor with the rows in its first dimension.
    """
    leaves, spec = tree_flatten((args, kwargs))
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    reader = f"{name}, a {type(wrapper.original_module).__name__}"
    if len(places) != 1:
        raise _not_by_rows(reader, f"takes {len(places)}")
    place, x = places[0], leaves[places[0]]

    def run(function: Callable[..., Any], part: Tensor) -> Tensor:
        args, kwargs = tree_unflatten([*leaves[:place], part, *leaves[place + 1 :]], spec)
        found = function(*args, **kwargs)
        if not isinstance(found, Tensor):
            raise _not_by_rows(reader, f"gives a {type(found).__name__}")
        if found.shape[:1] != part.shape[:1]:
            raise _not_by_rows(reader, f"gives {tuple(found.shape)} for {tuple(part.shape)}")
        return found

    rows = rows.of(x, reader)
    return rows.each(x, [partial(run, _saved(wrapper, adapter)) for adapter in rows.sizes])


def _saved(wrapper: Any, adapter: str) -> Callable[..., Any]:
    """What runs for `adapter` instead of a module of the base model."""
    if not wrapper.disable_adapters:
        if isinstance(wrapper, TrainableTokensWrapper):
            if adapter in wrapper.token_adapter.token_indices:
                return partial(wrapper.token_adapter.forward_adapters, active_adapters=[adapter])
        elif adapter in wrapper.modules_to_save:
            module: nn.Module = wrapper.modules_to_save[adapter]
            return module
    original: nn.Module = wrapper.original_module
    return original


def _not_by_rows(reader: str, what: str) -> FastpeftError:
    return FastpeftError(
        f"adapter_names: {reader}, {what}. A module that adapters saved whole can run by rows if it takes one tensor "
        "and gives one, both with the rows in the first dimension. Run the model once for each adapter instead."
    )
