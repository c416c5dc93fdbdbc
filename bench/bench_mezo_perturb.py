"""The noise work of MeZO over a model's parameters, against what its reference implementation does.

`python -m bench.bench_mezo_perturb` times side by side, over a RoBERTa's shapes, whose weights no cache holds, into
`bench/data/mezo_perturb.csv`:

- one pass: the reference's loop (`p.data = p.data + torch.normal(...) * eps`), the same with `add_` in place, `mul_`
  over the same memory, and the op with either noise; on a CPU each compiled variant;
- a step: the loop's four passes against the two passes of a deferred step, which draws its noise three times;
- threads: the op's pass on one thread and on more.

Memory traffic is 8 bytes an element in float32, which a core moves at 6 G elements a second. Rademacher noise, with a
32nd of the words and no functions, is bound by memory; Gaussian noise by arithmetic, in half precision too, where
conversions come on top.

Before, that was Box-Muller from ten rounds of Philox: counted 548 instructions with AVX2 for 64 elements of
float32, with AVX-512 300, and on a card 72 to 89 an element (of the path that `bench.static` counts). Predicted of bent
halves, mixed eight at a time, from seven rounds: with AVX2 90 for Philox, 28 for halves and their numbers, 40 for x, 24
to mix, 24 to put in order and 40 for the pass, 246 instructions and 2.2 times the speed; on a card 25 an element.
Measured on a processor with AVX2 alone, both compiled in one process, 2^16 elements in cache, one thread, the ratio of
the fastest of 61 turns: float32 2.58, bfloat16 2.30, float16 2.29, with stochastic rounding 1.75 and 1.47, without
instructions beyond SSE2 2.81, 2.15 and 1.62; Rademacher 1.10 and less. From memory float32 2.4, bfloat16 2.0. On a card
26 to 34 instructions. With AVX-512, from memory, one thread, old and new in two processes that take turns: float32 1.7,
and 2.3 (2.2 to 2.4) since weights are fetched ahead (predicted: 2.6, if all waiting went), bfloat16 2.0 and 2.2; 355 M
weights in float32 2.35. Philox took two registers of counters at a time, which spilled once its seven rounds were
unrolled: one at a time gained a sixth.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from bench.harness import DATA, Candidates, columns_of, measure, timing_parser
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
    parser = timing_parser(__doc__, ROUNDS)
    parser.add_argument("--model", choices=MODELS, default="large")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--work", nargs="+", choices=WORKS, default=WORKS)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, torch.get_num_threads()])
    arguments = parser.parse_args()
    threads = sorted(set(arguments.threads)) if arguments.device.type == "cpu" else [1]
    for dtype, work, count in itertools.product(arguments.dtype, arguments.work, threads):
        if work == "threads" and count == 1:
            continue
        torch.set_num_threads(count)
        case = Case(arguments.model, *MODELS[arguments.model], dtype, count, work)
        measure(FILE, columns_of(case), candidates(case, arguments.device), arguments.device, arguments.rounds)


if __name__ == "__main__":
    main()
