"""Learning rates of a decoder's next words: a comparison on a slice of E2E, and `bench/data/words_rates.csv` of it.

    python -m bench.pretrained smollm2 models/smollm2
    python -m bench.words_rates models/smollm2 path/to/e2e runs/words-rates

Each variant learns from 640 rows of the validation part in 40 steps and is measured on 160 rows of other meanings. What
has finished in the folder is not run again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.evidence import e2e
from bench.harness import DATA, read_rows, write_rows
from fastpeft import CompareConfig, compare
from fastpeft.comparison import learning_rates
from fastpeft.data.examples import load_data
from fastpeft.data.problems import NEXT_WORDS

FILE = DATA / "words_rates.csv"
ROWS, DEV_ROWS = 640, 160
RATES = {
    "lst": ("0.001", "0.003", "0.01"),
    "k-lst:window=9": ("0.001", "0.003"),
}
COLUMNS = ("variant", "seed", "learning_rate", "train_rows", "steps", "dev_rows", "next_accuracy_before")
COLUMNS += ("next_accuracy", "loss", "error", "versions")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="as for fastpeft train --model")
    parser.add_argument("source", type=Path, help="folder of E2E's files, as they are distributed")
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    rows, part = given.folder / "rows", given.folder / "slice"
    if not (part / "dev.jsonl").is_file():
        rows.mkdir(parents=True, exist_ok=True)
        e2e(given.source, rows)
        whole = load_data(str(rows), problem_type=NEXT_WORDS.name)
        learning_rates.write_rows(learning_rates.take_slice(whole, ROWS, DEV_ROWS), part)
    methods = [f"{method}:learning_rate={rate}" for method, rates in RATES.items() for rate in rates]
    common = {"model": given.model, "data": str(part), "objective": "causal", "epochs": 1, "bf16": False}
    compare(CompareConfig(output=str(given.folder / "compared"), methods=methods, common=common))
    found = read_rows(given.folder / "compared" / "results.csv")
    write_rows(FILE, [{name: row[name] for name in COLUMNS} for row in found])


if __name__ == "__main__":
    main()
