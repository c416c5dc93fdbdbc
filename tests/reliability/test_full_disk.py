"""A full disk, wherever it is met: one message says what is kept and what to do, and no half file stays.

The limit on the size of a file stands in for the disk: writes fail as they do there, in whichever library they are. A
real disk of a few pages is filled where one may be mounted, by `small_disk`.
"""

from __future__ import annotations

import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from reliability import kill, small_disk
from transformers import TrainerCallback
from typer.testing import CliRunner
from unprivileged import bound_by_modes

from fastpeft import CompareConfig, FastpeftError, TrainConfig, compare, train
from fastpeft.cli import app
from fastpeft.comparison.executors import ProcessExit
from fastpeft.support import files
from fastpeft.training.export import export
from fastpeft.training.run_folder import RunFolder


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    """Take the limit away again. Without a handler the signal of the limit would end the process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before[0])
    signal.signal(signal.SIGXFSZ, before[1])


def fill(room: int) -> None:
    """Let no file grow beyond `room` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))


def free() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


class Fill(TrainerCallback):
    """Fills the disk within a step."""

    def __init__(self, step: int, room: int) -> None:
        self.step = step
        self.room = room

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            fill(self.room)


def config(place: Path, output: Path, **changes: Any) -> TrainConfig:
    given = {"model": str(place / "model"), "data": str(place / "reviews.csv"), "max_steps": 4}
    return TrainConfig(output=str(output), **{**given, **changes})


@pytest.mark.long(but=("siva-1000", "full-12000", "k-lst-6000"))
@pytest.mark.parametrize(
    ("method", "room"), [("siva", 0), ("siva", 1_000), ("siva", 2_500), ("full", 12_000), ("k-lst", 6_000)]
)
def test_a_checkpoint_that_does_not_fit(place: Path, tmp_path: Path, method: str, room: int) -> None:
    """The room decides which of a checkpoint's files is the first that does not fit."""
    run = config(place, tmp_path / "run", method=method, save_steps=2)
    with pytest.raises(FastpeftError) as raised:
        train(run, callbacks=[Fill(3, room)])
    free()
    folder = RunFolder(run.output)
    assert str(raised.value).startswith(f"cannot write a checkpoint to the output folder '{folder.path}' (")
    assert "\n" not in str(raised.value)
    advice = (
        f"The newest checkpoint is {folder.checkpoint(2)}; resume with `fastpeft train --output {folder.path} --res"
    )
    assert advice in str(raised.value)
    assert folder.all_checkpoints() == [folder.checkpoint(2)]
    assert {path.name for path in folder.path.iterdir()} == {"run.json", "checkpoints"}
    assert kill.unreadable(folder.path) == []
    assert RunFolder(train(run, resume=True).folder).finished


@pytest.mark.long(but="6000")
@pytest.mark.parametrize("room", [0, 1_000, 6_000])
def test_a_result_that_does_not_fit(place: Path, tmp_path: Path, room: int) -> None:
    run = config(place, tmp_path / "run", save_steps=4)
    with pytest.raises(FastpeftError, match=r"cannot write the result .*checkpoint-4; resume with"):
        train(run, callbacks=[FillAtTheEnd(room)])
    free()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"run.json", "checkpoints"}
    assert RunFolder(train(run, resume=True).folder).finished


class FillAtTheEnd(Fill):
    """Fills the disk after the last checkpoint."""

    def __init__(self, room: int) -> None:
        super().__init__(0, room)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        fill(self.room)


def test_a_journal_that_does_not_fit(place: Path, tmp_path: Path) -> None:
    run = config(place, tmp_path / "run", method="mezo", learning_rate=1e-3)
    with pytest.raises(FastpeftError, match=r"mezo.journal cannot be written \(.*\); it ends with step 3\. Make room"):
        train(run, callbacks=[Fill(4, 100)])
    free()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"run.json", "mezo.journal", ".staging"}
    whole = train(config(place, tmp_path / "whole", method="mezo", learning_rate=1e-3))
    assert kill.results(train(run, resume=True).folder) == kill.results(whole.folder)


def test_weights_before_a_step_that_failed_do_not_fit(place: Path, tmp_path: Path) -> None:
    run = config(place, tmp_path / "run", method="full", learning_rate=1e30, max_steps=20)
    with pytest.raises(FastpeftError, match="cannot write the weights before that step"):
        train(run, callbacks=[Fill(1, 100)])
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"run.json"}


class FillWhenMeasured(Fill):
    """Fills the disk after what comes before a run's first file."""

    def __init__(self) -> None:
        super().__init__(0, 10)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        fill(self.room)


def test_a_run_that_cannot_begin(place: Path, tmp_path: Path) -> None:
    with pytest.raises(FastpeftError, match=r"cannot write to the output folder .* Give one that can be written"):
        train(config(place, tmp_path / "run"), callbacks=[FillWhenMeasured()])
    free()
    assert list((tmp_path / "run").iterdir()) == []
    assert RunFolder(train(config(place, tmp_path / "run")).folder).finished


@pytest.fixture(scope="module")
def mounting(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command that runs another where it may mount what no other process sees."""
    folder = tmp_path_factory.mktemp("mount")
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    for command in (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"]):
        if shutil.which("unshare") and subprocess.run([*command, *mount], capture_output=True).returncode == 0:
            return command
    pytest.skip("no disk can be mounted here")


@pytest.mark.parametrize(
    ("kinds", "shares"),
    [
        pytest.param(["mezo, with checkpoints"], [0.5], id="one run"),
        pytest.param([*small_disk.RUNS], [n / 8 for n in range(8)], id="all runs", marks=pytest.mark.slow),
    ],
)
def test_a_disk_of_a_few_pages(
    place: Path, tmp_path: Path, mounting: list[str], kinds: list[str], shares: list[float]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    program = [sys.executable, "-m", "reliability.small_disk", str(place), str(disk), ";".join(kinds)]
    program.append(" ".join(map(str, shares)))
    script = f"mount -t tmpfs -o size=8m tmpfs {shlex.quote(str(disk))} && exec {shlex.join(program)}"
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2]), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([*mounting, "sh", "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("did not fit") == len(kinds)
    assert ": 0 of" not in done.stdout


def test_on_the_command_line(place: Path, tmp_path: Path) -> None:
    options = ["--model", str(place / "model"), "--data", str(place / "reviews.csv"), "--max-steps", "2", "--quiet"]
    for output in ("/proc/run", str(place / "reviews.csv" / "run")):
        shown = CliRunner().invoke(app, ["train", *options, "--output", output])
        assert (shown.exit_code, shown.stdout) == (2, "")
        (line,) = shown.stderr.splitlines()
        assert line.startswith(f"Error: cannot write to the output folder '{output}' (")


@contextmanager
def mode(path: Path, bits: int) -> Iterator[None]:
    """Let a file or folder have a mode, which binds the superuser too."""
    before = path.stat().st_mode
    path.chmod(bits)
    try:
        with bound_by_modes():
            yield
    finally:
        path.chmod(before)


def test_a_folder_that_is_read_only(place: Path, tmp_path: Path) -> None:
    run = config(place, tmp_path / "run", save_steps=2)
    train(run)
    before = kill.results(tmp_path / "run")
    with mode(tmp_path / "run", 0o500), pytest.raises(FastpeftError, match=r"output folder .*\(Permission denied\)"):
        train(run, overwrite=True)
    assert kill.results(tmp_path / "run") == before


def test_a_folder_in_which_none_can_be_made(place: Path, tmp_path: Path) -> None:
    folder = train(config(place, tmp_path / "run", max_steps=1)).folder
    (tmp_path / "closed").mkdir()
    with mode(tmp_path / "closed", 0o500):
        for attempt in (
            lambda: train(config(place, tmp_path / "closed" / "run")),
            lambda: export(folder, tmp_path / "closed" / "out", "merged"),
        ):
            with pytest.raises(FastpeftError, match=r"\(Permission denied"):
                attempt()
    assert list((tmp_path / "closed").iterdir()) == []


def test_files_that_cannot_be_read(place: Path, tmp_path: Path) -> None:
    data = tmp_path / "reviews.csv"
    shutil.copy(place / "reviews.csv", data)
    folder = train(config(place, tmp_path / "run", max_steps=1, data=str(data))).folder
    with mode(data, 0), pytest.raises(FastpeftError, match=r"reviews.csv.*Permission denied"):
        train(config(place, tmp_path / "new", data=str(data)))
    assert not (tmp_path / "new").exists()
    with mode(folder / "metrics.json", 0), pytest.raises(FastpeftError, match=r"metrics.json.*Permission denied"):
        export(folder, tmp_path / "out", "merged")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("capsys")  # the limit would be one of the file, too, in which pytest keeps what is printed
@pytest.mark.parametrize("to", ["merged", "lora", pytest.param("onnx", marks=pytest.mark.long)])
def test_an_export_that_does_not_fit(place: Path, tmp_path: Path, to: str) -> None:
    folder = train(config(place, tmp_path / "run", max_steps=1)).folder
    fill(1_000)
    with pytest.raises(FastpeftError, match="with room in it"):
        export(folder, tmp_path / "out", to)
    free()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_comparison_whose_report_does_not_fit(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastpeft.comparison.report.output.write", full)
    monkeypatch.setattr("fastpeft.comparison.executors.Local._begin", lambda *_: lambda: ProcessExit(0.0, "well"))
    common = {"model": str(place / "model"), "data": str(place / "reviews.csv"), "max_steps": 1}
    with pytest.raises(FastpeftError, match=r"\(No space left on device\)\. Finished cells are kept\. Free disk space"):
        compare(CompareConfig(output=str(tmp_path / "out"), methods=["head"], common=common))


def test_a_write_that_was_cut_off_does_not_block_the_folder(place: Path, tmp_path: Path) -> None:
    """Killed while it wrote its first file, a run leaves a part of it under another name."""
    run = tmp_path / "run"
    run.mkdir()
    (run / ".run.json.a1b2.part").write_text("{")
    assert RunFolder(train(config(place, run, max_steps=1), resume=True).folder).finished
    assert not list(run.glob(files.UNFINISHED))
