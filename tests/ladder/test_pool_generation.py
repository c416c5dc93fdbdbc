"""`LadderPool.generate`: whatever the mix, a row says what its task's own model says."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from backbones import ladder, tiny
from causal_models import causal_model
from pools import SMALL
from torch import Tensor, nn

from fastpeft import FastpeftError, LadderConfig, LadderModel, LadderPool
from fastpeft.ladder import LadderCache
from fastpeft.ladder.backbone import CACHE

WORDS = torch.randint(5, 60, (5, 7), generator=torch.Generator().manual_seed(2))
MASK = torch.ones(5, 7, dtype=torch.long)
MASK[1, :2] = MASK[3, :4] = 0
PROMPTS = {"input_ids": WORDS, "attention_mask": MASK}
NETWORKS: dict[str, dict[str, Any]] = {
    "lst": {"window_size": 1, "fusion": "gated"},
    "3-lst": {},
    "other": {},
    "9-lst": {"window_size": 9, "residual": True, "normalise_features": True},
    "one block": {"layers_per_block": 3},
}
GREEDY: dict[str, Any] = {"max_new_tokens": 9, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
MIXES = {
    "one task": ["lst"] * 5,
    "in order": ["lst", "lst", "3-lst", "other", "9-lst"],
    "mixed": ["other", "lst", "9-lst", "other", "lst"],
    "other blocks": ["one block", "lst", "one block", "3-lst", "one block"],
}


def pool_beside(base: nn.Module) -> LadderPool:
    pool = LadderPool(base)
    for number, (name, config) in enumerate(NETWORKS.items()):
        far(pool.add(name, LadderConfig(**{**SMALL, **config})), number)
    return pool


def far(model: LadderModel, seed: int) -> LadderModel:
    """A side network far from its start, and from others."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.side.parameters():
        nn.init.normal_(parameter, std=1.0, generator=generator)
    return model


def own_words(pool: LadderPool, tasks: list[str], **options: Any) -> Tensor:
    """What each task's model says to its rows, by itself."""
    found = []
    for row, task in enumerate(tasks):
        part = {name: value[row : row + 1] for name, value in PROMPTS.items()}
        found.append(pool[task].generate(**part, **options))
    return torch.cat(found)


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "mistral"])
def test_every_row_says_what_its_model_says(kind: str, mix: list[str]) -> None:
    pool = pool_beside(causal_model(kind))
    found = pool.generate(PROMPTS, mix, **GREEDY)
    assert found.shape == (5, 16)
    assert found.equal(own_words(pool, mix, **GREEDY))
    same = {"input_ids": WORDS[:1].repeat(len(NETWORKS), 1)}
    assert len(set(map(tuple, pool.generate(same, [*NETWORKS], **GREEDY).tolist()))) > 1


@pytest.mark.parametrize("returned", [1, 2])
def test_beams_are_those_of_each_model(returned: int) -> None:
    pool = pool_beside(causal_model("llama"))
    options = {**GREEDY, "num_beams": 3, "no_repeat_ngram_size": 2, "num_return_sequences": returned}
    assert pool.generate(PROMPTS, MIXES["mixed"], **options).equal(own_words(pool, MIXES["mixed"], **options))


def test_samples_repeat_with_torchs_seed() -> None:
    pool = pool_beside(causal_model("llama"))
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        options = {**GREEDY, "do_sample": True, "num_return_sequences": 2}
        found.append(pool.generate(PROMPTS, MIXES["mixed"], **options))
    assert found[0].shape == (10, 16)
    assert found[0].equal(found[1])


def test_a_token_takes_one_pass_of_the_backbone() -> None:
    pool, rows = pool_beside(causal_model("llama")), []
    pool.backbone.layers[0].register_forward_hook(lambda _, args, __: rows.append(tuple(args[0].shape[:2])))
    pool.generate(PROMPTS, MIXES["mixed"], **{**GREEDY, "max_new_tokens": 3})
    assert rows == [(5, 7), (5, 1), (5, 1)]


def test_members_keep_their_mode() -> None:
    pool = pool_beside(causal_model("llama"))
    expected = pool.generate(PROMPTS, MIXES["mixed"], **GREEDY)
    far(pool.add("drops", LadderConfig(**SMALL, feature_dropout=0.5)), 7)
    pool["drops"].train()
    said = [pool.generate({"input_ids": WORDS}, ["drops"] * 5, **GREEDY) for _ in range(2)]
    assert said[0].equal(said[1])
    assert pool["drops"].side.training
    assert pool.generate(PROMPTS, MIXES["mixed"], **GREEDY).equal(expected)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_of_its_own_joins_by_its_weights(tied: bool) -> None:
    base = causal_model("llama", tie_word_embeddings=tied)
    pool = pool_beside(copy.deepcopy(base))
    model = far(LadderModel(base, LadderConfig(**SMALL)), 5)
    expected = model.generate(**PROMPTS, **GREEDY)
    pool.add("joined", model)
    assert model.backbone.decoder.weight is pool.backbone.decoder.weight
    assert pool.generate(PROMPTS, ["joined"] * 5, **GREEDY).equal(expected)


def test_others_come_and_go_between_two_tokens() -> None:
    """Else a server could neither add nor remove a task before a long answer has ended."""
    pool = pool_beside(causal_model("llama"))
    expected = pool.generate(PROMPTS, MIXES["mixed"], **GREEDY)
    alone = pool["3-lst"].generate(**PROMPTS, **GREEDY)
    said, done = [], threading.Event()

    def interrupt() -> None:
        pool.remove("other")
        pool.add("new", LadderConfig(**SMALL))
        said.append(pool.generate(PROMPTS, ["3-lst"] * 5, **GREEDY))
        done.set()

    def after_a_token(tokens: Tensor, *_: Any, **__: Any) -> Tensor:
        if tokens.shape[1] == WORDS.shape[1] + 2:
            threading.Thread(target=interrupt, daemon=True).start()
            assert done.wait(60)
        return torch.zeros(len(tokens), dtype=torch.bool)

    assert pool.generate(PROMPTS, MIXES["mixed"], stopping_criteria=[after_a_token], **GREEDY).equal(expected)
    assert said[0].equal(alone)


def test_prompts_may_be_embeddings() -> None:
    pool = pool_beside(causal_model("llama"))
    embedded = {"inputs_embeds": pool.base.get_input_embeddings()(WORDS), "attention_mask": MASK}
    expected = pool.generate(PROMPTS, MIXES["mixed"], **GREEDY)
    assert pool.generate(embedded, MIXES["mixed"], **GREEDY).equal(expected[:, 7:])


def test_a_cache_continues_with_the_tasks_that_it_has_read() -> None:
    pool, tasks = pool_beside(causal_model("llama")), MIXES["mixed"]
    output = pool.generate({"input_ids": WORDS}, tasks, return_dict_in_generate=True, **GREEDY)
    following = {"input_ids": torch.cat((output.sequences, WORDS), dim=1)}

    def continued(tasks: list[str]) -> Tensor:
        found: Tensor = pool.generate(following, tasks, **{CACHE: copy.deepcopy(output[CACHE])}, **GREEDY)
        return found

    assert continued(tasks).equal(pool.generate(following, tasks, **GREEDY))
    for others in (["lst"] * 5, tasks[::-1]):
        with pytest.raises(FastpeftError, match="read for the tasks 'other', 'lst', '9-lst', 'other', 'lst'"):
            continued(others)


def test_half_precision() -> None:
    pool = pool_beside(causal_model("llama").to(torch.bfloat16))
    assert pool.generate(PROMPTS, MIXES["mixed"], **GREEDY).shape == (5, 16)


def test_what_is_refused() -> None:
    pool = pool_beside(causal_model("llama"))
    for batch, tasks, options, message in (
        (PROMPTS, ["lst"], {}, "the batch has 5 rows, but 1 tasks"),
        (PROMPTS, ["none"] * 5, {}, "no task 'none'"),
        (PROMPTS, ["lst"] * 5, {"use_cache": False}, "use_cache=False"),
        (PROMPTS, ["lst"] * 5, {"cache_implementation": "static"}, "cache_implementation='static'"),
        (
            PROMPTS,
            ["lst"] * 5,
            {"prompt_lookup_num_tokens": 3},
            "prompt_lookup_num_tokens=3: a pool",
        ),
        (PROMPTS, ["lst"] * 5, {"past_key_values": LadderCache(pool.backbone)}, "is a LadderCache"),
        (PROMPTS, ["lst"] * 5, {"output_hidden_states": True}, "output_hidden_states=True: a pool"),
    ):
        with pytest.raises(FastpeftError, match=message):
            pool.generate(batch, tasks, **{**GREEDY, **options})
    with pytest.raises(FastpeftError, match="does not generate text"):
        LadderPool(tiny()).generate(PROMPTS, ["lst"] * 5)


def test_another_head_is_refused() -> None:
    base = causal_model("llama", tie_word_embeddings=False)
    pool = pool_beside(copy.deepcopy(base))
    nn.init.normal_(base.lm_head.weight)
    pool.add("other words", ladder(base, **SMALL))
    with pytest.raises(FastpeftError, match=r"'other words' has a head of its own.*pool\['other words'\]"):
        pool.generate(PROMPTS, ["other words"] * 5, **GREEDY)
