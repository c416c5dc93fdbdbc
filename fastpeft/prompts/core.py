"""The language model inside wrappers, from which a prompt's label words are read."""

from __future__ import annotations

from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from fastpeft.errors import FastpeftError
from fastpeft.models import is_causal_lm
from fastpeft.prompts.template import Prompt, is_of_decoder


def core_for(model: Any, tokenizer: Any, prompt: Any) -> Any:
    """The language model inside `model`, from which the label words of `prompt` can be read.

    Raises:
        FastpeftError: there is none, or model, tokenizer and prompt do not fit each other.
    """
    if not isinstance(prompt, Prompt):
        raise FastpeftError(
            f"the prompt is {prompt!r:.100}, a {type(prompt).__name__}. Give a Prompt, such as "
            'Prompt("{text} It was <mask>.", {"negative": "terrible", "positive": "great"}).'
        )
    if hasattr(model, "_orig_mod"):
        raise FastpeftError("the model is compiled. Compile what is around it: torch.compile(PromptModel(...)).")
    if prompt.head != "label_words":
        raise FastpeftError(
            f"a prompt with head={prompt.head!r} needs no PromptModel, which reads label words. Train a model with "
            'a classification head on prompt.encode(...), or take head="label_words".'
        )
    core = find_core(model)
    if core is None:
        raise FastpeftError(
            f"{type(model).__name__} has no LM head, which label words require. Load a masked language "
            "model by AutoModelForMaskedLM or a decoder by AutoModelForCausalLM. Any other needs no PromptModel: "
            "load it by AutoModelForSequenceClassification and train it on the rows that a Prompt without <mask> "
            'and with head="classifier" encodes.'
        )
    if getattr(core.config, "is_encoder_decoder", False):
        raise FastpeftError(
            f"{type(core).__name__} has an encoder and a decoder, and a prompt is read by one of them. Load a "
            "masked language model such as RoBERTa by AutoModelForMaskedLM, or a decoder by AutoModelForCausalLM."
        )
    _check_tokenizer(core, tokenizer)
    return core


def find_core(model: Any) -> Any:
    """The language model inside wrappers, None if there is none."""
    while True:
        if hasattr(model, "get_base_model"):  # before names are asked: PEFT's may end as those of what they wrap
            model = model.get_base_model()
        if _fills_masks(model) or _is_decoder(model):
            return model
        inside = getattr(model, "base_model", model)
        if inside is model:
            return None
        model = inside


def _fills_masks(model: Any) -> bool:
    name = type(model).__name__
    return name.endswith("ForMaskedLM") or name in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()


def _is_decoder(model: Any) -> bool:
    name = type(model).__name__
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return (name.endswith("ForCausalLM") or name in names) and is_causal_lm(model.config)


def _check_tokenizer(model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer by which a prompt would take a decoder for a model that fills masks, or the other way."""
    if _fills_masks(model) != is_of_decoder(tokenizer):
        return
    if _fills_masks(model):
        raise FastpeftError(
            f"{type(model).__name__} fills masks, and its tokenizer has no mask token. Give the tokenizer that belongs "
            "to the model."
        )
    raise FastpeftError(
        f"{type(model).__name__} is a decoder, which fills no masks, and its tokenizer has the mask token "
        f"{tokenizer.mask_token!r}. Set tokenizer.mask_token = None, before rows are encoded too."
    )
