"""What a finished run says of texts: the class, the number, the tags or the words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastpeft.data import result_warnings
from fastpeft.data.batches import compute_by_length, eval_limits
from fastpeft.data.examples import Examples
from fastpeft.data.names import UNLABELLED
from fastpeft.data.problems import MASKED_WORDS, MULTI_LABEL, NEXT_WORDS, REGRESSION
from fastpeft.data.token_rows import TokenRow
from fastpeft.data.values import refuse_empty
from fastpeft.errors import FastpeftError, refuse
from fastpeft.ops.fused_head import making_no_logits
from fastpeft.prompts.template import is_text, refuse_one_text
from fastpeft.support.stages import report
from fastpeft.training.encoding import collator
from fastpeft.training.generation import generate, generates_text
from fastpeft.training.loading import EncodedText, FinishedRun, load_run


class Predictor:
    """A finished run in use. Each text is read and answered by itself, so that one cannot stop another.

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
        self.run = run = load_run(folder, device)
        refuse(
            {
                f"the run in {str(folder)!r} is of a causal language model and predicts no classes. Let it generate "
                f"text: fastpeft predict {folder}.": run.problem is NEXT_WORDS,
                f"the run in {str(folder)!r} is of a masked language model and predicts no classes. Train a run from "
                f"it on labelled texts: --init-from {folder}.": run.problem is MASKED_WORDS,
                f"`max_length` is {max_length!r}; it must be a whole number. Give one, or None.": (
                    max_length is not None and type(max_length) is not int
                ),
            }
        )
        if max_length is not None:
            special = run.loaded.tokenizer.num_special_tokens_to_add(run.is_pair)
            if max_length <= special:
                raise FastpeftError(
                    f"`max_length` is {max_length}, but the run in {str(folder)!r} reads {special} special tokens "
                    f"around each text. Give {special + 1} or more."
                )
            self.run = replace(run, max_length=min(max_length, run.max_length))

    def encode(self, text: Any) -> EncodedText:
        """A text, as `predict` takes one, as tokens."""
        run = self.run
        given = _as_input(text, run)
        # what the text would be labelled with; where words have tags, the labels show which tokens to read
        none: list[Any] = [list(range(len(given))) if run.problem.per_token else 0]
        (row,) = run.encoder.encode(Examples([given], none))
        if run.problem.per_token:
            _word_tokens(row, given, run.max_length)
        return EncodedText(given, row)

    def count_cut(self, encoded: Sequence[EncodedText]) -> int:
        """How many of these texts go on after what the run reads of them; of words with tags `encode` refuses such."""
        if self.run.problem.per_token:
            return 0
        texts = Examples([text for text, _ in encoded], [0] * len(encoded))
        return self.run.encoder.count_cut(texts, [row for _, row in encoded])

    def scores(self, encoded: Sequence[EncodedText]) -> list[np.ndarray]:
        """Of each text the probability of every class or label, `(classes,)`; its number, `(1,)`; or of every word
        those of the tags, `(words, tags)`."""
        return self.scores_of(encoded, outputs_of(self.run, [row for _, row in encoded]))

    def scores_of(self, encoded: Sequence[EncodedText], outputs: list[np.ndarray]) -> list[np.ndarray]:
        """What `scores` gives, of the model's outputs for each text: `(outputs,)`, or `(T, outputs)` of its tokens."""
        problem = self.run.problem
        _check_finite(outputs, self.run)
        if problem.per_token:
            outputs = [
                output[_word_tokens(row, words, self.run.max_length)] for output, (words, row) in zip(outputs, encoded)
            ]
        if problem is REGRESSION:
            return outputs
        logits = [torch.from_numpy(output).double() for output in outputs]
        return [(each.sigmoid() if problem is MULTI_LABEL else each.softmax(-1)).numpy() for each in logits]

    def answer(self, scores: np.ndarray) -> Any:
        """What `predict` returns for a text, or for one of its words, given the scores of that."""
        run = self.run
        if run.problem is MULTI_LABEL:
            return [(name, float(p)) for name, p in zip(run.labels, scores) if p > 0.5]
        best = int(scores.argmax())
        return run.labels[best], float(scores[best])


def predict(folder: str | Path, texts: Sequence[Any]) -> list[Any]:
    """The predictions of a finished run for texts; for the rows of a file see `fastpeft.training.prediction_files`.

    Args:
        folder: folder of the run.
        texts: strings; for a run on pairs (first, second), or strings in which a tab separates the two; for a run on
            words with tags lists of words, or strings in which spaces separate them.

    Returns:
        For each text its most likely class and the probability of that; for a run on numbers the name of the number
        and its value; for a run on tags a list with the most likely tag of every word and the probability of that; for
        a run on several labels a list of those that are answered, which may be empty, each with its probability; for a
        run on next words what it generates, see `fastpeft.training.generation.TextGenerator`. How many texts were
        longer than the run reads is logged.

    Raises:
        FastpeftError: as `Predictor`; or `texts` is one text, whose characters would be taken for texts; or one of
            them is not what the run reads.
    """
    refuse_one_text(texts)
    if generates_text(folder):
        return generate(folder, texts)
    predictor = Predictor(folder)
    encoded = [predictor.encode(text) for text in texts]
    result_warnings.tell(
        result_warnings.of_cut_texts(predictor.count_cut(encoded), len(encoded), 0, predictor.run.max_length)
    )
    found = predictor.scores(encoded)
    if predictor.run.problem.per_token:
        return [[predictor.answer(word) for word in scores] for scores in found]
    return [predictor.answer(scores) for scores in found]


def _word_tokens(row: TokenRow, words: Sequence[str], max_length: int) -> list[int]:
    """The first token of every word, given that a row's labels number its words."""
    tokens = [index for index, word in enumerate(row["labels"]) if word != UNLABELLED]
    if len(tokens) < len(words):
        if len(row["input_ids"]) < max_length:
            missing = next(index for index in range(len(words)) if index not in set(row["labels"]))
            raise FastpeftError(f"the tokenizer makes no token of the word {words[missing]!r}. Remove the word.")
        raise FastpeftError(
            f"of the {len(words)} words that begin with {' '.join(words[:3])!r}, only {len(tokens)} fit into the "
            f"{max_length} tokens that the run reads. Give shorter texts."
        )
    return tokens


def _as_input(text: Any, run: FinishedRun) -> Any:
    """One text as `Examples` holds it."""
    if isinstance(text, str):
        refuse_empty(text)
    expected = "one text"
    if run.is_pair:
        expected = "two texts, as a pair or separated by a tab"
        # a pair that comes as one is read as in training, with its spaces
        parts = [part.strip() for part in text.split("\t")] if isinstance(text, str) else text
        if isinstance(parts, (tuple, list)) and len(parts) == 2 and all(map(is_text, parts)):
            refuse_empty(*parts)
            return tuple(parts)
    elif run.problem.per_token:
        expected = "words, as a list or separated by spaces"
        words = text.split() if isinstance(text, str) else text
        if isinstance(words, list) and words and all(is_text(word) and word.strip() for word in words):
            return words
    elif is_text(text):
        return text
    raise FastpeftError(f"the run reads {expected}; got {text!r}. Give it so, in UTF-8.")


@torch.inference_mode()
def outputs_of(run: FinishedRun, rows: Sequence[TokenRow]) -> list[np.ndarray]:
    """The outputs to score of each row in float32: `(outputs,)`, or `(T, outputs)` where every token has some."""
    collate = collator(run.loaded.tokenizer, run.problem)
    model = run.loaded.model
    found: dict[int, np.ndarray] = {}

    def compute(chosen: list[int]) -> None:
        report("answering", len(found), len(rows))
        batch = collate([rows[i] for i in chosen]).to(model.device)
        labels = batch.pop("labels")
        with run.autocast():
            logits = model(**batch).logits
        if run.problem.digest is not None:
            logits = run.problem.digest(logits, labels)
        outputs = logits.float().cpu().numpy()
        masks = batch["attention_mask"].bool().cpu().numpy()
        per_token = run.problem.per_token
        found.update((i, each[mask] if per_token else each) for i, each, mask in zip(chosen, outputs, masks))

    with making_no_logits(model) if run.problem.digest is not None else nullcontext():
        compute_by_length(compute, rows, *eval_limits(run.problem, run.config.batch_size))
    _check_finite(found.values(), run)
    return [found[i] for i in range(len(rows))]


def _check_finite(outputs: Iterable[np.ndarray], run: FinishedRun) -> None:
    if not all(np.isfinite(each).all() for each in outputs):
        raise FastpeftError(
            f"the model of the run in {run.config.output!r} gives outputs that are not finite: its weights or those of "
            "its base are damaged. Restore them, or train anew."
        )


def shortest(value: float) -> float:
    """A float32 by the fewest digits that tell it."""
    return float(str(np.float32(value)))
