"""What a finished run is good for: measuring it again, and using it on texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastpeft.data import pitfalls
from fastpeft.data.examples import Examples, Row, TextData, load_data, load_rows, texts_in_words
from fastpeft.data.masking import Masker
from fastpeft.data.models import load_for_next_words
from fastpeft.data.problems import (
    CLASSIFICATION,
    LOSS,
    MASKED_WORDS,
    MULTI_LABEL,
    NEXT_WORDS,
    REGRESSION,
    UNLABELLED,
    Problem,
    describe,
    most_frequent,
)
from fastpeft.data.splitting import STRATIFIED
from fastpeft.errors import FastpeftError
from fastpeft.prompts.model import load_prompted
from fastpeft.prompts.named import is_auto, parse_prompt
from fastpeft.prompts.template import Prompt, is_text
from fastpeft.support.stages import report
from fastpeft.training.config import TrainConfig
from fastpeft.training.encoding import DEFAULT_MAX_LENGTH, LONGEST_SAID, collator, encode, warn_of_texts
from fastpeft.training.generation import Writer, measure_said, says_words, write
from fastpeft.training.loading import FinishedRun, Taken, best_device, load_run
from fastpeft.training.prompt_search import find_prompt
from fastpeft.training.run_folder import RunFolder
from fastpeft.training.setup import check_texts
from fastpeft.training.task import data_for

_BATCH_SIZE = 64


def evaluate(
    folder: str | Path,
    data: str | None = None,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    max_new_tokens: int | None = None,
) -> dict[str, Any]:
    """Metrics and loss of a finished run on its own dev rows, or on the rows of `data`, and `dev_rows`, their number.

    Of a run on next words also what `measure_said` gives, where rows have prompts. Beside these it has what
    `metrics.json` has of classes, see `fastpeft.data.problems.describe`, and `warnings`, which are logged too: what
    makes the figures doubtful, as rows that the run was trained on.

    Args:
        folder: folder of the run.
        data: other data: all rows of a file, or the dev part of anything else.
        text_column, label_column: columns of `data`; without it none. None: found by their names.
        max_new_tokens: the most tokens that a run on next words says to a prompt, see `Writer`; 0 lets it say
            nothing.

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
            f"`max_new_tokens` is {max_new_tokens}, but the run in {str(folder)!r} says no words. Leave it out."
        )
    trained_on, known = RunFolder(folder).trained_on(), RunFolder(folder).metrics().get("most_frequent_class", {})
    told = known.get("classes") or [known.get("class")]
    frequent = [run.labels.index(name) for name in told] if {*told} <= {*run.labels} else None
    config = run.config
    if data is not None:
        dev = load_rows(data, run.labels, run.problem, text_column=text_column, label_column=label_column)
    else:
        own = data_for(replace(config, problem_type=run.problem.name, objective=None))
        if own.labels != run.labels:  # the indices of other classes would be compared with what the run says
            raise FastpeftError(
                f"the run in {str(folder)!r} learned the {run.problem.labels} {', '.join(run.labels)}, but its data "
                f"{config.data!r} has {', '.join(own.labels)} now. Restore that data, or name rows with --data."
            )
        dev = own.dev
        frequent = most_frequent(own.train.labels, own.problem)
    if (dev.is_pair, dev.are_conversations) != (run.is_pair, run.chats):
        learned = "conversations" if run.chats else "pairs of texts" if run.is_pair else "one text a row"
        remedy = "Name the columns that are meant with --text-column."
        if data is None:
            remedy = "Restore that data, or name rows with --data."
        raise FastpeftError(
            f"the run in {str(folder)!r} learned from {learned}, but {data or config.data!r} has {texts_in_words(dev)}"
            f"{' now' if data is None else ''}. {remedy}"
        )
    measured = _evaluate(run, dev, trained_on, frequent, max_new_tokens)
    threshold = {name: RunFolder(folder).metrics().get(name) for name in ("threshold", "threshold_rows")}
    return {**measured, **(threshold if run.threshold is not None else {})}


def evaluate_words(
    model: str, data: str, *, text_column: str | None = None, max_new_tokens: int | None = None
) -> dict[str, Any]:
    """What `evaluate` gives of a run on next words, of a decoder with no training.

    Args:
        model: `"demo"`, a folder or a hub id.
        data: all rows of a file, or the dev part of anything else.
        text_column, max_new_tokens: as for `evaluate`.

    Raises:
        FastpeftError: model or data cannot be loaded.
    """
    dev = load_rows(data, [], NEXT_WORDS, text_column=text_column)
    report("loading the model")
    classifier = load_for_next_words(model)
    classifier.model.eval().to(best_device())
    untrained = FinishedRun(
        classifier,
        TrainConfig(output=model, method="full", model=model, objective="causal"),
        NEXT_WORDS,
        labels=[],
        is_pair=dev.is_pair,
        chats=dev.are_conversations,
        prompt=None,
        max_length=min(LONGEST_SAID, classifier.max_length),
        threshold=None,
    )
    return _evaluate(untrained, dev, set(), None, max_new_tokens)


def _evaluate(
    run: FinishedRun,
    dev: Examples,
    trained_on: Set[str],
    frequent: Sequence[int] | None,
    max_new_tokens: int | None,
) -> dict[str, Any]:
    """What `evaluate` gives, but for the threshold."""
    rows = encode(run.classifier.tokenizer, dev, run.max_length, run.prompt, run.problem)
    warn_of_texts(dev, rows, run.classifier.tokenizer, run.max_length, run.prompt, run.problem)
    if run.problem is MASKED_WORDS:
        rows = Masker(run.classifier.tokenizer).fixed(rows)
    join = np.concatenate if run.problem.per_token else np.stack
    outputs, labels = join(_outputs(run, rows)), join([np.array(row["labels"]) for row in rows])
    measured = _measure(run.problem, dev, trained_on, outputs, labels, run.labels, frequent, run.threshold)
    if run.problem is NEXT_WORDS and max_new_tokens != 0:
        measured |= measure_said(Writer(run, max_new_tokens), dev.texts)
    pitfalls.tell(measured["warnings"])
    return {**measured, "dev_rows": len(rows)}


def evaluate_zero_shot(
    model: str,
    prompt: Prompt,
    data: str | TextData,
    *,
    calibrate: bool = False,
) -> dict[str, Any]:
    """Metrics and loss of a masked language model by a prompt, with no training, on the dev rows of `data`.

    Args:
        model: `"demo"`, a folder or a hub id.
        prompt: template and label words.
        data: rows with classes that are loaded, or what `load_data` takes; where that has no dev part, its rows are
            those that a run holds out.
        calibrate: subtract what the label words score for an empty text.

    Raises:
        FastpeftError: model or data cannot be loaded, or the prompt does not fit them.
    """
    texts = data if isinstance(data, TextData) else load_classes(data)
    return measure_classes(zero_shot_outputs(model, prompt, texts, calibrate=calibrate), texts)


def load_classes(
    data: str, text_column: str | None = None, label_column: str | None = None, split: str = STRATIFIED
) -> TextData:
    """What a prompt without training is measured on: `load_data` of classes."""
    return load_data(
        data, problem_type=CLASSIFICATION.name, text_column=text_column, label_column=label_column, split=split
    )


def zero_shot_prompt(
    prompt: str, label_words: str | None, model: str, texts: TextData, *, calibrate: bool = False
) -> tuple[Prompt | None, dict[str, Any] | None]:
    """The prompt for `evaluate_zero_shot` that is written on a command line; `auto` is found on training rows.

    Args:
        prompt, label_words: as `parse_prompt` takes them.
        model, calibrate: as `evaluate_zero_shot` takes them.
        texts: where `auto` is found.

    Returns:
        The prompt, None for `none`; and what was found for `auto`, as `FoundPrompt.values` gives it, else None.

    Raises:
        FastpeftError: the prompt cannot be used; or one cannot be found, see `find_prompt`.
    """
    if not is_auto(prompt):
        return parse_prompt(prompt, label_words), None
    parse_prompt(prompt, label_words)  # refuses words beside it
    found = find_prompt(model, texts, calibrate=calibrate, max_length=DEFAULT_MAX_LENGTH)
    return found.prompt, found.values()


def zero_shot_outputs(model: str, prompt: Prompt, texts: TextData, *, calibrate: bool = False) -> np.ndarray:
    """What a masked language model scores for each class, `(dev rows, classes)`; as `evaluate_zero_shot`."""
    check_texts(prompt, texts.dev)
    classifier = load_prompted(model, prompt.for_labels(texts.labels))
    prompted = classifier.model.eval().to(best_device())
    if calibrate:
        prompted.calibrate()
    limit = min(DEFAULT_MAX_LENGTH, classifier.max_length)
    return prompted.predict_logits(texts.dev.texts, max_length=limit).cpu().numpy()


def measure_classes(outputs: np.ndarray, texts: TextData) -> dict[str, Any]:
    """What `evaluate` gives, of outputs `(dev rows, classes)` on the dev rows of `texts`, with no training."""
    labels, frequent = np.array(texts.dev.labels), most_frequent(texts.train.labels, texts.problem)
    return _measure(texts.problem, texts.dev, set(), outputs, labels, texts.labels, frequent)


def _measure(
    problem: Problem,
    dev: Examples,
    trained_on: Set[str],
    outputs: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    frequent: Sequence[int] | None,
    threshold: float | None = None,
) -> dict[str, Any]:
    """The metrics of a problem, the loss, the number of rows, what there is of classes, and warnings."""
    raw, outputs = outputs, problem.decided(outputs, threshold)
    scores = problem.score(outputs, labels, names)
    if LOSS not in scores:
        assert problem.loss is not None  # which is so where the score has it
        scores[LOSS] = problem.loss(raw, labels)
    warnings = pitfalls.of_dev_rows(problem, dev.texts, trained_on, outputs, labels, names)
    described = describe(problem, outputs, labels, names, frequent)
    return {**scores, "dev_rows": len(dev), **described, "warnings": warnings}


class Predictor:
    """A finished run in use: what it makes of one text is read and answered apart, so that one cannot stop another.

    Args:
        folder: folder of the run.
        device: where to put its model. None: the best there is.
        max_length: where to cut texts that the run would read further, in tokens.

    Attributes:
        run: the run, with its model.

    Raises:
        FastpeftError: as `load_run`; the run learned masked words, so that there is nothing to say of a text; or
            `max_length` leaves no room for one.
    """

    def __init__(self, folder: str | Path, device: str | None = None, max_length: int | None = None) -> None:
        self.run = load_run(folder, device)
        if max_length is not None:
            special = self.run.classifier.tokenizer.num_special_tokens_to_add(self.run.is_pair)
            if max_length <= special:
                raise FastpeftError(
                    f"`max_length` is {max_length}, but the run in {str(folder)!r} reads {special} special tokens "
                    f"around each text. Give {special + 1} or more."
                )
            self.run = replace(self.run, max_length=min(max_length, self.run.max_length))
        if self.run.problem is NEXT_WORDS:
            raise FastpeftError(
                f"the run in {str(folder)!r} learned next words and has no classes to tell. It goes on from texts: "
                f"fastpeft predict {folder}."
            )
        if self.run.problem is MASKED_WORDS:
            raise FastpeftError(
                f"the run in {str(folder)!r} learned masked words and has no classes to tell. Train another from it on "
                f"labelled texts: --init-from {folder}."
            )

    def take(self, text: Any) -> Taken:
        """A text, as `predict` takes one, made ready.

        Raises:
            FastpeftError: it is not what the run reads.
        """
        run = self.run
        given = _as_input(text, run)
        # what the text would be labelled with; where words have tags, the labels show which tokens to read
        none: list[Any] = [list(range(len(given))) if run.problem.per_token else 0]
        (row,) = encode(run.classifier.tokenizer, Examples([given], none), run.max_length, run.prompt, run.problem)
        if run.problem.per_token:
            _word_tokens(row, given, run.max_length)
        return Taken(given, row)

    def scores(self, taken: Sequence[Taken]) -> list[np.ndarray]:
        """Of each text the probability of every class or label, `(classes,)`; its number, `(1,)`; or of every word
        those of the tags, `(words, tags)`; float32."""
        return self.scores_of(taken, _outputs(self.run, [row for _, row in taken]))

    def scores_of(self, taken: Sequence[Taken], outputs: list[np.ndarray]) -> list[np.ndarray]:
        """What `scores` gives, of the model's outputs for each text: `(outputs,)`, or `(T, outputs)` of its tokens.

        Raises:
            FastpeftError: an output is not finite.
        """
        problem = self.run.problem
        _check_finite(outputs, self.run)
        if problem.per_token:
            outputs = [
                output[_word_tokens(row, words, self.run.max_length)] for output, (words, row) in zip(outputs, taken)
            ]
        if problem is REGRESSION:
            return outputs
        if problem is MULTI_LABEL:
            return [torch.from_numpy(output).sigmoid().numpy() for output in outputs]
        return [torch.from_numpy(output).softmax(-1).numpy() for output in outputs]

    def answer(self, scores: np.ndarray) -> Any:
        """What `predict` returns for a text, or for one of its words, given the scores of that."""
        run = self.run
        if run.problem is MULTI_LABEL:
            return [(name, float(p)) for name, p in zip(run.labels, scores) if p > (run.threshold or 0.5)]
        best = int(scores.argmax() if run.threshold is None else scores[1] > run.threshold)
        return run.labels[best], float(scores[best])


def predict(folder: str | Path, texts: Sequence[Any]) -> list[Any]:
    """What a finished run says of each text; of the rows of a file, see `fastpeft.training.prediction`.

    Args:
        folder: folder of the run.
        texts: strings; for a run on pairs (first, second), or strings in which a tab separates the two; for a run on
            words with tags lists of words, or strings in which spaces separate them.

    Returns:
        For each text its most likely class and the probability of that; for a run on numbers the name of the number
        and its value; for a run on tags a list with the most likely tag of every word and the probability of that; for
        a run on several labels a list of those that are answered, which may be empty, each with its probability; for a
        run on next words what it says, see `fastpeft.training.generation.Writer`. Where the run has a threshold, it
        decides between two classes, and which labels are answered.

    Raises:
        FastpeftError: as `Predictor`; or `texts` is one text, whose characters would be taken for texts; or one of
            them is not what the run reads.
    """
    if isinstance(texts, str):
        raise FastpeftError(f"texts is one text, {texts!r}; it must be a sequence of texts. Give [{texts!r}].")
    if says_words(folder):
        return write(folder, texts)
    predictor = Predictor(folder)
    found = predictor.scores([predictor.take(text) for text in texts])
    if predictor.run.problem.per_token:
        return [[predictor.answer(word) for word in scores] for scores in found]
    return [predictor.answer(scores) for scores in found]


def _word_tokens(row: Row, words: Sequence[str], max_length: int) -> list[int]:
    """The first token of every word, given that a row's labels number its words."""
    tokens = [index for index, word in enumerate(row["labels"]) if word != UNLABELLED]
    if len(tokens) < len(words):
        if len(row["input_ids"]) < max_length:
            missing = next(index for index in range(len(words)) if index not in set(row["labels"]))
            raise FastpeftError(f"the model has no token for the word {words[missing]!r}. Leave it out.")
        raise FastpeftError(
            f"of the {len(words)} words that begin with {' '.join(words[:3])!r}, only {len(tokens)} fit into the "
            f"{max_length} tokens that the run reads. Give shorter texts."
        )
    return tokens


def _as_input(text: Any, run: FinishedRun) -> Any:
    """One text as `Examples` holds it."""
    expected = "one text"
    if run.is_pair:
        expected = "two texts, as a pair or separated by a tab"
        parts = text.split("\t") if isinstance(text, str) else text
        if isinstance(parts, (tuple, list)) and len(parts) == 2 and all(map(is_text, parts)):
            return parts[0].strip(), parts[1].strip()
    elif run.problem.per_token:
        expected = "words, as a list or separated by spaces"
        words = text.split() if isinstance(text, str) else text
        if isinstance(words, list) and words and all(is_text(word) and word.strip() for word in words):
            return words
    elif is_text(text):
        return text
    raise FastpeftError(f"the run reads {expected}; got {text!r}. Give it so, in UTF-8.")


@torch.inference_mode()
def _outputs(run: FinishedRun, rows: Sequence[Row]) -> list[np.ndarray]:
    """The outputs to score of each row in float32: `(outputs,)`, or `(T, outputs)` where every token has some."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))  # pads little
    collate = collator(run.classifier.tokenizer, run.problem)
    model = run.classifier.model
    found: dict[int, np.ndarray] = {}
    size = _BATCH_SIZE if run.problem.digest is None else run.config.batch_size  # outputs over the vocabulary are large
    for start in range(0, len(rows), size):
        report("answering", start, len(rows))
        chosen = order[start : start + size]
        batch = collate([rows[i] for i in chosen]).to(model.device)
        labels = batch.pop("labels")
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bool(run.config.bf16)):
            logits = model(**batch).logits
        if run.problem.digest is not None:
            logits = run.problem.digest(logits, labels)
        outputs = logits.float().cpu().numpy()
        masks = batch["attention_mask"].bool().cpu().numpy()
        found |= {
            i: output[mask] if run.problem.per_token else output for i, output, mask in zip(chosen, outputs, masks)
        }
    _check_finite(found.values(), run)
    return [found[i] for i in range(len(rows))]


def _check_finite(outputs: Iterable[np.ndarray], run: FinishedRun) -> None:
    if not all(np.isfinite(each).all() for each in outputs):
        raise FastpeftError(
            f"the model of the run in {run.config.output!r} gives outputs that are not finite: its weights or those of "
            "its base are damaged. Restore them, or train anew."
        )
