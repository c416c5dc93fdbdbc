"""The process of a `zero-shot` cell: `python -m fastpeft.comparison.zero_shot FILE` leaves a folder like a run's."""

from __future__ import annotations

import sys
from pathlib import Path

from fastpeft import console
from fastpeft.environment import versions
from fastpeft.errors import FastpeftError
from fastpeft.evaluation import evaluate_zero_shot
from fastpeft.named_prompts import parse_prompt
from fastpeft.runs import RunFolder, read_config


def main(file: Path) -> None:
    """Measure the prompt that `file` names, and write what was measured into its output."""
    values = read_config(file)
    folder = RunFolder(values["output"])
    prompt = parse_prompt(values["prompt"], values["label_words"])
    assert prompt is not None  # the plan has refused none
    folder.open(values, overwrite=False)
    metrics = evaluate_zero_shot(
        values["model"],
        prompt,
        values["data"],
        calibrate=values["calibrate"],
        text_column=values["text_column"],
        label_column=values["label_column"],
    )
    described = {name: values[name] for name in ("method", "model", "data", "prompt", "calibrate")}
    folder.close({**described, **metrics, "trainable_parameters": 0, "versions": versions()}, folder.staging)


if __name__ == "__main__":
    console.quieten(quiet=True)
    try:
        main(Path(sys.argv[1]))
    except FastpeftError as error:
        sys.exit(f"Error: {error}")
