"""Layers that read the same x as one group: the first of them computes the outputs of all.

Query, key and value of an attention are three layers with one input. A `SharedInput` is a pair of hooks on the module
that holds them. While that module runs, the layer that is called first computes `siva_linear_group` for all, and each
of the others takes its output. It does so only for the same tensor object at the same version, in the same modes of
autograd and autocast; otherwise it computes for itself. If layers turn out to read different tensors, as the query of a
cross-attention does, they leave the group.

The layers hold none of this state. Open groups are kept per thread, and only while the module runs. So copies, replicas
and pickles need no care, and a layer that is called by itself always computes for itself.
"""

from __future__ import annotations

import re
import threading
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.ops.dtypes import autocast_dtype
from fastpeft.ops.frozen_weight import Dense, FrozenWeight
from fastpeft.ops.siva_linear import siva_products
from fastpeft.siva.base import AdaptedLayer
from fastpeft.siva.decompose import Factors

# Names of the query, key and value projections, architecture by architecture.
ATTENTION = (
    ("query", "key", "value"),  # BERT, RoBERTa, XLM-R, ELECTRA, ViT
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
    ("query_proj", "key_proj", "value_proj"),  # DeBERTa-v2
    ("q_proj", "k_proj", "v_proj"),  # Llama, Mistral, Qwen, OPT, BART
    ("q", "k", "v"),  # T5
)
# Names of layers of one module that read the same x: those, and the gated feed-forward of Llama and T5.
SAME_INPUT = (*ATTENTION, ("gate_proj", "up_proj"), ("wi_0", "wi_1"))
_CROSS_ATTENTION = re.compile(r"cross|encdec|encoder_attn", re.IGNORECASE)  # whose query reads another sequence
_ATTRIBUTE = "_siva_shared_input"


def arrange(model: nn.Module) -> None:
    """Group the adapted layers in `model`, in place of the groups that were there."""
    part(model)
    for path, module in model.named_modules():
        groups = []
        for names in SAME_INPUT:
            alike = names[1:] if len(names) == 3 and _CROSS_ATTENTION.search(path) else names
            found = tuple(name for name in alike if isinstance(module._modules.get(name), AdaptedLayer))
            if len(found) > 1:
                groups.append(found)
        if groups:
            setattr(module, _ATTRIBUTE, SharedInput(module, groups))


def part(model: nn.Module) -> None:
    """Take the groups in `model` apart: every layer computes for itself again."""
    for module in model.modules():
        shared = module.__dict__.pop(_ATTRIBUTE, None)
        if shared is not None:
            shared.remove()


def take(layer: AdaptedLayer, x: Tensor) -> Tensor | None:
    """The output of `layer` for x from its group, if it is in one that is open; None: it must compute for itself."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # a graph must not depend on what was open
        return None
    group = _open.groups.get(layer)
    return None if group is None else group.take(layer, x)


class SharedInput:
    """The hooks of a module whose children in each of `groups`, by name, are expected to read the same x."""

    def __init__(self, module: nn.Module, groups: list[tuple[str, ...]]) -> None:
        self.groups = groups
        self._strangers: set[str] = set()  # children that turned out to read another tensor than their group
        self._again = 0  # runs that a checkpoint may repeat in backward
        self._handles = [
            module.register_forward_pre_hook(self._enter),
            module.register_forward_hook(self._leave, always_call=True),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, module: nn.Module, _args: Any) -> None:
        """Open the groups for one run of the module, which may be a replica of the one the hooks were put on."""
        if torch.compiler.is_compiling():
            return
        # a checkpointed block that runs again, which is within backward, must save the same tensors as before
        if torch._C._current_graph_task_id() != -1:
            self._again = max(0, self._again - 1)
        else:
            if self._strangers and not self._again:
                self._regroup()
            self._again += _saving_hooks() is not None
        for names in self.groups:
            layers = [layer for _, layer in self._layers(module, names)]
            group = _Group(layers)
            _open.groups.update((layer, group) for layer in layers)

    def _leave(self, module: nn.Module, _args: Any, output: Any) -> None:
        """Close the groups. No output means that an exception ended the run, so that unread outputs mean nothing."""
        if torch.compiler.is_compiling():
            return
        for names in self.groups:
            for name, layer in self._layers(module, names):
                group = _open.groups.pop(layer, None)
                if group is not None and output is not None and group.computed_in_vain(layer):
                    self._strangers.add(name)

    def _layers(self, module: nn.Module, names: tuple[str, ...]) -> list[tuple[str, AdaptedLayer]]:
        """The children of that name which are still adapted layers."""
        children = ((name, module._modules.get(name)) for name in names)
        return [(name, child) for name, child in children if isinstance(child, AdaptedLayer)]

    def _regroup(self) -> None:
        """Part each group into the layers that took their output and those that did not."""
        strangers, self._strangers = self._strangers, set()
        halves = [
            tuple(name for name in names if (name in strangers) is strange)
            for names in self.groups
            for strange in (False, True)
        ]
        self.groups = [names for names in halves if len(names) > 1]


class _Group:
    """The layers of one group during one run: once the first has computed, the outputs that the others may take."""

    def __init__(self, layers: list[AdaptedLayer]) -> None:
        self._layers = layers
        self._hooks = _saving_hooks()
        self._computed = False  # at most once a run: what is called again reads something else
        self._x: Tensor | None = None
        self._state: tuple[object, ...] = ()
        self._outputs: dict[AdaptedLayer, Tensor] = {}
        self._refused: set[AdaptedLayer] = set()

    def take(self, layer: AdaptedLayer, x: Tensor) -> Tensor | None:
        if x.is_inference():
            return None  # it has no version by which a change in place could be seen
        if _saving_hooks() != self._hooks:
            return None  # a checkpoint within the module, which backward repeats without the group
        if not self._computed:
            self._compute(layer, x)
        output = self._outputs.pop(layer, None)
        if output is not None and not (x is self._x and _state(x) == self._state):
            self._refused.add(layer)
            output = None
        if not self._outputs:
            self._x = None
        return output

    def computed_in_vain(self, layer: AdaptedLayer) -> bool:
        """Whether the output of `layer` was there and not taken."""
        return layer in self._outputs or layer in self._refused

    def _compute(self, layer: AdaptedLayer, x: Tensor) -> None:
        """The outputs of all layers that can be computed together with `layer`, if there are any others."""
        # first: an adapter that is filled only now may bring a quantised residual
        acting = {member: factors for member in self._layers if (factors := _acting(member)) is not None}
        if layer not in acting or x.shape[-1:] != (layer.in_features,):
            return
        weight = layer.frozen
        members = {member: factors for member, factors in acting.items() if _alike(member.frozen, weight)}
        if len(members) < 2:
            return
        us, ss, vs = zip(*members.values(), strict=True)
        weights, biases = [member.frozen for member in members], [member.base_layer.bias for member in members]
        outputs = siva_products(x, layer.compute_dtype(x), weights, us, ss, vs, biases)
        self._outputs = dict(zip(members, outputs, strict=True))
        self._x, self._state, self._computed = x, _state(x), True


class _Open(threading.local):
    def __init__(self) -> None:
        self.groups: dict[AdaptedLayer, _Group] = {}


_open = _Open()  # the groups of the modules that this thread is running


def _acting(layer: AdaptedLayer) -> Factors | None:
    """What `layer` would add to its weight; None if its call does not, or more than that.

    A hook before its forward, or a function in place of its forward, may change x or load the layer's weights only then
    (sharding, offloading).
    """
    return None if layer._forward_pre_hooks or "forward" in layer.__dict__ else layer.acting()


def _alike(weight: FrozenWeight, other: FrozenWeight) -> bool:
    if not (isinstance(weight, Dense) and isinstance(other, Dense)):
        return False
    (one, _), (two, _) = weight, other
    return one.dtype is two.dtype and one.device == two.device and one.shape[1] == two.shape[1]


def _saving_hooks() -> Any:
    """What packs the tensors that are saved for backward, as a checkpoint's; None if nothing."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def _state(x: Tensor) -> tuple[object, ...]:
    """What must not have changed between computing an output and taking it."""
    return x._version, torch.is_grad_enabled(), autocast_dtype(x.device)
