"""Checked, documented functions over the ops."""

from fastpeft.functional.attention import MAX_WINDOW, window_attention
from fastpeft.functional.frozen import frozen_head_cross_entropy, int8_linear
from fastpeft.functional.perturbation import mezo_perturb, mezo_perturb_
from fastpeft.functional.siva import siva_linear, siva_linear_group, siva_linear_mixed
from fastpeft.ops import backends  # noqa: F401  (declares ops, registers their implementations)

__all__ = [
    "MAX_WINDOW",
    "frozen_head_cross_entropy",
    "int8_linear",
    "mezo_perturb",
    "mezo_perturb_",
    "siva_linear",
    "siva_linear_group",
    "siva_linear_mixed",
    "window_attention",
]
