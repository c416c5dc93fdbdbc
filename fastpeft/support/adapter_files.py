"""The folder of an adapter that PEFT's `save_pretrained` wrote: whether it is one, and may be read."""

from __future__ import annotations

from pathlib import Path

from fastpeft.errors import FastpeftError
from fastpeft.support import files
from fastpeft.support.safe_paths import check_named_files

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # what PEFT puts before the name of a layer
_OTHERS = {"XLORA": "adapters", "SHADOW": "shadow_model"}  # types that name further models, which PEFT would load
# types with a field that names a folder or file to start from, which what is saved needs no more. Where LoRA's is set,
# PEFT imports the module that `megatron_core` names: before 0.20 any, as one beside the adapter
_STARTS = {
    "SIVA": "pissa",
    "MULTITASK_PROMPT_TUNING": "prompt_tuning_init_state_dict_path",
    "LORA": "megatron_config",
}


def holds_adapter(folder: Path) -> bool:
    """Whether PEFT wrote an adapter there."""
    return (folder / CONFIG).is_file()


def check_adapter(folder: Path) -> None:
    """Raise `FastpeftError` unless the adapter in a folder is safe to read.

    Its weights are in the one format that runs no code, and it names nothing outside of the folder but a base model.
    """
    check_named_files(folder)
    try:
        config = files.read_json(folder / CONFIG)
    except FastpeftError:  # PEFT tells what is wrong with it
        config = {}
    kind = str(config.get("peft_type"))
    key = _OTHERS.get(kind) or _STARTS.get(kind)
    if key and (kind in _OTHERS or config.get(key) is not None):
        raise FastpeftError(
            f"the adapter in {str(folder)!r} is of the type {kind} and names others ({key}: "
            f"{config.get(key)!r}), but only what is in its folder is read. Load it by PEFT if you trust what it names."
        )
    if not (folder / WEIGHTS).is_file():
        raise FastpeftError(
            f"the adapter in {str(folder)!r} has no {WEIGHTS}, and no other format is read. Restore that file, or "
            "save the adapter anew."
        )
