"""Where a training step with SiVA spends its time, beside its limit and LoRA's: `python -m bench.siva_profile`.

Milliseconds of a step of the bundled model by kind of operation, and how often a step calls it, by PyTorch's profiler
(which itself adds about a microsecond a call): `bench/data/siva_profile.csv`. Times are of an operation without those
that it calls. A layer of SiVA is one of them, with its products with the frozen weight: to be compared with the limit's
"matrix products". "between operations" is the rest of the step: Python, autograd's own work and waiting.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from bench.bench_training import CASE, adapters
from bench.harness import DATA, Row, machine, put_row

FILE = DATA / "siva_profile.csv"
STEPS = 20
CANDIDATES = ("siva", "limit", "lora")
KINDS = {  # what an operation's name holds, by what it is for; the first that fits decides
    "optimizer": ("_fused_adamw", "zero_grad"),
    "layers of SiVA": ("fastpeft", "SivaLinear"),
    "matrix products": ("aten::addmm", "aten::mm", "aten::bmm", "mkldnn::_linear_pointwise"),
    "attention": ("attention",),
    "norms, activations, dropout": ("layer_norm", "gelu", "dropout", "bernoulli", "tanh", "softmax"),
    "sums, products, copies": ("aten::add", "aten::mul", "aten::copy_", "aten::fill_", "aten::sum", "aten::zero_"),
}
OTHERS, BETWEEN = "others", "between operations"


def kind_of(operation: str) -> str:
    """What an operation is for."""
    return next((kind for kind, parts in KINDS.items() if any(part in operation for part in parts)), OTHERS)


def spent(step: Callable[[], object], steps: int) -> dict[str, tuple[float, float]]:
    """Milliseconds and calls of one step, by kind."""
    for _ in range(3):
        step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        whole = 1e3 * (time.perf_counter() - begin) / steps
    sums = {kind: [0.0, 0] for kind in (*KINDS, OTHERS)}
    for event in recorded.key_averages():
        if "::" in event.key or kind_of(event.key) != OTHERS:
            total = sums[kind_of(event.key)]
            total[0] += event.self_cpu_time_total / 1e3
            total[1] += event.count
    result = {kind: (ms / steps, calls / steps) for kind, (ms, calls) in sums.items()}
    result[BETWEEN] = (whole - sum(ms for ms, _ in result.values()), 0)
    return result


def main() -> None:
    cpu = torch.device("cpu")
    for targets in ("query, key", "all linear"):
        steps = adapters(targets, cpu, names=CANDIDATES)
        for name, step in steps.items():
            for kind, (ms, calls) in spent(step, STEPS).items():
                row: Row = {**CASE, "targets": targets, "candidate": name, "kind": kind, **machine(cpu)}
                figures = {"ms": f"{ms:.3f}", "calls": f"{calls:g}"}
                put_row(FILE, {**row, **figures}, key=(*CASE, "targets", "candidate", "kind", "card"))


if __name__ == "__main__":
    main()
