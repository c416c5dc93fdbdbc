"""What a side network refuses of its base, and of what a pass is given."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Collection, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from fastpeft.errors import FastpeftError
from fastpeft.ladder.backbone import Backbone
from fastpeft.ladder.fingerprints import is_quantised
from fastpeft.ladder.saving import some
from fastpeft.support.processes import is_held_by_fsdp

logger = logging.getLogger(__name__)

# of each parameter of a head the latest side network; not an attribute, which a pickled base would keep
_MODELS: WeakIdKeyDictionary = WeakIdKeyDictionary()
_JOINED = (
    "position_ids begin anew within a row, or leave some out, and there is no attention_mask: these are joined texts, "
    "which a side network cannot tell apart. Give each a row of its own (packing=False), or an attention_mask to rows "
    "of one text."
)


def check_base(base: nn.Module, backbone: Backbone) -> None:
    """Raise `FastpeftError` if the base is no longer the module that the backbone was found in."""
    if backbone.model is not base:
        raise FastpeftError(
            "the base is not the module that this LadderModel was made with. nn.DataParallel copies it: use one "
            "GPU, or a process per GPU by torchrun. If you replaced it, make a new LadderModel."
        )


def check_whole(base: nn.Module) -> None:
    """Raise `FastpeftError` if FSDP shards the base: a pass would leave it weights that can no longer be frozen."""
    if any(map(is_held_by_fsdp, base.modules())):
        raise FastpeftError(
            "the base is sharded by FSDP, so a side network can neither freeze its weights nor train its head. Make "
            "the LadderModel of the whole base first, and shard it then."
        )


def check_in_place(base: nn.Module) -> None:
    """Raise `FastpeftError` if accelerate fetches weights of the base when they are used, as with offload."""
    for name, module in base.named_modules():
        own = module.parameters(recurse=False)
        if hasattr(module, "_hf_hook") and any(parameter.is_meta for parameter in own):
            raise FastpeftError(
                f"{name}: accelerate keeps its weights elsewhere (offload), where a side network cannot read them. "
                "Load the base with a device_map that leaves them on a device, or in fewer bits."
            )


def check_head(backbone: Backbone, head: Mapping[str, nn.Parameter]) -> None:
    """Raise `FastpeftError` if parameters of the head are quantised, which train."""
    if quantised := [name for name, parameter in head.items() if is_quantised(parameter)]:
        modules = list(dict.fromkeys(name.rpartition(".")[0] for name in quantised))
        raise FastpeftError(
            f"the head of the {backbone.class_name} is quantised ({some(quantised)}), and it "
            f"trains. Load the base with BitsAndBytesConfig(..., llm_int8_skip_modules={modules}), or the like."
        )


def warn_of_earlier_head(backbone: Backbone) -> None:
    """Warn where the head of a module may be made before its layers, so that it does not train."""
    if backbone.may_have_an_earlier_head():
        logger.warning(
            "no parameter of the %s comes after its layers in base.modules(), so the side network trains alone: a "
            "head that is made before the layers stays as it is. Make it after them if it is new",
            backbone.class_name,
        )


def warn_of_shared_head(model: nn.Module, head: Collection[nn.Parameter]) -> None:
    """Warn where the head is that of another side network that still exists. A copy of the base has its own head."""
    if any(_MODELS[parameter]() is not None for parameter in head if parameter in _MODELS):
        logger.warning(
            "another LadderModel was made with this base, and the head is one: training or loading either changes the "
            "answers of both. Load a base for each, or use a LadderPool, unless the other is out of use"
        )
    for parameter in head:
        _MODELS[parameter] = weakref.ref(model)


def check_adapters_around(model: nn.Module, trained: Collection[str]) -> None:
    """Raise `FastpeftError` if an adapter was put around a `LadderModel`, unless it is in the base's head alone.

    Nothing is propagated back to one in the backbone, and the side network reads its own weights without their layers.
    `trained` are the names of the parameters that the model trains.
    """
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and any(each.requires_grad for each in module.parameters()):
            of_head = any(name.startswith(f"{path}.") for name in trained)
            if path.startswith("side.") or not of_head:
                raise FastpeftError(
                    f"an adapter was put into {path} of a LadderModel, where it would learn nothing or not be read. "
                    "Make the model anew, or put the adapter into the base first and set train_adapters=True in the "
                    "LadderConfig."
                )


def check_inputs(backbone: Backbone, given: Tensor | None) -> None:
    """Raise `FastpeftError` if the base is given nothing to read, or one row that is in no batch."""
    if given is None:
        names = "inputs" if backbone.plain else "input_ids, inputs_embeds or pixel_values"
        raise FastpeftError(f"LadderModel beside a {backbone.class_name} got no {names}. Give it.")
    if not backbone.plain and given.dim() < 2:
        raise FastpeftError(
            f"LadderModel beside a {backbone.class_name} got a tensor of shape {tuple(given.shape)}; it takes a batch, "
            "whose first dimension is rows. Of one row give row[None]."
        )


def check_read(backbone: Backbone, given: Mapping[str, Any]) -> None:
    """Raise `FastpeftError` if a module is given tensors beside its `inputs`, or a transformers model gets `inputs`."""
    read = ("inputs", "attention_mask", "labels") if backbone.plain else given.keys() - {"inputs"}
    if unread := [name for name, value in given.items() if isinstance(value, Tensor) and name not in read]:
        takes = ", ".join(read) if backbone.plain else "its inputs by their own names"
        raise FastpeftError(
            f"LadderModel beside a {backbone.class_name} takes {takes}, and got {', '.join(unread)}. Leave it out."
        )


def warn_of_no_gradient(given: Tensor, gradients_from: int) -> bool:
    """Whether a pass reads what asks for a gradient, such as a soft prompt, and none comes to it; a warning says so.

    Args:
        given: what the base reads, which requires a gradient.
        gradients_from: the first layer through which gradients flow, 0 for all.
    """
    if gradients_from == 0 or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    logger.warning(
        "the input of a LadderModel requires a gradient, but none comes to it, since nothing is propagated back "
        "through the backbone: what made it does not train. Train that without a side network, as by SiVA, or call "
        "detach() on the input"
    )
    return True


def check_labels(backbone: Backbone, *labels: Tensor | None) -> None:
    """Raise `FastpeftError` if a base without a head is given labels."""
    if backbone.headless and any(each is not None for each in labels):
        raise FastpeftError(
            f"the base, a {backbone.class_name}, has no head, so it makes no loss of labels. Leave "
            "them out, or load the base with a head, such as by AutoModelForSequenceClassification."
        )


def check_mask(attention_mask: Tensor | None, tokens: tuple[int, int]) -> None:
    """Raise `FastpeftError` if there is a mask of another shape than `(B, T)`, where T counts cached tokens too."""
    if attention_mask is not None and attention_mask.shape != tokens:
        raise FastpeftError(
            f"attention_mask has the shape {tuple(attention_mask.shape)}; the side network takes (B, T), here "
            f"{tuple(tokens)}, with 1 for tokens and 0 for padding; cached tokens count too."
        )


def check_attentions(asked: bool | None) -> None:
    """Raise `FastpeftError` if the probabilities of attentions are asked for."""
    if asked:
        raise FastpeftError(
            "output_attentions=True, but a side network keeps no probabilities of its attention. Leave it out; the "
            "base alone returns those of its own."
        )


def check_positions(position_ids: Tensor | None, attention_mask: Tensor | None) -> None:
    """Raise `FastpeftError` where positions do not follow each other and there is no mask: texts that were joined.

    Transformers takes such rows for joined texts, which a causal backbone keeps apart. The side network, whose masks
    are of tokens alone, would not. What `torch.compile` traces is checked when it runs, by a `RuntimeError`.
    """
    if position_ids is None or attention_mask is not None:
        return
    # time, height and width of what Qwen2-VL sees are no places in the row; those are a fourth plane, the first
    places = position_ids[: len(position_ids) - 3] if position_ids.ndim == 3 else position_ids
    follow = places.diff(dim=-1) == 1
    if torch.compiler.is_compiling():
        torch._assert_async(follow.all(), _JOINED)
    elif not follow.all():
        raise FastpeftError(_JOINED)
