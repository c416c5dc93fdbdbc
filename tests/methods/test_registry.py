"""The registry of methods: what each trains, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import save_tiny_model

from fastpeft import FastpeftError, TrainConfig
from fastpeft.comparison.variants import parse_variant
from fastpeft.data.problems import CLASSIFICATION
from fastpeft.methods.preparation import Preparation, parse_targets
from fastpeft.methods.recipes import Recipe
from fastpeft.methods.registry import METHODS, get_method
from fastpeft.models import LoadedModel, load_classifier

LABELS = ("no", "yes", "perhaps")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def classifier(checkpoint: Path) -> LoadedModel:
    torch.manual_seed(0)
    return load_classifier(str(checkpoint), LABELS, CLASSIFICATION)


def trained(model: Any) -> set[str]:
    """Names of what trains, as in the base model."""
    return {
        name.removeprefix("base_model.model.").replace(".modules_to_save.default", "").replace(".default", "")
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


HEAD = {"classifier.dense.weight", "classifier.dense.bias", "classifier.out_proj.weight", "classifier.out_proj.bias"}


@pytest.mark.parametrize(
    ("name", "targets", "expected"),
    [
        ("siva", None, ("query", "key", "value", "dense")),
        ("siva", ["value"], ("value",)),
        ("siva", r".*layer\.1.*\.dense", ("dense",)),
        ("lora", None, ("query", "value")),
        ("lora", ["key", "value"], ("key", "value")),
        ("lora", "all-linear", ("query", "key", "value", "dense")),
    ],
)
def test_adapters_train_their_targets_and_the_head(
    classifier: LoadedModel, name: str, targets: Any, expected: tuple[str, ...]
) -> None:
    model = get_method(name).prepare(classifier.model, Preparation(classifier.head, 2, targets))
    adapted = trained(model) - HEAD
    assert trained(model) >= HEAD
    layers = {path.split(".")[-3] for path in adapted}
    assert layers == set(expected)


def test_siva_takes_a_quantised_residual_as_a_setting(classifier: LoadedModel) -> None:
    preparation = Preparation(classifier.head, settings={"residual_dtype": "int8"})
    model = get_method("siva").prepare(classifier.model, preparation)
    assert any(path.endswith("quantised.codes") for path, _ in model.named_parameters())
    assert trained(model) > HEAD


def test_full_trains_all_and_head_only_the_head(classifier: LoadedModel) -> None:
    everything = {name for name, _ in classifier.model.named_parameters()}
    assert trained(get_method("full").prepare(classifier.model, Preparation(classifier.head))) == everything
    assert trained(get_method("head").prepare(classifier.model, Preparation(classifier.head))) == HEAD


def test_last_layers_and_biases(classifier: LoadedModel) -> None:
    names = {name for name, _ in classifier.model.named_parameters()}
    last = get_method("last-n").prepare(classifier.model, Preparation(classifier.head, settings={"layers": 1}))
    assert trained(last) == {name for name in names if ".layer.1." in name} | HEAD
    biases = get_method("bitfit").prepare(classifier.model, Preparation(classifier.head))
    assert trained(biases) == {name for name in names if name.endswith("bias")} | HEAD
    with pytest.raises(FastpeftError, match="layers is 3; the model has 2"):
        get_method("last-n").prepare(classifier.model, Preparation(classifier.head, settings={"layers": 3}))


@pytest.mark.parametrize(("name", "fusion", "window"), [("k-lst", "cross_attention", 9), ("lst", "gated", 1)])
def test_side_networks_train_beside_a_frozen_backbone(
    classifier: LoadedModel, name: str, fusion: str, window: int
) -> None:
    model = get_method(name).prepare(classifier.model, Preparation(classifier.head))
    assert (model.config.fusion, model.config.window_size) == (fusion, window)
    assert {path.split(".")[0] for path in trained(model) - {f"base.{name}" for name in HEAD}} == {"side"}
    assert {f"base.{name}" for name in HEAD} <= trained(model)


def test_pissa_starts_from_singular_vectors(classifier: LoadedModel) -> None:
    model = get_method("pissa").prepare(classifier.model, Preparation(classifier.head, 2))
    config = model.peft_config["default"]
    assert (config.init_lora_weights, config.r, config.lora_alpha) == ("pissa", 2, 2)


def test_modules_that_the_checkpoint_lacks_train_too(tmp_path: Path) -> None:
    # a masked-word checkpoint of BERT has no pooler
    classifier = load_classifier(str(save_tiny_model(tmp_path, "Bert")), LABELS, CLASSIFICATION)
    assert classifier.head == ("classifier", "bert.pooler.dense")
    model = get_method("lora").prepare(classifier.model, Preparation(classifier.head, 2))
    assert {"bert.pooler.dense.weight", "classifier.weight"} <= trained(model)


def test_models_load_in_float32_with_named_classes(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, dtype=torch.float16)
    model = load_classifier(str(folder), LABELS, CLASSIFICATION).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.id2label == dict(enumerate(LABELS))


def test_settings_and_rank_reach_the_configuration(classifier: LoadedModel) -> None:
    settings = {"d": 12, "rank_pattern": {"key": 3}}
    model = get_method("siva").prepare(classifier.model, Preparation(classifier.head, 2, None, settings))
    config = model.peft_config["default"]
    assert (config.r, config.d, config.rank_pattern) == (2, 12, {"key": 3})


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        (None, None),
        ("query", ["query"]),
        ("query,key", ["query", "key"]),
        ("layer.0.attention.self.query,key", ["layer.0.attention.self.query", "key"]),
        ("all-linear", "all-linear"),
        (r".*\.(query|key)", r".*\.(query|key)"),
    ],
)
def test_targets_as_written(text: str | None, targets: Any) -> None:
    assert parse_targets(text) == targets


@pytest.mark.parametrize("name", ["siva", "lora"])
@pytest.mark.parametrize(
    ("rank", "targets", "parts"),
    [
        (17, ["query"], ("17", "16")),
        (2, ["nothing_like_it"], ("nothing_like_it", "query")),
    ],
)
def test_refusals_name_what_is_allowed(
    classifier: LoadedModel, name: str, rank: int, targets: Any, parts: tuple[str, ...]
) -> None:
    with pytest.raises(FastpeftError) as error:
        get_method(name).prepare(classifier.model, Preparation(classifier.head, rank, targets))
    assert all(part in str(error.value) for part in parts)


def test_few_rows_are_passed_over_until_a_task_is_learned() -> None:
    recipe = Recipe(learning_rate=0.25, epochs=3, least_steps=100)
    assert [recipe.epochs_of(steps) for steps in (1, 30, 40, 1_000)] == [100, 4, 3, 3]


@pytest.mark.parametrize(("width", "rate", "of_head"), [(384, 1.2e-3, 0.021), (1_024, 4e-4, 8e-3), (None, 4e-4, 8e-3)])
def test_rates_follow_the_width_of_a_model(width: int | None, rate: float, of_head: float) -> None:
    """Not for next words."""
    recipe = METHODS["lora"].recipe
    found = recipe.for_model(hidden_size=width)
    assert (found.learning_rate, found.head_learning_rate) == (rate, of_head)
    assert recipe.for_model(causal_lm=True, hidden_size=width).learning_rate == 4e-4
    assert METHODS["k-lst"].recipe.for_model(hidden_size=width).head_learning_rate is None


def test_siva_has_another_form_by_mezo(classifier: LoadedModel) -> None:
    preparation = Preparation(classifier.head, 2)
    siva = get_method("siva").prepare(copy.deepcopy(classifier.model), preparation)
    by_mezo = get_method("mezo", {"over": "siva"}).prepare(classifier.model, preparation)
    assert [model.active_peft_config.scaling for model in (siva, by_mezo)] == ["spectral", "plain"]


@pytest.mark.parametrize(("width", "rate"), [(768, 6e-6), (1_024, 1e-6), (None, 1e-6)])
def test_mezo_has_a_rate_of_its_own_beside_a_narrow_model(width: int | None, rate: float) -> None:
    for method in (METHODS["mezo"], get_method("mezo", {"over": "lora"})):  # whatever trains
        assert method.recipe.for_model(hidden_size=width).learning_rate == rate
        assert method.recipe.for_model(causal_lm=True, hidden_size=width).learning_rate == 1e-6


def test_every_method_is_described() -> None:
    for name, method in METHODS.items():
        assert (method.name, bool(method.title), bool(method.description)) == (name, True, True)
        assert method.recipe.learning_rate > 0 <= method.recipe.weight_decay
        assert isinstance(method.settings(), dict)
    with pytest.raises(FastpeftError, match="'sivva'; allowed are siva, k-lst, lst, full"):
        get_method("sivva")


def test_types_of_peft_that_no_run_can_train_are_none() -> None:
    assert "peft:adalora" not in METHODS
    assert [*METHODS] == [method.name for method in METHODS.values()], "and none is listed once it was asked for"
    with pytest.raises(FastpeftError, match=r"unknown type of PEFT in 'peft:verra'.*Did you mean vera or pvera"):
        get_method("peft:verra")
    with pytest.raises(FastpeftError, match="unknown type of PEFT in 'peft:xlora'"):
        TrainConfig(output="run", method="peft:xlora")
    assert parse_variant("peft:vera:rank=4:targets=query+value")[:2] == (
        "peft:vera",
        {"rank": 4, "targets": "query,value"},
    )
