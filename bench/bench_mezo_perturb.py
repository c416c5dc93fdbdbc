"""The noise work of MeZO over a model's parameters, against what its reference implementation does.

`python -m bench.bench_mezo_perturb` times side by side, over a RoBERTa's shapes, whose weights no cache holds, into
`bench/data/mezo_perturb.csv`:

- one pass: the reference's loop (`p.data = p.data + torch.normal(...) * eps`), the same with `add_` in place, `mul_`
  over the same memory, and the op with either noise; on a CPU each compiled variant;
- a step: the loop's four passes against the two passes of a deferred step, which draws its noise three times;
- threads: the op's pass on one thread and on more.

Predicted before measuring, for the Gaussian pass with AVX-512: about 300 vector instructions for 64 elements (half of
them Philox's), at two a cycle and 4 GHz 1.7 G elements a second and thread. Memory traffic is 8 bytes an element in
float32, which a core moves at 6 G elements a second. So the pass is bound by arithmetic, in half precision too, where
conversions come on top; Rademacher, with a 32nd of the words and no functions, is bound by memory.

With AVX2, 345 counted instructions for 32 elements at four a cycle are 86 cycles; 144 were measured, in cache at
4.2 GHz. Predicted of 274 instructions (what counters share computed once, fewer conversions and shuffles): 115 cycles.
Measured: 132, and none gained with AVX-512: so operations wait for each other, not for a place. A round of Philox is a
chain of 7 cycles, 9 where the compiler reorders its exclusive ors. Two registers of Philox and four of the functions at
a time: 114 cycles.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from bench.harness import DATA, Candidates, measure
from fastpeft import functional

FILE = DATA / "mezo_perturb.csv"
EPS, LR = 1e-3, 1e-6
VOCABULARY = 50265
MODELS = {"base": (12, 768), "large": (24, 1024)}  # layers, features
VARIANTS = ("avx512", "avx2", "baseline")  # of the compiled op on x86-64
ROUNDS = 5


@dataclass(frozen=True)
class Case:
    """Parameters of a RoBERTa's shapes, and how many threads pass over them."""

    model: str
    layers: int
    features: int
    dtype: str
    pass_threads: int
    work: str = "one pass"

    def __str__(self) -> str:
        return f"{self.model}-{self.dtype}-{self.pass_threads}"

    def params(self, device: torch.device) -> list[Tensor]:
        """Random weights, matrices and vectors as the model has them."""
        d = self.features
        layer = [(d, d), (d,)] * 4 + [(4 * d, d), (4 * d,), (d, 4 * d), (d,)] + [(d,)] * 4
        shapes = [(VOCABULARY, d), (514, d), (1, d), (d,), (d,), *(layer * self.layers)]
        dtype = getattr(torch, self.dtype)
        return [torch.empty(shape, device=device).normal_(0, 0.02).to(dtype) for shape in shapes]


# scales of the reference's passes; seeds and scales of ours: restore, update and perturb anew, then to the other side
LOOPS = {"one pass": (EPS,), "a step": (EPS, -2 * EPS, EPS, -LR)}
PASSES = {"one pass": (((1,), (EPS,)),), "a step": (((1, 2), (EPS - LR, EPS)), ((2,), (-2 * EPS,)))}
WORKS = (*LOOPS, "threads")


def candidates(case: Case, device: torch.device) -> Candidates:
    """Each way to do a case's work on the same tensors, ready to run; what ratios are taken to first."""
    params = case.params(device)
    offsets = [0]
    for param in params[:-1]:
        offsets.append(offsets[-1] + param.numel())

    def normal(param: Tensor) -> Tensor:
        return torch.normal(0, 1, size=param.shape, device=device, dtype=param.dtype)

    def loop() -> None:
        for scale in LOOPS[case.work]:
            for param in params:
                param.data = param.data + normal(param) * scale

    def loop_in_place() -> None:
        for scale in LOOPS[case.work]:
            for param in params:
                param.add_(normal(param), alpha=scale)

    def scale() -> None:
        for _ in PASSES[case.work]:
            for param in params:
                param.mul_(1.0)

    def op(noise: str, rounding: str = "nearest", work: str = case.work) -> Callable[[], None]:
        def run() -> None:
            for seeds, scales in PASSES[work]:
                functional.mezo_perturb_(params, offsets, list(seeds), list(scales), noise=noise, rounding=rounding)

        return run

    if case.work == "threads":
        counts = (1, case.pass_threads)
        return {f"gaussian on {n}": _on_threads(n, op("gaussian", work="one pass")) for n in counts}
    ours = {"gaussian": op("gaussian"), "rademacher": op("rademacher")}
    if params[0].element_size() == 2:
        ours["gaussian, stochastic rounding"] = op("gaussian", "stochastic")
    if device.type == "cpu":
        ours = {
            f"{name} {variant}": _with(variant, run)
            for variant in VARIANTS
            if _is_supported(variant)
            for name, run in ours.items()
        }
    return {"loop": loop, "loop in place": loop_in_place, "mul_": scale, **ours}


def _on_threads(count: int, run: Callable[[], None]) -> Callable[[], None]:
    def run_on_threads() -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        run()
        torch.set_num_threads(before)

    return run_on_threads


def _with(variant: str, run: Callable[[], None]) -> Callable[[], None]:
    def run_variant() -> None:
        with mock.patch.dict(os.environ, FASTPEFT_SIMD=variant):
            run()

    return run_variant


def _is_supported(variant: str) -> bool:
    try:
        _with(variant, lambda: torch.ops.fastpeft.mezo_perturb_([torch.ones(1)], [0], [], [], 0.0))()
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("name", ["loop", "gaussian avx2", "rademacher avx2"])
def test_mezo_perturb(benchmark: Any, name: str) -> None:
    case = Case("demo", 6, 384, "float32", torch.get_num_threads())
    run = candidates(case, torch.device("cpu")).get(name)
    if run is None:
        pytest.skip("this processor has no AVX2")
    benchmark.group = str(case)
    benchmark(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--model", choices=MODELS, default="large")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--work", nargs="+", choices=WORKS, default=WORKS)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, torch.get_num_threads()])
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    threads = sorted(set(arguments.threads)) if device.type == "cpu" else [1]
    for dtype, work, count in itertools.product(arguments.dtype, arguments.work, threads):
        if work == "threads" and count == 1:
            continue
        torch.set_num_threads(count)
        case = Case(arguments.model, *MODELS[arguments.model], dtype, count, work)
        measure(FILE, {k: str(v) for k, v in asdict(case).items()}, candidates(case, device), device, ROUNDS)


if __name__ == "__main__":
    main()
