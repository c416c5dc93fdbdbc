"""Side networks of one shape, computed together as one network with one more dimension."""

from __future__ import annotations

import copy
import threading
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastpeft.errors import FastpeftError
from fastpeft.ladder.config import SHAPE
from fastpeft.ladder.side import SideNetwork

_STACKED = ("down", "projections", "blocks", "up")  # the parts of a side network that are computed for all at once
# PyTorch's choice of attention is a setting of the whole process: one thread at a time changes it and restores it
_ATTENTION = threading.Lock()


def shape_of(side: SideNetwork) -> Hashable:
    """A key that two side networks share if they can be stacked; a network that cannot be has a key of its own."""
    if any(name.partition(".")[0] not in _STACKED for name, _ in side.named_parameters()):
        return id(side)
    return _settings(side), tuple((name, p.shape, p.dtype) for name, p in side.named_parameters())


def _settings(side: SideNetwork) -> tuple[str, ...]:
    return tuple(repr(getattr(side.config, name)) for name in SHAPE)


def _address(side: SideNetwork) -> int:
    """Where a network has its weights, told by one of them."""
    return side.up.weight.data_ptr()


class SideStack:
    """G side networks of one `shape_of`, whose weights are slices of tensors `(G, ...)`.

    The parameters of the networks are these slices: nothing is stored twice, and the stack sees what an optimizer or
    `load_state_dict` writes to a network. A network that moves to another device or dtype leaves its stack. Weights are
    copied once, into the stack; a single network stays as it is.

    Attributes:
        retired: whether another stack holds the networks now, so that this one serves only the calls that have it.
    """

    def __init__(self, sides: Sequence[SideNetwork]) -> None:
        self.sides = list(sides)
        self.retired = False
        if len(sides) == 1:
            return
        own = {id(parameter): nn.Parameter(parameter.detach().to("meta")) for parameter in sides[0].parameters()}
        self._code = copy.deepcopy(sides[0], dict(own)).eval()  # a copy: `functional_call` swaps weights in and out
        self._weights: dict[int, Tensor] = {}  # by the id of the parameter of `_code`
        for parameters in zip(*(side.parameters() for side in sides)):
            stacked = torch.stack([parameter.detach() for parameter in parameters])
            for parameter, part in zip(parameters, stacked):
                parameter.data = part
            self._weights[id(own[id(parameters[0])])] = stacked
        self._addresses = [_address(side) for side in sides]

    def select(self, places: Sequence[int]) -> SideNetwork:
        """The networks at `places` as one, with operands and results `(G, B, T, ...)`; a single network as it is.

        The weights are copied, unless `places` are all networks in their order.

        Raises:
            FastpeftError: a network has changed its form since, or has other tensors for weights.
        """
        if len(places) == 1:
            return self.sides[places[0]]
        if any(_settings(self.sides[place]) != _settings(self._code) for place in places):
            raise FastpeftError(
                "a member of the pool has changed its form since it joined, as take_over does. Remove it and add it "
                "again."
            )
        # the addresses first: it is retired before they change
        if any(_address(self.sides[place]) != self._addresses[place] for place in places) and not self.retired:
            raise FastpeftError(
                "a member of the pool has other tensors for weights since it joined, as a move, a cast, "
                "load_state_dict(assign=True) or vector_to_parameters gives it. Remove it and add it again; or write "
                "to its weights, as load_state_dict does."
            )
        weights = self._weights
        if list(places) != list(range(len(self.sides))):
            index = torch.tensor(places, device=self.sides[0].up.weight.device)
            weights = {key: weight[index] for key, weight in weights.items()}
        code = self._code
        parts = (code.down, *code.projections.values(), *code.blocks, code.up)
        return copy.deepcopy(code, {id(part): StackedModule(part, weights) for part in parts})


class StackedModule(nn.Module):
    """G modules as one: the g-th slice of each operand meets the g-th module's weights.

    Args:
        code: a module of their class; its own weights are not used.
        weights: the stacked weights `(G, ...)`, by the id of the parameter of `code`.
    """

    def __init__(self, code: nn.Module, weights: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._code = code
        self._weights = {name: weights[id(p)] for name, p in code.named_parameters(remove_duplicate=False)}

    @property
    def weight(self) -> Tensor:
        """The stacked weight of linear layers."""
        return self._weights["weight"]

    def forward(self, *operands: Any) -> Tensor:
        """Each module gets its slice of tensors `(G, ...)`; other operands go to every module."""
        in_dims = (0, *(0 if isinstance(operand, Tensor) else None for operand in operands))
        with _ATTENTION, sdpa_kernel(SDPBackend.MATH):  # vmap has no fused attention on a CPU
            result: Tensor = vmap(self._call, in_dims=in_dims)(self._weights, *operands)
        return result

    def _call(self, weights: dict[str, Tensor], *operands: Any) -> Any:
        return functional_call(self._code, weights, operands)
