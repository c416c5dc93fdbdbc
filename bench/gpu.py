"""`python -m bench.gpu`: on a machine with a GPU, its tests and then every bench, in calls of under nine minutes.

The tests of an operation come first, in parallel, and gate its own benches alone. Then whole steps. Every row is
written as it is measured, to `bench/data/gpu`. What is done for these sources is kept in `done.json` there: a call goes
on where the last one was cut off, and `--anew` begins anew.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.harness import CARDS, source
from fastpeft.support.files import read_json, write_json

ROOT = Path(__file__).parent.parent
DONE = CARDS / "done.json"
LIMIT_S = 8.5 * 60
PROCESSES = min(16, os.cpu_count() or 1)  # of the tests, which wait for compilers more than for the card
PROCESS_BYTES = 2 * 2**30  # of the card's memory, of which CUDA takes half a GiB before a test has a tensor
STEPS = "--rounds 7 --device cuda --dtype bfloat16"


@dataclass(frozen=True)
class Stage:
    """Tests, as arguments of pytest, and the modules of `bench` that run if they pass, with their arguments."""

    name: str
    tests: str
    benches: list[str] = field(default_factory=list)


STAGES = [
    Stage("siva_linear", "tests/kernels -k siva_linear", ["bench_siva_linear"]),
    Stage("window_attention", "tests/kernels -k window_attention", ["bench_window_attention"]),
    Stage("frozen_head", "tests/kernels -k frozen_head", ["bench_frozen_head"]),
    Stage("mezo_perturb", "tests/kernels -k mezo_perturb", ["bench_mezo_perturb --model large", "bench_mezo"]),
    Stage(
        "steps",
        "tests/ops tests/siva -m gpu",
        [
            f"bench_adapters --model large --tokens 128 {STEPS} --candidates siva,limit,lora",
            f"bench_ladder --model large --tokens 128 {STEPS} --candidates 9-lst,lora,lst",
            f"bench_adapters --model 1b --tokens 128 {STEPS} --candidates siva,limit,lora",
            f"bench_ladder --model 1b --tokens 128 {STEPS} --candidates 9-lst,lora,lst",
            "bench_pool",
            "bench_feature_cache",
        ],
    ),
]


def commands(stage: Stage) -> list[list[str]]:
    """The tests first."""
    processes = max(1, min(PROCESSES, torch.cuda.get_device_properties(0).total_memory // PROCESS_BYTES))
    pytest = [sys.executable, "-m", "pytest", "-q", f"--numprocesses={processes}", "--dist=worksteal"]
    return [[*pytest, *stage.tests.split()], *(_bench(*bench.split()) for bench in stage.benches)]


def _bench(module: str, *arguments: str) -> list[str]:
    device = ["--device", "cuda"] if module.startswith("bench_") and "--device" not in arguments else []
    return [sys.executable, "-m", f"bench.{module}", *arguments, *device]


def run(command: list[str], timeout_s: float) -> bool:
    """Run `command` from the repository's root; whether it ended well and in time."""
    print("$", *command, flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    try:
        return subprocess.run(command, cwd=ROOT, env=environment, timeout=timeout_s).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"stopped after {timeout_s:.0f} s; the rows so far are kept", flush=True)
        return False


def main(arguments: list[str]) -> int:
    if not torch.cuda.is_available():
        print("There is no GPU here, so there is nothing to test or measure. On a machine with one, run this again.")
        return 0
    end = time.monotonic() + LIMIT_S
    kept = read_json(DONE) if DONE.exists() and "--anew" not in arguments else {}
    done = kept if kept.get("source") == source() else {"source": source(), "commands": []}
    failed: list[str] = []
    for stage in STAGES:
        for command in commands(stage):
            words = " ".join(command[1:])
            if words in done["commands"]:
                continue
            left = end - time.monotonic()
            if left < 1:
                print("The time is up. Run this again for the rest.")
                return 1
            if run(command, left):
                done["commands"].append(words)
                DONE.parent.mkdir(parents=True, exist_ok=True)
                write_json(DONE, done)
            else:
                failed.append(words)
                if "pytest" in words:
                    print(f"The tests of {stage.name} did not pass, so nothing of it was timed.")
                    break
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
