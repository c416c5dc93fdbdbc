"""The process of a `zero-shot` cell: `python -m fastpeft.comparison.zero_shot FILE` writes a folder like a run's."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from fastpeft.errors import FastpeftError
from fastpeft.support import files
from fastpeft.support.environment import versions
from fastpeft.support.logs import show_own_messages
from fastpeft.training.evaluation import answer_zero_shot, load_classes, zero_shot_prompt
from fastpeft.training.run_folder import PREDICTIONS, RunFolder, read_config


def main(file: Path) -> None:
    """Measure the prompt in the configuration `file`, and write the metrics into its output."""
    values = read_config(file)
    folder = RunFolder(values["output"])
    model, calibrate = values["model"], values["calibrate"]
    texts = load_classes(values["data"], values["text_column"], values["label_column"])
    prompt, values["found_prompt"] = zero_shot_prompt(
        values["prompt"], values["label_words"], model, texts, calibrate=calibrate
    )
    with folder.held():
        folder.open(values, texts.fingerprint, overwrite=False)
        measured, answers = answer_zero_shot(model, prompt, texts, calibrate=calibrate)
        described = {name: values[name] for name in ("method", "model", "data", "prompt", "found_prompt", "calibrate")}
        described["problem_type"] = texts.problem.name
        result = folder.staging / "result"
        result.mkdir()
        files.write_json(result / PREDICTIONS, {"labels": texts.dev.labels, "predictions": answers})
        folder.close({**described, **measured, "trainable_parameters": 0, "versions": versions()}, result)


if __name__ == "__main__":
    show_own_messages(logging.StreamHandler(), quiet=True)
    try:
        main(Path(sys.argv[1]))
    except FastpeftError as error:
        sys.exit(f"Error: {error}")
