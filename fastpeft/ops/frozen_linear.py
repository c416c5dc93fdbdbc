"""Linear layers that know that they never train: their weight is packed once, and `pack_frozen` tells them.

`h = x W^T + b` and `dx = dh W`, each by the pack of W or of its transpose, see `fastpeft.ops.frozen_weight`. Where no
pack is to be had (another device or dtype, under `torch.compile`) it is the plain product, or that of float32 copies
where the processor is slow at half precision.
"""

from __future__ import annotations

import weakref
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized
from transformers.pytorch_utils import Conv1D

from fastpeft.errors import FastpeftError
from fastpeft.ops.define import asks_for_gradients, is_transformed
from fastpeft.ops.dtypes import compute_dtype
from fastpeft.ops.frozen_weight import Dense
from fastpeft.ops.int8_linear import can_multiply_int8, multiply
from fastpeft.ops.packing import Packs, is_token, packed_linear, version_of

Computation = Literal["int8"]
Stamp = tuple[int, int, int]


class Packed:
    """What `pack_frozen` makes of a linear layer, by a change of its class: everything else stays as it is.

    Attributes:
        packs: of the weight `(N, K)`.
        computation: "int8" to multiply in int8 where no gradient is asked for; None for the dtype of x.
        keeps_weight: False if the pack takes the place of the weight once the layer has run without gradients. The
            parameter is then the pack, which counts as ever and cannot be read; the attribute `weight` brings the
            values back.
    """

    packs: Packs
    computation: Computation | None
    keeps_weight: bool
    original: type[nn.Linear | Conv1D]
    _values: tuple[Stamp | None, Stamp]  # the stamp of what holds the values now (None: the pack), and their first one
    _parameters: dict[str, nn.Parameter | None]
    bias: Any

    @property
    def weight(self) -> Any:
        """The parameter, with its values.

        A caller may write through `weight.data`. On a GPU we cannot detect that, so the pack is dropped.
        """
        weight = self._own_weight()
        if weight.is_cuda:
            self.packs.drop()
        return weight

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self.__dict__["weight"] = value

    @weight.deleter
    def weight(self) -> None:
        del self.__dict__["weight"]

    def _own_weight(self) -> Any:
        weight = self._parameters.get("weight")
        if weight is None:  # FSDP1 takes the parameter away and sets a view of its own
            if "weight" not in self.__dict__:  # a parametrisation asks whether it is gone
                raise AttributeError(f"{type(self).__name__} has no weight")
            return self.__dict__["weight"]
        if weight.is_mkldnn:
            self.packs.drop()  # who reads the values may change them
            matrix = weight.detach().to_dense()
            weight = nn.Parameter(self._of_matrix(matrix).contiguous(), requires_grad=False)
            self._parameters["weight"] = weight
            self._values = _stamp(weight), self._values[1]
        return weight

    def stamp(self) -> Stamp:
        """A cheap value that changes with the weight's values, but not when the pack takes their place."""
        stored = self._parameters["weight"]
        assert stored is not None
        now = None if stored.is_mkldnn else _stamp(stored)
        return self._values[1] if now == self._values[0] else now or self._values[1]

    def forward(self, x: Tensor) -> Tensor:
        stored = self._parameters.get("weight")
        if is_transformed() or (stored is None and is_parametrized(self, "weight")):  # type: ignore[arg-type]
            return self.original.forward(self, x)  # type: ignore[arg-type]
        if stored is not None and self.computation is None and is_token(x, stored):
            return F.linear(x, self._of_matrix(stored), self.bias)
        trains = asks_for_gradients(x, self.bias)
        if stored is not None and stored.is_mkldnn and not trains and x.dtype == compute_dtype(x, x) == stored.dtype:
            return packed_linear(x, stored.data, self.bias)
        del stored
        weight = self._own_weight()
        # a fake weight that a pack would replace stands for as many bytes by itself
        replaced = isinstance(weight, FakeTensor) and not self.keeps_weight
        if weight.requires_grad or replaced or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self.original.forward(self, x)  # type: ignore[arg-type]
        matrix = self._of_matrix(weight)
        if self.computation == "int8" and not trains and can_multiply_int8(x):
            return multiply(x, *self.packs.codes(matrix), self.bias)
        h = Dense(matrix, self.packs).product(x, self.bias)
        if not (self.keeps_weight or trains) and self.packs.nbytes:
            del weight, matrix
            self._let_go()
        return h

    def _let_go(self) -> None:
        """Put the pack in the place of the weight. A weight that someone else holds stays: they could write to it."""
        weight = self._parameters["weight"]
        assert weight is not None
        packed = self.packs.of(self._of_matrix(weight), weight.dtype)
        if packed is None:
            return
        stamp, holders = self.stamp(), weakref.ref(weight)
        del weight
        self._parameters["weight"] = None
        held = holders()
        if held is None:
            self._parameters["weight"], self._values = nn.Parameter(packed, requires_grad=False), (None, stamp)
            self.packs.drop()
        else:
            self._parameters["weight"] = held

    def _of_matrix(self, weight: Tensor) -> Tensor:
        """From the layer's layout to `(N, K)` or back."""
        return weight.t() if self.original is Conv1D else weight

    def _save_to_state_dict(self, *arguments: Any) -> None:
        _ = self.weight  # bring the values back
        self.original._save_to_state_dict(self, *arguments)  # type: ignore[arg-type]

    def _load_from_state_dict(self, *arguments: Any) -> None:
        _ = self.weight
        self.original._load_from_state_dict(self, *arguments)  # type: ignore[arg-type]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        _ = self.weight
        return self.original._apply(self, fn, recurse)  # type: ignore[arg-type]

    def __getstate__(self) -> dict[str, Any]:
        _ = self.weight
        return self.__dict__.copy()


def _stamp(weight: nn.Parameter) -> Stamp:
    return id(weight), weight.data_ptr(), version_of(weight)


class PackedLinear(Packed, nn.Linear):
    """An `nn.Linear` that `pack_frozen` has packed."""

    original = nn.Linear


class PackedConv1D(Packed, Conv1D):
    """A `Conv1D` of transformers that `pack_frozen` has packed."""

    original = Conv1D


_PACKED: dict[type[nn.Module], type[Any]] = {nn.Linear: PackedLinear, Conv1D: PackedConv1D}

Model = TypeVar("Model", bound=nn.Module)


def pack_layer(layer: nn.Module, computation: Computation | None = None, keeps_weight: bool = True) -> bool:
    """Pack one layer, see `pack_frozen`; False if it is no linear layer or its weight trains."""
    kind = _PACKED.get(type(layer))
    weight = layer._parameters.get("weight")
    if kind is None or weight is None or weight.requires_grad:
        return False
    stamp = _stamp(weight)
    layer.__dict__.update(packs=Packs(), computation=computation, keeps_weight=keeps_weight, _values=(stamp, stamp))
    layer.__class__ = kind
    return True


def set_packing(model: nn.Module, enabled: bool = True) -> int:
    """Pack all frozen linear layers of a model, or none; those that pack by themselves, as SiVA's, follow.

    Unlike `pack_frozen` it takes a model without any.

    Returns:
        The number of layers whose class changed.
    """
    if not enabled:
        unpack_frozen(model)
    changed = sum(pack_layer(module) for module in model.modules()) if enabled else 0
    for module in model.modules():
        if isinstance(packs := getattr(module, "packs", None), Packs):
            packs.enabled = enabled
    return changed


def pack_frozen(model: Model, computation: Computation | None = None) -> Model:
    """Let the frozen linear layers of a model compute with a weight that is packed once.

    Args:
        model: any module, such as one that PEFT has wrapped. Each `nn.Linear` or transformers' `Conv1D` in it whose
            weight does not require a gradient changes its class, in place: parameters, names and hooks stay. A weight
            that is made to train later computes as before.
        computation: "int8" multiplies 8-bit codes of weights (by output) and activations (by row, at run time) where no
            gradient is asked for, which is for inference, in layers of at most 65793 in_features; None keeps the dtype
            of the model, or of autocast.

    Returns:
        The model.

    Raises:
        FastpeftError: no linear layer is frozen, or `computation` is another word.

    Notes:
        Packs are made at first use and take as many bytes as the weight, twice that where gradients pass through. They
        are not saved, copied or moved. A weight that changes is packed again; a change of a few entries through
        `weight.data` alone may go unnoticed: call `unpack_frozen` before one. On a GPU the only pack is the copy that
        autocast would make at each call.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).requires_grad_(False)
        >>> pack_frozen(model)(torch.randn(3, 8)).shape
        torch.Size([3, 2])
    """
    if computation not in (None, "int8"):
        raise FastpeftError(f"pack_frozen: `computation` is {computation!r}; allowed are 'int8' and None.")
    unpack_frozen(model)
    packed = [pack_layer(module, computation) for module in model.modules()]
    if not any(packed):
        raise FastpeftError(
            f"pack_frozen: the {type(model).__name__} has no frozen linear layer. Call requires_grad_(False) on what "
            "does not train first."
        )
    return model


def bring_back(model: nn.Module) -> None:
    """Let each layer hold its weight again where a pack has taken its place: before parameters are read or shared."""
    for module in model.modules():
        if isinstance(module, Packed):
            _ = module.weight


def unpack_frozen(model: Model) -> Model:
    """Undo `pack_frozen`: each layer has its class again, and its packs are gone."""
    for module in model.modules():
        if isinstance(module, Packed) and not is_parametrized(module, "weight"):  # that has a class of its own
            _ = module.weight
            module.__class__ = module.original  # type: ignore[assignment]
            for name in ("packs", "computation", "keeps_weight", "_values"):
                del module.__dict__[name]
    return model
