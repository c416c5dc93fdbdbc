"""Base models: found by name, path or hub id, loaded in a dtype that does not depend on the file's, with a head."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import transformers
from tokenizers import normalizers
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from fastpeft.data.names import DEMO
from fastpeft.data.problems import REGRESSION, Problem
from fastpeft.errors import FastpeftError, NotEnoughMemoryError, first_line, is_out_of_memory
from fastpeft.support import files
from fastpeft.support.adapter_files import holds_adapter
from fastpeft.support.four_bits import keep_form
from fastpeft.support.hub import model_options, source_options
from fastpeft.support.model_card import HEADS, HUB_ID
from fastpeft.support.resident import files_paged_out

logger = logging.getLogger(__name__)

SIDE_NETWORK = "fastpeft_ladder"  # the model type of one beside its base
TOKENS_FIRST = ("xlnet", "fsmt")  # model types whose layers read (T, B, d)

_OF_SAMPLING = ("temperature", "top_p", "min_p", "top_h", "typical_p", "top_k", "epsilon_cutoff", "eta_cutoff")


@dataclass(frozen=True)
class LoadedModel:
    """A model with the head of its problem, and its tokenizer.

    Attributes:
        model: a `PreTrainedModel`.
        tokenizer: its tokenizer, which has a padding token.
        head: names of the modules that belong to the task or that the checkpoint did not hold.
        trains_head: whether an adapter trains the head too; one of words that the checkpoint has stays as it is.
        new_head: those of `head` that were drawn at random, so that they have further to go than all else.
    """

    model: Any
    tokenizer: Any
    head: tuple[str, ...]
    trains_head: bool = True
    new_head: tuple[str, ...] = ()

    @cached_property
    def max_length(self) -> int:
        """The longest input in tokens, see `longest_input`."""
        return longest_input(self.model, self.tokenizer)


def longest_input(model: Any, tokenizer: Any) -> int:
    """What a model reads in tokens, with special tokens, after the context of a side network that has one."""
    context = len(getattr(model.config, "context", None) or ())
    known: int = tokenizer.model_max_length - context
    positions: int | None = getattr(model.config, "max_position_embeddings", None)
    if positions is None or positions < 1:  # XLNet says -1: it reads texts of any length
        return known
    positions -= context
    for name, module in model.named_modules():  # RoBERTa and its kin count on from the place of padding
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions -= module.padding_idx + 1
    return min(known, positions)


def resolve_model(model: str) -> str:
    """What `from_pretrained` takes for `model`: a folder or a hub id.

    Raises:
        FastpeftError: it looks like a path where nothing is, or holds a part of a model: an adapter, a side network;
            or it is the demo's, which is not installed.
    """
    if model == DEMO:
        found = importlib.util.find_spec("fastpeft_demo")
        if found is None or not found.submodule_search_locations:
            raise FastpeftError(
                "the demo model is not installed; it is the package fastpeft-demo, the folder demo/ of the repository. "
                "Run pip install fastpeft-demo, or give your own model."
            )
        return found.submodule_search_locations[0]
    folder = files.path_of(model)
    if holds_adapter(folder) and not (folder / "config.json").is_file():
        raise FastpeftError(
            f"the folder {model!r} holds an adapter, not a whole model. Give the model that it was trained on, or "
            "merge the two (merge_and_unload) and give the folder of the result."
        )
    config = folder / "config.json"
    if config.is_file() and files.read_json(config).get("model_type") == SIDE_NETWORK:
        raise FastpeftError(
            f"the folder {model!r} holds a side network, not a whole model. Give the model that it was trained beside, "
            "or go on with its run by --init-from."
        )
    if folder.is_dir():
        return str(folder.resolve())  # an adapter keeps it, and may be loaded from elsewhere
    if folder.exists() or not HUB_ID.fullmatch(model):
        raise FastpeftError(
            f"no model at {model!r}; give {DEMO!r}, a folder with config.json and model.safetensors, or a hub id such "
            "as FacebookAI/roberta-large."
        )
    logger.info("no folder %r here; looking for that name in the cache and on the model hub", model)
    return model


def check_model(model: str) -> None:
    """Raise `FastpeftError` where there is no `model`, or its configuration cannot be read. Loads no weights."""
    source = resolve_model(model)
    try:
        transformers.AutoConfig.from_pretrained(source, **source_options(source))
    except Exception as error:  # a broken file surfaces as almost any type
        raise _unloadable(model, error) from error


def _unloadable(model: str, error: Exception) -> FastpeftError:
    if is_out_of_memory(error):
        return NotEnoughMemoryError(
            f"memory is not enough to load the model {model!r} ({first_line(error).rstrip('.')}). Free some, or "
            "choose a smaller model."
        )
    return FastpeftError(
        f"cannot load the model {model!r}: {first_line(error)} Give {DEMO!r}, a folder with config.json, "
        "model.safetensors and a tokenizer, or a hub id."
    )


def load_classifier(
    model: str, labels: Sequence[str], problem: Problem, dtype: torch.dtype = torch.float32
) -> LoadedModel:
    """Load `model` with the head of `problem`; a head or pooler that its checkpoint lacks is drawn at random.

    Weights are read from safetensors only and come in `dtype` whatever the file holds.

    Args:
        model: `"demo"`, a folder or a hub id.
        labels: names of the head's outputs.
        problem: what the head is for; its loss is the model's own.
        dtype: of the weights, float32 or bfloat16.

    Raises:
        FastpeftError: the model is missing, broken, incomplete, or of a kind that has no such head.
    """
    id2label = dict(enumerate(labels))
    loaded, tokenizer, info = _load(
        getattr(transformers, f"AutoModelFor{HEADS[problem.task_type or '']}"),
        model,
        # byte-level tokenizers read a word by itself as they would read it after a space
        {"add_prefix_space": True} if problem.per_token else {},
        dtype=dtype,
        id2label=id2label,
        label2id={label: index for index, label in id2label.items()},
        problem_type=None if problem.per_token else problem.name,
    )
    if problem.per_token and not tokenizer.is_fast:
        raise FastpeftError(
            f"{type(tokenizer).__name__}, the tokenizer of {model!r}, does not map tokens to words, which tagging "
            "requires. Give a model with a fast tokenizer."
        )
    if problem.per_token:
        _read_words_after_a_space(tokenizer)
    _settle_padding(loaded, tokenizer)
    if problem is REGRESSION:
        _keep_float32(loaded)
    drawn = {*info["missing_keys"], *_mismatched(info)}
    head = _head_modules(loaded, drawn)
    new = tuple(name for name in head if any(key.startswith(f"{name}.") for key in drawn))
    return LoadedModel(loaded, tokenizer, head, new_head=new)


def _read_words_after_a_space(tokenizer: Any) -> None:
    """Have each word of a list read as in a text: byte-level tokenizers, as GPT-2's, may leave out the space before."""
    alone = tokenizer(["a", "a"], is_split_into_words=True, add_special_tokens=False)["input_ids"]
    in_line = tokenizer("a a", add_special_tokens=False)["input_ids"]
    if alone != in_line:
        backend = tokenizer.backend_tokenizer
        own = [] if backend.normalizer is None else [backend.normalizer]
        backend.normalizer = normalizers.Sequence([*own, normalizers.Prepend(" ")])


class _Float32Linear(nn.Linear):
    """A linear layer that autocast leaves as it is."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


def _keep_float32(model: nn.Module) -> None:
    """Have autocast leave the layer that answers with one number, which in bfloat16 has two to three digits."""
    for module in model.modules():
        if type(module) is nn.Linear and module.out_features == 1:
            module.__class__ = _Float32Linear  # in place: names and copies of it stay as they are


def load_language_model(model: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load `model` with its head for masked words or, of a decoder, for next words, and its tokenizer.

    A decoder's tokenizer loses its mask token: by that a prompt knows a decoder.

    Raises:
        FastpeftError: the model is missing, broken or incomplete, or has no head for words.
    """
    config = _config_of(model)
    if config is not None and is_causal_lm(config):
        decoder = load_for_next_words(model, dtype)
        decoder.tokenizer.mask_token = None
        return decoder.model, decoder.tokenizer
    loaded, tokenizer, head_is_new = _load_masked_lm(model, dtype)
    if head_is_new:
        raise _without_words(
            model,
            "which label words need. Train one on texts (fastpeft train --objective mlm --method head), or give",
        )
    return loaded, tokenizer


def _load_masked_lm(model: str, dtype: torch.dtype) -> tuple[Any, Any, bool]:
    """The model, its tokenizer, and whether the head for masked words, or a part of it, was drawn at random."""
    config = _config_of(model)
    if config is None or config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        loaded, tokenizer, info = _load(transformers.AutoModelForMaskedLM, model, {}, dtype=dtype)
        return loaded, tokenizer, bool(_new_in_head(loaded, info))
    raise _without_words(model, "which label words and the objective mlm need, and its kind has none. Give")


def _without_words(model: str, what: str) -> FastpeftError:
    """The error where a model predicts no masked words."""
    return FastpeftError(
        f"the model {model!r} has no masked-word head, {what} a model that predicts masked words; to train by labels, "
        "a prompt can have a classification head instead (fastpeft train --prompt-head classifier)."
    )


def load_for_masked_words(model: str, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Load `model` to predict masked words, with the head that it has or else a new one.

    The layer of the vocabulary is never new: it is the embeddings.

    Raises:
        FastpeftError: the model is missing, broken or incomplete, or is of a kind that predicts no masked words.
    """
    loaded, tokenizer, head_is_new = _load_masked_lm(model, dtype)
    if head_is_new:
        logger.info("the model %r has no masked-word head; a new one is trained", model)
    return LoadedModel(loaded, tokenizer, masked_lm_head_layers(loaded, loaded), head_is_new)


def load_for_next_words(model: str, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Load `model` to generate text, with the head that it has.

    Raises:
        FastpeftError: the model is missing, broken or incomplete, or is of a kind that predicts no next words.
    """
    config = _config_of(model)
    if config is not None and not is_causal_lm(config):
        raise FastpeftError(
            f"the model {model!r} ({config.model_type}) is not a decoder, which the objective causal requires. Give a "
            "decoder, such as HuggingFaceTB/SmolLM2-135M-Instruct; an encoder learns texts by --objective mlm."
        )
    loaded, tokenizer, info = _load(transformers.AutoModelForCausalLM, model, {}, dtype=dtype)
    if new := _new_in_head(loaded, info):
        raise FastpeftError(
            f"the model {model!r} has no LM head: its checkpoint lacks {new[0]}. Give a decoder's checkpoint."
        )
    _settle_padding(loaded, tokenizer)
    _leave_out_unread(loaded.generation_config)
    tokenizer.padding_side = "right"  # to train on; to go on from prompts they are padded on the left
    return LoadedModel(loaded, tokenizer, (), trains_head=False)


def _leave_out_unread(config: Any) -> None:
    """Of a generation configuration that does not sample leave out what sampling alone reads, as Vicuna's has it.

    Once training has changed its padding token, transformers refuses to save it, and the trained model with it.
    """
    unread = [name for name in _OF_SAMPLING if getattr(config, name, None) is not None and not config.do_sample]
    for name in unread:
        setattr(config, name, None)
    if unread:
        logger.info("the model decodes greedily; its generation_config.json has %s, left out", ", ".join(unread))


def _config_of(model: str) -> Any:
    """The configuration of `model`; None where it cannot be read, which loading the model will tell."""
    with suppress(Exception):
        source = resolve_model(model)
        return transformers.AutoConfig.from_pretrained(source, **source_options(source))
    return None


def hidden_size(model: str) -> int | None:
    """The width of `model`'s text part by its configuration; None where that cannot be read or names none."""
    config = _config_of(model)
    with suppress(ValueError):  # of a model with several text parts, as MusicGen
        return None if config is None else getattr(config.get_text_config(), "hidden_size", None)
    return None


def is_stored_in_bfloat16(model: str) -> bool:
    """Whether the weights in the files of `model` are in bfloat16, by its configuration."""
    return getattr(_config_of(model), "dtype", None) is torch.bfloat16


def is_causal_lm(config: Any) -> bool:
    """Whether a configuration is of a decoder; where a kind can be either, as BERT, its `is_decoder` decides."""
    kind = config.model_type
    reads_both_ways = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not reads_both_ways


def masked_lm_head_layers(masked_lm: Any, model: nn.Module) -> tuple[str, ...]:
    """Names of the layers in a masked-word head without that of the vocabulary: the dense layer and the norm.

    They are names in `model`, which is the one that has the head, or wraps it.
    """
    children = [child for name, child in masked_lm.named_children() if name != masked_lm.base_model_prefix]
    outside = {module for child in children for module in child.modules()}
    layers = [(name, module) for name, module in model.named_modules() if module in outside]
    # the vocabulary's layer is told by its size: DeBERTa names its dense layer as its output embeddings
    return tuple(
        name
        for name, layer in layers
        if not [*layer.children()]
        and [*layer.parameters()]
        and all(len(parameter) != masked_lm.config.vocab_size for parameter in layer.parameters())
    )


def _load(
    auto_class: Any, model: str, tokenizer_options: Mapping[str, Any], **options: Any
) -> tuple[Any, Any, Mapping[str, Any]]:
    """Model, tokenizer, and which weights the checkpoint lacks."""
    source = resolve_model(model)
    try:
        with files_paged_out():
            loaded, info = auto_class.from_pretrained(
                source,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # a head for another number of classes is replaced
                output_loading_info=True,
                **model_options(source),
                **options,
            )
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **source_options(source), **tokenizer_options)
    except Exception as error:  # a broken file surfaces as almost any type
        raise _unloadable(model, error) from error
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):  # transformers makes one where none is saved
        raise FastpeftError(
            f"cannot load the model {model!r}: its tokenizer knows no words, only special tokens. Save it beside the "
            "model: AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER)."
        )
    _check_encoder(model, loaded.base_model_prefix, info)
    keep_form(loaded)
    return loaded, tokenizer, info


def _settle_padding(model: Any, tokenizer: Any) -> None:
    """Have both agree on the padding token, which is that of the end where the tokenizer has none."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id


def _new_in_head(model: Any, info: Mapping[str, Any]) -> list[str]:
    """The weights outside the encoder that the checkpoint lacks."""
    return [key for key in info["missing_keys"] if not key.startswith(f"{model.base_model_prefix}.")]


def _check_encoder(model: str, prefix: str, info: Mapping[str, Any]) -> None:
    """Refuse an encoder that was drawn at random in parts: only a head or a pooler may be new."""
    missing = {key for key in info["missing_keys"] if ".pooler." not in key}
    for keys, fault in (_mismatched(info), "has another shape than config.json says"), (missing, "is missing"):
        inside = sorted(key for key in keys if key.startswith(f"{prefix}."))
        if inside:
            others = f", and {len(inside) - 1} other weights likewise" if len(inside) > 1 else ""
            raise FastpeftError(
                f"cannot load the model {model!r}: {inside[0]} {fault}{others}. Restore the checkpoint, or the "
                "config.json that belongs to it."
            )


def _mismatched(info: Mapping[str, Any]) -> set[str]:
    return {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}


def _head_modules(model: Any, missing: Iterable[str]) -> tuple[str, ...]:
    """The model's children outside its encoder, and inside it each module that has parameters the checkpoint lacks."""
    encoder = model.base_model_prefix
    head = [name for name, child in model.named_children() if name != encoder and any(True for _ in child.parameters())]
    fresh = {key.rpartition(".")[0] for key in missing if key.startswith(f"{encoder}.")}
    return (*head, *sorted(fresh))
