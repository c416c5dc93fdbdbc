"""SIVA on models other than encoders of text: train, save, load, merge, unload."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from fastpeft import SivaConfig, SivaLinear

pytestmark = pytest.mark.usefixtures("one_thread")

RESIDUALS = ("frozen", "implicit")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
EXAMPLES = Path(__file__).parents[2] / "examples"


def gpt2() -> nn.Module:
    """Its linear layers are Conv1D, with weights `(in_features, out_features)`."""
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=20, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    """Fewer heads of keys than of queries, so k_proj is wide and not square; no biases; the output layer is tied."""
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.3,  # so that attention is far from uniform, and its projections matter
    )
    return transformers.LlamaForCausalLM(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    return transformers.ViTForImageClassification(config)


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 16, bias=False), nn.GELU(), nn.Linear(16, 3))


def tokens() -> dict[str, Tensor]:
    ids = torch.randint(3, 50, (4, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def images() -> dict[str, Tensor]:
    pixels = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels, "labels": torch.tensor([0, 1, 0, 1])}


def vectors() -> dict[str, Tensor]:
    return {"input": torch.randn(4, 6, generator=torch.Generator().manual_seed(1))}


@dataclass(frozen=True)
class Case:
    """A base model, what it reads, and a configuration of its adapter with the number of layers it must find."""

    base: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    config: dict[str, Any]
    layers: int

    def make(self) -> nn.Module:
        """The base model, the same at every call."""
        torch.manual_seed(0)
        return self.base().eval()


CASES = {
    "gpt2-fused": Case(gpt2, tokens, {"target_modules": ["c_attn"], "task_type": "CAUSAL_LM"}, 2),
    "gpt2-all": Case(gpt2, tokens, {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}, 8),
    "llama-default": Case(llama, tokens, {"task_type": "CAUSAL_LM"}, 4),
    "llama-all": Case(llama, tokens, {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}, 14),
    "vit-default": Case(vit, images, {"modules_to_save": ["classifier"]}, 4),
    "vit-all": Case(vit, images, {"target_modules": "all-linear"}, 12),
    "plain": Case(plain, vectors, {"target_modules": ["0", "2"], "modules_to_save": ["4"]}, 2),
}


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    found = model(**inputs)
    return getattr(found, "logits", found)


def loss_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    found = model(**inputs)
    return found.loss if hasattr(found, "loss") else found.logsumexp(-1).mean()


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("name", CASES)
def test_the_whole_way(tmp_path: Path, name: str, residual: str) -> None:
    case, inputs = CASES[name], CASES[name].inputs()
    with torch.no_grad():
        pretrained = output(case.make(), inputs)
    model = peft.get_peft_model(case.make(), SivaConfig(r=3, residual=residual, **case.config)).eval()
    assert sum(isinstance(module, SivaLinear) for module in model.modules()) == case.layers
    torch.testing.assert_close(output(model, inputs), pretrained, **CLOSE)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    losses = []
    for _ in range(5):
        loss = loss_of(model, inputs)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
        optimizer.step()
    assert losses == sorted(losses, reverse=True)

    with torch.no_grad():
        expected = output(model, inputs)
        assert (expected - pretrained).abs().max() > 1e-2
        model.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(case.make(), tmp_path).eval()
        assert output(loaded, inputs).equal(expected)
        torch.testing.assert_close(output(loaded.merge_and_unload(), inputs), expected, **CLOSE)

        heads = set(case.config.get("modules_to_save", ()))
        restored, original = copy.deepcopy(model).unload().state_dict(), case.make().state_dict()
        assert restored.keys() == original.keys()
        for key, weight in original.items():
            if key.partition(".")[0] not in heads:  # PEFT keeps heads that trained, with LoRA too
                torch.testing.assert_close(restored[key], weight, **CLOSE)


def test_a_causal_model_generates_as_its_merged_form() -> None:
    case = CASES["llama-all"]
    model = peft.get_peft_model(case.make(), SivaConfig(r=3, **case.config)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    prompt = {"input_ids": tokens()["input_ids"], "attention_mask": torch.ones(4, 9, dtype=torch.long)}
    with torch.no_grad():
        written = model.generate(**prompt, max_new_tokens=6, do_sample=False)
        again = copy.deepcopy(model).merge_and_unload().generate(**prompt, max_new_tokens=6, do_sample=False)
    assert written.shape == (4, 15)
    assert written.equal(again)


def test_the_causal_lm_example_learns(tmp_path: Path) -> None:
    file = EXAMPLES / "causal_lm.py"
    spec = importlib.util.spec_from_file_location("causal_lm", file)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    sys.modules["causal_lm"] = example
    spec.loader.exec_module(example)
    settings = {"--rank": 8, "--steps": 30, "--length": 32, "--batch-size": 8, "--learning-rate": 3e-2}
    losses = example.main(
        [
            "--tiny",
            "--text",
            str(file),
            "--output",
            str(tmp_path),
            *(str(part) for pair in settings.items() for part in pair),
        ]
    )
    assert losses["after"] < losses["before"] - 0.5
    assert (tmp_path / "adapter_model.safetensors").is_file()
