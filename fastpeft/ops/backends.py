"""What each op runs on, and why: the only file that imports kernels and compiled modules.

At import exactly one implementation is registered per op and device, the first available in the order C++ or CUDA,
Triton, fused ATen calls, reference; it stays for the life of the process. Where it is Triton and the op has an ATen
form on the device, each call takes the faster of both (`fastpeft.ops.dispatch`).

`FASTPEFT_BACKEND="op=name,op=name"` overrides the order (names: `cpp`, `cuda`, `triton`, `aten`, `reference`). Where it
asks for what is not available, the package still imports, so that the command line can say so, but every op raises the
`FastpeftError`.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastpeft.errors import FastpeftError
from fastpeft.ops.define import NAMESPACE, OPS
from fastpeft.ops.dispatch import choosing
from fastpeft.support.environment import best_device

logger = logging.getLogger(__name__)

VARIABLE = "FASTPEFT_BACKEND"

# (op, device) -> backends that implement it, best first. The reference covers every op on every device.
IMPLEMENTED: dict[tuple[str, str], tuple[str, ...]] = {
    ("siva_linear", "cpu"): ("cpp", "aten"),
    ("siva_linear", "cuda"): ("triton", "aten"),
    ("siva_linear_backward", "cpu"): ("cpp", "aten"),
    ("siva_linear_backward", "cuda"): ("triton", "aten"),
    ("window_attention", "cpu"): ("cpp", "aten"),
    ("window_attention", "cuda"): ("triton", "aten"),
    ("window_attention_backward", "cpu"): ("cpp", "aten"),
    ("window_attention_backward", "cuda"): ("triton", "aten"),
    ("feature_dropout_", "cpu"): ("cpp",),
    ("int8_linear", "cpu"): ("cpp", "aten"),
    ("quantised_linear", "cpu"): ("cpp", "aten"),
    ("quantised_linear_backward", "cpu"): ("cpp", "aten"),
    ("side_step_", "cpu"): ("cpp", "aten"),
    ("frozen_head_cross_entropy", "cpu"): ("aten",),
    ("frozen_head_cross_entropy", "cuda"): ("triton", "aten"),
    ("mezo_perturb_", "cpu"): ("cpp",),
    ("mezo_perturb_", "cuda"): ("cuda", "triton"),
    ("mezo_perturb", "cpu"): ("cpp",),
    ("mezo_perturb", "cuda"): ("cuda", "triton"),
}

# launchers of the Triton backend, each named as its op: op -> module of fastpeft.kernels
_TRITON_LAUNCHERS = {
    "siva_linear": "siva_linear",
    "siva_linear_backward": "siva_linear_backward",
    "window_attention": "window_attention",
    "window_attention_backward": "window_attention_backward",
    "frozen_head_cross_entropy": "frozen_head_cross_entropy",
    "mezo_perturb_": "mezo_perturb",
    "mezo_perturb": "mezo_perturb",
}

# backends that are compiled modules: loading one registers its implementations of all its ops
_COMPILED = {"cpp": "fastpeft._C", "cuda": "fastpeft._C_cuda"}
_NAMES = (*_COMPILED, "triton", "aten", "reference")


@dataclass(frozen=True)
class Choice:
    """The implementation of one op on one device, and why it is this one."""

    op: str
    device: str
    backend: str
    reason: str


@functools.cache
def _why_not(backend: str) -> str:
    """Why a backend cannot run here, or ''; asked of a compiled module, it loads it, which registers its ops."""
    module = {**_COMPILED, "triton": "triton"}.get(backend)
    if backend in ("cuda", "triton") and not torch.cuda.is_available():
        return "no CUDA device"
    try:
        if module:
            importlib.import_module(module)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            return f"{module} was not built" if backend in _COMPILED else f"{module} is not installed"
        return f"{module} cannot be loaded ({error})"
    if backend == "triton":
        try:  # it builds its driver when first asked for it, else at the first launch
            _ = importlib.import_module("triton.runtime").driver.active
        except Exception as error:  # of many kinds: no compiler, a compiler's failure, no libcuda
            return f"triton cannot start, for which it needs a C compiler and the headers of Python: {error}"
    return ""


def _overrides(text: str) -> dict[str, str]:
    """Parse `op=name,op=name`."""
    chosen = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        op, _, name = item.partition("=")
        if op not in OPS or name not in _NAMES:
            raise FastpeftError(
                f"{VARIABLE} has {item!r}; allowed are OP=NAME with OP one of {', '.join(OPS)} and NAME one of "
                f"{', '.join(_NAMES)}. Correct or unset the variable."
            )
        backends = {backend for key, found in IMPLEMENTED.items() if key[0] == op for backend in found} | {"reference"}
        if name not in backends:
            raise FastpeftError(
                f"{VARIABLE} asks for {op}={name}, but {op} runs on "
                f"{', '.join(sorted(backends))} only. Name one of these."
            )
        chosen[op] = name
    return chosen


def _choose(op: str, device: str, wanted: str | None, why_not: Callable[[str], str]) -> Choice:
    """`wanted` where it implements `op` on `device`, else the first available backend."""
    candidates = IMPLEMENTED.get((op, device), ())
    if wanted == "reference":
        return Choice(op, device, "reference", f"asked for by {VARIABLE}")
    if wanted in candidates:
        if reason := why_not(wanted):
            raise FastpeftError(f"{VARIABLE} asks for {op}={wanted}, but {reason}. Install it or unset the variable.")
        return Choice(op, device, wanted, f"asked for by {VARIABLE}")
    missing: list[str] = []
    for name in candidates:
        reason = why_not(name)
        if not reason:
            return Choice(op, device, name, "; ".join(missing) or "available")
        missing.append(f"{name} is unavailable ({reason})")
    return Choice(op, device, "reference", "; ".join(missing) or "the only implementation")


def _register(library: torch.library.Library, choice: Choice, is_asked_for: bool) -> None:
    """Register `choice` on the dispatcher, over the reference that every device starts with."""
    op = OPS[choice.op]
    if choice.backend == "triton":
        forms = gpu_forms(choice.op)
        is_chosen = "aten" in forms and not is_asked_for
        library.impl(choice.op, choosing(op, forms) if is_chosen else forms["triton"], choice.device.upper())
    elif choice.backend == "aten" and op.aten is not None:
        for key in _keys(choice.device):
            library.impl(choice.op, op.aten, key)
    elif choice.backend == "cpp" and op.aten is not None:
        # what the compiled module calls for the dtypes and ranks that it leaves to ATen
        library.define(f"{choice.op}_aten{op.schema.partition('->')[0]}-> Tensor[]")
        for key in _keys(choice.device):
            library.impl(f"{choice.op}_aten", _flat(op.aten), key)
    elif choice.backend == "reference" and _COMPILED.keys() & IMPLEMENTED.get((choice.op, choice.device), ()):
        # a compiled module may have been loaded for another op; put the reference back over this one
        for key in _keys(choice.device):
            library.impl(choice.op, op.reference, key)


def gpu_forms(op: str) -> dict[str, Callable[..., Any]]:
    """What computes an op on a GPU: "triton", its launcher, and "aten" where there is that form for GPUs."""
    module: ModuleType = importlib.import_module(f"fastpeft.kernels.{_TRITON_LAUNCHERS[op]}")
    launcher, aten = getattr(module, op), OPS[op].aten
    forms = {"triton": launcher}
    if aten is not None and "aten" in IMPLEMENTED[op, "cuda"]:
        forms["aten"] = aten
    return forms


def _keys(device: str) -> tuple[str, ...]:
    """The dispatcher's names for a device: on a CPU, a call with a packed weight has one of its own."""
    return ("CPU", "MkldnnCPU") if device == "cpu" else (device.upper(),)


def _flat(implementation: Callable[..., Any]) -> Callable[..., list[Tensor]]:
    """`implementation` with its results, tensors and lists of tensors, in one list."""

    def call(*arguments: Any) -> list[Tensor]:
        found = implementation(*arguments)
        found = [found] if isinstance(found, Tensor) else found
        return [tensor for each in found for tensor in (each if isinstance(each, list) else [each])]

    return call


def _activate() -> tuple[torch.library.Library, list[Choice], FastpeftError | None]:
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    try:
        wanted = _overrides(os.environ.get(VARIABLE, ""))
        found = [_choose(op, device, wanted.get(op), _why_not) for op in OPS for device in ("cpu", "cuda")]
    except FastpeftError as error:
        for name in OPS:
            library.impl(name, partial(_raise, error), "CompositeExplicitAutograd")
        return library, [], error
    for op in OPS.values():
        library.impl(op.name, op.reference, "CompositeExplicitAutograd")
    for choice in found:
        _register(library, choice, choice.op in wanted)
    return library, found, None


def _raise(fault: FastpeftError, *_: Any) -> None:
    raise fault


_library, _choices, _fault = _activate()  # the Library object must live: its registrations end with it


@functools.cache
def warn_if_not_compiled() -> None:
    """Warn, once in a process, where a CPU computes and its compiled operations are not there: pip hides why."""
    if best_device() == "cpu" and (reason := _why_not("cpp")):
        logger.warning(
            "%s, so runs are slower; install fastpeft as its README says, where there is a C++ compiler", reason
        )


def choices() -> list[Choice]:
    """The implementation of every op on CPU and CUDA devices, with the reason.

    Raises:
        FastpeftError: the environment variable asks for what is not available.
    """
    if _fault is not None:
        raise _fault
    return list(_choices)
