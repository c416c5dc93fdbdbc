"""The ops of the library: one file each, with schema, shapes, autograd, reference and fused ATen form.

`backends` chooses what each runs on. Users call the checked functions of `fastpeft.functional`.

    reference.siva_linear, aten.siva_linear, ...    a form of every op, by the op's name
    decompositions()                                those that change nothing in place, for ExportedProgram
"""

from types import SimpleNamespace

from fastpeft.ops import (  # noqa: F401  (each declares its ops)
    feature_dropout,
    frozen_head_cross_entropy,
    int8_linear,
    mezo_perturb,
    quantised_linear,
    side_step,
    siva_linear,
    window_attention,
)
from fastpeft.ops.define import OPS
from fastpeft.ops.define import decompositions as decompositions

reference = SimpleNamespace(**{name: op.reference for name, op in OPS.items()})
aten = SimpleNamespace(**{name: op.aten for name, op in OPS.items() if op.aten is not None})
