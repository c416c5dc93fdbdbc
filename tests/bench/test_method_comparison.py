"""The experiments for PEFT's comparison are configurations that PEFT takes, with one weight decay."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastpeft

EXPERIMENTS = Path(__file__).parents[2] / "bench" / "method_comparison" / "experiments"
ADAPTERS = sorted(EXPERIMENTS.glob("*/*/adapter_config.json"))


@pytest.mark.parametrize("file", ADAPTERS, ids=lambda file: file.parts[-3])
def test_peft_makes_the_adapter(file: Path) -> None:
    assert fastpeft.SivaConfig  # as who runs it imports the package
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).bfloat16()
    model = peft.get_peft_model(base, peft.PeftConfig.from_pretrained(file.parent), autocast_adapter_dtype=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    assert sum(parameter.numel() for parameter in trained) == 2 * 2 * 2 * 32 * 64


def test_all_have_one_weight_decay() -> None:
    own = [json.loads(file.read_text()) for file in EXPERIMENTS.glob("*/*/training_params.json")]
    assert [values["optimizer_kwargs"].get("weight_decay", 0.1) for values in own] == [0.1] * len(own)
    assert len(ADAPTERS) == 2
