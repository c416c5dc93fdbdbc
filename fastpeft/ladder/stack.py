"""Side networks of one shape, computed as one network with a dimension more."""

from __future__ import annotations

import copy
import threading
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastpeft.ladder.config import SHAPE
from fastpeft.ladder.side import SideNetwork

_STACKED = ("down", "projections", "blocks", "up")  # the parts of a side network that are computed for all at once
# which attention PyTorch takes is a setting of the whole process: one at a time sets it and sets it back
_ATTENTION = threading.Lock()


def shape_of(side: SideNetwork) -> Hashable:
    """What two side networks must have in common to be stacked; equal to itself alone where one cannot be."""
    if any(name.partition(".")[0] not in _STACKED for name, _ in side.named_parameters()):
        return id(side)
    settings = tuple(repr(getattr(side.config, name)) for name in SHAPE)
    return settings, tuple((name, p.shape, p.dtype) for name, p in side.named_parameters())


class SideStack:
    """G side networks of one `shape_of`, each weight of theirs a slice of one tensor `(G, ...)`.

    The slices are their parameters' own memory: nothing is held twice, and what an optimizer or `load_state_dict`
    writes to a network is seen here. Moving a network to another device or dtype parts it from its stack.

    Args:
        sides: the networks; their weights are copied once, to where they lie together. One alone stays where it is.
    """

    def __init__(self, sides: Sequence[SideNetwork]) -> None:
        self.sides = list(sides)
        if len(sides) == 1:
            return
        own = {id(parameter): nn.Parameter(parameter.detach().to("meta")) for parameter in sides[0].parameters()}
        self._code = copy.deepcopy(sides[0], dict(own)).eval()  # weights come and go in it, which no thread must see
        self._weights: dict[int, Tensor] = {}  # by the id of the parameter of `_code`
        for parameters in zip(*(side.parameters() for side in sides)):
            stacked = torch.stack([parameter.detach() for parameter in parameters])
            for parameter, part in zip(parameters, stacked):
                parameter.data = part
            self._weights[id(own[id(parameters[0])])] = stacked

    def select(self, places: Sequence[int]) -> SideNetwork:
        """The networks at `places` as one, whose operands and results are `(G, B, T, ...)`; a single one as it is.

        Weights are copied for some of the networks, and not for all in their order.
        """
        if len(places) == 1:
            return self.sides[places[0]]
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
        code: a module like them, whose own weights are not used.
        weights: the stacked weights `(G, ...)`, by the id of the parameter of `code`.
    """

    def __init__(self, code: nn.Module, weights: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._code = code
        self._weights = {name: weights[id(p)] for name, p in code.named_parameters(remove_duplicate=False)}

    @property
    def weight(self) -> Tensor:
        """Of linear layers."""
        return self._weights["weight"]

    def forward(self, *operands: Any) -> Tensor:
        """Tensors `(G, ...)` are taken apart, anything else goes to every module."""
        in_dims = (0, *(0 if isinstance(operand, Tensor) else None for operand in operands))
        with _ATTENTION, sdpa_kernel(SDPBackend.MATH):  # fused attention cannot be stacked on a CPU
            result: Tensor = vmap(self._call, in_dims=in_dims)(self._weights, *operands)
        return result

    def _call(self, weights: dict[str, Tensor], *operands: Any) -> Any:
        return functional_call(self._code, weights, operands)
