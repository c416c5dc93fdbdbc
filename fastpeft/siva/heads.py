"""The head of a model: what is beside its pretrained backbone, and trains with SiVA where it is new."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import nn
from transformers import MODEL_MAPPING, PreTrainedModel
from transformers.integrations import is_fsdp_enabled

from fastpeft.siva.config import SivaConfig
from fastpeft.support.processes import Ranks

logger = logging.getLogger(__name__)

# What a PeftModel adds to `modules_to_save` for a task, whether the model has it or not.
ADDED_BY_PEFT = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_POOLER = "pooler"


def head_names(model: Any) -> set[str]:
    """Modules of a transformers model outside its pretrained backbone: children beside it, and the output layer.

    A child that is a model of its own, as BLIP's decoder of captions, is none.
    """
    children = {name for name, _ in model.named_children()}
    models = {name for name, child in model.named_children() if isinstance(child, PreTrainedModel)}
    heads = children - _backbone_parts(model, children) - models
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return heads | {name for name, module in model.named_modules() if output is not None and module is output}


def _backbone_parts(model: Any, children: set[str]) -> set[str]:
    """Which children are the backbone's: the one that holds it whole, or its parts; all where that cannot be told.

    Whisper's classifier has its encoder beside the head, T5's for questions its encoder and decoder. The backbone is
    built without weights to see which parts it has.
    """
    prefix = getattr(model, "base_model_prefix", "")
    kind = type(getattr(model, "config", None))
    found = MODEL_MAPPING.get(kind, ())
    backbones = found if isinstance(found, (tuple, list)) else (found,)  # Funnel has two
    if type(model) in backbones:  # whose encoder may have the prefix for its name, as DINOv3's
        return children
    if prefix in children:
        return {prefix}
    if not backbones:
        return children
    with torch.device("meta"):
        backbone = backbones[0]._from_config(copy.deepcopy(model.config))
    return children & {name for name, _ in backbone.named_children()} or children


def let_heads_train(peft_config: SivaConfig, heads: set[str], model: Any, of_peft_model: bool) -> None:
    """Add the modules of a head to `modules_to_save` where the task is known, else warn that they stay as they are.

    In a model that PEFT makes (`of_peft_model`) it adds names that most heads have, but not those of BART or XLNet, and
    only a part of DeBERTa's. A pooler that the checkpoint lacks belongs to the head. The head of a language model is no
    new one, and stays.
    """
    if hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is not None:
        return
    added = ADDED_BY_PEFT.get(peft_config.task_type, ()) if of_peft_model else ()
    saved = (*(peft_config.modules_to_save or ()), *added)
    names = [name for name, _ in model.named_modules()]
    parts = [*sorted(heads), *(_new_poolers(model, heads) if heads else ())]
    new = [part for head in parts for part in _parts_beside(saved, head, model.get_submodule(head))]
    # PEFT would take every module whose name ends so
    clear = [head for head in new if added and not any(name.endswith(head) and name != head for name in names)]
    if clear:
        peft_config.modules_to_save = [*(peft_config.modules_to_save or ()), *clear]
    if left := [head for head in new if head not in clear]:
        logger.warning(
            "parts of the head do not train: %s. To train them and what else has names that end so, add them to "
            "modules_to_save",
            ", ".join(left),
        )
    elif added and not clear and not any(name.endswith(saved) for name in names):
        logger.warning("no module is called %s, so no head trains. Name yours in modules_to_save", " or ".join(added))


def _new_poolers(model: nn.Module, heads: set[str]) -> list[str]:
    """The names of poolers outside heads that the checkpoint lacks: each time it is loaded they are drawn anew.

    transformers marks the parameters that it reads. A model that was not loaded has no mark, and none of these. Where
    FSDP loads with little memory, one process of a machine reads and the others mark all: the first one's answer holds.
    """

    def is_read(module: nn.Module) -> list[bool]:
        return [getattr(parameter, "_is_hf_initialized", False) for parameter in module.parameters()]

    poolers = {
        name: module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == _POOLER
        and not any(f"{name}.".startswith(f"{head}.") for head in heads)
        and all(type(parameter) is nn.Parameter and parameter.is_floating_point() for parameter in module.parameters())
    }
    if not poolers or not any(is_read(model)):
        return []
    new = [name for name, module in poolers.items() if not any(is_read(module))]
    return Ranks().gather(new)[0] if is_fsdp_enabled() else new


def warn_of_statistics(peft_config: SivaConfig, model: nn.Module) -> None:
    """Warn of norms that keep running statistics: training changes them, and an adapter does not save them."""
    saved = (*(peft_config.modules_to_save or ()), *ADDED_BY_PEFT.get(peft_config.task_type, ()))
    found = [
        name
        for name, module in model.named_modules()
        if getattr(module, "running_mean", None) is not None
        and not any(".".join(name.split(".")[:end]).endswith(saved) for end in range(1, name.count(".") + 2))
    ]
    if found:
        logger.warning(
            "training changes the running statistics of %s, and the adapter does not save them: loaded again, it gives "
            "other outputs. Add %s to modules_to_save, or keep such modules in eval mode",
            f"{found[0]} and {len(found) - 1} others" if len(found) > 1 else found[0],
            ", ".join(sorted({name.rpartition(".")[2] for name in found})),
        )


def _parts_beside(saved: tuple[str, ...], name: str, module: nn.Module) -> list[str]:
    """The names of the largest modules in `module` that have parameters, and none that `saved` names."""
    if name.endswith(saved) or not any(True for _ in module.parameters()):
        return []
    if not any(inner.endswith(saved) for inner, _ in module.named_modules(prefix=name)):
        return [name]
    return [part for child, each in module.named_children() for part in _parts_beside(saved, f"{name}.{child}", each)]
