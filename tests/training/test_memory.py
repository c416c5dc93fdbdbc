"""The tracker against hand counts, and the simulated step against the same step with real tensors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from fastpeft import functional
from fastpeft.errors import FastpeftError
from fastpeft.ops.frozen_head_cross_entropy import bytes_of_chunk
from fastpeft.training.memory import (
    BlockwiseAdamW,
    MemoryTracker,
    _FusedForms,
    _loss,
    _run_backward,
    embeddings_in_float,
    fused_adamw,
    peak_rss_mb,
    simulate_training_step,
)

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "num_labels": 2,
}
BATCH, TOKENS = 3, 64


class Mlp(nn.Module):
    """x (8, 16) -> 32 -> relu -> 4 -> scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x))).sum()


def text_batch() -> dict[str, torch.Tensor]:
    mask = torch.ones(BATCH, TOKENS, dtype=torch.long)
    mask[0, TOKENS // 2 :] = 0
    return {
        "input_ids": torch.full((BATCH, TOKENS), 5),
        "attention_mask": mask,
        "labels": torch.zeros(BATCH, dtype=torch.long),
    }


def roberta(**changes: object) -> nn.Module:
    return RobertaForSequenceClassification(RobertaConfig(**SIZES, max_position_embeddings=TOKENS + 2, **changes))


def bert(**changes: object) -> nn.Module:
    return BertForSequenceClassification(BertConfig(**SIZES, max_position_embeddings=TOKENS, **changes))


def lora(**changes: object) -> nn.Module:
    config = LoraConfig(r=4, target_modules=["query", "key"], task_type="SEQ_CLS", lora_dropout=0.1)
    return get_peft_model(roberta(**changes), config)


class WithOp(nn.Module):
    """A frozen weight under the library's own op."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24, 16), requires_grad=False)
        self.u, self.v = nn.Parameter(torch.randn(24, 2)), nn.Parameter(torch.randn(2, 16))
        self.register_buffer("s", torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.siva_linear(x, self.weight, self.u, self.s, self.v).square().sum()


def tracked_real_step(model: nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """Peak bytes of the step that `simulate_training_step` simulates, with real tensors."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = fused_adamw(trained)
    model.train()

    def step() -> None:
        _run_backward(_loss(model(**batch)))
        optimizer.step()
        optimizer.zero_grad()

    with MemoryTracker() as tracker, _FusedForms():
        tracker.add([*model.parameters(), *model.buffers(), *batch.values()])
        step()  # makes the optimizer's state
        tracker.reset_peak()
        step()
    return tracker.peak


def test_a_step_without_an_optimizer_keeps_no_graph():
    model, batch = roberta().eval(), text_batch()
    with MemoryTracker() as tracker, _FusedForms(), torch.no_grad():
        tracker.add([*model.parameters(), *model.buffers(), *batch.values()])
        tracker.reset_peak()
        model(**batch)
    model.train()
    estimate = simulate_training_step(model, batch, None)
    assert (estimate.peak, estimate.gradients, estimate.optimizer) == (tracker.peak, 0, 0)
    assert model.training


def test_tracker_counts_each_storage_once_and_forgets_the_dead():
    with MemoryTracker() as tracker:
        x = torch.zeros(100)
        view = x[10:]
        assert tracker.current == 400
        del x
        assert tracker.current == 400  # the view holds the storage
        del view
        assert tracker.current == 0
        assert tracker.peak == 400


def test_tracker_follows_a_storage_that_grows():
    with MemoryTracker() as tracker:
        x = torch.zeros(10)
        x.resize_(50)
        assert tracker.current == 200
        del x
    assert (tracker.current, tracker.peak) == (0, 200)


def test_tracker_resets_its_peak_to_what_is_live():
    with MemoryTracker() as tracker:
        kept = torch.zeros(10)
        torch.zeros(1000)
        tracker.reset_peak()
    assert tracker.peak == kept.nbytes


def test_what_an_op_makes_inside_itself_is_estimated_in_simulation_alone():
    hidden, weight, labels = torch.randn(8, 16), torch.randn(32, 16), torch.zeros(8, dtype=torch.long)
    peaks = []
    for estimate_inside in (False, True):
        with MemoryTracker(estimate_inside) as tracker:
            torch.ops.fastpeft.frozen_head_cross_entropy(hidden, weight, labels, None, -100, False)
        peaks.append(tracker.peak)
    assert peaks[1] - peaks[0] == bytes_of_chunk(hidden, weight) > 0


def test_mlp_equals_the_hand_count():
    estimate = simulate_training_step(Mlp(), {"x": torch.zeros(8, 16)})
    trained = 16 * 32 + 32 + 32 * 4 + 4
    assert estimate.weights == 4 * trained
    assert estimate.gradients == 4 * trained
    assert estimate.optimizer == 4 * (2 * trained + 4)  # two moments, and a step counter for each of 4 parameters
    # The peak is at the end of backward: x, the gradient behind relu, the loss and its gradient, all gradients. Where
    # relu makes that gradient, its output and the gradient before it live too, but not yet the gradients of `up`.
    at_end = 8 * 16 + 8 * 32 + 2 + trained
    at_relu = 8 * 16 + 3 * 8 * 32 + 2 + (32 * 4 + 4)
    assert estimate.peak == estimate.weights + estimate.optimizer + 4 * max(at_end, at_relu)
    assert estimate.activations == estimate.peak - estimate.weights - estimate.gradients - estimate.optimizer


@pytest.mark.parametrize("make", [Mlp, WithOp])
def test_small_modules_agree_with_real_tensors(make):
    model, batch = make(), {"x": torch.randn(8, 16)}
    assert simulate_training_step(model, batch).peak == tracked_real_step(model, batch)


@pytest.mark.parametrize("make", [roberta, bert, lora])
def test_transformers_agree_with_real_tensors(make):
    # the CPU's fused attention has no dropout; hidden dropout stays on
    model = make(attention_probs_dropout_prob=0.0)
    assert simulate_training_step(model, text_batch()).peak == tracked_real_step(model, text_batch())


def test_a_bias_of_positions_that_trains_is_counted():
    """T5's, which no fused attention of a CPU propagates to."""
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    model = T5ForConditionalGeneration(T5Config(vocab_size=50, dropout_rate=0.0, **shape))
    ids = torch.full((BATCH, TOKENS), 5)
    batch = {"input_ids": ids, "labels": ids.clone()}
    simulated = simulate_training_step(model, batch).peak
    assert simulated == pytest.approx(tracked_real_step(model, batch), rel=0.01)


@pytest.mark.parametrize("make", [roberta, bert, lora])
def test_attention_keeps_no_probabilities(make):
    estimate = simulate_training_step(make(attn_implementation="sdpa"), text_batch())
    eager = simulate_training_step(make(attn_implementation="eager"), text_batch())
    probabilities = SIZES["num_hidden_layers"] * BATCH * SIZES["num_attention_heads"] * TOKENS * TOKENS * 4
    assert eager.activations - estimate.activations > probabilities


class Grouped(nn.Module):
    """Attention of 8 heads that share 2 heads of keys and values, repeated for the product or not."""

    def __init__(self, repeat: bool) -> None:
        super().__init__()
        self.repeat = repeat
        self.query, self.key = nn.Parameter(torch.zeros(1, 8, 64, 16)), nn.Parameter(torch.zeros(1, 2, 64, 16))

    def forward(self) -> torch.Tensor:
        key = self.key.repeat_interleave(4, dim=1) if self.repeat else self.key
        attend = nn.functional.scaled_dot_product_attention
        return attend(self.query, key, key, enable_gqa=not self.repeat).sum()


@pytest.mark.parametrize(("make", "use_reentrant"), [(roberta, False), (lora, True)])
def test_activations_computed_again_agree_with_real_tensors(make, use_reentrant):
    kept = simulate_training_step(make(attention_probs_dropout_prob=0.0), text_batch())
    model = make(attention_probs_dropout_prob=0.0)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    random_state = torch.get_rng_state()
    estimate = simulate_training_step(model, text_batch())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == []
    assert estimate.peak == tracked_real_step(model, text_batch())
    assert estimate.activations < kept.activations


def test_grouped_heads_are_not_repeated():
    grouped, repeated = (simulate_training_step(Grouped(repeat), {}) for repeat in (False, True))
    assert grouped.gradients == grouped.weights
    assert grouped.peak < repeated.peak


def test_frozen_weights_have_no_gradient_and_no_state():
    estimate = simulate_training_step(lora(), text_batch())
    trained = sum(p.numel() for p in lora().parameters() if p.requires_grad)
    assert estimate.gradients == 4 * trained
    assert estimate.optimizer < 3 * estimate.gradients < estimate.weights * 3


def test_dtypes_are_stated_and_autocast_halves_activations():
    full = simulate_training_step(lora(), text_batch())
    half = simulate_training_step(lora(), text_batch(), autocast_dtype=torch.bfloat16)
    assert half.weights == full.weights
    assert half.activations < full.activations


def test_other_optimizers_are_counted_as_they_are():
    sgd = simulate_training_step(Mlp(), {"x": torch.zeros(8, 16)}, lambda params: torch.optim.SGD(params, lr=0.1))
    assert sgd.optimizer == 0


def test_the_real_model_stays_as_it_was():
    model = lora().eval()
    model.base_model.model.roberta.train()
    before = {name: (p, p.clone()) for name, p in model.named_parameters()}
    training = [module.training for module in model.modules()]
    simulate_training_step(model, text_batch())
    assert [module.training for module in model.modules()] == training
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert parameter.grad is None
        assert torch.equal(parameter, before[name][1])


def test_a_model_that_fails_is_put_back():
    model = Mlp().eval()
    with pytest.raises(TypeError):
        simulate_training_step(model, {"no_such_argument": torch.zeros(1)})
    assert not model.training
    assert type(model.up.weight.data) is torch.Tensor


def test_what_cannot_be_simulated_is_said():
    with pytest.raises(FastpeftError, match="no trained parameter"):
        simulate_training_step(Mlp().requires_grad_(False), {"x": torch.zeros(8, 16)})
    with pytest.raises(FastpeftError, match="scalar loss"):
        simulate_training_step(nn.Linear(4, 4), {"input": torch.zeros(2, 4)})
    without_labels = {name: value for name, value in text_batch().items() if name != "labels"}
    with pytest.raises(FastpeftError, match="labels"):
        simulate_training_step(roberta(), without_labels)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_peak_rss_is_what_the_kernel_says():
    torch.ones(2**20)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    assert peak_rss_mb() == pytest.approx(int(status["VmHWM"].split()[0]) / 1024, rel=0.02)


def test_peak_rss_is_unknown_without_the_module(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    assert peak_rss_mb() is None


def test_an_optimizer_in_backward_frees_gradients():
    model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(12)))  # 4 MB each, and a bucket is 16

    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x).sum()

    after, within = (
        simulate_training_step(Summed(), {"x": torch.zeros(2, 1024)}, optimizer_in_backward=b) for b in (False, True)
    )
    assert within.gradients == 0
    assert within.optimizer == after.optimizer
    assert after.peak - within.peak == pytest.approx(8 * 2**22, rel=0.01)


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_what_is_left_out_by_chance_is_counted(shape):
    class Sometimes(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).sum() if torch.rand(shape) > 0.5 else (x * self.bias).sum()

    class Always(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).sum()

    found = [simulate_training_step(kind(64, 64), {"x": torch.zeros(8, 64)}).peak for kind in (Sometimes, Always)]
    assert found[0] == pytest.approx(found[1], abs=64)  # the chance itself is some bytes


@pytest.mark.usefixtures("fresh_bitsandbytes")
def test_eight_bit_state_is_what_bitsandbytes_keeps():
    optim = pytest.importorskip("bitsandbytes.optim")
    for shape in (64, 100), (10, 10), (70_001,):
        weight = nn.Parameter(torch.randn(shape))
        optimizers = BlockwiseAdamW([weight]), optim.AdamW8bit([weight])
        weight.grad = torch.randn(shape)
        found = []
        for optimizer in optimizers:
            optimizer.step()
            state = [x for x in tree_leaves(dict(optimizer.state[weight])) if isinstance(x, torch.Tensor)]
            found.append(sum(x.nbytes for x in state if x.shape != (256,)))  # but the maps, which are shared
        assert found[0] == found[1] > 0


@pytest.mark.usefixtures("fresh_bitsandbytes")
def test_eight_bit_state_of_embeddings_is_whole_in_the_trainer(tmp_path):
    large = {**SIZES, "vocab_size": 500, "hidden_size": 64, "intermediate_size": 128}
    models = [RobertaForSequenceClassification(RobertaConfig(**large)) for _ in range(2)]
    arguments = TrainingArguments(tmp_path, optim="adamw_8bit", use_cpu=True, report_to="none")
    real = Trainer(models[0], arguments).create_optimizer()
    counted = BlockwiseAdamW(list(models[1].parameters()), embeddings_in_float(models[1]))
    found = []
    for model, optimizer in zip(models, (real, counted)):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        state = [x for x in tree_leaves(list(optimizer.state.values())) if isinstance(x, torch.Tensor)]
        found.append(sum(x.nbytes for x in state if x.shape != (256,)))
    assert found[0] == found[1] > 2 * 4 * 500 * 64, "two moments in float32 for each word"
    assert len(embeddings_in_float(models[1])) == 3


def test_dictionaries_of_parameters_that_modules_share_are_given_back() -> None:
    """As PEFT's of tokens whose embeddings are tied to the head."""
    model = nn.Module()
    model.up, model.down = Mlp(), Mlp()
    model.shared = model.up.shared = nn.ParameterDict({"delta": nn.Parameter(torch.ones(4))})
    model.forward = lambda x: model.up(x) + (model.shared["delta"] * model.up.shared["delta"]).sum()
    before = {name: id(each) for name, each in model.named_parameters(remove_duplicate=False)}
    simulate_training_step(model, {"x": torch.randn(8, 16)}, fused_adamw)
    assert {name: id(each) for name, each in model.named_parameters(remove_duplicate=False)} == before
