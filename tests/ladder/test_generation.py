"""A ladder beside a decoder generates as transformers' models do."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from backbones import ladder, moved, sees_images, tiny, trainable
from causal_models import PADDED, WORDS, causal_model
from tokenizers_for_prompts import make_tokenizer
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

from bench.oracles.direct_run import DirectRun
from fastpeft import FastpeftError, LadderConfig, LadderModel
from fastpeft.ladder import LadderCache
from fastpeft.ladder.backbone import CACHE, CACHES
from fastpeft.ladder.generation import with_own_cache
from fastpeft.ladder.side_step import SideStep
from fastpeft.methods.side_network import GATED

LST = dict(GATED)
NETWORKS: dict[str, dict[str, Any]] = {
    "LST": LST,
    "3-LST": {},
    "9-LST": {"window_size": 9},
    "shared": {"residual": True, "normalise_features": True, "share_projections": True},
    "two blocks": {"layers_per_block": 2, "residual": "state", "normalise_features": True},
    "one block": {**LST, "layers_per_block": 3},
    "a context": {"window_size": 9, "context": [7, 9, 11]},
}
DECODERS = ("llama", "gpt2", "bloom", "mistral")
GENERATING = [  # a context needs a decoder that keeps all tokens
    (kind, network) for kind in DECODERS for network in NETWORKS if (kind, network) != ("mistral", "a context")
]


def written(model: Any, **options: Any) -> Tensor:
    """What a model writes after three prompts padded on the left."""
    given = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0, "do_sample": False, **options}
    result: Tensor = model.generate(WORDS[:, :6], attention_mask=PADDED[:, :6], **given)
    return result


@torch.no_grad()
def logits(model: Any, cache: Any = None, lengths: tuple[int, ...] = (6, 7, 8, 11, 12)) -> Tensor:
    """Of the last of so many tokens each, by full passes or by passes over what a cache does not have yet."""
    positions = (PADDED.cumsum(-1) - 1).clamp(min=0)
    found, before = [], 0
    for length in lengths:
        new = slice(before, length)
        inputs = {"input_ids": WORDS[:, new], "attention_mask": PADDED[:, :length]}
        if "position_ids" in model.prepare_inputs_for_generation(WORDS, position_ids=positions, use_cache=False):
            inputs["position_ids"] = positions[:, new]
        output = model(**inputs, past_key_values=cache, use_cache=cache is not None)
        found.append(output.logits[:, -1])
        before = 0 if cache is None else length
    return torch.stack(found)


@torch.no_grad()
def test_a_cache_that_is_kept_while_weights_change_goes_on_by_the_new_ones() -> None:
    """As between the turns of a chat: the one token that follows a turn is read by the weights that read the turn."""
    first = moved(causal_model("llama")).eval()
    models, found = (first, copy.deepcopy(first)), []
    for model, lengths in zip(models, ((8, 9), (9,))):
        cache = model(input_ids=WORDS[:, :5], use_cache=True)[CACHE]
        cache = model(input_ids=WORDS[:, 5:6], past_key_values=cache, use_cache=True)[CACHE]
        for parameter in model.side.parameters():
            parameter.mul_(1.5)
        before = 6
        for length in lengths:
            output = model(input_ids=WORDS[:, before:length], past_key_values=cache, use_cache=True)
            before = length
        found.append(output.logits[:, -1])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", [{}, LST], ids=["3-LST", "LST"])
def test_checkpointed_side_blocks_have_the_same_gradients_and_keep_less(network: dict[str, Any]) -> None:
    gradients, kept = [], []
    for checkpointed in (False, True):
        model = ladder(tiny(head="ForMaskedLM"), feature_dropout=0.3, **network).train()
        nn.init.normal_(model.side.up.weight, generator=torch.Generator().manual_seed(0))
        if checkpointed:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        torch.manual_seed(5)
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(input_ids=WORDS % 50, labels=WORDS % 50).loss
        kept.append(sum(sizes.values()))
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in trainable(model).items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
    assert kept[1] < 0.8 * kept[0]


# -- the cache ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "network"), GENERATING)
def test_cached_passes_are_as_near_to_full_ones_as_the_decoders(kind: str, network: str) -> None:
    base = causal_model(kind).eval()
    own = (logits(base, transformers.DynamicCache(config=base.config)) - logits(base)).abs().amax()
    model = moved(base, **NETWORKS[network]).eval()
    full = logits(model)
    scale = full.abs().amax().clamp(min=1)  # of logits that are larger than the decoder's
    assert (logits(model, LadderCache(model.backbone)) - full).abs().amax() <= 2 * scale * own.clamp(min=1e-6)


@pytest.mark.parametrize(("kind", "network"), GENERATING)
def test_greedy_words_are_those_of_full_passes(kind: str, network: str) -> None:
    model = moved(causal_model(kind), **NETWORKS[network])
    text = written(model)
    assert text.shape == (3, 18)
    assert text.equal(written(model, use_cache=False))


def test_a_copy_of_a_cache_has_no_copy_of_the_weights() -> None:
    model = moved(causal_model("llama")).eval()
    cache = LadderCache(model.backbone)
    with torch.no_grad():
        for tokens in (WORDS, WORDS[:, :1]):
            model(input_ids=tokens, past_key_values=cache)
        other = copy.deepcopy(cache)
        assert cache.sides[0].step_weights is not None
        assert other.sides[0].step_weights is None
        both = [model(input_ids=WORDS[:, :1], past_key_values=each).logits for each in (cache, other)]
    assert both[0].equal(both[1])


def test_an_activation_that_the_step_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    model = moved(causal_model("llama"))
    text = written(model)
    monkeypatch.setattr("fastpeft.ladder.side_step.ACTIVATIONS", {})
    assert text.equal(written(model))


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "no_repeat_ngram_size": 2},
        {"num_beams": 4, "no_repeat_ngram_size": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
    ],
    ids=["beams", "two of four beams", "sampling"],
)
@pytest.mark.parametrize("network", NETWORKS)
def test_beams_and_samples_are_those_of_full_passes(network: str, options: dict[str, Any]) -> None:
    model = moved(causal_model("llama"), **NETWORKS[network])
    found = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        found.append(written(model, use_cache=use_cache, **options))
    assert found[0].equal(found[1])


@pytest.mark.parametrize("network", [{}, LST], ids=["3-LST", "LST"])
def test_words_that_are_looked_up_in_the_prompt_are_taken_back(network: dict[str, Any]) -> None:
    model = moved(causal_model("llama"), **network)
    prompt = WORDS[:1, :6].repeat(1, 3)
    # an end that is never written: transformers 5.0 cannot look words up without one
    options = {"max_new_tokens": 12, "eos_token_id": 10**6, "pad_token_id": 0, "do_sample": False}
    expected = model.generate(prompt, **options)
    assert model.generate(prompt, prompt_lookup_num_tokens=3, **options).equal(expected)


@pytest.mark.parametrize("window", [None, 5])
def test_it_proposes_words_to_another_model(window: int | None) -> None:
    """Which takes some of them back, also where a layer keeps a window of tokens alone."""
    recorded = hasattr(transformers.DynamicCache, "activate_past_recording")  # without it a large model has no window
    large = causal_model("mistral", sliding_window=window if recorded else None).eval()
    small = moved(causal_model("mistral", sliding_window=window, num_hidden_layers=2))
    options = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    expected = large.generate(WORDS[:1], **options)
    assert large.generate(WORDS[:1], assistant_model=small, **options).equal(expected)


def test_it_starts_to_write_as_its_base() -> None:
    base = causal_model("llama").eval()
    expected = written(base)
    assert written(ladder(base)).equal(expected)


def test_padding_on_the_left_changes_nothing() -> None:
    model = moved(causal_model("llama"))
    alone = model.generate(WORDS[2:, 4:6], max_new_tokens=12, eos_token_id=None, pad_token_id=0, do_sample=False)
    assert written(model)[2:, 4:].equal(alone)


@pytest.mark.parametrize("network", NETWORKS)
def test_autocast(network: str) -> None:
    model = moved(causal_model("llama"), **NETWORKS[network])
    with torch.autocast("cpu", torch.bfloat16):
        assert written(model).shape == (3, 18)


def test_words_are_streamed_as_they_come() -> None:
    class Streamer(BaseStreamer):
        def __init__(self) -> None:
            self.words: list[int] = []

        def put(self, value: Tensor) -> None:
            self.words += value.flatten().tolist()

        def end(self) -> None:
            self.words.append(-1)

    model, streamer = moved(causal_model("llama")), Streamer()
    text = model.generate(WORDS[:1, :6], max_new_tokens=5, eos_token_id=None, do_sample=False, streamer=streamer)
    assert streamer.words == [*text[0].tolist(), -1]


def test_it_ends_at_a_text() -> None:
    model, tokenizer = moved(causal_model("llama")), make_tokenizer("byte-level")
    options = {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    whole = model.generate(WORDS[:1, :6], **options)
    stop = {"stop_strings": tokenizer.decode(whole[0, 6]), "tokenizer": tokenizer}
    assert model.generate(WORDS[:1, :6], **options, **stop).equal(whole[:, :7])


@pytest.mark.parametrize("network", [{}, LST], ids=["3-LST", "LST"])
def test_a_step_computes_one_token(network: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, steps, call = moved(causal_model("llama"), **network), [], SideStep.feed
    seen: dict[str, list[int]] = {}
    for name, module in model.side.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(
                lambda _, args, __, name=name: seen.setdefault(name, []).append(args[0].shape[:-1].numel())
            )
    monkeypatch.setattr(
        SideStep, "feed", lambda step, layer, feature: steps.append(len(feature)) or call(step, layer, feature)
    )
    written(model, max_new_tokens=4)
    assert {name for name, rows in seen.items() if rows == [18, 3, 3, 3]} == {"down", "up"}
    assert {tuple(rows) for rows in seen.values()} == {(18,), (18, 3, 3, 3)}
    assert steps == 3 * (len(model.side.blocks) + 1) * [3]


def test_what_a_token_takes() -> None:
    model = moved(causal_model("llama"), window_size=3)
    cache = LadderCache(model.backbone)
    model.eval()(input_ids=WORDS, past_key_values=cache)
    sizes = {tensor.numel() for layer in cache.sides[0].layers for tensor in (layer.keys, layer.values)}
    assert sizes == {3 * 12 * 2 * model.side.width, 3 * 12 * 3 * model.side.width}


def cached(model: LadderModel, length: int = 8) -> LadderCache:
    """A cache of the first tokens, read in three passes."""
    cache = LadderCache(model.backbone)
    with torch.no_grad():
        for before, after in ((0, 4), (4, 5), (5, length)):
            model(input_ids=WORDS[:, before:after], past_key_values=cache)
    return cache


def crop(cache: LadderCache) -> tuple[Tensor, Tensor]:
    cache.crop(-2)
    return WORDS[:, :6], WORDS[:, 6:8]


def reorder(cache: LadderCache) -> tuple[Tensor, Tensor]:
    order = torch.tensor([2, 2, 0])
    cache.reorder_cache(order)
    return WORDS[order, :8], WORDS[order, 8:10]


def select(cache: LadderCache) -> tuple[Tensor, Tensor]:
    cache.batch_select_indices(torch.tensor([1]))
    return WORDS[1:2, :8], WORDS[1:2, 8:10]


def repeat(cache: LadderCache) -> tuple[Tensor, Tensor]:
    cache.batch_repeat_interleave(2)
    return WORDS[:, :8].repeat_interleave(2, 0), WORDS[:, 8:10].repeat_interleave(2, 0)


def reset(cache: LadderCache) -> tuple[Tensor, Tensor]:
    cache.reset()
    return WORDS[:, :0], WORDS[:, :5]


@pytest.mark.parametrize("change", [crop, reorder, select, repeat, reset])
@pytest.mark.parametrize("network", [{}, LST], ids=["3-LST", "LST"])
def test_a_cache_changes_as_those_of_transformers(network: dict[str, Any], change: Any) -> None:
    model = moved(causal_model("llama"), **network).eval()
    cache = cached(model)
    untouched = copy.deepcopy(cache)
    before, after = change(cache)
    if change is reset and cache.get_seq_length():
        pytest.skip("the caches of this transformers keep their tokens, as zeros")
    with torch.no_grad():
        for new in after.split(1, dim=1):
            found = model(input_ids=new, past_key_values=cache).logits
            before = torch.cat((before, new), dim=1)
            torch.testing.assert_close(found[:, -1], model(input_ids=before).logits[:, -1], rtol=1e-4, atol=1e-4)
        again = model(input_ids=WORDS[:, 8:9], past_key_values=untouched).logits
    torch.testing.assert_close(again[:, -1], model(input_ids=WORDS[:, :9]).logits[:, -1], rtol=1e-4, atol=1e-4)


def test_gradients_pass_through_a_cache() -> None:
    model = moved(causal_model("llama")).eval()
    output = model(input_ids=WORDS[:, :6], use_cache=True)
    for part in WORDS[:, 6:].split(1, dim=1):
        output = model(input_ids=part, past_key_values=output.past_key_values)
    output.logits.square().sum().backward()
    weight = model.side.blocks[0].qkv.weight
    found, weight.grad = weight.grad, None
    model(input_ids=WORDS).logits[:, -1].square().sum().backward()
    torch.testing.assert_close(found, weight.grad, rtol=1e-3, atol=1e-4)


def test_logits_to_keep() -> None:
    model = moved(causal_model("llama")).eval()
    with torch.no_grad():
        every = model(input_ids=WORDS).logits
        torch.testing.assert_close(model(input_ids=WORDS, logits_to_keep=2).logits, every[:, -2:])


def test_a_text_continues_from_its_cache() -> None:
    model = moved(causal_model("llama"))
    options = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False, "return_dict_in_generate": True}
    first = model.generate(WORDS[:, :6], max_new_tokens=4, **options)
    options["attention_mask"] = torch.ones_like(first.sequences)  # a word that it wrote is that of padding
    both = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=4, **options)
    del options["attention_mask"]
    assert both.sequences.equal(model.generate(WORDS[:, :6], max_new_tokens=8, **options).sequences)


def test_a_cache_of_inference_mode_goes_on_outside_of_it() -> None:
    model = moved(causal_model("llama"))
    options = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False, "max_new_tokens": 4}
    with torch.inference_mode():
        first = model.generate(WORDS[:, :6], return_dict_in_generate=True, **options)
    longer = torch.cat((first.sequences, WORDS[:, :3]), dim=1).clone()
    options["attention_mask"] = torch.ones_like(longer)
    expected = model.generate(longer, **options)
    assert model.generate(longer, past_key_values=first.past_key_values, **options).equal(expected)


def test_features_that_are_cached_on_disk_are_left_alone(tmp_path: Path) -> None:
    model = moved(causal_model("llama"))
    expected = written(model)
    features = model.cache_features(tmp_path)
    assert written(model).equal(expected)
    assert features is not None
    assert (features.hits, features.misses) == (0, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_backbone_in_half_precision(dtype: torch.dtype) -> None:
    model = moved(causal_model("llama").to(dtype))
    assert written(model).shape == (3, 18)


# -- the model ---------------------------------------------------------------------------------------------------


def test_it_is_saved_and_loaded_as_a_decoder(tmp_path: Path) -> None:
    base = causal_model("llama")
    base.save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = moved(base)
    model.generation_config.max_new_tokens = 3
    model.generation_config.eos_token_id = 4
    model.save_pretrained(tmp_path / "ladder")
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ladder")
    assert type(loaded) is LadderModel
    assert loaded.can_generate()
    assert (loaded.generation_config.max_new_tokens, loaded.generation_config.eos_token_id) == (3, 4)
    assert loaded.generate(WORDS[:, :6], do_sample=False).equal(model.generate(WORDS[:, :6], do_sample=False))


def test_a_configuration_may_stand_in_its_place() -> None:
    model = moved(causal_model("llama"))
    full = transformers.GenerationConfig(max_new_tokens=12, do_sample=False, use_cache=False, pad_token_id=0)
    expected = model.generate(WORDS, generation_config=full)
    lengths = []
    model.backbone.layers[0].register_forward_hook(lambda _, given, __: lengths.append(given[0].shape[1]))
    assert model.generate(WORDS, full).equal(expected)
    assert lengths == [*range(12, 24)]


def test_a_prompt_may_be_embeddings() -> None:
    model = moved(causal_model("llama"))
    embedded = model.get_input_embeddings()(WORDS[:, :6])
    options = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    found = model.generate(inputs_embeds=embedded, attention_mask=PADDED[:, :6], **options)
    assert found.equal(written(model)[:, 6:])


def test_it_generates_in_evaluation_mode() -> None:
    model = moved(causal_model("llama"), feature_dropout=0.5, layer_drop=0.5).train()
    text = written(model)
    assert model.training
    assert model.side.training
    assert written(model.eval()).equal(text)


def test_it_does_not_keep_what_it_drops() -> None:
    with pytest.raises(FastpeftError, match=r"use_cache=True in training mode.*model.eval\(\)"):
        ladder(causal_model("llama")).train()(input_ids=WORDS, use_cache=True)


def other_bases() -> list[Any]:
    return [
        pytest.param(ladder(tiny()), "a RobertaForSequenceClassification", id="classes"),
        pytest.param(ladder(tiny(head="ForMaskedLM")), "a RobertaForMaskedLM", id="masked words"),
        pytest.param(ladder(tiny(head="Model")), "a RobertaModel", id="no head"),
    ]


@pytest.mark.parametrize(("model", "kind"), other_bases())
def test_other_bases_are_refused(model: LadderModel, kind: str) -> None:
    assert not model.can_generate()
    name = model.main_input_name
    for call in (lambda: model.generate(WORDS), lambda: model.eval()(**{name: WORDS}, use_cache=True)):
        with pytest.raises(FastpeftError, match=f"the base, {kind}, does not generate text.*AutoModelForCausalLM"):
            call()


def test_a_cache_has_either_name() -> None:
    model = ladder(causal_model("llama")).eval()
    caches = [model(input_ids=WORDS[:, :6], use_cache=True).past_key_values for _ in range(2)]
    both = [model(input_ids=WORDS[:, 6:], **{name: c}).logits for name, c in zip(("cache", "past_key_values"), caches)]
    assert both[0].equal(both[1])
    with pytest.raises(FastpeftError, match="two names of one argument"):
        model(input_ids=WORDS[:, 6:], cache=caches[0], past_key_values=caches[1])


def test_other_caches_are_refused() -> None:
    model = ladder(causal_model("llama")).eval()
    with pytest.raises(FastpeftError, match=rf"{CACHE} is a Dynamic.*LadderCache\(model.backbone\)"):
        model(input_ids=WORDS, past_key_values=transformers.DynamicCache(config=model.base.config))
    with pytest.raises(FastpeftError, match=r"cache_implementation='static'.*'dynamic'"):
        written(model, cache_implementation="static")
    assert written(model, cache_implementation="dynamic").shape == (3, 18)
    dynamic = transformers.GenerationConfig(max_new_tokens=3, cache_implementation="dynamic")
    assert model.generate(WORDS, generation_config=dynamic).shape[0] == 3
    with pytest.raises(FastpeftError, match=r"attention_mask has the shape \(3, 6\).*\(3, 12\)"):
        model(input_ids=WORDS[:, 6:], attention_mask=PADDED[:, :6], past_key_values=cached(model, 6))


def test_a_base_that_takes_use_cache_among_others_generates_without_one() -> None:
    model = moved(causal_model("granitemoe"))
    assert written(model, use_cache=False).equal(written(model))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *[("rwkv", "Rwkv"), ("mamba", "Mamba"), ("mamba2", "Mamba2"), ("falcon_mamba", "FalconMamba")],
        ("openai-gpt", "OpenAIGPT"),
        ("recurrent_gemma", "RecurrentGemma"),  # beside its keys, in its modules: beam search would not reorder them
    ],
)
def test_what_keeps_no_keys_and_values_generates_without_a_cache(kind: str, name: str) -> None:
    model = moved(causal_model(kind, **({"attention_hidden_size": 32} if kind == "rwkv" else {})))
    with pytest.raises(FastpeftError, match=rf"{name}\w+ keeps something else.*use_cache=False"):
        written(model)
    model.side_run = DirectRun
    assert written(model, use_cache=False).shape == (3, 18)


def test_the_direct_form_keeps_nothing() -> None:
    model = moved(causal_model("llama"))
    expected = written(model)
    model.side_run = DirectRun
    assert written(model).equal(expected)
    with pytest.raises(FastpeftError, match=r"keeps nothing of earlier tokens.*use_cache=False"):
        written(model, use_cache=True)


def test_a_cache_that_the_base_asks_for_is_not_taken() -> None:
    base = causal_model("llama")
    base.generation_config.cache_implementation = "hybrid"
    expected = written(moved(causal_model("llama")))
    assert written(moved(base)).equal(expected)


@pytest.mark.parametrize("name", CACHES)
def test_outputs_are_read_by_the_names_that_they_have(name: str) -> None:
    """From 5.24 on transformers warns of every other name of a cache, with advice that only we could follow."""

    class Outputs(dict[str, Any]):
        def get(self, name: str, default: Any = None) -> Any:
            return self[name]

    assert with_own_cache(Outputs(logits=1, **{name: 2}), None) == {"logits": 1}


def test_what_is_asked_of_the_words_goes_to_the_base() -> None:
    """Also through `base_model`, which beside a decoder is a pass without its head."""
    base = causal_model("llama")
    model = LadderModel(base, LadderConfig(window_size=3, reduction_factor=4))
    assert model.get_decoder() is base.get_decoder()
    assert model.get_output_embeddings() is base.lm_head
    assert model.base_model.config is base.config
    assert model.base_model.base_model is base
    states = model.base_model(WORDS).last_hidden_state
    torch.testing.assert_close(base.lm_head(states), model(WORDS).logits)
    words = base.config.vocab_size + 5
    model.set_input_embeddings(nn.Embedding(words, base.config.hidden_size))
    assert base.get_input_embeddings().num_embeddings == words


def test_what_is_said_of_images_is_the_bases_at_the_start() -> None:
    """Their patches are no rows to repeat for beams, and have places of their own."""
    base = sees_images(image_token_id=45, vision_start_token_id=46, vision_end_token_id=47)
    ids = torch.randint(5, 45, (2, 10), generator=torch.Generator().manual_seed(0))
    ids[:, 2], ids[:, 3:7], ids[:, 7] = 46, 45, 47  # 4 patches of 4, of which a token is made
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(32, 96)}
    batch["image_grid_thw"] = torch.tensor(2 * [[1, 4, 4]])
    if "mm_token_type_ids" in inspect.signature(base.forward).parameters:  # of later versions
        batch["mm_token_type_ids"] = (ids == 45).int()
    model = ladder(copy.deepcopy(base))
    given = {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    scores = {"return_dict_in_generate": True, "output_scores": True}
    for beams in (1, 3):
        said = [each.generate(**batch, **given, **scores, num_beams=beams) for each in (base, model)]
        assert said[0].sequences.equal(said[1].sequences)
        torch.testing.assert_close(said[1].scores, said[0].scores)
