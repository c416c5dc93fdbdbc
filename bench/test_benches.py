"""`pytest bench --benchmark-enable --benchmark-only` times the smallest case of every bench, and prints one table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench.benches import BENCHES
from bench.harness import columns_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", BENCHES)
def test_bench(benchmark: Any, name: str, timings: list[list[str]], tmp_path: Path) -> None:
    bench = BENCHES[name]
    case = next(iter(bench.cases(CPU)))
    rounds = 5 if benchmark.enabled else 1
    given = bench, case, CPU, rounds, None, tmp_path / bench.file
    rows = benchmark.pedantic(type(bench).measure, given)
    of = f"{name}: {' '.join(columns_of(case).values())}"
    timings += [[of, row["candidate"], row["ms_p50"], row["ratio_p50"]] for row in rows]
