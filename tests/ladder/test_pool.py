"""`LadderPool`: whatever the mix, a row gets its own model's answer; trained together is trained apart."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from backbones import IDS, MASK, labels, ladder, tiny
from torch import Tensor, nn

from fastpeft import FastpeftError, LadderConfig, LadderModel, LadderPool
from fastpeft.ladder import stack

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH = {"input_ids": IDS, "attention_mask": MASK}
SMALL = {"window_size": 3, "reduction_factor": 2}
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}


def shuffled(model: nn.Module, seed: int) -> Any:
    """Other weights for all that trains, large enough to tell models apart."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model.eval()


def pool_of(base: nn.Module, *configs: dict[str, Any]) -> LadderPool:
    """Members 0, 1, ... of these configurations, all with weights of their own."""
    pool = LadderPool(base)
    for number, config in enumerate(configs):
        shuffled(pool.add(str(number), LadderConfig(**{**SMALL, **config})), number)
    return pool


def rows_of(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: value[row : row + 1] for name, value in batch.items()}


def assert_answers_are_the_models(pool: LadderPool, batch: dict[str, Tensor], tasks: list[str]) -> None:
    answers = pool(batch, tasks)
    assert len(answers) == len(tasks)
    for row, (task, answer) in enumerate(zip(tasks, answers)):
        with torch.no_grad():
            expected = pool[task](**rows_of(batch, row))
        assert answer.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(answer[name], value[0], **ROUNDING)


# -- answers -----------------------------------------------------------------------------------------------------

SHAPES = (
    {},
    {},
    {},
    {"window_size": 9, "num_heads": 2},
    {"window_size": 9, "num_heads": 2},
    {"window_size": 1, "fusion": "gated"},
    {"window_size": 1, "fusion": "gated"},
    {"residual": True},
)
MIXES = {
    "one task": [0] * 6,
    "all of one shape": [0, 1, 2, 0, 1, 2],
    "one shape, unequal": [1, 0, 0, 0, 0, 2],
    "some of one shape": [2, 0, 2, 0, 0, 2],
    "all different": [3, 0, 5, 7, 1, 6],
    "mixed": [5, 3, 0, 4, 6, 3],
}


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_every_row_gets_its_models_answer(mix: list[int], masked: bool) -> None:
    pool = pool_of(tiny(), *SHAPES)
    ids = IDS.repeat(2, 1) if masked else IDS.clamp(min=3).repeat(2, 1)
    ids = torch.where(ids == 0, ids, (ids + torch.arange(6)[:, None]) % 40 + 3 * (ids != 0))
    batch = {"input_ids": ids} | ({"attention_mask": MASK.repeat(2, 1)} if masked else {})
    assert_answers_are_the_models(pool, batch, [str(task) for task in mix])


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("Bert", "ForSequenceClassification"),  # whose pooler is in the body
        ("DistilBert", "ForSequenceClassification"),
        ("ModernBert", "ForSequenceClassification"),
        ("GPT2", "ForSequenceClassification"),
        ("GPT2", "LMHeadModel"),
        ("Electra", "ForQuestionAnswering"),
        ("XLMRoberta", "ForTokenClassification"),
        ("Roberta", "ForMaskedLM"),
    ],
)
def test_every_head_of_every_architecture(kind: str, head: str) -> None:
    base = tiny(kind, head, num_labels=2 if head == "ForQuestionAnswering" else 3)
    base.config.pad_token_id = 0
    pool = pool_of(base, {}, {}, {"window_size": 5})
    assert_answers_are_the_models(pool, BATCH, ["1", "2", "0"])


def test_answers_of_tasks_differ() -> None:
    pool = pool_of(tiny(), {}, {})
    first, second = (pool(rows_of(BATCH, 1), [task])[0].logits for task in pool.tasks)
    assert not first.allclose(second, atol=1e-2)


def test_side_networks_of_one_shape_are_computed_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of(tiny(), {}, {}, {})
    passes, bodies = [], []
    monkeypatch.setattr(stack.StackedModule, "forward", counted(stack.StackedModule.forward, passes))
    pool.backbone.layers[0].register_forward_hook(lambda *_: bodies.append(None))
    pool(BATCH, ["2", "0", "1"])
    assert len(bodies) == 1
    assert len(passes) == 1 + 4 + 3 + 1  # down, projections of 4 features, blocks, up


def counted(function: Any, calls: list[None]) -> Any:
    def wrapper(*args: Any) -> Any:
        calls.append(None)
        return function(*args)

    return wrapper


def test_changed_weights_are_seen_at_once() -> None:
    pool = pool_of(tiny(), {}, {}, {})
    shuffled(pool["1"], 7)
    assert_answers_are_the_models(pool, BATCH, ["1", "0", "1"])


def test_a_backbone_in_bfloat16() -> None:
    pool = pool_of(tiny().bfloat16(), {}, {})
    answers = pool(BATCH, ["0", "1", "1"])
    with torch.no_grad():
        expected = [pool[task](**BATCH).logits[row] for row, task in enumerate(["0", "1", "1"])]
    for answer, logits in zip(answers, expected):
        torch.testing.assert_close(answer.logits, logits, rtol=2e-2, atol=2e-2)


# -- members -----------------------------------------------------------------------------------------------------


def test_saved_members_come_back_with_their_classes(tmp_path: Path) -> None:
    for classes in (2, 3, 5):
        saved = shuffled(ladder(tiny(num_labels=classes)), classes)
        saved.save_pretrained(tmp_path / str(classes))
    base = tiny()
    before = copy.deepcopy(base.state_dict())
    pool = LadderPool(base)
    for classes in (2, 3, 5):
        pool.add(str(classes), tmp_path / str(classes))
    answers = pool(BATCH, ["5", "2", "3"])
    for row, classes in enumerate((5, 2, 3)):
        alone = LadderModel.from_pretrained(tmp_path / str(classes), base=tiny(num_labels=classes))
        with torch.no_grad():
            expected = alone(**BATCH).logits[row]
        torch.testing.assert_close(answers[row].logits, expected, **ROUNDING)
        assert pool[str(classes)].base.config.num_labels == classes
    assert all(tensor.equal(before[name]) for name, tensor in base.state_dict().items())


def test_members_share_the_backbones_weights_and_nothing_else() -> None:
    pool = LadderPool(tiny())
    given = pool.add("given", shuffled(ladder(tiny()), 1))
    made = pool.add("made", LadderConfig(**SMALL))
    body = {parameter.data_ptr() for parameter in pool.backbone.body.parameters()}
    trained = [{p.data_ptr() for p in model.parameters() if p.requires_grad} for model in (given, made)]
    for model in (given, made):
        assert {parameter.data_ptr() for parameter in model.backbone.body.parameters()} == body
    assert not trained[0] & trained[1]
    assert not (trained[0] | trained[1]) & body


def test_a_tied_decoder_follows_the_shared_embeddings() -> None:
    pool = LadderPool(tiny(head="ForMaskedLM"))
    model = pool.add("words", shuffled(ladder(tiny(head="ForMaskedLM")), 1))
    assert model.base.lm_head.decoder.weight is pool.base.roberta.embeddings.word_embeddings.weight


def test_members_may_have_different_heads() -> None:
    pool = LadderPool(tiny())
    pool.add("class", shuffled(ladder(tiny()), 1))
    pool.add("tags", shuffled(ladder(tiny(head="ForTokenClassification", num_labels=4)), 2))
    assert_answers_are_the_models(pool, BATCH, ["tags", "class", "tags"])


def test_a_member_saves_and_leaves_as_an_ordinary_model(tmp_path: Path) -> None:
    pool = pool_of(tiny(), {}, {}, {})
    expected = [answer.logits for answer in pool(BATCH, ["1"] * 3)]
    pool["1"].save_pretrained(tmp_path)
    left = pool.remove("1")
    assert pool.tasks == ("0", "2")
    shuffled(pool["0"], 5)
    for model in (left, LadderModel.from_pretrained(tmp_path, base=tiny())):
        with torch.no_grad():
            torch.testing.assert_close(model(**BATCH).logits, torch.stack(expected), **ROUNDING)
    assert_answers_are_the_models(pool, BATCH, ["2", "0", "2"])
    pool.add("1", left)
    assert_answers_are_the_models(pool, BATCH, ["2", "0", "1"])


def test_what_a_pool_refuses(tmp_path: Path) -> None:
    pool = LadderPool(tiny())
    other = tiny()
    other.roberta.embeddings.word_embeddings.weight.data += 1
    ladder(other).save_pretrained(tmp_path / "other")
    ladder(tiny(head="ForTokenClassification")).save_pretrained(tmp_path / "tags")
    changed = tiny()
    changed.roberta.encoder.layer[1].output.dense.weight.data[0, 0] += 1  # in a layer that no fingerprint covers
    pool.add("a", LadderConfig(**SMALL))
    refused = {
        "has a task 'a'": ("a", LadderConfig(**SMALL)),
        "another backbone: its encoder.layer.1.output.dense.weight": ("b", ladder(changed)),
        "another backbone: weights of the embedding": ("b", tmp_path / "other"),
        "RobertaForTokenClassification, the pool's base is a RobertaForSequenceClassification": (
            "b",
            tmp_path / "tags",
        ),
        "cannot load a side network": ("b", tmp_path / "nowhere"),
        "a LadderModel or a LadderConfig, not a Linear": ("b", nn.Linear(2, 2)),
        "reads 2 layers": ("b", ladder(feature_modules=[f"roberta.encoder.layer.{i}" for i in range(2)])),
    }
    for message, (name, side) in refused.items():
        with pytest.raises(FastpeftError, match=message.replace("'", ".")):
            pool.add(name, side)
    shared = tiny()
    pool.add("first", ladder(shared))
    with pytest.raises(FastpeftError, match="head is that of 'first' too"):
        pool.add("second", ladder(shared))
    assert pool.tasks == ("a", "first")
    for message, (batch, tasks) in {
        "no task 'b'; its tasks are 'a', 'first'": (BATCH, ["a", "b", "a"]),
        "3 rows, but 2 tasks": (BATCH, ["a", "a"]),
        "takes no labels": ({**BATCH, "labels": MASK[:, 0]}, ["a"] * 3),
        "a pool takes input_ids": ({**BATCH, "texts": MASK}, ["a"] * 3),
        "has no entries": ({}, []),
        "attention_mask has the shape": ({**BATCH, "attention_mask": MASK[:, :4]}, ["a"] * 3),
    }.items():
        with pytest.raises(FastpeftError, match=message.replace("'", ".")):
            pool(batch, tasks)
    with pytest.raises(FastpeftError, match="no task"):
        pool.remove("b")


def test_tasks_come_and_go_while_others_call() -> None:
    pool = pool_of(tiny(), {}, {}, {"window_size": 1})
    expected = {task: [answer.logits for answer in pool(BATCH, [task] * 3)] for task in pool.tasks}
    done, wrong = threading.Event(), []

    def call(tasks: list[str]) -> None:
        torch.set_num_threads(1)
        while not done.is_set():
            for row, (task, answer) in enumerate(zip(tasks, pool(BATCH, tasks))):
                if not answer.logits.allclose(expected[task][row], **ROUNDING):
                    wrong.append((task, row))

    threads = [threading.Thread(target=call, args=(tasks,)) for tasks in (["0", "1", "2"], ["1", "0", "0"])]
    for thread in threads:
        thread.start()
    try:
        for turn in range(10):
            shuffled(pool.add("more", LadderConfig(**SMALL)), turn)
            pool.remove("more")
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("base", "reads"),
    [
        (nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3)), "Sequential takes inputs"),
        (
            transformers.ViTForImageClassification(
                transformers.ViTConfig(
                    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32
                )
            ),
            "ViTForImageClassification takes pixel_values",
        ),
    ],
    ids=["plain", "vision"],
)
def test_a_base_that_reads_no_text_is_refused_as_it_is(base: nn.Module, reads: str) -> None:
    with pytest.raises(FastpeftError, match=f"a {reads}; a pool is for"):
        LadderPool(base, ["0", "2"] if isinstance(base, nn.Sequential) else None, backbone_dtype="bfloat16")
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in base.parameters())


def test_a_new_side_network_has_the_labels_of_the_pools_base() -> None:
    base = tiny(id2label={0: "bad", 1: "so so", 2: "good"})
    pool = LadderPool(base)
    for refused in ({"num_labels": 4}, {"id2label": {0: "bad", 1: "good"}}):
        with pytest.raises(FastpeftError, match="a LadderModel on a base of its own"):
            pool.add("a", LadderConfig(**SMALL, **refused))
    assert not pool.tasks
    assert pool.add("a", LadderConfig(**SMALL)).config.id2label == base.config.id2label
    assert pool.add("b", LadderConfig(**SMALL, id2label=base.config.id2label)).config.num_labels == 3


def test_a_model_that_quantised_the_pools_base_is_refused() -> None:
    pool = LadderPool(tiny())
    quantised = LadderModel(pool.base, LadderConfig(**SMALL, backbone_dtype="int8"))
    for side in (quantised, LadderConfig(**SMALL)):
        with pytest.raises(FastpeftError, match="own base brought it from backbone_dtype=None to 'int8'"):
            pool.add("a", side)


# -- training ----------------------------------------------------------------------------------------------------

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


def trained_apart(name: str, batches: list[dict[str, Tensor]], seed: int) -> tuple[LadderModel, list[float]]:
    """A member on its own, in a plain loop."""
    model = new_member(name).train()
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
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATES[name])
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


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


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
        weights = trained(pool[name])
        assert weights.keys() == trained(alone).keys()
        assert all(weights[key].equal(value) for key, value in trained(alone).items())
        assert not pool[name].training


def test_tasks_with_batches_of_their_own_train_as_separate_runs() -> None:
    pool = new_pool()
    data = {"slow": batches(3, 9, 1), "fast": batches(5, 6, 2), "gated": batches(2, 12, 3, number=2)}
    losses = pool.fit(data, {name: optimizer_of(pool[name], name) for name in data}, seed=4)
    for name in data:
        alone, expected = trained_apart(name, data[name], 4)
        torch.testing.assert_close(torch.tensor(losses[name]), torch.tensor(expected), rtol=1e-4, atol=1e-5)
        moved = sum((p - q).norm() for p, q in zip(trained(pool[name]).values(), trained(alone).values()))
        whole = sum((p - q).norm() for p, q in zip(trained(new_member(name)).values(), trained(alone).values()))
        assert moved < 1e-2 * whole


def test_members_stop_on_their_own() -> None:
    pool, data = new_pool(), batches()
    seen: list[tuple[str, int]] = []

    def stop(name: str, step: int, loss: float) -> bool:
        seen.append((name, step))
        return step == {"slow": 1, "fast": 3}.get(name, 99)

    losses = pool.fit(data, {name: optimizer_of(pool[name], name)[0] for name in RATES}, stop=stop, epochs=2)
    assert {name: len(values) for name, values in losses.items()} == {"slow": 1, "fast": 3, "gated": 8}
    assert seen[:4] == [("slow", 1), ("fast", 1), ("gated", 1), ("fast", 2)]
    alone, _ = trained_apart("fast", data[:3], 0)
    assert trained(alone).keys() == trained(pool["fast"]).keys()


def test_gradients_are_clipped_per_member() -> None:
    norms = {}
    for limit in (None, 1e-3):
        pool = new_pool()
        model = pool["fast"]
        start = copy.deepcopy(trained(model))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        pool.fit(batches(number=1), {"fast": optimizer}, max_grad_norm=limit)
        norms[limit] = torch.stack([(start[name] - p).norm() for name, p in trained(model).items()]).norm().item()
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-2)
    assert norms[None] > 1e-2


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForQuestionAnswering", "ForMaskedLM"])
def test_outputs_for_a_loop_of_ones_own(head: str) -> None:
    pool = pool_of(tiny(head=head, num_labels=2 if head == "ForQuestionAnswering" else 3), {}, {"window_size": 5})
    batch = {**BATCH, **labels(head)}
    for name, output in pool.outputs(batch):
        output.loss.backward()
        gradients = {key: p.grad.clone() for key, p in pool[name].named_parameters() if p.grad is not None}
        pool[name].zero_grad()
        pool[name](**batch).loss.backward()
        assert gradients.keys() == trained(pool[name]).keys()
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
        before.update(copy.deepcopy(trained(pool["slow"])))
        return False

    with pytest.raises(FastpeftError, match="the loss of 'slow' is nan at step 2"):
        pool.fit(data, optimizers, stop=spoil)
    assert before.keys() == trained(pool["slow"]).keys()
    assert all(torch.equal(p.nan_to_num(), before[name].nan_to_num()) for name, p in trained(pool["slow"]).items())
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
    with pytest.raises(FastpeftError, match="no batches for 'fast'"):
        pool.fit({"slow": batches()}, optimizers)
    embedded = [{"inputs_embeds": torch.randn(2, 4, 16), "labels": torch.tensor([0, 1])}]
    with pytest.raises(FastpeftError, match="some of the batches have"):
        pool.fit({"slow": batches(), "fast": embedded}, optimizers)
    with pytest.raises(FastpeftError, match="a batch for 'slow' has no labels"):
        pool.fit([BATCH], optimizers)
    with pytest.raises(FastpeftError, match="no task 'b'"):
        pool.fit(batches(), {"b": optimizers["slow"]})


def test_a_peft_base() -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    pool = pool_of(base, {}, {})
    assert isinstance(pool["0"].backbone.core, transformers.RobertaForSequenceClassification)
    assert_answers_are_the_models(pool, BATCH, ["1", "0", "1"])
