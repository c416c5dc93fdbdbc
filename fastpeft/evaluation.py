"""What a finished run is good for: measuring it again, and classifying texts with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import EvalPrediction

from fastpeft.data import Examples, load_data, load_rows
from fastpeft.errors import FastpeftError
from fastpeft.loading import FinishedRun, best_device, load_run
from fastpeft.prompt_model import PromptCollator, load_prompted
from fastpeft.prompts import Prompt
from fastpeft.task import DEFAULT_MAX_LENGTH, encode
from fastpeft.trainer import classification_metrics

_BATCH_SIZE = 64


def evaluate(
    folder: str | Path, data: str | None = None, *, text_column: str | None = None, label_column: str | None = None
) -> dict[str, float]:
    """Accuracy and F1 of a finished run on its own dev rows, or on the rows of `data`.

    Args:
        folder: folder of the run.
        data: other data: all rows of a file, or the dev file of a folder, or the demo's dev part.
        text_column, label_column: columns of `data`. None: found by their names.

    Raises:
        FastpeftError: the run or the data cannot be loaded, or the data has a class that the run does not know.
    """
    run = load_run(folder)
    if data is not None:
        dev = load_rows(data, run.labels, text_column=text_column, label_column=label_column)
    else:
        config = run.config
        dev = load_data(
            config.data,
            text_column=config.text_column,
            label_column=config.label_column,
            split_seed=config.split_seed,
        ).dev
    return _metrics(_logits(run, dev).numpy(), dev)


def evaluate_zero_shot(
    model: str,
    prompt: Prompt,
    data: str,
    *,
    calibrate: bool = False,
    text_column: str | None = None,
    label_column: str | None = None,
) -> dict[str, float]:
    """Accuracy and F1 of a masked language model by a prompt, with no training, on the dev rows of `data`.

    Args:
        model: `"demo"`, a folder or a hub id.
        prompt: template and label words.
        data: as `load_data` takes it; where it has no dev part, its rows are those that a run holds out.
        calibrate: subtract what the label words score for an empty text.
        text_column, label_column: columns of `data`. None: found by their names.

    Raises:
        FastpeftError: model or data cannot be loaded, or the prompt does not fit them.
    """
    texts = load_data(data, text_column=text_column, label_column=label_column)
    classifier = load_prompted(model, prompt.for_labels(texts.labels))
    prompted = classifier.model.eval().to(best_device())
    if calibrate:
        prompted.calibrate()
    limit = min(DEFAULT_MAX_LENGTH, classifier.max_length)
    logits = prompted.predict_logits(texts.dev.texts, max_length=limit).cpu().numpy()
    return _metrics(logits, texts.dev)


def _metrics(logits: np.ndarray, dev: Examples) -> dict[str, float]:
    return {**classification_metrics(EvalPrediction(logits, np.array(dev.labels))), "dev_rows": len(dev)}


def predict(folder: str | Path, texts: Sequence[str]) -> list[tuple[str, float]]:
    """The most likely class of each text, with its probability.

    Raises:
        FastpeftError: as `load_run`; or `texts` is one text, whose characters would be taken for texts.
    """
    if isinstance(texts, str):
        raise FastpeftError(f"texts is one text, {texts!r}; it must be a sequence of texts. Give [{texts!r}].")
    run = load_run(folder)
    if not texts:
        return []
    no_labels = [0] * len(texts)
    best = _logits(run, Examples(list(texts), no_labels)).softmax(-1).max(-1)
    return [(run.labels[index], probability) for probability, index in zip(best.values.tolist(), best.indices.tolist())]


@torch.inference_mode()
def _logits(run: FinishedRun, examples: Examples) -> torch.Tensor:
    """Logits `(rows, classes)` in float32 on the CPU, in the order of the examples."""
    rows = encode(run.classifier.tokenizer, examples, run.max_length, run.prompt)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))  # pads little
    collate = PromptCollator(run.classifier.tokenizer)
    model = run.classifier.model
    batches = []
    for start in range(0, len(rows), _BATCH_SIZE):
        batch = collate([rows[i] for i in order[start : start + _BATCH_SIZE]]).to(model.device)
        batch.pop("labels")
        with torch.autocast(model.device.type, torch.bfloat16, enabled=run.config.bf16):
            batches.append(model(**batch).logits.float().cpu())
    return torch.cat(batches)[torch.tensor(order).argsort()]
