"""Ctrl-C, SIGTERM, SIGHUP: the step under way is made and saved, the way on is told, and leads to the same bits."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from reliability import kill
from transformers import TrainerCallback
from typer.testing import CliRunner

from fastpeft import TrainConfig, train
from fastpeft.cli import app
from fastpeft.support import interrupts
from fastpeft.training.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("interruptible")

RUNS: dict[str, dict[str, Any]] = {
    "siva": {"method": "siva"},
    "full": {"method": "full", "save_steps": 3, "metric": "loss"},  # of which the best checkpoint is kept
    "k-lst": {"method": "k-lst", "save_steps": 4},
    "mezo": {"method": "mezo", "learning_rate": 1e-3},
    "mezo-best": {"method": "mezo", "learning_rate": 1e-3, "save_steps": 3, "metric": "loss"},
}


def run_config(place: Path, output: Path, kind: str) -> TrainConfig:
    given = {"model": str(place / "model"), "data": str(place / "reviews.csv"), "max_steps": 9}
    return TrainConfig(output=str(output), **given, **RUNS[kind])


@pytest.fixture(scope="module")
def whole(place: Path) -> Callable[[str], dict[str, bytes]]:
    """What the run of each kind leaves that nobody interrupts."""

    @functools.cache
    def result(kind: str) -> dict[str, bytes]:
        return kill.results(train(run_config(place, place / f"whole {kind}", kind)).folder)

    return result


class Send(TrainerCallback):
    """Sends this process signals within a step."""

    def __init__(self, step: int, *numbers: signal.Signals) -> None:
        self.step = step
        self.numbers = numbers

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            for number in self.numbers:
                signal.raise_signal(number)


@pytest.mark.long(but="mezo-best-15")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("kind", RUNS)
def test_an_interrupted_run_ends_with_the_bits_of_a_whole_one(
    place: Path, tmp_path: Path, whole: Callable[[str], dict[str, bytes]], kind: str, number: signal.Signals
) -> None:
    config = run_config(place, tmp_path / "run", kind)
    before = signal.getsignal(number)
    begun = "go on" if kind.startswith("mezo") else "resume"
    with pytest.raises(KeyboardInterrupt, match=rf"; {begun} with `fastpeft train --output .*run --resume`"):
        train(config, callbacks=[Send(5, number)])
    assert signal.getsignal(number) is before
    folder = RunFolder(config.output)
    assert folder.newest_checkpoint() == folder.checkpoint(5)
    assert not folder.finished
    assert kill.unreadable(folder.path) == []
    assert kill.results(train(config, resume=True).folder) == whole(kind)


def test_mezo_saves_no_weights_that_its_journal_holds(
    place: Path, tmp_path: Path, whole: Callable[[str], dict[str, bytes]]
) -> None:
    config = run_config(place, tmp_path / "run", "mezo")
    folder = RunFolder(config.output)
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[Send(5, signal.SIGINT)])
    saved = {file.name: file for file in folder.checkpoint(5).iterdir()}
    assert not [name for name in saved if name.endswith(".safetensors")]
    assert saved["mezo.journal"].read_bytes() == folder.journal.read_bytes()
    folder.journal.unlink()
    assert kill.results(train(config, resume=True).folder) == whole("mezo")


def test_a_second_signal_ends_at_once(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "_ONE_REQUEST", 0)  # as if time had passed
    config = run_config(place, tmp_path / "run", "k-lst")
    with pytest.raises(KeyboardInterrupt, match=r"The newest checkpoint is .*checkpoint-4; resume with"):
        train(config, callbacks=[Send(6, signal.SIGINT, signal.SIGINT)])
    assert RunFolder(config.output).newest_checkpoint() == RunFolder(config.output).checkpoint(4)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_one_request_may_come_twice(place: Path, tmp_path: Path, first: signal.Signals) -> None:
    """From a terminal to a cell, and from its comparison; from a scheduler to all, and from a launcher."""
    config = run_config(place, tmp_path / "run", "siva")
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[Send(6, first, signal.SIGTERM)])
    assert RunFolder(config.output).newest_checkpoint() == RunFolder(config.output).checkpoint(6)


class SendToAll(TrainerCallback):
    """Lets another process, as a scheduler, send SIGTERM to those that load rows and then to this one."""

    def __init__(self, event: str) -> None:
        self.sent = False
        setattr(self, event, self._send)

    def _send(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        loading = multiprocessing.active_children()
        if state.global_step == 4 and not self.sent:
            self.sent = True
            assert loading
            subprocess.run(["kill", "-TERM", *(str(each.pid) for each in loading), str(os.getpid())], check=True)
            assert all(each.is_alive() for each in loading)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="here nobody tells who sent a signal")
@pytest.mark.parametrize("event", ["on_step_begin", "on_prediction_step"])
def test_a_signal_to_all_leaves_the_processes_that_load_rows(
    place: Path, tmp_path: Path, whole: Callable[[str], dict[str, bytes]], event: str
) -> None:
    settings = {"dataloader_num_workers": 1, "per_device_eval_batch_size": 2}  # so that many are still to be loaded
    config = replace(run_config(place, tmp_path / "run", "siva"), settings=settings)
    with pytest.raises(KeyboardInterrupt, match="resume with"):
        train(config, callbacks=[SendToAll(event)])
    assert RunFolder(config.output).newest_checkpoint() == RunFolder(config.output).checkpoint(5)
    assert multiprocessing.active_children() == []
    assert kill.results(train(config, resume=True).folder) == whole("siva")


def test_a_run_whose_last_step_is_made_is_finished_first(
    place: Path, tmp_path: Path, whole: Callable[[str], dict[str, bytes]]
) -> None:
    config = run_config(place, tmp_path / "run", "siva")
    with pytest.raises(KeyboardInterrupt, match="it is finished"):
        train(config, callbacks=[Send(9, signal.SIGTERM)])
    assert kill.results(RunFolder(config.output).path) == whole("siva")
    assert RunFolder(config.output).finished


def test_a_handler_that_somebody_set_runs(place: Path, tmp_path: Path) -> None:
    came = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        train(replace(run_config(place, tmp_path / "run", "siva"), max_steps=2), callbacks=[Send(1, signal.SIGTERM)])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert came == [signal.SIGTERM]


def _interrupted(train: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return train(*args, **{**kwargs, "callbacks": [Send(5, signal.SIGINT)]})


def test_the_command_line_tells_how_to_go_on(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Callable[[str], dict[str, bytes]]
) -> None:
    from fastpeft.training import recipe

    options = ["--model", str(place / "model"), "--data", str(place / "reviews.csv"), "--max-steps", "9"]
    command = ["train", *options, "--output", str(tmp_path / "a run")]
    monkeypatch.setattr(recipe, "train", functools.partial(_interrupted, recipe.train))
    shown = CliRunner().invoke(app, [*command, "--quiet"])
    monkeypatch.undo()
    assert (shown.exit_code, shown.stdout) == (130, "")
    (line,) = shown.stderr.splitlines()
    assert line.startswith("Interrupted. ")
    advice = line.split("`")[1]
    assert advice == f"fastpeft train --output '{tmp_path / 'a run'}' --resume"
    resumed = CliRunner().invoke(app, ["train", "--output", str(tmp_path / "a run"), "--resume", "--quiet"])
    assert resumed.exit_code == 0, resumed.output
    assert kill.results(tmp_path / "a run") == whole("siva")


@pytest.mark.kill
@pytest.mark.parametrize(
    ("kind", "number"),
    [*product(["siva", "mezo", kill.COMPARE], [signal.SIGINT, signal.SIGTERM]), ("siva", signal.SIGHUP)],
)
def test_a_process_that_gets_a_signal(tmp_path: Path, kind: str, number: signal.Signals) -> None:
    """A comparison hands it on to the cell that runs, which then saves as a run does."""
    kill.prepare(tmp_path)
    process = kill.start(tmp_path, kind, tmp_path / "out")
    while process.is_alive() and kill.reached(tmp_path / "out") < 4:
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 130
    reached = kill.reached(tmp_path / "out")
    assert reached >= 4
    assert kill.unreadable(tmp_path / "out") == []
    process = kill.start(tmp_path, kind, tmp_path / "out")
    process.join()
    assert process.exitcode == 0
