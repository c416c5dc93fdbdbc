"""How the model of a run is found and put together: its base, and on it an adapter, a side network or a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastpeft.config import TrainConfig
from fastpeft.errors import FastpeftError
from fastpeft.ladder import LadderModel
from fastpeft.methods import get_method
from fastpeft.models import Classifier, load_classifier
from fastpeft.prompt_model import PromptModel, load_prompted
from fastpeft.prompts import Prompt
from fastpeft.runs import RunFolder


@dataclass(frozen=True)
class FinishedRun:
    """A run's classifier, on the best device there is, with what the run's folder says of it.

    Attributes:
        classifier: model and tokenizer.
        config: how the run was started.
        labels: names of the classes, in the order of the model's outputs.
        prompt: what texts are put into; None for the texts alone.
        max_length: where texts are cut, in tokens.
    """

    classifier: Classifier
    config: TrainConfig
    labels: list[str]
    prompt: Prompt | None
    max_length: int


def load_run(folder: str | Path) -> FinishedRun:
    """Load the classifier of a finished run.

    Raises:
        FastpeftError: the folder holds no finished run, or its files or its base model cannot be loaded.
    """
    run = RunFolder(folder)
    metrics = run.metrics()
    labels: list[str] = metrics["labels"]
    config = TrainConfig.from_values(run.config())
    prompt = prompt_for(config, labels)
    method = get_method(config.method, config.settings)
    if method.adapts or method.ladder:
        base = load_model(config.model, labels, prompt)
        load = _load_adapter if method.adapts else _load_ladder
        classifier = Classifier(load(run.path, base.model), base.tokenizer, base.head)
    else:
        classifier = load_model(str(run.path), labels, prompt)
    classifier.model.eval().to(best_device())
    return FinishedRun(classifier, config, labels, prompt, metrics["max_length"])


def load_model(model: str, labels: Sequence[str], prompt: Prompt | None) -> Classifier:
    """Load `model` as a classifier of `labels`: by a classification head, or by the label words of `prompt`."""
    if prompt is not None and prompt.head == "label_words":
        return load_prompted(model, prompt)
    return load_classifier(model, labels)


def prompt_for(config: TrainConfig, labels: Sequence[str]) -> Prompt | None:
    """The prompt of `config`, with its words in the order of `labels`."""
    prompt = config.parse_prompt()
    return None if prompt is None else prompt.for_labels(labels)


def best_device() -> torch.device | str:
    """The accelerator, or the CPU where there is none."""
    return torch.accelerator.current_accelerator(check_available=True) or "cpu"


def _load_adapter(folder: Path, base: Any) -> Any:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(base, str(folder))
    except FastpeftError:
        raise
    except Exception as error:  # a broken file surfaces as almost any type
        raise FastpeftError(f"cannot load the adapter in {str(folder)!r}: {error} Train it anew.") from error


def _load_ladder(folder: Path, base: Any) -> Any:
    def beside(model: Any) -> LadderModel:
        return LadderModel.from_pretrained(folder, base=model)

    return base.around(beside) if isinstance(base, PromptModel) else beside(base)
