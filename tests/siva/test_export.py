"""A SiVA adapter as a plain LoRA, on the base model that it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from fastpeft import FastpeftError, SivaConfig
from fastpeft.siva.decompose import Factors
from fastpeft.siva.export import lora_factors, save_as_lora

TINY = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}


def tiny(kind: str = "Roberta") -> nn.Module:
    """A randomly initialised classifier, the same at every call."""
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, f"{kind}ForSequenceClassification")(
        getattr(transformers, f"{kind}Config")(**TINY)
    ).eval()
    return model


def adapted(kind: str = "Roberta", **config: Any) -> peft.PeftModel:
    """One with an adapter, and a head, that training has moved."""
    model = peft.get_peft_model(tiny(kind), SivaConfig(task_type="SEQ_CLS", **config)).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(3, 50, (3, 9), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found: Tensor = model(ids).logits
    return found


def test_the_factors_make_what_training_changed() -> None:
    generator = torch.Generator().manual_seed(1)

    def factors(s: Tensor) -> Factors:
        return Factors(torch.randn(7, 3, generator=generator), s, torch.randn(3, 5, generator=generator))

    s = torch.tensor([3.0, 2.0, 1.0])
    trained, initial = factors(s), factors(s)
    a, b = lora_factors(trained, initial)
    assert (a.shape, b.shape) == ((6, 5), (7, 6))
    torch.testing.assert_close(b @ a, trained.product() - initial.product())


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("Roberta", {"r": 2}),
        ("Roberta", {"r": 2, "residual": "implicit"}),
        ("Roberta", {"r": 3, "target_modules": "all-linear", "rank_pattern": {"key": 1, r"layer\.1\..*query": 5}}),
        ("Roberta", {"r": 2, "layers_to_transform": [1]}),
        ("Roberta", {"r": 2, "d": 16}),
        ("GPT2", {"r": 2, "target_modules": ["c_attn", "c_proj"]}),
    ],
    ids=str,
)
def test_peft_loads_it_on_the_base_model(tmp_path: Path, kind: str, config: dict[str, Any]) -> None:
    model = adapted(kind, **config)
    save_as_lora(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    lora = peft.PeftModel.from_pretrained(tiny(kind), str(tmp_path)).eval()
    assert not torch.allclose(logits(lora), logits(tiny(kind)), atol=1e-2)
    torch.testing.assert_close(logits(lora), logits(model), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(lora.merge_and_unload()), logits(model), rtol=1e-5, atol=1e-5)


def test_half_precision_factors_are_saved_in_float32(tmp_path: Path) -> None:
    base = tiny().to(torch.bfloat16)
    model = peft.get_peft_model(base, SivaConfig(r=2, task_type="SEQ_CLS"), autocast_adapter_dtype=False)
    save_as_lora(model, tmp_path)
    lora = peft.PeftModel.from_pretrained(tiny().to(torch.bfloat16), str(tmp_path))
    assert {p.dtype for name, p in lora.named_parameters() if "lora_" in name} == {torch.float32}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SivaConfig(r=2, d=9, task_type="SEQ_CLS"), "d=9, which left out the smallest singular values"),
        (peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"), "only SiVA's is exported"),
    ],
    ids=["lossy", "LoRA"],
)
def test_what_no_lora_can_stand_for(tmp_path: Path, config: peft.PeftConfig, message: str) -> None:
    with pytest.raises(FastpeftError, match=message):
        save_as_lora(peft.get_peft_model(tiny(), config), tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
