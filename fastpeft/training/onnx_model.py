"""A model of text as a graph that needs neither this library nor its ops: for `torch.export`, and for ONNX Runtime."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fastpeft.errors import FastpeftError, first_line, install
from fastpeft.ops import decompositions
from fastpeft.ops.quantise import QuantisedWeight
from fastpeft.support.eval_mode import in_eval_mode
from fastpeft.support.logs import at_least

Batch = Mapping[str, Tensor]

_LIBRARIES = ("onnx", "onnxscript", "onnxruntime")
_SHAPE = ("batch", "sequence")
_TOLERANCE = 1e-4  # of the largest output; measured on trained models of 6 layers: up to 2e-6


class _Outputs(nn.Module):
    """A model with one argument, its inputs by name, and its tensors by name as the result."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        found = self.model(**inputs, return_dict=True)
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def check_onnx() -> None:
    """Raise `FastpeftError` where a library that writes or runs ONNX is not installed."""
    if missing := [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]:
        raise FastpeftError(
            f"an export to onnx needs {' and '.join(missing)}, not installed here. Run {install('onnx')}."
        )


def trace(model: nn.Module, batch: Batch) -> ExportedProgram:
    """The graph of a model of text in evaluation mode, in PyTorch's own ops, for any number of rows and tokens.

    Ops of this library are taken apart by `fastpeft.ops.decompositions`: layers of SiVA, and side networks.

    Args:
        model: what takes `batch` by name and returns tensors by name, as transformers' models do.
        batch: inputs `(B, T)` to trace it with; B and T are at least 2.

    Returns:
        A program: `trace(model, batch).module()(other_batch)` is a dictionary with the model's outputs.

    Raises:
        FastpeftError: the model holds weights in 8 or 4 bits, or `torch.export` cannot trace it.

    Example:
        >>> program = trace(model, tokenizer(texts, padding=True, return_tensors="pt"))  # doctest: +SKIP
        >>> torch.export.save(program, "model.pt2")  # doctest: +SKIP
    """
    if held := next((module for module in model.modules() if isinstance(module, QuantisedWeight)), None):
        raise FastpeftError(
            f"the {type(model).__name__} holds weights in {held.kind}, which have no form in a graph without this "
            "library. Train without backbone_dtype or residual_dtype, or load it by PyTorch instead."
        )
    try:
        with torch.no_grad(), in_eval_mode(model.modules()):
            program = torch.export.export(
                _Outputs(model),
                (dict(batch),),
                dynamic_shapes=({name: dict.fromkeys(range(2), Dim.DYNAMIC) for name in batch},),
                strict=False,
            )
            return program.run_decompositions(decompositions())
    except Exception as error:  # what cannot be traced raises almost any type
        raise FastpeftError(
            f"the {type(model).__name__} cannot be traced by torch.export: {first_line(error)} If it has an adapter, "
            "merge it; if its base is quantised, load that without; else load the model by PyTorch."
        ) from error


def write_onnx(model: nn.Module, batches: Sequence[Batch], file: str | Path) -> float:
    """Write a model of text as an ONNX file, and compare what ONNX Runtime makes of it with PyTorch.

    The inputs and outputs of the file have the names that the model's have; rows and tokens are of any number.

    Args:
        model: as `trace` takes it, on the CPU.
        batches: the first is what it is traced with; the outputs are compared on all of them, so give several shapes.
        file: where to write.

    Returns:
        The largest difference of an output, as a share of the largest output.

    Raises:
        FastpeftError: a library is not installed, the model cannot be traced, ONNX has no form of an op, or an output
            differs by more than 1e-4.
        OSError: the file cannot be written.

    Example:
        >>> write_onnx(model, [tokenizer(texts, padding=True, return_tensors="pt")], "model.onnx")  # doctest: +SKIP
    """
    check_onnx()
    program = trace(model, batches[0])
    try:
        found = _run_onnx(_written(program, batches[0], file), batches)
    except (FastpeftError, OSError):  # the second says of the file alone
        raise
    except Exception as error:  # of two libraries
        raise FastpeftError(
            f"the {type(model).__name__} cannot become an ONNX model: {first_line(error)} Load it by PyTorch instead."
        ) from error
    differences = []
    with torch.no_grad(), in_eval_mode(model.modules()):
        for batch, outputs in zip(batches, found):
            for name, expected in _Outputs(model)(dict(batch)).items():
                largest = (torch.from_numpy(outputs[name]) - expected).abs().max()
                differences.append(largest / expected.abs().max())
    worst = torch.stack(differences).max().item()  # not a number if one is not
    if not worst <= _TOLERANCE:
        raise FastpeftError(
            f"ONNX Runtime's outputs of the {type(model).__name__} differ from PyTorch's by {worst:.1e} of the "
            f"largest, more than {_TOLERANCE}. Load it by PyTorch instead."
        )
    return worst


def _written(program: ExportedProgram, batch: Batch, file: str | Path) -> Path:
    # the optimizer of the graph prints what it skips, and two inputs that share an axis make a warning
    with at_least("torch.onnx", logging.ERROR), redirect_stdout(StringIO()), warnings.catch_warnings(action="ignore"):
        written = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            output_names=list(program.call_spec.out_spec.context),
            input_names=list(batch),
            dynamic_shapes=({name: dict(enumerate(_SHAPE)) for name in batch},),
        )
    assert written is not None  # with dynamo
    written.save(file)
    return Path(file)


def _run_onnx(file: Path, batches: Sequence[Batch]) -> list[dict[str, Any]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_outputs()]
    inputs = [each.name for each in session.get_inputs()]
    return [dict(zip(names, session.run(names, {name: batch[name].numpy() for name in inputs}))) for batch in batches]
