"""A SiVA adapter as a plain LoRA, which PEFT loads without this library.

Training changed a layer's weight by `U diag(s) V - U0 diag(s) V0`, a product of rank 2r:

    B A  with  B = [U, -U0] diag([s; s])  (N, 2r)  and  A = [V; V0]  (2r, K)

so a LoRA of rank 2r with `lora_alpha = 2r` (a scaling of 1) on the pretrained weight computes what the adapter does.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastpeft.errors import FastpeftError
from fastpeft.siva.change import plus
from fastpeft.siva.config import SivaConfig
from fastpeft.siva.decompose import Factors
from fastpeft.support.adapter_files import PREFIX, WEIGHTS

logger = logging.getLogger(__name__)


def lora_factors(trained: Factors, initial: Factors) -> tuple[Tensor, Tensor]:
    """A `(2r, K)` and B `(N, 2r)`, float32, of the LoRA that changes a weight as training changed `initial`."""
    b = torch.cat([trained.u * trained.s, -initial.u * initial.s], 1)
    return torch.cat([trained.v, initial.v], 0), b


def save_as_lora(model: PeftModel, folder: str | Path, adapter_name: str = "default") -> None:
    """Save a SiVA adapter as a LoRA of twice its rank, for the base model that it was made from.

    Modules that trained whole, as a classification head, are saved with it, and so are biases and embeddings of tokens.

    PEFT loads it on any base model. vLLM loads it for the decoders that it serves, if the adapter has no
    `modules_to_save` (such as a classification head) and 2r is at most its `max_lora_rank`. Ranks may differ between
    layers, since the scaling is 1 in all of them.

    In float32 its logits agree with the adapter's to 1e-5. In bfloat16 the two round in different places, with errors
    of one size. With `residual_dtype` the adapter trained on rounded weights; the LoRA adds the same change to the
    weights before rounding, so its outputs differ a little. This is logged.

    Args:
        model: what PEFT wrapped.
        folder: where to write `adapter_config.json` and `adapter_model.safetensors`.
        adapter_name: the adapter.

    Raises:
        FastpeftError: the adapter is not SiVA's, its decomposition left out a part of the weight (`d` below the full
            rank), so that it does not belong to the base model's weights, or PEFT would load it onto other layers.
            Nothing is written then.

    Example:
        >>> save_as_lora(model, "lora")  # doctest: +SKIP
        >>> PeftModel.from_pretrained(base, "lora")  # doctest: +SKIP
    """
    config = model.peft_config[adapter_name]
    if not isinstance(config, SivaConfig):
        raise FastpeftError(
            f"the adapter {adapter_name!r} is of the type {config.peft_type.value}; only SiVA's is exported as a LoRA. "
            "Use its own folder, or merge it into its base model."
        )
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    if any(key.endswith(".siva_residual") for key in state):
        raise FastpeftError(
            f"the adapter {adapter_name!r} has d={config.d}, which left out the smallest singular values of the "
            "weights, so no LoRA on the base model can stand for it. Merge it into its base model instead."
        )
    if config.residual_dtype is not None:
        logger.warning(
            "the adapter %r trained with residual_dtype=%r; its LoRA goes onto the base model's weights as they were "
            "before rounding, so that outputs differ by what that moved",
            adapter_name,
            config.residual_dtype,
        )
    tensors, ranks = _convert(state)
    most = max(ranks.values())
    different = {name: rank for name, rank in ranks.items() if rank != most}
    lora = LoraConfig(
        r=most,
        lora_alpha=most,
        target_modules=sorted(ranks),  # by their whole names
        rank_pattern=different,
        alpha_pattern=different,
        fan_in_fan_out=any(isinstance(model.get_base_model().get_submodule(name).base_layer, Conv1D) for name in ranks),
        modules_to_save=config.modules_to_save,
        trainable_token_indices=config.trainable_token_indices,
        bias="lora_only" if config.bias == "siva_only" else config.bias,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
    )
    _check_targets(lora, model.get_base_model())
    Path(folder).mkdir(parents=True, exist_ok=True)
    lora.save_pretrained(str(folder))
    save_file(tensors, Path(folder) / WEIGHTS, metadata={"format": "pt"})


def _check_targets(lora: LoraConfig, base: nn.Module) -> None:
    """Raise `FastpeftError` unless PEFT, when it loads the LoRA onto such a base, keeps all its targets.

    In some mixtures it takes every gate_proj, up_proj and down_proj for the experts, which are stacked parameters in
    transformers 5, also those of shared experts and of dense layers. The tensors of the layers meant would be lost.
    """
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers as convert
    except ImportError:  # earlier ones take names as they are
        return
    probe = copy.deepcopy(lora)
    try:
        kept = (convert(probe, base, None) or probe).target_modules  # some return it, some change it
    except ValueError:  # it has one of two that go together there
        kept = ()
    if lost := sorted({*lora.target_modules} - {*kept}):
        raise FastpeftError(
            f"{lost[0]}: PEFT takes this name in a LoRA for the stacked experts of the mixture, so what trained here "
            f"would be lost ({len(lost)} of {len(lora.target_modules)} layers). Merge the adapter into its base model "
            "instead, or train with such layers in exclude_modules."
        )


def _convert(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The tensors of a LoRA made from those of a saved SiVA adapter, and the rank of each layer."""
    tensors = {key: tensor.contiguous() for key, tensor in state.items() if ".siva_" not in key}
    # with bias="all" those of a module that was saved whole have two names; safetensors writes no memory twice
    tensors = {key: tensor.clone() if key.endswith(".bias") else tensor for key, tensor in tensors.items()}
    ranks = {}
    for key in state:
        layer, separator, _ = key.partition(".siva_u0")
        if not separator:
            continue
        s, u0, v0 = (state[f"{layer}.siva_{part}"].float() for part in ("s", "u0", "v0"))
        u, v = (
            plus(initial, state[f"{layer}.siva_{part}.weight"].float(), state.get(f"{layer}.siva_{part}.scale"))
            for part, initial in (("du", u0), ("dv", v0))
        )
        a, b = lora_factors(Factors(u, s, v), Factors(u0, s, v0))
        tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"] = a.contiguous(), b.contiguous()
        ranks[layer.removeprefix(PREFIX)] = len(a)
    return tensors, ranks
