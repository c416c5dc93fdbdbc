"""The feature cache gives what the backbone would, for the backbone and the rows that are asked for, and no others."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import peft
import pytest
import torch
import transformers
from backbones import IDS, MASK, TINY, labels, ladder, logits, moved, tiny, trainable, vit
from causal_models import WORDS, causal_model
from torch import Tensor, nn

from fastpeft import FastpeftError, LadderModel, Prompt, PromptModel
from fastpeft.ladder.cache import _CacheRows
from fastpeft.training.memory import simulate_training_step

Runs = list[int]
ROUNDED = {"rtol": 1e-2, "atol": 2e-4}


def counted(model: LadderModel) -> Runs:
    """Rows of each run of the last layer from now on: of its attention, for hooks of a skipped layer run too."""
    runs: Runs = []
    attention = model.backbone.layers[-1].attention
    attention.register_forward_pre_hook(
        lambda _, args, kwargs: runs.append(len(args[0] if args else kwargs["hidden_states"])), with_kwargs=True
    )
    return runs


def cached(folder: Path, base: nn.Module | None = None, **arguments: Any) -> LadderModel:
    model = ladder(base).eval()
    model.cache_features(folder, **arguments)
    return model


def counts(model: LadderModel) -> tuple[int, int]:
    assert model.feature_cache is not None
    return model.feature_cache.hits, model.feature_cache.misses


def features(model: LadderModel, **inputs: Tensor) -> list[Tensor]:
    assert model.feature_cache is not None
    with torch.no_grad():
        return model.feature_cache.features({"input_ids": IDS, "attention_mask": MASK, **inputs})


# -- what it gives -----------------------------------------------------------------------------------------------


def test_a_row_that_is_there_needs_no_layer_and_has_the_bits_it_had(tmp_path: Path) -> None:
    model = cached(tmp_path)
    first = logits(model)
    runs = counted(model)
    assert logits(model).equal(first)
    assert logits(cached(tmp_path)).equal(first)
    assert runs == []


def test_batches_of_other_composition_and_padding_share_rows(tmp_path: Path) -> None:
    model = cached(tmp_path)
    expected = logits(model)
    runs = counted(model)
    wide = torch.nn.functional.pad(IDS, (0, 4)), torch.nn.functional.pad(MASK, (0, 4))
    order = [2, 0, 1, 0]
    with torch.no_grad():
        torch.testing.assert_close(model(wide[0][order], attention_mask=wide[1][order]).logits, expected[order])
        torch.testing.assert_close(model(IDS[:1, :6]).logits, expected[:1])
        assert runs == []
        model(torch.cat([IDS, IDS.flip(0) + 1, IDS + 1]))  # one new row is new twice
    assert runs == [4]  # row 0 without its mask too


@pytest.mark.parametrize("kind", ["Bert", "GPT2"])
def test_padding_before_and_inside_a_row(tmp_path: Path, kind: str) -> None:
    """Such models count positions from the first token, padding or not."""
    mask = torch.ones_like(MASK)
    mask[0, :3] = mask[1, 4] = 0
    model = ladder(tiny(kind, pad_token_id=0)).eval()
    with torch.no_grad():
        expected = model(IDS, attention_mask=mask).logits
        model.cache_features(tmp_path)
        logits(model)
        for _ in range(2):
            torch.testing.assert_close(model(IDS, attention_mask=mask).logits, expected, **ROUNDED)
    assert counts(model) == (4, 5)  # only row 2 is as it was with the mask of before


def test_all_that_decides_features_is_in_the_key(tmp_path: Path) -> None:
    model = cached(tmp_path, tiny("Bert"))
    features(model)
    features(model)
    assert counts(model) == (3, 3)
    features(model, token_type_ids=torch.ones_like(IDS))
    features(model, position_ids=torch.arange(9)[None])  # given or counted may differ, as with RoBERTa
    features(model, position_ids=torch.arange(9).flip(0)[None])
    with torch.autocast("cpu", torch.bfloat16):
        features(model)
    assert counts(model) == (3, 15)


def test_token_types_of_zeros_are_not_none(tmp_path: Path) -> None:
    """A GPT-2 adds the embedding of word 0 for each."""
    model = ladder(tiny("GPT2", pad_token_id=0)).eval()
    given = {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": torch.zeros_like(IDS)}
    with torch.no_grad():
        expected = model(**given).logits
        model.cache_features(tmp_path)
        assert not torch.allclose(logits(model), expected, atol=1e-4)
        torch.testing.assert_close(model(**given).logits, expected, **ROUNDED)


def test_autocast_of_the_backbone_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of the device of the ids, which may wait on a CPU."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
    without, within = (_CacheRows({"input_ids": IDS}, torch.device(kind)) for kind in ("cpu", "cuda"))
    assert not {*without.keys} & {*within.keys}


# -- the backbone's part -----------------------------------------------------------------------------------------


def test_changed_weights_are_not_served_old_features(tmp_path: Path) -> None:
    model = cached(tmp_path)
    before = logits(model)
    weight = model.base.roberta.encoder.layer[1].output.dense.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(-9.0)
    changed = logits(model)
    assert not changed.equal(before)
    torch.testing.assert_close(changed, logits(ladder(copy.deepcopy(model.base)).eval()), **ROUNDED)
    with torch.no_grad():
        weight.copy_(kept)
    assert logits(model).equal(before)
    assert counts(model) == (3, 6)
    model.base.half()
    features(model)
    assert counts(model) == (3, 9)


def test_an_interrupt_while_weights_are_hashed_leaves_no_old_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = cached(tmp_path)
    before = logits(model)
    with torch.no_grad():
        model.base.roberta.encoder.layer[1].output.dense.weight.mul_(-9.0)
    with monkeypatch.context() as patch:
        patch.setattr("fastpeft.ladder.cache._identity", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            logits(model)
    assert not logits(model).equal(before)
    assert counts(model) == (0, 6)


def test_what_comes_after_the_layers_has_no_part_in_it(tmp_path: Path) -> None:
    """One body under any head: training a pooler or a head, and a model for masked words, change nothing."""
    model = cached(tmp_path, tiny("Bert", num_labels=2))
    features(model)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(1.0)
    features(model)
    assert counts(model) == (3, 3)
    other = tiny("Bert", "ForMaskedLM")
    other.bert.load_state_dict(model.base.bert.state_dict(), strict=False)
    other = cached(tmp_path, other)
    features(other)
    assert counts(other) == (3, 0)


def test_a_configuration_or_a_version_may_change_what_weights_compute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features(cached(tmp_path))
    for other in (cached(tmp_path, tiny(hidden_act="relu")), cached(tmp_path, tiny(layer_norm_eps=1e-3))):
        features(other)
        assert counts(other) == (0, 3)
    monkeypatch.setattr(transformers, "__version__", "0")
    assert cached(tmp_path).feature_cache is not None
    assert len(list(tmp_path.glob("*/index"))) == 4


def test_adapters_in_the_backbone(tmp_path: Path) -> None:
    def adapted(**changes: Any) -> Any:
        torch.manual_seed(5)
        config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False, **changes)
        return peft.get_peft_model(tiny(), config).eval()

    model = ladder(adapted()).eval()
    expected = logits(model)
    model.cache_features(tmp_path)
    kept = logits(model)
    torch.testing.assert_close(kept, expected, **ROUNDED)
    with model.base.disable_adapter():
        assert not logits(model).equal(kept)
    assert counts(model) == (0, 6)
    logits(model)
    assert counts(model) == (3, 6)
    stronger = cached(tmp_path, adapted(lora_alpha=80))  # of the same weights
    logits(stronger)
    assert counts(stronger) == (0, 3)
    stronger.base.merge_adapter()  # which PEFT writes by way of `data`
    logits(stronger)
    assert counts(stronger) == (0, 6)
    prefixed = peft.get_peft_model(tiny(), peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    with pytest.raises(FastpeftError, match="trained tokens or prefixes"):
        ladder(prefixed).cache_features(tmp_path)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe"])
def test_routers_of_a_mixture_have_no_part_in_the_loss(tmp_path: Path, kind: str) -> None:
    given = {"input_ids": WORDS, "labels": WORDS}
    model, plain = (moved(causal_model(kind, output_router_logits=asked)).eval() for asked in (True, False))
    expected = plain(**given).loss
    assert model(**given).loss.equal(expected)
    model.cache_features(tmp_path)
    for _ in range(2):  # in the second pass no router runs
        torch.testing.assert_close(model(**given).loss, expected, **ROUNDED)


def test_an_adapter_in_a_mixture_trains_by_the_loss_of_its_routers() -> None:
    base = causal_model("mixtral", output_router_logits=True)
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"]))
    outputs = ladder(adapted, train_adapters=True)(input_ids=WORDS, labels=WORDS)
    assert outputs.aux_loss.requires_grad


# -- models around and copies of it ------------------------------------------------------------------------------


def test_training_is_the_same_whatever_was_there_and_close_to_that_without(tmp_path: Path) -> None:
    """Dropout in the side network and the head included."""

    def trained(folder: Path | None) -> list[Tensor]:
        model = ladder(feature_dropout=0.2).train()
        model.cache_features(folder)
        optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
        torch.manual_seed(7)
        for _ in range(3):
            optimizer.zero_grad()
            model(IDS, attention_mask=MASK, **labels("ForSequenceClassification")).loss.backward()
            optimizer.step()
        return [p.detach() for p in trainable(model).values()]

    cold, warm, without = trained(tmp_path), trained(tmp_path), trained(None)
    assert all(first.equal(second) for first, second in zip(cold, warm))
    for first, second in zip(cold, without):
        torch.testing.assert_close(first, second, **ROUNDED)


def test_inside_a_prompt(tmp_path: Path, checkpoint: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    masked_lm = ladder(transformers.AutoModelForMaskedLM.from_pretrained(checkpoint)).eval()
    prompt = Prompt("{text} is <mask>", {0: "awful", 1: "lovely"})
    model = PromptModel(masked_lm, tokenizer, prompt).eval()
    texts = ["the film", "a very brilliant story", "end"]
    expected = model.predict_logits(texts)
    masked_lm.cache_features(tmp_path / "features")
    for _ in range(2):
        torch.testing.assert_close(model.predict_logits(texts), expected, **ROUNDED)
    assert counts(masked_lm) == (3, 3)


def test_passes_without_tokens_do_without(tmp_path: Path) -> None:
    model = cached(tmp_path)
    embeddings = model.base.roberta.embeddings.word_embeddings(IDS)
    with torch.no_grad():
        model(inputs_embeds=embeddings, attention_mask=MASK)
    simulate_training_step(model, {"input_ids": IDS, "attention_mask": MASK, **labels("ForSequenceClassification")})
    assert counts(model) == (0, 0)
    model.cache_features(None)
    logits(model)
    assert model.feature_cache is None


def test_passes_with_images_do_without(tmp_path: Path) -> None:
    shape = {name: size for name, size in TINY.items() if name != "num_labels"}
    images = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**shape),
        vision_config=transformers.CLIPVisionConfig(**images, image_size=8, patch_size=4),
        image_token_index=49,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = moved(transformers.LlavaForConditionalGeneration(config).eval()).eval()
    ids = torch.cat([torch.full((3, 4), 49), IDS], dim=1)
    batches = [{"input_ids": ids, "pixel_values": torch.randn(3, 3, 8, 8)} for _ in range(2)]
    with torch.no_grad():
        expected = [model(**batch).logits for batch in batches]
        model.cache_features(tmp_path)
        for batch, logits_of_batch in zip(batches, expected):
            assert model(**batch).logits.equal(logits_of_batch)
    assert not expected[0].allclose(expected[1])
    assert counts(model) == (0, 0)
    boxes = cached(tmp_path, tiny("LayoutLM"))
    boxes(IDS, bbox=torch.ones(3, 9, 4, dtype=torch.long))
    assert counts(boxes) == (0, 0)


def test_a_head_that_makes_inputs_for_the_layers_is_refused(tmp_path: Path) -> None:
    """BigBird's takes the tokens of the question for a segment."""
    base = tiny("BigBird", "ForQuestionAnswering", attention_type="original_full", sep_token_id=5)
    model = cached(tmp_path, base)
    with pytest.raises(FastpeftError, match=r"head of the BigBirdFor.* makes token_type_ids for its layers.*the batch"):
        model(IDS, attention_mask=MASK)
    given = {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": torch.arange(9).gt(4).long().repeat(3, 1)}
    expected = ladder(base)(**given).start_logits
    torch.testing.assert_close(model(**given).start_logits[MASK.bool()], expected[MASK.bool()], rtol=1e-2, atol=5e-4)


def test_a_copy_has_its_own_files(tmp_path: Path) -> None:
    model = cached(tmp_path)
    expected = logits(model)
    copied = copy.deepcopy(model)
    assert copied.feature_cache._backbone is copied.backbone
    assert logits(copied).equal(expected)
    assert counts(copied) == (3, 0)


# -- limits and faults -------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_computed_each_time_and_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = logits(cached(tmp_path / "all"))
    limit = 2 * 9 * 4 * 16 * 2  # two rows of 9 tokens and not the lines of their index
    model = cached(tmp_path / "some", max_bytes=limit)
    with caplog.at_level(logging.WARNING, "fastpeft"):
        assert logits(model).equal(expected)
        assert "do not fit" not in caplog.text
        for _ in range(2):
            assert logits(model).equal(expected)
    assert counts(model) == (4, 5)  # row 0, of 6 tokens, and one of 9
    assert caplog.text.count("do not fit") == 1
    assert sum(file.stat().st_size for file in (tmp_path / "some").glob("*/*")) <= limit


def test_damaged_features_are_computed_anew(tmp_path: Path) -> None:
    expected = logits(cached(tmp_path))
    (file,) = tmp_path.glob("*/records")
    content = bytearray(file.read_bytes())
    content[-1] ^= 0x40
    file.write_bytes(content)
    model = cached(tmp_path)
    assert logits(model).equal(expected)
    assert counts(model) == (2, 1)


def test_a_folder_that_can_no_longer_be_written_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = logits(cached(tmp_path / "sound"))
    model = cached(tmp_path / "full")

    def no_space(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastpeft.support.record_store._write", no_space)
    with caplog.at_level(logging.WARNING, "fastpeft"):
        for _ in range(2):
            assert logits(model).equal(expected)
    assert caplog.text.count("No space left on device") == 1
    assert counts(model) == (0, 6)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_an_encoder_whose_decoder_reads_what_the_head_makes(tmp_path: Path, stack: str) -> None:
    """As T5's for classes: without its head, it runs no decoder."""
    shape = {"num_layers": 3, "num_decoder_layers": 3, "d_model": 16, "d_kv": 8, "decoder_start_token_id": 0}
    base = tiny("T5", eos_token_id=2, **shape)
    model = ladder(base, feature_modules=f"transformer.{stack}.block").eval()
    ids = torch.cat([IDS, torch.full((3, 1), 2)], dim=1)
    expected = model(ids).logits
    model.cache_features(tmp_path)
    if stack == "decoder":
        with pytest.raises(FastpeftError, match=r"head of the T5\w+ makes the tokens .* Name the encoder's layers"):
            model(ids)
        return
    for _ in range(2):
        torch.testing.assert_close(model(ids).logits, expected, **ROUNDED)
    assert (model.feature_cache.hits, model.feature_cache.misses) == (3, 3)


def test_rows_without_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FastpeftError, match="reads pixel_values"):
        ladder(vit()).cache_features(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_bytes": 0}, "max_bytes is 0"),
        ({"folder": "file/inside"}, "cannot keep features in"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    (tmp_path / "file").write_text("")
    given = {"folder": "new", **arguments}
    with pytest.raises(FastpeftError, match=message):
        ladder().cache_features(**{**given, "folder": tmp_path / given["folder"]})
    assert not (tmp_path / "new").exists()
