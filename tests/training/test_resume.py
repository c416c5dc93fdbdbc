"""How a run goes on that was interrupted, and when one ends by itself."""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from samples import Interrupt, eleven_steps, points_of, reviews, save_tiny_model, tree, weights_of, write_csv
from transformers import TrainerCallback, TrainerState

from fastpeft import FastpeftError, TrainConfig, train
from fastpeft.mezo import Journal
from fastpeft.support import files
from fastpeft.training import outcome
from fastpeft.training.callbacks import WholeCheckpoints
from fastpeft.training.recipe import TrainResult


@pytest.fixture
def config(tmp_path: Path, place: Path) -> TrainConfig:
    return eleven_steps(tmp_path, place)


def test_a_run_by_mezo_is_measured_as_often_after_it_goes_on_from_its_journal(config: TrainConfig) -> None:
    config = replace(config, method="mezo", max_steps=8, settings={"eval_steps": 0.5, "restore": "exact"})
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[Interrupt(3)])
    assert [step for step, _ in points_of(train(config, resume=True).folder, "dev loss")] == [0, 4, 8]


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory: pytest.TempPathFactory, place: Path) -> Any:
    """The uninterrupted two-epoch run of each method, each trained once."""

    @functools.cache
    def whole_run(method: str) -> TrainResult:
        return train(replace(eleven_steps(tmp_path_factory.mktemp(method), place), method=method, **TWO_EPOCHS))

    return whole_run


TWO_EPOCHS: dict[str, Any] = {"epochs": 2, "save_steps": 3}


@pytest.mark.long(but="siva-8-kept1")
@pytest.mark.parametrize(
    ("method", "interrupted_at", "kept"),
    [
        ("siva", 2, []),
        ("siva", 8, [3, 6]),
        ("siva", 11, [6, 9]),
        ("siva", 17, [12, 15]),
        ("mezo", 8, [3, 6]),
    ],
)
def test_resumed_run_equals_the_uninterrupted_one(
    config: TrainConfig, whole_runs: Any, method: str, interrupted_at: int, kept: list[int]
) -> None:
    config = replace(config, method=method, **TWO_EPOCHS)
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[Interrupt(interrupted_at)])
    assert {path.name for path in Path(config.output).glob("checkpoints/*")} == {f"checkpoint-{step}" for step in kept}
    whole, resumed = whole_runs(method), train(config, resume=True)
    before, after = weights_of(whole.folder), weights_of(resumed.folder)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert resumed.metrics["accuracy"] == whole.metrics["accuracy"]
    assert resumed.metrics["loss"] == whole.metrics["loss"]


@pytest.mark.long(but="1-{}")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 5, "weight_decay": 0.1, "lr_scheduler_type": "linear"},
        {"estimator": "fzoo", "num_estimates": 2, "noise": "rademacher", "over": "k-lst"},
        {"over": "bitfit", "weight_decay": 0.1},  # of which nothing decays
    ],
    ids=str,
)
@pytest.mark.parametrize("interrupted_at", [1, 5])
def test_a_run_by_mezo_goes_on_without_a_checkpoint(
    config: TrainConfig, tmp_path: Path, settings: dict[str, Any], interrupted_at: int
) -> None:
    """In the first epoch and, where a step takes five batches of eleven, in the second."""
    config = replace(config, method="mezo", max_steps=7, learning_rate=1e-3, settings=settings)
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[Interrupt(interrupted_at)])
    assert not (Path(config.output) / "checkpoints").exists()
    resumed, whole = train(config, resume=True), train(replace(config, output=str(tmp_path / "whole")))
    for name in ("model.safetensors", "mezo.journal"):
        assert (resumed.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    assert resumed.metrics["loss"] == whole.metrics["loss"]
    train(config, overwrite=True)  # which begins a journal anew
    assert (resumed.folder / "mezo.journal").read_bytes() == (whole.folder / "mezo.journal").read_bytes()


def test_a_journal_of_another_model_is_refused_and_kept(config: TrainConfig, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    config = replace(config, method="mezo", model=str(model), max_steps=4)
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[Interrupt(2)])
    before = (Path(config.output) / "mezo.journal").read_bytes()
    save_tiny_model(model, initializer_range=0.03)
    with pytest.raises(FastpeftError, match="has other weights now than when the run"):
        train(config, resume=True)
    note = Path(config.output) / "run.json"
    note.write_text(json.dumps({**json.loads(note.read_text()), "model_weights": None}))  # as of a name on the hub
    with pytest.raises(FastpeftError, match=r"does not have the weights from which the run .* began\..*seed\.$"):
        train(config, resume=True)
    assert (Path(config.output) / "mezo.journal").read_bytes() == before
    assert not (Path(config.output) / "last-good").exists()


def test_resume_after_the_last_step_finishes_the_run(config: TrainConfig, whole_runs: Any) -> None:
    class InterruptAtTheEnd(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    config = replace(config, method="siva", **{**TWO_EPOCHS, "save_steps": 11})
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[InterruptAtTheEnd()])
    whole, resumed = whole_runs("siva"), train(config, resume=True)
    assert all(
        torch.equal(tensor, weights_of(resumed.folder)[name]) for name, tensor in weights_of(whole.folder).items()
    )
    assert resumed.metrics["peak_memory_mb"] > 0


def test_the_memory_of_a_resumed_run_is_that_of_all_its_steps(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that goes on before its last batch, which is shorter than others."""
    monkeypatch.setattr(outcome, "simulated_peak_mb", lambda task, arguments, longest: float(longest))
    config = replace(config, epochs=1, save_steps=10)
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[Interrupt(11)])
    resumed = train(config, resume=True).metrics
    assert resumed["peak_memory_mb"] == resumed["estimated_memory_mb"]


def test_resume_begins_where_there_is_nothing_and_leaves_a_finished_run(config: TrainConfig) -> None:
    config = replace(config, max_steps=2)
    first = train(config, resume=True)
    before = tree(first.folder)
    (first.folder / files.LOCK).touch()  # as a kill leaves it after a run's end
    again = train(config, resume=True)
    assert again == first
    assert tree(first.folder) == before


def test_a_run_is_resumed_with_its_own_values_only(config: TrainConfig) -> None:
    config = replace(config, max_steps=2)
    folder = train(config).folder
    before = tree(folder)
    with pytest.raises(FastpeftError, match=r"learning_rate None -> 0\.5"):
        train(replace(config, learning_rate=0.5), resume=True)
    assert tree(folder) == before


def test_what_a_person_keeps_beside_the_checkpoints_is_no_checkpoint_and_stays(config: TrainConfig) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(replace(config, save_steps=2, max_steps=8), callbacks=[Interrupt(3)])
    checkpoints = Path(config.output) / "checkpoints"
    for name in ("checkpoint-2-9", "checkpoint-2 (copy)"):
        shutil.copytree(checkpoints / "checkpoint-2", checkpoints / name)
    assert train(replace(config, save_steps=2, max_steps=8), resume=True).metrics["steps"] == 8
    assert {path.name for path in checkpoints.iterdir()} == {
        *("checkpoint-6", "checkpoint-8", "checkpoint-2-9", "checkpoint-2 (copy)")
    }


def test_a_stop_before_the_first_measurement_keeps_its_checkpoint() -> None:
    kept: list[tuple[str, int | None]] = []
    folder: Any = SimpleNamespace(keep_checkpoint=lambda staged, best_step: kept.append((staged.name, best_step)))
    ranks: Any = SimpleNamespace(wait=lambda: None, first_does=lambda act: act())
    checkpoints, place = WholeCheckpoints(folder, "accuracy", ranks), SimpleNamespace(output_dir="staging")
    measured = [{"step": 4, "eval_accuracy": 0.5}, {"step": 8, "eval_accuracy": 0.4}]
    for step, history in ((2, []), (8, measured)):
        checkpoints.on_save(place, TrainerState(global_step=step, log_history=history), None)
    assert kept == [("checkpoint-2", None), ("checkpoint-8", 4)]


def test_a_run_is_resumed_with_its_own_rows_only(config: TrainConfig) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[Interrupt(2)])
    file, before = Path(config.data), tree(Path(config.output))
    lines = file.read_text().splitlines(keepends=True)
    changed = {
        "fewer": lines[:-1],
        "in another order": [lines[0], *reversed(lines[1:])],
        "other labels": [line.replace("positive", "negative") if row % 3 else line for row, line in enumerate(lines)],
    }
    for rows in changed.values():
        file.write_text("".join(rows))
        with pytest.raises(FastpeftError, match=r"holds other rows now, or in another order.*Restore them"):
            train(config, resume=True)
        assert tree(Path(config.output)) == before
    file.write_text("".join(lines))
    assert train(config, resume=True).metrics["steps"] > 2


@pytest.mark.parametrize("method", ["full", "siva"])
def test_a_checkpoint_in_part_is_refused(config: TrainConfig, method: str) -> None:
    """As a copy of it that broke off; the Trainer would go on without, to other weights."""
    config = replace(config, method=method, **TWO_EPOCHS)
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[Interrupt(8)])
    (*_, checkpoint) = sorted((Path(config.output) / "checkpoints").iterdir())
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).unlink()
        with pytest.raises(FastpeftError, match=rf"{checkpoint}: it has no {name[:5]}.*or delete that folder"):
            train(config, resume=True)
        (checkpoint / name).write_bytes(content)
    assert train(config, resume=True).metrics["steps"] > 8


@pytest.mark.parametrize("left", [5, 2])
def test_a_run_by_mezo_goes_on_from_a_journal_that_is_behind_its_checkpoints(
    config: TrainConfig, whole_runs: Any, left: int
) -> None:
    config = replace(config, method="mezo", **TWO_EPOCHS)
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[Interrupt(8)])
    journal = Journal.open(Path(config.output) / "mezo.journal")
    journal.rewind(left)
    journal.path.write_bytes(journal.content())
    before, after = (weights_of(run.folder) for run in (whole_runs("mezo"), train(config, resume=True)))
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


@pytest.mark.long(but="None-lora")
@pytest.mark.parametrize("method", ["lora", "mezo"])
@pytest.mark.parametrize("interrupted_at", [None, 3, 7])
def test_patience_ends_a_run_that_gets_no_better(config: TrainConfig, method: str, interrupted_at: int | None) -> None:
    """At a rate that changes nothing the first checkpoint stays the best; also where the run was cut off in between."""
    own = {"settings": {"restore": "exact"}} if method == "mezo" else {"head_learning_rate": 1e-30}
    config = replace(
        config, method=method, learning_rate=1e-30, epochs=9, save_steps=2, metric="loss", patience=3, **own
    )
    if interrupted_at is not None:
        with pytest.raises(KeyboardInterrupt):
            train(config, callbacks=[Interrupt(interrupted_at)])
    metrics = train(config, resume=interrupted_at is not None).metrics
    assert (metrics["steps"], metrics["best_step"]) == (8, 2)
    assert "| patience | 3 |" in (Path(config.output) / "README.md").read_text()


def test_a_run_that_gets_better_goes_on(config: TrainConfig, tmp_path: Path) -> None:
    """Measured on the rows that it learns, in float32: its last steps are smaller than a rounding of the outputs."""
    (tmp_path / "data").mkdir()
    for part in ("train", "dev"):
        write_csv(tmp_path / "data" / f"{part}.csv", reviews(40))
    config = replace(config, method="full", data=str(tmp_path / "data"), learning_rate=1e-3, head_learning_rate=1e-3)
    metrics = train(replace(config, epochs=3, save_steps=5, metric="loss", patience=1, bf16=False)).metrics
    assert metrics["steps"] == metrics["best_step"] == 15
