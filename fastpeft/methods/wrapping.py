"""A model as PEFT wraps it: what its adapters are given, what they go onto, and in our words what PEFT cannot do."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Sequence
from typing import Any, get_type_hints

import peft
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, constants
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastpeft.errors import FastpeftError, install, is_out_of_memory
from fastpeft.ladder.backbone import POOLER
from fastpeft.methods.preparation import Preparation, Targets
from fastpeft.ops.quantised_linear import BLOCK
from fastpeft.prompts.model import inside_prompt
from fastpeft.siva import SivaConfig
from fastpeft.siva.grouping import ATTENTION
from fastpeft.siva.model import check_tokens
from fastpeft.siva.targets import endings
from fastpeft.support.adapter_files import PREFIX
from fastpeft.support.four_bits import keep_form

logger = logging.getLogger(__name__)

# fields of a PEFT configuration that have an option of their own, follow from the model or are filled in when it is
# saved
_OWN_FIELDS = (
    *("r", "pack_weights", "target_modules", "task_type", "peft_type", "auto_mapping", "peft_version"),
    *("inference_mode", "base_model_name_or_path", "revision", "init_weights", "pissa", "base_fingerprints"),
    *("token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"),
)
_REFUSED = {"SivaConfig": ("target_parameters", "layer_replication")}  # fields that are there to say why not
_ROLES = ("query", "key", "value")

# kinds of model for which PEFT knows what its adapters go onto
_KNOWN = {
    "LoraConfig": constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    "LoKrConfig": constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,  # of which PEFT's is a copy
    "IA3Config": constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
}
# projections that hold query, key and value in one matrix
_FUSED = ("Wqkv", "c_attn", "query_key_value", "qkv_proj", "in_proj", "qkv")
_FEED_FORWARD = ("output.dense", "lin2", "fc2", "down_proj", "wo", "mlp.Wo", "ffn_output")  # from its inside out


def _config_class(name: str) -> Any:
    return SivaConfig if name == "SivaConfig" else getattr(peft, name)


def settings(config: str) -> dict[str, Any]:
    """What `--set` may put into a configuration of PEFT, or of SiVA, with the type of each."""
    left_out = (*_OWN_FIELDS, *_REFUSED.get(config, ()))
    return {name: hint for name, hint in get_type_hints(_config_class(config)).items() if name not in left_out}


def wrap(model: nn.Module, preparation: Preparation, config: str, values: dict[str, Any]) -> nn.Module:
    """Put an adapter onto `model`: its configuration, named `config`, gets `values`, then what `preparation` has."""
    if preparation.targets is not None:
        values = {**values, "target_modules": _own_names(model, preparation.targets)}
    named = {"target_modules", "target_parameters"} & {*values, *preparation.settings}
    values = {**({} if named else _usual_layers(model, config)), **values}
    new = list(preparation.head) if preparation.trains_head else []
    values = {**values, "task_type": preparation.task_type, "modules_to_save": new, **preparation.settings}
    try:
        made = _config_class(config)(**values)
        if isinstance(made, peft.LoraConfig):
            check_tokens(made, model)  # SiVA checks its own
        wrapped: nn.Module = peft.get_peft_model(model, made)
    except FastpeftError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, re.error) as error:  # PEFT raises any
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().rstrip(".")
        raise FastpeftError(
            f"the model cannot be adapted with targets {preparation.targets!r} and settings "
            f"{dict(preparation.settings)}: {reason}. Its linear layers are named "
            f"{', '.join(endings(_layers(model)))}; name some, or use all-linear."
        ) from error
    for name, module in wrapped.named_modules() if "r" in values else ():  # PEFT knows what its own defaults allow
        if isinstance(module, BaseTunerLayer) and (ranks := getattr(module, "r", None)):  # not all have any
            rank, limit = max(ranks.values()), min(module.in_features, module.out_features)
            if rank > limit:
                raise FastpeftError(
                    f"rank {rank} is above what the matrix of {name.removeprefix(PREFIX)} allows. Choose "
                    f"a rank from 1 to {limit}."
                )
    return wrapped


def _own_names(model: Any, targets: Targets) -> Targets:
    """Targets with the model's own names in place of `query`, `key` and `value`, where no layer is called so.

    One matrix that makes them all stands for the three, and for no one of them.
    """
    if not isinstance(targets, list):
        return targets
    layers = _layers(model)
    names, found = endings(layers), _projections(layers)
    if len({*found}) == 1 and not {*_ROLES} <= {*targets}:
        return targets
    own = {role: name for role, name in zip(_ROLES, found) if name and role not in names}
    return list(dict.fromkeys(own.get(name, name) for name in targets))


def _layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]


def _projections(layers: Sequence[str]) -> tuple[str, str, str]:
    """What the projections of query, key and value are called, or the one that makes them; "" where that is unknown."""
    triples, names = (*ATTENTION, *((name, name, name) for name in _FUSED)), {*endings(layers)}
    return next((each for each in triples if names.issuperset(each)), ("", "", ""))


def _usual_layers(model: Any, config: str) -> dict[str, Any]:
    """What an adapter goes onto by default where PEFT does not know the kind of model; nothing where PEFT knows.

    As in PEFT's own tables: query and value, or the matrix that holds them all; for IA3 key, value and the layer that
    leads out of the feed-forward's inside.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in _KNOWN.get(config, {kind}):
        return {}
    layers = _layers(model)
    query, key, value = _projections(layers)
    end = next((end for end in _FEED_FORWARD if any(name.endswith(f".{end}") for name in layers)), "")
    if config == "IA3Config":
        found: dict[str, Any] = {"target_modules": list({key, value, end}), "feedforward_modules": [end]}
    else:
        found = {"target_modules": list({query, value})}
    if "" in found["target_modules"]:
        return {}
    shown = " and ".join(sorted(found["target_modules"]))
    logger.info("PEFT has no default layers for %s models; adapting %s", kind, shown)
    return found


def merge(model: PeftModel) -> Any:
    """The base model with its adapter in its weights, and with the head that was trained beside that.

    The head is put in place first: with most adapters PEFT puts back only modules with a weight of their own, and a
    head of several layers has none.
    """
    base = model.get_base_model()
    for name, module in list(base.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            base.set_submodule(name, module.modules_to_save[model.active_adapter])
    return model.merge_and_unload()


def check_4_bits() -> None:
    """Raise `FastpeftError` where the library that keeps weights in 4 bits is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise FastpeftError(
            f"qlora needs the library bitsandbytes, which is not installed. Run {install('nf4')}, or choose "
            "siva with --set residual_dtype=int8."
        )


def in_4_bits(model: Any) -> Any:
    """`model` with the linear layers of its backbone in nf4, their scales in 8 bits, as QLoRA has them; in place.

    It computes in the dtype of its inputs. Layers that are in 4 bits already stay as they are.

    Raises:
        FastpeftError: bitsandbytes is missing, the backbone has no linear layer, or one whose rows are not whole blocks
            of 64 weights where there is no accelerator: on a CPU bitsandbytes 0.50 mistakes their scales.
    """
    check_4_bits()
    from bitsandbytes.nn import Linear4bit, Params4bit

    backbone = inside_prompt(model).base_model
    layers = {
        name: layer
        for name, layer in backbone.named_modules()
        if type(layer) is nn.Linear and POOLER not in name.split(".")  # which belongs to the head
    }
    if not layers and not getattr(model, "is_loaded_in_4bit", False):
        raise FastpeftError(
            f"qlora keeps linear layers in 4 bits, of which the backbone, a {type(backbone).__name__}, has none. "
            "Choose another method."
        )
    for name, layer in layers.items():
        if layer.in_features % BLOCK and not torch.accelerator.is_available():
            raise FastpeftError(
                f"qlora cannot keep {name} in 4 bits: on a CPU bitsandbytes takes rows of whole blocks of {BLOCK} "
                f"weights, and these have {layer.in_features}. Choose siva with --set residual_dtype=nf4."
            )
    for name, layer in layers.items():
        quantised = Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None, quant_type="nf4", device="meta"
        )
        weight: Any = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=quantised)
        quantised.weight, quantised.bias = weight.to(layer.weight.device), layer.bias
        backbone.set_submodule(name, quantised.train(layer.training))
    keep_form(model)
    model.is_loaded_in_4bit = True  # what PEFT looks at
    return model
