"""A PiSSA adapter of PEFT goes on as a SiVA adapter."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from siva_adapters import CLOSE, RESIDUALS, answers, move, tiny

from fastpeft import FastpeftError, SivaConfig
from fastpeft.siva.layer import SivaLinear

PISSA = {"r": 2, "lora_alpha": 3, "init_lora_weights": "pissa", "target_modules": ["query", "key"]}


def trained(folder: Path, kind: str = "Roberta", task_type: str | None = "SEQ_CLS", **config: Any) -> torch.Tensor:
    """Save a PiSSA adapter that training has moved, and tell the logits that its folder gives in PEFT."""
    given = peft.LoraConfig(**{**PISSA, "task_type": task_type, **config})
    model = move(peft.get_peft_model(tiny(kind), given), size=0.5)
    model.save_pretrained(str(folder))
    loaded = answers(peft.PeftModel.from_pretrained(tiny(kind), str(folder)).eval())
    torch.testing.assert_close(loaded, answers(model.eval()), **CLOSE)
    return loaded


@RESIDUALS
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("Roberta", {}),
        ("Roberta", {"use_rslora": True, "layers_to_transform": [1]}),
        ("Roberta", {"rank_pattern": {"key": 5}, "alpha_pattern": {"key": 1, r"layer\.0\..*query": 9}}),
        ("Roberta", {"target_modules": r".*layer\.\d\.(intermediate|output)\.dense", "lora_dropout": 0.5}),
        ("Roberta", {"task_type": None, "target_modules": ["query", "value"]}),
        ("GPT2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    ],
    ids=str,
)
def test_the_logits_are_those_of_pissa(tmp_path: Path, kind: str, config: dict[str, Any], residual: Any) -> None:
    expected = trained(tmp_path / "pissa", kind, **config)
    model = peft.get_peft_model(tiny(kind), SivaConfig.from_pissa(tmp_path / "pissa", residual)).eval()
    assert not torch.allclose(expected, answers(tiny(kind)), atol=1e-4)
    torch.testing.assert_close(answers(model), expected, **CLOSE)
    model.save_pretrained(str(tmp_path / "siva"))  # from here on nothing of PiSSA's is needed
    (tmp_path / "pissa" / "adapter_config.json").unlink()
    loaded = peft.PeftModel.from_pretrained(tiny(kind), str(tmp_path / "siva")).eval()
    torch.testing.assert_close(answers(loaded), answers(model), rtol=0, atol=0)
    torch.testing.assert_close(answers(copy.deepcopy(model)), expected, **CLOSE)
    torch.testing.assert_close(answers(loaded.merge_and_unload()), expected, **CLOSE)


def test_before_training_the_factors_are_the_initial_ones(tmp_path: Path) -> None:
    peft.get_peft_model(tiny(), peft.LoraConfig(**PISSA)).save_pretrained(str(tmp_path))
    model = peft.get_peft_model(tiny(), SivaConfig.from_pissa(tmp_path))
    layers = [module for module in model.modules() if isinstance(module, SivaLinear)]
    assert len(layers) == 4
    for layer in layers:
        for change in (layer.siva_du["default"].weight, layer.siva_dv["default"].weight):
            assert change.requires_grad
            assert change.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"init_lora_weights": True}, "is not PiSSA's: its type is LORA, its init_lora_weights True"),
        ({"init_lora_weights": "pissa_niter_4"}, "a decomposition drawn at random"),
        ({"use_dora": True}, "use_dora, which SiVA does not take over"),
        ({"bias": "lora_only"}, "bias='lora_only', which SiVA does not take over"),
    ],
    ids=str,
)
def test_other_adapters_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    peft.LoraConfig(**{**PISSA, **config}).save_pretrained(str(tmp_path))
    with pytest.raises(FastpeftError, match=message):
        SivaConfig.from_pissa(tmp_path)


def test_other_layers_are_refused_before_one_is_touched(tmp_path: Path) -> None:
    trained(tmp_path)
    config = SivaConfig.from_pissa(tmp_path)
    config.target_modules = {"query"}
    base = tiny()
    with pytest.raises(FastpeftError, match=r"other layers than this model: roberta\.encoder\.layer\.0\.\S+\.key"):
        peft.get_peft_model(base, config)
    assert not any(isinstance(module, SivaLinear) for module in base.modules())


def test_a_folder_with_no_adapter_is_named(tmp_path: Path) -> None:
    with pytest.raises(FastpeftError, match=r"adapter_config\.json"):
        SivaConfig.from_pissa(tmp_path)
