"""Adapters that ask for more than a place in a model: a base in 4 bits, vectors before the words of a text."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from backbones import tiny
from samples import PROMPT, reviews, save_tiny_model, tagged, write_csv, write_jsonl
from siva_adapters import trained

from fastpeft import CompareConfig, FastpeftError, PromptCollator, TrainConfig, train
from fastpeft.data.problems import CLASSIFICATION
from fastpeft.methods.preparation import Preparation
from fastpeft.methods.registry import get_method
from fastpeft.models import LoadedModel, load_classifier
from fastpeft.training.estimates import plan
from fastpeft.training.evaluation import evaluate
from fastpeft.training.export import export
from fastpeft.training.loading import load_run
from fastpeft.training.task import Task


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model whose rows are whole blocks of 64 weights, and data."""
    place = tmp_path_factory.mktemp("place")
    save_tiny_model(place / "model", hidden_size=64, intermediate_size=128)
    write_csv(place / "reviews.csv", reviews(60))
    return place


@pytest.fixture
def config(config: TrainConfig) -> TrainConfig:
    return replace(config, method="prompt-tuning")


@pytest.fixture
def classifier(place: Path) -> LoadedModel:
    return load_classifier(str(place / "model"), ("no", "yes"), CLASSIFICATION)


# -- layers that PEFT has no default for -------------------------------------------------------------------------------


def adapted(name: str, model: Any, **settings: Any) -> Any:
    """The configuration of an adapter on `model` that was given no targets."""
    return get_method(name).prepare(model, Preparation(("classifier",), settings=settings)).peft_config["default"]


@pytest.mark.parametrize("name", ["lora", "pissa", "dora", "olora", "lokr"])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("MPNet", {"q", "v"}),
        ("DistilBert", {"q_lin", "v_lin"}),
        ("ModernBert", {"Wqkv"}),
    ],
)
def test_query_and_value_are_found_where_peft_does_not_know_the_model(
    name: str, kind: str, expected: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="fastpeft"):
        assert adapted(name, tiny(kind)).target_modules == expected
    told = f"PEFT has no default layers for {kind.lower()} models; adapting {' and '.join(sorted(expected))}"
    assert told in caplog.messages


@pytest.mark.parametrize("name", ["siva", "lora"])
@pytest.mark.parametrize(
    ("kind", "named", "expected"),
    [
        ("MPNet", ["query", "key"], {"q", "k"}),
        ("DistilBert", ["key", "value"], {"k_lin", "v_lin"}),
        ("ModernBert", ["query", "key", "value"], {"Wqkv"}),
        ("Roberta", ["query", "key", "output.dense"], {"query", "key", "output.dense"}),
    ],
)
def test_query_key_and_value_are_what_the_model_calls_so(
    name: str, kind: str, named: list[str], expected: set[str]
) -> None:
    """As the rows of the paper's tables name them, on every model."""
    model = get_method(name).prepare(tiny(kind), Preparation(("classifier",), targets=named, rank=2))
    assert set(model.peft_config["default"].target_modules) == expected


def test_one_matrix_for_all_is_no_query(classifier: LoadedModel) -> None:
    with pytest.raises(FastpeftError, match=r"targets \['query', 'key'\].* Its linear layers are named .*Wqkv"):
        get_method("lora").prepare(tiny("ModernBert"), Preparation((), targets=["query", "key"], rank=2))


def test_what_peft_knows_is_left_to_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="fastpeft"):
        assert adapted("lora", tiny("Roberta")).target_modules == {"query", "value"}
        assert adapted("lora", tiny("GPT2")).target_modules == {"c_attn"}
        assert adapted("ia3", tiny("Roberta")).target_modules == {"key", "value", "output.dense"}
        by_parameters = {"target_parameters": ["encoder.layer.0.attention.attn.q.weight"]}
        assert not adapted("lora", tiny("MPNet"), **by_parameters).target_modules
    assert not caplog.messages


@pytest.mark.parametrize(
    ("kind", "expected", "feed_forward"),
    [
        ("MPNet", {"k", "v", "output.dense"}, "output.dense"),
        ("DistilBert", {"k_lin", "v_lin", "lin2"}, "lin2"),
        ("ModernBert", {"Wqkv", "mlp.Wo"}, "mlp.Wo"),
        ("Electra", {"key", "value", "output.dense"}, "output.dense"),
    ],
)
def test_ia3_finds_the_feed_forwards_inside_too(kind: str, expected: set[str], feed_forward: str) -> None:
    found = adapted("ia3", tiny(kind))
    assert (found.target_modules, found.feedforward_modules) == (expected, {feed_forward})


def test_layers_with_other_names_are_asked_for() -> None:
    for name in ("lora", "ia3"):
        model = tiny("MPNet")
        for layer in model.mpnet.encoder.layer:
            layer.attention.attn.w_q = layer.attention.attn.q
            del layer.attention.attn.q
            layer.attention.attn.w_k = layer.attention.attn.k
            del layer.attention.attn.k
        with pytest.raises(FastpeftError, match=r"linear layers are named dense, o, .*, w_k, w_q; name some"):
            adapted(name, model)
    with pytest.raises(FastpeftError, match="linear layers are named c_attn, c_fc, c_proj, score; name some"):
        adapted("lora", tiny("GPT2"), target_modules=["q_proj"])  # layers of transformers' own class


def test_a_run_on_layers_that_peft_has_no_default_for(config: TrainConfig, tmp_path: Path) -> None:
    model = str(save_tiny_model(tmp_path / "mpnet", "MPNet"))
    config = replace(config, method="lora", model=model)
    assert plan(config, timed=True).estimate.error is None
    result = train(config)
    assert peft.PeftConfig.from_pretrained(result.folder).target_modules == {"q", "v"}
    assert evaluate(result.folder)["accuracy"] == result.metrics["accuracy"]


# -- vectors before the words ------------------------------------------------------------------------------------------


def test_a_prompt_of_vectors_and_the_head_train(classifier: LoadedModel) -> None:
    preparation = Preparation(classifier.head, settings={"num_virtual_tokens": 3})
    model: Any = get_method("prompt-tuning").prepare(classifier.model, preparation)
    vectors, *head = sorted(trained(model), reverse=True)
    assert "prompt_encoder" in vectors
    assert model.get_parameter(vectors).shape == (3, 64)
    assert len(head) == 4
    assert all(".classifier." in name for name in head)


def test_vectors_are_refused_before_the_texts_of_a_decoder() -> None:
    """Its head finds the last token by ids, which PEFT replaces: behind a shorter text it would read padding."""
    model = tiny("Llama").eval()
    tuned = peft.get_peft_model(model, peft.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS")).eval()
    alone, padded = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 6, 7, 0, 0]])
    inputs = {"input_ids": padded, "attention_mask": padded != 0}
    assert not torch.allclose(tuned(alone).logits, tuned(**inputs).logits, atol=1e-3)  # else it need not be refused
    with pytest.raises(FastpeftError, match="prompt tuning is for encoders: LlamaForSequenceClassification"):
        get_method("prompt-tuning").prepare(model, Preparation(("score",)))


def test_vectors_take_room_of_the_texts(config: TrainConfig) -> None:
    assert Task.load(config).max_length == 38 - 10
    assert Task.load(replace(config, settings={"num_virtual_tokens": 4})).max_length == 34
    for changes, told in (
        ({"max_length": 29}, "max_length 29 is above .* 38 tokens, of which the method takes 10 .* Choose 28 "),
        ({"settings": {"num_virtual_tokens": 37}}, "reads 38 tokens, of which the method takes 37"),
        ({"settings": {"num_virtual_tokens": 0}}, "num_virtual_tokens is 0; it must be a whole number from 1"),
    ):
        with pytest.raises(FastpeftError, match=told):
            Task.load(replace(config, **changes))


def test_vectors_are_for_heads_that_read_a_text_as_a_whole(config: TrainConfig, tmp_path: Path) -> None:
    tags = str(write_jsonl(tmp_path / "tagged.jsonl", tagged(60)))
    for changes in (PROMPT, {"data": tags}, {"objective": "mlm"}):
        with pytest.raises(FastpeftError, match="not for tags of words, masked words or label words"):
            plan(replace(config, **changes))


# -- a base in 4 bits --------------------------------------------------------------------------------------------------


def in_4_bits(classifier: LoadedModel) -> Any:
    pytest.importorskip("bitsandbytes")
    return get_method("qlora").prepare(classifier.model, Preparation(classifier.head, 2))


def batch() -> dict[str, torch.Tensor]:
    ids = torch.arange(5, 29).view(2, 12)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1])}


def test_the_backbones_linear_layers_are_in_4_bits_and_all_have_an_adapter(classifier: LoadedModel) -> None:
    before = classifier.model.roberta.encoder.layer[0].output.dense.weight.detach().clone()
    with torch.no_grad():
        expected = classifier.model.eval()(**batch()).logits
    model = in_4_bits(classifier)
    import bitsandbytes as bnb

    layers = [layer for layer in model.modules() if isinstance(layer, bnb.nn.Linear4bit)]
    assert len(layers) == 2 * 6
    assert all("lora_" in name or ".classifier." in name for name in trained(model))
    assert sum("lora_A" in name for name in trained(model)) == len(layers)
    weight = model.get_submodule("base_model.model.roberta.encoder.layer.0.output.dense.base_layer").weight
    assert weight.nbytes == before.numel() / 2
    again = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    assert 0 < (again - before).norm() / before.norm() < 0.15  # 0.096 of normal values
    with torch.no_grad():
        found = model.eval()(**batch()).logits
    assert 0 < (found - expected).abs().max() < 0.05


def test_gradients_pass_through_the_base_after_an_evaluation(classifier: LoadedModel) -> None:
    model = in_4_bits(classifier)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0

    def gradients() -> list[torch.Tensor]:
        model.train().zero_grad()
        model(**batch()).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before = gradients()
    with torch.no_grad():
        model.eval()(**batch())
    assert len(before) == len(trained(model))
    assert all(torch.equal(now, then) for now, then in zip(gradients(), before, strict=True))


def test_a_run_in_4_bits(config: TrainConfig) -> None:
    pytest.importorskip("bitsandbytes")
    config = replace(config, method="qlora", save_steps=2, bf16=False)  # casts are more than a tiny model
    result = train(config)
    assert evaluate(result.folder)["accuracy"] == result.metrics["accuracy"]
    lora = plan(replace(config, method="lora", targets="all-linear"))
    assert lora.peak_memory_mb is not None
    assert 0 < result.metrics["peak_memory_mb"] < lora.peak_memory_mb
    assert lora.trainable_parameters == result.metrics["trainable_parameters"]
    # the card's code loads what was trained
    loaded: dict[str, Any] = {}
    exec((result.folder / "README.md").read_text().split("```python\n")[1].split("```")[0], loaded)
    task = Task.load(config)
    rows = PromptCollator(task.tokenizer)(task.dev_rows[:4])
    rows.pop("labels")
    with torch.no_grad():
        first, second = (m.eval()(**rows).logits for m in (loaded["model"], load_run(result.folder).loaded.model))
    assert torch.equal(first, second)
    # a run that ended after its checkpoint comes to the same weights
    weights = result.folder / "adapter_model.safetensors"
    before = weights.read_bytes()
    (result.folder / "metrics.json").unlink()
    weights.unlink()
    train(config, resume=True)
    assert weights.read_bytes() == before


def test_mezo_over_a_base_in_4_bits_by_label_words(config: TrainConfig) -> None:
    pytest.importorskip("bitsandbytes")
    result = train(replace(config, method="mezo", settings={"over": "qlora"}, **PROMPT))
    assert evaluate(result.folder)["accuracy"] == result.metrics["accuracy"]


def test_refusals_of_4_bits(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    narrow = replace(config, method="qlora", model=str(save_tiny_model(tmp_path / "narrow")))
    if not torch.accelerator.is_available():
        with pytest.raises(FastpeftError, match="blocks of 64 weights, and these have 16"):
            plan(narrow)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    with pytest.raises(FastpeftError, match="qlora needs the library bitsandbytes"):
        plan(narrow)


@pytest.mark.long(but="qlora")
@pytest.mark.parametrize("method", ["prompt-tuning", "qlora"])
def test_what_cannot_become_weights_is_not_merged(config: TrainConfig, tmp_path: Path, method: str) -> None:
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    folder = train(replace(config, method=method)).folder
    refusal = r"is (QLoRA|prompt tuning), which cannot become a part of its model's weights"
    with pytest.raises(FastpeftError, match=refusal):
        export(folder, tmp_path / "model")
    with pytest.raises(FastpeftError, match=refusal):
        plan(replace(config, method="lora", output="next", init_from=str(folder)))
    with pytest.raises(FastpeftError, match=f"what it starts from, '{method}', {refusal}"):
        CompareConfig(output=config.output, methods=[method, f"lora:init_from={method}"])


# -- an optimizer in 8 bits --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_bitsandbytes")
def test_full_fine_tuning_with_adamw_in_8_bits(config: TrainConfig) -> None:
    given = {"method": "full", "max_steps": None, "epochs": 12, "head_learning_rate": 1e-2}
    config = replace(config, **given, settings={"optim": "adamw_8bit"})
    result = train(config)
    losses = dict(json.loads((result.folder / "curves.json").read_text())["training loss"])
    assert min(losses.values()) < 0.1 < max(losses.values())
    assert evaluate(result.folder)["accuracy"] == result.metrics["accuracy"] == 1
    whole = plan(replace(config, settings={})).peak_memory_mb
    assert whole is not None
    assert result.metrics["peak_memory_mb"] < whole
