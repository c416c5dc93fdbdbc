"""An adapter that `save_pretrained` wrote is exported as a run is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import save_tiny_model
from torch import Tensor
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from fastpeft import FastpeftError, SivaConfig
from fastpeft.training.export import export

AUTO = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    None: AutoModelForMaskedLM,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_tiny_model(folder)
    return folder


def saved(base: Path, folder: Path, config: peft.PeftConfig) -> Tensor:
    """Save an adapter, and a head, that training has moved, and tell its logits."""
    labels = {} if config.task_type is None else {"num_labels": 3}
    loaded = AUTO[config.task_type].from_pretrained(base, **labels)
    model = peft.get_peft_model(loaded, config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(str(folder))
    return logits(model)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(torch.arange(5, 23).view(2, 9)).logits
    return found


@pytest.mark.parametrize("task", list(AUTO))
@pytest.mark.parametrize("to", ["merged", "lora"])
def test_siva(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, task: str | None) -> None:
    expected = saved(base, tmp_path / "adapter", SivaConfig(r=2, task_type=task))
    monkeypatch.chdir(tmp_path)
    folder = export("adapter", tmp_path / "out", to)  # a relative path is no name of the hub
    assert len(AutoTokenizer.from_pretrained(folder)) == len(AutoTokenizer.from_pretrained(base))
    labels = {} if task is None else {"num_labels": 3}
    if to == "merged":
        model = AUTO[task].from_pretrained(folder)
    else:
        model = peft.PeftModel.from_pretrained(AUTO[task].from_pretrained(base, **labels), folder)
        assert model.active_peft_config.peft_type == "LORA"
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("task", list(AUTO))
@pytest.mark.parametrize("to", ["merged", "lora"])
def test_the_card_loads_the_model(base: Path, tmp_path: Path, to: str, task: str | None) -> None:
    expected = saved(base, tmp_path / "adapter", SivaConfig(r=2, task_type=task))
    card = (export(tmp_path / "adapter", tmp_path / "out", to) / "README.md").read_text()
    names: dict[str, Any] = {"base": AutoModelForMaskedLM.from_pretrained(base)} if task is None else {}
    exec(card.split("```python\n")[1].split("```")[0], names)
    torch.testing.assert_close(logits(names["model"]), expected, rtol=1e-5, atol=1e-5)
    assert ("tokenizer" in names) == (task is not None)
    assert ("# SiVA, as a LoRA" if to == "lora" else "# SiVA of") in card


@pytest.mark.parametrize("to", ["merged", "lora"])
def test_a_base_with_a_head_for_other_classes(base: Path, tmp_path: Path, to: str) -> None:
    other = tmp_path / "other"
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=5).save_pretrained(other)
    AutoTokenizer.from_pretrained(base).save_pretrained(other)
    model = AutoModelForSequenceClassification.from_pretrained(other, num_labels=3, ignore_mismatched_sizes=True)
    adapter = peft.get_peft_model(model, SivaConfig(r=2, task_type="SEQ_CLS"))
    adapter.save_pretrained(str(tmp_path / "adapter"))
    card = (export(tmp_path / "adapter", tmp_path / "out", to) / "README.md").read_text()
    names: dict[str, Any] = {}
    exec(card.split("```python\n")[1].split("```")[0], names)
    torch.testing.assert_close(logits(names["model"]), logits(adapter), rtol=1e-5, atol=1e-5)


def test_a_lora_of_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    saved(base, tmp_path / "adapter", peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    wider = {name: torch.zeros(2, 7) if "lora_A" in name else tensor for name, tensor in weights.items()}
    save_file(wider, tmp_path / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FastpeftError, match="cannot put the adapter"):
        export(tmp_path / "adapter", tmp_path / "out")


def test_lora_is_merged_too(base: Path, tmp_path: Path) -> None:
    expected = saved(base, tmp_path / "adapter", peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    model = AutoModelForSequenceClassification.from_pretrained(export(tmp_path / "adapter", tmp_path / "out"))
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(FastpeftError, match="only SiVA's is exported"):
        export(tmp_path / "adapter", tmp_path / "lora", "lora")
    assert not (tmp_path / "lora").exists()


def test_the_lora_of_a_decoder_is_one_that_vllm_takes(tmp_path: Path) -> None:
    """Its loader reads these fields and refuses anything else than this; modules are known by their last name."""
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=2, **shape)).save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(
        LlamaForCausalLM.from_pretrained(tmp_path / "base"),
        SivaConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 2}),
    )
    model.save_pretrained(str(tmp_path / "adapter"))
    config = peft.PeftConfig.from_pretrained(str(export(tmp_path / "adapter", tmp_path / "out", "lora")))
    assert (config.r, config.lora_alpha, config.bias, config.modules_to_save) == (8, 8, "none", None)
    assert not config.use_rslora
    assert not config.use_dora
    assert config.rank_pattern == config.alpha_pattern, "the scaling is 1 everywhere"
    assert {name.rpartition(".")[2] for name in config.target_modules} == {"q_proj", "down_proj"}


@pytest.mark.parametrize(
    "targets",
    [{"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 2}}, {"target_modules": "all-linear"}],
)
def test_vllm_loads_the_lora_of_a_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, targets: dict[str, Any]
) -> None:
    """Where vLLM is installed: by its own loader, whose weights on the base model give SiVA's logits."""
    pytest.importorskip("vllm")
    from vllm.config.lora import LoRAConfig
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=2, **shape)).save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    model = peft.get_peft_model(
        LlamaForCausalLM.from_pretrained(tmp_path / "base"), SivaConfig(r=4, task_type="CAUSAL_LM", **targets)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter) * parameter.requires_grad
    model.save_pretrained(str(tmp_path / "adapter"))
    lora = str(export(tmp_path / "adapter", tmp_path / "lora", "lora"))

    helper = PEFTHelper.from_local_dir(lora, None)
    helper.validate_legal(LoRAConfig(max_lora_rank=8))
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: self)  # it needs a driver
    names = {path.rpartition(".")[2] for path, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    loaded = LoRAModel.from_local_checkpoint(lora, names, helper, device="cpu", dtype=torch.float32, lora_model_id=1)
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        before = base(tokens).logits
        for path, layer in loaded.loras.items():
            base.get_submodule(path).weight += layer.scaling * layer.lora_b @ layer.lora_a
        torch.testing.assert_close(base(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(before, model(tokens).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("part", "damaged", "said"),
    [
        ("lora_A", None, "missing adapter keys"),
        ("classifier.out_proj.bias", None, r"classifier\.out_proj\.bias"),
        ("lora_B", torch.nan, r"is damaged: \S*lora_B\S* is not finite"),
    ],
)
def test_a_damaged_adapter_is_not_exported(
    base: Path, tmp_path: Path, part: str, damaged: float | None, said: str
) -> None:
    saved(base, tmp_path / "adapter", peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query"]))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in sorted(tensors) if part in key)
    tensor = tensors.pop(key)
    save_file(tensors if damaged is None else {**tensors, key: tensor * damaged}, file)
    with pytest.raises(FastpeftError, match=said):
        export(tmp_path / "adapter", tmp_path / "out")


def test_a_prompt_of_peft_is_refused(tmp_path: Path) -> None:
    peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2).save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(FastpeftError, match="of the type PROMPT_TUNING for the task CAUSAL_LM"):
        export(tmp_path / "adapter", tmp_path / "out")


def test_a_base_model_that_is_gone_is_named(base: Path, tmp_path: Path) -> None:
    saved(base, tmp_path / "adapter", SivaConfig(r=2, task_type="SEQ_CLS"))
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(base), str(tmp_path / "gone")))
    with pytest.raises(FastpeftError, match=r"onto its base model '\S+gone'"):
        export(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_has_no_steps(base: Path, tmp_path: Path) -> None:
    saved(base, tmp_path / "adapter", SivaConfig(r=2, task_type="SEQ_CLS"))
    with pytest.raises(FastpeftError, match="step is 1, but"):
        export(tmp_path / "adapter", tmp_path / "out", step=1)
