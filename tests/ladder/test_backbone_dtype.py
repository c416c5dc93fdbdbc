"""A frozen backbone in fewer bits: in bfloat16, int8 and nf4, as its base came or as a side network asks; compiled."""

from __future__ import annotations

import copy
import importlib.util
import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from backbones import IDS, MASK, classifier, ladder, logits, quantise_a_layer, tiny, train_a_little, trainable
from pools import SMALL, answers, shuffled
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastpeft import FastpeftError, LadderConfig, LadderModel, LadderPool
from fastpeft.ladder.cache import _identity
from fastpeft.ladder.passes import listen
from fastpeft.ops.quantise import QuantisedLinear
from fastpeft.support.processor import has_int8
from fastpeft.support.stages import listening
from fastpeft.training.memory import simulate_training_step

NEEDS_BITSANDBYTES = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
NF4 = pytest.param("nf4", marks=NEEDS_BITSANDBYTES)
FORMATS = pytest.mark.parametrize("kind", ["int8", NF4])
DTYPES = pytest.mark.parametrize("kind", ["bfloat16", "int8", NF4])
ERROR = {"bfloat16": 0.02, "int8": 0.02, "nf4": 0.3}  # relative, of the features; a half of these or less is usual
BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": torch.tensor([0, 1, 2])}


def relative(found: Tensor, true: Tensor) -> float:
    return float(((found.float() - true.float()).norm() / true.float().norm()).detach())


def last_feature(model: LadderModel) -> Tensor:
    seen: list[Tensor] = []
    with torch.no_grad(), listen(model.backbone, lambda _, feature: seen.append(feature), lambda feature: feature):
        model.backbone.body(IDS, attention_mask=MASK)
    return seen[-1]


def test_it_tells_how_far_it_is() -> None:
    told: list[tuple[str, int, int | None]] = []
    with listening(lambda stage, done, total, _: told.append((stage, done, total))):
        model = ladder(tiny(), backbone_dtype="int8")
    number = sum(isinstance(module, QuantisedLinear) for module in model.modules())
    assert told == [("converting layers", done, number) for done in range(1, number + 1)]


# -- what it does ------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("architecture", ["Roberta", "Bert", "ModernBert", "GPT2", "DebertaV2"])
def test_features_are_near_and_the_head_trains_in_float32(kind: Any, architecture: str) -> None:
    exact, model = ladder(tiny(architecture)), ladder(tiny(architecture), backbone_dtype=kind)
    assert 0 < relative(last_feature(model), last_feature(exact)) < ERROR[kind]
    before = copy.deepcopy(model.state_dict())
    train_a_little(model)
    changed = {name for name, tensor in model.state_dict().items() if not tensor.equal(before[name])}
    assert changed == trainable(model).keys() == trainable(exact).keys()
    assert {model.state_dict()[name].dtype for name in changed} == {torch.float32}


@FORMATS
@pytest.mark.parametrize("architecture", ["Roberta", "GPT2"])
def test_all_linear_layers_of_the_layers_and_nothing_else_is_quantised(kind: Any, architecture: str) -> None:
    base = tiny(architecture)
    embeddings = copy.deepcopy(base.get_input_embeddings().weight)
    model = ladder(base, backbone_dtype=kind)
    kinds = [type(module) for module in model.backbone.layers[0].modules()]
    assert kinds.count(QuantisedLinear) == (6 if architecture == "Roberta" else 4)
    assert not {nn.Linear, Conv1D} & set(kinds)
    assert model.base.get_input_embeddings().weight.equal(embeddings)
    assert not any(isinstance(m, QuantisedLinear) for m in model.modules() if m not in set(model.backbone.frozen))


def test_bfloat16_is_what_loading_in_bfloat16_gives(checkpoint: Path) -> None:
    model = ladder(classifier(checkpoint), backbone_dtype="bfloat16")
    loaded = ladder(classifier(checkpoint, dtype=torch.bfloat16))
    assert logits(model).shape == logits(loaded).shape
    own, other = model.backbone.body.state_dict(), loaded.backbone.body.state_dict()
    assert all(tensor.dtype == other[name].dtype and tensor.equal(other[name]) for name, tensor in own.items())


def test_frequencies_of_positions_keep_their_precision() -> None:
    model = ladder(tiny("ModernBert"), backbone_dtype="bfloat16")
    buffers = {name: b.dtype for name, b in model.backbone.body.named_buffers() if b.is_floating_point()}
    assert set(buffers.values()) == {torch.float32}
    assert buffers


@FORMATS
def test_computes_in_the_dtype_of_its_input_or_of_autocast(kind: Any) -> None:
    layer = QuantisedLinear(nn.Linear(16, 24), kind)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    expected = x @ layer.weight.t() + layer.bias
    x.requires_grad_()  # so that activations are not rounded to 8 bits
    torch.testing.assert_close(layer(x), expected)
    half = layer(x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).equal(half)
    assert half.dtype == torch.bfloat16
    assert relative(half, expected) < 0.02


@pytest.mark.skipif(not has_int8(), reason="the processor multiplies no int8")
def test_codes_are_multiplied_as_they_are_where_no_gradient_is_asked_for() -> None:
    layer = QuantisedLinear(nn.Linear(64, 24).requires_grad_(False), "int8")
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    expected = x @ layer.weight.t() + layer.bias
    found = layer(x)
    assert not torch.allclose(found, expected, rtol=1e-5)
    assert relative(found, expected) < 0.02  # measured: 0.007
    half = layer(x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).equal(half)
    assert half.dtype == torch.bfloat16
    assert relative(half, expected) < 0.02


@pytest.mark.long(but="nf4")
@FORMATS
def test_a_simulated_step_counts_the_bytes_of_the_format(kind: Any) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 128}
    weights = {
        dtype: simulate_training_step(ladder(tiny(**shape), backbone_dtype=dtype), BATCH).weights
        for dtype in (None, kind)
    }
    count, rows = 3 * (4 * 64**2 + 2 * 64 * 128), 3 * (5 * 64 + 128)
    scales = 4 * rows if kind == "int8" else 4 * count // 64
    assert weights[None] - weights[kind] == 4 * count - count // (1 if kind == "int8" else 2) - scales


# -- files and pools ---------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16])
def test_a_saved_side_network_makes_its_backbone_again(
    tmp_path: Path, checkpoint: Path, kind: Any, loaded: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    model = train_a_little(ladder(classifier(checkpoint, dtype=loaded), backbone_dtype=kind))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 60_000
    with caplog.at_level(logging.WARNING, "fastpeft"):
        again = LadderModel.from_pretrained(tmp_path)
        beside = LadderModel.from_pretrained(tmp_path, base=classifier(checkpoint, dtype=loaded))
    assert logits(again).equal(logits(model))
    assert logits(beside).equal(logits(model))
    assert again.config.backbone_dtype == kind
    assert not [record for record in caplog.records if record.name.startswith("fastpeft")]


def test_another_backbone_is_refused_before_it_is_quantised(tmp_path: Path, checkpoint: Path) -> None:
    ladder(classifier(checkpoint), backbone_dtype="int8").save_pretrained(tmp_path)
    other = classifier(checkpoint)
    other.roberta.encoder.layer[0].output.dense.weight.data += 0.1
    with pytest.raises(FastpeftError, match="trained on another backbone: weights of the first layer"):
        LadderModel.from_pretrained(tmp_path, base=other)
    assert not any(isinstance(module, QuantisedLinear) for module in other.modules())


def test_training_goes_on_with_fewer_bits(tmp_path: Path, checkpoint: Path) -> None:
    first = train_a_little(ladder(classifier(checkpoint)))
    first.save_pretrained(tmp_path)
    model = ladder(classifier(checkpoint), backbone_dtype="int8")
    model.take_over(tmp_path, head=True)
    assert 0 < relative(logits(model.eval()), logits(first)) < 0.05


@DTYPES
def test_a_pool_of_one_dtype(tmp_path: Path, checkpoint: Path, kind: Any) -> None:
    model = train_a_little(ladder(classifier(checkpoint), backbone_dtype=kind))
    model.save_pretrained(tmp_path)
    pool = LadderPool(classifier(checkpoint), backbone_dtype=kind)
    for name, side in (("saved", tmp_path), ("model", model), ("new", LadderConfig(**SMALL))):
        pool.add(name, side)
    shared = {p.data_ptr() for p in pool.backbone.layers[0].parameters()}
    for name in pool.tasks:
        assert {p.data_ptr() for p in pool[name].backbone.layers[0].parameters()} == shared
        assert pool[name].config.backbone_dtype == kind
    torch.testing.assert_close(answers(pool, 3 * ["saved"]), logits(model), rtol=1e-3, atol=1e-3)
    pool["new"].save_pretrained(tmp_path / "new")
    LadderModel.from_pretrained(tmp_path / "new", base=classifier(checkpoint))


def test_a_pool_in_bfloat16_of_models_with_a_pooler() -> None:
    pool = LadderPool(tiny("Bert"), backbone_dtype="bfloat16")
    for number, name in enumerate("ab"):
        shuffled(pool.add(name, LadderConfig(**SMALL)), number)
    expected = torch.stack([logits(pool[name])[row] for row, name in enumerate("aba")])
    torch.testing.assert_close(answers(pool, list("aba")), expected, rtol=2e-2, atol=2e-2)


@DTYPES
def test_a_pool_of_another_dtype_refuses_and_stays_as_it_is(tmp_path: Path, checkpoint: Path, kind: Any) -> None:
    model = ladder(classifier(checkpoint), backbone_dtype=kind)
    model.save_pretrained(tmp_path)
    pool = LadderPool(classifier(checkpoint))
    before = copy.deepcopy(pool.base.state_dict())
    for side in (tmp_path, model, model.config):
        with pytest.raises(FastpeftError, match=rf"LadderPool\(base, backbone_dtype='{kind}'\)"):
            pool.add("side", side)
    after = pool.base.state_dict()
    assert all(after[name].dtype == tensor.dtype and after[name].equal(tensor) for name, tensor in before.items())


@DTYPES
@pytest.mark.parametrize("architecture", ["Roberta", "Bert"])
def test_cached_features_are_known_by_what_the_backbone_is_now(tmp_path: Path, kind: Any, architecture: str) -> None:
    exact, model, same = (ladder(tiny(architecture), backbone_dtype=each) for each in (None, kind, kind))
    assert _identity(model.eval().backbone) == _identity(same.backbone) != _identity(exact.backbone)
    expected = logits(model)
    cache = model.cache_features(tmp_path)
    for _ in range(2):
        torch.testing.assert_close(logits(model), expected)
    assert (cache.misses, cache.hits) == (3, 3)


# -- what cannot be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"backbone_dtype": "int4"},
            "backbone_dtype='int4'; allowed are 'bfloat16', 'int8', 'nf4', 'nf4-double', or None",
        ),
        ({"backbone_dtype": "int8", "train_adapters": True}, r"backbone_dtype='int8' with train_adapters=True"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(FastpeftError, match=words):
        LadderConfig(**given)


def test_a_base_that_another_side_network_reads_is_not_converted() -> None:
    base = tiny()
    first = ladder(base).eval()
    expected, before = logits(first), copy.deepcopy(base.state_dict())
    with pytest.raises(FastpeftError, match=r"another side network or a pool reads this Roberta.*Load the model once"):
        ladder(base, backbone_dtype="int8")
    assert all(tensor.equal(before[name]) for name, tensor in base.state_dict().items())
    assert logits(first).equal(expected)
    ladder(base)  # as it is
    ladder(copy.deepcopy(base), backbone_dtype="int8")
    del first
    assert ladder(base, backbone_dtype="int8").config.backbone_dtype == "int8"


def test_nf4_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "bitsandbytes" else find(name))
    with pytest.raises(FastpeftError, match=r"backbone_dtype='nf4' needs .*pip install 'bitsandbytes>="):
        LadderConfig(backbone_dtype="nf4")


def test_a_base_that_does_not_fit_is_refused_and_left_as_it_is() -> None:
    base = tiny()
    with pytest.raises(FastpeftError, match=r"beside a PeftModel.*Merge it first"):
        ladder(peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["query"])), backbone_dtype="int8")
    ladder(base, backbone_dtype="int8")
    with pytest.raises(FastpeftError, match="brought this RobertaForSequenceClassification to 'int8'"):
        ladder(base)
    quantised = quantise_a_layer(tiny())
    with pytest.raises(FastpeftError, match="quantised already"):
        ladder(quantised, backbone_dtype="bfloat16")
    assert quantised.roberta.embeddings.word_embeddings.weight.dtype == torch.float32


# -- a base that came quantised ----------------------------------------------------------------------------------


def four_bit(module: nn.Module) -> nn.Module:
    """Linear layers below `module` in bitsandbytes's nf4, as a `quantization_config` puts them there."""
    from bitsandbytes.nn import Linear4bit

    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            layer = Linear4bit(child.in_features, child.out_features, quant_type="nf4", compute_dtype=torch.float32)
            layer.load_state_dict(child.state_dict())
            setattr(module, name, layer.to("cpu"))
        else:
            four_bit(child)
    return module


@NEEDS_BITSANDBYTES
def test_a_base_quantised_by_bitsandbytes_is_taken_as_it_is() -> None:
    shape = {"hidden_size": 64, "intermediate_size": 128}  # what bitsandbytes packs on a CPU has whole blocks
    base, exact = tiny(**shape), ladder(tiny(**shape))
    four_bit(base.roberta.encoder)
    model = ladder(base)
    codes = model.backbone.layers[0].output.dense.weight
    assert codes.dtype == torch.uint8
    assert 0 < relative(last_feature(model), last_feature(exact)) < ERROR["nf4"]
    before = codes.clone()
    train_a_little(model)
    assert codes.equal(before)


@pytest.mark.parametrize("kind", ["bfloat16", "int8", NF4, pytest.param("bitsandbytes", marks=NEEDS_BITSANDBYTES)])
def test_parameters_are_counted_as_the_weights_that_codes_stand_for(kind: Any, capsys: Any) -> None:
    base = tiny(hidden_size=64, intermediate_size=128)
    ladder(copy.deepcopy(base)).print_trainable_parameters()
    if kind == "bitsandbytes":
        four_bit(base.roberta.encoder)
    model = ladder(base, backbone_dtype=None if kind == "bitsandbytes" else kind)
    for _ in range(2):
        model.print_trainable_parameters()
        logits(model)  # in which weights may be packed
    exact, *found = capsys.readouterr().out.splitlines()
    assert found == [exact, exact]


@NEEDS_BITSANDBYTES
def test_a_quantised_head_is_refused() -> None:
    base: Any = four_bit(tiny())
    with pytest.raises(FastpeftError, match=r"head .* is quantised \(classifier.dense.weight.*skip_modules=\['class"):
        ladder(base)
    assert base.classifier.dense.weight.dtype == torch.uint8


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
def test_a_base_quantised_by_torchao_is_taken_as_it_is(tmp_path: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    base, exact = tiny(), ladder()
    quantize_(base.roberta.encoder, Int8WeightOnlyConfig())
    model = ladder(base)
    assert 0 < relative(last_feature(model), last_feature(exact)) < ERROR["int8"]
    train_a_little(model).save_pretrained(tmp_path)
    assert model.config.base_fingerprints.keys() == {"embedding"}
    quantize_(base.classifier, Int8WeightOnlyConfig())
    with pytest.raises(FastpeftError, match="is quantised"):
        ladder(base)


# -- compiled ----------------------------------------------------------------------------------------------------
