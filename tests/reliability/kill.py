"""Runs that are killed at random moments, go on, and must end as if nothing had happened.

`make kill-test` kills each kind of run 30 times; what it finds is a row of bench/data/kills.csv. A run is killed,
resumed and killed again until it comes to its end; then the next one begins. After each kill every file is read, and
nothing that was reached before may be lost; at the end the weights must have the bits of a run that was left alone.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from forking import PROCESSES
from PIL import Image
from safetensors.torch import load_file
from samples import reviews, save_tiny_model, write_csv

from bench.harness import DATA, put_row
from fastpeft.mezo import Journal
from fastpeft.support import files
from fastpeft.support.record_store import _LINE_BYTES, RecordStore
from fastpeft.training.run_folder import RunFolder

FILE = DATA / "kills.csv"
STEPS = 40
RUNS: dict[str, dict[str, Any]] = {
    "siva": {"method": "siva", "save_steps": 3},
    "k-lst": {"method": "k-lst", "save_steps": 3},
    "k-lst, features cached": {"method": "k-lst", "save_steps": 3, "cache_features": "{output} features"},
    "full": {"method": "full", "save_steps": 3},
    "mezo": {"method": "mezo", "learning_rate": 1e-3},
    "mezo, with checkpoints": {"method": "mezo", "learning_rate": 1e-3, "save_steps": 7, "metric": "loss"},
}
COMPARE, ONE_CELL = "compare", "compare, one cell"
_VARIANTS = {COMPARE: "head,siva:rank=2,mezo:learning_rate=0.001", ONE_CELL: "head"}


@dataclass
class Report:
    """What was found of one kind of run.

    Attributes:
        kills: how many there were.
        while_writing: kills that left something half written behind, where it does no harm.
        runs: that came to their end.
        faults: what went wrong; empty in a library that keeps its word.
    """

    kills: int = 0
    while_writing: int = 0
    runs: int = 0
    faults: list[str] = field(default_factory=list)


def prepare(folder: Path) -> None:
    """The model and the data of all runs."""
    save_tiny_model(folder / "model")
    write_csv(folder / "reviews.csv", reviews(60))


def work(folder: Path, kind: str, output: Path) -> None:
    """What a process that may be killed does: begin or go on, to the end. Its exit code is that of the command."""
    from fastpeft.cli import app

    os.setsid()  # so that a cell's process can be killed with its comparison
    torch.set_num_threads(1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(quiet, stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored, in the tests that it starts too
    common = ["--model", str(folder / "model"), "--data", str(folder / "reviews.csv"), "--output", str(output)]
    if kind in _VARIANTS:
        options = ["--max-steps", str(STEPS), "--save-steps", "3", "--deterministic"]
        command = ["compare", "--methods", _VARIANTS[kind], *options]
    else:
        given = {name.replace("_", "-"): str(value).format(output=output) for name, value in RUNS[kind].items()}
        options = [f"--{name}={value}" for name, value in given.items()]
        command = ["train", "--resume", "--deterministic", f"--max-steps={STEPS}", *options]
    app([*command, *common])


def start(folder: Path, kind: str, output: Path) -> Any:
    """A process of its own that does `work`."""
    process = PROCESSES.Process(target=work, args=(folder, kind, output))
    process.start()
    return process


def kill(process: Any, output: Path) -> bool:
    """End a process and those that it started, without warning; whether it was still there."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has ended, or has not yet become the first of its group
        process.kill()
    process.join()
    if (output / files.LOCK).exists():  # which the process of a cell holds until it is gone
        files.lock(output / files.LOCK).close()
    return bool(process.exitcode == -signal.SIGKILL)


def read_table(file: Path) -> None:
    """Read a table, of which each row ends and is as long as the first."""
    with file.open(encoding="utf-8", newline="") as lines:
        lengths = {len(row) for row in csv.reader(lines, strict=True)}
    if len(lengths) != 1:
        raise ValueError(f"rows of {sorted(lengths)} columns")
    read_text(file)


def read_text(file: Path, end: str = "\n") -> None:
    """Read a text that has its end."""
    if not file.read_text(encoding="utf-8").endswith(end):
        raise ValueError("it has no end")


def read_image(file: Path) -> None:
    """Read all pixels."""
    with Image.open(file) as image:
        image.load()


def read_features(index: Path) -> None:
    """Read every record that the index of a store of features names, under its checksum."""
    store = RecordStore(index.parents[1], index.parent.name, max_bytes=0)
    lines, keys = index.stat().st_size // _LINE_BYTES, list(store._places)
    if not lines == len(keys) == len(store.get(keys)):
        raise ValueError(f"{lines} lines name {len(keys)} records, of which {len(store.get(keys))} are whole")


READERS: dict[str, Callable[[Path], Any]] = {  # by the ends of names
    ".json": files.read_json,
    ".safetensors": load_file,
    ".journal": Journal.open,
    ".pt": lambda file: torch.load(file, weights_only=True),
    ".csv": read_table,
    ".md": read_text,
    ".html": lambda file: read_text(file, "</html>"),
    ".png": read_image,
    "index": read_features,
}


def unreadable(folder: Path) -> list[str]:
    """The files of a run, a comparison or a feature cache that cannot be read, but for those marked as unfinished."""
    faults = []
    for file in folder.rglob("*"):
        unfinished = ".staging" in file.parts or file.match(files.UNFINISHED)
        read = READERS.get(file.suffix or file.name)
        if read is not None and not unfinished:
            try:
                read(file)
            except Exception as error:
                faults.append(f"{file.relative_to(folder)}: {error}")
    return faults


def places(kind: str, output: Path) -> list[Path]:
    """The folders that a run of a kind writes: its output, and its cache of features, if it has one."""
    cache = RUNS.get(kind, {}).get("cache_features")
    return [output] if cache is None else [output, Path(cache.format(output=output))]


def half_written(folder: Path) -> bool:
    """Whether a kill came while something was written."""
    staged = any(any(each.iterdir()) for each in folder.rglob(".staging"))
    return staged or any(True for _ in folder.rglob(files.UNFINISHED))


def reached(folder: Path) -> int:
    """How far a run or a comparison has come, in steps that a resumed one does not make again."""
    steps = 0
    for config in folder.rglob("run.json"):
        run = RunFolder(config.parent)
        newest = run.newest_checkpoint()
        saved = 0 if newest is None else int(newest.name.rpartition("-")[2])
        if run.journal.exists():
            saved = max(saved, Journal.open(run.journal).steps - 1)  # the last step is made once more
        steps += STEPS + 1 if run.finished else saved
    return steps


def results(folder: Path) -> dict[str, bytes]:
    """The weights, and the journals that led to them, by their names below `folder`."""
    made = [file for pattern in ("*.safetensors", "*.journal") for file in folder.rglob(pattern)]
    return {str(file.relative_to(folder)): file.read_bytes() for file in made if "checkpoints" not in file.parts}


def attack(folder: Path, kind: str, kills: int, seed: int, report: Callable[[Report], None] = lambda _: None) -> Report:
    """Kill runs of one kind until there were so many kills, and let the last one come to its end."""
    chance = random.Random(f"{kind}:{seed}")
    whole = folder / f"{kind} whole"
    process = PROCESSES.Process(target=int)  # by which the imports are done
    process.start()
    process.join()
    began = time.monotonic()
    process = start(folder, kind, whole)
    process.join()
    seconds = time.monotonic() - began
    found = Report()
    if process.exitcode:
        found.faults.append(f"the run that was left alone ended with exit code {process.exitcode}")
        return found
    while True:
        output, far, lives = folder / f"{kind} {found.runs}", 0, 0
        while True:
            process, lives = start(folder, kind, output), lives + 1
            if found.kills < kills:
                process.join(chance.uniform(0, seconds))
            else:
                process.join()
            if not kill(process, output):
                break
            found.kills += 1
            found.while_writing += half_written(output)
            now = reached(output)
            if now < far:
                found.faults.append(f"kill {found.kills}: {far} steps were saved, then {now}")
            far = now
            faults = [fault for place in places(kind, output) for fault in unreadable(place)]
            found.faults += [f"kill {found.kills}: {fault}" for fault in faults]
            report(found)
        found.runs += 1
        if process.exitcode:
            found.faults.append(f"after {lives} lives the run ended with exit code {process.exitcode}")
        if results(output) != results(whole):
            found.faults.append(f"after {lives} lives the result has other bits")
        if names(output) != names(whole):
            found.faults.append(f"after {lives} lives the folder holds {names(output) ^ names(whole)}")
        if found.faults or found.kills >= kills:
            return found


def names(folder: Path) -> set[str]:
    """What a person sees in a folder, and what is hidden."""
    return {file.name for file in folder.iterdir()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Kill runs at random moments and look at what is left.")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--file", type=Path, default=FILE, help="the table that the rows go to")
    parser.add_argument("kinds", nargs="*", default=[*RUNS, COMPARE])
    given = parser.parse_args(arguments)
    faults = []
    for kind in given.kinds:
        with tempfile.TemporaryDirectory() as folder:
            prepare(Path(folder))
            found = attack(Path(folder), kind, given.kills, given.seed)
        faults += found.faults
        numbers = {"kills": found.kills, "while_writing": found.while_writing, "runs": found.runs}
        row = {"run": kind, **{name: str(n) for name, n in numbers.items()}, "faults": str(len(found.faults))}
        put_row(given.file, row, key=("run",))
        print(", ".join(f"{column} {value}" for column, value in row.items()), flush=True)
    raise SystemExit(json.dumps(faults, indent=2) if faults else 0)


if __name__ == "__main__":
    main()
