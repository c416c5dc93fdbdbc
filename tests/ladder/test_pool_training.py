"""`LadderPool.outputs`: members train from one pass of the backbone, and answers may come in between."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from backbones import labels, tiny, trainable
from pools import BATCH, SMALL, pool_of, shuffled
from torch import nn

from fastpeft import FastpeftError, LadderConfig, LadderModel, LadderPool


@pytest.mark.parametrize("cached", [False, True])
def test_a_search_trains_to_the_bit_as_separate_runs(tmp_path: Path, cached: bool) -> None:
    """From one pass a step; from a cache in the later steps from none."""
    configs = {"wide": {**SMALL}, "gated": {**SMALL, "window_size": 1, "fusion": "gated"}}
    batch, apart = {**BATCH, "labels": torch.arange(3)}, {}
    for name, config in configs.items():
        base = tiny(hidden_dropout_prob=0.0)
        torch.manual_seed(3)
        apart[name] = LadderModel(base, LadderConfig(**config)).train()
        if cached:
            apart[name].cache_features(tmp_path)
    pool = LadderPool(tiny(hidden_dropout_prob=0.0))
    for name, config in configs.items():
        torch.manual_seed(3)
        pool.add(name, LadderConfig(**config)).train()
    if cached:
        pool.cache_features(tmp_path)
    passes: list[None] = []
    pool.backbone.layers[0].attention.register_forward_hook(lambda *_: passes.append(None))
    optimizers = {name: torch.optim.AdamW(trainable(pool[name]).values(), lr=1e-2) for name in configs}
    for _ in range(3):
        for name, output in pool.outputs(batch):
            output.loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
    assert len(passes) == (1 if cached else 3)
    for name, model in apart.items():
        optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
        for _ in range(3):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        weights = trainable(pool[name])
        assert all(weights[key].equal(value) for key, value in trainable(model).items())


def test_the_backbone_drops_nothing_whatever_its_mode() -> None:
    pool = pool_of(tiny(hidden_dropout_prob=0.0), {})
    for module in pool.backbone.body.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    expected = dict(pool.outputs({**BATCH, "labels": torch.arange(3)}))["0"].loss
    pool.base.train()
    assert dict(pool.outputs({**BATCH, "labels": torch.arange(3)}))["0"].loss.equal(expected)
    assert all(module.training for module in pool.base.modules())


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForQuestionAnswering", "ForMaskedLM"])
def test_outputs_for_a_loop_of_ones_own(head: str) -> None:
    pool = pool_of(tiny(head=head, num_labels=2 if head == "ForQuestionAnswering" else 3), {}, {"window_size": 5})
    batch = {**BATCH, **labels(head)}
    for name, output in pool.outputs(batch):
        output.loss.backward()
        gradients = {key: p.grad.clone() for key, p in pool[name].named_parameters() if p.grad is not None}
        pool[name].zero_grad()
        pool[name](**batch).loss.backward()
        assert gradients.keys() == trainable(pool[name]).keys()
        assert all(gradients[key].equal(pool[name].get_parameter(key).grad) for key in gradients)
    assert [name for name, _ in pool.outputs(batch, tasks=["1"])] == ["1"]
    assert not list(pool.outputs(batch, tasks=[]))
    with pytest.raises(FastpeftError, match="has no entries"):
        list(pool.outputs({}))


def test_a_call_evaluates_and_leaves_modes_as_they_are() -> None:
    pool = pool_of(tiny(), {}, {"window_size": 1, "fusion": "gated"})
    pool.add("on the pool's base", shuffled(LadderModel(pool.base, LadderConfig(**SMALL, layer_drop=0.5)), 1))
    tasks = list(pool.tasks)
    expected = [answer.logits for answer in pool(BATCH, tasks)]
    for name in tasks[::2]:
        pool[name].train()
    pool[tasks[1]].side.train()  # a part alone
    modes = [[module.training for module in pool[name].modules()] for name in tasks]
    draws = torch.get_rng_state()
    assert all(answer.logits.equal(logits) for answer, logits in zip(pool(BATCH, tasks), expected))
    assert torch.get_rng_state().equal(draws)
    assert [[module.training for module in pool[name].modules()] for name in tasks] == modes


def test_calls_and_batches_without_tokens_do_without_the_cache(tmp_path: Path) -> None:
    pool = pool_of(tiny(), {}, {})
    expected = [answer.logits for answer in pool(BATCH, ["0", "1", "0"])]
    cache = pool.cache_features(tmp_path)
    assert cache is not None
    assert all(answer.logits.equal(logits) for answer, logits in zip(pool(BATCH, ["0", "1", "0"]), expected))
    embedded = pool.backbone.body.embeddings.word_embeddings(BATCH["input_ids"]).detach()
    list(pool.outputs({"inputs_embeds": embedded, **labels("ForSequenceClassification")}))
    assert (cache.hits, cache.misses) == (0, 0)
    list(pool.outputs({**BATCH, **labels("ForSequenceClassification")}))
    assert (cache.hits, cache.misses) == (0, 3)
    assert pool.cache_features(None) is pool.feature_cache is None
