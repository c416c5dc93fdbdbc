"""How the singular triplets that SiVA starts from are best computed: time and error of several ways.

`python -m bench.siva_init` fills `bench/data/siva_init.csv`. The weights are the bundled model's, trained; normal
random ones, whose leading singular values lie as close as they come; and ones of chosen decay at the sizes of larger
models. Errors are against the singular value decomposition in float64: of the singular values (relative), of the
subspace (sine of the largest angle), and of the residual W_r (its spectral norm over the best possible one, less 1).
`python -m bench.siva_init --models` times whole models of RoBERTa-large's shapes, and the linear layers of one block
of Llama-3.2-1B's, of which it has 16: exactly, by power iterations, and for a rest in 4 bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import fastpeft
from bench.harness import DATA, interleave, machine, option_parser, percentiles, put_row
from fastpeft.siva.decompose import decompose
from fastpeft.siva.quantise import decompose_quantised

FILE = DATA / "siva_init.csv"
ROUNDS = 3
ERRORS = ("error_s", "error_subspace", "excess_residual")
Triplets = tuple[Tensor, Tensor, Tensor]


def decaying(n: int, k: int, power: float) -> Tensor:
    """A weight with the singular values `i ** -power`."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(size, k, generator=generator).double()).Q for size in (n, k))
    return ((u * torch.arange(1, k + 1).double() ** -power) @ v.t()).float()


def weights() -> Iterator[tuple[str, Tensor]]:
    trained = load_file(Path(fastpeft.__file__).parent / "demo" / "model.safetensors")
    for layer in (0, 3):
        for part in ("attention.self.query", "attention.self.key", "output.dense"):
            yield f"demo {layer} {part}", trained[f"roberta.encoder.layer.{layer}.{part}.weight"].float()
    for n, k in ((1024, 1024), (4096, 1024)):
        yield "random", torch.randn(n, k, generator=torch.Generator().manual_seed(0))
        yield "decay 0.1", decaying(n, k, 0.1)


def gram(weight: Tensor, r: int) -> Triplets:
    """All eigenvectors of the Gram matrix in float64."""
    tall = (weight if len(weight) >= weight.shape[1] else weight.t()).double()
    values, vectors = torch.linalg.eigh(tall.t() @ tall)
    s, v = values[-r:].flip(0).sqrt(), vectors[:, -r:].flip(1)
    u = tall @ v / s
    return (u, s, v.t()) if tall.shape == weight.shape else (v, s, u.t())


def power_iterations(iterations: int) -> Callable[[Tensor, int], Triplets]:
    """The randomised decomposition as torch has it, which PEFT's `pissa_niter_...` uses."""

    def run(weight: Tensor, r: int) -> Triplets:
        u, s, v = torch.svd_lowrank(weight, q=2 * r + 8, niter=iterations)
        return u[:, :r], s[:r], v[:, :r].t()

    return run


def full(dtype: torch.dtype) -> Callable[[Tensor, int], Triplets]:
    def run(weight: Tensor, r: int) -> Triplets:
        u, s, vh = torch.linalg.svd(weight.to(dtype), full_matrices=False)
        return u[:, :r], s[:r], vh[:r]

    return run


WAYS: dict[str, Callable[[Tensor, int], Triplets]] = {
    "fastpeft": lambda weight, r: tuple(decompose(weight, r).factors),
    "svd float32": full(torch.float32),
    "svd float64": full(torch.float64),
    "eigh of gram float64": gram,
    **{f"randomised q={q}": power_iterations(q) for q in (1, 2, 3, 4)},
}


def errors(weight: Tensor, found: Triplets, true: Triplets, next_value: float) -> dict[str, float]:
    u, s, v = (part.double() for part in found)
    angle = torch.linalg.matrix_norm(v.t() - true[2].t() @ (true[2] @ v.t()), 2)
    residual = torch.linalg.matrix_norm(weight.double() - (u * s) @ v, 2)
    found_errors = ((s - true[1]) / true[1]).abs().max(), angle, residual / next_value - 1
    return {name: float(value) for name, value in zip(ERRORS, found_errors)}


def compare(r: int) -> None:
    for name, weight in weights():
        u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
        case = {"weight": name, "n": str(len(weight)), "k": str(weight.shape[1]), "r": str(r)}
        ready = {way: partial(run, weight, r) for way, run in WAYS.items()}
        seconds = interleave(ready, weight.device, ROUNDS)
        for way, run in ready.items():
            found = errors(weight, run(), (u[:, :r], s[:r], v[:r]), float(s[r]))
            figures = {key: f"{value:.2g}" for key, value in found.items()}
            times = percentiles("ms", [1e3 * t for t in seconds[way]])
            row = {**case, "candidate": way, **machine(weight.device), "gap": f"{1 - s[r] / s[r - 1]:.2g}"}
            put_row(FILE, row | figures | times, key=(*case, "candidate", "card", "threads"))


def models(r: int) -> None:
    """Whole models, and a block of a larger one: every weight is decomposed once, each of its own seed."""
    square, wide, tall = (1024, 1024), (1024, 4096), (4096, 1024)
    ways = {"fastpeft": decompose, "svd_niter=4": partial(decompose, niter=4)}
    of_decoder = ways | {"nf4-double": partial(decompose_quantised, kind="nf4-double")}
    block = [(2048, 2048)] * 2 + [(512, 2048)] * 2 + [(8192, 2048)] * 2 + [(2048, 8192)]
    for name, shapes, run_by in (
        ("large q+k", [square] * 48, ways),
        ("large all", ([square] * 4 + [tall, wide]) * 24, ways),
        ("block of 1B, all", block, of_decoder),
    ):
        for kind in ("decay 0.1", "random"):
            generator, seconds = torch.Generator().manual_seed(0), dict.fromkeys(run_by, 0.0)
            base = {shape: decaying(max(shape), min(shape), 0.1) for shape in set(shapes)}
            for n, k in shapes:
                weight = torch.randn(n, k, generator=generator)
                if kind != "random":
                    weight = (base[n, k] if n >= k else base[n, k].t()) + 1e-4 * weight
                for way, run in run_by.items():
                    begin = time.perf_counter()
                    run(weight, r)
                    seconds[way] += time.perf_counter() - begin
            for way, taken in seconds.items():
                row = {"weight": f"{name}, {kind}", "n": "", "k": "", "r": str(r), "candidate": way}
                row |= machine(torch.device("cpu")) | dict.fromkeys(("gap", *ERRORS), "")
                row |= dict.fromkeys(("ms_p20", "ms_p50", "ms_p80"), f"{1e3 * taken:.4g}")
                put_row(FILE, row, key=("weight", "r", "candidate", "card", "threads"))


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("--models", action="store_true", help="time whole models of RoBERTa-large's shapes")
    parser.add_argument("--rank", type=int, default=4)
    given = parser.parse_args()
    (models if given.models else compare)(given.rank)


if __name__ == "__main__":
    main()
