"""Models to measure beside the bundled one: shapes of known ones with random weights, which decide no time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import LlamaConfig, LlamaForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

from fastpeft.data.problems import CLASSIFICATION
from fastpeft.models import load_classifier

_COMMON: dict[str, Any] = {"vocab_size": 50_265, "max_position_embeddings": 514, "type_vocab_size": 1}
BASE = RobertaConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, **_COMMON)
LARGE = RobertaConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, **_COMMON)
LLAMA = LlamaConfig(  # Llama-3.2-1B
    **{"vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "pad_token_id": 0},
)
SMOLLM2 = LlamaConfig(  # SmolLM2-135M
    **{"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30},
    **{"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
)
MODELS: dict[str, Callable[[], Any]] = {
    "demo": lambda: load_classifier("demo", ["negative", "positive"], CLASSIFICATION).model,  # 6 layers of 384
    "base": lambda: RobertaForSequenceClassification(BASE),
    "large": lambda: RobertaForSequenceClassification(LARGE),
    "1b": lambda: LlamaForSequenceClassification(LLAMA),
}
HEADS = {"1b": "score"}  # the module that trains, where it is not "classifier"


def checkpoint_activations(model: Any) -> None:
    """Let each layer, or each block of a side network, keep its input alone and compute the rest again in backward."""
    # the older transformers have the second name alone
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
