"""One run at a time writes into a folder; whoever comes second is refused, and the first one's result has its bits."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forking import PROCESSES
from reliability import kill
from transformers import TrainerCallback

from fastpeft import FastpeftError, TrainConfig, train
from fastpeft.support import files
from fastpeft.training.evaluation import evaluate
from fastpeft.training.export import export
from fastpeft.training.run_folder import RunFolder


def second(config: TrainConfig, said: Path, choice: dict[str, bool]) -> None:
    """What another process does: train into the same folder, and leave what it was told."""
    try:
        train(config, **choice)
    except FastpeftError as error:
        said.write_text(str(error))


class Intrude(TrainerCallback):
    """Within the second step lets two more processes try to train into the folder, one after another."""

    def __init__(self, config: TrainConfig, said: Path) -> None:
        self.config = config
        self.said = said
        self.messages: list[str] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            for choice in ({"resume": True}, {"overwrite": True}):
                process = PROCESSES.Process(target=second, args=(self.config, self.said, choice))
                process.start()
                process.join()
                self.messages.append(self.said.read_text())
                self.said.unlink()


@pytest.mark.long(but="mezo")
@pytest.mark.parametrize("method", ["siva", "mezo"])
def test_a_second_run_is_refused_and_the_first_goes_on(config: TrainConfig, tmp_path: Path, method: str) -> None:
    config = replace(config, method=method, save_steps=1, learning_rate=1e-3)
    intrusion = Intrude(config, tmp_path / "said")
    folder = train(config, callbacks=[intrusion]).folder
    whole = train(replace(config, output=str(tmp_path / "whole"))).folder
    expected = f"another run writes into the output folder '{folder}'. Wait for its end, or end it and go on with --res"
    assert [message.startswith(expected) for message in intrusion.messages] == [True, True], intrusion.messages
    assert kill.results(folder) == kill.results(whole)
    assert kill.names(folder) == kill.names(whole)
    assert files.LOCK not in kill.names(folder)


def test_a_result_is_read_while_the_folder_is_held(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, method="mezo", max_steps=2)
    folder = train(config).folder
    with RunFolder(folder).held():
        assert evaluate(folder)["dev_rows"] > 0
        assert export(folder, tmp_path / "out", step=1).is_dir()
        assert train(config, resume=True).folder == folder  # it is finished: nothing is written
        with pytest.raises(FastpeftError, match="another run writes into"):
            train(config, overwrite=True)
    assert RunFolder(folder).finished


def test_a_run_that_ended_meanwhile_is_not_replaced(config: TrainConfig) -> None:
    """Both find an empty folder; one comes to its end while the other still measures what it begins with."""

    class Meanwhile(TrainerCallback):
        result: dict[str, bytes] | None = None

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.result is None:
                self.result = {}
                self.result = kill.results(train(config).folder)

    meanwhile = Meanwhile()
    with pytest.raises(FastpeftError, match=r"is not empty\. Give another one, or --resume"):
        train(replace(config, seed=1), callbacks=[meanwhile])
    assert kill.results(Path(config.output)) == meanwhile.result


class Move(TrainerCallback):
    """Within the second step moves the folder of the run away, and lets `then` put another in its place."""

    def __init__(self, folder: Path, then: Callable[[], object]) -> None:
        self.folder = folder
        self.then = then

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.folder.rename(self.folder.with_name("moved"))
            self.then()


def test_a_run_whose_folder_was_moved_ends_in_one_that_can_be_read(config: TrainConfig) -> None:
    folder = Path(config.output)
    train(config, callbacks=[Move(folder, lambda: None)])
    assert evaluate(folder)["dev_rows"] > 0
    assert not RunFolder(folder.with_name("moved")).finished


def test_a_run_that_took_the_place_of_one_that_was_moved_is_left_alone(config: TrainConfig) -> None:
    folder, other = Path(config.output), replace(config, seed=1)
    moves = Move(folder, lambda: train(other))
    with pytest.raises(FastpeftError, match="holds another run now, so nothing is written there"):
        train(config, callbacks=[moves])
    assert RunFolder(folder).metrics()["seed"] == RunFolder(folder).config()["seed"] == 1


def test_the_command_that_finishes_a_run_can_be_pasted(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "my run")
    folder.path.mkdir()
    folder.open({"model": "demo"}, "", overwrite=False)
    with pytest.raises(FastpeftError, match=r"--output '.*my run' --resume`"):
        folder.metrics()


def test_the_lock_of_a_killed_run_blocks_nobody(config: TrainConfig) -> None:
    folder = Path(config.output)
    process = PROCESSES.Process(target=_die_holding, args=(folder,))
    process.start()
    process.join()
    assert kill.names(folder) == {files.LOCK}
    assert files.LOCK not in kill.names(train(config).folder)


def _die_holding(folder: Path) -> None:
    with RunFolder(folder).held():
        os._exit(1)
