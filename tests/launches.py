"""Kernels that a computation would launch on a card, counted on a CPU."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fastpeft.kernels import mezo_perturb
from fastpeft.ops.backends import _TRITON_LAUNCHERS

_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view", "alias"}


@contextmanager
def launches() -> Iterator[Counter[str]]:
    """Counts by name the ops of PyTorch that compute and the Triton kernels; views and memory are free.

    Ops of the library that have a Triton form run by it.
    """
    counted: Counter[str] = Counter()
    kind: Any = type(mezo_perturb._mezo_perturb_kernel)  # compiled or interpreted
    run = kind.run

    def counting(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        counted[kernel.fn.__name__] += 1
        with _disable_current_modes():  # the interpreter computes by ops too
            return run(kernel, *args, **kwargs)

    kind.run = counting
    try:
        with _Counting(counted):
            yield counted
    finally:
        kind.run = run


class _Counting(TorchDispatchMode):
    def __init__(self, counted: Counter[str]) -> None:
        super().__init__()
        self._counted = counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func.name().partition(".")[0].split("::")
        if namespace == "fastpeft" and name in _TRITON_LAUNCHERS:
            module, launcher = _TRITON_LAUNCHERS[name]
            with self:
                return getattr(importlib.import_module(f"fastpeft.kernels.{module}"), launcher)(*args, **(kwargs or {}))
        if not (func.is_view or name in _FREE):
            self._counted[name] += 1
        return func(*args, **(kwargs or {}))
