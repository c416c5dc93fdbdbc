"""MeZO in the Trainer: what a run computes, logs, saves and resumes, and what it refuses."""

from __future__ import annotations

import logging
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    EarlyStoppingCallback,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from fastpeft import FastpeftError, MeZO, MeZOConfig, MeZOTrainer, SivaConfig
from fastpeft.mezo import Journal, perturbing
from fastpeft.mezo.resuming import Checkpoint, Start, where_to_begin

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH = 6
TINY = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 20,
    "initializer_range": 0.2,
}


def language_model() -> RobertaForMaskedLM:
    torch.manual_seed(0)
    return RobertaForMaskedLM(RobertaConfig(**TINY))


def classifier() -> RobertaForSequenceClassification:
    torch.manual_seed(0)
    return RobertaForSequenceClassification(RobertaConfig(**TINY))


def rows(count: int = 20) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 30, (count, LENGTH), generator=generator)
    return [{"input_ids": row, "labels": row.roll(1)} for row in ids]


def config(folder: Path, **changes: Any) -> MeZOConfig:
    options: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return MeZOConfig(str(folder), **{**options, **changes})


class Recorder(MeZOTrainer):
    """Keeps the batches whose losses were asked for, and whether dropout was on or a graph was built."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.is_in_train:
            self.batches = [*getattr(self, "batches", []), inputs["input_ids"]]
            self.impure = getattr(self, "impure", False) or model.training or torch.is_grad_enabled()
        return loss


class Interrupt(TrainerCallback):
    """Ends a run as a signal would, at `step`, when `event` comes."""

    def __init__(self, event: str, step: int) -> None:
        self.step = step
        setattr(self, event, self._interrupt)

    def _interrupt(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def logged(trainer: MeZOTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# -- what a run computes -----------------------------------------------------------------------------------------------


def test_a_run_is_the_loop_that_one_would_write(tmp_path: Path) -> None:
    trainer = Recorder(language_model(), config(tmp_path, learning_rate=0.01, seed=5), train_dataset=rows())
    trainer.train()
    assert not trainer.impure
    first, *rest = trainer.batches
    steps = [first, *rest[2::2]]  # three losses at the first step, then two a step
    assert len(trainer.batches) == 3 + 2 * 3
    model = language_model()
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


@pytest.mark.parametrize(("ending", "decay"), [(".bias", 0.0), (".dense.weight", 0.1)])
def test_weight_decay_where_all_or_none_of_what_trains_decays(tmp_path: Path, ending: str, decay: float) -> None:
    model = language_model()
    for name, param in model.named_parameters():
        param.requires_grad_(name.endswith(ending))
    trainer = MeZOTrainer(model, config(tmp_path, weight_decay=0.1), train_dataset=rows())
    trainer.train()
    assert [group["weight_decay"] for group in trainer.mezo.param_groups] == [decay]


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


# -- checkpoints and callbacks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("interrupted_at", [3, 5])
def test_a_resumed_run_ends_with_the_bits_of_the_uninterrupted_one(tmp_path: Path, interrupted_at: int) -> None:
    """Through the middle and across the end of an epoch of three steps."""

    def trainer(folder: str, *callbacks: TrainerCallback) -> MeZOTrainer:
        arguments = config(
            tmp_path / folder,
            max_steps=7,
            learning_rate=0.02,
            lr_scheduler_type="linear",
            weight_decay=0.1,
            gradient_accumulation_steps=2,
            save_strategy="steps",
            save_steps=interrupted_at - 1,
            eval_strategy="steps",
            eval_steps=2,
            seed=3,
        )
        return MeZOTrainer(
            language_model(), arguments, train_dataset=rows(), eval_dataset=rows(4), callbacks=list(callbacks)
        )

    whole = trainer("whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer("broken", Interrupt("on_step_end", interrupted_at)).train()
    resumed = trainer("broken")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.mezo.steps_done == 7
    assert equal(weights(resumed.model), weights(whole.model))
    for name in ("projected_grad", "learning_rate", "eval_loss"):
        assert logged(resumed, name) == logged(whole, name)


def killed(folder: Path, step: int, **changes: Any) -> None:
    """A run with a journal that ends in step number `step`, after its update and before anything that follows it."""
    with pytest.raises(KeyboardInterrupt):
        journaled(folder, Interrupt("on_optimizer_step", step - 1), **changes).train()


def journaled(folder: Path, *callbacks: TrainerCallback, **changes: Any) -> MeZOTrainer:
    options: dict[str, Any] = {
        "max_steps": 7,
        "learning_rate": 0.02,
        "eps": 0.02,  # which moves weights in bfloat16
        "lr_scheduler_type": "linear",
        "weight_decay": 0.1,
        "gradient_accumulation_steps": 2,
        "journal": True,
        "seed": 3,
    }
    arguments = config(folder, **{**options, **changes})
    model = language_model().to(torch.bfloat16)
    return MeZOTrainer(model, arguments, train_dataset=rows(), eval_dataset=rows(4), callbacks=list(callbacks))


def tail(trainer: MeZOTrainer, name: str, steps: int) -> list[float]:
    return logged(trainer, name)[-steps:]


@pytest.mark.parametrize("killed_at", [1, 2, 5, 7])
def test_a_run_goes_on_from_its_journal_alone(tmp_path: Path, killed_at: int) -> None:
    """Without a single checkpoint, to the bits of the uninterrupted run."""
    whole = journaled(tmp_path / "whole")
    whole.train()
    killed(tmp_path / "broken", killed_at)
    assert Journal.open(tmp_path / "broken" / "mezo.journal").steps == killed_at
    resumed = journaled(tmp_path / "broken")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.mezo.steps_done == resumed.state.global_step == 7
    assert equal(weights(resumed.model), weights(whole.model))
    for name in ("projected_grad", "learning_rate", "loss"):
        assert logged(resumed, name) == tail(whole, name, 8 - killed_at)
    both = [(tmp_path / name / "mezo.journal").read_bytes() for name in ("whole", "broken")]
    assert both[0] == both[1]
    assert sorted(path.name for path in (tmp_path / "broken").iterdir()) == ["mezo.journal"]


@pytest.mark.parametrize("save_weights", [True, False])
def test_the_journal_leads_on_from_the_newest_checkpoint(tmp_path: Path, save_weights: bool) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "save_weights": save_weights}
    whole = journaled(tmp_path / "whole", **saving)
    whole.train()
    killed(tmp_path / "broken", 6, **saving)
    checkpoint = tmp_path / "broken" / "checkpoint-4"
    assert (checkpoint / "model.safetensors").exists() == save_weights
    assert (checkpoint / "mezo.journal").exists() != save_weights
    resumed = journaled(tmp_path / "broken", **saving)
    resumed.train(resume_from_checkpoint=True)
    assert equal(weights(resumed.model), weights(whole.model))
    assert logged(resumed, "projected_grad")[-2:] == tail(whole, "projected_grad", 2)

    again = journaled(tmp_path / "broken", **saving)  # from the checkpoint itself
    again.train(resume_from_checkpoint=str(checkpoint))
    assert equal(weights(again.model), weights(whole.model))
    assert logged(again, "projected_grad") == logged(whole, "projected_grad")
    base = language_model().to(torch.bfloat16)
    Journal.open(tmp_path / "broken" / "mezo.journal").replay(base)
    assert equal(weights(base), weights(whole.model))


_KILLED = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
from test_trainer import journaled
torch.set_num_threads(1)
run = journaled(Path({folder!r}), **{options!r})
run.train(resume_from_checkpoint=Path({folder!r}, "mezo.journal").exists())
"""


@pytest.mark.kill
@pytest.mark.parametrize("save_weights", [True, False])
def test_a_killed_run_ends_with_the_bits_of_the_uninterrupted_one(tmp_path: Path, save_weights: bool) -> None:
    """Killed twice, wherever it was: in a step, in a write, while saving."""
    options = {"save_strategy": "steps", "save_steps": 3, "save_weights": save_weights, "save_total_limit": 2}
    options |= {"max_steps": 80, "logging_steps": 50}
    whole = journaled(tmp_path / "whole", **options)
    whole.train()
    folder = tmp_path / "broken"
    script = _KILLED.format(tests=str(Path(__file__).parent), folder=str(folder), options=options)
    record = 44  # bytes, with the two groups of a run with weight decay
    header = (tmp_path / "whole" / "mezo.journal").stat().st_size - 80 * record
    for steps in (17, 41):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (
            (folder / "mezo.journal").exists() and (folder / "mezo.journal").stat().st_size >= header + steps * record
        ):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL
    resumed = journaled(folder, **options)
    resumed.train(resume_from_checkpoint=True)
    assert equal(weights(resumed.model), weights(whole.model))
    both = [(tmp_path / name / "mezo.journal").read_bytes() for name in ("whole", "broken")]
    assert both[0] == both[1]


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = journaled(tmp_path / "whole", **saving)
    whole.train()
    killed(tmp_path / "broken", 5, **saving)
    (tmp_path / "broken" / "checkpoint-4" / "trainer_state.json").unlink()
    resumed = journaled(tmp_path / "broken", **saving)
    resumed.train(resume_from_checkpoint=True)
    assert equal(weights(resumed.model), weights(whole.model))


def test_a_run_that_goes_on_from_its_journal_alone_saves_checkpoints(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 4}
    whole = journaled(tmp_path / "whole", **saving)
    whole.train()
    killed(tmp_path / "broken", 3, **saving)
    journaled(tmp_path / "broken", **saving).train(resume_from_checkpoint=True)
    again = journaled(tmp_path / "broken", **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-4"))
    assert equal(weights(again.model), weights(whole.model))


def test_a_journal_can_begin_at_a_checkpoint(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = journaled(tmp_path / "whole", **saving)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        journaled(tmp_path / "late", Interrupt("on_step_end", 4), journal=False, **saving).train()
    with pytest.raises(KeyboardInterrupt):
        journaled(tmp_path / "late", Interrupt("on_step_end", 5), **saving).train(resume_from_checkpoint=True)
    journal = Journal.open(tmp_path / "late" / "mezo.journal")
    assert (journal.header["first_step"], journal.steps) == (3, 5)
    resumed = journaled(tmp_path / "late", **saving)
    resumed.train(resume_from_checkpoint=True)
    assert equal(weights(resumed.model), weights(whole.model))


@pytest.mark.parametrize(
    ("saved", "given", "reach", "expected"),  # checkpoints as steps, negative where they hold the journal
    [
        ([], None, (0, 5), (None, 4, None)),
        ([], None, (0, 0), (None, 0, None)),
        ([2, 4], None, (0, 6), (4, 5, 4)),
        ([2, 4], None, (0, 5), (4, 4, 4)),
        ([2, 4], None, (0, 4), (4, 4, 4)),
        ([2, 4], None, None, (4, 4, 4)),
        ([2, 4, 6, 8], None, (0, 3), (2, 2, 2)),
        ([2, 6, 8], None, (4, 5), (None, 4, None)),
        ([-2, -4], None, (0, 6), (None, 5, -4)),
        ([2, -4], None, (2, 6), (2, 5, -4)),
        ([2, -4], None, (0, 4), (2, 4, -4)),
        ([2, 4, 6], 4, (0, 6), (4, 4, 4)),
        ([2, 4, 6], 4, None, (4, 4, 4)),
        ([2, -4, 6], -4, (0, 6), (2, 4, -4)),
        ([-2, -4], -4, (0, 6), (None, 4, -4)),
    ],
    ids=str,
)
def test_where_a_resumed_run_begins(
    saved: list[int], given: int | None, reach: tuple[int, int] | None, expected: tuple[int | None, int, int | None]
) -> None:
    """Weights, steps made, checkpoint with the log."""

    def checkpoint(step: int | None) -> Any:
        return None if step is None else Checkpoint(Path(str(abs(step))), abs(step), step > 0)

    start = where_to_begin([checkpoint(step) for step in saved], checkpoint(given), reach)
    assert start == Start(checkpoint(expected[0]), expected[1], checkpoint(expected[2]))


def test_a_run_that_went_back_and_was_ended_at_once_can_still_go_on(tmp_path: Path) -> None:
    """From all that it had before its first new step, and after it from what belongs to that."""
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    whole = journaled(tmp_path, **saving)
    whole.train()
    file = tmp_path / "mezo.journal"
    content = file.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        journaled(tmp_path, Interrupt("on_step_begin", 2), **saving).train(str(tmp_path / "checkpoint-2"))
    assert file.read_bytes() == content
    with pytest.raises(KeyboardInterrupt):
        journaled(tmp_path, Interrupt("on_optimizer_step", 2), **saving).train(str(tmp_path / "checkpoint-2"))
    assert Journal.open(file).steps == 3
    resumed = journaled(tmp_path, **saving)
    resumed.train(resume_from_checkpoint=True)
    assert equal(weights(resumed.model), weights(whole.model))
    assert file.read_bytes() == content


def test_a_checkpoint_after_a_dropped_estimate(tmp_path: Path) -> None:
    """Estimates that are dropped before step 3 leave their roundings in the weights that are saved then."""

    class Drop(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 2:
                mezo = whole.mezo
                for _ in range(3):
                    mezo.estimate(lambda: model(input_ids=rows()[0]["input_ids"][None]).logits.float().mean())
                    mezo.settle()
                whole._save_checkpoint(model, trial=None)

    saving = {"save_strategy": "no", "gradient_accumulation_steps": 1, "max_steps": 5, "lr_scheduler_type": "constant"}
    whole = journaled(tmp_path, Drop(), **saving)
    whole.train()
    assert len(list(Journal.open(tmp_path / "mezo.journal").records())) == 5 + 3
    resumed = journaled(tmp_path, **saving)
    resumed.train(resume_from_checkpoint=True)
    assert equal(weights(resumed.model), weights(whole.model))


def test_the_advice_for_a_damaged_journal(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    whole = journaled(tmp_path, **saving)
    whole.train()
    file = tmp_path / "mezo.journal"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    for resume in (True, str(tmp_path / "checkpoint-4")):
        with pytest.raises(FastpeftError, match="move it away and resume from a checkpoint with weights"):
            journaled(tmp_path, **saving).train(resume)
    file.rename(tmp_path / "away")
    resumed = journaled(tmp_path, **saving)
    resumed.train(str(tmp_path / "checkpoint-4"))
    assert equal(weights(resumed.model), weights(whole.model))
    journal = Journal.open(file)
    assert (journal.header["first_step"], journal.steps) == (4, 6)


def test_checkpoints_without_weights_need_a_journal_from_the_beginning(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = journaled(tmp_path / "whole", **saving)
    whole.train()
    folder = tmp_path / "late"
    with pytest.raises(KeyboardInterrupt):
        journaled(folder, Interrupt("on_step_end", 3), journal=False, **saving).train()
    with pytest.raises(FastpeftError, match="begins after 2 steps of the run"):
        journaled(folder, save_weights=False, **saving).train(True)
    with pytest.raises(KeyboardInterrupt):
        journaled(folder, Interrupt("on_step_end", 5), **saving).train(True)
    for name in ("model.safetensors", "config.json"):  # as what was begun without this check left it
        (folder / "checkpoint-4" / name).unlink()
    (folder / "checkpoint-4" / "mezo.journal").write_bytes((folder / "mezo.journal").read_bytes())
    with pytest.raises(FastpeftError, match="begins after 2 steps of the run"):
        journaled(folder, save_weights=False, **saving).train(True)
    resumed = journaled(folder, **saving)
    resumed.train(True)
    assert equal(weights(resumed.model), weights(whole.model))


def test_what_a_journal_refuses(tmp_path: Path) -> None:
    with pytest.raises(FastpeftError, match="save_weights=False needs journal=True"):
        config(tmp_path, save_weights=False)
    killed(tmp_path, 4)
    with pytest.raises(FastpeftError, match="is the journal of another run"):
        journaled(tmp_path).train()
    with pytest.raises(FastpeftError, match="another seed 3, not 4"):
        journaled(tmp_path, seed=4).train(resume_from_checkpoint=True)
    with pytest.raises(FastpeftError, match="follows measured losses"):
        journaled(tmp_path, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", eval_steps=1).train(
            resume_from_checkpoint=True
        )
    other = journaled(tmp_path)
    other.model.lm_head.bias.data += 1
    with pytest.raises(FastpeftError, match="does not have the weights"):
        other.train(resume_from_checkpoint=True)
    assert Journal.open(tmp_path / "mezo.journal").steps == 4  # refusals leave it whole


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
    perturb = perturbing.mezo_perturb_

    def count(params: list[Tensor], offsets: list[int], seeds: list[int], *args: Any, **kwargs: Any) -> None:
        passes.append(len(seeds))
        perturb(params, offsets, seeds, *args, **kwargs)

    monkeypatch.setattr(perturbing, "mezo_perturb_", count)
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
    assert (mezo.estimator.kind, mezo.estimator.num_estimates, mezo.noise) == ("fzoo", 3, "rademacher")
    assert mezo.steps_done == 4
    assert [math.isnan(g) for g in logged(trainer, "projected_grad")] == [False, False, True, False]
    losses = logged(trainer, "loss")
    assert losses[2] == losses[1]
    assert any("is nan at step 3" in message for message in caplog.messages)


def test_an_interrupt_between_the_halves_of_a_step_leaves_restored_weights(tmp_path: Path) -> None:
    trainer = MeZOTrainer(
        language_model(), config(tmp_path), train_dataset=rows(), callbacks=[Interrupt("on_pre_optimizer_step", 0)]
    )
    before = weights(trainer.model)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    for one, other in zip(before, weights(trainer.model)):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_an_optimizer_of_ones_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = language_model()
    optimizer = MeZO(model.lm_head.parameters(), lr=0.1, noise="rademacher")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = config(tmp_path, eps=1e-2, noise="rademacher", learning_rate=0.1)
    MeZOTrainer(model, arguments, train_dataset=rows(), optimizers=(optimizer, None)).train()
    (warning,) = [message for message in caplog.messages if "have no effect" in message]
    assert warning.endswith("no effect: eps 0.01 (it has 0.001).")
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
    assert "RobertaForSequenceClassification, which predicts no words" in message
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


def test_the_recipe_is_the_default(tmp_path: Path) -> None:
    arguments = MeZOConfig(str(tmp_path))
    assert (arguments.learning_rate, arguments.eps, arguments.train_batch_size) == (1e-6, 1e-3, 16)
    assert arguments.lr_scheduler_type == "constant"
    assert MeZOTrainer(language_model()).args.eps == 1e-3


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FastpeftError, match="fp16=True"):
        config(tmp_path, fp16=True)
    with pytest.raises(FastpeftError, match="got a TrainingArguments"):
        MeZOTrainer(language_model(), TrainingArguments(str(tmp_path)))
    model = language_model()
    with pytest.raises(FastpeftError, match="the optimizer is SGD"):
        MeZOTrainer(model, config(tmp_path), optimizers=(torch.optim.SGD(model.parameters()), None))
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
