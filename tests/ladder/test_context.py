"""A context in front of every text: as if the backbone read it with each of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import ladder, moved, tiny, trainable
from causal_models import causal_model
from peft import get_peft_model
from torch import Tensor, nn

from fastpeft import FastpeftError, LadderConfig, LadderModel, LadderPool, SivaConfig
from fastpeft.ladder.backbone import CACHE

CONTEXT = [7, 9, 11, 20]
WORDS = torch.randint(5, 60, (3, 8), generator=torch.Generator().manual_seed(1))
MASK = torch.ones(3, 8, dtype=torch.long)
MASK[1, :2] = MASK[2, :5] = 0  # padded on the left
POSITIONS = (MASK.cumsum(-1) - 1).clamp(min=0)


def inputs(model: Any) -> dict[str, Tensor]:
    known = model.prepare_inputs_for_generation(WORDS, position_ids=POSITIONS, use_cache=False)
    given = {"input_ids": WORDS, "attention_mask": MASK}
    return {**given, "position_ids": POSITIONS} if "position_ids" in known else given


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(**inputs(model)).logits
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "opt"])
def test_a_ladder_starts_as_its_base_after_the_context(kind: str) -> None:
    base = causal_model(kind).eval()
    found = logits(ladder(copy.deepcopy(base), context=CONTEXT).eval())
    for row, (words, mask) in enumerate(zip(WORDS, MASK.bool())):
        joined = torch.tensor([[*CONTEXT, *words[mask].tolist()]])
        expected = base(input_ids=joined).logits[0, len(CONTEXT) :]
        torch.testing.assert_close(found[row, mask], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_backbone_that_has_changed_reads_the_context_anew() -> None:
    """By other weights, or without an adapter that was active."""
    adapted = get_peft_model(causal_model("llama"), SivaConfig(r=2, init_weights=False))
    model = ladder(adapted, context=CONTEXT).eval()
    before = logits(model)
    with adapted.disable_adapter():
        expected = logits(ladder(causal_model("llama"), context=CONTEXT).eval())
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(model), before)
    for parameter in adapted.parameters():
        parameter.mul_(1.5)
    expected = logits(ladder(copy.deepcopy(adapted), context=CONTEXT).eval())
    torch.testing.assert_close(logits(model), expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_padding_changes_nothing_where_no_positions_are_given(kind: str) -> None:
    model = moved(causal_model(kind), context=CONTEXT).eval()
    output = model(input_ids=WORDS, attention_mask=MASK, use_cache=True)
    torch.testing.assert_close(output.logits[MASK.bool()], logits(model)[MASK.bool()], rtol=1e-4, atol=1e-5)
    for row, (words, mask) in enumerate(zip(WORDS, MASK.bool())):
        alone = model(input_ids=words[mask][None]).logits[0]
        torch.testing.assert_close(output.logits[row, mask], alone, rtol=1e-4, atol=1e-5)
    cache = output.get(CACHE)
    assert {cache.get_seq_length(layer) for layer in range(len(cache.layers))} == {8}
    more, mask = WORDS[:, :2], torch.cat((MASK, MASK.new_ones(3, 2)), dim=1)
    after = model(input_ids=more, attention_mask=mask, past_key_values=cache).logits
    whole = model(input_ids=torch.cat((WORDS, more), dim=1), attention_mask=mask).logits[:, -2:]
    torch.testing.assert_close(after, whole, rtol=1e-4, atol=1e-5)


def test_it_is_read_once_and_costs_no_step_of_the_side_network() -> None:
    model = ladder(causal_model("llama"), context=CONTEXT).train()
    lengths = []
    model.backbone.layers[0].register_forward_hook(lambda _, given, __: lengths.append(given[0].shape[1]))
    states = model(**inputs(model), output_hidden_states=True).hidden_states
    assert {state.shape[1] for state in states} == {8}
    for _ in range(2):
        model(**inputs(model), labels=WORDS).loss.backward()
    assert lengths == [len(CONTEXT), 8, 8, 8]
    assert all(p.grad is not None for name, p in trainable(model).items() if name.startswith("side."))
    output = model(**inputs(model))
    assert output.get("past_key_values") is None, "its cache is no result"
    model.bfloat16()
    assert model(**inputs(model)).logits.isfinite().all(), "read again in the new dtype"
    assert lengths[4:] == [8, len(CONTEXT), 8]


@torch.no_grad()
def test_it_is_left_where_a_cache_begins_anew() -> None:
    model = moved(causal_model("llama"), context=CONTEXT).eval()
    first = model(**inputs(model), use_cache=True)
    cache = first.get(CACHE)
    cache.reset()
    assert cache.get_seq_length() == 0
    some = {name: value[:2] for name, value in inputs(model).items()}
    torch.testing.assert_close(model(**some, past_key_values=cache).logits, first.logits[:2], rtol=1e-4, atol=1e-5)


def test_saved_and_loaded(tmp_path: Path) -> None:
    base = causal_model("llama")
    model = moved(copy.deepcopy(base), context=CONTEXT).eval()
    model.save_pretrained(tmp_path)
    again = LadderModel.from_pretrained(tmp_path, base=base)
    assert again.config.context == CONTEXT
    assert logits(again).equal(logits(model))
    with pytest.raises(FastpeftError, match="context"):
        ladder(causal_model("llama"), context=[1]).take_over(tmp_path, head=True)


def test_features_are_kept_for_each_context(tmp_path: Path) -> None:
    model = moved(causal_model("llama"), context=CONTEXT).eval()
    expected, seen = logits(model)[MASK.bool()], MASK.bool()
    other = moved(causal_model("llama")).eval()
    model.cache_features(tmp_path)
    other.cache_features(tmp_path)
    for misses in (3, 3):
        torch.testing.assert_close(logits(model)[seen], expected, rtol=1e-2, atol=1e-3)
        assert not torch.allclose(logits(other)[seen], expected, atol=1e-3)
        assert model.feature_cache.misses == other.feature_cache.misses == misses


def test_a_pool_shares_it() -> None:
    pool = LadderPool(causal_model("llama"), context=CONTEXT)
    config = {"window_size": 3, "reduction_factor": 2}
    for seed, name in enumerate(("one", "other")):
        member = pool.add(name, LadderConfig(**config))
        for parameter in member.side.parameters():
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(seed))
    tasks = ["one", "other", "one"]
    batch = inputs(pool.base)
    greedy: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    words = pool.generate({"input_ids": WORDS, "attention_mask": MASK}, tasks, **greedy)
    for row, (task, found) in enumerate(zip(tasks, pool(batch, tasks))):
        own = {name: value[row : row + 1] for name, value in batch.items()}
        torch.testing.assert_close(found.logits, pool[task](**own).logits[0], rtol=1e-4, atol=1e-5)
        prompt = {name: own[name] for name in ("input_ids", "attention_mask")}
        assert words[row : row + 1].equal(pool[task].generate(**prompt, **greedy))
    for context, told in ((None, "after no context"), ([1, 2], "after a context of 2 tokens of its own")):
        with pytest.raises(FastpeftError, match=f"{told}, the pool after a context of 4 tokens"):
            pool.add("third", ladder(causal_model("llama"), context=context))


@pytest.mark.parametrize(
    ("base", "context", "told"),
    [
        (lambda: tiny(), CONTEXT, "generates and keeps the keys and values of all tokens, which a RobertaFor"),
        (lambda: tiny("GPT2"), CONTEXT, "which a GPT2ForSequenceClassification does not"),
        (lambda: causal_model("mpt"), CONTEXT, "a MptForCausalLM would answer a row otherwise than alone"),
        (lambda: causal_model("bart"), CONTEXT, "a BartForCausalLM would answer a row otherwise than alone"),
        (lambda: causal_model("roberta"), CONTEXT, "a RobertaForCausalLM counts positions from that of its padding"),
        (lambda: causal_model("mistral"), CONTEXT, "which a MistralForCausalLM does not"),  # of a window of them
        (lambda: causal_model("llama"), [5, 99], "has the token 99, but the LlamaForCausalLM knows those from 0 to 63"),
        (lambda: causal_model("llama"), [], r"context=\[\]; give a list of token ids"),
        (lambda: causal_model("llama"), "text", "give a list of token ids"),
    ],
)
def test_what_is_refused(base: Any, context: Any, told: str) -> None:
    with pytest.raises(FastpeftError, match=told):
        ladder(base(), context=context)


def test_a_base_that_gives_back_no_keys_is_told() -> None:
    with pytest.raises(FastpeftError, match="a MegatronBertForCausalLM gives back no keys and values of the context"):
        logits(ladder(causal_model("megatron-bert"), context=CONTEXT))


def test_it_is_refused_beside_an_adapter_that_trains() -> None:
    adapted = get_peft_model(causal_model("llama"), SivaConfig(target_modules=["q_proj"], residual="implicit"))
    with pytest.raises(FastpeftError, match="context with train_adapters=True"):
        ladder(adapted, context=CONTEXT, train_adapters=True)
