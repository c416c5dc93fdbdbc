"""MeZO in the Trainer: what a run computes and logs, what callbacks see, and what is refused."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from mezo_networks import equal, weights
from mezo_trainer import TINY, config, language_model, logged, rows
from samples import Interrupt
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    EarlyStoppingCallback,
    RobertaConfig,
    RobertaForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from fastpeft import FastpeftError, MeZO, MeZOConfig, MeZOTrainer, SivaConfig, fuse_head
from fastpeft.mezo import FZOO, SPSA, Exact, in_place
from fastpeft.ops.fused_head import FusedLinear


def classifier() -> RobertaForSequenceClassification:
    torch.manual_seed(0)
    return RobertaForSequenceClassification(RobertaConfig(**TINY))


class Recorder(MeZOTrainer):
    """Keeps the batches whose losses were asked for, and whether dropout was on or a graph was built."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.is_in_train:
            self.batches = [*getattr(self, "batches", []), inputs["input_ids"]]
            self.impure = getattr(self, "impure", False) or model.training or torch.is_grad_enabled()
        return loss


# -- what a run computes -----------------------------------------------------------------------------------------------


def test_a_run_is_the_loop_that_one_would_write(tmp_path: Path) -> None:
    trainer = Recorder(language_model(), config(tmp_path, learning_rate=0.01, seed=5), train_dataset=rows())
    trainer.train()
    assert not trainer.impure
    first, *rest = trainer.batches
    steps = [first, *rest[2::2]]  # three losses at the first step, then two a step
    assert len(trainer.batches) == 3 + 2 * 3
    model = fuse_head(language_model())  # as the trainer does
    optimizer = MeZO(model, lr=0.01, seed=5)
    losses, slopes = [], []
    for ids in steps:
        losses.append(optimizer.step(lambda ids=ids: model(input_ids=ids, labels=ids.roll(1, dims=1)).loss))
        slopes.append(optimizer.projected_grad)
    assert equal(weights(model), weights(trainer.model))
    assert logged(trainer, "projected_grad") == slopes
    assert logged(trainer, "loss") == pytest.approx(losses, rel=1e-6)
    assert logged(trainer, "learning_rate") == [0.01] * 4
    assert not logged(trainer, "grad_norm")
    assert all(p.grad is None for p in trainer.model.parameters())


def test_micro_batches_are_one_batch_under_one_noise(tmp_path: Path) -> None:
    """Also where the step at the end of an epoch has fewer of them: 20 rows are 2 steps of 8 and one of 4."""

    def run(**changes: Any) -> MeZOTrainer:
        trainer = MeZOTrainer(language_model().double(), config(tmp_path, **changes), train_dataset=rows())
        trainer.train()
        return trainer

    whole = run(per_device_train_batch_size=8)
    parts = run(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert logged(parts, "projected_grad") == pytest.approx(logged(whole, "projected_grad"), rel=1e-8)
    assert logged(parts, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-5)  # kept in float32
    for one, other in zip(weights(parts.model), weights(whole.model)):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_a_loss_function_of_ones_own_divides_by_the_items_of_the_step(tmp_path: Path) -> None:
    def summed(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        return F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum") / num_items_in_batch

    def run(**options: Any) -> MeZOTrainer:
        arguments = config(tmp_path, gradient_accumulation_steps=2, max_steps=2)
        trainer = MeZOTrainer(language_model().double(), arguments, train_dataset=rows(), **options)
        trainer.train()
        return trainer

    ours, theirs = run(), run(compute_loss_func=summed)
    assert logged(theirs, "projected_grad") == pytest.approx(logged(ours, "projected_grad"), rel=1e-6)


def test_a_loss_may_be_a_number(tmp_path: Path) -> None:
    """As an error rate is, which has no gradient."""

    class Rate(MeZOTrainer):
        made: type = float

        def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
            outputs = model(input_ids=inputs["input_ids"]).logits
            return self.made((outputs.argmax(-1) != inputs["labels"]).double().mean())

    found = {}
    for made in (float, torch.as_tensor):
        trainer = Rate(language_model(), config(tmp_path, learning_rate=0.01), train_dataset=rows())
        trainer.made = made
        trainer.train()
        found[made] = weights(trainer.model), logged(trainer, "loss")
    assert equal(found[float][0], found[torch.as_tensor][0])
    assert found[float][1] == pytest.approx(found[torch.as_tensor][1])


def test_micro_batches_of_a_step_that_was_not_made_are_dropped(tmp_path: Path) -> None:
    """A callback ends the first epoch between the two micro-batches of its first step."""

    class EndFirstEpoch(TrainerCallback):
        done = False

        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_epoch_stop, self.done = not self.done, True

    trainer = Recorder(
        language_model(),
        config(tmp_path, gradient_accumulation_steps=2, max_steps=4),
        train_dataset=rows(),
        callbacks=[EndFirstEpoch()],
    )
    trainer.train()
    assert trainer.state.global_step == 3  # the second epoch: steps of 2, 2 and 1 micro-batches
    assert len(trainer.batches) == 3 * 2 + 2 * 2 + 2 * 1


def test_weight_decay_spares_biases_and_norms(tmp_path: Path) -> None:
    trainer = MeZOTrainer(language_model(), config(tmp_path, weight_decay=0.1, eps=1e-2), train_dataset=rows())
    trainer.train()
    decayed, spared = trainer.mezo.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert decayed["eps"] == spared["eps"] == 1e-2
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in spared["params"]} == {1}


@pytest.mark.long(but=".dense.weight-0.1")
@pytest.mark.parametrize(("ending", "decay"), [(".bias", 0.0), (".dense.weight", 0.1)])
def test_weight_decay_where_all_or_none_of_what_trains_decays(tmp_path: Path, ending: str, decay: float) -> None:
    model = language_model()
    for name, param in model.named_parameters():
        param.requires_grad_(name.endswith(ending))
    trainer = MeZOTrainer(model, config(tmp_path, weight_decay=0.1), train_dataset=rows())
    trainer.train()
    assert [group["weight_decay"] for group in trainer.mezo.param_groups] == [decay]


@pytest.mark.parametrize(("restore", "expected"), [("exact", 1), ("in_place", 0)])
def test_a_loss_in_half_precision_brings_one_warning(
    tmp_path: Path, restore: str, expected: int, caplog: pytest.LogCaptureFixture
) -> None:
    """In place the head is fused, and its loss is in float32."""
    model = language_model().to(torch.bfloat16)
    with caplog.at_level(logging.WARNING, logger="fastpeft"):
        MeZOTrainer(model, config(tmp_path, restore=restore), train_dataset=rows()).train()
    assert sum("the loss is in bfloat16" in message for message in caplog.messages) == expected


def test_a_model_that_each_training_makes_anew_has_its_head_fused(tmp_path: Path) -> None:
    trainer = MeZOTrainer(model_init=lambda: language_model(), args=config(tmp_path, max_steps=1), train_dataset=rows())
    first = trainer.model
    trainer.train()
    assert trainer.model is not first
    assert type(trainer.model.lm_head.decoder) is FusedLinear


def test_bf16_autocast_trains_float32_weights(tmp_path: Path) -> None:
    trainer = MeZOTrainer(language_model(), config(tmp_path, bf16=True, eps=1e-2), train_dataset=rows())
    before = weights(trainer.model)
    trainer.train()
    assert not any(torch.equal(a, b) for a, b in zip(before, weights(trainer.model)))
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert all(logged(trainer, "projected_grad"))


def test_siva_factors_train_through_peft(tmp_path: Path) -> None:
    model = peft.get_peft_model(language_model(), SivaConfig(r=2))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    MeZOTrainer(model, config(tmp_path, learning_rate=0.1), train_dataset=rows()).train()
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert changed == [name for name, p in model.named_parameters() if p.requires_grad]


# -- callbacks and settings --------------------------------------------------------------------------------------------


def test_early_stopping_ends_a_run_that_gets_no_better(tmp_path: Path) -> None:
    arguments = config(
        tmp_path,
        learning_rate=0.0,
        restore="exact",
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    stopping = EarlyStoppingCallback(early_stopping_patience=2)
    trainer = MeZOTrainer(language_model(), arguments, train_dataset=rows(), eval_dataset=rows(4), callbacks=[stopping])
    trainer.train()
    assert trainer.state.global_step == 3
    assert trainer.state.best_global_step == 1


def test_the_best_model_is_kept(tmp_path: Path) -> None:
    arguments = config(
        tmp_path,
        learning_rate=0.3,  # so large that the loss rises at times
        max_steps=6,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    trainer = MeZOTrainer(language_model(), arguments, train_dataset=rows(), eval_dataset=rows(4))
    trainer.train()
    losses = logged(trainer, "eval_loss")
    assert trainer.evaluate()["eval_loss"] == min(losses) < losses[-1]


def test_callbacks_evaluation_and_saving_see_restored_weights(tmp_path: Path) -> None:
    seen = []

    class Look(TrainerCallback):
        """`state_dict` refuses while weights are perturbed."""

        def _look(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            seen.append(optimizer.state_dict()["steps_done"])

        on_train_begin = on_step_begin = on_substep_end = on_optimizer_step = on_step_end = _look
        on_prediction_step = on_evaluate = on_save = on_log = on_epoch_end = on_train_end = _look

    arguments = config(
        tmp_path,
        gradient_accumulation_steps=2,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
    )
    MeZOTrainer(language_model(), arguments, train_dataset=rows(), eval_dataset=rows(4), callbacks=[Look()]).train()
    assert set(seen) == {0, 1, 2}


def test_the_end_of_a_step_is_left_to_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    perturb = in_place.mezo_perturb_

    def count(params: list[Tensor], offsets: list[int], seeds: list[int], *args: Any, **kwargs: Any) -> None:
        passes.append(len(seeds))
        perturb(params, offsets, seeds, *args, **kwargs)

    monkeypatch.setattr(in_place, "mezo_perturb_", count)
    MeZOTrainer(language_model(), config(tmp_path), train_dataset=rows()).train()
    first, second, later, last = 1, 1, [2, 1], 1
    assert passes[1:] == [first, second, *later * 3, last]  # after the check of the parameters, which adds nothing


def test_a_callback_that_looks_at_weights_finds_those_of_the_step(tmp_path: Path) -> None:
    seen: dict[str, list[list[Tensor]]] = {}

    class Look(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            seen.setdefault("begin", []).append(weights(model))

        def on_log(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            seen.setdefault("log", []).append(weights(model))

    class Keep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            seen.setdefault("end", []).append(weights(model))

    for callback in (Look(), Keep()):
        MeZOTrainer(language_model(), config(tmp_path), train_dataset=rows(), callbacks=[callback]).train()
    assert all(equal(one, other) for one, other in zip(seen["begin"][1:], seen["end"]))
    assert all(equal(one, other) for one, other in zip(seen["log"], seen["end"]))


@pytest.mark.long(but="on_train_end")
@pytest.mark.parametrize("event", ["on_train_end", "on_log"])
def test_a_tracker_that_saves_the_model_finds_settled_weights(tmp_path: Path, event: str) -> None:
    """As WandbCallback and DVCLiveCallback do, which are of transformers."""
    seen: list[list[Tensor]] = []

    class Tracker(TrainerCallback):
        def __init__(self) -> None:
            setattr(self, event, lambda *args, model, optimizer, **kwargs: self._save(model, optimizer))

        def _save(self, model: nn.Module, optimizer: Any) -> None:
            seen.append(weights(model))
            optimizer.optimizer.settle()  # inside accelerate's wrapper
            assert equal(seen[-1], weights(model))

    Tracker.__module__ = "transformers.integrations.integration_utils"
    MeZOTrainer(language_model(), config(tmp_path, eps=1e-2), train_dataset=rows(), callbacks=[Tracker()]).train()
    assert seen


def test_the_settings_of_the_optimizer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(MeZOTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            return loss * math.nan if self.is_in_train and self.state.global_step == 2 else loss

    arguments = config(
        tmp_path, estimator="fzoo", num_estimates=3, noise="rademacher", on_nonfinite="skip", learning_rate=1e-6
    )
    trainer = Failing(language_model(), arguments, train_dataset=rows())
    trainer.train()
    mezo = trainer.mezo
    assert mezo.estimator == FZOO(3, "rademacher")
    assert mezo.steps_done == 4
    assert [math.isnan(g) for g in logged(trainer, "projected_grad")] == [False, False, True, False]
    losses = logged(trainer, "loss")
    assert losses[2] == losses[1]
    assert any("is nan at step 3" in message for message in caplog.messages)


def test_an_interrupt_between_the_halves_of_a_step_leaves_restored_weights(tmp_path: Path) -> None:
    trainer = MeZOTrainer(
        language_model(), config(tmp_path), train_dataset=rows(), callbacks=[Interrupt(0, "on_pre_optimizer_step")]
    )
    before = weights(trainer.model)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    for one, other in zip(before, weights(trainer.model)):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_an_optimizer_of_ones_own(tmp_path: Path) -> None:
    model = language_model()
    optimizer = MeZO(model.lm_head.parameters(), lr=0.1, estimator=SPSA(noise="rademacher"), rule=Exact(), model=model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    MeZOTrainer(model, config(tmp_path), train_dataset=rows(), optimizers=(optimizer, None)).train()
    assert optimizer.steps_done == 4
    changed = {id(p) for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {id(p) for p in model.lm_head.parameters()}


# -- warnings and refusals ---------------------------------------------------------------------------------------------


def test_a_model_that_predicts_no_words_brings_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def warnings(model: nn.Module) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="fastpeft"):
            MeZOTrainer(model, config(tmp_path))
        return [record.getMessage() for record in caplog.records if record.name.startswith("fastpeft")]

    (message,) = warnings(classifier())
    assert "RobertaForSequenceClassification, which has no LM head" in message
    assert "PromptModel" in message
    assert warnings(language_model()) == []
    assert warnings(peft.get_peft_model(language_model(), SivaConfig(r=2))) == []


def test_a_loss_that_is_not_finite_names_step_and_seed(tmp_path: Path) -> None:
    class Failing(MeZOTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            return loss if self.state.global_step < 2 else loss * math.nan

    trainer = Failing(language_model(), config(tmp_path), train_dataset=rows())
    with pytest.raises(FastpeftError, match=r"is nan at step 3 \(noise seed \d+\)"):
        trainer.train()
    assert trainer.state.global_step == 2


def test_the_recipe_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where a Trainer without arguments makes its folder
    arguments = MeZOConfig(str(tmp_path))
    assert (arguments.learning_rate, arguments.eps, arguments.train_batch_size) == (1e-6, 1e-3, 16)
    assert arguments.lr_scheduler_type == "constant"
    assert MeZOTrainer(language_model()).args.eps == 1e-3


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FastpeftError, match="fp16=True"):
        config(tmp_path, fp16=True)
    with pytest.raises(FastpeftError, match="neftune_noise_alpha is for embeddings in training mode"):
        config(tmp_path, neftune_noise_alpha=5.0)
    with pytest.raises(FastpeftError, match="got a TrainingArguments"):
        MeZOTrainer(language_model(), TrainingArguments(str(tmp_path)))
    model = language_model()
    with pytest.raises(FastpeftError, match="the optimizer is SGD"):
        MeZOTrainer(model, config(tmp_path), optimizers=(torch.optim.SGD(model.parameters()), None))
    with pytest.raises(FastpeftError, match="makes its optimizer by the MeZOConfig"):
        MeZOTrainer(model, config(tmp_path), optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 1.0}))
    for changes, message in (({"learning_rate": -1.0}, r"lr is -1\.0"), ({"eps": 0.0}, r"eps is 0\.0")):
        with pytest.raises(FastpeftError, match=message):
            MeZOTrainer(model, config(tmp_path, **changes), train_dataset=rows()).train()
    with pytest.raises(FastpeftError, match="nothing to train"):
        MeZOTrainer(model.requires_grad_(False), config(tmp_path), train_dataset=rows()).train()
    create = Trainer.create_accelerator_and_postprocess
    for other, name in (("is_fsdp_enabled", "FSDP"), ("is_deepspeed_enabled", "DeepSpeed")):
        asked = lambda self, other=other: (create(self), setattr(self, other, True))  # noqa: E731
        monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", asked)
        with pytest.raises(FastpeftError, match=f"got {name}, .*fully_shard"):
            MeZOTrainer(model, config(tmp_path))
