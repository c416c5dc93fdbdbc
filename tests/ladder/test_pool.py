"""`LadderPool`: whatever the mix, a row gets its own model's answer."""

from __future__ import annotations

import copy
import threading
import weakref
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from backbones import IDS, MASK, ladder, logits, tiny, vit
from pools import BATCH, ROUNDING, SMALL, answers, assert_answers_are_the_models, pool_of, shuffled
from torch import nn

from fastpeft import FastpeftError, LadderConfig, LadderModel, LadderPool
from fastpeft.ladder import side_stack as stack
from fastpeft.ops.packing import is_faster_packed, multiplies_in

# -- answers -----------------------------------------------------------------------------------------------------

SHAPES = (
    {},
    {},
    {},
    {"window_size": 9},
    {"window_size": 9},
    {"window_size": 1, "fusion": "gated"},
    {"window_size": 1, "fusion": "gated"},
    {"residual": "state", "normalise_features": True},
)
MIXES = {
    "one task": [0] * 6,
    "all of one shape": [0, 1, 2, 0, 1, 2],
    "one shape, unequal": [1, 0, 0, 0, 0, 2],
    "some of one shape": [2, 0, 2, 0, 0, 2],
    "all different": [3, 0, 5, 7, 1, 6],
    "mixed": [5, 3, 0, 4, 6, 3],
}


@pytest.mark.long(only="mixed-mask")
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_every_row_gets_its_models_answer(mix: list[int], masked: bool) -> None:
    pool = pool_of(tiny(), *SHAPES)
    ids = IDS.repeat(2, 1) if masked else IDS.clamp(min=3).repeat(2, 1)
    ids = torch.where(ids == 0, ids, (ids + torch.arange(6)[:, None]) % 40 + 3 * (ids != 0))
    batch = {"input_ids": ids} | ({"attention_mask": MASK.repeat(2, 1)} if masked else {})
    assert_answers_are_the_models(pool, batch, [str(task) for task in mix])


def test_an_encoder_beside_a_decoder_named_by_its_list() -> None:
    shape = {"num_layers": 3, "num_decoder_layers": 3, "d_model": 16, "d_kv": 8, "decoder_start_token_id": 0}
    pool = LadderPool(tiny("T5", eos_token_id=2, **shape), feature_modules="transformer.encoder.block")
    pool.add("a", LadderConfig(window_size=3, reduction_factor=2))
    ids = torch.cat([IDS, torch.full((3, 1), 2)], dim=1)
    expected = pool["a"].eval()(ids).logits
    for row, answer in zip(expected, pool({"input_ids": ids}, ["a", "a", "a"])):
        torch.testing.assert_close(answer.logits, row)


def test_inputs_of_one_row_are_those_of_all() -> None:
    """As the models take them."""
    pool = pool_of(tiny(), {}, {"window_size": 9})
    one = {"position_ids": torch.arange(9)[None].flip(-1), "token_type_ids": torch.zeros_like(IDS[:1])}
    each = {name: value.repeat(3, 1) for name, value in one.items()}
    found, expected = (pool({**BATCH, **given}, ["0", "1", "0"]) for given in (one, each))
    assert all(a.logits.equal(b.logits) for a, b in zip(found, expected))


def test_side_networks_of_one_shape_are_computed_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of(tiny(), {}, {}, {})
    passes, bodies, forward = [], [], stack.StackedModule.forward
    monkeypatch.setattr(stack.StackedModule, "forward", lambda *args: passes.append(None) or forward(*args))
    pool.backbone.layers[0].register_forward_hook(lambda *_: bodies.append(None))
    pool(BATCH, ["2", "0", "1"])
    assert len(bodies) == 1
    assert len(passes) == 1 + 4 + 3 + 1  # down, projections of 4 features, blocks, up


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
    rows = pool(BATCH, ["5", "2", "3"])
    for row, classes in enumerate((5, 2, 3)):
        alone = LadderModel.from_pretrained(tmp_path / str(classes), base=tiny(num_labels=classes))
        torch.testing.assert_close(rows[row].logits, logits(alone)[row], **ROUNDING)
        assert pool[str(classes)].base.config.num_labels == classes
    assert all(tensor.equal(before[name]) for name, tensor in base.state_dict().items())


@pytest.mark.skipif(not multiplies_in(torch.float32), reason="needs packs")
def test_a_member_that_was_used_before_leaves_nothing_of_its_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastpeft.ops.packing.is_faster_packed", lambda *_: True)
    pool, model = LadderPool(tiny()), ladder()
    logits(model)
    layer = model.backbone.layers[0].attention.self.query
    storages = [weakref.ref(layer.weight.untyped_storage())]
    assert layer.packs.nbytes > 0
    pool.add("used", model)
    assert layer.packs.nbytes == 0
    assert [storage() for storage in storages] == [None], "which the packs would hold"
    assert_answers_are_the_models(pool, BATCH, ["used"] * 3)


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


def test_a_member_saves_and_leaves_as_an_ordinary_model(tmp_path: Path) -> None:
    pool = pool_of(tiny(), {}, {}, {})
    expected = answers(pool, ["1"] * 3)
    pool["1"].save_pretrained(tmp_path)
    left = pool.remove("1")
    assert pool.tasks == ("0", "2")
    shuffled(pool["0"], 5)
    for model in (left, LadderModel.from_pretrained(tmp_path, base=tiny())):
        torch.testing.assert_close(logits(model), expected, **ROUNDING)
    assert_answers_are_the_models(pool, BATCH, ["2", "0", "2"])
    pool.add("1", left)
    assert_answers_are_the_models(pool, BATCH, ["2", "0", "1"])


@pytest.mark.parametrize("given", [False, True])
def test_a_member_that_left_is_cast_alone(given: bool) -> None:
    """Its modules held the backbone's own parameters, and a cast changed them for all."""
    pool = pool_of(tiny(), {}, {})
    expected = answers(pool, ["0"] * 3)
    pool.add("cast", shuffled(ladder(tiny()), 1) if given else LadderConfig(**SMALL))
    left = pool.remove("cast").bfloat16()
    assert {parameter.dtype for parameter in left.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in pool.base.parameters()} == {torch.float32}
    assert answers(pool, ["0"] * 3).equal(expected)


@pytest.mark.parametrize("way", ["assign", "vector"])
def test_a_member_answers_by_the_weights_that_it_has_now(way: str) -> None:
    pool = pool_of(tiny(), {}, {})
    side = pool["0"].side
    if way == "assign":
        side.load_state_dict({name: value + 0.3 for name, value in side.state_dict().items()}, assign=True)
    else:
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(side.parameters()) + 0.3, side.parameters())
    assert_answers_are_the_models(pool, BATCH, ["0", "1", "0"])


def test_a_member_that_was_cast_is_told_of() -> None:
    """It was stacked with others of its shape."""
    pool = pool_of(tiny(), {}, {})
    expected = answers(pool, ["1"] * 3)
    pool["0"].side.half()
    with pytest.raises(FastpeftError, match=r"has changed its form, dtype or device since it joined.* add it again"):
        pool(BATCH, ["0", "1", "0"])
    assert answers(pool, ["1"] * 3).equal(expected)
    member = pool.remove("0").float()
    pool.add("0", member)
    assert_answers_are_the_models(pool, BATCH, ["0", "1", "0"])


def test_a_member_on_the_pools_own_base_leaves_that_as_it_is() -> None:
    """As a server has its first run: other members share these parameters."""
    first = ladder(tiny())
    pool = LadderPool(first.base)
    pool.add("first", first)
    shared = {*map(id, pool.add("second", LadderConfig(**SMALL)).backbone.body.parameters())}
    pool.remove("first")
    assert {*map(id, pool.backbone.body.parameters())} == shared


def test_a_pool_tells_what_is_in_it() -> None:
    pool = pool_of(tiny(), {}, {})
    assert "1" in pool
    assert "2" not in pool
    assert pool.tasks == ("0", "1")


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
        "RobertaForTokenClassification, the pool's base is a Roberta": ("b", tmp_path / "tags"),
        "cannot load a side network": ("b", tmp_path / "nowhere"),
        "a PromptModel around one, or a LadderConfig, not a Linear": ("b", nn.Linear(2, 2)),
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
        "3 rows, but 2 tasks": (BATCH, np.array(["a", "a"])),
        "a pool takes input_ids": ({**BATCH, "texts": MASK}, ["a"] * 3),
        "has no entries": ({}, []),
        "a pool takes a batch as a dictionary of tensors": (IDS, ["a"] * 3),
        "takes a batch as a dictionary": ({**BATCH, "input_ids": IDS.tolist()}, ["a"] * 3),
        "no tasks are given": ({"input_ids": IDS[:0]}, []),
        "attention_mask has the shape": ({**BATCH, "attention_mask": MASK[:, :4]}, ["a"] * 3),
        "position_ids has the shape": ({**BATCH, "position_ids": IDS[:2]}, ["a"] * 3),
    }.items():
        with pytest.raises(FastpeftError, match=message.replace("'", ".")):
            pool(batch, tasks)
    with pytest.raises(FastpeftError, match="no task"):
        pool.remove("b")


def test_equal_weights_at_other_positions_are_another_backbone() -> None:
    """The frequencies of positions come from the configuration, and no file of weights has them."""
    pool = LadderPool(tiny("Llama"))
    member = ladder(tiny("Llama", rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}))
    with pytest.raises(FastpeftError, match=r"weights are the pool's, but its rotary_emb\.inv_freq differs"):
        pool.add("far", member)
    pool.add("near", ladder(tiny("Llama")))
    assert pool.tasks == ("near",)


def test_a_model_that_trains_nothing_keeps_its_own_head() -> None:
    """As one for answers alone does; its pooler was compared with that of the pool's base."""
    member = shuffled(ladder(tiny("Bert")), 1).requires_grad_(False)
    expected = logits(member)
    pool = LadderPool(tiny("Bert"))
    assert pool.add("a", member).base.bert.pooler.dense.weight is not pool.base.bert.pooler.dense.weight
    torch.testing.assert_close(answers(pool, ["a"] * 3), expected, **ROUNDING)


def test_tasks_come_and_go_while_others_call() -> None:
    pool = pool_of(tiny(), {}, {}, {"window_size": 1})
    expected = {task: answers(pool, [task] * 3) for task in pool.tasks}
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


def test_pools_of_two_threads_leave_the_attention_of_others_as_it_was() -> None:
    """PyTorch's choice of attention is one of the process: a pool that sets it back between another's would keep it."""
    flags = lambda: (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled())  # noqa: E731
    before = flags()
    pools = [pool_of(tiny(), {}, {}) for _ in range(2)]

    def call(pool: LadderPool) -> None:
        for _ in range(50):
            pool(BATCH, ["0", "1", "0"])

    threads = [threading.Thread(target=call, args=(pool,)) for pool in pools]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert flags() == before


def test_a_base_that_reads_no_text_is_refused_as_it_is() -> None:
    base = vit()
    with pytest.raises(FastpeftError, match="a ViTForImageClassification takes pixel_values; a pool is for"):
        LadderPool(base, backbone_dtype="bfloat16")
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


def test_a_model_that_would_quantise_the_pools_base_is_refused() -> None:
    pool = LadderPool(tiny())
    with pytest.raises(FastpeftError, match=r"a pool reads this RobertaForSequenceClassification as it is.* once more"):
        LadderModel(pool.base, LadderConfig(**SMALL, backbone_dtype="int8"))
    pool.add("a", LadderConfig(**SMALL))


@pytest.mark.skipif(not is_faster_packed(64, torch.bfloat16), reason="no packs in bfloat16")
def test_members_come_after_packs_have_taken_the_place_of_weights() -> None:
    config = LadderConfig(backbone_dtype="bfloat16", **SMALL)
    first, other = (LadderModel(tiny(), config).eval() for _ in range(2))
    pool = LadderPool(first.base, backbone_dtype="bfloat16")
    pool.add("first", first)
    pool(BATCH, ["first"] * 3)
    assert any(weight.is_mkldnn for weight in pool.backbone.model.parameters())
    with torch.no_grad():
        expected = other(**BATCH).logits
    pool.add("second", other)
    twin = pool.add("third", LadderConfig(**SMALL))
    shared = {id(weight) for weight in pool.backbone.model.parameters()}
    for member in (other, twin):
        assert all(id(weight) in shared for layer in member.backbone.layers for weight in layer.parameters())
    torch.testing.assert_close(answers(pool, ["second"] * 3), expected, rtol=0.0, atol=0.02)


def test_a_peft_base() -> None:
    torch.manual_seed(0)
    base = peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["query"], init_lora_weights=False))
    pool = pool_of(base, {}, {})
    assert isinstance(pool["0"].backbone.core, transformers.RobertaForSequenceClassification)
    assert_answers_are_the_models(pool, BATCH, ["1", "0", "1"])
