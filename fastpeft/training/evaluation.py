"""How good a finished run is, or a model with no training: measured on rows with labels."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from fastpeft.data import result_warnings
from fastpeft.data.examples import Examples, TextData, load_data, load_rows, texts_in_words
from fastpeft.data.masking import Masker
from fastpeft.data.names import LOSS, UNLABELLED
from fastpeft.data.problems import CLASSIFICATION, MASKED_WORDS, NEXT_WORDS, describe, most_frequent
from fastpeft.errors import FastpeftError
from fastpeft.models import load_for_next_words
from fastpeft.prompts.model import load_prompted
from fastpeft.prompts.named import is_auto, parse_prompt
from fastpeft.prompts.template import Prompt
from fastpeft.support.environment import best_device
from fastpeft.support.stages import report
from fastpeft.training.config import TrainConfig
from fastpeft.training.encoding import DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH_CAUSAL
from fastpeft.training.generation import TextGenerator, measure_generations
from fastpeft.training.loading import FinishedRun, load_run, put
from fastpeft.training.prediction import outputs_of
from fastpeft.training.prompt_search import find_prompt
from fastpeft.training.run_folder import RunFolder
from fastpeft.training.setup import check_texts
from fastpeft.training.task import data_for


def evaluate(
    folder: str | Path,
    data: str | Path | None = None,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    max_new_tokens: int | None = None,
) -> dict[str, Any]:
    """Metrics and loss of a finished run on its own dev rows, or on the rows of `data`, and `dev_rows`, their number.

    For a causal language model also what `measure_generations` gives, where rows have prompts. Beside these it has what
    `metrics.json` has of classes, and `warnings`, which are logged too: of rows that the run was trained on, say.

    Args:
        folder: folder of the run.
        data: other data: all rows of a file, or the dev part of anything else.
        text_column, label_column: columns of `data`. None: those that the run was trained with, else found by name.
        max_new_tokens: the most that a run on next words generates from a prompt, see `TextGenerator`; 0: nothing.

    Raises:
        FastpeftError: the run or the data cannot be loaded, the data has a class that the run does not know, or the
            run's own data has other classes than when it was trained.
    """
    if data is None and (text_column or label_column):
        raise FastpeftError(
            "columns are those of other data, and a run's own has the columns that it was trained with. Name the data "
            "with --data, or leave --text-column and --label-column out."
        )
    run = load_run(folder)
    if max_new_tokens is not None and run.problem is not NEXT_WORDS:
        raise FastpeftError(
            f"`max_new_tokens` is {max_new_tokens}, but the run in {str(folder)!r} generates no text. Leave it out."
        )
    kept = RunFolder(folder)
    trained_on, metrics = kept.trained_on(), kept.metrics()
    config, warnings = run.config, []
    if data is not None:
        dev = load_rows(
            data,
            run.labels,
            run.problem,
            text_column=text_column,
            label_column=label_column,
            trained_with=(config.text_column, config.label_column),
            found=run.columns,
        )
        known = metrics.get("most_frequent_class", {})
        always = known.get("classes") or [known.get("class")]
        frequent = [run.labels.index(name) for name in always] if {*always} <= {*run.labels} else None
    else:
        own = _own_data(run, folder)
        dev = own.dev
        if not kept.has_rows(own.fingerprint):
            warnings = result_warnings.of_changed_rows(config.data)
        frequent = most_frequent(own.train.labels, own.problem)
    _check_form(run, folder, dev, data)
    return _measure(run, dev, frequent, trained_on, max_new_tokens, warnings).metrics


def _own_data(run: FinishedRun, folder: str | Path) -> TextData:
    """The data that a run learned from, as it is now; refused where it has other classes."""
    config = run.config
    own = data_for(config if config.objective else replace(config, problem_type=run.problem.short))
    if own.labels != run.labels:  # the indices of other classes would be compared with what the run says
        raise FastpeftError(
            f"the run in {str(folder)!r} learned the {run.problem.labels} {', '.join(run.labels)}, but its data "
            f"{config.data!r} has {', '.join(own.labels)} now. Restore that data, or name rows with --data."
        )
    return own


def _check_form(run: FinishedRun, folder: str | Path, dev: Examples, data: str | Path | None) -> None:
    """Raise `FastpeftError` unless rows, of `data` or of the run's own, have the form of those that the run learned."""
    if (dev.is_pair, dev.are_conversations) == (run.is_pair, run.chats):
        return
    learned = "conversations" if run.chats else "pairs of texts" if run.is_pair else "one text a row"
    here = f"{data!r} has {texts_in_words(dev)}. Name the columns that are meant with --text-column."
    if data is None:
        here = f"{run.config.data!r} has {texts_in_words(dev)} now. Restore that data, or name rows with --data."
    raise FastpeftError(f"the run in {str(folder)!r} learned from {learned}, but {here}")


def evaluate_causal_lm(
    model: str, data: str | Path, *, text_column: str | None = None, max_new_tokens: int | None = None
) -> dict[str, Any]:
    """What `evaluate` gives of a run on next words, of a decoder (`"demo"`, a folder or a hub id) with no training."""
    dev = load_rows(data, [], NEXT_WORDS, text_column=text_column)
    report("loading the model")
    loaded = load_for_next_words(model)
    put(loaded.model.eval(), best_device())
    untrained = FinishedRun(
        loaded,
        TrainConfig(output=model, method="full", model=model, objective="causal"),
        NEXT_WORDS,
        labels=[],
        is_pair=dev.is_pair,
        chats=dev.are_conversations,
        max_length=min(DEFAULT_MAX_LENGTH_CAUSAL, loaded.max_length),
    )
    return _measure(untrained, dev, None, max_new_tokens=max_new_tokens).metrics


def evaluate_zero_shot(
    model: str, prompt: Prompt, data: str | Path | TextData, *, calibrate: bool = False
) -> dict[str, Any]:
    """Metrics and loss of a language model by a prompt, with no training, on the dev rows of `data`.

    Beside these it has what `evaluate` gives of a run: `dev_rows`, what there is of classes, and `warnings`.

    Args:
        model: `"demo"`, a folder or a hub id.
        prompt: template and label words.
        data: rows with classes that are loaded, or what `load_data` takes: all rows of a file, or the dev part.
        calibrate: subtract what the label words score for an empty text.

    Raises:
        FastpeftError: model or data cannot be loaded, or the prompt does not fit them.
    """
    texts = data if isinstance(data, TextData) else load_classes(data, split=False)
    return answer_zero_shot(model, prompt, texts, calibrate=calibrate)[0]


def load_classes(
    data: str | Path, text_column: str | None = None, label_column: str | None = None, *, split: bool = True
) -> TextData:
    """What a prompt without training is measured on: `load_data` of classes."""
    return load_data(
        data, problem_type=CLASSIFICATION.name, text_column=text_column, label_column=label_column, split=split
    )


def zero_shot_prompt(
    prompt: str, label_words: str | None, model: str, texts: TextData, *, calibrate: bool
) -> tuple[Prompt, dict[str, Any] | None]:
    """The prompt that is written on a command line, and for `auto` what was found on training rows of `texts`."""
    parsed = parse_prompt(prompt, label_words)  # refuses words beside auto
    if not is_auto(prompt):
        assert parsed is not None
        return parsed, None
    found = find_prompt(model, texts, calibrate=calibrate, max_length=DEFAULT_MAX_LENGTH)
    return found.prompt, found.values()


def answer_zero_shot(
    model: str, prompt: Prompt, texts: TextData, *, calibrate: bool
) -> tuple[dict[str, Any], list[int]]:
    """What `evaluate_zero_shot` gives, and the class that is answered to each dev row."""
    check_texts(prompt, texts.dev)
    prompt = prompt.for_labels(texts.labels)
    loaded = load_prompted(model, prompt)
    put(loaded.model.eval(), best_device())
    if calibrate:
        loaded.model.calibrate()
    untrained = FinishedRun(
        loaded,
        TrainConfig(output=model, method="full", model=model),
        texts.problem,
        texts.labels,
        is_pair=texts.dev.is_pair,
        chats=False,
        max_length=min(DEFAULT_MAX_LENGTH, loaded.max_length),
        prompt=prompt,
    )
    found = _measure(untrained, texts.dev, most_frequent(texts.train.labels, texts.problem))
    return found.metrics, found.outputs.argmax(-1).tolist()


@dataclass(frozen=True)
class _Measured:
    """What `evaluate` gives, and the model's outputs."""

    metrics: dict[str, Any]
    outputs: np.ndarray


def _measure(
    run: FinishedRun,
    dev: Examples,
    frequent: Sequence[int] | None,
    trained_on: Set[str] = frozenset(),
    max_new_tokens: int | None = None,
    warnings: Sequence[str] = (),
) -> _Measured:
    """Measure a run, or a model as one that did not train, on rows, of which `frequent` is the most frequent class."""
    problem = run.problem
    generates = problem is NEXT_WORDS and max_new_tokens != 0
    generator = TextGenerator(run, max_new_tokens) if generates else None  # refuses before anything is measured
    rows, cut = run.encoder.encode_counted(dev)
    run.encoder.warn_of_texts(dev, rows)
    if problem is MASKED_WORDS:
        rows = Masker(run.loaded.tokenizer).fixed(rows)
    join = _padded if problem.per_token else np.stack
    outputs, labels = join(outputs_of(run, rows)), join([np.array(row["labels"]) for row in rows])
    scores = problem.score(outputs, labels, run.labels)
    if LOSS not in scores:
        assert problem.loss is not None  # which is so where the score has it
        scores[LOSS] = problem.loss(outputs, labels)
    measured = {**scores, **describe(problem, outputs, labels, run.labels, frequent)}
    if generator is not None:
        measured |= measure_generations(generator, dev.texts)
    told = [
        *warnings,
        *dev.warnings,
        *result_warnings.of_dev_rows(problem, dev.texts, trained_on, outputs, labels, run.labels),
        *result_warnings.of_cut_texts(cut, len(dev), len(dev) - len(rows), run.max_length),
    ]
    result_warnings.tell(told)
    return _Measured({**measured, "dev_rows": len(rows), "warnings": told}, outputs)


def _padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of tokens as one array, in which the shorter ones are filled up as transformers does."""
    tokens = [torch.from_numpy(row) for row in rows]
    return pad_sequence(tokens, batch_first=True, padding_value=UNLABELLED).numpy()
