"""The doors by which an adapter comes to a model: names, targets, PEFT's injection, transformers' own loader."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from accelerate import cpu_offload
from packaging.version import Version
from peft.utils.hotswap import hotswap_adapter
from samples import save_tiny_model
from siva_adapters import CLOSE, RESIDUALS, answers, move, tiny
from torch import nn
from transformers.integrations.peft import MIN_PEFT_VERSION

from fastpeft import FastpeftError, SivaConfig, SivaLinear
from fastpeft.siva import SivaModel
from fastpeft.siva.export import save_as_lora


def config(**given: Any) -> SivaConfig:
    return SivaConfig(**({"r": 2, "target_modules": ["query", "key"], "task_type": "SEQ_CLS"} | given))


def adapted(**given: Any) -> Any:
    return move(peft.get_peft_model(tiny(), config(**given)).eval())


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "v1.2", "__base__", "keys", "train", "weight", "scale"])
@pytest.mark.parametrize("second", [False, True])
def test_a_name_that_cannot_be_is_refused_and_nothing_changes(name: str, second: bool) -> None:
    model = adapted() if second else tiny()
    expected, trains = answers(model), [p.requires_grad for p in model.parameters()]
    add = model.add_adapter if second else lambda name, config: peft.get_peft_model(model, config, name)
    with pytest.raises(FastpeftError, match=r"adapter name .*; give"):
        add(name, config())
    assert answers(model).equal(expected)
    assert [p.requires_grad for p in model.parameters()] == trains
    with pytest.raises(FastpeftError, match=r"adapter name .*; give"):
        SivaLinear(nn.Linear(4, 4), name, r=2)


@pytest.mark.parametrize("name", ["a-b", "Über", "with space", "SIVA", "u0"])
def test_any_other_name_will_do(tmp_path: Path, name: str) -> None:
    model = move(peft.get_peft_model(tiny(), config(), name).eval())
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny(), tmp_path / name, name).eval()
    assert answers(loaded).equal(answers(model))


# -- decomposed nearly -----------------------------------------------------------------------------------------------


@RESIDUALS
def test_made_by_power_iterations_it_starts_as_its_base_and_loads_on_that_alone(tmp_path: Path, residual: str) -> None:
    fresh = peft.get_peft_model(tiny(), config(svd_niter=1, residual=residual)).eval()
    torch.testing.assert_close(answers(fresh), answers(tiny()), **CLOSE)
    model = move(fresh)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny(), tmp_path).eval()
    torch.testing.assert_close(answers(loaded), answers(model), **CLOSE)
    loaded.load_adapter(tmp_path, "default")  # once more, into an adapter that is there: W0 is restored for it
    torch.testing.assert_close(answers(loaded.merge_and_unload()), answers(model), **CLOSE)
    exact = peft.get_peft_model(tiny(), config(residual=residual)).eval()
    exact.load_state_dict(model.state_dict())  # a checkpoint, into layers that were decomposed otherwise
    torch.testing.assert_close(answers(exact), answers(model), **CLOSE)


# -- targets ---------------------------------------------------------------------------------------------------------

SELF = "roberta.encoder.layer.{}.attention.self.{}"


@pytest.mark.parametrize("chosen", [{"layers_to_transform": [1]}, {"layers_pattern": "layer"}])
def test_no_blocks_are_chosen_in_a_regular_expression(chosen: dict[str, Any]) -> None:
    targets = r".*\.(query|key)"
    with pytest.raises(ValueError, match=r"cannot be used when `target_modules` is a str"):
        peft.LoraConfig(target_modules=targets, **chosen)
    with pytest.raises(FastpeftError, match=rf"{next(iter(chosen))}=.* with target_modules="):
        config(target_modules=targets, **chosen)


def test_all_linear_in_some_blocks(tmp_path: Path) -> None:
    """PEFT looks at the block of a layer only where a target is the end of its name, which it is not here."""
    model = peft.get_peft_model(tiny(), config(target_modules="all-linear", layers_to_transform=[1]))
    names = [layer.name for layer in model.base_model._siva_layers()]
    assert len(names) == 6
    assert all(".layer.1." in name for name in names)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny(), tmp_path).eval()
    assert [layer.name for layer in loaded.base_model._siva_layers()] == names
    assert answers(loaded).equal(answers(model.eval()))


def test_a_pattern_of_blocks_needs_their_numbers() -> None:
    with pytest.raises(FastpeftError, match="layers_pattern='layer' without layers_to_transform"):
        config(layers_pattern="layer")


def test_all_linear_gives_small_layers_their_full_rank(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of a module that is none of transformers' LoRA adapts the output layer too, of any rank; SiVA's has a limit."""

    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)))

    lora = peft.get_peft_model(base(), peft.LoraConfig(target_modules="all-linear"))
    model = peft.get_peft_model(base(), SivaConfig(r=4, target_modules="all-linear"))
    assert "r=4: layers that are smaller get their full rank: 2.1 (3)" in caplog.text
    assert set(model.targeted_module_names) == set(lora.targeted_module_names)
    assert {layer.name: layer.adapters["default"].r for layer in model.base_model._siva_layers()} == {
        "0": 4,
        "2.0": 4,
        "2.1": 3,
    }
    x = torch.randn(5, 6)
    torch.testing.assert_close(model(x), base()(x), **CLOSE)
    move(model)
    model.add_adapter("second", SivaConfig(r=4, target_modules="all-linear"))
    model.save_pretrained(tmp_path)
    assert peft.PeftModel.from_pretrained(base(), tmp_path)(x).equal(model(x))
    for asked in ({"target_modules": ["2.1"]}, {"target_modules": "all-linear", "rank_pattern": {"2.1": 4}}):
        with pytest.raises(FastpeftError, match=r"r=4 for 2\.1 of shape \(3, 8\); allowed are 1 to 3"):
            peft.get_peft_model(base(), SivaConfig(r=4, **asked))


def test_no_attribute_of_the_model_is_hidden() -> None:
    """PEFT hands on what SivaModel lacks, so it has no public names but those that LoRA's model has too."""
    shape = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = transformers.LlamaModel(transformers.LlamaConfig(**shape, intermediate_size=24))
    model = peft.get_peft_model(base, SivaConfig(r=2))
    assert model.layers[0] is base.layers[0]
    own = {name for name in (*vars(SivaModel), *vars(model.base_model)) if not name.startswith("_")}
    lora = peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["query"])).base_model
    assert own <= {*dir(peft.LoraModel), *vars(lora)}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"layers_to_transform": 1}, {(1, "query"), (1, "key")}),
        ({"layers_to_transform": [0, 1], "exclude_modules": ".*key"}, {(0, "query"), (1, "query")}),
        ({"layers_to_transform": [1], "layers_pattern": "layer"}, {(1, "query"), (1, "key")}),
        ({"exclude_modules": r".*layer\.0.*"}, {(1, "query"), (1, "key")}),
        ({"exclude_modules": [SELF.format(0, "query")]}, {(0, "key"), (1, "query"), (1, "key")}),
        ({"target_modules": [SELF.format(1, "value")]}, {(1, "value")}),
        ({"target_modules": ["query", "value"], "modules_to_save": ["value"]}, {(0, "query"), (1, "query")}),
        ({"target_modules": r".*\.self\.(query|value)", "exclude_modules": ["1.attention.self.query"]},
         {(0, "query"), (0, "value"), (1, "value")}),
    ],
    ids=lambda value: "" if isinstance(value, set) else str(value),  # the order of a set is chance
)  # fmt: skip
def test_targets_are_those_of_any_method(given: dict[str, Any], expected: set[tuple[int, str]]) -> None:
    model = peft.get_peft_model(tiny(), config(**given))
    found = {layer.name for layer in model.base_model._siva_layers()}
    assert found == {SELF.format(*each) for each in expected}
    assert set(model.targeted_module_names) == found
    lora = peft.LoraConfig(
        r=2, task_type="SEQ_CLS", **{"target_modules": ["query", "key"], "exclude_modules": None, **given}
    )
    assert set(peft.get_peft_model(tiny(), lora).targeted_module_names) == found


@pytest.mark.parametrize(
    ("given", "ranks"),
    [
        ({"rank_pattern": {"key": 3}}, [2, 3, 2, 3]),
        ({"rank_pattern": {SELF.format(1, "query"): 5}}, [2, 2, 5, 2]),
        ({"rank_pattern": {r"layer\.0\..*": 1, "query": 4}}, [1, 1, 4, 2]),
    ],
    ids=str,
)
def test_ranks_by_pattern_are_saved_and_loaded(tmp_path: Path, given: dict[str, Any], ranks: list[int]) -> None:
    model = adapted(**given)
    assert [layer.adapters["default"].r for layer in model.base_model._siva_layers()] == ranks
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny(), tmp_path).eval()
    assert [layer.adapters["default"].r for layer in loaded.base_model._siva_layers()] == ranks
    assert answers(loaded).equal(answers(model))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target_modules": ["query", "kee"]}, r"target_modules: nothing matches 'kee'\. Did you mean key\?"),
        ({"target_modules": ["query", SELF.format(2, "key")]}, r"nothing matches '.*layer\.2\..*Here are .*key"),
        ({"target_modules": ["query", "classifier"]}, r"nothing matches 'classifier'"),
        ({"rank_pattern": {"qurey": 4}}, r"rank_pattern: nothing matches 'qurey'\. Did you mean query\?"),
        ({"rank_pattern": {"value": 4, "key": 1}}, r"nothing matches 'value'\..* Here are key, query"),
        ({"rank_pattern": {r"layer\.2\..*": 1}}, "rank_pattern: nothing matches 'layer"),
        ({"layers_to_transform": [0, 7, -1]}, r"layers_to_transform: nothing matches -1, 7\. Here are 0, 1"),
        ({"layers_to_transform": [1, 2], "layers_pattern": "layer"}, r"nothing matches 2\..* Here are 0, 1"),
        ({"modules_to_save": ["clasifier"]}, r"nothing matches 'clasifier'\. Did you mean classifier\?"),
        ({"modules_to_save": ["score"], "task_type": None}, "modules_to_save: nothing matches 'score'"),
    ],
    ids=str,
)
def test_names_that_match_nothing_are_told(
    caplog: pytest.LogCaptureFixture, given: dict[str, Any], message: str
) -> None:
    model = peft.get_peft_model(tiny(), config(**given))
    assert re.search(message, caplog.text)
    assert any(isinstance(module, SivaLinear) for module in model.modules())


def test_names_of_a_saved_adapter_are_taken_as_they_are(tmp_path: Path) -> None:
    """Earlier versions took names that match nothing."""
    model = adapted(target_modules=["query", "key"])
    model.peft_config["default"].rank_pattern = {"qurey": 4}
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny(), tmp_path).eval()
    assert answers(loaded).equal(answers(model))


@pytest.mark.parametrize(
    "given",
    [
        {"layers_to_transform": 7},
        {"layers_to_transform": 7, "target_modules": "all-linear"},
        {"exclude_modules": ["query", "key"]},
        {"exclude_modules": ".*"},
        {"modules_to_save": ["query", "key"]},
        {"target_modules": []},
        {"layers_to_transform": [0], "layers_pattern": "blocks"},
    ],
    ids=str,
)
def test_no_target_left_is_said(given: dict[str, Any]) -> None:
    base = tiny()
    expected = answers(base)
    chosen = given.get("layers_to_transform")
    there = "none" if "layers_pattern" in given else "0, 1"
    where = "" if chosen is None else f" in the blocks layers_to_transform={chosen} (here are {there})"
    with pytest.raises(FastpeftError, match=re.escape(f"matches no linear layer{where} that")):
        peft.get_peft_model(base, config(**given))
    assert answers(base).equal(expected)


# -- PEFT's doors ----------------------------------------------------------------------------------------------------


def test_a_new_adapter_is_not_made_of_nothing(tmp_path: Path) -> None:
    """`low_cpu_mem_usage` leaves factors for a file to fill, with the weight changed for those that were computed."""
    base = tiny()
    expected = answers(base)
    with pytest.raises(FastpeftError, match=r"low_cpu_mem_usage=True.*leave it out"):
        peft.get_peft_model(base, config(), low_cpu_mem_usage=True)
    assert answers(base).equal(expected)
    model = adapted()
    expected = answers(model)
    with pytest.raises(FastpeftError, match=r"low_cpu_mem_usage=True.*leave it out"):
        model.add_adapter("other", config(), low_cpu_mem_usage=True)
    assert answers(model).equal(expected)
    assert list(model.peft_config) == ["default"]
    empty = peft.get_peft_model(tiny(), config(init_weights="saved"), low_cpu_mem_usage=True)
    peft.set_peft_model_state_dict(empty, peft.get_peft_model_state_dict(model), low_cpu_mem_usage=True)
    assert answers(empty.eval()).equal(expected)


@pytest.mark.parametrize("by_state_dict", [False, True])
def test_injected_into_a_model_that_stays_itself(by_state_dict: bool) -> None:
    model = adapted()
    state = peft.get_peft_model_state_dict(model)
    plain = {key.removeprefix("base_model.model."): value for key, value in state.items()}
    names = {key for key in plain if "siva_" in key}
    given = {"state_dict": {key: plain[key] for key in names}} if by_state_dict else {}
    base = tiny()
    injected = peft.inject_adapter_in_model(config(task_type=None, modules_to_save=["classifier"]), base, **given)
    assert injected is base
    assert set(peft.get_peft_model_state_dict(injected)) == set(plain)
    peft.set_peft_model_state_dict(injected, plain)
    assert answers(injected.eval()).equal(answers(model))
    assert answers(copy.deepcopy(injected)).equal(answers(model))


def test_a_base_that_accelerate_keeps_elsewhere_is_refused() -> None:
    base = tiny()
    cpu_offload(base, execution_device=torch.device("cpu"))
    with pytest.raises(FastpeftError, match=r"query: accelerate keeps its weight elsewhere .* Load the base with"):
        peft.get_peft_model(base, config())


@pytest.mark.parametrize(("ours", "theirs"), [("spectral", "plain"), ("plain", "spectral")])
def test_changes_of_another_scaling_are_refused(ours: str, theirs: str) -> None:
    """They would act in another size, and a scale that is missing is no error of `load_state_dict`."""
    states = {}
    for scaling in (ours, theirs):
        model = move(peft.get_peft_model(tiny(), config(scaling=scaling)))
        states[scaling] = peft.get_peft_model_state_dict(model)
    with pytest.raises(FastpeftError, match="trained with another scaling"):
        peft.set_peft_model_state_dict(model, states[ours])
    peft.set_peft_model_state_dict(model, states[theirs])


def _hotswap(model: Any, folder: Path) -> None:
    hotswap_adapter(model, str(folder), "default", torch_device="cpu")


REFUSED: dict[str, tuple[Callable[[Any, Path], object], type[Exception], str]] = {
    "combined by weights": (
        lambda model, _: model.add_weighted_adapter(["default"], [0.5], "half"), FastpeftError, "export",
    ),
    "swapped while it runs": (_hotswap, ValueError, "only supports LORA but SIVA"),
    "mixed with another method": (
        lambda *_: peft.get_peft_model(tiny(), config(), mixed=True), ValueError, "SIVA",
    ),
    "beside another method": (
        lambda model, _: model.add_adapter("lora", peft.LoraConfig(target_modules=["query"])), ValueError, "SIVA",
    ),
    "a name that is not there": (lambda model, _: model.set_adapter("absent"), ValueError, "not found"),
    "an adapter that is not there": (
        lambda model, folder: model.save_pretrained(str(folder), selected_adapters=["absent"]), ValueError, "absent",
    ),
    "deleted, not there": (lambda model, _: model.delete_adapter("absent"), ValueError, "does not exist"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_siva_cannot_do_is_refused_and_nothing_changes(tmp_path: Path, case: str) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    expected = answers(model)
    refuse, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        refuse(model, tmp_path)
    assert answers(model).equal(expected)
    assert list(model.peft_config) == ["default"]


def test_advice_in_place_of_a_weighted_sum_works_beside_heads() -> None:
    model = two_adapters()
    with pytest.raises(FastpeftError) as error:
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "half")
    (code,) = re.findall(r"by (layer\.set_adapter\(.*?\)) of each fastpeft\.SivaLinear among", str(error.value))
    layers = [module for module in model.modules() if isinstance(module, SivaLinear)]
    layer, x = layers[0], torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    changes = []
    with torch.no_grad(), model.disable_adapter():
        base = layer(x)
    for name in ("default", "second"):
        model.set_adapter(name)
        changes.append(layer(x).detach() - base)
    head = model.base_model.model.classifier.active_adapters
    for each in layers:
        exec(code, {"layer": each})
    torch.testing.assert_close(layer(x), base + sum(changes), **CLOSE)
    assert min(change.abs().max() for change in changes) > 1e-3
    assert model.base_model.model.classifier.active_adapters == head == ["second"]
    answers(model)


def test_advice_in_place_of_a_weighted_sum_works_by_lora(tmp_path: Path) -> None:
    model = two_adapters(task_type=None)
    with pytest.raises(FastpeftError, match="combination_type") as error:
        model.add_weighted_adapter(["default", "second"], [0.5, 0.25], "mixed")
    (kind,) = re.findall('combination_type="(.*?)"', str(error.value))
    for name in ("default", "second"):
        save_as_lora(model, tmp_path / name, name)
    lora = peft.PeftModel.from_pretrained(tiny(), tmp_path / "default")
    lora.load_adapter(tmp_path / "second", "second")
    lora.add_weighted_adapter(["default", "second"], [0.5, 0.25], "mixed", combination_type=kind)
    merged, base = {}, dict(tiny().named_parameters())
    for each, names in ((model, ("default", "second")), (lora, ("mixed",))):
        for name in names:
            plain = copy.deepcopy(each)
            plain.set_adapter(name)
            merged[name] = plain.merge_and_unload().state_dict()
    for name, weight in base.items():
        expected = weight + 0.5 * (merged["default"][name] - weight) + 0.25 * (merged["second"][name] - weight)
        torch.testing.assert_close(merged["mixed"][name], expected.detach(), **CLOSE)


def two_adapters(**given: Any) -> Any:
    """A model with two trained adapters of which the second is active."""
    model = adapted(**given)
    model.add_adapter("second", config(**given))
    model.set_adapter("second")
    return move(model).eval()


@pytest.mark.skipif(not hasattr(peft, "convert_to_lora"), reason="this PEFT converts no adapters")
@RESIDUALS
def test_peft_makes_a_lora_of_it(residual: str) -> None:
    model = adapted(residual=residual, modules_to_save=None, task_type=None)
    assert model.supports_lora_conversion()
    lora_config, state = peft.convert_to_lora(model, rank=4)
    lora = peft.get_peft_model(tiny(), lora_config).eval()
    assert peft.set_peft_model_state_dict(lora, state).unexpected_keys == []
    torch.testing.assert_close(answers(lora), answers(model), rtol=1e-4, atol=1e-4)
    assert not adapted(d=8).supports_lora_conversion()


# -- transformers' doors ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base"), head="ForSequenceClassification", vocab_size=50)


def load(folder: Path) -> Any:
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def loader(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips where transformers' loader leaves out a part of a LoRA, as its first versions 5 do of a head, or where it
    wants parts of PEFT that this one has not."""
    folder = tmp_path_factory.mktemp("lora")
    lora = peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False)
    model = move(peft.get_peft_model(load(checkpoint), lora).eval())
    model.save_pretrained(folder)
    try:
        loaded = answers(load(folder))
    except ModuleNotFoundError as error:
        pytest.skip(f"this transformers wants a newer PEFT: {error}")
    if not torch.allclose(loaded, answers(model), atol=1e-5):
        pytest.skip("this transformers does not load adapters of classifiers")


@pytest.mark.usefixtures("loader")
@pytest.mark.parametrize(
    "kind",
    [{"residual": "frozen"}, {"residual": "implicit"}, {"residual_dtype": "int8", "target_modules": "all-linear"}],
    ids=str,
)
def test_transformers_loads_a_saved_adapter(tmp_path: Path, checkpoint: Path, kind: dict[str, Any]) -> None:
    model = move(peft.get_peft_model(load(checkpoint), config(**kind)).eval())
    model.save_pretrained(tmp_path)
    whole = load(tmp_path)  # the folder of an adapter in the place of a model's
    assert answers(whole).equal(answers(model))
    base = load(checkpoint)
    base.load_adapter(str(tmp_path), adapter_name="mine", is_trainable=True)
    assert answers(base.eval()).equal(answers(model))
    base(torch.tensor([[3, 4, 5]])).logits.sum().backward()
    assert all(p.grad.any() for name, p in base.named_parameters() if "siva_" in name)


@pytest.mark.usefixtures("loader")
def test_transformers_loads_an_adapter_of_a_weight_of_zeros(tmp_path: Path, checkpoint: Path) -> None:
    """Its singular values are 0, as those of an adapter to which nothing was loaded."""
    models = []
    for _ in range(2):
        models.append(load(checkpoint).eval())
        nn.init.zeros_(next(m for name, m in models[-1].named_modules() if name.endswith("query")).weight)
    model = move(peft.get_peft_model(models[0], config(target_modules=["query"])).eval())
    model.save_pretrained(tmp_path)
    models[1].load_adapter(str(tmp_path))
    assert answers(models[1]).equal(answers(model))


@pytest.mark.usefixtures("loader")
def test_transformers_refuses_an_adapter_of_another_model(tmp_path: Path, checkpoint: Path) -> None:
    adapted().save_pretrained(tmp_path)
    with pytest.raises(FastpeftError, match="another weight"):
        load(checkpoint).load_adapter(str(tmp_path))


@pytest.mark.usefixtures("loader")
@pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION), reason="this transformers wants a newer PEFT for it"
)
@RESIDUALS
def test_transformers_makes_switches_saves_and_deletes(tmp_path: Path, checkpoint: Path, residual: Any) -> None:
    model = load(checkpoint)
    expected = answers(model)
    model.add_adapter(config(residual=residual), adapter_name="mine")
    torch.testing.assert_close(answers(model), expected, **CLOSE)
    changed = answers(move(model))
    assert model.active_adapters() == ["mine"]
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    model.disable_adapters()
    torch.testing.assert_close(answers(model), expected, **CLOSE)
    model.enable_adapters()
    assert answers(model).equal(changed)
    assert answers(load(tmp_path)).equal(changed)
    model.delete_adapter("mine")
    torch.testing.assert_close(answers(model), expected, **CLOSE)
