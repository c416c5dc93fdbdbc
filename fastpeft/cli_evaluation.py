"""The three modes of `fastpeft eval`. Each checks its options, then gives the title of a table and its metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastpeft.cli_commands import showing
from fastpeft.errors import FastpeftError
from fastpeft.prompts.named import is_auto, parse_prompt
from fastpeft.training.run_folder import RunFolder

_RUN_OR_MODEL = (
    "eval takes either DIR, the folder of a finished run, or --model with --prompt or --objective causal. Give one of "
    "the two."
)


def evaluate_run(
    folder: Path, data: str | None, columns: dict[str, Any], max_new_tokens: int | None, *, others: bool
) -> tuple[str, dict[str, Any]]:
    """Measure a finished run; `others` says whether options were given that go with --model."""
    if others:
        raise FastpeftError(_RUN_OR_MODEL)
    RunFolder(folder).check_finished()
    with showing():
        from fastpeft.training import evaluation

        metrics = evaluation.evaluate(folder, data, **columns, max_new_tokens=max_new_tokens)
    return f"{folder} on {data or 'its own data'}", metrics


def evaluate_decoder(
    objective: str,
    model: str | None,
    data: str | None,
    text_column: str | None,
    max_new_tokens: int | None,
    *,
    others: bool,
) -> tuple[str, dict[str, Any]]:
    """Measure a decoder with no training; `others` says whether options were given that do not go with it."""
    if objective != "causal":
        raise FastpeftError(
            f"--objective is {objective!r}; eval allows only causal. Give --objective causal, or remove the option."
        )
    if others or model is None or data is None:
        raise FastpeftError(
            "--objective causal requires --model and --data; it allows also --text-column and --max-new-tokens. Remove "
            "all other options and DIR."
        )
    with showing():
        from fastpeft.training import evaluation

        metrics = evaluation.evaluate_causal_lm(model, data, text_column=text_column, max_new_tokens=max_new_tokens)
    return f"{model} with no training on {data}", metrics


def evaluate_prompt(
    model: str | None,
    prompt: str | None,
    label_words: str | None,
    data: str,
    columns: dict[str, Any],
    calibrate: bool,
    max_new_tokens: int | None,
) -> tuple[str, dict[str, Any]]:
    """Measure a model with no training, which answers by a prompt."""
    if not model:
        raise FastpeftError(_RUN_OR_MODEL)
    if max_new_tokens is not None:
        raise FastpeftError(
            f"`max_new_tokens` is {max_new_tokens}, but a model that answers by a prompt generates no text. Leave it "
            "out."
        )
    if not prompt or not (is_auto(prompt) or parse_prompt(prompt, label_words)):
        raise FastpeftError(
            "--prompt is missing: a model without fine-tuning classifies by a prompt. Give a name, such as --prompt "
            "sst2; a template and its label words, such as --prompt '{text} It was <mask>.' --label-words "
            "terrible,great; or --prompt auto, which finds one on the training rows of --data. To evaluate a decoder "
            "on texts, give --objective causal."
        )
    with showing():
        from fastpeft.training import evaluation

        # all rows of a file are measured, but where a prompt is found on nine tenths of them
        texts = evaluation.load_classes(data, **columns, split=is_auto(prompt))
        parsed, _ = evaluation.zero_shot_prompt(prompt, label_words, model, texts, calibrate=calibrate)
        metrics = evaluation.evaluate_zero_shot(model, parsed, texts, calibrate=calibrate)
    return f"{model} with no training{', calibrated' if calibrate else ''} on {data}", metrics
