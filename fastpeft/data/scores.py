"""What is measured of outputs and labels, as `fastpeft.data.problems` names it for each kind of problem."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastpeft.data.names import LOSS, OUTSIDE, UNLABELLED

if TYPE_CHECKING:
    from torch import Tensor


def score_classes(outputs: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Accuracy; F1 of the second class where there are two, the mean over classes where there are more; Matthews."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    guesses = outputs.argmax(-1)
    average = "binary" if len(names) == 2 else "macro"
    return {
        "accuracy": float(accuracy_score(labels, guesses)),
        "f1": float(f1_score(labels, guesses, average=average, zero_division=0.0)),
        "matthews": float(matthews_corrcoef(labels, guesses)),
    }


def score_labels(outputs: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """F1 over all answers and its mean over labels, the share of rows with all labels right, and how labels rank.

    The last does not depend on a threshold: the mean over the labels of a row of how many of those that rank as high
    or higher it has too. Rows that have no label say nothing of it, and are left out there; 0 where all are such.
    """
    from sklearn.metrics import accuracy_score, f1_score, label_ranking_average_precision_score

    guesses, some = (outputs > 0).astype(np.int64), labels.any(axis=-1)
    ranking = label_ranking_average_precision_score(labels[some], outputs[some]) if some.any() else 0.0
    return {
        "micro_f1": float(f1_score(labels, guesses, average="micro", zero_division=0.0)),
        "macro_f1": float(f1_score(labels, guesses, average="macro", zero_division=0.0)),
        "subset_accuracy": float(accuracy_score(labels, guesses)),
        "ranking_precision": float(ranking),
    }


def score_numbers(outputs: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Correlations of values and of ranks, and the mean squared error."""
    guesses = outputs[:, 0].astype(np.float64)
    labels = labels.astype(np.float64)
    return {
        "pearson": _correlation(guesses, labels),
        "spearman": _correlation(_ranks(guesses), _ranks(labels)),
        "mse": squared_error(outputs, labels),
    }


def cross_entropy(outputs: np.ndarray, labels: np.ndarray) -> float:
    """The mean over what has a label."""
    labelled = labels != UNLABELLED
    logits, classes = outputs[labelled].astype(np.float64), labels[labelled]
    logits -= logits.max(-1, keepdims=True)
    of_labels = np.take_along_axis(logits, classes[:, None], -1)[:, 0]
    return float(np.mean(np.log(np.exp(logits).sum(-1)) - of_labels))


def binary_cross_entropy(outputs: np.ndarray, labels: np.ndarray) -> float:
    """The mean over rows and labels, of logits."""
    logits = outputs.astype(np.float64)
    return float(np.mean(np.logaddexp(0.0, logits) - labels * logits))


def squared_error(outputs: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean((outputs[:, 0].astype(np.float64) - labels.astype(np.float64)) ** 2))


def _ranks(values: np.ndarray) -> np.ndarray:
    """The rank of each value, equal values sharing the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: np.ndarray = (counts.cumsum() - (counts - 1) / 2)[places]
    return ranks


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation; 0 where one side is constant, as scikit-learn has Matthews'."""
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 0 else 0.0


def score_tags(outputs: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """F1 of single words, the mean over the tags that occur but for O; accuracy of words.

    It is not the F1 of whole entities, and tags that are numbers without names have no O: each of them counts.
    """
    from sklearn.metrics import accuracy_score, f1_score

    labelled = labels != UNLABELLED
    labels, guesses = labels[labelled], outputs[labelled].argmax(-1)
    entities = [int(tag) for tag in np.union1d(labels, guesses) if names[tag] != OUTSIDE]
    f1 = f1_score(labels, guesses, labels=entities, average="macro", zero_division=0.0) if entities else 0.0
    return {"word_f1": float(f1), "accuracy": float(accuracy_score(labels, guesses))}


def digest_words(logits: Tensor, labels: Tensor) -> Tensor:
    """Of every token the loss and whether the most likely word is the hidden one: `(B, T, 2)`, float32."""
    import torch
    from torch.nn.functional import cross_entropy

    losses = cross_entropy(logits.float().mT, labels, ignore_index=UNLABELLED, reduction="none")
    return torch.stack([losses, (logits.argmax(-1) == labels).float()], dim=-1)


def score_words(outputs: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Accuracy of hidden words, the mean of their losses, and its exponential."""
    losses, hits = outputs[labels != UNLABELLED].astype(np.float64).T
    loss = float(losses.mean())
    return {"masked_accuracy": float(hits.mean()), "perplexity": float(np.exp(loss)), LOSS: loss}
