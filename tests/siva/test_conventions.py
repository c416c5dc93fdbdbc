"""What PEFT lets a person do with an adapter of any method, done with SIVA on models of many kinds."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from siva_adapters import CLOSE, RESIDUALS, move, tiny, token_ids, trained
from torch import Tensor, nn

from fastpeft import FastpeftError, SivaConfig, SivaLinear


class Nested(nn.Module):
    """Layers inside lists, dictionaries and sequences, with names that are parts of each other."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 12)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"lin": nn.Linear(12, 12), "lin2": nn.Linear(12, 12, bias=False)}) for _ in range(2)
        )
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(12, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.lin(x)
        for block in self.blocks:
            x = x + block["lin2"](torch.tanh(block["lin"](x)))
        found: Tensor = self.head(x)
        return found


@dataclass(frozen=True)
class Case:
    """A base model, what it reads, and the configuration that adapts so many of its layers."""

    base: Callable[[], nn.Module]
    config: dict[str, Any]
    layers: int
    inputs: Callable[[], dict[str, Tensor]] = field(default=lambda: {"input_ids": token_ids()})

    def make(self) -> Any:
        """The base model, the same at every call."""
        torch.manual_seed(0)
        return self.base().eval()


def translator() -> nn.Module:
    prepares = hasattr(transformers.GenerationMixin, "_prepare_encoder_decoder_kwargs_for_generation")
    if Version(peft.__version__) < Version("0.19") and not prepares:
        pytest.skip("this PEFT wraps no translator of this transformers")
    return tiny(
        "T5", "ForConditionalGeneration", d_kv=8, d_ff=24, num_layers=1, num_hidden_layers=1, decoder_start_token_id=0
    )


CASES = {
    "classifier": Case(tiny, {"task_type": "SEQ_CLS"}, 10),
    "tagger": Case(
        partial(tiny, head="ForTokenClassification"), {"task_type": "TOKEN_CLS", "target_modules": ["value"]}, 2
    ),
    "reader": Case(
        partial(tiny, head="ForQuestionAnswering"), {"task_type": "QUESTION_ANS", "target_modules": ["query", "key"]}, 4
    ),
    "features": Case(
        partial(tiny, head="Model"),
        {"task_type": "FEATURE_EXTRACTION", "target_modules": ["query", "dense"], "exclude_modules": "pooler.dense"},
        8,
    ),
    "decoder": Case(
        partial(tiny, "Llama", "ForCausalLM", intermediate_size=24, num_key_value_heads=1, initializer_range=0.3),
        {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj", "down_proj"]},
        6,
    ),
    "conv1d": Case(
        partial(tiny, "GPT2", "LMHeadModel", eos_token_id=2),
        {"task_type": "CAUSAL_LM", "target_modules": ["c_attn", "mlp.c_fc"]},
        4,
    ),
    "translator": Case(
        translator,
        {"task_type": "SEQ_2_SEQ_LM", "target_modules": ["q", "wo"]},
        5,
        lambda: {"input_ids": token_ids(), "decoder_input_ids": token_ids()[:, :4]},
    ),
    "images": Case(
        partial(tiny, "ViT", "ForImageClassification", image_size=8, patch_size=4, initializer_range=0.1),
        {"target_modules": "all-linear"},
        12,
        lambda: {"pixel_values": torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))},
    ),
    "nested": Case(
        Nested,
        {"target_modules": ["lin", "blocks.1.lin2"], "modules_to_save": ["head"]},
        4,
        lambda: {"x": torch.randn(4, 6, generator=torch.Generator().manual_seed(1))},
    ),
}
ALL = pytest.mark.parametrize("case", list(CASES.values()), ids=list(CASES))
WRITERS = ("decoder", "conv1d", "translator")


def config(case: Case, **changes: Any) -> SivaConfig:
    return SivaConfig(**({"r": 2} | case.config | changes))


def adapted(case: Case, adapter: str = "default", **changes: Any) -> Any:
    """The base model with an adapter that training has moved."""
    return move(peft.get_peft_model(case.make(), config(case, **changes), adapter).eval())


def answer(model: nn.Module, case: Case) -> Tensor:
    """The first tensor of floating numbers that the model gives."""
    found = model(**case.inputs())
    return found if isinstance(found, Tensor) else found[0]


@torch.no_grad()
def output(model: nn.Module, case: Case) -> Tensor:
    return answer(model, case)


# -- what is made, and what trains -----------------------------------------------------------------------------------


@ALL
@RESIDUALS
def test_a_new_adapter_is_the_base_model_and_says_what_it_is(case: Case, residual: str) -> None:
    model = peft.get_peft_model(case.make(), config(case, residual=residual)).eval()
    torch.testing.assert_close(output(model, case), output(case.make(), case), **CLOSE)
    status = model.get_model_status()
    assert len(list(model.base_model._siva_layers())) == case.layers
    assert (status.peft_types, status.available_adapters) == ({"default": "SIVA"}, ["default"])
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    assert status.requires_grad == {"default": True}
    assert model.active_adapters == ["default"]
    assert model.active_peft_config.peft_type == "SIVA"
    count, total = model.get_nb_trainable_parameters()
    assert 0 < count == sum(p.numel() for p in model.parameters() if p.requires_grad) < total


@ALL
@RESIDUALS
def test_training_lowers_the_loss_and_changes_nothing_else(case: Case, residual: str) -> None:
    model = peft.get_peft_model(case.make(), config(case, residual=residual))
    fixed = {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in trained(model)}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    losses = []
    for _ in range(4):
        found = answer(model.eval(), case)
        loss = (found - torch.linspace(-1, 1, found.numel()).view_as(found)).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    assert losses == sorted(losses, reverse=True)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in fixed.items())


def test_an_adapter_for_inference_does_not_train() -> None:
    case = CASES["classifier"]
    model = peft.get_peft_model(case.make(), config(case, inference_mode=True))
    assert not [name for name in trained(model) if "siva_" in name]
    model.set_adapter("default")
    assert [name for name in trained(model) if "siva_" in name]
    model.base_model.set_adapter("default", inference_mode=True)
    assert not trained(model)
    model.set_requires_grad("default")
    assert [name for name in trained(model) if "siva_" in name]


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_dtypes_at_creation_and_at_loading(tmp_path: Path, kept: torch.dtype, autocast: bool) -> None:
    case = CASES["decoder"]
    wanted = torch.float32 if autocast else kept

    def dtypes(model: nn.Module) -> set[torch.dtype]:
        return {p.dtype for name, p in model.named_parameters() if "siva_" in name}

    model = peft.get_peft_model(case.make().to(kept), config(case), autocast_adapter_dtype=autocast).eval()
    assert dtypes(model) == {wanted}
    assert output(model, case).dtype == kept
    move(model).save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}
    loaded = peft.PeftModel.from_pretrained(case.make().to(kept), tmp_path, autocast_adapter_dtype=autocast).eval()
    assert dtypes(loaded) == {wanted}
    assert output(loaded, case).equal(output(model, case))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@RESIDUALS
def test_a_model_that_is_cast_as_a_whole(dtype: torch.dtype, residual: str) -> None:
    case = CASES["decoder"]
    model = adapted(case, residual=residual)
    expected = output(model, case)
    cast = output(model.to(dtype), case)
    assert cast.dtype == dtype
    assert (cast.float() - expected).norm() <= (0.05 if dtype.itemsize == 2 else 1e-5) * expected.norm()
    answer(model, case).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


# -- saving and loading ----------------------------------------------------------------------------------------------


@ALL
@RESIDUALS
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded_by_any_name(tmp_path: Path, case: Case, residual: str, low_cpu_mem_usage: bool) -> None:
    model = adapted(case, "mine", residual=residual)
    model.save_pretrained(tmp_path)
    assert not model.peft_config["mine"].inference_mode
    names = set(load_file(tmp_path / "mine" / "adapter_model.safetensors"))
    assert all("siva_" in name or any(f".{saved}." in name for saved in model.modules_to_save or ()) for name in names)
    assert not any("mine" in name for name in names)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        loaded = peft.PeftModel.from_pretrained(
            case.make(), tmp_path / "mine", "yours", low_cpu_mem_usage=low_cpu_mem_usage
        )
    assert not trained(loaded)
    assert loaded.peft_config["yours"].inference_mode
    assert output(loaded.eval(), case).equal(output(model, case))


@pytest.mark.long(only="implicit-nested")
@ALL
@RESIDUALS
def test_state_dicts_go_from_model_to_model(case: Case, residual: str) -> None:
    model = adapted(case, residual=residual)
    alone = peft.get_peft_model_state_dict(model)
    other = move(peft.get_peft_model(case.make(), config(case, residual=residual)).eval(), seed=5)
    found = peft.set_peft_model_state_dict(other, alone)
    assert found.unexpected_keys == []
    assert not [key for key in found.missing_keys if "siva_" in key]
    assert output(other, case).equal(output(model, case))
    whole = peft.get_peft_model(case.make(), config(case, residual=residual, init_weights="saved")).eval()
    whole.load_state_dict(model.state_dict())
    assert output(whole, case).equal(output(model, case))


@ALL
def test_copies_and_pickles_are_whole(case: Case) -> None:
    model = adapted(case)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert output(other, case).equal(output(model, case))
        torch.testing.assert_close(output(other.merge_and_unload(), case), output(model, case), **CLOSE)


def test_a_configuration_goes_through_its_file(tmp_path: Path) -> None:
    given = {"r": 3, "target_modules": ["query"], "rank_pattern": {"0.attention.self.query": 2}, "residual": "implicit"}
    given |= {
        "exclude_modules": ["key"],
        "layers_to_transform": [0],
        "modules_to_save": ["classifier"],
        "revision": "a",
    }
    before = SivaConfig(**given, task_type="SEQ_CLS")
    before.save_pretrained(str(tmp_path))
    after = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert type(after) is SivaConfig
    assert after.to_dict() == before.to_dict() | {"init_weights": "saved"}


# -- merging and disabling -------------------------------------------------------------------------------------------


@ALL
@RESIDUALS
def test_merged_unmerged_unloaded(case: Case, residual: str) -> None:
    model = adapted(case, residual=residual)
    expected, weights = output(model, case), {name: p.clone() for name, p in model.named_parameters()}
    for safe_merge in (False, True):
        model.merge_adapter(safe_merge=safe_merge)
        assert all(layer.merged_adapters == ["default"] for layer in model.base_model._siva_layers())
        torch.testing.assert_close(output(model, case), expected, **CLOSE)
        with pytest.warns(UserWarning, match="lready"):
            model.merge_adapter()
        model.unmerge_adapter()
        assert model.get_model_status().merged_adapters == []
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, weights[name], **CLOSE)
    for merge in ({}, {"safe_merge": True}, {"adapter_names": ["default"], "progressbar": False}):
        merged = copy.deepcopy(model).merge_and_unload(**merge)
        torch.testing.assert_close(output(merged, case), expected, **CLOSE)
        assert not any(isinstance(module, SivaLinear) for module in merged.modules())
    restored, original = model.unload().state_dict(), case.make().state_dict()
    assert restored.keys() == original.keys()
    for name, weight in original.items():
        if not any(f"{saved}." in name for saved in model.modules_to_save or ()):  # PEFT keeps trained heads
            torch.testing.assert_close(restored[name], weight, **CLOSE)


@ALL
def test_safe_merge_stops_before_a_weight_is_spoilt(case: Case) -> None:
    model = adapted(case)
    expected = output(model, case)
    layer = list(model.base_model._siva_layers())[-1]
    change = layer.siva_du["default"].weight.data
    kept = change.clone()
    change.fill_(float("nan"))
    with pytest.raises(FastpeftError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)
    change.copy_(kept)
    torch.testing.assert_close(output(model, case), expected, **CLOSE)


@ALL
@RESIDUALS
@pytest.mark.parametrize("merged", [False, True])
def test_disabled_adapters_leave_the_base_model(case: Case, residual: str, merged: bool) -> None:
    model = adapted(case, residual=residual)
    expected, base, trains = output(model, case), output(case.make(), case), trained(model)
    if merged:
        model.merge_adapter()
    with model.disable_adapter():
        assert not [name for name in trained(model) if "siva_" in name]
        with model.disable_adapter():
            torch.testing.assert_close(output(model, case), base, **CLOSE)
        torch.testing.assert_close(output(model, case), base, **CLOSE)
        assert model.get_model_status().enabled is False
    assert trained(model) == trains
    torch.testing.assert_close(output(model, case), expected, **CLOSE)
    model.base_model.disable_adapter_layers()
    torch.testing.assert_close(output(model, case), base, **CLOSE)
    model.base_model.enable_adapter_layers()
    torch.testing.assert_close(output(model, case), expected, **CLOSE)
    assert trained(model) == trains


# -- several adapters ------------------------------------------------------------------------------------------------


@ALL
@RESIDUALS
def test_adapters_take_turns_and_act_together(case: Case, residual: str) -> None:
    model = adapted(case, residual=residual)
    first, trains = output(model, case), trained(model)
    model.add_adapter("other", config(case, residual=residual))
    assert trained(model) == trains
    torch.testing.assert_close(output(model, case), first, **CLOSE)
    model.set_adapter("other")
    assert trained(model) == {name.replace("default", "other") for name in trains}
    second = output(move(model, seed=3), case)
    assert (first - second).abs().max() > 1e-3

    if model.modules_to_save:
        with pytest.raises(ValueError, match=r"nly one adapter|multiple"):
            model.base_model.set_adapter(["default", "other"])
        return
    model.base_model.set_adapter(["default", "other"])
    assert model.active_adapters == ["default", "other"]
    assert trained(model) >= trains
    layer = next(iter(model.base_model._siva_layers()))
    change = layer.get_delta_weight("default") + layer.get_delta_weight("other")
    weight = dict(case.make().named_modules())[layer.name].weight
    torch.testing.assert_close(layer.weight.detach(), weight + change, **CLOSE)

    both = output(model, case)
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["default", "other"])
    torch.testing.assert_close(output(merged, case), both, **CLOSE)
    model.set_adapter("default")
    torch.testing.assert_close(output(model, case), first, **CLOSE)
    model.set_adapter("other")
    torch.testing.assert_close(output(model, case), second, **CLOSE)


@RESIDUALS
def test_adapters_are_deleted_in_any_order(residual: str) -> None:
    case = CASES["decoder"]
    base = output(case.make(), case)
    model = adapted(case, residual=residual)
    first = output(model, case)
    for seed, name in enumerate(("second", "third"), 1):
        model.add_adapter(name, config(case, residual=residual))
        model.set_adapter(name)
        move(model, seed)
    third = output(model, case)
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("fourth")
    model.delete_adapter("second")  # which is not active
    torch.testing.assert_close(output(model, case), third, **CLOSE)
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        model.delete_adapter("third")  # which is
    assert model.active_adapters == ["default"]
    assert list(model.peft_config) == ["default"]
    assert not [name for name, _ in model.named_parameters() if "second" in name or "third" in name]
    torch.testing.assert_close(output(model, case), first, **CLOSE)
    model.add_adapter("third", config(case, residual=residual))  # the name is free again
    model.set_adapter("third")
    torch.testing.assert_close(output(model, case), base, **CLOSE)
    model.delete_adapter("default")
    torch.testing.assert_close(output(model, case), base, **CLOSE)
    model.delete_adapter("third")
    assert model.active_adapters == []
    torch.testing.assert_close(output(model.base_model, case), base, **CLOSE)


@pytest.mark.parametrize("others", [0, 1])
def test_a_merged_adapter_is_not_deleted(others: int) -> None:
    case = CASES["decoder"]
    model = adapted(case)
    if others:
        model.add_adapter("other", config(case))
    expected = output(model, case)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("default")
    torch.testing.assert_close(output(model, case), expected, **CLOSE)
    model.unmerge_adapter()
    torch.testing.assert_close(output(model, case), expected, **CLOSE)


def test_each_adapter_has_its_own_saved_modules(tmp_path: Path) -> None:
    case = CASES["nested"]
    targets = ["lin", "lin2", "head.1"]
    model = adapted(case, target_modules=targets)
    layers = [layer.name for layer in model.base_model._siva_layers()]
    assert len(layers) == 5
    assert not any(name.startswith("head") for name in layers), "it is saved whole"
    first = output(model, case)
    model.add_adapter("other", config(case, target_modules=targets))
    model.set_adapter("other")
    torch.testing.assert_close(output(model, case), output(case.make(), case), **CLOSE)
    move(model, seed=3)
    model.save_pretrained(tmp_path)
    for folder, name in ((tmp_path, "default"), (tmp_path / "other", "other")):
        model.set_adapter(name)
        loaded = peft.PeftModel.from_pretrained(case.make(), folder)
        assert output(loaded, case).equal(output(model, case))
    model.delete_adapter("other")
    torch.testing.assert_close(output(model, case), first, **CLOSE)


# -- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_generates_whatever_the_way(name: str) -> None:
    case = CASES[name]
    model = adapted(case)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    prompt = {"input_ids": token_ids(), "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    written = model.generate(**prompt, **settings)
    assert written.shape[0] == 3
    with torch.inference_mode():
        assert model.generate(**prompt, **settings).equal(written)
    assert model.generate(**prompt, **settings, use_cache=False).equal(written)
    assert copy.deepcopy(model).merge_and_unload().generate(**prompt, **settings).equal(written)
    with model.disable_adapter():
        assert model.generate(**prompt, **settings).equal(case.make().generate(**prompt, **settings))
