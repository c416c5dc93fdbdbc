"""How far a command is: told to who listens; drawn on a terminal, written as lines elsewhere, as JSON for programs."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
from peft import get_peft_model
from rich.console import Console
from siva_adapters import tiny

from fastpeft import SivaConfig, progress
from fastpeft.support.stages import listening, report


def adapt() -> None:
    get_peft_model(tiny(), SivaConfig(r=2, target_modules=["query", "key"], task_type="SEQ_CLS"))


def work() -> None:
    """What a short run reports."""
    report("encoding texts")
    for step in range(5):
        report("training", step, 4, loss=0.5, samples_per_second=31.25)
        if step == 2:
            report("measuring", 1, 1)


@pytest.fixture
def errors(monkeypatch: pytest.MonkeyPatch) -> Callable[..., io.StringIO]:
    """Makes the console of errors a terminal, or a file."""

    def make(terminal: bool) -> io.StringIO:
        screen = io.StringIO()
        monkeypatch.setattr(progress, "errors", Console(file=screen, force_terminal=terminal, width=100))
        return screen

    return make


@pytest.mark.parametrize("quiet", [False, True])
def test_on_a_terminal(errors: Callable[..., io.StringIO], quiet: bool) -> None:
    screen = errors(terminal=True)
    with progress.shown(quiet):
        adapt()
        work()
    for text in ("loading libraries", "adapting layers", "4/4", "loss 0.500", "31.2 samples/s"):
        assert (text in screen.getvalue()) != quiet, text


def test_the_bar_of_the_training_stays(errors: Callable[..., io.StringIO]) -> None:
    screen = errors(terminal=True)
    with progress.shown():
        work()
        report("saving")
    *_, last = [line for line in screen.getvalue().splitlines() if "/4" in line]
    assert "training" in last
    assert screen.getvalue().rpartition("saving")[2].count("training") == 1, "drawn once more, alone"


def test_in_a_file(errors: Callable[..., io.StringIO]) -> None:
    """A line where a stage begins, is gone back to, or ends."""
    screen = errors(terminal=False)
    with progress.shown():
        work()
    lines = screen.getvalue().splitlines()
    assert [line.partition("  ")[0] for line in lines] == [
        "loading libraries",
        "encoding texts",
        "training 0/4",
        "measuring 1/1",
        "training 3/4",
        "training 4/4",
    ]
    assert "loss 0.500  31.2 samples/s" in lines[-1]
    screen = errors(terminal=False)
    with progress.shown(lines=False):
        work()
    assert screen.getvalue() == ""


@pytest.mark.parametrize("full", [False, True])
def test_a_reader_that_ends_does_not_end_the_run(full: bool) -> None:
    """As in `fastpeft train 2>&1 | less`, left by q; nor does a log whose disk is full."""
    script = """
import sys
from fastpeft import progress
from fastpeft.support.stages import report
with progress.shown():
    for stage in ("encoding texts", "training", "saving"):
        report(stage)
sys.stdout.write("to the end")
"""
    read, write = os.pipe()
    os.close(read)
    if full:
        os.dup2(os.open("/dev/full", os.O_WRONLY), write)
    ended = subprocess.run([sys.executable, "-c", script], text=True, stderr=write, stdout=subprocess.PIPE)
    os.close(write)
    assert (ended.stdout, ended.returncode) == ("to the end", 0)


def test_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the pace of this process, which may have gone on in the middle."""
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    pace = progress._Pace(10)
    assert pace.left(20) is None
    now, pace.done = 104.0, 12
    assert (pace.seconds, pace.left(20), pace.left(None)) == (4.0, 16.0, None)
    assert progress.clock(3661.4) == "1:01:01"


def test_the_library_tells_and_draws_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[str, int, int | None]] = []
    with listening(lambda stage, done, total, measured: told.append((stage, done, total))):
        adapt()
    adapt()
    assert told == [("adapting layers", done, 4) for done in (1, 2, 3, 4)]
    assert capfd.readouterr() == ("", "")
