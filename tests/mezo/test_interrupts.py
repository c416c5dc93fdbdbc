"""Real signals at any moment: no weight is left where it should not be, and nothing is lost."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fastpeft import MeZO
from fastpeft.mezo import Exact, InPlace, Journal
from fastpeft.support.interrupts import uninterrupted

_AGAIN = 2.0  # seconds until the next signal


class Alarm(BaseException):
    """As KeyboardInterrupt, which pytest would take for its own."""


def ring(*_: Any) -> None:
    raise Alarm


@pytest.fixture
def alarm() -> Iterator[None]:
    """The handler of SIGALRM raises, as that of Ctrl-C does."""
    before = signal.signal(signal.SIGALRM, ring)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    torch.set_grad_enabled(True)  # an interrupt may also part torch's no_grad from its end


def interrupted(work: Callable[[], Any], seconds: float) -> None:
    """Repeat `work` until a signal ends it after this time.

    Python drops what a handler raises inside a callback of its garbage collector, of which hypothesis has one; then the
    next signal ends it.
    """

    def repeat() -> None:
        signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN)
        try:
            while True:
                work()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    with pytest.raises(Alarm):
        repeat()


# -- uninterrupted -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGALRM])
def test_a_signal_waits_for_the_end(number: signal.Signals) -> None:
    done = []

    @uninterrupted()
    def outer() -> None:
        with uninterrupted():
            signal.raise_signal(number)
            done.append("inside")
        done.append("between")

    before = signal.signal(number, ring)
    try:
        with pytest.raises(Alarm):
            outer()
        assert done == ["inside", "between"]
        assert signal.getsignal(number) is ring
    finally:
        signal.signal(number, before)


@pytest.mark.usefixtures("alarm")
def test_each_signal_that_came_is_handled_though_another_raises() -> None:
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    @uninterrupted()
    def work() -> None:
        for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGTERM):
            signal.raise_signal(number)
        assert not came

    before = signal.signal(signal.SIGTERM, note)
    try:
        with pytest.raises(Alarm):
            work()
        assert came == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is note
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_are_left_alone() -> None:
    done = []

    @uninterrupted()
    def work() -> None:
        done.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [signal.getsignal(signal.SIGINT)]


# -- MeZO --------------------------------------------------------------------------------------------------------------


@pytest.mark.long(but="False")
@pytest.mark.usefixtures("alarm")
@pytest.mark.parametrize("defer", [False, True])
def test_weights_are_whole_after_an_interrupt_at_any_moment(defer: bool, tmp_path: Path) -> None:
    """Three groups, so that a pass has moments between them; and the journal knows each bit of what happened."""
    chance = random.Random(0)
    params = [nn.Parameter(torch.randn(3_000)) for _ in range(3)]
    before = [p.detach().clone() for p in params]
    optimizer = MeZO([{"params": [p]} for p in params], lr=0.0, eps=1.0, rule=InPlace(defer=defer))
    optimizer.record(tmp_path / "run")
    loss = lambda: params[0].double().sum()  # noqa: E731
    for _ in range(200):
        interrupted(lambda: optimizer.step(loss), chance.uniform(1e-4, 4e-3))
        optimizer.settle()
        # eps is 1, and the roundings of all steps stay far below it
        assert max((p - q).abs().max() for p, q in zip(params, before)) < 0.05
    again = [q.clone() for q in before]
    Journal.open(tmp_path / "run").replay(again)
    assert all(torch.equal(p, q) for p, q in zip(params, again))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.one(x).tanh())


@pytest.mark.usefixtures("alarm")
def test_exact_puts_every_parameter_back_after_an_interrupt_at_any_moment() -> None:
    chance = random.Random(0)
    model, x = Two(), torch.ones(4, 8)
    params = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in params.items()}
    optimizer = MeZO(model, lr=0.0, rule=Exact())
    for _ in range(200):
        interrupted(lambda: optimizer.step(lambda: model(x).square().mean()), chance.uniform(1e-4, 4e-3))
        optimizer.settle()
        now = dict(model.named_parameters())
        assert all(now[name] is p and torch.equal(p, before[name]) for name, p in params.items())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert not is_in_torch_dispatch_mode()
