"""Timing of alternatives side by side, and the one writer of the tables in `bench/data`.

Candidates run interleaved in one process, each once per round in a rotating order, so that a machine that slows down
slows all of them; a ratio is taken within each round and its median reported.

On a card the rows lie in `bench/data/gpu`, three for each candidate. "eager" has the launches in it, as whoever calls
PyTorch gets them; "graph" is the replay of a CUDA graph, which has none; "cold" is eager after the second-level cache
was overwritten. Rows of the same sources are not measured again.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch

from bench.timers import WARM_UP, captured, elapsed, elapsed_cold, keep_freed_memory, peak_mb
from fastpeft.support.environment import versions
from fastpeft.support.files import write_csv
from fastpeft.support.processor import cpu_name

DATA = Path(__file__).parent / "data"
CARDS = DATA / "gpu"
ROUNDS = 21
SHORTEST_SAMPLE_S = 1e-3  # a candidate faster than this is repeated within a sample: clocks are coarse
VERSIONS = ("python", "fastpeft", "torch", "triton", "peft")

Row = dict[str, str]
Candidates = Mapping[str, Callable[[], object]]


def interleave(
    candidates: Candidates,
    device: torch.device,
    rounds: int = ROUNDS,
    timer: Callable[[Callable[[], object], torch.device, int], float] = elapsed,
) -> dict[str, list[float]]:
    """Seconds of every candidate in every round."""
    if device.type == "cpu":
        keep_freed_memory()
    repeats = {}
    for name, run in candidates.items():
        warm = min(timer(run, device, 1) for _ in range(WARM_UP))
        repeats[name] = max(1, math.ceil(SHORTEST_SAMPLE_S / max(warm, 1e-9)))
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            candidates[name]()  # not timed: one that leaves caches and heap in disorder must not slow down the next
            seconds[name].append(timer(candidates[name], device, repeats[name]))
    return seconds


def spread(values: Iterable[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    deciles = quantiles(values, n=10, method="inclusive")
    return deciles[1], deciles[4], deciles[7]


def percentiles(name: str, values: Iterable[float]) -> Row:
    """The columns of the 20th, 50th and 80th percentile."""
    return {f"{name}_p{percentile}": f"{value:.4g}" for percentile, value in zip((20, 50, 80), spread(values))}


def columns_of(case: Any) -> Row:
    """The fields of a data class as columns."""
    return {name: str(value) for name, value in asdict(case).items()}


def machine(device: torch.device) -> Row:
    """Where a measurement was made, and with which versions."""
    # with its instruction set: processors of one name have several
    processor = f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"
    found = versions()
    return {
        "device": device.type,
        "card": torch.cuda.get_device_name(device) if device.type == "cuda" else processor,
        "threads": str(torch.get_num_threads()),
        **{name: found[name] for name in VERSIONS},
    }


def measure(file: Path, case: Row, candidates: Candidates, device: torch.device, rounds: int = ROUNDS) -> None:
    """Time `candidates` on `case` and put one row for each into `file`, on a card into the one of that name for cards.

    `ratio_*` is a candidate's time over the first candidate's in the same round: above 1, the first is faster.
    """
    if device.type == "cuda":
        _measure_on_card(CARDS / file.name, case, candidates, device, rounds)
        return
    for name, figures in _figures(interleave(candidates, device, rounds)).items():
        put_row(file, {**case, "candidate": name, **machine(device), **figures}, (*case, "candidate", "device", "card"))


def _figures(seconds: Mapping[str, list[float]]) -> dict[str, Row]:
    """Percentiles of each candidate's milliseconds, and of its ratios to the first."""
    first = next(iter(seconds.values()))
    return {
        name: percentiles("ms", [1e3 * t for t in times])
        | percentiles("ratio", [t / base for t, base in zip(times, first)])
        for name, times in seconds.items()
    }


def is_on_card(file: Path, case: Row, names: Iterable[str], device: torch.device) -> bool:
    """Whether these candidates' last rows are there, so that they need not be made again to measure the case."""
    return _on_card(CARDS / file.name, case, "cold", machine(device)["card"]) >= set(names)


def _on_card(file: Path, case: Row, how: str, card: str) -> set[str]:
    """The candidates that have a row of the same sources."""
    wanted = {**case, "how": how, "card": card, "source": source()}
    return {row["candidate"] for row in read_rows(file) if wanted.items() <= row.items()}


def _measure_on_card(file: Path, case: Row, candidates: Candidates, device: torch.device, rounds: int) -> None:
    where = {**machine(device), "source": source()}
    key = (*case, "candidate", "how", "card", "source")
    for how in ("eager", "graph", "cold"):
        if _on_card(file, case, how, where["card"]) >= candidates.keys():
            continue
        runs, timer = candidates, elapsed
        if how == "graph":
            runs = captured(candidates)
            runs = runs if next(iter(candidates)) in runs else {}  # nothing to take ratios to
        elif how == "cold":
            timer = elapsed_cold
        for name, figures in _figures(interleave(runs, device, rounds, timer)).items() if runs else ():
            figures["peak_mb"] = f"{peak_mb(candidates[name]):.1f}"
            put_row(file, {**case, "candidate": name, "how": how, **where, **figures}, key)


@cache
def resident(name: str) -> int:
    """Resident bytes of this process, now (`VmRSS`), at most (`VmHWM`), or now and of no file (`RssAnon`)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(name)


def source() -> str:
    """A hash of what is measured: the package's and the kernels' files."""
    root = Path(__file__).parent.parent
    files = (path for folder in ("fastpeft", "kernels", "csrc") for path in sorted((root / folder).rglob("*")))
    texts = (path.read_bytes() for path in files if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"))
    return hashlib.sha256(b"".join(texts)).hexdigest()[:12]


def option_parser(description: str | None) -> argparse.ArgumentParser:
    """The parser of a bench's options, whose `--help` is the bench's docstring, line by line."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def timing_parser(description: str | None, rounds: int = ROUNDS) -> argparse.ArgumentParser:
    """The `option_parser` of a bench that times: it has --device, a `torch.device`, and --rounds."""
    parser = option_parser(description)
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"default {rounds}")
    return parser


def time_operation(
    description: str | None,
    file: Path,
    cases: Callable[[tuple[str, ...]], Iterable[Any]],
    candidates: Callable[[Any, torch.device], Candidates],
) -> None:
    """The command of a bench of one operation: `measure` the candidates of every case, a data class.

    Args:
        description: what `--help` says.
        file: the table.
        cases: those in some dtypes: float32 on a CPU, bfloat16 too on a card.
        candidates: those of a case on a device.
    """
    given = timing_parser(description).parse_args()
    for case in cases(("float32",) if given.device.type == "cpu" else ("bfloat16", "float32")):
        measure(file, columns_of(case), candidates(case, given.device), given.device, given.rounds)


def read_rows(file: Path) -> list[Row]:
    """The rows of a table; none where the file is not there yet."""
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def write_rows(file: Path, rows: list[Row]) -> None:
    """Write a table in one atomic step; the first row names the columns."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_csv(file, rows, rows[0])


def put_row(file: Path, row: Row, key: Iterable[str]) -> None:
    """Add `row`, in the place of the one with the same `key` columns; a run that is cut off leaves a whole table."""
    columns = tuple(key)
    rows = read_rows(file)
    same = [i for i, other in enumerate(rows) if all(other[column] == row[column] for column in columns)]
    if same:
        rows[same[0]] = row
    else:
        rows.append(row)
    write_rows(file, rows)
