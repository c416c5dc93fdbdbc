"""An adapter that PEFT's `save_pretrained` wrote, put onto its base model again."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoTokenizer

from fastpeft.errors import FastpeftError, first_line, is_out_of_memory
from fastpeft.support import files
from fastpeft.support.adapter_files import CONFIG, WEIGHTS, check_adapter
from fastpeft.support.hub import OWN_ATTENTION, source_options
from fastpeft.support.model_card import HEADS

logger = logging.getLogger(__name__)

_LOADERS: dict[str | None, Any] = {
    None: peft.AutoPeftModel,  # the folder then names the class of its base model
    **{task: getattr(peft, f"AutoPeftModelFor{head}") for task, head in HEADS.items()},
}
_LAST_LAYER = re.compile(r"\.(classifier|score)(\.out_proj)?\.weight")


def check_weights(model: PeftModel, folder: Path) -> None:
    """Raise `FastpeftError` unless all that the adapter on `model` holds came from the file in `folder`, and is finite.

    PEFT loads what a file holds of an adapter and leaves the rest as it was drawn. It silently drops other tensors.
    """
    own = get_peft_model_state_dict(model, adapter_name=model.active_adapter, save_embedding_layers=False)
    with safe_open(folder / WEIGHTS, "pt") as file:
        kinds = {key: file.get_slice(key).get_dtype() for key in sorted(file.keys())}
    _refuse(folder, "is missing", sorted(own.keys() - kinds.keys()))
    _refuse(folder, "belongs to no part of it", sorted(kinds.keys() - own.keys()))
    floating = [key for key, tensor in own.items() if tensor.is_floating_point()]  # a norm counts batches otherwise
    _refuse(folder, "is not of floating numbers", [key for key in floating if not kinds[key].startswith(("F", "BF"))])
    _check_finite(own, folder)


def _check_finite(own: Mapping[str, Tensor], folder: Path) -> None:
    _refuse(folder, "is not finite", [key for key, tensor in own.items() if not tensor.isfinite().all()])


def _refuse(folder: Path, fault: str, names: Sequence[str]) -> None:
    """Raise `FastpeftError` where any tensor has a fault, given the names of those that have it."""
    if names:
        others = f", and {len(names) - 1} more likewise" if len(names) > 1 else ""
        raise FastpeftError(
            f"the adapter in {str(folder)!r} is damaged: {names[0]} {fault}{others}. Restore it, or train it anew."
        )


def put_onto(base: Any, folder: Path) -> PeftModel:
    """The adapter that a run left in `folder`, on its base."""
    check_adapter(folder)
    try:
        model = PeftModel.from_pretrained(base, str(folder))
    except FastpeftError as error:
        raise FastpeftError(f"cannot load the adapter in {str(folder)!r}: {error}") from error
    except Exception as error:  # a broken file surfaces as almost any type
        if is_out_of_memory(error):
            raise
        raise FastpeftError(f"cannot load the adapter in {str(folder)!r}: {error} Train it anew.") from error
    check_weights(model, folder)
    return model


def load_adapter(folder: Path) -> tuple[PeftModel, Any]:
    """The adapter in a local folder on its base model, on the CPU, and their tokenizer, None where neither has one."""
    folder = folder.absolute()  # a relative path might name a model of the hub
    config = files.read_json(folder / CONFIG)
    base = config.get("base_model_name_or_path")
    task, kind = config.get("task_type"), config.get("peft_type")
    if task not in _LOADERS or "PROMPT" in str(kind) or "P_TUNING" in str(kind) or "PREFIX" in str(kind):
        raise FastpeftError(
            f"the adapter in {str(folder)!r} is of the type {kind} for the task {task}, which no plain model can stand "
            "for. Export one that changes the weights of its base model, as SiVA or LoRA."
        )
    library = (config.get("auto_mapping") or {}).get("parent_library")
    if task is None and str(library).partition(".")[0] != "transformers":  # which PEFT would import, whatever it is
        raise FastpeftError(
            f"the adapter in {str(folder)!r} names {library!r} for the library of its base model; only transformers is "
            "imported. Load the base model and PeftModel.from_pretrained in a program of your own."
        )
    check_adapter(folder)
    try:
        options = {**source_options(str(base)), **OWN_ATTENTION, **_new_head(folder)}
        with warnings.catch_warnings():
            # the first is of the base's head alone: PEFT warns of weights of the adapter that it leaves out
            warnings.filterwarnings("error", r"[\s\S]*(ignore_mismatched_sizes|missing adapter keys)")
            model = _LOADERS[task].from_pretrained(str(folder), use_safetensors=True, **options).eval()
    except (OSError, ValueError, KeyError, SafetensorError, UserWarning) as error:  # of a head that lacks a weight
        raise FastpeftError(
            f"cannot put the adapter in {str(folder)!r} onto its base model {base!r} ({error}). Restore its files, or "
            f"give {CONFIG} a base_model_name_or_path that can be loaded."
        ) from error
    _check_finite(get_peft_model_state_dict(model, save_embedding_layers=False), folder)
    place = str(folder) if (folder / "tokenizer_config.json").is_file() else base
    try:
        return model, AutoTokenizer.from_pretrained(place, **source_options(str(place)))
    except (OSError, ValueError, ImportError) as error:  # vision models, and models made by hand, have none
        logger.info("%s has no tokenizer that can be loaded (%s)", place, first_line(error))
        return model, None


def _new_head(folder: Path) -> dict[str, int]:
    """What the base model's class needs to make the head that was saved with the adapter, whatever head it had."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        for key in filter(_LAST_LAYER.search, sorted(file.keys())):
            return {"num_labels": file.get_slice(key).get_shape()[0], "ignore_mismatched_sizes": True}
    return {}
