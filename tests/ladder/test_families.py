"""Every family of backbones by one path: a table of models, and what must hold beside each."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import IDS, MASK, labels, ladder, moved, tiny, train_a_little, trainable
from pools import BATCH, assert_answers_are_the_models, pool_of
from safetensors.torch import load_file
from torch import Tensor

from fastpeft import LadderModel
from fastpeft.ladder.backbone import Backbone
from fastpeft.ladder.passes import features_of, listen, skip_layers
from fastpeft.ladder.probe import probe


@dataclass(frozen=True)
class Family:
    """A class of models, and which modules of its head train."""

    kind: str
    head: str
    trains: tuple[str, ...] = ()
    changes: dict[str, Any] = field(default_factory=dict)

    def base(self) -> Any:
        asked = {"num_labels": 2} if self.head == "ForQuestionAnswering" else {}
        base = tiny(self.kind, self.head, **asked, **self.changes)
        base.config.pad_token_id = 0
        return base

    @property
    def headless(self) -> bool:
        return self.head in ("Model", "EncoderModel")


TRANSFORM = ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm")
FAMILIES = (
    Family("Roberta", "ForSequenceClassification", ("classifier.dense", "classifier.out_proj")),
    Family("Roberta", "ForMaskedLM", ("lm_head.dense", "lm_head.layer_norm")),
    Family("Roberta", "Model"),
    Family("Bert", "ForSequenceClassification", ("bert.pooler.dense", "classifier")),
    Family("Bert", "ForMaskedLM", TRANSFORM),
    Family("Bert", "Model"),
    Family("XLMRoberta", "ForTokenClassification", ("classifier",)),
    Family("Electra", "ForQuestionAnswering", ("qa_outputs",)),
    Family("Electra", "ForMaskedLM", ("generator_predictions.LayerNorm", "generator_predictions.dense")),
    Family("DebertaV2", "ForSequenceClassification", ("pooler.dense", "classifier")),
    Family("DebertaV2", "ForMaskedLM", TRANSFORM),
    Family("MobileBert", "ForMaskedLM", TRANSFORM),
    Family("DistilBert", "ForSequenceClassification", ("pre_classifier", "classifier")),
    Family("DistilBert", "ForMaskedLM", ("vocab_transform", "vocab_layer_norm")),
    Family("ModernBert", "ForSequenceClassification", ("head.dense", "head.norm", "classifier")),
    Family("ModernBert", "ForMaskedLM", ("head.dense", "head.norm")),
    Family("GPT2", "ForSequenceClassification", ("score",)),
    Family("GPT2", "LMHeadModel"),
    Family("T5", "EncoderModel", changes={"num_layers": 3, "d_model": 16, "d_kv": 8}),
)
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda each: f"{each.kind}{each.head}")
some_families = pytest.mark.parametrize("family", FAMILIES[::3], ids=lambda each: f"{each.kind}{each.head}")


@torch.no_grad()
def answers(model: Any) -> dict[str, Tensor]:
    output = model.eval()(**BATCH)
    return {name: value for name, value in output.items() if isinstance(value, Tensor)}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    """At padding answers mean nothing."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        seen = MASK.bool() if value.shape[:2] == MASK.shape else slice(None)
        torch.testing.assert_close(found[name][seen], value[seen], **tolerance)


@every_family
def test_the_head_and_the_side_network_train_and_nothing_else_changes(family: Family) -> None:
    model = ladder(family.base()).train()
    before = copy.deepcopy(model.base.state_dict())
    output = model(**BATCH, **({} if family.headless else labels(family.head)))
    (output.last_hidden_state.square().sum() if family.headless else output.loss).backward()
    trained = trainable(model)
    of_head = [name.removeprefix("base.") for name in trained if not name.startswith("side.")]
    assert tuple(dict.fromkeys(name.rpartition(".")[0] for name in of_head)) == family.trains
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained.keys()
    assert all(tensor.equal(before[name]) for name, tensor in model.base.state_dict().items())
    assert model.config.causal is (family.kind == "GPT2")
    assert probe(model.backbone).predicts is (family.head == "LMHeadModel")


@every_family
def test_features_are_the_hidden_states(family: Family) -> None:
    backbone = Backbone(family.base())
    with torch.no_grad():
        body = backbone.encoder or backbone.body
        expected = body(**backbone.inputs(BATCH), output_hidden_states=True).hidden_states
        found = features_of(backbone, {**BATCH, "position_ids": None, "token_type_ids": None})
    assert len(found) == len(expected)
    assert all(one.equal(other) for one, other in zip(found[:-1], expected))  # a last norm may follow the last layer


@every_family
def test_a_pass_without_layers_computes_the_rest_of_the_model(family: Family) -> None:
    model, last = family.base(), []
    backbone = Backbone(model)
    with torch.no_grad(), listen(backbone, lambda *_: None, lambda feature: last.append(feature) or feature):
        expected = model(**BATCH)[0]
    for _ in range(2):  # in the first pass the first layer runs, to learn what layers return
        with torch.no_grad(), skip_layers(backbone, last[0], BATCH):
            assert model(**BATCH)[0].equal(expected)


@every_family
def test_cached_features_are_those_of_the_backbone_rounded(tmp_path: Path, family: Family) -> None:
    model = ladder(family.base()).eval()
    expected, real = answers(model), MASK.bool()
    with torch.no_grad():
        exact = features_of(model.backbone, model.backbone.inputs(BATCH))
        cache = model.cache_features(tmp_path)
        kept = cache.features(BATCH)
    for first, second in zip(exact, kept, strict=True):
        assert ((first - second)[real].abs() <= 2**-8 * first[real].abs()).all()
        assert not first.equal(second)
    assert_close(answers(model), expected, rtol=1e-2, atol=5e-3)
    assert (cache.hits, cache.misses) == (3, 3)


@every_family
def test_a_pool_gives_each_row_its_models_answer(family: Family) -> None:
    pool = pool_of(family.base(), {}, {}, {"window_size": 5})
    assert_answers_are_the_models(pool, BATCH, ["1", "2", "0"])


@every_family
def test_save_and_load_to_the_bit(tmp_path: Path, family: Family) -> None:
    model = moved(family.base())
    for parameter in trainable(model).values():
        parameter.data += 0.1
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == trainable(model).keys()
    loaded = answers(LadderModel.from_pretrained(tmp_path, base=family.base()))
    assert all(value.equal(loaded[name]) for name, value in answers(model).items())


@some_families
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(family: Family, dtype: torch.dtype) -> None:
    model = ladder(family.base().to(dtype)).train()
    output = model(**BATCH, **({} if family.headless else labels(family.head)))
    (output.last_hidden_state.square().sum() if family.headless else output.loss).backward()
    for parameter in model.parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else dtype)
    exact = next(iter(answers(ladder(family.base())).values()))
    assert (next(iter(answers(model).values())).float() - exact).abs().max() < 0.05 * exact.abs().max()
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("kind", ["Roberta", "DistilBert", "ModernBert", "Electra", "DebertaV2", "GPT2"])
def test_a_model_is_given_what_it_knows_and_keeps_no_keys_and_values(kind: str) -> None:
    backbone = Backbone(tiny(kind))
    given = {"input_ids": IDS, "token_type_ids": torch.zeros_like(IDS), "position_ids": None, "labels": MASK}
    arguments, inputs = backbone.arguments(given), backbone.inputs(given)
    assert arguments.keys() - {"use_cache", "token_type_ids"} == {"input_ids", "labels"}
    assert inputs.keys() - {"use_cache", "token_type_ids"} == {"input_ids"}
    assert ("token_type_ids" in inputs) == (kind not in ("DistilBert", "ModernBert"))
    assert inputs.get("use_cache", False) is arguments.get("use_cache", False) is False
    if kind == "GPT2":
        assert "use_cache" in arguments
        assert "use_cache" in inputs


def test_training_repeats_to_the_bit() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(4)
        states.append(train_a_little(ladder(feature_dropout=0.2)).state_dict())
    assert all(tensor.equal(states[1][name]) for name, tensor in states[0].items())
