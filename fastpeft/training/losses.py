"""The loss for classes out of balance, in which they have weights. Training alone lowers it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft.data.examples import TextData
from fastpeft.data.names import UNLABELLED
from fastpeft.data.problems import MULTI_LABEL, Problem


@dataclass(frozen=True)
class TrainingLoss:
    """A cross entropy in which rare classes count more.

        loss = mean over rows of  w_y (-log p_y)

    Of several labels a row it is the mean over rows and labels of the same for each label's two answers, with the
    weight `w` where the row has the label and 1 where not, as `pos_weight` of `torch.nn.BCEWithLogitsLoss`.

    The mean is over rows, or labelled tokens, and not over weights: those of balanced classes are 1 on average, and
    batches that are accumulated or shared by processes then count by their rows, whatever classes they have.

    Attributes:
        problem: what the labels are.
        weights: `w`, `(classes,)`, float32.
    """

    problem: Problem
    weights: Tensor

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss, a scalar in float32 or wider.

        Args:
            logits: `(N, classes)`, or `(B, T, classes)` of tokens.
            labels: `(N,)`, integers, or `(B, T)` with -100 where a token has none; of labels `(N, classes)`, 0 and 1.
        """
        logits = logits if logits.dtype is torch.float64 else logits.float()
        weights = self.weights.to(logits)
        if self.problem is MULTI_LABEL:
            labels = labels.to(logits)
            losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
            counted = torch.ones_like(losses)
            weight = 1 + (weights - 1) * labels
        else:
            logits, labels = logits.flatten(0, -2), labels.flatten()
            losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=UNLABELLED)
            counted = labels != UNLABELLED
            weight = weights[labels.clamp_min(0)]
        return (weight * losses).sum() / counted.sum()


def balanced(problem: Problem, labels: Sequence[Any], classes: int) -> Tensor:
    """Weights that give all classes the same share of the loss, `(classes,)`, float32.

    Of `n` rows, of which `count` have the class, with `k` classes that any row has: `n / (k count)`, as scikit-learn's
    `class_weight="balanced"`; of a label `(n - count) / count`, the ratio of these weights for its two answers. A class
    that no row has, and a label that no row or every row has, has the weight 1. Labels are as `Examples` holds them.
    """
    if problem is MULTI_LABEL:
        counts = np.sum(labels, axis=0)
        weights = np.divide(len(labels) - counts, counts, out=np.ones(classes), where=counts > 0)
        weights[counts == len(labels)] = 1.0
    else:
        counts = np.bincount(np.concatenate(labels) if problem.per_token else labels, minlength=classes)
        weights = np.divide(counts.sum(), np.count_nonzero(counts) * counts, out=np.ones(classes), where=counts > 0)
    return torch.from_numpy(weights).float()


def training_loss(data: TextData) -> TrainingLoss:
    """The loss with weights that balance the rows to train on in `data`."""
    return TrainingLoss(data.problem, balanced(data.problem, data.train.labels, len(data.labels)))
