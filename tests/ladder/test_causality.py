"""Beside a model that predicts next tokens no token sees a later one: whatever transformers has, or it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from backbones import TINY, ladder, moved, tiny, trainable
from causal_models import CAUSAL, causal_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastpeft import FastpeftError, LadderModel, LadderPool
from fastpeft.ladder.backbone import Backbone
from fastpeft.ladder.probe import decide_causal

IDS = torch.randint(5, 60, (2, 7), generator=torch.Generator().manual_seed(1))

# whose attention does not call itself causal, or not in the first layer
SILENT = (
    "bloom",
    "falcon_mamba",
    "lfm2",
    "mamba",
    "mamba2",
    "mpt",
    "openai-gpt",
    "qwen3_next",
    "rwkv",
    "trocr",
    "xglm",
)
REFUSED = {
    "cpmant": r"the feature of layer 0 is float32 \(",  # 32 tokens of a prompt come before the text's
    "deepseek_v4": r"the feature of layer 0 is float32 \(",  # several streams
    "gemma3n_text": r"the feature of layer 0 is float32 \(",  # several streams
    "hrm_text": "the layers of HrmTextForCausalLM are not found",  # two stacks, which run in turn
    "hy_v4": r"the feature of layer 0 is float32 \(",  # several streams
    "inkling2_text": r"not from the output of model\.layers\.2 alone",  # layers read those of all before
    "longcat_flash": "the layers of LongcatFlashForCausalLM are not found",  # fewer than the configuration says
    "olmo_hybrid": "the layers of OlmoHybridForCausalLM are not found",  # of two classes
    "prophetnet": r"the feature of layer 0 is float32 \(",  # several streams
    "qwen4_exp_text": r"the feature of layer 0 is float32 \(",  # several streams
    "reformer": "has no attribute 'attn_output'",  # its layers return two streams
    "xlm": r"not from the output of transformer\.ffns\.2 alone",  # no module is a whole layer
    "xlnet": r"are \(T, B, d\)",
    "zamba2": "the layers of Zamba2ForCausalLM are not found",  # of two classes
}


@torch.no_grad()
def changes(model: LadderModel, ids: Tensor = IDS) -> Tensor:
    """By how much the logits of each token change at most when the last token does, `(T,)`."""
    other = ids.clone()
    other[:, -1] = 3
    logits = [model.eval()(**{model.main_input_name: each}).logits for each in (ids, other)]
    return (logits[0] - logits[1]).abs().amax((0, 2))


def assert_no_later_token_is_seen(model: LadderModel) -> None:
    *before, last = changes(model).tolist()
    assert last > 5e-6
    assert max(before) < 1e-6  # the measured error is 0, beside experts up to 9e-8


@pytest.mark.parametrize("lengths", [(1, 6), (6, 1), (3, 4), (1, 1, 5)])
def test_joined_texts_are_refused(lengths: tuple[int, ...]) -> None:
    model = ladder(causal_model("llama"))
    joined = torch.cat([torch.arange(length) for length in lengths])[None]
    with pytest.raises(FastpeftError, match="position_ids begin anew within a row"):
        model(IDS, position_ids=joined)
    assert model(IDS, position_ids=torch.arange(2, 9)[None]).logits.isfinite().all()


def train_a_step(model: LadderModel) -> None:
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-3)
    before = {name: parameter.detach().clone() for name, parameter in model.side.named_parameters()}
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    after = dict(model.side.named_parameters())
    assert [name for name, p in after.items() if p.equal(before[name]) or not p.isfinite().all()] == []


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in SILENT else pytest.mark.slow) for kind in sorted(CAUSAL)]
)
def test_every_causal_architecture_trains_and_looks_at_no_later_token_or_is_refused(kind: str) -> None:
    base = causal_model(kind)
    if kind in REFUSED:
        with pytest.raises((FastpeftError, AttributeError), match=REFUSED[kind]):
            train_a_step(ladder(base))
        return
    model = moved(base)
    assert model.config.causal is model.side.causal is True
    train_a_step(model)
    assert_no_later_token_is_seen(model)


@pytest.mark.parametrize(
    "config",
    [
        {"window_size": 1, "fusion": "gated"},
        {"window_size": 9, "residual": True},
        {"window_size": 5, "share_projections": True, "output_mix": "add"},
        {"backbone_dtype": "int8"},
        {"backbone_dtype": "bfloat16"},
    ],
    ids=lambda config: " ".join(config),
)
def test_no_form_of_the_side_network_looks_at_later_tokens(config: dict[str, Any]) -> None:
    assert_no_later_token_is_seen(moved(causal_model("bloom"), **config))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tells_as_float32_does(dtype: torch.dtype) -> None:
    for kind in SILENT:
        assert decide_causal(Backbone(causal_model(kind).to(dtype)), None) is True
    for kind in ("Roberta", "Bert", "DistilBert", "ModernBert", "Electra", "DebertaV2"):
        assert decide_causal(Backbone(tiny(kind).to(dtype)), None) is False


def test_beside_a_head_of_classes_the_side_network_sees_what_the_backbone_does() -> None:
    assert ladder(tiny("Bloom")).side.causal is True
    assert ladder(tiny("Bloom"), causal=False).side.causal is False  # no leak: a class is no token
    assert ladder(tiny("Roberta")).side.causal is False
    assert ladder(tiny("Roberta", is_decoder=True)).side.causal is True
    adapted = peft.get_peft_model(tiny("Bloom"), peft.LoraConfig(target_modules=["query_key_value"]))
    assert ladder(adapted).side.causal is True


def test_a_language_model_whose_tokens_see_later_ones_is_refused() -> None:
    base = tiny("Bert", "LMHeadModel")
    for causal in (None, True, False):
        with pytest.raises(FastpeftError, match=r"tokens of the BertLMHeadModel see later ones.*is_decoder=True"):
            ladder(base, causal=causal)
    with pytest.raises(FastpeftError, match=r"tokens of the BertLMHeadModel see later ones"):
        LadderPool(base)
    assert_no_later_token_is_seen(moved(tiny("Bert", "LMHeadModel", is_decoder=True, vocab_size=64)))


def test_a_side_network_that_learned_from_later_tokens_is_refused(tmp_path: Path) -> None:
    model = ladder(causal_model("bloom"))
    model.config.causal = False  # as it was saved before
    model.save_pretrained(tmp_path)
    for make in (
        lambda: LadderModel.from_pretrained(tmp_path, base=causal_model("bloom")),
        lambda: ladder(causal_model("bloom"), causal=False),
    ):
        with pytest.raises(FastpeftError, match=r"causal=False beside a BloomForCausalLM.*train it again"):
            make()


def test_what_cannot_be_told_is_asked_for() -> None:
    base = causal_model("xmod", default_language=None)
    with pytest.raises(FastpeftError, match=r"cannot be told.*Input language unknown.*causal=True.*causal=False"):
        ladder(base)
    assert ladder(base, causal=True).side.causal is True
    assert ladder(base, causal=False).side.causal is False


@pytest.mark.parametrize("causal", [None, True])
def test_layers_that_a_text_does_not_pass_are_refused(causal: bool | None) -> None:
    text = {**TINY, "vocab_size": 64, "num_hidden_layers": 2, "num_key_value_heads": 2}
    text["rope_parameters"] = {"mrope_section": [1, 1, 2], "rope_theta": 1e4}
    images = {"depth": 2, "embed_dim": 64, "hidden_size": 16, "num_heads": 4, "patch_size": 4}
    base = transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(text_config=text, vision_config=images)
    )
    with pytest.raises(FastpeftError, match=r"did not run 2 of the 2 .*\(model\.visual\.blocks\.0 to model\.visual"):
        ladder(base, causal=causal, feature_modules="model.visual.blocks")
    found = moved(base, causal=causal)  # though the vision model has as many layers, of more weights
    assert found.backbone.layers == list(base.model.language_model.layers)
    assert_no_later_token_is_seen(found)


def test_layers_of_several_classes_are_named() -> None:
    base = causal_model("jamba", attn_layer_period=2, attn_layer_offset=1)
    with pytest.raises(FastpeftError, match=r"of several classes model\.layers \(3\), and its configuration says 3"):
        ladder(base)
    assert_no_later_token_is_seen(moved(base, feature_modules="model.layers"))


def test_without_values_the_task_and_the_layers_tell() -> None:
    with torch.device("meta"):
        models = [causal_model("mamba"), tiny("Bloom"), tiny("GPT2"), tiny("Roberta", is_decoder=True), tiny()]
    assert [decide_causal(Backbone(model), None) for model in models] == [True, False, True, True, False]
    with FakeTensorMode():
        assert decide_causal(Backbone(causal_model("mamba")), None) is True


def test_of_an_encoder_with_a_decoder_of_words_the_former_is_read() -> None:
    sizes = {"vocab_size": 64, "d_model": 32, "max_position_embeddings": 40}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 2, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 48}
    torch.manual_seed(0)
    base = transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes))
    for causal in (None, True, False):
        with pytest.raises(FastpeftError, match=r"would read the decoder of the Bart.* Name the encoder's layers"):
            ladder(base, feature_modules="model.decoder.layers", causal=causal)
    model = moved(base, feature_modules="model.encoder.layers")
    assert model.side.causal is False
    five = IDS[:, :5].contiguous()
    labels = five.clone()
    labels[:, 3] = 3  # which the decoder reads as its token 4
    with torch.no_grad():
        one, other = (model.eval()(input_ids=IDS, labels=each).logits for each in (five, labels))
    changed = (one - other).abs().amax((0, 2)) > 1e-6
    assert changed.tolist() == 4 * [False] + [True]


@pytest.mark.parametrize("training", [False, True])
def test_to_find_out_leaves_no_trace(training: bool) -> None:
    base = causal_model("gpt2").train(training)
    base.transformer.h[1].train(not training)
    calls: list[nn.Module] = []

    def draw(module: nn.Module, *_: Any) -> None:
        torch.rand(3)  # as some layers do
        calls.append(module)

    base.transformer.h[0].register_forward_hook(draw)
    modes = [module.training for module in base.modules()]
    weights = {name: (tensor.clone(), tensor._version) for name, tensor in base.state_dict(keep_vars=True).items()}
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in base.modules()]
    state = torch.get_rng_state()
    assert decide_causal(Backbone(base), None) is True
    assert len(calls) == 1  # one pass
    assert torch.get_rng_state().equal(state)
    assert [module.training for module in base.modules()] == modes
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in base.modules()] == hooks
    for name, tensor in base.state_dict(keep_vars=True).items():
        assert tensor.equal(weights[name][0])
        assert tensor._version == weights[name][1]
        assert tensor.grad is None
    assert torch.is_grad_enabled()


def test_big_bird_keeps_its_sparse_attention() -> None:
    """It turns to full attention when it meets a short text."""
    base = tiny("BigBird", attention_type="block_sparse").train()
    before = {name: (type(module), module.training) for name, module in base.named_modules()}
    assert ladder(base, pack_weights=False).side.causal is False
    base.train()
    assert {name: (type(module), module.training) for name, module in base.named_modules()} == before
    assert base.bert.attention_type == "block_sparse"


def test_to_find_out_compiles_nothing() -> None:
    backbone = Backbone(causal_model("gpt2"))
    for layer in backbone.layers:
        layer.compile(backend=lambda graph, _: pytest.fail("compiled"))
    assert decide_causal(backbone, None) is True


def test_rwkv_is_the_same_saved_and_in_a_pool(tmp_path: Path) -> None:
    """It scales the weights of later layers when it first evaluates; what knows and shares them must come after."""

    def base() -> Any:
        return causal_model("rwkv", num_hidden_layers=5, rescale_every=2)

    model = moved(base())
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS).logits
        loaded = LadderModel.from_pretrained(tmp_path, base=base())
        assert loaded(input_ids=IDS).logits.equal(expected)
        pool = LadderPool(base())
        pool.add("saved", str(tmp_path))
        pool.add("loaded", loaded)
        for tasks in (["saved", "loaded"], ["loaded", "saved"]):
            answers = torch.stack([row.logits for row in pool({"input_ids": IDS}, tasks)])
            torch.testing.assert_close(answers, expected)
        torch.testing.assert_close(pool["saved"](input_ids=IDS).logits, expected)
