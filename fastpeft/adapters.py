"""An adapter that PEFT's `save_pretrained` wrote, put onto its base model again."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import peft
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer

from fastpeft import files
from fastpeft.errors import FastpeftError

logger = logging.getLogger(__name__)

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_LOADERS = {
    None: peft.AutoPeftModel,  # the folder then names the class of its base model
    "SEQ_CLS": peft.AutoPeftModelForSequenceClassification,
    "TOKEN_CLS": peft.AutoPeftModelForTokenClassification,
    "QUESTION_ANS": peft.AutoPeftModelForQuestionAnswering,
    "CAUSAL_LM": peft.AutoPeftModelForCausalLM,
    "SEQ_2_SEQ_LM": peft.AutoPeftModelForSeq2SeqLM,
    "FEATURE_EXTRACTION": peft.AutoPeftModelForFeatureExtraction,
}
_LAST_LAYER = re.compile(r"\.(classifier|score)(\.out_proj)?\.weight")


def holds_adapter(folder: Path) -> bool:
    """Whether PEFT wrote an adapter there."""
    return (folder / _CONFIG).is_file()


def load_adapter(folder: Path) -> tuple[PeftModel, Any]:
    """The adapter in a local folder on its base model, on the CPU, and their tokenizer, None where neither has one.

    Raises:
        FastpeftError: the folder or its base model cannot be read, or it holds a prompt instead of weights.
    """
    folder = folder.absolute()  # a relative path might name a model of the hub
    config = files.read_json(folder / _CONFIG)
    base = config.get("base_model_name_or_path")
    task, kind = config.get("task_type"), config.get("peft_type")
    if task not in _LOADERS or "PROMPT" in str(kind) or "P_TUNING" in str(kind) or "PREFIX" in str(kind):
        raise FastpeftError(
            f"the adapter in {str(folder)!r} is of the type {kind} for the task {task}, which no plain model can stand "
            "for. Export one that changes the weights of its base model, as SiVA or LoRA."
        )
    try:
        model = _LOADERS[task].from_pretrained(str(folder), **_number_of_labels(folder)).eval()
    except (OSError, ValueError, SafetensorError) as error:
        raise FastpeftError(
            f"cannot put the adapter in {str(folder)!r} onto its base model {base!r} ({error}). Give "
            f"{_CONFIG} a base_model_name_or_path that can be loaded."
        ) from error
    place = str(folder) if (folder / "tokenizer_config.json").is_file() else base
    try:
        return model, AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, ImportError) as error:  # vision models, and models made by hand, have none
        logger.info("%s has no tokenizer that can be loaded (%s)", place, str(error).strip().partition("\n")[0])
        return model, None


def _number_of_labels(folder: Path) -> dict[str, int]:
    """What the base model's class needs to make the head that was saved with the adapter."""
    if not (folder / _WEIGHTS).is_file():
        return {}
    with safe_open(folder / _WEIGHTS, "pt") as file:
        heads = [key for key in sorted(file.keys()) if _LAST_LAYER.search(key)]
        return {"num_labels": file.get_slice(heads[0]).get_shape()[0]} if heads else {}
