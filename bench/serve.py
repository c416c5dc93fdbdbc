"""`fastpeft serve` under load: `python -m bench.serve [NAME=RUN ...]` writes a row of `bench/data/serve.csv`.

The server is a process of its own on the loopback. Clients, each on a connection of its own, ask for random tasks, 1 to
8 texts at a time, whose lengths are those of film reviews and of pieces of them. EVERY answer is compared with what the
run says by itself, as `fastpeft predict` does: one is wrong where a probability is off by more than 1e-4. Without runs,
three short ones are made on the demo: two side networks that share a backbone, and SiVA with a model of its own. `load`
is what else the machine had to do: the processes that ran or waited, on average over the minute before.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch

from bench.harness import DATA, Row, machine, option_parser, put_row
from fastpeft.data.examples import load_data
from fastpeft.serving.tasks import parse_runs
from fastpeft.training.prediction import Predictor

FILE = DATA / "serve.csv"
TEXTS = 200  # different ones
MOST_AT_ONCE = 8  # texts of a request
WRONG = 1e-4  # of a probability: batches round otherwise than rows alone, by 1e-6


@dataclass
class Load:
    """What clients saw.

    Attributes:
        seconds: of each request.
        texts: number of texts that were answered.
        wrong: requests with an answer that is not the run's own.
        refused: requests that got another status than 200.
    """

    seconds: list[float] = field(default_factory=list)
    texts: int = 0
    wrong: int = 0
    refused: int = 0

    def row(self, wall: float) -> Row:
        """The figures, over so many seconds."""
        percentiles = quantiles(self.seconds, n=100, method="inclusive")
        return {
            "requests": str(len(self.seconds)),
            "requests_per_s": f"{len(self.seconds) / wall:.1f}",
            "texts_per_s": f"{self.texts / wall:.1f}",
            "ms_p50": f"{1e3 * percentiles[49]:.1f}",
            "ms_p99": f"{1e3 * percentiles[98]:.1f}",
            "wrong": str(self.wrong),
            "refused": str(self.refused),
        }


def texts_of_all_lengths(count: int) -> list[str]:
    """Film reviews, and pieces of them from a word on."""
    generator = random.Random(0)
    reviews = [text.split() for text in load_data("demo").dev.texts]
    return [
        " ".join(words[: generator.randint(1, len(words))] if generator.random() < 0.75 else words)
        for words in generator.choices(reviews, k=count)
    ]


def expected(runs: Mapping[str, str], texts: Sequence[str]) -> dict[str, list[dict[str, float]]]:
    """By task, for each text the probability of every class."""
    known = {}
    for name, folder in runs.items():
        predictor = Predictor(folder)
        scores = predictor.scores([predictor.encode(text) for text in texts])
        known[name] = [dict(zip(predictor.run.labels, each.tolist())) for each in scores]
    return known


def is_right(said: Mapping[str, Any], known: Mapping[str, float]) -> bool:
    """Whether a prediction is what the run says by itself."""
    probabilities = said["probabilities"]
    return (
        probabilities.keys() == known.keys()
        and all(abs(probabilities[label] - value) <= WRONG for label, value in known.items())
        and said["label"] == max(probabilities, key=probabilities.__getitem__)
    )


def drive(
    port: int,
    texts: Sequence[str],
    known: Mapping[str, Sequence[Mapping[str, float]]],
    clients: int,
    goes_on: Callable[[int], bool],
) -> Load:
    """Let so many clients ask, each as long as `goes_on`, given the number of its requests so far."""
    load, lock = Load(), threading.Lock()

    def client(number: int) -> None:
        draw, asked = random.Random(number), 0
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        while goes_on(asked):
            asked += 1
            task = draw.choice(sorted(known))
            chosen = draw.choices(range(len(texts)), k=draw.randint(1, MOST_AT_ONCE))
            body = json.dumps({"task": task, "texts": [texts[each] for each in chosen]})
            begin = time.perf_counter()
            connection.request("POST", "/predict", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            got = response.read()
            seconds = time.perf_counter() - begin
            found = json.loads(got).get("predictions", [])
            right = len(found) == len(chosen) and all(
                is_right(each, known[task][place]) for each, place in zip(found, chosen)
            )
            with lock:
                load.seconds.append(seconds)
                load.texts += len(found)
                load.refused += response.status != 200
                load.wrong += response.status == 200 and not right
        connection.close()

    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(client, range(clients)))
    return load


def demo_runs(folder: Path) -> dict[str, str]:
    """Three short runs on the demo."""
    from fastpeft import TrainConfig, train

    runs = {}
    for method in ("k-lst", "lst", "siva"):
        runs[method] = str(folder / method)
        train(TrainConfig(output=runs[method], method=method, max_steps=20, bf16=False))
    return runs


def record(file: Path, runs: Mapping[str, str], clients: int, seconds: float, device: str) -> Row:
    """Serve `runs`, drive the server for some seconds, and put a row into `file`."""
    texts = texts_of_all_lengths(TEXTS)
    known = expected(runs, texts)
    named = [f"{name}={folder}" for name, folder in runs.items()]
    command = [sys.executable, "-m", "fastpeft", "serve", *named, "--port", "0", "--device", device]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        line = next(line for line in server.stdout if line.startswith("listening on "))
        port = int(line.split()[2].rstrip(",").rpartition(":")[2])
        try:
            busy = os.getloadavg()[0]
            drive(port, texts, known, clients, lambda asked: asked < 2)  # warms up
            begin = time.perf_counter()
            load = drive(port, texts, known, clients, lambda _: time.perf_counter() - begin < seconds)
            wall = time.perf_counter() - begin
        finally:
            server.send_signal(signal.SIGTERM)
    case = {"tasks": " ".join(runs), "clients": str(clients), "seconds": f"{wall:.0f}"}
    facts = {**machine(torch.device(device)), "load": f"{busy:.1f}", "cores": str(os.cpu_count())}
    row = {**case, **load.row(wall), **facts}
    put_row(file, row, key=("tasks", "clients", "device", "card"))
    return row


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("runs", nargs="*", metavar="NAME=RUN", help="finished runs on classes")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = parse_runs(given.runs) or demo_runs(Path(folder))
        row = record(FILE, runs, given.clients, given.seconds, given.device)
    print(", ".join(f"{name} {value}" for name, value in row.items()))
    if row["wrong"] != "0" or row["refused"] != "0":
        raise SystemExit("some answers are wrong or missing")


if __name__ == "__main__":
    main()
