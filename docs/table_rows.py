"""What the tables of the pages are made of: rows of CSV files, the names of methods, lines of Markdown."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

DOCS = Path(__file__).parent
DATA = DOCS.parent / "bench" / "data"

Row = dict[str, str]

LORA = "lora:rank=4:targets=query+key"  # as the paper has it
NAMES = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "pissa": "PiSSA",
    "qlora": "QLoRA",
    "lokr": "LoKr",
    "ia3": "IA3",
    "prompt-tuning": "prompt tuning",
    "siva": "**SiVA**",
    "k-lst": "**9-LST**",
    "lst": "LST",
    "last-n": "last 3 layers",
    "bitfit": "BitFit",
    "head": "head only",
    "mezo": "**MeZO**",
    "zero-shot": "no training",
}


def rows(file: str) -> list[Row]:
    return read(DATA / file)


def read(file: Path) -> list[Row]:
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def cells_of(task: str, variant: str) -> list[dict[str, Any]]:
    """The cells of a variant in `bench/data/evidence`, one a seed."""
    name = re.sub(r"[^\w.+=-]+", "-", variant).strip("-")  # as a comparison names its folders
    return _cells(task, f"{name}-seed*.json")


def all_cells(task: str) -> list[dict[str, Any]]:
    """Every cell of a task in `bench/data/evidence`."""
    return _cells(task, "*.json")


def _cells(task: str, pattern: str) -> list[dict[str, Any]]:
    files = sorted((DATA / "evidence" / task).glob(pattern))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def table(heads: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    body = list(body)
    if not body:
        raise ValueError(f"a table has no rows; its columns are {', '.join(heads)}")
    lines = [heads, ["---"] * len(heads), *body]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def whole(number: str) -> str:
    return f"{float(number):,.0f}" if number else "-"


def over_seeds(values: Sequence[float]) -> str:
    """The mean of runs, and their standard deviation."""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")
