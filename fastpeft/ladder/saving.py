"""Files of a saved side network: its configuration, weights and model card, its base, and the adapter beside it."""

from __future__ import annotations

import contextlib
import copy
import os
import reprlib
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Self

import transformers
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from fastpeft.errors import FastpeftError, first_line
from fastpeft.ladder.backbone import Backbone
from fastpeft.ladder.config import SHAPE, LadderConfig
from fastpeft.ladder.fingerprints import check_fingerprints, fingerprints
from fastpeft.support.adapter_files import PREFIX, check_adapter
from fastpeft.support.hub import HUB_ARGUMENTS, model_options
from fastpeft.support.model_card import model_card, write_card
from fastpeft.support.safe_paths import check_named_files

ADAPTER_FOLDER = "adapter"  # holds an adapter that trained too, in PEFT's format
# fields of a base's configuration that other libraries read from a model's, as sentence-transformers and `generate` do
_SIZES = ("hidden_size", "max_position_embeddings", "vocab_size")
_PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")  # as transformers names them
_ON_THE_CARD = (
    *("window_size", "reduction_factor", "fusion", "residual", "normalise_features"),
    *("layer_drop", "share_projections", "output_mix", "backbone_dtype"),
)


class SavedModel(PreTrainedModel):
    """The part of a `LadderModel` that saves and loads it; the model names what trains and the adapters in the base."""

    config_class = LadderConfig

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write the side network and the part of the head that trains, their configuration and a model card.

        Args:
            save_directory: a folder, made if need be.
            args, kwargs: as for `PreTrainedModel.save_pretrained`, without `variant`.

        Raises:
            FastpeftError: there is a `variant`.
        """
        if (variant := kwargs.get("variant")) is not None:
            raise FastpeftError(
                f"variant={variant!r} would give the file of weights a name under which from_pretrained does not look: "
                "a side network has one form. Leave it out."
            )
        describe_base(self.config, self.backbone)
        if not self.config.base_fingerprints:
            self.config.base_fingerprints = fingerprints(self.backbone, self.adapters.values(), skip_trained=True)
        if kwargs.get("is_main_process", True):
            write_card_of(self.config, Path(save_directory))
            if self.adapters:
                self.base.save_pretrained(Path(save_directory) / ADAPTER_FOLDER)
        # or weights get the names that the base's architecture has on the hub, and loading looks for its own
        kwargs["save_original_format"] = False
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        base: nn.Module | None = None,
        config: LadderConfig | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a saved side network, beside its backbone.

        Args:
            pretrained_model_name_or_path: a folder that `save_pretrained` wrote, or a hub id.
            base: the base model without the side network, with or without the adapter that trained too. None loads it
                by its id, with the revision, dtype and labels it had.
            config: a configuration to use instead of the saved one.
            kwargs: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only` and `subfolder` apply to the
                side network; all others, such as `dtype` or `device_map`, go to the base's `from_pretrained`.

        Returns:
            The model, in evaluation mode.

        Raises:
            FastpeftError: there is no side network, or it was trained on another base.
        """
        source = str(pretrained_model_name_or_path)
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        if config is None:
            config = read_config(source, hub)
        weights = read_weights(source, hub)
        if base is None:
            base = load_base(config, kwargs)
        elif kwargs:
            raise FastpeftError(
                f"from_pretrained got a base and {', '.join(kwargs)}, which are for loading one. Leave out either."
            )
        if config.train_adapters and not isinstance(base, PeftModel):
            base = with_adapter(base, source, hub)
        model = cls(base, config)
        model._load(weights, source)
        if model.can_generate() and (own := read_generation_config(source, hub)) is not None:
            model.generation_config = own
        return model.eval()

    def take_over(self, source: str | os.PathLike[str], *, head: bool) -> None:
        """Continue from a saved side network of the same shape on the same backbone.

        An adapter that trained with it is taken over if one trains here; otherwise it must be merged into the backbone.

        Args:
            source: a folder or a hub id.
            head: whether to take over the trained head too.

        Raises:
            FastpeftError: there is no side network, or its shape or its backbone is another.
        """
        name = os.fspath(source)
        saved = read_config(name, {})
        form = {field: getattr(saved, field) for field in self._decided}
        wanted = copy.copy(self.config)
        wanted.update(form)
        check_shape(saved, wanted, name)
        base = saved.base_model_name_or_path
        check_fingerprints(self.backbone, saved.base_fingerprints, base, self.adapters.values())
        own, chosen = self.state_dict(), {}
        weights = {without_wrapper(item): tensor for item, tensor in read_weights(name, {}).items()}
        for item in self._trained:
            takes = saved.train_adapters if item in self.adapters else head or item.startswith("side.")
            found = weights.pop(without_wrapper(item), None)
            if not takes:
                chosen[item] = own[item]
            elif found is not None:
                chosen[item] = found
        if head and saved.train_adapters == self.config.train_adapters:
            chosen |= weights  # the check then refuses weights that this model does not have
        self._load(chosen, name)
        self.config.update(form)

    def _load(self, weights: dict[str, Tensor], source: str) -> None:
        """Load saved weights, which must be exactly those that train."""
        check_weights(weights, self.state_dict(), self._trained, source)
        self.load_state_dict(weights, strict=False)


def read_config(source: str, hub: dict[str, Any]) -> LadderConfig:
    """The configuration saved in a folder or hub id; `hub` holds some of `HUB_ARGUMENTS`."""
    check_named_files(Path(source, hub.get("subfolder") or ""))
    try:
        values = dict(LadderConfig.get_config_dict(source, **hub)[0])
    except Exception as error:  # a broken file raises almost any type
        raise FastpeftError(f"cannot load a side network from {source!r}: {first_line(error)}") from error
    if values.get("model_type") != LadderConfig.model_type:
        found = repr(values["model_type"]) if values.get("model_type") else "no type of model, as an adapter of PEFT"
        raise FastpeftError(
            f"{source!r} holds {found}, not a side network. Give a folder that LadderModel.save_pretrained wrote."
        )
    try:
        config: LadderConfig = LadderConfig.from_dict(values)
    except FastpeftError:
        raise
    except Exception as error:  # a value of another type raises almost any type
        raise FastpeftError(f"cannot use the configuration of a side network in {source!r}: {error}") from error
    return config


def read_weights(source: str, hub: dict[str, Any]) -> dict[str, Tensor]:
    try:
        parts = [load_file(file) for file in _weight_files(source, hub)]
    except Exception as error:  # a broken file surfaces as almost any type
        raise FastpeftError(f"cannot read the side network in {source!r}: {first_line(error)}") from error
    return {name: tensor for part in parts for name, tensor in part.items()}


def _weight_files(source: str, hub: dict[str, Any]) -> list[str]:
    """The file of weights, or where there is none the parts that `save_pretrained(max_shard_size=...)` made."""
    try:
        return [cached_file(source, SAFE_WEIGHTS_NAME, **hub)]
    except OSError:
        with contextlib.suppress(OSError):
            index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **hub)
            parts: list[str] = get_checkpoint_shard_files(source, index, **hub)[0]
            return parts
        raise


def read_generation_config(source: str, hub: dict[str, Any]) -> GenerationConfig | None:
    """The generation configuration saved in a folder or hub id; None if there is none."""
    try:
        config: GenerationConfig = GenerationConfig.from_pretrained(source, **hub)
    except OSError:
        return None
    return config


def load_base(config: LadderConfig, arguments: dict[str, Any]) -> nn.Module:
    """The base model that `config` names."""
    name, kind = config.base_model_name_or_path, config.base_class
    loader = getattr(transformers, kind or "", None)
    if name is None or loader is None:
        raise FastpeftError(
            f"the side network was trained on {name or 'a base without a name'} of class {kind}, which cannot be "
            "loaded by name. Pass it: LadderModel.from_pretrained(..., base=model)."
        )
    if "torch_dtype" in arguments:  # the name that transformers had before
        arguments["dtype"] = arguments.pop("torch_dtype")
    if arguments.get("dtype", "auto") == "auto":
        arguments["dtype"] = config.dtype or "auto"  # the dtype it was trained in, not that of the file
    arguments = {
        "revision": config.base_revision or "main",
        "ignore_mismatched_sizes": True,  # the head is loaded from the side network's file
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


def agree_on_problem(config: LadderConfig, backbone: Backbone) -> None:
    """Give the base, whose head computes the loss, the `problem_type` that is asked for.

    Raises:
        FastpeftError: it has another, or there is none of that name.
    """
    own = getattr(backbone.core.config, "problem_type", None)
    if config.problem_type not in (None, own, *_PROBLEMS):  # transformers takes any, and computes no loss for others
        raise FastpeftError(
            f"problem_type={config.problem_type!r}; allowed are {', '.join(map(repr, _PROBLEMS))}, and None."
        )
    if config.problem_type is None:
        return
    if own not in (None, config.problem_type):
        raise FastpeftError(
            f"the side network's problem_type is {config.problem_type!r}, but the base's is {own!r}. Load the base "
            f"with problem_type={config.problem_type!r}, or leave it out of LadderConfig."
        )
    backbone.core.config.problem_type = config.problem_type


def describe_base(config: LadderConfig, backbone: Backbone) -> None:
    """Copy the name, revision, class and task of a base into the configuration of its side network.

    Names of classes stay, as `model.config.id2label = ...` gives them, where the base has none for as many.
    """
    core, text = backbone.core, backbone.text_config
    config.base_class = type(core).__name__
    sizes = {name: getattr(text, name) for name in _SIZES if hasattr(text, name)}
    task = task_fields(core.config)
    labels = task.get("id2label", {})
    if len(labels) == config.num_labels and all(label == f"LABEL_{index}" for index, label in labels.items()):
        task = {name: value for name, value in task.items() if name not in ("id2label", "label2id")}
    for name, value in {**sizes, **task}.items():
        setattr(config, name, value)
    config.base_model_name_or_path = core.config.name_or_path or config.base_model_name_or_path
    config.base_revision = getattr(core.config, "_commit_hash", None) or config.base_revision


def task_fields(config: Any) -> dict[str, Any]:
    """The task fields of the configuration of a model with a head, those that are set."""
    names = ("id2label", "label2id", "problem_type")
    return {name: getattr(config, name) for name in names if getattr(config, name, None) is not None}


def with_adapter(base: nn.Module, source: str, hub: Mapping[str, Any]) -> PeftModel:
    """The base of a saved side network with the adapter that trained beside it.

    Raises:
        FastpeftError: the adapter cannot be read or added to the base.
    """
    if Path(source).is_dir():
        check_adapter(Path(source, hub.get("subfolder") or "", ADAPTER_FOLDER))
    place = {**hub, "subfolder": "/".join(filter(None, (hub.get("subfolder"), ADAPTER_FOLDER)))}
    try:
        return PeftModel.from_pretrained(base, source, is_trainable=True, **place)
    except FastpeftError:
        raise
    except Exception as error:  # a broken file surfaces as almost any type
        raise FastpeftError(
            f"cannot load the adapter beside the side network in {source!r}: {first_line(error)} Train it anew."
        ) from error


def check_shape(saved: LadderConfig, own: LadderConfig, source: str) -> None:
    """Raise `FastpeftError` unless `saved`, the configuration in `source`, gives the same weights as `own`."""
    different = [item for item in SHAPE if getattr(saved, item) != getattr(own, item)]
    if different:
        there = ", ".join(f"{item} is {reprlib.repr(getattr(saved, item))}" for item in different)
        here = ", ".join(reprlib.repr(getattr(own, item)) for item in different)
        raise FastpeftError(
            f"the side network in {source!r} has another shape: its {there}, here {here}. Give the same values."
        )


def check_weights(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], trained: Set[str], source: str) -> None:
    """Raise `FastpeftError` unless `weights`, read from `source`, are sound, and the `trained` ones of the model."""
    missing, unknown = sorted(trained - weights.keys()), sorted(weights.keys() - trained)
    if missing or unknown:
        raise FastpeftError(
            f"{source!r} does not hold the weights of this model: missing {some(missing)}, unknown {some(unknown)}. "
            "Load it with the configuration and the kind of base it was saved with."
        )
    for name, tensor in weights.items():
        if tensor.is_floating_point() != own[name].is_floating_point() or not tensor.isfinite().all():
            raise FastpeftError(
                f"{name} in {source!r} is damaged: its {tensor.dtype} values are of the wrong type or not finite. "
                "Restore the file, or train again."
            )
        if tensor.shape != own[name].shape:
            raise FastpeftError(
                f"{name} in {source!r} has the shape {tuple(tensor.shape)} and here {tuple(own[name].shape)}. Load it "
                "on the backbone it was trained on, with as many classes."
            )


def some(names: Sequence[str]) -> str:
    """The first few of many names."""
    return (", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")) or "none"


def without_wrapper(name: str) -> str:
    """The name of a weight, the same whether PEFT wraps the base or not."""
    return name.replace(f"base.{PREFIX}", "base.", 1)


def write_card_of(config: LadderConfig, folder: Path) -> None:
    """Write a model card, as `fastpeft.support.model_card.write_card` does."""
    folder.mkdir(parents=True, exist_ok=True)
    text = model_card(
        base_model=config.base_model_name_or_path or "the base model",
        method="LST" if config.fusion == "gated" else f"{config.window_size}-LST",
        snippet=f"import fastpeft\n\nmodel = fastpeft.LadderModel.from_pretrained({folder.name!r})",
        library="transformers",
        settings={name: getattr(config, name) for name in _ON_THE_CARD} | {"feature_dropout": config.dropout},
    )
    write_card(folder, text)
