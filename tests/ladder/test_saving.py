"""What a `LadderModel` saves, how it loads, and what is refused."""

from __future__ import annotations

import copy
import gc
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from backbones import (
    classifier,
    ladder,
    logits,
    quantise_a_layer,
    tiny,
    train_a_little,
    trainable,
)
from safetensors.torch import load_file

from fastpeft import FastpeftError, LadderConfig, LadderModel, SivaConfig
from fastpeft.ladder.fingerprints import fingerprints
from fastpeft.training.memory import MemoryTracker


@pytest.mark.parametrize("config", [{}, {"window_size": 1, "fusion": "gated"}, {"residual": True}])
def test_save_and_load_to_the_bit(tmp_path: Path, half_checkpoint: Path, config: dict[str, Any]) -> None:
    model = ladder(classifier(half_checkpoint), **config)
    train_a_little(model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == trainable(model).keys()
    card = tmp_path / "README.md"
    assert card.read_text(encoding="utf-8").count("LadderModel.from_pretrained") == 1
    ladder(classifier(half_checkpoint), window_size=1).save_pretrained(tmp_path)
    assert "1-LST" in card.read_text(encoding="utf-8"), "of what is there now"
    model.save_pretrained(tmp_path)

    loaded = LadderModel.from_pretrained(tmp_path)
    assert not loaded.training
    assert loaded.config.id2label == {0: "bad", 1: "so-so", 2: "good"}
    assert logits(loaded).equal(logits(model))
    assert logits(LadderModel.from_pretrained(tmp_path, base=classifier(half_checkpoint))).equal(logits(model))
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert json.loads((again / "config.json").read_text()) == json.loads((tmp_path / "config.json").read_text())


def test_the_same_backbone_in_another_dtype_passes(tmp_path: Path, half_checkpoint: Path) -> None:
    ladder(classifier(half_checkpoint)).save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        loaded = LadderModel.from_pretrained(tmp_path, dtype=dtype)
        assert loaded.base.roberta.dtype == dtype
        assert loaded.side.up.weight.dtype == torch.float32
    by_old_name = LadderModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert by_old_name.base.dtype == torch.bfloat16


def test_parts_of_the_weights_are_read_and_another_name_is_refused(tmp_path: Path, half_checkpoint: Path) -> None:
    model = ladder(classifier(half_checkpoint)).eval()
    model.save_pretrained(tmp_path / "parts", max_shard_size="5KB")
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    assert logits(LadderModel.from_pretrained(tmp_path / "parts")).equal(logits(model))
    with pytest.raises(FastpeftError, match=r"variant='fp16' would give .* Leave it out"):
        model.save_pretrained(tmp_path / "variant", variant="fp16")
    assert not (tmp_path / "variant").exists()


def test_a_second_side_network_of_a_base_is_told_of(
    tmp_path: Path, half_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its head becomes that of the first, which answers by it then."""
    base = classifier(half_checkpoint)
    for name in ("one", "other"):
        train_a_little(ladder(copy.deepcopy(base))).save_pretrained(tmp_path / name)
    one = LadderModel.from_pretrained(tmp_path / "one", base=base)
    LadderModel.from_pretrained(tmp_path / "other", base=pickle.loads(pickle.dumps(base)))
    assert "the head is one" not in caplog.text  # of copies each has its own
    LadderModel.from_pretrained(tmp_path / "other", base=base)
    assert "the head is one" in caplog.text
    caplog.clear()
    del one
    gc.collect()
    LadderModel.from_pretrained(tmp_path / "other", base=base)
    assert "the head is one" not in caplog.text


def test_words_that_no_file_would_hold_are_refused() -> None:
    with pytest.raises(FastpeftError, match="Resize and save the base first"):
        ladder().resize_token_embeddings(60)


def test_names_of_classes_that_the_base_lacks_are_kept(tmp_path: Path, half_checkpoint: Path) -> None:
    names, none = {0: "a", 1: "b", 2: "c"}, {index: f"LABEL_{index}" for index in range(3)}
    model = ladder(classifier(half_checkpoint, id2label=none))
    assert model.config.id2label == none
    model.config.id2label = names
    model.save_pretrained(tmp_path)
    assert LadderModel.from_pretrained(tmp_path).config.id2label == names
    nameless = classifier(half_checkpoint, id2label=none)
    assert LadderModel.from_pretrained(tmp_path, base=nameless).config.id2label == names
    assert ladder(classifier(half_checkpoint, id2label=none), id2label=names).config.id2label == names
    named = classifier(half_checkpoint)
    assert ladder(named, id2label=names).config.id2label == named.config.id2label


def test_auto_classes_and_pipelines(tmp_path: Path, half_checkpoint: Path) -> None:
    model = train_a_little(ladder(classifier(half_checkpoint)))
    model.save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(half_checkpoint)
    tokenizer.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert isinstance(loaded, LadderModel)
    text = "a lovely film"
    with torch.no_grad():
        expected = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0].tolist()
    for source in (model, str(tmp_path)):
        pipeline = transformers.pipeline("text-classification", model=source, tokenizer=tokenizer, device="cpu")
        found = {answer["label"]: answer["score"] for answer in pipeline(text, top_k=None)}
        assert found == pytest.approx(dict(zip(("bad", "so-so", "good"), expected)), abs=1e-6)


def test_the_fingerprint_of_a_large_embedding_copies_nothing() -> None:
    base = tiny(vocab_size=20_000)
    embedding = base.get_input_embeddings().weight
    with MemoryTracker() as tracker:
        assert "embedding" in fingerprints(ladder(base).backbone)
    assert tracker.peak < 1.5 * embedding.nbytes, "the embedding itself counts"


def test_another_layer_of_words_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is frozen, so no file of a side network holds it."""
    model = ladder(tiny("Llama", "ForCausalLM", tie_word_embeddings=False))
    model.save_pretrained(tmp_path)
    same, other = copy.deepcopy(model.base), copy.deepcopy(model.base)
    assert logits(LadderModel.from_pretrained(tmp_path, base=same)).equal(logits(model.eval()))
    torch.nn.init.normal_(other.lm_head.weight)
    with pytest.raises(FastpeftError, match="trained on another backbone: weights of the layer of words differ"):
        LadderModel.from_pretrained(tmp_path, base=other)
    tags = tiny("Llama", "ForTokenClassification")
    tags.model.load_state_dict(model.base.model.state_dict())
    ladder(tags).take_over(tmp_path, head=False)
    assert "cannot be compared" not in caplog.text


def test_another_backbone_is_refused(tmp_path: Path, half_checkpoint: Path) -> None:
    ladder(classifier(half_checkpoint)).save_pretrained(tmp_path)
    for change in (
        "roberta.embeddings.word_embeddings.weight",
        "roberta.encoder.layer.0.attention.self.query.bias",
        "roberta.encoder.layer.1.output.dense.weight",
    ):
        base = classifier(half_checkpoint)
        base.get_parameter(change).data[3] += 1e-3
        with pytest.raises(FastpeftError, match="trained on another backbone: weights of the"):
            LadderModel.from_pretrained(tmp_path, base=base)
    with pytest.raises(FastpeftError, match="trained on another backbone"):
        LadderModel.from_pretrained(tmp_path, base=tiny())


@pytest.mark.parametrize("change", ["attention.self.value.weight", "output.dense.bias"])
def test_layers_between_are_recognised_by_some_entries(tmp_path: Path, change: str) -> None:
    base = tiny("Bert", num_hidden_layers=5)
    ladder(base).save_pretrained(tmp_path)
    assert LadderModel.from_pretrained(tmp_path, base=base).side.up.weight.isfinite().all()
    base.get_parameter(f"bert.encoder.layer.2.{change}").data += 1e-3
    with pytest.raises(FastpeftError, match="trained on another backbone: weights of the layers between differ"):
        LadderModel.from_pretrained(tmp_path, base=base)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("window", "window_size"),
        ("reduction", "reduction_factor"),
        ("normalize_features", "normalise_features"),
        ("layer_dropout", "layer_drop"),
    ],
)
def test_names_that_are_nearly_those_of_fields_are_refused(name: str, field: str) -> None:
    with pytest.raises(FastpeftError, match=rf"no field '{name}'\. Did you mean {field}\? Fields are window_size, "):
        LadderConfig(**{name: 0.5})
    with pytest.raises(FastpeftError, match=r"no field 'dropout'\. Fields are .*feature_dropout"):
        LadderConfig(dropout=0.5)


def test_fields_of_transformers_and_of_other_versions_are_kept(tmp_path: Path) -> None:
    """Of a saved file; `pack_backbone` is an earlier name of `pack_weights`."""
    given = {
        "window_size": 5,
        "id2label": {0: "bad", 1: "good"},
        "dtype": "float32",
        "architectures": ["LadderModel"],
        "transformers_version": "5.0.0",
        "hidden_size": 32,
        "vocab_size": 50,
        "max_position_embeddings": 66,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "pack_backbone": True,
        "num_beams": 2,
        "pruned_heads": {},
    }
    config = LadderConfig(**given, output_hidden_states=True, attn_implementation="eager", name_or_path="side")
    assert LadderConfig(num_labels=3, torch_dtype="float32").num_labels == 3
    config.save_pretrained(tmp_path)
    loaded = LadderConfig.from_pretrained(tmp_path, window_size=3)
    assert loaded.window_size == 3
    assert (loaded.hidden_size, loaded.pack_backbone, loaded.id2label) == (32, True, {0: "bad", 1: "good"})
    assert LadderConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert LadderConfig(**config.to_diff_dict()).to_diff_dict() == config.to_diff_dict()


def test_a_quantised_backbone_is_taken_with_a_warning(
    tmp_path: Path, half_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ladder(classifier(half_checkpoint)).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "fastpeft"):
        LadderModel.from_pretrained(tmp_path, base=quantise_a_layer(classifier(half_checkpoint)))
    assert "sharded weights cannot be compared" in caplog.text


def test_files_that_do_not_fit_are_refused(tmp_path: Path, half_checkpoint: Path) -> None:
    with pytest.raises(FastpeftError, match="cannot load a side network from"):
        LadderModel.from_pretrained(tmp_path / "missing")
    with pytest.raises(FastpeftError, match="holds 'roberta', not a side network"):
        LadderModel.from_pretrained(half_checkpoint)
    ladder(classifier(half_checkpoint)).save_pretrained(tmp_path)
    with pytest.raises(FastpeftError, match=r"shape \(3,.*\) and here \(2,.*\).* as many classes"):
        LadderModel.from_pretrained(tmp_path, base=classifier(half_checkpoint, id2label={0: "bad", 1: "good"}))
    masked = transformers.AutoModelForMaskedLM.from_pretrained(half_checkpoint, dtype=torch.float32)
    with pytest.raises(FastpeftError, match=r"missing base\.lm_head\.dense.*unknown base\.classifier"):
        LadderModel.from_pretrained(tmp_path, base=masked)
    config = LadderConfig.from_pretrained(tmp_path, share_projections=True)
    with pytest.raises(FastpeftError, match=r"missing side\.shared_projection"):
        LadderModel.from_pretrained(tmp_path, config=config)
    with pytest.raises(FastpeftError, match="got a base and dtype"):
        LadderModel.from_pretrained(tmp_path, base=classifier(half_checkpoint), dtype=torch.float32)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(FastpeftError, match="cannot read the side network in"):
        LadderModel.from_pretrained(tmp_path)


def test_a_backbone_that_cannot_be_found_is_asked_for(tmp_path: Path, half_checkpoint: Path) -> None:
    ladder(classifier(half_checkpoint)).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    for change, message in (
        ({"base_model_name_or_path": str(tmp_path / "gone")}, "cannot load the backbone '.*gone'"),
        ({"base_model_name_or_path": None}, r"a base without a name .*base=model"),
        ({"base_class": "HomeMadeModel"}, "of class HomeMadeModel, which cannot be loaded"),
    ):
        file.write_text(json.dumps(values | change))
        with pytest.raises(FastpeftError, match=message):
            LadderModel.from_pretrained(tmp_path)


@pytest.mark.skipif(not hasattr(transformers, "GteConfig"), reason="this transformers has no such model")
@pytest.mark.parametrize("adapted", [False, True], ids=["head", "adapter"])
def test_weights_that_transformers_renames_keep_their_names(tmp_path: Path, adapted: bool) -> None:
    base = tiny("Gte", "ForMaskedLM")
    if adapted:
        base = peft.get_peft_model(base, SivaConfig(r=2, target_modules=["q_proj", "k_proj"]))
    model = ladder(base, train_adapters=adapted)
    trained = trainable(model)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.1)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == trained.keys()
    assert logits(LadderModel.from_pretrained(tmp_path, base=tiny("Gte", "ForMaskedLM"))).equal(logits(model.eval()))
