"""SIVA through PEFT's own entry points, on tiny models of many architectures."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from siva_adapters import CLOSE, RESIDUALS, answers, move, tiny, token_ids, trained
from torch import nn

import fastpeft
from fastpeft import FastpeftError, SivaConfig

base_state_dicts = pytest.mark.skipif(
    not hasattr(peft, "get_base_model_state_dict"), reason="this PEFT does not give a base model's state dict"
)


def adapted(**config: Any) -> peft.PeftModel:
    model = peft.get_peft_model(tiny(), SivaConfig(task_type="SEQ_CLS", **config)).eval()
    return move(model)


# -- bad configurations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 0}, "r=0"),
        (
            {"r": 17, "target_modules": ["query"]},
            r"r=17 for roberta\.encoder\.layer\.0\.attention\.self\.query of shape \(16, 16\); allowed are 1 to 16",
        ),
        ({"r": 4, "d": 3}, "d=3"),
        ({"d": "abc"}, "d='abc'; a rank is a whole number"),
        ({"rank_pattern": {"query": 0}}, r"rank_pattern\['query'\]=0"),
        ({"rank_pattern": 3}, "rank_pattern=3; give a dictionary"),
        ({"layers_to_transform": "x"}, "layers_to_transform='x'"),
        ({"layers_to_transform": 1.5}, r"layers_to_transform=1\.5; give the number of a block"),
        ({"layers_to_transform": True}, "layers_to_transform=True"),
        ({"target_modules": 3}, "target_modules=3; give a list of names"),
        ({"residual": "thawed"}, "residual='thawed'; allowed are 'frozen' and 'implicit'"),
        ({"residual": "implicit", "d": 8}, "d=8 with residual='implicit'"),
        ({"target_modules": ["nothing"]}, r"\['nothing'\] matches no linear layer.*end in dense, key, query, value"),
        ({"target_modules": ["classifier.dense"]}, "matches no linear layer"),
        ({"target_modules": "query"}, "regular expression"),
    ],
)
def test_bad_configurations(config: dict[str, Any], message: str) -> None:
    with pytest.raises(FastpeftError, match=message):
        peft.get_peft_model(tiny(), SivaConfig(task_type="SEQ_CLS", **config))


# -- saving and loading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [frozenset, dict.fromkeys], ids=["frozenset", "dict"])
def test_any_collection_is_saved(tmp_path: Path, names: Any) -> None:
    model = adapted(target_modules=names(["query"]), layers_to_transform=range(1, 2), exclude_modules=names(["key"]))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["target_modules"], saved["layers_to_transform"], saved["exclude_modules"]) == (
        ["query"],
        [1],
        ["key"],
    )


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("config", [{"residual": "frozen"}, {"residual": "implicit"}, {"d": 8}])
def test_reloading_is_bit_equal_and_runs_no_svd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], low_cpu_mem_usage: bool
) -> None:
    model = adapted(r=3, target_modules="all-linear", **config)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(torch.linalg, "svd", lambda *_, **__: pytest.fail("loading ran an SVD"))
    loaded = peft.PeftModel.from_pretrained(tiny(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert answers(loaded).equal(answers(model))
    assert not any(p.requires_grad for p in loaded.parameters())


def test_auto_class_and_continued_training(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = move(peft.get_peft_model(base, SivaConfig(r=3, task_type="SEQ_CLS")).eval())
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", is_trainable=True)
    assert answers(loaded.eval()).equal(answers(model))
    loaded(token_ids()).logits.sum().backward()
    assert {name for name, p in loaded.named_parameters() if p.grad is not None} == trained(model)


def test_a_checkpoint_loads_into_the_model_that_wrote_it(tmp_path: Path) -> None:
    """What the Trainer does at resume and for the best model."""
    model = adapted(r=3)
    model.save_pretrained(tmp_path)
    expected, weights = answers(model), [layer.base_layer.weight.clone() for layer in model.base_model._siva_layers()]
    move(model, seed=5)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert answers(model).equal(expected)
    assert all(a.equal(layer.base_layer.weight) for a, layer in zip(weights, model.base_model._siva_layers()))


@RESIDUALS
def test_one_file_serves_both_residual_modes(tmp_path: Path, residual: str) -> None:
    model = adapted(r=3, residual=residual)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["residual"] = "implicit" if residual == "frozen" else "frozen"
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    torch.testing.assert_close(
        answers(peft.PeftModel.from_pretrained(tiny(), tmp_path).eval()), answers(model), **CLOSE
    )


def test_the_file_holds_float32_factors_and_the_head(tmp_path: Path) -> None:
    base = tiny().to(torch.bfloat16)
    model = peft.get_peft_model(base, SivaConfig(r=3, task_type="SEQ_CLS"), autocast_adapter_dtype=False)
    query = model.base_model.model.roberta.encoder.layer[0].attention.self.query
    assert query.siva_du["default"].weight.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    parts = {name.partition("query.")[2] for name in tensors if "query.siva_" in name}
    changes = {f"siva_d{part}.{each}" for part in "uv" for each in ("weight", "scale")}
    assert parts == {*changes, "siva_s", "siva_u0", "siva_v0"}
    assert {t.dtype for name, t in tensors.items() if "siva_" in name} == {torch.float32}
    assert any("classifier" in name for name in tensors)


def test_every_save_writes_a_model_card(tmp_path: Path) -> None:
    adapted(r=3).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    for part in ("library_name: peft", "import fastpeft", "AutoPeftModelForSequenceClassification", "| r | 3 |"):
        assert part in card
    adapted(r=4).save_pretrained(tmp_path)
    assert "| r | 4 |" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("My own words. [More Information Needed]\n")
    adapted(r=3).save_pretrained(tmp_path)
    assert "My own words." in (tmp_path / "README.md").read_text()


def test_a_changed_base_is_refused_by_layer_name(tmp_path: Path) -> None:
    adapted(r=3).save_pretrained(tmp_path)
    base = tiny()
    base.roberta.encoder.layer[1].attention.self.query.weight.data[0, 0] += 1e-6
    with pytest.raises(FastpeftError, match=r"roberta\.encoder\.layer\.1\.attention\.self\.query: .*another weight"):
        peft.PeftModel.from_pretrained(base, tmp_path)


@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
def test_a_base_of_another_kind_is_refused_by_layer_name(tmp_path: Path, task: str | None) -> None:
    """Though a name of the configuration, as query, is that of layers there too."""
    config = SivaConfig(r=3, target_modules=["query", "key"], task_type=task)
    peft.get_peft_model(tiny(), config).save_pretrained(tmp_path)
    with pytest.raises(FastpeftError, match=r"^bert\.encoder\.layer\.0\S*: .* other layers .* as roberta\.encoder"):
        peft.PeftModel.from_pretrained(tiny("Bert"), tmp_path)


def test_a_base_whose_layers_have_other_names_is_loaded_by_a_mapping(tmp_path: Path) -> None:
    model = move(peft.get_peft_model(tiny(), SivaConfig(r=3)).eval())
    model.save_pretrained(tmp_path)
    mapping = {"^roberta": "0.roberta"}
    with pytest.warns(UserWarning, match="missing adapter keys"):
        unmapped = peft.PeftModel.from_pretrained(nn.Sequential(tiny()), tmp_path)
    with pytest.raises(FastpeftError, match=r"names this layer otherwise.* by key_mapping"):
        unmapped(token_ids())
    loaded = peft.PeftModel.from_pretrained(nn.Sequential(tiny()), tmp_path, key_mapping=mapping).eval()
    assert loaded(token_ids()).logits.equal(model(token_ids()).logits)


def test_one_configuration_for_two_bases_is_told(caplog: pytest.LogCaptureFixture) -> None:
    config, base = SivaConfig(task_type="SEQ_CLS"), tiny()
    other = copy.deepcopy(base)
    other.roberta.encoder.layer[1].attention.self.key.weight.data += 0.1  # of the last layer that is adapted
    with caplog.at_level("WARNING", "fastpeft"):
        peft.get_peft_model(copy.deepcopy(base), config)
        peft.get_peft_model(base, config)
        assert not caplog.records
        peft.get_peft_model(other, config)
    (record,) = caplog.records
    assert "was given to a model of other weights before" in record.message


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_base_may_be_cast(tmp_path: Path, dtype: torch.dtype) -> None:
    model = adapted(r=3)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny().to(dtype), tmp_path).eval()
    assert (answers(loaded).float() - answers(model)).abs().max() < 0.05 * answers(model).abs().max()


# -- life-cycle --------------------------------------------------------------------------------------------------


@base_state_dicts
@pytest.mark.parametrize("kind", ["Roberta", "GPT2"])
@RESIDUALS
def test_the_base_models_state_dict_has_the_pretrained_weights(kind: str, residual: str) -> None:
    """PEFT's functions name them as the base model does: W_r under such a name would pass for the pretrained weight."""

    def base() -> Any:
        return tiny(kind, **({"bos_token_id": 1, "eos_token_id": 2} if kind == "GPT2" else {}))

    settings = {"r": 3, "residual": residual, "target_modules": "all-linear", "task_type": "SEQ_CLS"}
    model = move(peft.get_peft_model(base(), SivaConfig(**settings)).eval())
    expected, pretrained = answers(model), base().state_dict()
    found = peft.get_base_model_state_dict(model)
    assert found.keys() == pretrained.keys()
    for name, weight in pretrained.items():
        torch.testing.assert_close(found[name], weight, **CLOSE)
    checkpoint = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for load in (
        lambda: peft.set_base_model_state_dict(model, pretrained),
        lambda: peft.set_base_model_state_dict(model, found),
        lambda: model.get_base_model().load_state_dict(model.get_base_model().state_dict()),
        lambda: model.load_state_dict(checkpoint),
    ):
        load()
        torch.testing.assert_close(answers(model), expected, **CLOSE)
    assert answers(model).equal(expected)  # a checkpoint has every bit of W_r
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged.state_dict(), {**pretrained, **merged.state_dict()})  # and gains no key
    if residual == "frozen":
        with pytest.raises(FastpeftError, match="not the one that the adapter was made from"):
            peft.set_base_model_state_dict(model, {name: 2 * weight for name, weight in pretrained.items()})


@base_state_dicts
@pytest.mark.parametrize("config", [{"d": 8}, {"residual_dtype": "int8"}])
def test_a_lossy_base_model_has_no_state_dict_of_its_own(config: dict[str, Any]) -> None:
    model = adapted(r=3, **config)
    with pytest.raises(FastpeftError, match="cannot be given back"):
        peft.get_base_model_state_dict(model)
    if "d" in config:
        with pytest.raises(FastpeftError, match="cannot be given back"):
            peft.set_base_model_state_dict(model, tiny().state_dict())
    model.load_state_dict(model.state_dict())


def test_injected_adapters_are_saved_as_they_are_stored() -> None:
    base = peft.inject_adapter_in_model(SivaConfig(r=3), tiny())
    stored = base.roberta.encoder.layer[0].attention.self.query.base_layer.weight
    assert base.state_dict()["roberta.encoder.layer.0.attention.self.query.base_layer.weight"].equal(stored)


def test_lossy_models_refuse_to_unload_before_touching_anything() -> None:
    model = adapted(r=3, d=8)
    expected = answers(model)
    with pytest.raises(FastpeftError, match="cannot be given back"):
        model.unload()
    with pytest.raises(FastpeftError, match="cannot be given back"):
        model.delete_adapter("default")
    assert answers(model).equal(expected)
    torch.testing.assert_close(answers(model.merge_and_unload()), expected, **CLOSE)


def test_unloading_what_is_merged_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = move(peft.get_peft_model(tiny(), SivaConfig(r=2)))
    model.merge_adapter()
    restored = model.unload()
    assert "use merge_and_unload()" in caplog.text
    torch.testing.assert_close(answers(restored), answers(tiny()), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@RESIDUALS
def test_weights_that_come_back_rounded_are_told(
    residual: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    config = SivaConfig(task_type="SEQ_CLS", residual=residual)
    base = peft.get_peft_model(tiny().to(dtype), config).unload()
    pairs = zip(base.state_dict().items(), tiny().to(dtype).state_dict().values(), strict=True)
    same = all(weight.equal(pretrained) for (name, weight), pretrained in pairs if "classifier" not in name)
    assert same is (residual == "implicit")
    told = "the base's weights come back in other bits" in caplog.text
    assert told is (residual == "frozen" and dtype is torch.bfloat16)


@pytest.mark.parametrize("way", ["deleted", "replaced"])
@RESIDUALS
def test_weights_that_come_back_rounded_are_told_without_unloading(
    way: str, residual: str, caplog: pytest.LogCaptureFixture
) -> None:
    base, told = tiny().bfloat16(), "the base's weights come back in other bits"
    config = SivaConfig(task_type="SEQ_CLS", residual=residual)
    model = peft.get_peft_model(base, config, "first")
    model.add_adapter("second", copy.deepcopy(config))
    model.delete_adapter("first")  # the second has their W_r still
    assert told not in caplog.text
    if way == "deleted":
        model.delete_adapter("second")
    else:
        peft.get_peft_model(base, copy.deepcopy(config), "second")
    assert caplog.text.count(told) == (residual == "frozen")


@RESIDUALS
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_loads_beside_one_of_more_layers(tmp_path: Path, residual: str, low_cpu_mem_usage: bool) -> None:
    narrow = adapted(r=3, residual=residual, target_modules=["query"])
    narrow.save_pretrained(tmp_path)
    model = adapted(r=3, residual=residual)
    model.load_adapter(tmp_path, "narrow", low_cpu_mem_usage=low_cpu_mem_usage)
    model.set_adapter("narrow")
    torch.testing.assert_close(answers(model), answers(narrow), **CLOSE)


@RESIDUALS
def test_several_adapters_with_different_targets(tmp_path: Path, residual: str) -> None:
    model = adapted(r=3, residual=residual)
    first = answers(model)
    model.add_adapter("other", SivaConfig(r=3, target_modules=["value", "key"], residual=residual, task_type="SEQ_CLS"))
    torch.testing.assert_close(answers(model), first, **CLOSE)
    model.set_adapter("other")
    move(model, seed=3)
    second = answers(model)

    model.save_pretrained(tmp_path, selected_adapters=["other"])
    alone = peft.PeftModel.from_pretrained(tiny(), tmp_path / "other").eval()
    torch.testing.assert_close(answers(alone), second, **CLOSE)

    model.set_adapter("default")
    torch.testing.assert_close(answers(model), first, **CLOSE)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(answers(merged), first, **CLOSE)
    model.delete_adapter("other")
    torch.testing.assert_close(answers(model), first, **CLOSE)


def test_a_second_adapter_of_another_decomposition_is_refused(tmp_path: Path) -> None:
    adapted(r=3).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {n: t + 1e-3 if n.endswith("siva_u0") else t for n, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    model = adapted(r=3)
    expected = answers(model)
    with pytest.raises(FastpeftError, match="residual='implicit'"):
        model.load_adapter(tmp_path, "second")
    assert answers(model).equal(expected)


def test_a_model_wrapped_again_starts_anew() -> None:
    """As in a notebook cell that is run twice."""
    base = tiny()
    expected = answers(base)
    for _ in range(2):
        move(peft.get_peft_model(base, SivaConfig(r=3, target_modules="all-linear")))
    model = peft.get_peft_model(base, SivaConfig(r=2, target_modules="all-linear"))
    torch.testing.assert_close(answers(model), expected, **CLOSE)


def test_an_adapter_loads_on_a_model_that_another_was_on(tmp_path: Path) -> None:
    model = adapted(r=3)
    model.save_pretrained(tmp_path)
    expected = answers(model)
    base = tiny()
    for _ in range(2):  # a loop over checkpoints
        loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
        torch.testing.assert_close(answers(loaded), expected, **CLOSE)
    again = peft.PeftModel.from_pretrained(loaded.unload(), tmp_path).eval()
    torch.testing.assert_close(answers(again), expected, **CLOSE)


@RESIDUALS
@pytest.mark.parametrize("lacks", ["siva_du siva_dv", "siva_du", "siva_s"])
@pytest.mark.parametrize("beside", [False, True])
def test_a_file_that_lacks_factors_is_refused(residual: str, lacks: str, beside: bool, tmp_path: Path) -> None:
    adapted(residual=residual).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {key: each for key, each in load_file(file).items() if not any(part in key for part in lacks.split())}
    save_file(tensors, file, metadata={"format": "pt"})
    load = adapted(residual=residual).load_adapter if beside else partial(peft.PeftModel.from_pretrained, tiny())
    with pytest.raises(FastpeftError, match=rf"adapter 'b' .*lacks {lacks.split()[0]}"):
        load(tmp_path, "b")


@pytest.mark.parametrize("fault", ["nan", "rank", "kind"])
def test_a_refused_adapter_leaves_the_model_as_it_was(fault: str) -> None:
    base = tiny()
    expected, names = answers(base), [name for name, _ in base.named_modules()]
    weight = base.roberta.encoder.layer[1].attention.self.key.weight.data
    kept = weight[3, 4].clone()
    config = {
        "nan": {},
        "rank": {"rank_pattern": {r".*1.*key": 17}},
        "kind": {"target_modules": ["query", "key", "attention"]},
    }
    if fault == "nan":
        weight[3, 4] = float("nan")
    message = {"nan": "holds NaN", "rank": r"r=17 for", "kind": "is a Roberta"}[fault]
    with pytest.raises(FastpeftError, match=rf"roberta\.encoder\.layer\.\d\.attention.*{message}|r=17 for .*1.*key"):
        peft.get_peft_model(base, SivaConfig(task_type="SEQ_CLS", **config[fault]))
    weight[3, 4] = kept
    assert [name for name, _ in base.named_modules()] == names
    assert answers(base).equal(expected)
    assert all(p.requires_grad for p in base.parameters())
    model = peft.get_peft_model(base, SivaConfig(r=3, task_type="SEQ_CLS"))
    torch.testing.assert_close(answers(model), expected, **CLOSE)


def test_output_layers_and_shared_weights() -> None:
    config = transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    base = transformers.T5ForConditionalGeneration(config)
    with pytest.raises(FastpeftError, match="matches no linear layer"):
        peft.get_peft_model(base, SivaConfig(r=2, target_modules=["lm_head"]))
    shared = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    shared[1].weight = shared[0].weight
    with pytest.raises(FastpeftError, match="shared with another module"):
        peft.get_peft_model(shared, SivaConfig(r=2, target_modules=["0"]))
    x, expected = torch.ones(1, 4), shared(torch.ones(1, 4))
    model = peft.get_peft_model(shared, SivaConfig(r=2, target_modules=["0"], residual="implicit"))
    torch.testing.assert_close(model(x), expected, **CLOSE)
    with pytest.raises(FastpeftError, match="would take the adapter in too"):
        model.merge_and_unload()


class Repeated(nn.Module):
    """A block that runs several times, held once for each of them, as by a Universal Transformer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(3 * [nn.ModuleDict({"query": nn.Linear(4, 4), "value": nn.Linear(4, 4)})])

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x = torch.tanh(layer["query"](x)) + layer["value"](x)
        return x


@RESIDUALS
def test_a_block_that_runs_several_times(tmp_path: Path, residual: str) -> None:
    x, settings = torch.randn(3, 4), {"r": 2, "target_modules": ["query"], "residual": residual}
    model = peft.get_peft_model(Repeated(), SivaConfig(**settings))
    torch.testing.assert_close(model(x), Repeated()(x), **CLOSE)
    assert sum(isinstance(module, fastpeft.SivaLinear) for module in model.modules()) == 1
    move(model)
    expected = model(x)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(Repeated(), str(tmp_path))(x), expected, **CLOSE)
    torch.testing.assert_close(model.merge_and_unload()(x), expected, **CLOSE)


@RESIDUALS
def test_a_layer_that_two_places_hold_is_refused(residual: str) -> None:
    block = nn.ModuleDict({"query": nn.Linear(4, 4)})
    block["again"] = block["query"]
    with pytest.raises(FastpeftError, match=r"^query: two places of the model hold this layer"):
        peft.get_peft_model(block, SivaConfig(r=2, target_modules=["query"], residual=residual))


def test_registration_is_idempotent() -> None:
    from peft.utils import PeftType

    from fastpeft.siva.model import register

    register()
    register()
    assert PeftType("SIVA") is PeftType.SIVA
    assert list(PeftType).count("SIVA") == 1
    assert fastpeft.SivaConfig().peft_type == "SIVA"
