"""How far the decomposition is: told to who listens, drawn by the command line where somebody looks, nowhere else."""

from __future__ import annotations

import io

import pytest
from peft import get_peft_model
from rich.console import Console
from samples import tiny_classifier

from fastpeft import SivaConfig, console
from fastpeft.siva.progress import listening

pytestmark = pytest.mark.usefixtures("one_thread")


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def adapt() -> None:
    get_peft_model(tiny_classifier(), SivaConfig(r=2, task_type="SEQ_CLS"))


@pytest.mark.parametrize(
    ("patience", "quiet", "shown"),
    [(-1.0, False, True), (1e9, False, False), (-1.0, True, False)],
    ids=["long", "short", "quiet"],
)
def test_on_a_terminal(monkeypatch: pytest.MonkeyPatch, patience: float, quiet: bool, shown: bool) -> None:
    for variable in ("TERM", "NO_COLOR", "TTY_COMPATIBLE", "FORCE_COLOR"):
        monkeypatch.delenv(variable, raising=False)
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(console, "errors", Console(stderr=True))  # finds out when it is made whether somebody looks
    monkeypatch.setattr(console, "PATIENCE_S", patience)
    with console.progress_bar(quiet):
        adapt()
    assert ("decomposing weights" in screen.getvalue()) == shown
    assert ("4/4" in screen.getvalue()) == shown


def test_the_library_tells_and_draws_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[int, int]] = []
    with listening(lambda done, total: told.append((done, total))):
        adapt()
    adapt()
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert capfd.readouterr() == ("", "")
