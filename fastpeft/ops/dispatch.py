"""Which form of an op runs on a GPU: its Triton kernel or ATen's calls, whichever was the faster at the first call.

A question is an op, the dtype, a class of shapes (rows to the next power of two) and an architecture. A run keeps its
answers, and the tiles that `triton.autotune` found for its kernels, so that a resumed one computes the same bits; of
several processes those of the first.
Nothing is timed where only deterministic algorithms are allowed, nor while a CUDA graph is captured: warm up with the
shapes that it will have.

Some choices are fixed. SiVA's products of fewer than 16 rows, of which a tile is mostly padding, go to ATen, as those
in float32 always do. Window attention with dropout goes to Triton, for elsewhere many operations of PyTorch draw it,
and so does the loss of a frozen head, whose forms share their products.
"""

from __future__ import annotations

import ast
import math
import re
import threading
from collections.abc import Callable, Hashable, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

from fastpeft.ops.define import Op, is_captured
from fastpeft.ops.dtypes import HALVES
from fastpeft.ops.packing import num_rows

_FEWEST_ROWS = 16  # that fill a tile
_CPU = torch.device("cpu")
_CLEARLY = 0.97  # of Triton's time: what takes more does not replace it

tuners: dict[str, Any] = {}  # the autotuned kernels, by name
_answers: dict[tuple[Hashable, ...], str] = {}  # question -> form
_kept: dict[str, str] = {}  # the same of a run that goes on, with questions in words
_timing = threading.Lock()


def choosing(op: Op, forms: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """What to register for `op` on a GPU: at each call the faster of its `forms`, "triton" and "aten".

    Args:
        op: of SiVA, window attention, or the loss of a frozen head.
    """
    names = _names(op)

    def call(*arguments: Any) -> Any:
        named = dict(zip(names, arguments, strict=False))  # a default is not passed on
        of = (_of_window if "q" in named else _of_head if "hidden" in named else _of_siva)(named)
        if not of.is_open or torch.are_deterministic_algorithms_enabled():
            return forms[of.predicted](*arguments)
        question = op.name, *of.question, "on", architecture(of.device)
        form = _answers.get(question)
        if form is None and is_captured():
            form = _kept.get(_in_words(question), "aten")  # Triton's may have to time its tiles
        elif form is None:
            with _timing:  # replicas of `nn.DataParallel` are threads
                form = _answers.get(question) or _kept.get(_in_words(question))
                form = form or _faster({name: partial(forms[name], *arguments) for name in forms}, of.device)
                _answers[question] = form
        return forms[form](*arguments)

    return call


def _in_words(question: tuple[Hashable, ...]) -> str:
    return " ".join(str(part).removeprefix("torch.") for part in question)


def _names(op: Op) -> list[str]:
    """The names of its arguments."""
    return re.findall(r"(\w+)(?:=[^,)]+)?[,)]", op.schema.partition("->")[0])


def _faster(calls: Mapping[str, Callable[[], object]], device: torch.device) -> str:
    """The form that takes less time; one that fails, as for want of memory, is not taken, unless both do."""
    times: dict[str, float] = {}
    with torch.no_grad(), torch.autocast(device.type, enabled=False), _disable_current_modes():
        for name, call in calls.items():
            try:
                times[name] = milliseconds(call)
            except Exception:  # Triton's are no RuntimeError
                if len(calls) == 1:
                    raise
                return _faster({other: calls[other] for other in calls if other != name}, device)
    return "aten" if times.get("aten", math.inf) < _CLEARLY * times.get("triton", math.inf) else "triton"


def milliseconds(call: Callable[[], object]) -> float:
    """The median time that a GPU takes for a call."""
    from triton.testing import do_bench  # a CPU imports no Triton

    call()  # which compiles and tunes
    return float(do_bench(call, warmup=5, rep=25, return_mode="median"))


def chosen() -> dict[str, dict[str, str]]:
    """What was timed here, for a run to keep: by question the form, and by kernel and sizes the tile."""
    forms = {**_kept, **{_in_words(question): form for question, form in _answers.items()}}
    arch = current_architecture()
    tiles = {
        f"{kernel} {arch} {key}": str(config) for kernel, tuner in tuners.items() for key, config in tuner.cache.items()
    }
    return {name: found for name, found in (("forms", forms), ("tiles", tiles)) if found}


def take_over(kept: Mapping[str, Mapping[str, str]]) -> None:
    """Answer as the run did that `chosen` was kept of."""
    _answers.clear()
    _kept.clear()
    _kept.update(kept.get("forms", {}))
    for tuner in tuners.values():
        tuner.cache.clear()
    for asked, tile in kept.get("tiles", {}).items():
        kernel, arch, key = asked.split(" ", 2)
        configs = {str(config): config for config in tuners[kernel].configs} if kernel in tuners else {}
        if tile in configs and arch == current_architecture():  # else it is of what is not here, and timed anew
            tuners[kernel].cache[ast.literal_eval(key)] = configs[tile]


class _Call(NamedTuple):
    """Of a call: the class of its shapes, in words, the predicted form, and whether the other may be faster."""

    question: tuple[Hashable, ...]
    predicted: str
    is_open: bool
    device: torch.device


def _of_siva(named: Mapping[str, Any]) -> _Call:
    x, ss = named["dhs"][0] if "dhs" in named else named["x"], named["ss"]
    rows = num_rows(x)
    sizes = (f"{u.shape[0]}x{v.shape[1]}" for u, v, _ in zip(named["us"], named["vs"], named["weights"], strict=False))
    adapters = ("adapters", len(ss)) if named.get("sizes") else ()
    quantised = ("quantised",) if any(each is not None for each in named["scales"]) else ()
    needs = (name for name, value in named.items() if name.startswith("need_") and (value is True or any(value or ())))
    rank = next_power_of_two(max(map(len, ss)), 16)
    is_few = rows < _FEWEST_ROWS
    size = "few" if is_few else next_power_of_two(rows)
    question = x.dtype, *sizes, *quantised, "rank", rank, "rows", size, *adapters, *needs
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


def current_architecture() -> str:
    """That of the GPU which kernels are launched on now."""
    return architecture(torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else _CPU)
