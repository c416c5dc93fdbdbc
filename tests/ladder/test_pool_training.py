"""`LadderPool.fit` and `outputs`: trained together is trained apart, and answers may come between the steps."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import labels, tiny, trainable
from pools import BATCH, SMALL, pool_of, shuffled
from torch import Tensor, nn

from fastpeft import FastpeftError, LadderConfig, LadderModel, LadderPool

RATES = {"slow": 1e-3, "fast": 1e-2, "gated": 1e-2}
CONFIGS = {
    "slow": {**SMALL, "feature_dropout": 0.2},
    "fast": {**SMALL, "feature_dropout": 0.2},
    "gated": {**SMALL, "window_size": 1, "fusion": "gated", "feature_dropout": 0.2},
}


def new_pool() -> LadderPool:
    pool = LadderPool(tiny())
    for name, config in CONFIGS.items():
        torch.manual_seed(3)
        pool.add(name, LadderConfig(**config))
    return pool


def new_member(name: str) -> LadderModel:
    """The same member without a pool."""
    base = tiny()
    torch.manual_seed(3)
    return LadderModel(base, LadderConfig(**CONFIGS[name]))


def trained_apart(
    name: str, batches: list[dict[str, Tensor]], seed: int, model: LadderModel | None = None
) -> tuple[LadderModel, list[float]]:
    """A member on its own, in a plain loop."""
    model = (model or new_member(name)).train()
    optimizer, scheduler = optimizer_of(model, name)
    losses = []
    torch.manual_seed(seed)
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.item())
    return model, losses


def optimizer_of(model: nn.Module, name: str) -> tuple[Any, Any]:
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=RATES[name])
    return optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, total_iters=4)


def batches(rows: int = 3, tokens: int = 9, seed: int = 0, number: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(number):
        ids = torch.randint(3, 40, (rows, tokens), generator=generator)
        ids[0, tokens - 2 :] = 0
        answers = torch.randint(3, (rows,), generator=generator)
        made.append({"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": answers})
    return made


def test_a_search_trains_to_the_bit_as_separate_runs() -> None:
    """Dropout of features and of the head too: each member draws from a stream of its own."""
    pool, data, seeds = new_pool(), batches(), {"slow": 5, "fast": 5, "gated": 6}
    passes: list[None] = []
    pool.backbone.layers[0].register_forward_hook(lambda *_: passes.append(None))
    torch.manual_seed(11)
    expected_draw = torch.rand(3)
    torch.manual_seed(11)
    losses = pool.fit(data, {name: optimizer_of(pool[name], name) for name in RATES}, seed=seeds)
    assert torch.rand(3).equal(expected_draw)  # nobody else's stream was touched
    assert len(passes) == len(data)
    for name in RATES:
        alone, expected = trained_apart(name, data, seeds[name])
        assert losses[name] == expected
        weights = trainable(pool[name])
        assert weights.keys() == trainable(alone).keys()
        assert all(weights[key].equal(value) for key, value in trainable(alone).items())
        assert not pool[name].training


def test_tasks_with_batches_of_their_own_train_as_separate_runs() -> None:
    pool = new_pool()
    data = {"slow": batches(3, 9, 1), "fast": batches(5, 6, 2), "gated": batches(2, 12, 3, number=2)}
    losses = pool.fit(data, {name: optimizer_of(pool[name], name) for name in data}, seed=4)
    for name in data:
        alone, expected = trained_apart(name, data[name], 4)
        torch.testing.assert_close(torch.tensor(losses[name]), torch.tensor(expected), rtol=1e-4, atol=1e-5)
        moved = sum((p - q).norm() for p, q in zip(trainable(pool[name]).values(), trainable(alone).values()))
        whole = sum((p - q).norm() for p, q in zip(trainable(new_member(name)).values(), trainable(alone).values()))
        assert moved < 1e-2 * whole


@pytest.mark.parametrize("shared", [False, True])
def test_autocast_around_all_steps_is_that_around_each(shared: bool) -> None:
    """It keeps casts of weights until it ends: each step went on with those of the first."""
    pool, alone = (LadderPool(tiny(hidden_dropout_prob=0.0)) for _ in range(2))
    data = batches()
    for each in (pool, alone):
        torch.manual_seed(3)
        each.add("a", LadderConfig(**SMALL, share_projections=shared))
    expected = []
    optimizer = torch.optim.AdamW(trainable(alone["a"]).values(), lr=1e-2)
    for batch in data:
        with torch.autocast("cpu", torch.bfloat16):
            expected += alone.fit([batch], {"a": optimizer})["a"]
    with torch.autocast("cpu", torch.bfloat16):
        losses = pool.fit(data, {"a": torch.optim.AdamW(trainable(pool["a"]).values(), lr=1e-2)})["a"]
    assert losses == expected


def test_the_backbone_drops_nothing_whatever_its_mode() -> None:
    pool = pool_of(tiny(hidden_dropout_prob=0.0), {})
    for module in pool.backbone.body.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    expected = dict(pool.outputs({**BATCH, "labels": torch.arange(3)}))["0"].loss
    pool.base.train()
    assert dict(pool.outputs({**BATCH, "labels": torch.arange(3)}))["0"].loss.equal(expected)
    assert all(module.training for module in pool.base.modules())


def test_members_stop_on_their_own() -> None:
    pool, data = new_pool(), batches()
    seen: list[tuple[str, int]] = []

    def stop(name: str, step: int, loss: float) -> bool:
        seen.append((name, step))
        return step == {"slow": 1, "fast": 3}.get(name, 99)

    losses = pool.fit(data, {name: optimizer_of(pool[name], name) for name in RATES}, seed=0, stop=stop, epochs=2)
    assert {name: len(values) for name, values in losses.items()} == {"slow": 1, "fast": 3, "gated": 8}
    assert seen[:4] == [("slow", 1), ("fast", 1), ("gated", 1), ("fast", 2)]
    alone, _ = trained_apart("fast", data[:3], 0)
    weights = trainable(pool["fast"])
    assert all(weights[key].equal(value) for key, value in trainable(alone).items()), "what stopped stays as it was"


def test_gradients_are_clipped_per_member() -> None:
    norms = {}
    for limit in (None, 1e-3):
        pool = new_pool()
        model = pool["fast"]
        start = copy.deepcopy(trainable(model))
        optimizer = torch.optim.SGD(trainable(model).values(), lr=1.0)
        pool.fit(batches(number=1), {"fast": optimizer}, max_grad_norm=limit)
        norms[limit] = torch.stack([(start[name] - p).norm() for name, p in trainable(model).items()]).norm().item()
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-2)
    assert norms[None] > 1e-2


def test_what_the_optimizer_leaves_out_keeps_no_gradient() -> None:
    """The head here, by whose gradients of earlier steps the next ones would be clipped."""
    pool = new_pool()
    optimizer = torch.optim.SGD(pool["fast"].side.parameters(), lr=0.1)
    pool.fit(batches(number=2), {"fast": optimizer}, max_grad_norm=1.0)
    assert all(parameter.grad is None for parameter in pool["fast"].parameters())


def test_an_optimizer_of_another_member_is_refused() -> None:
    pool = new_pool()
    with pytest.raises(FastpeftError, match="the optimizer of 'fast' has none of its parameters"):
        pool.fit(batches(number=1), {"fast": optimizer_of(pool["slow"], "slow")[0]})


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
    (name, output), *rest = pool.outputs({"1": batch})
    assert name == "1"
    assert not rest
    assert not list(pool.outputs(batch, tasks=[]))
    with pytest.raises(FastpeftError, match="has no entries"):
        list(pool.outputs({}))


def test_a_call_evaluates_and_leaves_modes_as_they_are() -> None:
    pool = new_pool()
    pool.add("on the pool's base", shuffled(LadderModel(pool.base, LadderConfig(**CONFIGS["gated"])), 1))
    tasks = list(pool.tasks)[1:]
    expected = [answer.logits for answer in pool(BATCH, tasks)]
    for name in tasks[::2]:
        pool[name].train()
    pool[tasks[1]].side.train()  # a part alone
    modes = [[module.training for module in pool[name].modules()] for name in tasks]
    draws = torch.get_rng_state()
    assert all(answer.logits.equal(logits) for answer, logits in zip(pool(BATCH, tasks), expected))
    assert torch.get_rng_state().equal(draws)
    assert [[module.training for module in pool[name].modules()] for name in tasks] == modes


def test_calls_during_training_change_nothing() -> None:
    """Another thread calls while three members train, one of them at a rate of 0 so that its answers stay."""
    done, called, wrong = threading.Event(), threading.Event(), []
    tasks = ["slow", "gated", "slow"]

    def fit(pool: LadderPool, stop: Any = None) -> dict[str, list[float]]:
        optimizers = {name: optimizer_of(pool[name], name)[0] for name in RATES}
        for group in (*optimizers["slow"].param_groups, *optimizers["gated"].param_groups):
            group["lr"] = 0.0
        return pool.fit(batches(), optimizers, epochs=5, stop=stop)

    undisturbed, pool = fit(new_pool()), new_pool()
    expected = [answer.logits for answer in pool(BATCH, tasks)]

    def call() -> None:
        torch.set_num_threads(1)
        while not done.is_set():
            wrong.extend(row for row, answer in enumerate(pool(BATCH, tasks)) if not answer.logits.equal(expected[row]))
            called.set()

    def wait_for_a_call(*_: Any) -> bool:
        called.clear()
        assert called.wait(30)
        return False

    thread = threading.Thread(target=call)
    thread.start()
    try:
        losses = fit(pool, wait_for_a_call)
    finally:
        done.set()
        thread.join()
    assert losses == undisturbed
    assert not wrong


def test_a_plateau_is_told_the_loss() -> None:
    pool = new_pool()
    optimizer, _ = optimizer_of(pool["slow"], "slow")
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=0)
    losses = pool.fit(batches(number=3), {"slow": (optimizer, scheduler)})["slow"]
    assert scheduler.best == max(losses)


def test_a_loss_that_is_not_finite_ends_training_before_its_step() -> None:
    pool, data = new_pool(), batches(number=2)
    optimizers = {"slow": optimizer_of(pool["slow"], "slow")[0]}
    hidden = pool["slow"].base.classifier.out_proj
    before: dict[str, Tensor] = {}

    def spoil(*_: Any) -> bool:
        hidden.bias.data[0] = torch.nan
        before.update(copy.deepcopy(trainable(pool["slow"])))
        return False

    with pytest.raises(FastpeftError, match="the loss of 'slow' is nan at step 2"):
        pool.fit(data, optimizers, stop=spoil)
    assert before.keys() == trainable(pool["slow"]).keys()
    assert all(torch.equal(p.nan_to_num(), before[name].nan_to_num()) for name, p in trainable(pool["slow"]).items())
    assert all(parameter.grad is None for parameter in pool["slow"].parameters())
    assert not pool["slow"].training


def test_an_iterator_is_good_for_one_epoch() -> None:
    pool = new_pool()
    optimizers = {"slow": optimizer_of(pool["slow"], "slow")}
    for data in (iter(batches()), {"slow": iter(batches())}):
        with pytest.raises(FastpeftError, match="epochs=3, but the batches come from a list_iterator"):
            pool.fit(data, optimizers, epochs=3)
        assert len(pool.fit(data, optimizers)["slow"]) == 4


def test_joint_training_refuses_what_does_not_go_together() -> None:
    pool = new_pool()
    optimizers = {name: optimizer_of(pool[name], name) for name in ("slow", "fast")}
    given = {"slow": batches(), "fast": batches()}
    with pytest.raises(FastpeftError, match="batches for 'typo', but no optimizer"):
        pool.fit({**given, "typo": batches()}, optimizers)
    embedded = [{"inputs_embeds": torch.randn(2, 4, 16), "labels": torch.tensor([0, 1])}]
    with pytest.raises(FastpeftError, match="some of the batches have"):
        pool.fit({"slow": batches(), "fast": embedded}, optimizers)
    with pytest.raises(FastpeftError, match="a batch as a dictionary of tensors"):
        pool.fit([BATCH["input_ids"]], optimizers)
    with pytest.raises(FastpeftError, match="no task 'b'"):
        pool.fit(batches(), {"b": optimizers["slow"]})


# -- from cached features --------------------------------------------------------------------------------------------


def counted_passes(pool: LadderPool) -> list[None]:
    passes: list[None] = []
    pool.backbone.layers[0].attention.register_forward_hook(lambda *_: passes.append(None))
    return passes


@pytest.mark.long(but="batches of their own")
@pytest.mark.parametrize("own", [False, True], ids=["batches for all", "batches of their own"])
def test_a_warm_cache_needs_no_pass_and_trains_to_the_bit_as_a_cold_one(tmp_path: Path, own: bool) -> None:
    lengths = {"slow": (3, 9, 1), "fast": (5, 6, 2), "gated": (2, 12, 3)}
    data: Any = {name: batches(*shape) for name, shape in lengths.items()} if own else batches()
    results = []
    for expected_passes in (4, 0):
        pool = new_pool()
        cache, passes = pool.cache_features(tmp_path), counted_passes(pool)
        results.append(pool.fit(data, {name: optimizer_of(pool[name], name) for name in RATES}, seed=4))
        assert cache is not None
        assert len(passes) == expected_passes
        assert (cache.misses > 0) == (expected_passes > 0)
    assert results[0] == results[1]
    if not own:
        for name in RATES:
            model = new_member(name)
            model.cache_features(tmp_path)
            assert results[0][name] == trained_apart(name, data, 4, model)[1]


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
