"""The loss of a base that is not a transformers model, which computes none itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers.modeling_outputs import SequenceClassifierOutput

from fastpeft.errors import FastpeftError


def with_loss(logits: Any, labels: Tensor | None, problem_type: str | None) -> SequenceClassifierOutput:
    """Logits, and where labels are given their loss, in the form that transformers' models return."""
    if not isinstance(logits, Tensor):
        raise FastpeftError(
            f"the base returned a {type(logits).__name__}; beside a side network a module returns its logits, a "
            "tensor. Wrap it in one that does."
        )
    if labels is None:
        return SequenceClassifierOutput(logits=logits)
    numbers = labels.is_floating_point()
    if labels.shape != (logits.shape if numbers else logits.shape[:-1]):
        advice = (
            ". Give numbers in the shape of the logits, or classes as integers."
            if numbers
            else ", whose last dimension is the classes. Give a class for each of the others."
        )
        raise FastpeftError(f"labels have the shape {tuple(labels.shape)} and the logits {tuple(logits.shape)}{advice}")
    if not numbers:
        loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten())
    elif problem_type == "multi_label_classification":
        loss = F.binary_cross_entropy_with_logits(logits, labels)
    else:
        loss = F.mse_loss(logits, labels)
    return SequenceClassifierOutput(loss=loss, logits=logits)
