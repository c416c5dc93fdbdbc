"""The rule `Exact`: perturbed weights in a scratch buffer, filled when the forward reaches a module.

To add a perturbation to a weight and take it out again costs two roundings; in half precision weights drift by that.
Here a perturbation never touches the stored weights.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fastpeft.errors import FastpeftError
from fastpeft.functional import mezo_perturb_
from fastpeft.mezo.checks import check_choice
from fastpeft.mezo.estimator import Point
from fastpeft.mezo.in_place import Rule, Weights
from fastpeft.mezo.sharding import is_sharded
from fastpeft.ops.noise import ROUNDINGS
from fastpeft.support.interrupts import uninterrupted

_ALIGNMENT = 64  # bytes
_CONTAINERS = (nn.ParameterDict, nn.ParameterList)  # have no forward; the module above reads their parameters


@dataclass(frozen=True, kw_only=True)
class Exact(Rule):
    """Perturb a copy, for half precision, where each pass in place costs a rounding.

    The perturbed weights exist only in a scratch buffer of the size of the largest module, which is filled when the
    forward reaches a module (for embeddings on a CPU, with the rows looked up); the stored weights change only by the
    update. A module inside another that has trained parameters of its own needs a second buffer. Every trained
    parameter must be read in the forward of its own module. Other reads are refused by name at the first step, at each
    hundredth, and after a step with g = 0; at other steps such a read sees theta itself. A model of `torch.compile`
    runs uncompiled. `bench/mezo_drift.py` measures the drift of the other rule.

    Args:
        rounding: of the update, whose terms are added in float32: "stochastic" (unbiased, by counters of the step's
            seed) or "nearest", which loses updates smaller than half of a weight's spacing.
        max_projected_grad, on_nonfinite: as for `InPlace`.
    """

    rounding: str = "stochastic"

    restore = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("rounding", self.rounding, ROUNDINGS)

    def weights(self, model: nn.Module | None, noise: str) -> Weights:
        if model is None:
            raise FastpeftError("MeZO: the rule Exact needs the model, to show its forward other weights: pass model.")
        return ScratchWeights(model, noise, self.rounding)


class ScratchWeights(Weights):
    """Weights whose model's forward sees theta + scale * z, while theta stays as it is."""

    model: nn.Module

    def __init__(self, model: nn.Module, noise: str, rounding: str) -> None:
        super().__init__(model, noise, rounding)
        self._seed = 0
        self._scales: Mapping[Tensor, float] = {}  # of each parameter; empty: the forward sees theta
        self._scratch: list[Tensor] = []  # bytes; one buffer for each depth of nested modules
        self._borrowed: list[tuple[nn.Module, str, Tensor]] = []  # parameters that are replaced, innermost last
        self._depths: list[int] = []  # how many of these each running module has
        self._filling = False
        self._handles: list[Any] = []  # of the hooks that do all this
        self._within = ExitStack()  # what is in force from `show` to `hide`
        # for each storage the bytes (begin, end) of the trained parameters in it, and their names
        self._names: dict[int, list[tuple[int, int, str]]] = {}

    def set_groups(self, param_groups: Sequence[Mapping[str, Any]]) -> None:
        super().set_groups(param_groups)
        self._offsets = {p: at for group, offsets in self.groups() for p, at in zip(group["params"], offsets)}
        # for each module its trained parameters: the module that holds one, its name there and the parameter
        self._owned: dict[nn.Module, list[tuple[nn.Module, str, Tensor]]] = {}
        self._paths: dict[Tensor, str] = {}
        for path, module in self.model.named_modules():
            reader = module
            if isinstance(module, _CONTAINERS):
                reader = self.model.get_submodule(path.rpartition(".")[0])
            for name, param in module._parameters.items():
                if param is not None and param in self._offsets:
                    self._owned.setdefault(reader, []).append((module, name, param))
                    self._paths.setdefault(param, f"{path}.{name}".lstrip("."))
        if len(self._paths) < len(self._offsets):
            raise FastpeftError(
                "MeZO: the rule Exact got a trained parameter that is in no module of the model, so it cannot be "
                "replaced in the forward. Train parameters of the model only, or use InPlace."
            )

    @property
    def scratch_bytes(self) -> int:  # type: ignore[override]
        """Size of the scratch so far."""
        return sum(buffer.numel() for buffer in self._scratch)

    def check(self, params: Sequence[Tensor]) -> None:
        if is_sharded(params):
            raise FastpeftError(
                "MeZO: the rule Exact does not work with sharded parameters (DTensor). Use InPlace; float32 shards "
                "with mixed precision (MixedPrecisionPolicy) hardly drift."
            )

    def move(self, point: Point, drawn: Sequence[int]) -> None:
        """Let the forward see another point; the stored weights get what they are owed."""
        self._add([], drawn)
        draw, position = self.point = point
        scales = {p: position * group["eps"] for group, _ in self.groups() for p in group["params"]}
        self._seed, self._scales = drawn[draw], scales if position else {}

    def _stored(self, point: Point) -> Point:
        return point[0], 0

    @uninterrupted()
    def show(self, check: bool) -> None:
        """Let the model's forward see the point of the last `move`, until `hide`.

        No context manager made of a generator: after an interrupt its end could run late, at garbage collection.

        Args:
            check: raise `FastpeftError` where a trained parameter is read outside of its module's forward, since such a
                read sees theta.
        """
        self._names = {}
        for param, path in self._paths.items():
            if param.numel():
                self._names.setdefault(param.untyped_storage().data_ptr(), []).append((*_span(param), path))
        for module in self._owned:
            self._handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        if "torch._dynamo" in sys.modules:  # else nothing is compiled; what is compiled would run without the hooks
            self._within.enter_context(torch.compiler.set_stance("force_eager"))
        if check:
            self._within.enter_context(_Watch(self))

    @uninterrupted()
    def hide(self) -> None:
        """Take all hooks off and put each parameter back, wherever an exception ended a forward.

        Whoever reads theta until the next `move`, as the update does, is meant to.
        """
        self._within.close()
        for handle in self._handles:
            handle.remove()
        for holder, name, param in reversed(self._borrowed):
            holder._parameters[name] = param  # type: ignore[assignment]
        self._handles, self._borrowed, self._depths, self._scales = [], [], [], {}

    def refuse_bare(self, tensors: Any) -> None:
        """Raise if an argument of an op is a trained parameter itself, while the forward should see a perturbed one."""
        if self._filling or not self._scales:
            return
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_nested:
                continue  # no parameter is nested, as what torch makes of padded rows is
            if not tensor.numel():
                continue
            begin, end = _span(tensor)
            for first, last, name in self._names.get(tensor.untyped_storage().data_ptr(), ()):
                if begin < last and first < end:
                    raise FastpeftError(
                        f"MeZO: the rule Exact cannot show the perturbed {name!r} to what reads it outside of its "
                        "module's forward. Freeze the parameter, or use InPlace."
                    )

    @torch.no_grad()
    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replace a module's parameters by perturbed ones; for an embedding, return its new arguments too."""
        self._depths.append(0)
        if not self._scales:
            return None
        self._filling = True
        try:
            if _by_rows(module):
                return (self._look_up(module, *args, **kwargs),), {}
            owned = self._owned[module]
            views = self._take([(param.shape, param) for _, _, param in owned])
            for (holder, name, param), view in zip(owned, views):
                view.copy_(param)
                mezo_perturb_([view], [self._offsets[param]], [self._seed], [self._scales[param]], noise=self.noise)
                self._lend(holder, name, param, view)
            return None
        finally:
            self._filling = False

    def _look_up(self, module: nn.Embedding, input: Tensor) -> Tensor:
        """Replace the weight by the perturbed rows that `input` names; return their numbers in it."""
        weight, width = module.weight, module.embedding_dim
        rows, indices = input.unique(return_inverse=True)
        count = max(rows.numel(), (module.padding_idx or 0) + 1)  # the module needs a row of that number
        (stand_in,) = self._take([((count, width), weight)])
        looked_up = stand_in[: rows.numel()]
        looked_up.copy_(weight[rows])
        offsets = [self._offsets[weight] + row * width for row in rows.tolist()]
        mezo_perturb_(list(looked_up), offsets, [self._seed], [self._scales[weight]], noise=self.noise)
        self._lend(module, "weight", weight, stand_in)
        return indices

    def _take(self, wanted: list[tuple[tuple[int, ...], Tensor]]) -> list[Tensor]:
        """Tensors in the buffer of the present depth, each of a given shape and like another tensor."""
        sizes = [math.prod(shape) * like.element_size() for shape, like in wanted]
        starts = [0, *itertools.accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)]
        end = starts[-1]
        depth, device = len(self._depths) - 1, wanted[0][1].device
        if depth == len(self._scratch):
            self._scratch.append(torch.empty(0, dtype=torch.uint8))
        if self._scratch[depth].numel() < end or self._scratch[depth].device != device:
            self._scratch[depth] = torch.empty(0, dtype=torch.uint8)  # frees the smaller one first
            self._scratch[depth] = torch.empty(end, dtype=torch.uint8, device=device)
        buffer = self._scratch[depth]
        return [
            buffer[start : start + size].view(like.dtype).view(shape)
            for start, size, (shape, like) in zip(starts, sizes, wanted)
        ]

    def _lend(self, holder: nn.Module, name: str, param: Tensor, view: Tensor) -> None:
        self._borrowed.append((holder, name, param))  # first, so that an interrupt finds it there
        holder._parameters[name] = view  # type: ignore[assignment]  # the module reads what stands there
        self._depths[-1] += 1

    def _leave(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        """Put the parameters of the innermost module back; return its output, of which no part is in the scratch."""
        lent = self._depths.pop() if self._depths else 0
        if not lent:
            return None
        for _ in range(lent):
            holder, name, param = self._borrowed[-1]
            holder._parameters[name] = param  # type: ignore[assignment]
            self._borrowed.pop()
        # the next module would write over what lies there, as Perceiver's latents, which are expanded for each row
        buffers = {buffer.untyped_storage().data_ptr() for buffer in self._scratch}
        if not any(_lies_in(each, buffers) for each in tree_leaves(output)):
            return None
        return tree_map(lambda each: each.clone() if _lies_in(each, buffers) else each, output)


def _by_rows(module: nn.Module) -> TypeGuard[nn.Embedding]:
    """Whether only the rows that are looked up are perturbed. On a GPU, to know which would take a wait for it."""
    if type(module) is not nn.Embedding or module.max_norm is not None:
        return False
    return module.weight.device.type == "cpu"


def _lies_in(found: Any, buffers: Set[int]) -> bool:
    """Whether a tensor is in one of the storages with these addresses."""
    strided = isinstance(found, Tensor) and found.layout == torch.strided and not found.is_nested
    return strided and found.untyped_storage().data_ptr() in buffers


def _span(tensor: Tensor) -> tuple[int, int]:
    """The bytes of its storage from a tensor's first element to its last one."""
    last = sum(int(size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    begin = int(tensor.storage_offset()) * tensor.element_size()
    return begin, begin + (last + 1) * tensor.element_size()


class _Watch(TorchDispatchMode):
    """Looks at the arguments of every op."""

    def __init__(self, weights: ScratchWeights) -> None:
        super().__init__()
        self._weights = weights

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._weights.refuse_bare((args, kwargs))
        return func(*args, **(kwargs or {}))
