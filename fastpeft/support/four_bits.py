"""Layers that bitsandbytes keeps in 4 bits, and the form for inference that it gives them on some CPUs.

Where the processor has bfloat16, a layer that is evaluated arranges its weight for products in bfloat16. No gradient
passes through it any more, and a `state_dict` brings the weight back in other bits, so that saving changes a model.
"""

from __future__ import annotations

from torch import nn

from fastpeft.errors import FastpeftError


def keep_form(model: nn.Module, *, passes_gradients: bool = False, name: str = "") -> None:
    """Let no layer of a model arrange its weight from now on; each computes in the dtype of its inputs.

    Args:
        model: the model, or a layer.
        passes_gradients: whether gradients are to pass through all its layers.
        name: what error messages call the model, where it is a layer.

    Raises:
        FastpeftError: gradients are to pass through a layer that has arranged its weight already.
    """
    for path, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        module.support_avx512bf16_for_cpu = False
        state = getattr(module.weight, "quant_state", None)
        if passes_gradients and getattr(state, "packing_format_for_cpu", False):
            raise FastpeftError(
                f"{path or name}: bitsandbytes has arranged its weight for inference. Load the model again, and put "
                "the adapter onto it before it is evaluated."
            )
