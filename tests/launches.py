"""What a computation would launch on a card, recorded on a CPU as a CUDA graph records it."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from fastpeft.kernels import mezo_perturb
from fastpeft.ops.backends import _TRITON_LAUNCHERS

_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view", "alias"}
_HOST = {"_local_scalar_dense", "equal", "is_nonzero", "item", "nonzero", "masked_select"}  # wait for the device


class Recording(TorchDispatchMode):
    """Records each op of PyTorch that computes and each Triton kernel, with its operands where they lie.

    Ops of the library that have a Triton form run by its launcher. What asks the device for a value is an error.

    Attributes:
        counted: how often each was launched, by name. Views and memory are free.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()
        self._calls: list[Callable[[], None]] = []
        self._depth = 0

    def __enter__(self) -> Any:
        if self._depth == 0:
            self._kind: Any = type(mezo_perturb._mezo_perturb_kernel)  # compiled or interpreted
            self._run = self._kind.run
            self._kind.run = lambda *args, **kwargs: self._launch(*args, **kwargs)
        self._depth += 1
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._depth -= 1
        if self._depth == 0:
            self._kind.run = self._run

    @torch.no_grad()
    def replay(self) -> None:
        """Compute all of it again, from what the tensors hold now, into the tensors that held the results."""
        for call in self._calls:
            call()

    def _launch(self, kernel: Any, *args: Any, **kwargs: Any) -> Any:
        run = self._run
        # by default Triton 3.9 fuses additions into products and warns of that, and later versions do not fuse
        assert "enable_fp_fusion" in kwargs, kernel.fn.__name__

        def again() -> Any:
            with _disable_current_modes():  # the interpreter computes by ops too
                return run(kernel, *args, **kwargs)

        self.counted[kernel.fn.__name__] += 1
        self._calls.append(again)
        return again()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        namespace, name = func.name().partition(".")[0].split("::")
        if namespace == "fastpeft" and name in _TRITON_LAUNCHERS:
            module = importlib.import_module(f"fastpeft.kernels.{_TRITON_LAUNCHERS[name]}")
            with self:
                return getattr(module, name)(*args, **kwargs)
        assert name not in _HOST, f"{func.name()} waits for the device"
        found = func(*args, **kwargs)
        if not (func.is_view or name in _FREE):
            made = tree_leaves(found)

            def again() -> None:
                for old, new in zip(made, tree_leaves(func(*args, **kwargs))):
                    if isinstance(old, Tensor):
                        old.copy_(new)

            self.counted[name] += 1
            self._calls.append(again)
        return found
