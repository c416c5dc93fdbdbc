"""Tiny random models under the hub's names that PEFT's tests load, in a folder laid out as the hub's own cache is."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig

_COMMIT = "0" * 40
# wide weights: an adapter must change the logits by more than the tests' tolerances
_COMMON = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1}
_SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = _SIZE | {"num_key_value_heads": 2, "max_position_embeddings": 64}
_BERT = _SIZE | {"max_position_embeddings": 64, "type_vocab_size": 2}
_DEBERTA = _BERT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
_BART = {
    f"{part}_{name}": size
    for part in ("encoder", "decoder")
    for name, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))
}

# name on the hub: class, model type, what its configuration adds to the common part
STAND_INS = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (
        "OPTForCausalLM",
        "opt",
        {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"max_position_embeddings": 64, "init_std": 0.1},
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": (
        "GPT2LMHeadModel",
        "gpt2",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (
        "GPTJForCausalLM",
        "gptj",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "llama", _LLAMA),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", "qwen2", _LLAMA),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM",
        "gemma3_text",
        _LLAMA | {"head_dim": 8, "query_pre_attn_scalar": 8},
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration",
        "t5",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration",
        "bart",
        {"d_model": 32, "max_position_embeddings": 64, "decoder_start_token_id": 2, "init_std": 0.1} | _BART,
    ),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", "bert", _BERT),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", "roberta", _BERT),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", "deberta", _DEBERTA),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", "deberta-v2", _DEBERTA),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        "BertForSequenceClassification",
        "bert",
        _BERT,
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        "roberta",
        _BERT,
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        "llama",
        _LLAMA,
    ),
}


def fill(cache: Path) -> None:
    """Put every stand-in that is not there yet into `cache`, the `HF_HUB_CACHE` of the tests."""
    for name, (class_name, model_type, sizes) in STAND_INS.items():
        folder = cache / f"models--{name.replace('/', '--')}"
        if (folder / "refs" / "main").exists():
            continue
        config: PreTrainedConfig = AutoConfig.for_model(model_type, **(_COMMON | sizes))
        torch.manual_seed(0)
        getattr(transformers, class_name)(config).save_pretrained(folder / "snapshots" / _COMMIT)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(_COMMIT, encoding="utf-8")
