"""Which layers of a model SiVA adapts, and which parts of its head train, on tiny models of many architectures."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from backbones import dinov3
from safetensors.torch import load_file, save_file
from siva_adapters import CLOSE, SHAPE, answers, move, tiny, token_ids, trained
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastpeft import FastpeftError, SivaConfig, SivaLinear
from fastpeft.siva.targets import reading_hidden_states


def layer_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, SivaLinear)}


# -- which layers ------------------------------------------------------------------------------------------------


SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}


@pytest.mark.parametrize(
    ("kind", "head", "wide"),
    [
        ("Roberta", "ForSequenceClassification", r"\d\.output\.dense"),
        ("Bert", "ForTokenClassification", r"\d\.output\.dense"),
        ("XLMRoberta", "ForMaskedLM", r"\d\.output\.dense"),
        ("Electra", "ForSequenceClassification", r"\d\.output\.dense|embeddings_project"),  # of 128 values
        ("DebertaV2", "ForSequenceClassification", r"\d\.output\.dense"),
        ("Llama", "ForCausalLM", "down_proj"),
        ("Qwen3", "ForCausalLM", "down_proj"),  # whose heads are together wider than a hidden state
        ("ModernBert", "ForSequenceClassification", r"mlp\.Wo"),  # query, key and value are one layer, as in GPT-2
        ("GPT2", "LMHeadModel", r"mlp\.c_proj"),
    ],
)
def test_all_linear_layers_that_read_a_hidden_state_by_default(kind: str, head: str, wide: str) -> None:
    base = tiny(kind, head, **SPECIAL, **({"head_dim": 10, "num_key_value_heads": 2} if kind == "Qwen3" else {}))
    linear = {name for name, module in base.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    body = {name for name in linear if name.startswith(f"{base.base_model_prefix}.")}
    expected = answers(base)
    model = peft.get_peft_model(base, SivaConfig(r=2))
    assert layer_names(base) == {name for name in body if not re.search(rf"({wide})$", name)} < body < linear
    torch.testing.assert_close(answers(model), expected, **CLOSE)


def test_a_hidden_state_of_a_model_in_parts_is_that_of_its_text() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(16, 4))
    model.config = transformers.LlavaConfig(
        text_config={"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2}
    )
    assert reading_hidden_states(model, ("0", "1")) == {"0"}


def test_the_pooler_of_a_model_without_a_head_is_left_alone() -> None:
    base = tiny("Bert", "Model", **SPECIAL)
    peft.get_peft_model(base, SivaConfig(r=2))
    assert base.pooler is not None
    assert layer_names(base)
    assert all(name.startswith("encoder.") for name in layer_names(base))


def test_all_linear_layers_by_default_where_no_hidden_state_is_known() -> None:
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), SivaConfig(r=2))
    assert layer_names(model.base_model.model) == {"0", "2"}


def test_all_linear_leaves_the_head_alone() -> None:
    found = layer_names(peft.get_peft_model(tiny(), SivaConfig(r=2, target_modules="all-linear")))
    assert len(found) == 12
    assert all(".roberta.encoder.layer." in name for name in found)


T5_SIZES = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
FUNNEL_SIZES = {"vocab_size": 50, "block_sizes": [1], "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32}
WHISPER_SIZES = {
    **{"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32},
    **{"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32},
    **{"vocab_size": 50, "pad_token_id": 0, "num_mel_bins": 8, "max_source_positions": 16, "classifier_proj_size": 8},
}


@pytest.mark.parametrize(
    ("kind", "head", "sizes", "parts"),
    [
        ("Whisper", "ForAudioClassification", WHISPER_SIZES, {"encoder"}),  # without projector and classifier
        ("MT5", "ForQuestionAnswering", T5_SIZES, {"encoder", "decoder"}),  # PEFT wraps qa_outputs
        ("T5", "ForQuestionAnswering", T5_SIZES, {"encoder", "decoder"}),
        ("T5", "Model", T5_SIZES, {"encoder", "decoder"}),
        ("Funnel", "Model", FUNNEL_SIZES, {"encoder", "decoder"}),  # transformers has two backbones of it
    ],
)
def test_a_head_is_known_beside_a_backbone_in_parts(
    kind: str, head: str, sizes: dict[str, Any], parts: set[str]
) -> None:
    base = getattr(transformers, f"{kind}{head}")(getattr(transformers, f"{kind}Config")(**sizes))
    linear = {name.partition(".")[0] for name, each in base.named_modules() if isinstance(each, nn.Linear)}
    task = "QUESTION_ANS" if head == "ForQuestionAnswering" else None
    model = peft.get_peft_model(base, SivaConfig(r=2, target_modules="all-linear", task_type=task))
    found = {name.removeprefix("base_model.model.").partition(".")[0] for name in layer_names(model)}
    assert found == parts
    assert (linear == parts) is (head == "Model")


EXPERTS = SHAPE | {"num_key_value_heads": 2, "num_local_experts": 4, "num_hidden_layers": 2}
WAV2VEC2_SIZES = {
    **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
    **{"conv_dim": [16, 16], "conv_kernel": [4, 4], "conv_stride": [2, 2], "num_feat_extract_layers": 2},
    **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "vocab_size": 20},
}
VIT_SIZES = {
    **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
    **{"image_size": 8, "patch_size": 4},
}


@pytest.mark.parametrize(
    ("kind", "head", "sizes", "message"),
    [
        (
            "Mixtral",
            "ForCausalLM",
            EXPERTS,  # of each of 2 layers 4 experts, each with 3 matrices of 16 by 32
            r"12,288 weights .* frozen: model\.layers\.\*\.mlp\.experts\.gate_up_proj, "
            r"model\.layers\.\*\.mlp\.experts\.down_proj\. LoRA",
        ),
        ("Wav2Vec2", "Model", WAV2VEC2_SIZES, ""),  # convolutions, and one with weight_norm
        ("ViT", "Model", VIT_SIZES, ""),  # embeddings of positions
        ("Roberta", "ForSequenceClassification", SHAPE, ""),
    ],
    ids=["Mixtral", "Wav2Vec2", "ViT", "Roberta"],
)
def test_all_linear_tells_of_matrices_that_it_leaves_out(
    caplog: pytest.LogCaptureFixture, kind: str, head: str, sizes: dict[str, Any], message: str
) -> None:
    base = getattr(transformers, f"{kind}{head}")(getattr(transformers, f"{kind}Config")(**sizes))
    peft.get_peft_model(base, SivaConfig(r=2, target_modules="all-linear"))
    found = [record.getMessage() for record in caplog.records if "stacked" in record.getMessage()]
    assert len(found) == bool(message)
    assert re.search(message, "".join(found))


def test_all_linear_tells_of_torchs_attention(caplog: pytest.LogCaptureFixture) -> None:
    """torchvision's and open_clip's vision transformers have it: query, key and value are no linear layers there."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    peft.get_peft_model(encoder, SivaConfig(r=2, target_modules="all-linear"))
    found = [record.getMessage() for record in caplog.records if "MultiheadAttention" in record.getMessage()]
    assert len(found) == 1
    assert re.search(r"1,536 weights of .* frozen: layers\.\*\.self_attn\.in_proj_weight\. LoRA", found[0])


@pytest.mark.parametrize("targets", ["all-linear", ["weight"], None])
def test_a_layer_by_itself_is_refused(targets: Any) -> None:
    with pytest.raises(FastpeftError, match=r"itself a Linear, .* Give nn\.Sequential\(layer\)"):
        peft.get_peft_model(nn.Linear(8, 8), SivaConfig(target_modules=targets))


SHARED_EXPERTS = EXPERTS | {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "up_proj", "down_proj"], r"6,144 weights .*: .*experts\.gate_up_proj, .*experts\.down_proj\. LoRA"),
        (r".*\.(down_proj|q_proj)", r"2,048 weights .*: model\.layers\.\*\.mlp\.experts\.down_proj\. LoRA"),
        (["q_proj", "v_proj"], ""),
    ],
    ids=["names", "pattern", "attention"],
)
def test_experts_beside_layers_of_their_names_are_told(
    caplog: pytest.LogCaptureFixture, targets: Any, message: str
) -> None:
    """Beside those of the routed experts, GLM-4 has layers of these names in shared experts and in dense blocks."""
    base = transformers.Glm4MoeForCausalLM(transformers.Glm4MoeConfig(**SHARED_EXPERTS))
    peft.get_peft_model(base, SivaConfig(r=2, target_modules=targets))
    found = [record.getMessage() for record in caplog.records if "stacked" in record.getMessage()]
    assert len(found) == bool(message)
    assert re.search(message, "".join(found))


def test_a_long_start_is_told_unless_it_is_short(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def told(device: str = "cpu", **given: Any) -> str:
        caplog.clear()
        config = SivaConfig(r=2, target_modules=["q_proj", "k_proj"], **given)
        peft.get_peft_model(tiny("Llama", "ForCausalLM").to(device), config)
        return caplog.text

    assert not told()
    monkeypatch.setattr("fastpeft.siva.targets._LONG", 4 * 16**2 * (16 + 16) - 1)  # four layers, all of this shape
    assert "decomposing 4 weights exactly may take minutes" in told()
    assert "svd_niter=4" in caplog.text
    assert told(residual_dtype="int8", quant_iterations=0)
    for given in ({"svd_niter": 4}, {"residual_dtype": "int8"}, {"d": 8}, {"device": "meta"}):
        assert not told(**given)


# -- heads -------------------------------------------------------------------------------------------------------

BART_SIZES = {
    **{"vocab_size": 50, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "pad_token_id": 0},
    **{
        "eos_token_id": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
    },
}
XLNET_SIZES = {"vocab_size": 50, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32}
NEW_HEADS = [
    ("Bart", "ForSequenceClassification", BART_SIZES),  # classification_head
    ("DebertaV2", "ForSequenceClassification", SHAPE | {"pooler_hidden_size": 16}),  # pooler, classifier
    ("XLNet", "ForSequenceClassification", XLNET_SIZES),  # sequence_summary, logits_proj
    ("DistilBert", "ForSequenceClassification", {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}),
    ("ModernBert", "ForQuestionAnswering", SHAPE | SPECIAL),  # head, classifier
    ("BigBird", "ForQuestionAnswering", SHAPE | {"attention_type": "original_full"}),  # qa_outputs within qa_classifier
]


def ended() -> torch.Tensor:
    """Texts that end as BART wants it."""
    ids = token_ids()
    ids[:, -1] = BART_SIZES["eos_token_id"]
    return ids


@pytest.mark.parametrize(("kind", "head", "sizes"), NEW_HEADS, ids=[kind for kind, _, _ in NEW_HEADS])
@pytest.mark.parametrize("second", [False, True])
def test_the_whole_head_trains_and_is_saved(
    tmp_path: Path, kind: str, head: str, sizes: dict[str, Any], second: bool
) -> None:
    def base() -> Any:
        torch.manual_seed(0)
        return getattr(transformers, f"{kind}{head}")(getattr(transformers, f"{kind}Config")(**sizes)).eval()

    task = "SEQ_CLS" if head == "ForSequenceClassification" else "QUESTION_ANS"
    config = {"r": 2, "target_modules": "all-linear", "task_type": task, "residual": "implicit"}
    expected, name = base(), "second" if second else "default"
    backbone = (f"{expected.base_model_prefix}.", "shared")
    heads = {each for each, _ in expected.named_parameters() if not each.startswith(backbone)}
    model = peft.get_peft_model(base(), SivaConfig(**config)).eval()
    if second:
        model.add_adapter(name, SivaConfig(**config))
        model.set_adapter(name)
    beside = {each for each in trained(model) if "siva_" not in each}
    assert {each.replace(f"modules_to_save.{name}.", "").removeprefix("base_model.model.") for each in beside} == heads
    ids = ended()
    move(model)
    with torch.no_grad():
        found = model(ids)[0]
        assert not found.equal(expected(ids)[0])
        model.save_pretrained(tmp_path, selected_adapters=[name])
        loaded = peft.PeftModel.from_pretrained(base(), tmp_path / (name if second else ""))
        torch.testing.assert_close(loaded.eval()(ids)[0], found, **CLOSE)
        torch.testing.assert_close(loaded.merge_and_unload()(ids)[0], found, **CLOSE)


def test_an_adapter_that_was_saved_without_its_head_is_loaded(tmp_path: Path) -> None:
    """As all of BART were, whose head then stayed as it was drawn."""

    def base() -> Any:
        torch.manual_seed(0)
        return transformers.BartForSequenceClassification(transformers.BartConfig(**BART_SIZES)).eval()

    model = move(peft.get_peft_model(base(), SivaConfig(r=2, task_type="SEQ_CLS")).eval())
    expected = copy.deepcopy(model)
    head = expected.base_model.model.classification_head
    head.modules_to_save["default"].load_state_dict(head.original_module.state_dict())
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: each for key, each in load_file(file).items() if "head" not in key}, file)
    settings = json.loads((tmp_path / "adapter_config.json").read_text()) | {"modules_to_save": ["classifier", "score"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path, is_trainable=True).eval()
    assert loaded(ended()).logits.equal(expected(ended()).logits)
    assert not any("classification_head" in name for name in trained(loaded))


@pytest.mark.parametrize("targets", [["query", "key"], "all-linear"])
def test_a_pooler_that_the_checkpoint_lacks_is_saved_with_the_head(tmp_path: Path, targets: Any) -> None:
    """As those of masked-word models do, so that each time they are loaded another one is drawn."""
    tiny("Bert", "ForMaskedLM").save_pretrained(tmp_path / "base")

    def base(seed: int) -> Any:
        torch.manual_seed(seed)
        return transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").eval()

    config = {"r": 2, "target_modules": targets, "task_type": "SEQ_CLS"}
    model = move(peft.get_peft_model(base(0), SivaConfig(**config)).eval())
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(base(1), tmp_path / "adapter").eval()
    expected = model(token_ids()).logits
    assert not base(0)(token_ids()).logits.equal(base(1)(token_ids()).logits)
    assert loaded(token_ids()).logits.equal(expected)
    torch.testing.assert_close(loaded.merge_and_unload()(token_ids()).logits, expected, **CLOSE)
    base(0).save_pretrained(tmp_path / "whole")
    read = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    assert not any(
        "pooler" in name for name in trained(peft.get_peft_model(read, SivaConfig(**config))) if "siva" not in name
    )


def test_a_pooler_that_is_beside_the_backbone_is_saved_once(tmp_path: Path) -> None:
    """As DeBERTa's, which is a module of the head itself."""
    sizes = {"num_attention_heads": 2, "pooler_hidden_size": 16}
    tiny("DebertaV2", "ForMaskedLM", **sizes).save_pretrained(tmp_path)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    config = SivaConfig(r=2, target_modules=["query_proj"], task_type="SEQ_CLS")
    peft.get_peft_model(base, config)
    assert sorted(config.modules_to_save) == ["classifier", "pooler", "score"]


class OwnHead(nn.Module):
    """A backbone, one layer of which has a name that ends as the head's, and a head."""

    base_model_prefix = "body"

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"query": nn.Linear(4, 4), "key": nn.Linear(4, 4), "key_head": nn.Linear(4, 4)})
        self.head = nn.Linear(4, 2)


@pytest.mark.parametrize(
    ("make", "task", "message"),
    [
        (OwnHead, "SEQ_CLS", "parts of the head do not train: head"),
        (OwnHead, None, "parts of the head do not train: head"),
        (tiny, None, "parts of the head do not train: classifier"),
        (lambda: tiny().roberta, "SEQ_CLS", "no module is called classifier or score, so no head trains"),
        (lambda: tiny(head="ForMaskedLM"), None, ""),  # a head of words stays
        (lambda: tiny(head="ForMaskedLM"), "SEQ_CLS", ""),
        (tiny, "SEQ_CLS", ""),
    ],
)
def test_a_head_that_does_not_train_is_told(
    caplog: pytest.LogCaptureFixture, make: Callable[[], Any], task: str | None, message: str
) -> None:
    model = peft.get_peft_model(make(), SivaConfig(r=2, target_modules=["query", "key"], task_type=task))
    assert message in caplog.text
    assert bool(message) is bool(caplog.records)
    assert not any("head" in name for name in trained(model))


class Normalised(nn.Module):
    """Layers with a norm whose running statistics training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)


def test_running_statistics_that_are_not_saved_are_told(caplog: pytest.LogCaptureFixture) -> None:
    config = {"r": 2, "target_modules": ["query", "key"]}
    peft.get_peft_model(Normalised(), SivaConfig(**config))
    assert "running statistics of norm" in caplog.text
    assert "Add norm to modules_to_save" in caplog.text
    caplog.clear()
    peft.get_peft_model(Normalised(), SivaConfig(**config, modules_to_save=["norm"]))
    peft.get_peft_model(tiny(), SivaConfig(r=2, task_type="SEQ_CLS"))
    assert not caplog.records


def test_a_model_without_linear_layers_is_told() -> None:
    with pytest.raises(FastpeftError, match="Sequential has no linear layer beside its head"):
        peft.get_peft_model(nn.Sequential(nn.Conv1d(3, 3, 1)), SivaConfig(r=2, target_modules="all-linear"))


def test_an_encoder_with_the_name_of_a_backbone_is_no_head(caplog: pytest.LogCaptureFixture) -> None:
    peft.get_peft_model(dinov3(), SivaConfig(r=2, target_modules="all-linear"))
    assert not caplog.records


def test_a_model_beside_another_is_no_head() -> None:
    """BLIP's decoder of captions is beside its backbone, and has all queries and keys that are not fused."""
    text = {**SHAPE, "projection_dim": 16, "encoder_hidden_size": 16, "is_decoder": True}
    config = transformers.BlipConfig(text_config=text, vision_config=VIT_SIZES)
    base = transformers.BlipForConditionalGeneration(config)
    model = peft.get_peft_model(base, SivaConfig(r=2, target_modules=["query", "key"]))
    found = layer_names(model)
    assert len(found) == 8  # of two layers with two attentions
    assert all(name.startswith("base_model.model.text_decoder.bert.") for name in found)


class HoldsAside(nn.Module):
    """Calls its layers from a plain list, as the heads of masks of Mask2Former do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.layers = [self.first, nn.ReLU()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.second(x)


def test_a_layer_that_is_called_from_a_plain_list_is_refused() -> None:
    """Its weight would be W_r there, without an adapter."""
    base, x = nn.Sequential(HoldsAside()), torch.randn(2, 4)
    before = base(x)
    with pytest.raises(FastpeftError, match=r"0\.first: a HoldsAside holds it in a plain list too \(layers\)"):
        peft.get_peft_model(base, SivaConfig(r=2, target_modules=["first", "second"]))
    assert base(x).equal(before)
    model = peft.get_peft_model(base, SivaConfig(r=2, target_modules=["first", "second"], exclude_modules=["0.first"]))
    torch.testing.assert_close(model(x), before, **CLOSE)


def test_all_linear_names_no_head(tmp_path: Path) -> None:
    """PEFT took Wav2Vec2's lm_head for embeddings, and saving ended with an error after the training."""
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    sound = {"conv_dim": [8], "conv_stride": [4], "conv_kernel": [8], "num_feat_extract_layers": 1, "vocab_size": 20}
    places = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    base = transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**shape, **sound, **places))
    model = peft.get_peft_model(base, SivaConfig(r=2, target_modules="all-linear"))
    model.save_pretrained(tmp_path)
    assert not any("lm_head" in name for name in model.peft_config["default"].target_modules)
