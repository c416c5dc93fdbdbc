"""Checked, documented functions over the ops."""

from fastpeft.ops import backends  # noqa: F401  (declares ops, registers their implementations)
from fastpeft.ops.frozen_head_cross_entropy import frozen_head_cross_entropy
from fastpeft.ops.int8_linear import int8_linear
from fastpeft.ops.mezo_perturb import mezo_perturb, mezo_perturb_
from fastpeft.ops.siva_linear import siva_linear, siva_linear_group, siva_linear_mixed
from fastpeft.ops.window_attention import MAX_WINDOW, window_attention

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
