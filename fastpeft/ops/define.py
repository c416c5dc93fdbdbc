"""How an op is declared: its schema and the forms of it that need nothing but PyTorch, each written once.

What is faster is registered in `fastpeft.ops.backends` (Triton, fused ATen calls) or by the compiled modules (C++,
CUDA), never in an op's file, so that any of it may be absent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad

from fastpeft.errors import FastpeftError

NAMESPACE = "fastpeft"


@dataclass(frozen=True)
class Op:
    """One op of the library.

    Attributes:
        name: as in `torch.ops.fastpeft`.
        schema: its arguments and results, in the language of `torch.library`.
        reference: the op in plain PyTorch. It is the oracle of the tests, the fallback where nothing faster runs, and
            the baseline of the benches.
        aten: the op in as few fused ATen calls as possible, with no temporary of the output's size; autograd records
            none. If the reference already is that, pass it again only when a compiled module falls back to it for some
            dtypes; otherwise None.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    aten: Callable[..., Any] | None = None


OPS: dict[str, Op] = {}


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """Each op that changes nothing in place, with the form in plain PyTorch that stands for it in an exported graph.

    Returns:
        A table for `torch.export.ExportedProgram.run_decompositions`: what runs without this library has none of its
        ops.

    Example:
        >>> program = torch.export.export(model, (), inputs, strict=False)  # doctest: +SKIP
        >>> program = program.run_decompositions(decompositions())  # doctest: +SKIP
    """
    named = {name: op for name, op in OPS.items() if not name.endswith("_")}
    return {getattr(torch.ops.fastpeft, name).default: op.reference for name, op in named.items()}


def define(
    name: str,
    schema: str,
    *,
    shapes: Callable[..., Any],
    reference: Callable[..., Any],
    aten: Callable[..., Any] | None = None,
) -> None:
    """Declare an op with its schema and its forms; `shapes` makes results of the right shapes and dtypes, unfilled."""
    torch.library.define(f"{NAMESPACE}::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"{NAMESPACE}::{name}", shapes)
    # ATen calls may write in place; a formula of the op's own differentiates it
    OPS[name] = Op(name, schema, reference, aten and torch.no_grad()(aten))


def is_forward() -> bool:
    """Whether derivatives are taken forward, as by `torch.func.jvp`: an op of ours would drop them in silence."""
    return forward_ad._current_level >= 0


def is_transformed() -> bool:
    """Whether derivatives are taken forward, or a transform of `torch.func` is at work: PyTorch then differentiates."""
    return torch._C._are_functorch_transforms_active() or is_forward()


def is_differentiated() -> bool:
    """Whether derivatives are taken forward, or by a transform of `torch.func`; `vmap` alone takes none.

    `torch.compile` cannot look at the transforms.
    """
    levels = () if torch.compiler.is_compiling() else get_interpreter_stack() or ()
    return is_forward() or any(level.key() == TransformType.Grad for level in levels)


def is_captured() -> bool:
    """Whether what a GPU is told now goes into a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def asks_for_gradients(x: Tensor, bias: Tensor | None) -> bool:
    """Whether a product with a frozen weight is to pass gradients on: to x, or to a bias that trains."""
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


def check_first_derivative(op: str) -> None:
    """Refuse `create_graph` in the backward of what has no graph of its own: its terms would be missing in silence."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise FastpeftError(
            f"{op} has no second derivative: it computes the first one alone. Leave create_graph out, or differentiate "
            "a model without it."
        )
