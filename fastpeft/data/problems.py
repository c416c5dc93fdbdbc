"""Kinds of problem: what each asks of a model's head, of the rows, and how well it was answered.

NumPy is imported where something is computed: the command line knows the kinds before that.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from fastpeft.data.names import LOSS, UNLABELLED
from fastpeft.errors import FastpeftError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

T = TypeVar("T")

LESS_IS_BETTER = (LOSS, "mse", "perplexity")  # of what is measured
_MOST_IN_MATRIX = 200  # classes of a confusion matrix

ACCURACY = "accuracy"


@dataclass(frozen=True)
class Metric:
    """How what is measured is shown: its title, one for a column, its format, and what a report says of it."""

    title: str
    column: str = ""
    format: str = ".3f"
    note: str = ""


# what is measured beside the loss, by the names in `metrics.json`, in the order of a report's columns
METRICS = {
    ACCURACY: Metric("accuracy", note="on all dev rows, with the weights that the run kept"),
    "f1": Metric("F1", note="of the second of two classes, else the macro average over the classes of the dev rows"),
    "micro_f1": Metric("micro F1", note="over all labels of all rows together"),
    "macro_f1": Metric("macro F1", note="the mean over labels"),
    "subset_accuracy": Metric("subset accuracy", note="the share of rows with all labels right"),
    "ranking_precision": Metric("label ranking average precision", "LRAP"),
    "word_f1": Metric("word F1", note="the macro average over tags, without O"),
    "entity_f1": Metric("entity F1", note="the micro average over entities; span and type must match"),
    "matthews": Metric("Matthews correlation", "Matthews"),
    "pearson": Metric("Pearson correlation", "Pearson"),
    "spearman": Metric("Spearman correlation", "Spearman"),
    "mse": Metric("mean squared error", "MSE", ".3g"),
    "masked_accuracy": Metric("masked-token accuracy", note="on the masked tokens of the dev texts"),
    "next_accuracy": Metric("next-token accuracy", note="on the tokens of the dev texts that count in the loss"),
    "perplexity": Metric("perplexity", format=".3g", note="on the same tokens"),
    "bleu": Metric("BLEU"),
    "rouge_l": Metric("ROUGE-L"),
}
TITLES = {name: metric.title for name, metric in METRICS.items()}


@dataclass(frozen=True)
class Problem:
    """One kind of problem.

    Attributes:
        name: as files have it, and transformers' configurations where it is of whole texts.
        short: as given to `--problem-type`, and as messages call it.
        task_type: what PEFT calls it; None where it has no word for it.
        labels: what the labels are, in words.
        metrics: names of what is measured; the first is the one to look at.
        score: those metrics of outputs `(N, outputs)` and labels `(N,)`, given the names of the outputs; of tokens
            `(N, T, outputs)` and `(N, T)` do as well, and those without a label are left out; of several labels a row,
            labels are `(N, outputs)`, 1 for those that it has and else 0. A loss among them is in place of the mean
            over batches.
        has_classes: whether outputs are those of classes, of a text or of each word, or of labels.
        of_texts_alone: whether texts are learned, without labels.
        per_token: whether tokens have labels, so that a row's outputs are `(T, outputs)`.
        loss: the mean over rows, or over labelled tokens, that training lowers, of the same outputs and labels. None:
            `score` has it.
        tested: the metric that paired tests compare: `sum(a) / sum(b)` of two numbers a row. None: none has that form.
        parts: those two numbers of every row, `(N, 2)`, of the same outputs and labels.
        digest: makes the outputs that `score` takes of logits `(B, T, words)` and labels `(B, T)`, where logits are too
            many to be kept. None: they are the logits.
    """

    name: str
    short: str
    task_type: str | None
    labels: str
    metrics: tuple[str, ...]
    score: Callable[[np.ndarray, np.ndarray, Sequence[str]], dict[str, float]]
    has_classes: bool = False
    of_texts_alone: bool = False
    per_token: bool = False
    loss: Callable[[np.ndarray, np.ndarray], float] | None = None
    tested: str | None = None
    parts: Callable[[np.ndarray, np.ndarray, Sequence[str]], np.ndarray] | None = None
    digest: Callable[[Tensor, Tensor], Tensor] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return get_problem, (self.name,)  # what another process is sent becomes this one again

    @property
    def primary(self) -> str:
        """The metric to look at where a person names none."""
        return self.metrics[0]

    @property
    def chosen_by(self) -> str:
        """The metric by which the best of several runs is chosen: that which a paired test can tell them apart by."""
        return self.tested or self.primary

    def answers(self, outputs: np.ndarray) -> np.ndarray:
        """The classes `(N,)` that outputs `(N, outputs)` come to; of labels 1 for those that are given, else 0."""
        return (outputs > 0).astype("int64") if self is MULTI_LABEL else outputs.argmax(-1)

    def check_metric(self, metric: str) -> None:
        """Raise `FastpeftError` unless `metric` is measured here."""
        allowed = (*self.metrics, LOSS)
        if metric not in allowed:
            raise FastpeftError(
                f"the metric {metric!r} is not measured in {self.short}; allowed are {', '.join(allowed)}. Choose one "
                "of these."
            )


def best_of(measured: Sequence[tuple[T, float]], metric: str) -> T:
    """What had the best value of `metric`, the first of equals, given what was measured and the values."""
    choose = min if metric in LESS_IS_BETTER else max
    return choose(measured, key=lambda point: point[1])[0]


def title_of(name: str) -> str:
    """A measure of `metrics.json` in words; the loss, and what is not known, by the name itself."""
    return TITLES.get(name, name)


def in_order(metrics: Mapping[str, Any]) -> list[str]:
    """The names of what was measured, given the values of a `metrics.json` in its order: what was chosen by first."""
    chosen_by = metrics.get("metric")
    return sorted((name for name in metrics if name in TITLES or name == chosen_by), key=lambda name: name != chosen_by)


def get_problem(name: str) -> Problem:
    """The problem called `name`, in short or as files have it, that of an objective among them.

    Raises:
        FastpeftError: there is none.
    """
    for problem in (*OBJECTIVES.values(), *PROBLEMS.values()):
        if name in (problem.name, problem.short):
            return problem
    raise FastpeftError(f"`problem_type` is {name!r}; it must be one of {', '.join(PROBLEMS)}. Choose one of these.")


def most_frequent(labels: Sequence[Any], problem: Problem) -> list[int] | None:
    """The index of the most frequent class of rows, or tag of their words, the first of several; None of no classes.

    Of several labels a row, the most frequent ones, as many as a row has on average and one at least.
    """
    import numpy as np

    if not problem.has_classes:
        return None
    if problem is MULTI_LABEL:
        counts = np.sum(labels, axis=0)
        return sorted(np.argsort(-counts, kind="stable")[: max(1, round(counts.sum() / len(labels)))].tolist())
    return [int(np.bincount(np.concatenate(labels) if problem.per_token else np.asarray(labels)).argmax())]


def describe(
    problem: Problem, outputs: np.ndarray, labels: np.ndarray, names: Sequence[str], frequent: Sequence[int] | None
) -> dict[str, Any]:
    """What `metrics.json` holds of the classes of rows, or the tags of words, beside the metrics.

    Args:
        problem: what was learned; without classes nothing is held.
        outputs, labels: as its `score` takes them.
        names: of the outputs.
        frequent: as `most_frequent` gives it, of the training rows; None where it is not known.

    Returns:
        `most_frequent_class`: that `class`, and every metric of always answering it, where it is known; of labels
        `classes`, a list, and `class`, those in a line. `per_class`: by its name, `precision`, `recall`, `f1` and
        `support` (its rows). `confusion_matrix`: a row for the label, a column for the answer, in the order of `names`;
        None of more than 200, and of labels.
    """
    if not problem.has_classes:
        return {}
    import numpy as np
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    several, classes = problem is MULTI_LABEL, np.arange(len(names))
    found: dict[str, Any] = {}
    if frequent is not None:
        always = np.broadcast_to(np.where(np.isin(classes, frequent), 1.0, -1.0), outputs.shape)
        said: dict[str, Any] = {"class": ", ".join(names[index] for index in frequent)}
        said |= {"classes": [names[index] for index in frequent]} if several else {}
        found["most_frequent_class"] = {**said, **problem.score(always, labels, names)}
    if not several:
        labelled = labels != UNLABELLED
        outputs, labels = outputs[labelled], labels[labelled]
    answers = problem.answers(outputs)
    figures = precision_recall_fscore_support(labels, answers, labels=classes, average=None, zero_division=0.0)
    found["per_class"] = {
        name: {"precision": float(p), "recall": float(r), "f1": float(f1), "support": int(rows)}
        for name, p, r, f1, rows in zip(names, *figures)
    }
    matrix = None
    if not several and len(names) <= _MOST_IN_MATRIX:
        matrix = confusion_matrix(labels, answers, labels=classes).tolist()
    return {**found, "confusion_matrix": matrix}


def _from_scores(name: str, *first: str) -> Callable[..., Any]:
    """A function of `fastpeft.data.scores`, which imports NumPy, so it is looked up when it is called."""
    return lambda *others: getattr(importlib.import_module("fastpeft.data.scores"), name)(*first, *others)


CLASSIFICATION = Problem(
    name="single_label_classification",
    short="classification",
    task_type="SEQ_CLS",
    labels="classes",
    metrics=(ACCURACY, "f1", "matthews"),
    score=_from_scores("score_classes"),
    has_classes=True,
    loss=_from_scores("cross_entropy"),
    tested=ACCURACY,
    parts=_from_scores("parts_of_classes"),
)
REGRESSION = Problem(
    name="regression",
    short="regression",
    task_type="SEQ_CLS",
    labels="numbers",
    metrics=("pearson", "spearman", "mse"),
    score=_from_scores("score_numbers"),
    loss=_from_scores("squared_error"),
)
TAGGING = Problem(
    name="token_classification",
    short="tags",
    task_type="TOKEN_CLS",
    labels="tags",
    metrics=("word_f1", "entity_f1", ACCURACY),
    score=_from_scores("score_tags"),
    has_classes=True,
    per_token=True,
    loss=_from_scores("cross_entropy"),
    tested="entity_f1",
    parts=_from_scores("parts_of_entities"),
)
MULTI_LABEL = Problem(
    name="multi_label_classification",
    short="multi-label",
    task_type="SEQ_CLS",
    labels="labels",
    metrics=("micro_f1", "macro_f1", "subset_accuracy", "ranking_precision"),
    score=_from_scores("score_labels"),
    has_classes=True,
    loss=_from_scores("binary_cross_entropy"),
    tested="micro_f1",
    parts=_from_scores("parts_of_labels"),
)
MASKED_WORDS = Problem(
    name="masked_words",
    short="masked_words",
    task_type=None,
    labels="masked tokens",
    metrics=("masked_accuracy", "perplexity"),
    score=_from_scores("score_words", "masked_accuracy"),
    of_texts_alone=True,
    per_token=True,
    tested="masked_accuracy",
    parts=_from_scores("parts_of_words"),
    digest=_from_scores("digest_words"),
)
NEXT_WORDS = Problem(
    name="next_words",
    short="next_words",
    task_type="CAUSAL_LM",
    labels="next tokens",
    metrics=("next_accuracy", "perplexity"),
    score=_from_scores("score_words", "next_accuracy"),
    of_texts_alone=True,
    per_token=True,
    tested="next_accuracy",
    parts=_from_scores("parts_of_words"),
    digest=_from_scores("digest_next_words"),
)
# what labels may be, by the short names
PROBLEMS = {problem.short: problem for problem in (CLASSIFICATION, REGRESSION, TAGGING, MULTI_LABEL)}
OBJECTIVES = {"mlm": MASKED_WORDS, "causal": NEXT_WORDS}  # what is learned without labels
