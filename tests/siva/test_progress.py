"""The bar shows where somebody looks and work takes long, and nowhere else."""

from __future__ import annotations

import io
import logging

import pytest
from peft import get_peft_model
from samples import tiny_classifier

from fastpeft import SivaConfig
from fastpeft.siva import progress as module

pytestmark = pytest.mark.usefixtures("one_thread")


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("patience", "level", "shown"),
    [(0.0, logging.INFO, True), (1e9, logging.INFO, False), (0.0, logging.ERROR, False)],
    ids=["long", "short", "quiet"],
)
def test_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, patience: float, level: int, shown: bool
) -> None:
    for variable in ("TERM", "NO_COLOR", "TTY_COMPATIBLE", "FORCE_COLOR"):
        monkeypatch.delenv(variable, raising=False)
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(module, "PATIENCE_S", patience)
    caplog.set_level(level, "fastpeft")
    get_peft_model(tiny_classifier(), SivaConfig(r=2, task_type="SEQ_CLS"))
    assert ("decomposing weights" in screen.getvalue()) == shown
    assert ("4/4" in screen.getvalue()) == shown


def test_elsewhere_nothing_is_written(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.0)
    with module.progress("working") as step:
        for _ in range(3):
            step(3)
    assert capfd.readouterr() == ("", "")
