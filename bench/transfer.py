"""How well recipes transfer: every method on tasks and models for which nothing was tuned, with no option given.

    python -m bench.pretrained minilm models/minilm
    python -m bench.transfer minilm models/minilm path/to/data runs/transfer

Each cell is one `fastpeft train` as a person types it, in a process of its own with one thread, two cells side by side.
`bench/data/transfer.csv` gets a row of each as it ends, and a cell that has one is not run again: the same command goes
on where it was. `--seeds`, `--tasks` and `--variants` choose among the cells. A task has at most 2,000 training rows,
which seed 0 draws, and 1,000 rows to measure on, of its test part.

`path/to/data` has a folder of each task, with the files as they are distributed:

| task | files | from | licence |
| --- | --- | --- | --- |
| sst2 | train.tsv, dev.tsv | GLUE (Socher et al. 2013) | not stated |
| trec | train.tsv, test.tsv | Li and Roth 2002 | not stated |
| banking77 | train.csv, test.csv | Casanueva et al. 2020 | CC BY 4.0 |
| sms | sms.csv | Almeida et al. 2011; equal messages once | CC BY 4.0 |
| wnut17 | train.conll, test.conll | Derczynski et al. 2017 | CC BY 4.0 |
| sick | SICK_train.txt, SICK_trial.txt | Marelli et al. 2014: which of two sentences follows | CC BY-NC-SA 3.0 |
| sts | 2015.train.tsv, 2015.test.tsv | SemEval 2012 to 2015: how alike two sentences are, 0 to 5 | of the sources |

The files of the last two are in the repository github.com/brmson/dataset-sts, in `data/sts/sick2014` and
`data/sts/semeval-sts/all`. `banking77-all` is Banking77 with all its training rows.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from itertools import chain, starmap
from pathlib import Path
from typing import Any

import torch

from bench.harness import DATA, Row, machine, option_parser, put_row, read_rows
from fastpeft.comparison.variants import parse_variant
from fastpeft.support.files import read_json, write_text
from fastpeft.training.config import TrainConfig

FILE = DATA / "transfer.csv"
TRAIN_ROWS, TEST_ROWS = 2_000, 1_000
A_CLASS = 26  # rows of Banking77: 2,002 in all
KEY = ("model", "task", "variant", "seed")

_LORA = ("lora:targets=query+value", "lora:targets=query+key")
METHODS = ("siva", *_LORA, "k-lst", "lst", "head", "full")

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Source:
    """A task: what reads its training and its test rows from their folder, and by which metric it is told."""

    read: Callable[[Path], tuple[Rows, Rows]]
    metric: str = "accuracy"
    rows: int | None = TRAIN_ROWS
    folder: str = ""


def _table(file: Path, delimiter: str, text: str, label: str) -> Rows:
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    with file.open(encoding="utf-8", newline="") as lines:
        heads, *cells = csv.reader(lines, delimiter=delimiter, quoting=quoting)
    return [{"text": row[heads.index(text)], "label": row[heads.index(label)]} for row in cells]


def _files(read: Callable[[Path], Rows], *names: str) -> Callable[[Path], tuple[Rows, Rows]]:
    """What reads a task whose two parts are files of one form."""

    def parts(folder: Path) -> tuple[Rows, Rows]:
        train, test = (read(folder / name) for name in names)
        return train, test

    return parts


_banking = _files(partial(_table, delimiter=",", text="text", label="category"), "train.csv", "test.csv")


def _some_of_each(folder: Path) -> tuple[Rows, Rows]:
    train, test = _banking(folder)
    random.Random(0).shuffle(train)
    met: Counter[str] = Counter()
    kept = []
    for row in train:
        met[row["label"]] += 1
        if met[row["label"]] <= A_CLASS:
            kept.append(row)
    return kept, test


def _tagged_sentences(file: Path) -> Rows:
    """The rows of a file in CoNLL's form: a word and its tag a line, and an empty line after each sentence."""
    blocks = file.read_text(encoding="utf-8").split("\n\n")
    sentences = ([line.split("\t") for line in block.splitlines()] for block in blocks if block.strip())
    return [{"tokens": [word for word, _ in pairs], "tags": [tag for _, tag in pairs]} for pairs in sentences]


def _sms(folder: Path) -> tuple[Rows, Rows]:
    rows = list({row["text"]: row for row in _table(folder / "sms.csv", ",", "text", "label")}.values())
    random.Random(0).shuffle(rows)
    return rows[:TRAIN_ROWS], rows[TRAIN_ROWS:]


def _sick(folder: Path) -> tuple[Rows, Rows]:
    def read(name: str) -> Rows:
        lines = (folder / f"SICK_{name}.txt").read_text(encoding="utf-8").splitlines()[1:]
        cells = (line.split("\t") for line in lines if line)
        return [{"sentence1": first, "sentence2": second, "label": label} for _, first, second, _, label in cells]

    train, trial = read("train"), read("trial")
    random.Random(0).shuffle(train)
    return train[:TRAIN_ROWS], [*trial, *train[TRAIN_ROWS : TRAIN_ROWS + TEST_ROWS - len(trial)]]


def _sts(folder: Path) -> tuple[Rows, Rows]:
    def read(name: str) -> Rows:
        lines = (folder / f"2015.{name}.tsv").read_text(encoding="utf-8").splitlines()
        cells = (line.split("\t")[:3] for line in lines)
        return [{"sentence1": one, "sentence2": other, "label": float(score)} for score, one, other in cells if score]

    return read("train"), read("test")


TASKS = {
    "sst2": Source(_files(partial(_table, delimiter="\t", text="sentence", label="label"), "train.tsv", "dev.tsv")),
    "trec": Source(_files(partial(_table, delimiter="\t", text="text", label="label"), "train.tsv", "test.tsv")),
    "banking77": Source(_some_of_each, rows=None),
    "sms": Source(_sms),
    "wnut17": Source(_files(_tagged_sentences, "train.conll", "test.conll"), "entity_f1"),
    "sick": Source(_sick),
    "sts": Source(_sts, "spearman"),
    "banking77-all": Source(_banking, rows=None, folder="banking77"),
}


def write_task(name: str, source: Path, folder: Path) -> Path:
    """The folder of a task's rows, as `fastpeft train --data` takes it; what is there is left as it is."""
    target = folder / "rows" / name
    if not (target / "dev.jsonl").is_file():
        train, test = TASKS[name].read(source / (TASKS[name].folder or name))
        for part in (train, test):
            random.Random(0).shuffle(part)
        for file, rows in (("train", train[: TASKS[name].rows]), ("dev", test[:TEST_ROWS])):
            target.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_text(target / f"{file}.jsonl", "".join(lines))
    return target


def _flags(name: str, value: Any) -> list[str]:
    """An option of a run, or a setting of its method, as it is written on the command line."""
    if name not in {field.name for field in dataclasses.fields(TrainConfig)}:
        return ["--set", f"{name}={json.dumps(value)}"]
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", str(value)]


@dataclass(frozen=True)
class Cell:
    """One run; its variant is written as for `fastpeft compare`."""

    model: str
    model_folder: str
    task: str
    rows: Path
    variant: str
    seed: int
    output: Path

    @property
    def key(self) -> Row:
        return {"model": self.model, "task": self.task, "variant": self.variant, "seed": str(self.seed)}

    @property
    def command(self) -> list[str]:
        method, options, _ = parse_variant(self.variant)
        given = {"method": method, "model": self.model_folder, "data": self.rows, "output": self.output}
        given |= {"seed": self.seed, **options}
        flags = chain.from_iterable(starmap(_flags, given.items()))
        return [sys.executable, "-m", "fastpeft", "train", *flags, "--overwrite", "--quiet"]

    def run(self) -> Row:
        """Train it in a process of one thread, and give its row."""
        begin = time.perf_counter()
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(self.command, env=one_thread, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(self.command)}\n{done.stderr}")
        seconds, found = time.perf_counter() - begin, read_json(self.output / "metrics.json")
        return {
            **self.key,
            "metric": TASKS[self.task].metric,
            "score": f"{100 * found[TASKS[self.task].metric]:.2f}",
            "loss": f"{found['loss']:.4g}",
            **{name: str(found[name]) for name in ("steps", "train_rows", "dev_rows", "learning_rate")},
            "train_s": f"{found['train_seconds']:.1f}",
            "whole_s": f"{seconds:.1f}",
            "peak_rss_mb": f"{found['peak_rss_mb']:.0f}",
            "compute_dtype": found["compute_dtype"],
            **machine(torch.device("cpu")),
            "threads": "1",
        }


def run(cells: Iterable[Cell], file: Path, side_by_side: int) -> Iterator[Row]:
    """Run the cells that have no row yet, and put each row into the table as its cell ends.

    Raises:
        RuntimeError: cells failed; those that did not have their rows.
    """
    known = {tuple(row[name] for name in KEY) for row in read_rows(file)}
    left = [cell for cell in cells if tuple(cell.key[name] for name in KEY) not in known]
    with ThreadPoolExecutor(side_by_side) as threads:
        failed = []
        for ended in as_completed([threads.submit(cell.run) for cell in left]):
            if error := ended.exception():
                failed.append(str(error))
                continue
            put_row(file, ended.result(), KEY)
            yield ended.result()
    if failed:
        raise RuntimeError("\n".join(failed))


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("name", help="of the model, in the table")
    parser.add_argument("model", help="as for fastpeft train --model")
    parser.add_argument("source", type=Path, help="the folder with a folder of each task")
    parser.add_argument("folder", type=Path, help="where rows and runs go")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 (default 3)")
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=[name for name in TASKS if name != "banking77-all"]
    )
    parser.add_argument("--variants", nargs="+", default=METHODS, help="as for fastpeft compare --methods")
    parser.add_argument("--side-by-side", type=int, default=2, help="cells at a time (default 2)")
    parser.add_argument("--table", type=Path, default=FILE)
    given = parser.parse_args()
    rows = {task: write_task(task, given.source, given.folder) for task in given.tasks}
    cells = [
        Cell(given.name, given.model, task, rows[task], variant, seed, given.folder / f"{task}-{variant}-{seed}")
        for seed in range(given.seeds)
        for task in given.tasks
        for variant in given.variants
    ]
    for row in run(cells, given.table, given.side_by_side):
        print(*(row[name] for name in (*KEY, "score", "loss", "train_s")), flush=True)


if __name__ == "__main__":
    main()
