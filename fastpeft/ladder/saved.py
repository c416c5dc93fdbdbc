"""What a saved side network is made of: its configuration, its weights, its base and the adapter beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file

from fastpeft.adapters import check_file
from fastpeft.errors import FastpeftError, first_line
from fastpeft.hub import model_options
from fastpeft.ladder.config import LadderConfig
from fastpeft.named_files import check_named_files

ADAPTER_FOLDER = "adapter"  # holds an adapter that trained too, as PEFT reads it


def read_config(source: str, hub: dict[str, Any]) -> LadderConfig:
    """The configuration that `save_pretrained` wrote to a folder or hub id; `hub` says where on the hub."""
    check_named_files(Path(source))
    try:
        values = dict(LadderConfig.get_config_dict(source, **hub)[0])
    except Exception as error:  # a broken file surfaces as almost any type
        raise FastpeftError(f"cannot load a side network from {source!r}: {first_line(error)}") from error
    if values.get("model_type") != LadderConfig.model_type:
        raise FastpeftError(
            f"{source!r} holds {values.get('model_type') or 'something'!r}, not a side network. Give a folder that "
            "LadderModel.save_pretrained wrote."
        )
    try:
        config: LadderConfig = LadderConfig.from_dict(values)
    except FastpeftError:
        raise
    except Exception as error:  # a value of another type surfaces as almost any
        raise FastpeftError(f"cannot use the configuration of a side network in {source!r}: {error}") from error
    return config


def read_weights(source: str, hub: dict[str, Any]) -> dict[str, Tensor]:
    try:
        weights: dict[str, Tensor] = load_file(cached_file(source, SAFE_WEIGHTS_NAME, **hub))
    except Exception as error:  # a broken file surfaces as almost any type
        raise FastpeftError(f"cannot read the side network in {source!r}: {first_line(error)}") from error
    return weights


def load_base(config: LadderConfig, arguments: dict[str, Any]) -> nn.Module:
    """The base model that `config` names."""
    name, kind = config.base_model_name_or_path, config.base_class
    loader = getattr(transformers, kind or "", None)
    if name is None or loader is None:
        raise FastpeftError(
            f"the side network was trained on {name or 'a base without a name'} of class {kind}, which cannot be "
            "loaded by itself. Pass it: LadderModel.from_pretrained(..., base=model)."
        )
    if arguments.get("dtype", "auto") == "auto":
        arguments["dtype"] = config.dtype or "auto"  # the dtype it was trained in, not that of the file
    arguments = {
        "revision": config.base_revision or "main",
        "ignore_mismatched_sizes": True,  # of a head, which is loaded from the side network's file
        "use_safetensors": True,
        **model_options(name),
        **task_fields(config),
        **arguments,
    }
    try:
        base: nn.Module = loader.from_pretrained(name, **arguments)
    except Exception as error:  # a broken file surfaces as almost any type
        raise FastpeftError(
            f"cannot load the backbone {name!r} of the side network: {first_line(error)} Pass it: "
            "LadderModel.from_pretrained(..., base=model)."
        ) from error
    return base


def task_fields(config: Any) -> dict[str, Any]:
    """What the configuration of a model with a head says of its task."""
    names = ("id2label", "label2id", "problem_type")
    return {name: getattr(config, name) for name in names if getattr(config, name, None) is not None}


def load_adapter(base: nn.Module, source: str, hub: Mapping[str, Any] | None = None) -> PeftModel:
    """Put the adapter that was trained beside a saved side network onto its base.

    Raises:
        FastpeftError: it cannot be read or put there.
    """
    hub = {} if hub is None else hub
    if Path(source).is_dir():
        check_file(Path(source) / ADAPTER_FOLDER)
    place = {**hub, "subfolder": "/".join(filter(None, (hub.get("subfolder"), ADAPTER_FOLDER)))}
    try:
        return PeftModel.from_pretrained(base, source, is_trainable=True, **place)
    except FastpeftError:
        raise
    except Exception as error:  # a broken file surfaces as almost any type
        raise FastpeftError(
            f"cannot load the adapter beside the side network in {source!r}: {first_line(error)} Train it anew."
        ) from error
