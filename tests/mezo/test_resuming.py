"""MeZO in the Trainer: runs that go on from a checkpoint, from their journal, or from both."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from mezo_networks import equal, weights
from mezo_trainer import TINY, config, language_model, logged, rows
from samples import Interrupt
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, TrainerCallback

from fastpeft import FastpeftError, MeZOTrainer
from fastpeft.mezo import Journal
from fastpeft.mezo.checkpoints import Checkpoint, Start, where_to_begin


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


def trained(folder: Path, resume: bool | str | None = None, **changes: Any) -> MeZOTrainer:
    """A run with a journal, at its end."""
    trainer = journaled(folder, **changes)
    trainer.train(resume)
    return trainer


def killed(folder: Path, step: int, **changes: Any) -> None:
    """A run with a journal that ends in step number `step`, after its update and before anything that follows it."""
    with pytest.raises(KeyboardInterrupt):
        journaled(folder, Interrupt(step - 1, "on_optimizer_step"), **changes).train()


def tail(trainer: MeZOTrainer, name: str, steps: int) -> list[float]:
    return logged(trainer, name)[-steps:]


@pytest.mark.parametrize("journal", [False, True])
def test_checkpoints_of_the_model_alone_go_on_with_new_noise(tmp_path: Path, journal: bool) -> None:
    """`save_only_model` leaves out the optimizer's state, which is a number of steps that the log has too."""
    changes: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "save_only_model": True, "journal": False}
    changes |= {"lr_scheduler_type": "constant", "gradient_accumulation_steps": 1}
    whole = trained(tmp_path, **changes)
    resumed = trained(tmp_path, str(tmp_path / "checkpoint-3"), **changes | {"journal": journal})
    assert equal(weights(resumed.model), weights(whole.model))
    assert tail(resumed, "projected_grad", 4) == tail(whole, "projected_grad", 4)
    if journal:
        assert Journal.open(resumed.journal_file).header["first_step"] == 3


@pytest.mark.parametrize("journal", [False, True])
def test_weights_that_are_saved_by_older_names_are_loaded(tmp_path: Path, journal: bool) -> None:
    """transformers saves GPT-NeoX's LM head as `embed_out`, which its Trainer does not find in the model."""
    changes: dict[str, Any] = {"journal": journal, "save_weights": True, "save_strategy": "steps", "save_steps": 2}
    changes |= {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "greater_is_better": True}
    ends: list[MeZOTrainer] = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        torch.manual_seed(0)
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**TINY))
        ends.append(MeZOTrainer(model, config(tmp_path, **changes), train_dataset=rows(), eval_dataset=rows()))
        ends[-1].train(resume_from_checkpoint=checkpoint)
    whole, resumed = ends
    assert logged(resumed, "projected_grad") == logged(whole, "projected_grad")
    assert equal(weights(resumed.model), weights(whole.model))
    assert whole.evaluate()["eval_loss"] == max(logged(whole, "eval_loss"))  # the best by `greater_is_better`


@pytest.mark.long(but="5")
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
        trainer("broken", Interrupt(interrupted_at)).train()
    resumed = trainer("broken")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.mezo.steps_done == 7
    assert equal(weights(resumed.model), weights(whole.model))
    for name in ("projected_grad", "learning_rate", "eval_loss"):
        assert logged(resumed, name) == logged(whole, name)


@pytest.mark.long(but="2")
@pytest.mark.parametrize("killed_at", [1, 2, 5, 7])
def test_a_run_goes_on_from_its_journal_alone(tmp_path: Path, killed_at: int) -> None:
    """Without a single checkpoint, to the bits of the uninterrupted run."""
    whole = trained(tmp_path / "whole")
    killed(tmp_path / "broken", killed_at)
    assert Journal.open(tmp_path / "broken" / "mezo.journal").steps == killed_at
    resumed = trained(tmp_path / "broken", resume=True)
    assert resumed.mezo.steps_done == resumed.state.global_step == 7
    assert equal(weights(resumed.model), weights(whole.model))
    for name in ("projected_grad", "learning_rate", "loss"):
        assert logged(resumed, name) == tail(whole, name, 8 - killed_at)
    both = [(tmp_path / name / "mezo.journal").read_bytes() for name in ("whole", "broken")]
    assert both[0] == both[1]
    assert sorted(path.name for path in (tmp_path / "broken").iterdir()) == ["mezo.journal"]


def test_a_share_of_the_steps_is_one_after_a_journal_too(tmp_path: Path) -> None:
    shares = {"logging_steps": 0.4, "eval_strategy": "steps", "eval_steps": 0.4}
    killed(tmp_path, 2, **shares)
    resumed = trained(tmp_path, resume=True, **shares)
    evaluated = [each["step"] for each in resumed.state.log_history if "eval_loss" in each]
    assert evaluated in ([3, 6], [3, 6, 7])  # transformers 5.0 does not evaluate at the end
    assert resumed.state.logging_steps == 3


@pytest.mark.long(but="False")
@pytest.mark.parametrize("save_weights", [True, False])
def test_the_journal_leads_on_from_the_newest_checkpoint(tmp_path: Path, save_weights: bool) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "save_weights": save_weights}
    whole = trained(tmp_path / "whole", **saving)
    killed(tmp_path / "broken", 6, **saving)
    checkpoint = tmp_path / "broken" / "checkpoint-4"
    assert (checkpoint / "model.safetensors").exists() == save_weights
    assert (checkpoint / "mezo.journal").exists() != save_weights
    resumed = trained(tmp_path / "broken", resume=True, **saving)
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
sys.path[:0] = {folders!r}
from test_resuming import journaled
torch.set_num_threads(1)
run = journaled(Path({folder!r}), **{options!r})
run.train(resume_from_checkpoint=Path({folder!r}, "mezo.journal").exists())
"""


@pytest.mark.long
@pytest.mark.kill
@pytest.mark.parametrize("save_weights", [True, False])
def test_a_killed_run_ends_with_the_bits_of_the_uninterrupted_one(tmp_path: Path, save_weights: bool) -> None:
    """Killed twice, wherever it was: in a step, in a write, while saving."""
    options = {"save_strategy": "steps", "save_steps": 3, "save_weights": save_weights, "save_total_limit": 2}
    options |= {"max_steps": 80, "logging_steps": 50}
    whole = trained(tmp_path / "whole", **options)
    folder = tmp_path / "broken"
    script = _KILLED.format(
        folders=[str(each) for each in Path(__file__).parents[:2]], folder=str(folder), options=options
    )
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
    resumed = trained(folder, resume=True, **options)
    assert equal(weights(resumed.model), weights(whole.model))
    both = [(tmp_path / name / "mezo.journal").read_bytes() for name in ("whole", "broken")]
    assert both[0] == both[1]


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over_and_a_copy_too(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = trained(tmp_path / "whole", **saving)
    killed(tmp_path / "broken", 5, **saving)
    (tmp_path / "broken" / "checkpoint-4" / "trainer_state.json").unlink()
    shutil.copytree(tmp_path / "broken" / "checkpoint-2", tmp_path / "broken" / "checkpoint-2 (copy)")
    resumed = trained(tmp_path / "broken", resume=True, **saving)
    assert equal(weights(resumed.model), weights(whole.model))


def test_a_run_that_goes_on_from_its_journal_alone_saves_checkpoints(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 4}
    whole = trained(tmp_path / "whole", **saving)
    killed(tmp_path / "broken", 3, **saving)
    journaled(tmp_path / "broken", **saving).train(resume_from_checkpoint=True)
    again = journaled(tmp_path / "broken", **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-4"))
    assert equal(weights(again.model), weights(whole.model))


def test_a_journal_can_begin_at_a_checkpoint(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = trained(tmp_path / "whole", **saving)
    with pytest.raises(KeyboardInterrupt):
        journaled(tmp_path / "late", Interrupt(4), journal=False, **saving).train()
    with pytest.raises(KeyboardInterrupt):
        journaled(tmp_path / "late", Interrupt(5), **saving).train(resume_from_checkpoint=True)
    journal = Journal.open(tmp_path / "late" / "mezo.journal")
    assert (journal.header["first_step"], journal.steps) == (3, 5)
    resumed = trained(tmp_path / "late", resume=True, **saving)
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
    whole = trained(tmp_path, **saving)
    file = tmp_path / "mezo.journal"
    content = file.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        journaled(tmp_path, Interrupt(2, "on_step_begin"), **saving).train(str(tmp_path / "checkpoint-2"))
    assert file.read_bytes() == content
    with pytest.raises(KeyboardInterrupt):
        journaled(tmp_path, Interrupt(2, "on_optimizer_step"), **saving).train(str(tmp_path / "checkpoint-2"))
    assert Journal.open(file).steps == 3
    resumed = trained(tmp_path, resume=True, **saving)
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
    resumed = trained(tmp_path, resume=True, **saving)
    assert equal(weights(resumed.model), weights(whole.model))


def test_the_advice_for_a_damaged_journal(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    whole = trained(tmp_path, **saving)
    file = tmp_path / "mezo.journal"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    for resume in (True, str(tmp_path / "checkpoint-4")):
        with pytest.raises(FastpeftError, match="move it away and resume from a checkpoint with weights"):
            journaled(tmp_path, **saving).train(resume)
    file.rename(tmp_path / "away")
    resumed = trained(tmp_path, resume=str(tmp_path / "checkpoint-4"), **saving)
    assert equal(weights(resumed.model), weights(whole.model))
    journal = Journal.open(file)
    assert (journal.header["first_step"], journal.steps) == (4, 6)


def test_checkpoints_without_weights_need_a_journal_from_the_beginning(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = trained(tmp_path / "whole", **saving)
    folder = tmp_path / "late"
    with pytest.raises(KeyboardInterrupt):
        journaled(folder, Interrupt(3), journal=False, **saving).train()
    with pytest.raises(FastpeftError, match="begins after 2 steps of the run"):
        journaled(folder, save_weights=False, **saving).train(True)
    with pytest.raises(KeyboardInterrupt):
        journaled(folder, Interrupt(5), **saving).train(True)
    for name in ("model.safetensors", "config.json"):  # as what was begun without this check left it
        (folder / "checkpoint-4" / name).unlink()
    (folder / "checkpoint-4" / "mezo.journal").write_bytes((folder / "mezo.journal").read_bytes())
    with pytest.raises(FastpeftError, match="begins after 2 steps of the run"):
        journaled(folder, save_weights=False, **saving).train(True)
    resumed = trained(folder, resume=True, **saving)
    assert equal(weights(resumed.model), weights(whole.model))


@pytest.mark.parametrize("steps", [3, 6])
def test_a_run_that_is_to_end_before_its_journal_is_refused(tmp_path: Path, steps: int) -> None:
    killed(tmp_path, 7)
    file = tmp_path / "mezo.journal"
    content = file.read_bytes()
    with pytest.raises(FastpeftError, match=rf"has 7 steps, but this run is to end after {steps}\. Let it make 7 or"):
        journaled(tmp_path, max_steps=steps).train(resume_from_checkpoint=True)
    assert file.read_bytes() == content
    resumed = trained(tmp_path, resume=True, max_steps=7)
    assert resumed.mezo.steps_done == 7


def test_what_a_journal_refuses(tmp_path: Path) -> None:
    with pytest.raises(FastpeftError, match="save_weights=False needs journal=True"):
        config(tmp_path, save_weights=False)
    with pytest.raises(FastpeftError, match="auto_find_batch_size=True counts its steps anew"):
        config(tmp_path, journal=True, auto_find_batch_size=True)
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
