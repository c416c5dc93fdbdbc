"""The noise work of MeZO over a model's parameters, against what its reference implementation does.

`python -m bench.bench_mezo_perturb` writes `bench/data/mezo_perturb.csv`, over a RoBERTa's shapes, whose weights no
cache holds:

- one pass: the reference's loop (`p.data = p.data + torch.normal(...) * eps`), the same with `add_` in place, `mul_`
  over the same memory, and the op with either noise; on a CPU each compiled variant;
- a step: the loop's four passes against the two passes of a deferred step, which draws its noise three times.

Memory traffic is 8 bytes an element in float32, which a core moves at 6 G elements a second. Rademacher noise, with a
32nd of the words and no functions, is bound by memory; Gaussian noise by arithmetic, in half precision too, where
conversions come on top. With AVX2 it is 246 instructions for 64 elements of float32: 90 for Philox, 28 for halves and
their numbers, 40 for x, 24 to mix, 24 to put in order and 40 for the pass; on a card 25 an element.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from bench.harness import Bench, Candidates, Run, ready_made
from fastpeft import functional

EPS, LR = 1e-3, 1e-6
VOCABULARY = 50265
MODELS = {"base": (12, 768), "large": (24, 1024)}  # layers, features
VARIANTS = ("avx512", "avx2", "baseline")  # of the compiled op on x86-64


@dataclass(frozen=True)
class Case:
    """Parameters of a RoBERTa's shapes, and how many threads pass over them."""

    model: str
    dtype: str
    pass_threads: int
    work: str = "one pass"

    def params(self, device: torch.device) -> list[Tensor]:
        """Random weights, matrices and vectors as the model has them."""
        layers, d = MODELS[self.model]
        layer = [(d, d), (d,)] * 4 + [(4 * d, d), (4 * d,), (d, 4 * d), (d,)] + [(d,)] * 4
        shapes = [(VOCABULARY, d), (514, d), (1, d), (d,), (d,), *(layer * layers)]
        dtype = getattr(torch, self.dtype)
        return [torch.empty(shape, device=device).normal_(0, 0.02).to(dtype) for shape in shapes]


# scales of the reference's passes; seeds and scales of ours: restore, update and perturb anew, then to the other side
LOOPS = {"one pass": (EPS,), "a step": (EPS, -2 * EPS, EPS, -LR)}
PASSES = {"one pass": (((1,), (EPS,)),), "a step": (((1, 2), (EPS - LR, EPS)), ((2,), (-2 * EPS,)))}


def cases(device: torch.device) -> Iterator[Case]:
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    for model, dtype, work in itertools.product(MODELS, ("float32", "bfloat16", "float16"), LOOPS):
        yield Case(model, dtype, threads, work)


def candidates(case: Case, device: torch.device) -> Candidates:
    """Each way to do a case's work on the same tensors; what ratios are taken to first."""
    torch.set_num_threads(case.pass_threads)
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

    def op(noise: str, rounding: str = "nearest") -> Run:
        def run() -> None:
            for seeds, scales in PASSES[case.work]:
                functional.mezo_perturb_(params, offsets, list(seeds), list(scales), noise=noise, rounding=rounding)

        return run

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
    return ready_made({"loop": loop, "loop in place": loop_in_place, "mul_": scale, **ours})


def _with(variant: str, run: Run) -> Run:
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


BENCH = Bench(__doc__, "mezo_perturb.csv", cases, candidates, rounds=5)

if __name__ == "__main__":
    BENCH.main()
