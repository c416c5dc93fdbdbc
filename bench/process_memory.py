"""Peak memory of a whole training process on a CPU, by part: `python -m bench.process_memory MODEL DATA`.

MODEL is a folder of an encoder, such as MPNet-base, and DATA a table of labelled texts, such as SST-2's. Each run is a
process of its own: `fastpeft train` for a few steps of 16 x 64 tokens, or PEFT's LoRA in transformers' Trainer on the
same rows. What is measured is the resident memory, pages of files included, as Linux counts it (VmHWM), reset where a
part begins: libraries, loading, steps with the measurements between them, and saving. The peak is the most of the four.
`bench/data/process_memory.csv`; figures depend on the libraries that are installed, so their versions stand beside.

Counted before it was measured, of SiVA on an MPNet-base in bfloat16, MB: libraries 400, weights 209, activations of a
step 230, adapters and their optimizer 30, spare room of the allocator 100: 970.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RUNS, STEPS, ROWS, TOKENS = 3, 20, 2000, 64
PARTS = ("import", "load", "step", "save")
_PART_OF = {  # of the stages that a run reports; those between belong to the part before
    "loading the model": "load",
    "measuring before training": "step",
    "saving": "save",
}
CASES: dict[str, dict[str, Any]] = {
    "siva": {"method": "siva"},
    "siva, bfloat16": {"method": "siva", "dtype": "bfloat16"},
    "siva, bfloat16, int8": {"method": "siva", "dtype": "bfloat16", "settings": {"residual_dtype": "int8"}},
    "9-lst": {"method": "k-lst"},
    "9-lst, bfloat16": {"method": "k-lst", "dtype": "bfloat16"},
    "PEFT's LoRA": {},
    "PEFT's LoRA, bfloat16": {"dtype": "bfloat16"},
}


class Peaks:
    """The peak of each part in MB, of a process that says when the next one begins."""

    def __init__(self) -> None:
        self.of: dict[str, int] = {}
        self._part = ""
        self.begin(PARTS[0])

    def begin(self, part: str) -> None:
        """End the part under way, and begin another."""
        self.end()
        self._part = part
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes what is resident now

    def end(self) -> None:
        """Keep the peak of the part under way."""
        if self._part:
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            peak = int(status["VmHWM"].split()[0]) // 1024
            self.of[self._part] = max(peak, self.of.get(self._part, 0))


def run_ours(peaks: Peaks, model: str, data: str, case: dict[str, Any], output: str) -> None:
    """As `fastpeft train` does, which delays one import of its libraries and hides another."""
    from fastpeft.support.import_hook import import_when_used, import_without

    import_when_used("datasets")
    import_without("sklearn.utils.fixes", "pandas")
    from fastpeft.support import stages
    from fastpeft.training.config import TrainConfig
    from fastpeft.training.recipe import train

    def listener(stage: str, *_: Any) -> None:
        if stage in _PART_OF:
            peaks.begin(_PART_OF[stage])

    config = TrainConfig(
        output=output, model=model, data=data, max_steps=STEPS, batch_size=16, max_length=TOKENS, **case
    )
    with stages.listening(listener):
        train(config)


def run_lora(peaks: Peaks, model: str, data: str, case: dict[str, Any], output: str) -> None:
    """As PEFT's documentation has it: rank 8 on query and value, the head trains too."""
    import csv

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    peaks.begin("load")
    dtype = getattr(torch, case.get("dtype", "float32"))
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(model)
    with open(data, encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file, delimiter="\t" if data.endswith(".tsv") else ","))
    text, label = list(table[0])[:2]
    rows = [{**tokenizer(row[text], truncation=True, max_length=TOKENS), "labels": int(row[label])} for row in table]
    count = len(rows) // 10
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["q", "v"] if base.config.model_type == "mpnet" else None)
    peaks.begin("step")
    settings = TrainingArguments(
        output, max_steps=STEPS, per_device_train_batch_size=16, report_to="none", save_strategy="no", use_cpu=True
    )
    trainer = Trainer(
        get_peft_model(base, lora),
        settings,
        train_dataset=rows[count:],
        eval_dataset=rows[:count],
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    peaks.begin("save")
    trainer.save_model()


def measured(name: str, model: str, data: str) -> dict[str, int]:
    """The peaks of one run, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "peaks.json")
        command = [sys.executable, "-m", "bench.process_memory", model, data, "--case", name, "--result", str(result)]
        done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr[-2000:]}")
        found: dict[str, int] = json.loads(result.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--only", choices=CASES, action="append", help="these cases")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)  # of a process that measures itself
    parser.add_argument("--result", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        peaks = Peaks()
        run = run_lora if given.case.startswith("PEFT") else run_ours
        with tempfile.TemporaryDirectory() as output:
            run(peaks, given.model, given.data, CASES[given.case], str(Path(output, "run")))
            peaks.end()
        Path(given.result).write_text(json.dumps(peaks.of))
        return
    from bench.harness import DATA, put_row
    from fastpeft.support.environment import versions

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, f"rows{Path(given.data).suffix}")
        with open(given.data, encoding="utf-8") as lines:
            data.write_text("".join(line for _, line in zip(range(ROWS + 1), lines)), encoding="utf-8")
        for name in given.only or CASES:
            for number in range(given.runs):
                found = measured(name, given.model, str(data))
                about = {"model": Path(given.model).resolve().name, "case": name, "run": str(number)}
                row = {**about, **{part: str(found[part]) for part in PARTS}, "peak": str(max(found.values()))}
                put_row(DATA / "process_memory.csv", {**row, **versions()}, about)
                print(*row.values(), sep="\t", flush=True)


if __name__ == "__main__":
    main()
