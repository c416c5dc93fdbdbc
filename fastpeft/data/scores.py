"""What is measured of outputs and labels, as `fastpeft.data.problems` names it for each kind of problem."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastpeft.data.names import LOSS, OUTSIDE, UNLABELLED

if TYPE_CHECKING:
    from torch import Tensor


def score_classes(outputs: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Accuracy; F1 of the second class of two, or the mean over those of more classes that the rows have; Matthews."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    guesses = outputs.argmax(-1)
    # with the classes that a method answers too, the means of two methods would be over different classes
    asked = {"average": "binary"} if len(names) == 2 else {"average": "macro", "labels": np.unique(labels)}
    return {
        "accuracy": float(accuracy_score(labels, guesses)),
        "f1": float(f1_score(labels, guesses, **asked, zero_division=0.0)),
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
    from scipy.stats import rankdata

    guesses = outputs[:, 0].astype(np.float64)
    labels = labels.astype(np.float64)
    return {
        "pearson": _correlation(guesses, labels),
        "spearman": _correlation(rankdata(guesses), rankdata(labels)),
        "mse": squared_error(outputs, labels),
    }


def cross_entropy(outputs: np.ndarray, labels: np.ndarray) -> float:
    """The mean over what has a label."""
    import torch.nn.functional as F
    from torch import from_numpy

    logits = from_numpy(outputs).double().flatten(0, -2)
    return float(F.cross_entropy(logits, from_numpy(labels).long().flatten(), ignore_index=UNLABELLED))


def binary_cross_entropy(outputs: np.ndarray, labels: np.ndarray) -> float:
    """The mean over rows and labels, of logits."""
    import torch.nn.functional as F
    from torch import from_numpy

    return float(F.binary_cross_entropy_with_logits(from_numpy(outputs).double(), from_numpy(labels).double()))


def squared_error(outputs: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean((outputs[:, 0].astype(np.float64) - labels.astype(np.float64)) ** 2))


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation; 0 where one side is constant, as scikit-learn has Matthews'."""
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 0 else 0.0


def score_tags(outputs: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """F1 of single words, the mean over the tags that occur, without O; F1 of entities; accuracy of words.

    Tags that are numbers without names have no O: each of them counts.
    """
    from sklearn.metrics import accuracy_score, f1_score

    labelled, guessed = labels != UNLABELLED, outputs.argmax(-1)
    words, guesses = labels[labelled], guessed[labelled]
    tags = [int(tag) for tag in np.union1d(words, guesses) if names[tag] != OUTSIDE]
    f1 = f1_score(words, guesses, labels=tags, average="macro", zero_division=0.0) if tags else 0.0
    twice_right, all_entities = parts_of_entities(outputs, labels, names).sum(0)
    return {
        "word_f1": float(f1),
        "entity_f1": float(twice_right / all_entities) if twice_right else 0.0,
        "accuracy": float(accuracy_score(words, guesses)),
    }


def parts_of_classes(outputs: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """For each row whether its answer was right, and 1: the ratio of their sums is the accuracy."""
    return np.stack([outputs.argmax(-1) == labels, np.ones_like(labels)], axis=-1).astype(np.int64)


def parts_of_entities(outputs: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Of each row twice its right entities, and those that it has and those that were told: F1 of whole entities.

    An entity is right where its kind, first and last word are. That is the F1 of the package seqeval, which installs on
    few machines because it has no wheel.
    """
    found = []
    for row, guess in zip(labels, outputs.argmax(-1), strict=True):
        labelled = row != UNLABELLED
        expected, told = (entities([names[tag] for tag in tags[labelled]]) for tags in (row, guess))
        found.append((2 * len(expected & told), len(expected) + len(told)))
    return np.array(found, dtype=np.int64)


def parts_of_labels(outputs: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Of each row twice its right labels, and those that it has and those that were given: micro F1."""
    given, has = outputs > 0, labels > 0
    return np.stack([2 * (given & has).sum(-1), given.sum(-1) + has.sum(-1)], axis=-1)


def parts_of_words(outputs: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """For each row how many words were right, and how many have a label."""
    labelled = labels != UNLABELLED
    return np.stack([(outputs[..., 1] * labelled).sum(-1), labelled.sum(-1)], axis=-1).astype(np.int64)


_PLACES = {**{place: place for place in "BIES"}, "M": "I", "L": "E", "U": "S", "W": "S"}  # in an entity, by any scheme


def entities(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """Kind, first and last word of the entities in a row of tags, as `(first, last, kind)`.

    Tags are O and B-KIND, I-KIND, E-KIND and S-KIND; other schemes have M for I, L for E and U or W for S. An entity
    begins at B and S, where the kind changes, and after O, E and S; so an I begins one too where nothing comes before
    it, as in the CoNLL evaluation. These letters alone, as in the BMES of words, are of the one kind that has no name.
    A tag of another form is a kind that goes on as long as it is repeated.
    """
    found = set()
    begun, before, kind_before = 0, "O", ""
    for place, tag in enumerate([*tags, OUTSIDE]):
        place_in, _, kind = tag.partition("-")
        if tag == OUTSIDE:
            place_in, kind = "O", ""
        elif place_in in _PLACES:
            place_in = _PLACES[place_in]
        else:
            place_in, kind = "I", tag
        goes_on = place_in in ("I", "E") and before in ("B", "I") and kind == kind_before
        if not goes_on:
            if before != "O":
                found.add((begun, place - 1, kind_before))
            begun = place
        before, kind_before = place_in, kind
    return found


def digest_words(logits: Tensor, labels: Tensor) -> Tensor:
    """Of every token the loss and whether the most likely word is the hidden one: `(B, T, 2)`, float32.

    Tokens without a label get 0. Copies, and logits that a fused head has not made, are those of some tokens at a time.
    """
    import torch
    from torch.nn.functional import cross_entropy

    from fastpeft.ops.fused_head import logits_in_chunks

    found = labels.new_zeros(*labels.shape, 2, dtype=torch.float32)
    for tokens, some in logits_in_chunks(logits, (labels != UNLABELLED).nonzero(as_tuple=True)):
        losses = cross_entropy(some.float(), labels[tokens], reduction="none")
        found[tokens] = torch.stack([losses, (some.argmax(-1) == labels[tokens]).float()], dim=-1)
    return found


def digest_next_words(logits: Tensor, labels: Tensor) -> Tensor:
    """`digest_words` of every token by the logits of the one before it; the first token, which has none, gets 0."""
    from torch.nn.functional import pad

    return pad(digest_words(logits[:, :-1], labels[:, 1:]), (0, 0, 1, 0))


def score_words(accuracy: str, outputs: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """The accuracy of words, under this name, the mean of their losses, and its exponential."""
    words = outputs[labels != UNLABELLED]
    loss, right = (float(words[:, place].mean(dtype=np.float64)) for place in (0, 1))
    return {accuracy: right, "perplexity": float(np.exp(loss)), LOSS: loss}
