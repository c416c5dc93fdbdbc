"""Every bench that takes turns, by its name."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from bench.harness import Bench

BENCHES: dict[str, Bench] = {
    file.stem.removeprefix("bench_"): import_module(f"bench.{file.stem}").BENCH
    for file in sorted(Path(__file__).parent.glob("bench_*.py"))
}
