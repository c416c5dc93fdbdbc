"""A weight whose values are computed only when they are used."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastpeft.errors import FastpeftError

_IN_PLACE = re.compile(r"__(i(add|sub|mul|truediv)|setitem)__|[a-z]\w*_")  # as mul_
_KNOWN = (
    *(getattr(Tensor, name).__get__ for name in ("dtype", "device", "shape", "ndim", "layout")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point),
)
_DATA: Any = Tensor.data


class LazyWeight(Tensor):
    """A tensor with a dtype, a device and a shape, whose values are computed at each use.

    Modules read a layer's weight for two reasons. T5 asks for its dtype before each call of the layer.
    `nn.MultiheadAttention` multiplies by it and never calls the layer.

    Args:
        compute: makes the values.
        like: has the dtype and the device.
        shape: the shape.
    """

    _compute: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, compute: Callable[[], Tensor], like: Tensor, shape: tuple[int, ...]) -> LazyWeight:
        blank = like.detach().new_full((1,) * len(shape), float("nan"))  # a use that skips __torch_function__ shows
        weight = blank.expand(shape).as_subclass(cls)
        weight._compute = compute
        return weight

    def __init__(self, *_: Any) -> None:
        pass

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _KNOWN:
            return super().__torch_function__(function, types, args, kwargs)
        if function == _DATA.__get__:  # what changes it in place means the weight
            whole = args[0]
            return LazyWeight(lambda: whole._compute().data, whole, whole.shape)
        name = getattr(function, "__name__", "")
        if isinstance(next(iter(args), None), LazyWeight) and (_IN_PLACE.fullmatch(name) or function == _DATA.__set__):
            raise FastpeftError(
                f"{name} would change the weight of a SiVA layer in place, but that is computed at each "
                "use from what is trained and what is frozen. Leave the layer out of target_modules, or merge the "
                "adapter first."
            )
        args, kwargs = tree_map_only(LazyWeight, lambda weight: weight._compute(), (args, kwargs or {}))
        return function(*args, **kwargs)
