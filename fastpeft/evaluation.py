"""What a finished run is good for: measuring it again, and classifying texts with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DataCollatorWithPadding, EvalPrediction

from fastpeft.data import Examples, load_data
from fastpeft.errors import FastpeftError
from fastpeft.models import Classifier, load_classifier
from fastpeft.runs import RunFolder
from fastpeft.training import TrainConfig, classification_metrics, encode

_BATCH_SIZE = 64


@dataclass(frozen=True)
class FinishedRun:
    """A run's classifier, on the best device there is, with what the run's folder says."""

    classifier: Classifier
    config: TrainConfig
    labels: list[str]


def load_run(folder: str | Path) -> FinishedRun:
    """Load the classifier of a finished run.

    Raises:
        FastpeftError: the folder holds no finished run, or its files or its base model cannot be loaded.
    """
    run = RunFolder(folder)
    labels: list[str] = run.metrics()["labels"]
    config = TrainConfig.from_values(run.config())
    if (run.path / "adapter_config.json").is_file():
        from peft import PeftModel

        import fastpeft  # noqa: F401  (registers its methods with PEFT)

        base = load_classifier(config.model, labels)
        try:
            model: Any = PeftModel.from_pretrained(base.model, str(run.path))
        except FastpeftError:
            raise
        except Exception as error:  # a broken file surfaces as almost any type
            raise FastpeftError(f"cannot load the adapter in {str(run.path)!r}: {error} Train it anew.") from error
        classifier = Classifier(model, base.tokenizer, base.head)
    else:
        classifier = load_classifier(str(run.path), labels)
    classifier.model.eval().to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    return FinishedRun(classifier, config, labels)


def evaluate(folder: str | Path, data: str | None = None) -> dict[str, float]:
    """Accuracy and F1 of a finished run on the dev part of its own data, or of `data`.

    Raises:
        FastpeftError: as `load_run` and `fastpeft.data.load_data`.
    """
    run = load_run(folder)
    config = run.config
    columns = {"text_column": config.text_column, "label_column": config.label_column} if data is None else {}
    dev = load_data(data or config.data, split_seed=config.split_seed, labels=run.labels, **columns).dev
    logits = np.concatenate(list(_logits(run, dev)))
    return {**classification_metrics(EvalPrediction(logits, np.array(dev.labels))), "dev_rows": len(dev)}


def predict(folder: str | Path, texts: Sequence[str]) -> list[tuple[str, float]]:
    """The most likely class of each text, with its probability.

    Raises:
        FastpeftError: as `load_run`.
    """
    run = load_run(folder)
    logits = torch.from_numpy(np.concatenate(list(_logits(run, Examples(list(texts), [0] * len(texts))))))
    best = logits.softmax(-1).max(-1)
    return [(run.labels[index], probability) for probability, index in zip(best.values.tolist(), best.indices.tolist())]


@torch.inference_mode()
def _logits(run: FinishedRun, examples: Examples) -> Iterator[np.ndarray]:
    """Logits `(rows, classes)` in float32, batch by batch in the order of the examples."""
    rows = encode(run.classifier, examples, run.config.max_length)
    collate = DataCollatorWithPadding(run.classifier.tokenizer)
    model = run.classifier.model
    for start in range(0, len(rows), _BATCH_SIZE):
        batch = collate(rows[start : start + _BATCH_SIZE]).to(model.device)
        batch.pop("labels")
        with torch.autocast(model.device.type, torch.bfloat16, enabled=run.config.bf16):
            yield model(**batch).logits.float().cpu().numpy()
