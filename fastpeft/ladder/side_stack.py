"""Side networks of one shape, computed together as one network with one more dimension."""

from __future__ import annotations

import copy
import threading
from collections.abc import Hashable, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastpeft.errors import FastpeftError
from fastpeft.ladder.config import SHAPE
from fastpeft.ladder.side import SideNetwork
from fastpeft.ops.dtypes import autocast_dtype

_STACKED = ("down", "projections", "blocks", "up")  # the parts of a side network that are computed for all at once
# PyTorch's choice of attention is a setting of the whole process: one thread at a time changes it and restores it
_ATTENTION = threading.Lock()


def shape_of(side: SideNetwork) -> Hashable:
    """A key that two side networks share if they can be stacked; a network that cannot be has a key of its own."""
    if any(name.partition(".")[0] not in _STACKED for name, _ in side.named_parameters()):
        return id(side)
    settings = tuple(repr(getattr(side.config, name)) for name in SHAPE)
    return settings, tuple((name, p.shape, p.dtype, p.device) for name, p in side.named_parameters())


class SideStack:
    """G side networks of one `shape_of`, whose weights are put together when they are used."""

    def __init__(self, sides: Sequence[SideNetwork]) -> None:
        self.sides = list(sides)
        self._shape = shape_of(sides[0])

    @cached_property
    def _code(self) -> SideNetwork:
        """A network whose weights take no memory: `functional_call` swaps others in and out."""
        first = self.sides[0]
        own = {id(parameter): nn.Parameter(parameter.detach().to("meta")) for parameter in first.parameters()}
        return copy.deepcopy(first, dict(own)).eval()

    def select(self, places: Sequence[int]) -> SideNetwork:
        """The networks at `places` as one, with operands and results `(G, B, T, ...)`; a single network as it is.

        Raises:
            FastpeftError: a network has another form, dtype or device than when the stack was made.
        """
        chosen = [self.sides[place] for place in places]
        if len(chosen) == 1:
            return chosen[0]
        if any(shape_of(side) != self._shape for side in chosen):
            raise FastpeftError(
                "a member of the pool has changed its form, dtype or device since it joined, as take_over does. Remove "
                "it and add it again."
            )
        code = self._code
        return copy.deepcopy(
            code,
            {id(own): StackedModule(own, parts) for own, parts in zip(_parts(code), zip(*map(_parts, chosen)))},
        )


class StackedModule(nn.Module):
    """G modules as one: the g-th slice of each operand meets the g-th module's weights.

    Args:
        code: a module of their class; its own weights are not used.
        modules: the modules, whose weights are copied side by side for each call.
    """

    def __init__(self, code: nn.Module, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self._code = code
        self._own = [dict(module.named_parameters(remove_duplicate=False)) for module in modules]
        linear = [name for name, part in code.named_modules() if isinstance(part, nn.Linear)]
        self._of_linear = {f"{name}.{kind}".lstrip(".") for name in linear for kind in ("weight", "bias")}

    @property
    def weight(self) -> Tensor:
        """The stacked weight of linear layers, `(G, ...)`."""
        return self._stacked("weight")

    def _stacked(self, name: str) -> Tensor:
        """A weight of all modules; of linear layers in autocast's dtype, for `vmap` adds a bias without casting it."""
        parts = [own[name].detach() for own in self._own]
        dtype = autocast_dtype(parts[0].device) if name in self._of_linear else None
        stacked = parts[0].new_empty((len(parts), *parts[0].shape), dtype=dtype or parts[0].dtype)
        for place, part in zip(stacked, parts):
            place.copy_(part)
        return stacked

    def forward(self, *operands: Any) -> Tensor:
        """Each module gets its slice of tensors `(G, ...)`; other operands go to every module."""
        in_dims = (0, *(0 if isinstance(operand, Tensor) else None for operand in operands))
        weights = {name: self._stacked(name) for name in self._own[0]}
        with _ATTENTION, sdpa_kernel(SDPBackend.MATH):  # vmap has no fused attention on a CPU
            result: Tensor = vmap(self._call, in_dims=in_dims)(weights, *operands)
        return result

    def _call(self, weights: dict[str, Tensor], *operands: Any) -> Any:
        return functional_call(self._code, weights, operands)


def _parts(side: SideNetwork) -> list[nn.Module]:
    """The modules that are computed for all networks at once."""
    return [side.down, *side.projections.values(), *side.blocks, side.up]
