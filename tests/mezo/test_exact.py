"""MeZO with weights that no perturbation touches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mezo_trainer
import peft
import pytest
import torch
from mezo_networks import equal, fit, network, weights
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import RobertaForMaskedLM

from fastpeft import FastpeftError, MeZO, MeZOTrainer, SivaConfig
from fastpeft.functional import mezo_perturb, mezo_perturb_
from fastpeft.mezo import SPSA, Exact, InPlace, Journal, exact, step_seed
from fastpeft.mezo.in_place import Rule

EPS = 1e-2


def language_model(vocab_size: int = 60) -> RobertaForMaskedLM:
    return mezo_trainer.language_model(vocab_size=vocab_size).bfloat16().eval()


def loss_of(model: nn.Module, step: int = 0) -> Callable[[], Tensor]:
    ids = torch.randint(3, 30, (2, 6), generator=torch.Generator().manual_seed(step))
    return lambda: model(input_ids=ids, labels=ids.roll(1, 1)).loss


# -- what a step computes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [SPSA(), SPSA(2, "rademacher")], ids=str)
def test_steps_are_those_of_perturbed_copies(estimator: SPSA) -> None:
    """With tied weights, embeddings and stochastic rounding, bit for bit."""
    ours, theirs = language_model(), language_model()
    optimizer = MeZO(ours, lr=1e-3, eps=EPS, weight_decay=0.1, estimator=estimator, rule=Exact())
    n, noise = estimator.num_estimates, estimator.noise
    params = dict(theirs.named_parameters())
    offsets, end = [], 0
    for param in params.values():
        offsets.append(end)
        end += param.numel()

    for step in range(3):
        loss = optimizer.step(loss_of(ours, step))
        seeds = [step_seed(0, step * n + draw) for draw in range(n)]
        ids = torch.randint(3, 30, (2, 6), generator=torch.Generator().manual_seed(step))
        slopes, losses = [], []
        for seed in seeds:
            for scale in (EPS, -EPS):
                moved = {
                    name: mezo_perturb(p, at, [seed], [scale], noise=noise)
                    for (name, p), at in zip(params.items(), offsets)
                }
                with torch.no_grad():
                    out = functional_call(theirs, moved, kwargs={"input_ids": ids, "labels": ids.roll(1, 1)})
                losses.append(out.loss.item())
            slopes.append((losses[-2] - losses[-1]) / (2 * EPS) / n)
        assert loss == sum(losses) / len(losses)
        assert optimizer.projected_grad == sum(slopes)
        order = [n - 1, *range(n - 1)]
        mezo_perturb_(
            list(params.values()),
            offsets,
            [seeds[draw] for draw in order],
            [-1e-3 * slopes[draw] for draw in order],
            1e-3 * 0.1,
            noise,
            "stochastic",
        )
        assert equal(weights(ours), weights(theirs))
    assert not equal(weights(ours), weights(language_model()))


def test_groups_have_their_own_eps() -> None:
    ours, theirs = network(), network()
    for model, rule in ((ours, Exact()), (theirs, InPlace())):
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "eps": 10 * EPS}]
        optimizer = MeZO(groups, lr=1e-2, eps=EPS, rule=rule, model=model)
        for step in range(3):
            optimizer.step(fit(model, step))
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-4, atol=1e-6)


def test_siva_factors_of_a_peft_model() -> None:
    """What trains lies in small modules of its own."""
    model = peft.get_peft_model(language_model(), SivaConfig(r=2, scaling="plain")).bfloat16()
    optimizer = MeZO(model, lr=0.0, eps=0.5, rule=Exact())  # large enough to show in a loss of bfloat16
    before = weights(model)
    optimizer.step(loss_of(model))
    assert optimizer.projected_grad != 0
    assert equal(weights(model), before)


def test_a_compiled_model_that_ran_before_takes_the_same_steps() -> None:
    """Its code has no hooks, and would see theta itself."""
    slopes = []
    for compiled in (False, True):
        model: Any = network(torch.float32)
        if compiled:
            model = torch.compile(model, backend="eager")
            with torch.no_grad():
                fit(model)()
        optimizer = MeZO(model, lr=1e-2, eps=EPS, rule=Exact())
        slopes.append([(optimizer.step(fit(model, step)), optimizer.projected_grad) for step in range(4)])
    assert slopes[0] == slopes[1]
    assert all(slope for _, slope in slopes[0])
    compute = torch.compile(lambda: torch.compiler.is_compiling(), backend="eager")
    assert compute(), "the compiler is on again"


def test_stochastic_rounding_keeps_what_nearest_loses() -> None:
    """Updates of a hundredth of the spacing of bfloat16 at 1."""

    def mean_after(rounding: str) -> float:
        layer = nn.Linear(64, 32, bias=False).to(torch.bfloat16)
        nn.init.ones_(layer.weight)
        optimizer = MeZO(layer, lr=1.0, eps=2**-6, weight_decay=1e-4, rule=Exact(rounding=rounding))
        for _ in range(100):
            optimizer.step(lambda: layer(torch.ones(1, 64, dtype=torch.bfloat16)).sum() * 0)
        return layer.weight.float().mean().item()

    assert mean_after("nearest") == 1
    assert mean_after("stochastic") == pytest.approx((1 - 1e-4) ** 100, abs=5e-4)


# -- what stays as it was ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lr_0_leaves_every_bit_where_in_place_drifts(dtype: torch.dtype) -> None:
    untouched, moved = network(dtype), network(dtype)
    before = weights(untouched)
    for model, rule in ((untouched, Exact()), (moved, InPlace())):
        optimizer = MeZO(model, lr=0.0, rule=rule)
        for step in range(200):
            optimizer.step(fit(model, step))
    assert equal(weights(untouched), before)
    assert not equal(weights(moved), before)


@pytest.mark.parametrize("call", [1, 3])
def test_an_exception_in_the_forward_puts_the_parameters_back(call: int) -> None:
    model = language_model()
    before, names = weights(model), list(model.state_dict())
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt

    model.roberta.encoder.layer[1].output.dense.register_forward_pre_hook(fail)
    optimizer = MeZO(model, lr=0.1, rule=Exact())
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(loss_of(model))
    assert all(
        isinstance(p, nn.Parameter) for module in model.modules() for p in module._parameters.values() if p is not None
    )
    assert equal(weights(model), before)
    assert list(model.state_dict()) == names
    assert not any(module._forward_hooks for module in model.modules())
    optimizer.step(loss_of(model))


def test_the_scratch_is_as_large_as_the_largest_module_reached() -> None:
    """Of 5,000 words only those of the batch are perturbed, where nothing else reads their embeddings."""
    model = language_model(vocab_size=5_000)
    model.lm_head.requires_grad_(False)
    model.lm_head.decoder.weight = nn.Parameter(model.lm_head.decoder.weight.detach().clone(), requires_grad=False)
    model.roberta.embeddings.word_embeddings.weight.requires_grad_(True)
    optimizer = MeZO(model, lr=0.0, eps=EPS, rule=Exact())
    optimizer.step(loss_of(model))
    largest = (32 * 16 + 32) * 2  # bytes of a feed-forward layer, with its bias, in bfloat16
    assert largest <= optimizer.weights.scratch_bytes <= largest + 128


def test_rows_of_embeddings_are_perturbed_as_the_whole_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """By which a GPU has the same bits."""
    losses = []
    for by_rows in (True, False):
        model = language_model()
        if not by_rows:
            monkeypatch.setattr(exact, "_by_rows", lambda module: False)
        optimizer = MeZO(model, lr=1e-3, eps=EPS, rule=Exact())
        losses.append([optimizer.step(loss_of(model, step)) for step in range(2)])
    assert losses[0] == losses[1]


# -- the journal and the Trainer ---------------------------------------------------------------------------------------


def test_a_journal_repeats_stochastic_rounding(tmp_path: Path) -> None:
    model, again = language_model(), language_model()
    optimizer = MeZO(model, lr=1e-3, eps=EPS, weight_decay=0.1, estimator=SPSA(2), rule=Exact(on_nonfinite="skip"))
    optimizer.record(tmp_path / "run")
    for step in range(4):
        optimizer.step(loss_of(model, step) if step != 2 else lambda: float("nan"))
    Journal.open(tmp_path / "run").replay(again)
    assert equal(weights(again), weights(model))


def test_the_trainer(tmp_path: Path) -> None:
    arguments = mezo_trainer.config(tmp_path, restore="exact", learning_rate=0.0, eps=EPS, weight_decay=0.1)
    trainer = MeZOTrainer(language_model(), arguments, train_dataset=mezo_trainer.rows())
    before = weights(trainer.model)
    trainer.train()
    assert equal(weights(trainer.model), before)
    assert any(entry.get("projected_grad") for entry in trainer.state.log_history)


# -- refusals ----------------------------------------------------------------------------------------------------------


class Borrowing(nn.Module):
    """Reads the weight of a layer without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.first(x), self.second.weight)


def test_a_parameter_read_outside_of_its_module_is_refused_by_name() -> None:
    model = Borrowing()
    before = copy.deepcopy(weights(model))
    optimizer = MeZO(model, lr=0.1, rule=Exact())
    with pytest.raises(FastpeftError, match=r"'second\.weight' to what reads it outside"):
        optimizer.step(lambda: model(torch.ones(2, 4)).sum())
    assert equal(weights(model), before)
    model.second.requires_grad_(False)
    MeZO(model, lr=0.1, rule=Exact()).step(lambda: model(torch.ones(2, 4)).sum())


@pytest.mark.parametrize("nothing_else", [True, False])
def test_a_parameter_read_outside_of_its_module_later_is_refused(nothing_else: bool) -> None:
    """At the step after one that found a slope of 0, or at the hundredth."""
    model, x = Borrowing(), torch.ones(2, 4)
    read = [model.second]
    model.first.requires_grad_(not nothing_else)
    optimizer = MeZO(model, lr=0.0, rule=Exact())

    def loss() -> Tensor:
        return read[0](model.first(x)).sum() if read else model(x).sum()

    def train(steps: int) -> None:
        for _ in range(steps):
            optimizer.step(loss)

    train(1)
    read.clear()
    with pytest.raises(FastpeftError, match=r"'second\.weight' to what reads it outside"):
        train(100)
    assert optimizer.steps_done == (2 if nothing_else else 100)


def test_a_frozen_weight_in_the_memory_of_a_trained_one_can_be_read() -> None:
    memory = torch.randn(32)
    model = Borrowing()
    model.first.weight = nn.Parameter(memory[:16].view(4, 4))
    model.second.weight = nn.Parameter(memory[16:].view(4, 4), requires_grad=False)
    model.second.bias.requires_grad_(False)
    MeZO(model, lr=0.1, rule=Exact()).step(lambda: model(torch.ones(2, 4)).sum())
    model.second.weight = nn.Parameter(memory[15:31].view(4, 4), requires_grad=False)
    with pytest.raises(FastpeftError, match=r"'first\.weight' to what reads it outside"):
        MeZO(model, lr=0.1, rule=Exact()).step(lambda: model(torch.ones(2, 4)).sum())


class Latents(nn.Module):
    """A parameter for each row, as of Perceiver: a view of it, which a module reads after others have run."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 1)
        self.latents = nn.Module()
        self.latents.weight = nn.Parameter(torch.randn(4, 8))
        self.latents.forward = lambda rows: {"latents": self.latents.weight.expand(rows, -1, -1)}

    def forward(self, x: Tensor) -> Tensor:
        latents = self.latents(len(x))["latents"]
        x = self.first(x)
        return self.last(F.softmax(latents @ x.mT, dim=-1) @ x).mean()


@pytest.mark.parametrize("larger_before", [False, True])
def test_what_a_module_returns_of_its_weight_outlives_its_forward(larger_before: bool) -> None:
    x = torch.randn(3, 5, 8)

    def slope(rule: Rule) -> float | None:
        model = Latents()
        optimizer = MeZO(model, lr=1e-3, eps=EPS, rule=rule)
        optimizer.step(lambda: model(model.first(x) if larger_before else x))
        return optimizer.projected_grad

    assert slope(Exact()) == pytest.approx(slope(InPlace()), rel=1e-3)


def test_rows_without_their_padding_pass_the_watch() -> None:
    """torch's encoder makes a nested tensor of padded rows, in evaluation mode."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x, padding = torch.randn(2, 4, 8), torch.tensor([[False] * 4, [False] * 2 + [True] * 2])

    def loss_of_a_step(rule: Rule) -> float | None:
        model = copy.deepcopy(encoder)
        optimizer = MeZO(model, lr=1e-3, rule=rule)
        return optimizer.step(lambda: model(x, src_key_padding_mask=padding).square().mean())

    with pytest.raises(FastpeftError, match=r"out_proj\.weight' to what reads it outside"):
        loss_of_a_step(Exact())
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_("out_proj" not in name)
    assert loss_of_a_step(Exact()) == pytest.approx(loss_of_a_step(InPlace()), rel=1e-5)


def test_exact_needs_the_model() -> None:
    model = network(torch.float32)
    with pytest.raises(FastpeftError, match="needs the model"):
        MeZO(model.parameters(), lr=0.1, rule=Exact())
    with pytest.raises(FastpeftError, match="in no module of the model"):
        MeZO([nn.Parameter(torch.zeros(3))], lr=0.1, rule=Exact(), model=model)
