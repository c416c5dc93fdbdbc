"""A tiny causal language model of nearly every architecture that transformers has."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

MOST = 3_000_000  # parameters; what takes more has a configuration in parts, or sizes under other names

# by their names in any configuration; each takes those that it knows
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 3),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "rotary_dim"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(("n_inner", "dff", "dim_ff"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "vocab_size", "vocab_size_per_layer_input"), 64),
    **dict.fromkeys(("pronunciation_vocab_size", "shape_vocab_size"), 64),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "moe_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_key_value_heads", "linear_num_key_heads", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "linear_num_value_heads", "n_shared_experts"), 2),
    **dict.fromkeys(("pad_token_id", "num_kv_shared_layers"), 0),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "mamba_d_state"), 16),
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
    "default_language": "en_XX",
}
_ONE_GROUP = {"n_group": 1, "topk_group": 1}
_LATENT = {"head_dim": None, "num_key_value_heads": 4, **_ONE_GROUP}
_OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "sarvam_mla"), _LATENT),
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa", "minicpm3", "youtu"), _LATENT),
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "layer_types": ["mamba", "attention", "mamba"]},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "n_groups": 1, "state_size": 8},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "reformer": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 8)},
    "zamba2": {"layer_types": ["mamba", "hybrid", "mamba"], "mamba_ngroups": 1, "n_mamba_heads": 8},
    "zaya": {"num_experts_per_tok": 1},
}
# texts of three lengths, padded on the left
WORDS = torch.randint(5, 60, (3, 12), generator=torch.Generator().manual_seed(1))
PADDED = torch.ones(3, 12, dtype=torch.long)
PADDED[1, :2] = PADDED[2, :4] = 0


def causal_model(kind: str, **changes: Any) -> Any:
    """One of those in `CAUSAL`, randomly initialised, the same at every call; the test is skipped where it is not tiny.

    Args:
        kind: as transformers calls the architecture.
        changes: of its configuration.
    """
    config = CONFIG_MAPPING[kind]
    known = set(inspect.signature(config.__init__).parameters) | set(getattr(config, "__dataclass_fields__", ()))
    sizes = {name: size for name, size in _SIZES.items() if name in known}
    sizes = {name: size for name, size in (sizes | _OWN.get(kind, {}) | changes).items() if size is not None}
    try:
        made: Any = config(**sizes)
        model = getattr(transformers, CAUSAL[kind])
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in model._from_config(made).parameters())
    except Exception as error:  # sizes that do not fit together surface as almost any type
        pytest.skip(f"no tiny {kind}: {error}")
    if count > MOST:
        pytest.skip(f"no tiny {kind}: it has {count:,} parameters")
    torch.manual_seed(0)
    return model._from_config(made)
