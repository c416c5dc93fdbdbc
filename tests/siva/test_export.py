"""A SiVA adapter as a plain LoRA, on the base model that it was made from."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from siva_adapters import CLOSE, answers, move, tiny
from torch import Tensor

from fastpeft import FastpeftError, SivaConfig
from fastpeft.siva.decompose import Factors
from fastpeft.siva.export import lora_factors, save_as_lora


def adapted(kind: str = "Roberta", **config: Any) -> peft.PeftModel:
    """One with an adapter, and a head, that training has moved."""
    return move(peft.get_peft_model(tiny(kind), SivaConfig(task_type="SEQ_CLS", **config))).eval()


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
    assert not torch.allclose(answers(lora), answers(tiny(kind)), atol=1e-2)
    torch.testing.assert_close(answers(lora), answers(model), **CLOSE)
    torch.testing.assert_close(answers(lora.merge_and_unload()), answers(model), **CLOSE)


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_in_bfloat16_it_errs_as_the_adapter_does(tmp_path: Path, targets: str | None) -> None:
    """Both round, in other places: `W_r x + U s V x` there, `W0 x + B A x` here."""
    half = tiny().bfloat16()
    exact = copy.deepcopy(half).float()
    model = peft.get_peft_model(copy.deepcopy(half), SivaConfig(r=2, task_type="SEQ_CLS", target_modules=targets))
    move(model)
    model.save_pretrained(str(tmp_path / "siva"))
    save_as_lora(model, tmp_path / "lora")
    truth = answers(peft.PeftModel.from_pretrained(exact, str(tmp_path / "siva")).eval())
    error = (answers(model.eval()).float() - truth).abs().mean()
    lora = peft.PeftModel.from_pretrained(half, str(tmp_path / "lora")).eval()
    for exported in (lora, model.merge_and_unload()):
        assert (answers(exported).float() - truth).abs().mean() <= 2 * error


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


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "gate_proj"]], ids=["all", "a part"])
def test_layers_that_peft_would_take_for_experts_are_refused(tmp_path: Path, targets: Any) -> None:
    """Of a mixture PEFT takes these names for stacked experts, so that a LoRA of a shared expert would be lost."""
    sizes = {"num_key_value_heads": 2, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2}
    glm = partial(tiny, "Glm4Moe", "ForCausalLM", **sizes, head_dim=8)
    model = move(peft.get_peft_model(glm(), SivaConfig(r=2, target_modules=targets)))
    with pytest.raises(FastpeftError, match=r"gate_proj: PEFT takes .* stacked experts|down_proj: PEFT takes .*"):
        save_as_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    model = move(peft.get_peft_model(glm(), SivaConfig(r=2, target_modules=["q_proj", "o_proj"]))).eval()
    save_as_lora(model, tmp_path / "lora")
    lora = peft.PeftModel.from_pretrained(glm(), str(tmp_path / "lora")).eval()
    torch.testing.assert_close(answers(lora), answers(model), **CLOSE)
