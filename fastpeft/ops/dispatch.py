"""Which form of an op runs on a GPU: its Triton kernel, by the way that a model of costs picks, or ATen's calls.

A question is an op, the dtype, a class of shapes (rows to the next power of two) and an architecture. It is answered by
what a run has kept; else by the times of this GPU that the package brings (`fastpeft/ops/tuned`, made by
`python -m bench.tune`) or that were taken here before; else by timing both at the first call. Only the package's times
have each way of a kernel. Nothing is timed while a CUDA graph is captured: warm up with the shapes that it will have.

Some choices are fixed: nothing times them at a call, so only times in a file override them. SiVA's products of fewer
than 16 rows, of which a tile is mostly padding, go to ATen, as those in float32 always do. Window attention with
dropout goes to Triton, for elsewhere many operations of PyTorch draw it, and so does the loss of a frozen head, whose
forms share their products.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import torch

from fastpeft.ops.autotune import Candidates, Timings, is_captured, timings
from fastpeft.ops.define import Op
from fastpeft.ops.dtypes import HALVES
from fastpeft.ops.packing import num_rows

_FEWEST_ROWS = 16  # that fill a tile


def choosing(
    op: Op, forms: Mapping[str, Callable[..., Any]], timings: Timings = timings, times_all: bool = False
) -> Callable[..., Any]:
    """What to register for `op` on a GPU: at each call the fastest of its `forms`.

    Args:
        op: of SiVA, window attention, or the loss of a frozen head.
        forms: by name, among them "triton" and "aten".
        timings: what keeps the times.
        times_all: time all forms, and those too whose answer is predicted; else these two.
    """
    names = _names(op)

    def call(*arguments: Any) -> Any:
        named = dict(zip(names, arguments, strict=True))
        of = (_of_window if "q" in named else _of_head if "hidden" in named else _of_siva)(named)

        def candidates() -> Candidates:
            return {each: partial(forms[each], *arguments) for each in (forms if times_all else ("triton", "aten"))}

        is_timed = (times_all or of.is_open) and not is_captured()
        question = op.name, *of.question, "on", architecture(of.device)
        form = timings.answer(question, of.predicted, candidates if is_timed else None, of.device)
        return forms.get(form, forms[of.predicted])(*arguments)

    return call


def _names(op: Op) -> list[str]:
    """The names of its arguments."""
    return re.findall(r"(\w+)[,)]", op.schema.partition("->")[0])


class _Call(NamedTuple):
    """Of a call: the class of its shapes, in words, the predicted form, and whether the other may be faster."""

    question: tuple[Hashable, ...]
    predicted: str
    is_open: bool
    device: torch.device


def _of_siva(named: Mapping[str, Any]) -> _Call:
    x = named["dhs"][0] if "dhs" in named else named["dh"] if "dh" in named else named["x"]
    weights = named.get("weights") or [named["weight"]]
    ss = named.get("ss") or [named["s"]]
    rows = num_rows(x)
    sizes = (f"{n}x{k}" for n, k in (weight.shape for weight in weights))
    adapters = ("adapters", len(ss)) if "sizes" in named else ()
    none = False, [False] * len(ss)
    needs = (name for name, value in named.items() if name.startswith("need_") and value not in none)
    rank = next_power_of_two(max(map(len, ss)), 16)
    is_few = rows < _FEWEST_ROWS
    question = x.dtype, *sizes, "rank", rank, "rows", "few" if is_few else next_power_of_two(rows), *adapters, *needs
    is_open = x.dtype in HALVES and not is_few
    return _Call(question, "triton" if is_open else "aten", is_open, x.device)


def _of_window(named: Mapping[str, Any]) -> _Call:
    q, slots = named["q"], named["c"].shape[1]
    batch, heads, tokens, width = q.shape
    flags = {"mask": named["mask"] is not None, "causal": named["causal"], "dropout": named["dropout"] > 0}
    words = (word for word, is_set in flags.items() if is_set)
    sizes = "batch", next_power_of_two(batch), "heads", heads, "slots", slots
    question = q.dtype, *sizes, "tokens", next_power_of_two(tokens), "width", width, *words
    return _Call(question, "triton", q.numel() > 0 and not flags["dropout"], q.device)


def _of_head(named: Mapping[str, Any]) -> _Call:
    hidden, (words, width) = named["hidden"], named["weight"].shape
    tokens = next_power_of_two(num_rows(hidden))
    question = hidden.dtype, f"{words}x{width}", "tokens", tokens, *(("dhidden",) if named["need_dhidden"] else ())
    return _Call(question, "triton", False, hidden.device)


def next_power_of_two(size: int, least: int = 1) -> int:
    return max(least, 1 << (size - 1).bit_length())


@cache
def architecture(device: torch.device) -> str:
    """The architecture of a GPU, as "sm_90" or "gfx942"; the type of any other device."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"
