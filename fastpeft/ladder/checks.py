"""What a side network refuses of its base, and what it warns of."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Collection, Mapping

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from fastpeft.errors import FastpeftError
from fastpeft.ladder.backbone import Backbone
from fastpeft.ladder.fingerprints import is_quantised
from fastpeft.ladder.saving import some
from fastpeft.support.processes import is_held_by_fsdp

logger = logging.getLogger(__name__)

# of each parameter of a head the latest side network; not an attribute, which a pickled base would keep
_MODELS: WeakIdKeyDictionary = WeakIdKeyDictionary()


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
