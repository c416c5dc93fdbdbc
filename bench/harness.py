"""The framework of all benches: what runs in turns on each case of a sweep, and one form of table in `bench/data`.

A bench is a `Bench`: cases, each a data class, and what is timed on a case. `python -m bench.bench_NAME` measures all
of it into its table, and each field of a case is an option: `--model base --tokens 64 128` replaces the field in every
case. `--candidates` takes some, the first of which ratios are taken to.

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
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
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
Run = Callable[[], object]
Candidates = Mapping[str, Callable[[], Run]]


@dataclass(frozen=True)
class Bench:
    """What runs in turns on the cases of a sweep.

    Attributes:
        about: what `--help` says.
        file: the table's name, and its name for cards too.
        cases: the sweep on a device, the smallest case first; a case is a data class whose fields are the columns.
        candidates: of a case on a device, what makes each one ready to run; ratios are taken to the first.
        rounds: how often each runs.
    """

    about: str | None
    file: str
    cases: Callable[[torch.device], Iterable[Any]]
    candidates: Callable[[Any, torch.device], Candidates]
    rounds: int = ROUNDS

    def main(self, arguments: Sequence[str] | None = None, folder: Path = DATA) -> None:
        """The command of a bench."""
        fields = asdict(next(iter(self.cases(torch.device("cpu")))))
        parser = option_parser(self.about)
        parser.add_argument("--device", type=torch.device, default="cpu", help="cpu (default) or cuda")
        parser.add_argument("--rounds", type=int, default=self.rounds, help=f"default {self.rounds}")
        parser.add_argument("--candidates", type=lambda names: names.split(","), help="names, separated by commas")
        for name, value in fields.items():
            kind = "True".__eq__ if isinstance(value, bool) else type(value)
            parser.add_argument(f"--{name.replace('_', '-')}", nargs="+", type=kind, help=f"as {value!r}")
        given = vars(parser.parse_args(arguments))
        device, changes = given["device"], {name: given[name] for name in fields if given[name] is not None}
        for case in dict.fromkeys(changed(self.cases(device), changes)):
            if device.type == "cuda":
                self._measure_on_card(case, device, given["rounds"], given["candidates"], folder / CARDS.name)
            else:
                self.measure(case, device, given["rounds"], given["candidates"], folder / self.file)

    def ready(self, case: Any, device: torch.device, names: Sequence[str] | None = None) -> dict[str, Run]:
        """The candidates of a case, or those of `names`, ready to run."""
        made = self.candidates(case, device)
        return {name: made[name]() for name in names or made}

    def measure(
        self, case: Any, device: torch.device, rounds: int, names: Sequence[str] | None, file: Path
    ) -> list[Row]:
        """Put a row for each candidate into `file`.

        `ratio_*` is a candidate's time over the first candidate's in the same round: above 1, the first is faster.
        """
        runs, columns = self.ready(case, device, names), columns_of(case)
        rows = [
            {**columns, "candidate": name, **machine(device), **figures}
            for name, figures in _figures(interleave(runs, device, rounds)).items()
        ]
        for row in rows:
            put_row(file, row, (*columns, "candidate", "device", "card"))
        return rows

    def _measure_on_card(
        self, case: Any, device: torch.device, rounds: int, names: Sequence[str] | None, folder: Path
    ) -> None:
        file, columns = folder / self.file, columns_of(case)
        where = {**machine(device), "source": source()}
        wanted = set(names or self.candidates(case, device))

        def is_there(how: str) -> bool:
            key = {**columns, "how": how, "card": where["card"], "source": where["source"]}
            return {row["candidate"] for row in read_rows(file) if key.items() <= row.items()} >= wanted

        left = [how for how in ("eager", "graph", "cold") if not is_there(how)]
        runs = self.ready(case, device, names) if left else {}  # to make them takes longer than to time them
        for how in left:
            timed = captured(runs) if how == "graph" else runs
            if next(iter(runs)) not in timed:
                continue  # nothing to take ratios to
            timer = elapsed_cold if how == "cold" else elapsed
            for name, figures in _figures(interleave(timed, device, rounds, timer)).items():
                figures["peak_mb"] = f"{peak_mb(runs[name]):.1f}"
                row = {**columns, "candidate": name, "how": how, **where, **figures}
                put_row(file, row, (*columns, "candidate", "how", "card", "source"))


def ready_made(runs: Mapping[str, Run]) -> Candidates:
    """Candidates that need no setup of their own."""
    return {name: partial(_itself, run) for name, run in runs.items()}


def _itself(run: Run) -> Run:
    return run


def changed(cases: Iterable[Any], changes: Mapping[str, Sequence[Any]]) -> Iterator[Any]:
    """Each case with every combination of other values of its fields."""
    for case, values in itertools.product(cases, list(itertools.product(*changes.values()))):
        yield replace(case, **dict(zip(changes, values)))


def interleave(
    candidates: Mapping[str, Run],
    device: torch.device,
    rounds: int = ROUNDS,
    timer: Callable[[Run, torch.device, int], float] = elapsed,
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


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    deciles = quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 9
    return deciles[1], deciles[4], deciles[7]


def _percentiles(name: str, values: Sequence[float]) -> Row:
    return {f"{name}_p{percentile}": f"{value:.4g}" for percentile, value in zip((20, 50, 80), spread(values))}


def _figures(seconds: Mapping[str, list[float]]) -> dict[str, Row]:
    """Percentiles of each candidate's milliseconds, and of its ratios to the first."""
    first = next(iter(seconds.values()))
    return {
        name: _percentiles("ms", [1e3 * t for t in times])
        | _percentiles("ratio", [t / base for t, base in zip(times, first)])
        for name, times in seconds.items()
    }


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


@cache
def source() -> str:
    """A hash of what is measured: the files of the package and of its compiled part."""
    root = Path(__file__).parent.parent
    files = (path for folder in ("fastpeft", "csrc") for path in sorted((root / folder).rglob("*")))
    texts = (path.read_bytes() for path in files if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"))
    return hashlib.sha256(b"".join(texts)).hexdigest()[:12]


def option_parser(description: str | None) -> argparse.ArgumentParser:
    """The parser of a bench's options, whose `--help` is the bench's docstring, line by line."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


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
