"""The journal of a MeZO run: weights made again to the bit, whatever befell the run or the file."""

from __future__ import annotations

import copy
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mezo_networks import equal as same
from mezo_networks import fit, network, weights
from torch import nn

from fastpeft import FastpeftError, MeZO
from fastpeft.mezo import FZOO, SPSA, InPlace, Journal, Kind, replay
from fastpeft.mezo.journal_format import pack_header
from fastpeft.ops.noise import NAMES

SETTINGS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1},
    {"estimator": SPSA(3, "rademacher")},
    {"estimator": FZOO(4), "lr": 1e-5},
]


def optimizer_of(model: nn.Module, **settings: Any) -> MeZO:
    settings = {"lr": 1e-2, **settings}
    own = {"eps": 2e-3, "lr": settings["lr"] / 2}
    groups = [{"params": model[0].named_parameters("0")}, {"params": model[2].named_parameters("2"), **own}]
    return MeZO(groups, **settings)


def equal(one: nn.Module, other: nn.Module) -> bool:
    return same(weights(one), weights(other))


def falling(optimizer: MeZO, done: int = 0) -> torch.optim.lr_scheduler.LRScheduler:
    """A schedule of which `done` steps are made."""
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step, last_epoch=done - 1)


def trained(path: Path, steps: int = 10, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[Any, MeZO]:
    """A run with a schedule and a journal."""
    model = network(dtype)
    optimizer = optimizer_of(model, **settings)
    optimizer.record(path)
    schedule = falling(optimizer)
    for step in range(steps):
        optimizer.step(fit(model, step))
        schedule.step()
    optimizer.settle()
    return model, optimizer


# -- weights made again ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("defer", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_replay_on_the_base_model_gives_the_bits(
    tmp_path: Path, settings: dict[str, Any], dtype: torch.dtype, defer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "_BLOCK", 12)  # several blocks, the last one smaller, an end within four lanes
    model, _ = trained(tmp_path / "run", dtype=dtype, rule=InPlace(defer=defer), **settings)
    again = network(dtype)
    Journal.open(tmp_path / "run").replay(again)
    assert equal(again, model)
    assert not equal(again, network(dtype))


def test_replay_goes_on_from_the_weights_of_a_checkpoint(tmp_path: Path) -> None:
    middle, _ = trained(tmp_path / "part", steps=6)
    whole, _ = trained(tmp_path / "run")
    Journal.open(tmp_path / "run").replay(middle, start=6)
    assert equal(middle, whole)
    early = network()
    Journal.open(tmp_path / "run").replay(early, stop=6)
    Journal.open(tmp_path / "run").replay(early, start=6)
    assert equal(early, whole)


def test_a_resumed_run_ends_with_the_bits_of_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, _ = trained(tmp_path / "whole", steps=10)
    trained(tmp_path / "part", steps=4)
    model = network()
    optimizer = optimizer_of(model)
    optimizer.resume(tmp_path / "part")
    assert optimizer.steps_done == 4
    schedule = falling(optimizer, 4)
    for step in range(4, 10):
        optimizer.step(fit(model, step))
        schedule.step()
    assert equal(model, whole)
    again = network()
    Journal.open(tmp_path / "part").replay(again)
    assert equal(again, model)


def test_skipped_and_dropped_steps_are_repeated_with_their_roundings(tmp_path: Path) -> None:
    """In half precision even a step that was not made leaves its trace."""
    model = network(torch.bfloat16)
    optimizer = optimizer_of(model, estimator=SPSA(2), rule=InPlace(on_nonfinite="skip", defer=True))
    optimizer.record(tmp_path / "run")

    def failing_at(call: int, how: Callable[[], Any]) -> Callable[[], Any]:
        calls = 0

        def closure() -> Any:
            nonlocal calls
            calls += 1
            return how() if calls == call else fit(model, 0)()

        return closure

    def interrupt() -> None:
        raise KeyboardInterrupt

    optimizer.step(fit(model, 0))
    optimizer.step(failing_at(3, lambda: math.nan))
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(failing_at(2, interrupt))
    optimizer.step(fit(model, 1))
    optimizer.estimate(fit(model, 2))
    optimizer.settle()
    journal = Journal.open(tmp_path / "run")
    kinds = [record.kind for record in journal.records()]
    assert kinds == [Kind.MADE, Kind.SKIPPED, Kind.DROPPED, Kind.MADE, Kind.DROPPED]
    assert [record.step for record in journal.records()] == [0, 1, 2, 2, 3]
    assert journal.steps == optimizer.steps_done == 3
    again = network(torch.bfloat16)
    journal.replay(again)
    assert equal(again, model)


def interrupted(optimizer: MeZO, model: nn.Module) -> None:
    """An exception in the second loss of a step, which is restored to rounding."""
    calls: list[int] = []

    def closure() -> Any:
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fit(model, 0)()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)


def test_weights_saved_before_and_after_dropped_estimates_are_told_apart(tmp_path: Path) -> None:
    """All of these are of step 3."""
    model, optimizer = trained(tmp_path / "run", steps=3, dtype=torch.bfloat16, weight_decay=0.1)
    saved = []
    for _ in range(3):
        saved.append((copy.deepcopy(model), optimizer.state_dict()))
        interrupted(optimizer, model)
    assert not equal(saved[0][0], saved[2][0])
    for step in range(3, 6):
        optimizer.step(fit(model, step))
    for again, state in saved:
        resumed = optimizer_of(again, weight_decay=0.1)
        resumed.resume(tmp_path / "run", weights_at=state)
        assert equal(again, model)
    with pytest.raises(FastpeftError, match=r"dropped after 3 steps .* Give the optimizer's state"):
        optimizer_of(saved[1][0], weight_decay=0.1).resume(tmp_path / "run", weights_at=3)
    with pytest.raises(FastpeftError, match="weights are at 4, behind 3"):
        optimizer_of(saved[1][0], weight_decay=0.1).resume(tmp_path / "run", weights_at=4, steps=3)


def test_a_journal_may_begin_after_a_dropped_estimate(tmp_path: Path) -> None:
    model = network(torch.bfloat16)
    optimizer = optimizer_of(model)
    interrupted(optimizer, model)
    before, state = copy.deepcopy(model), optimizer.state_dict()
    loaded = optimizer_of(model)
    loaded.load_state_dict(state)
    assert loaded.state_dict() == state
    optimizer.record(tmp_path / "run")
    interrupted(optimizer, model)
    optimizer.step(fit(model, 0))
    optimizer_of(before).resume(tmp_path / "run", weights_at=state)
    assert equal(before, model)


def test_a_loaded_state_takes_the_journal_back_with_it(tmp_path: Path) -> None:
    file = tmp_path / "run"
    model, optimizer = trained(file, steps=3)
    before, state, content = copy.deepcopy(model.state_dict()), optimizer.state_dict(), file.read_bytes()
    for step in range(3, 6):
        optimizer.step(fit(model, step))
    model.load_state_dict(before)
    optimizer.load_state_dict(state)
    assert Journal.open(file).steps == 6  # nothing has taken the place of those
    assert optimizer.journal.content() == content
    optimizer.step(fit(model, 7))
    assert Journal.open(file).steps == optimizer.journal.steps == optimizer.steps_done == 4
    again = network()
    Journal.open(file).replay(again)
    assert equal(again, model)


def test_a_state_that_the_journal_cannot_follow_is_refused(tmp_path: Path) -> None:
    _, ahead = trained(tmp_path / "ahead", steps=3)
    _, other = trained(tmp_path / "other", steps=1, estimator=SPSA(2))
    model, optimizer = trained(tmp_path / "run", steps=1)
    for state, message in (
        (ahead.state_dict(), "ends after 1"),
        (other.state_dict(), "another num_estimates 1, not 2"),
    ):
        with pytest.raises(FastpeftError, match=message):
            optimizer.load_state_dict(state)
    optimizer.step(fit(model, 1))
    optimizer.steps_done = 5
    with pytest.raises(FastpeftError, match="stands after 2 steps, so it takes no record of a step after 5"):
        optimizer.step(fit(model, 1))
    assert Journal.open(tmp_path / "run").steps == 2


def test_resuming_earlier_loses_nothing_before_the_next_step(tmp_path: Path) -> None:
    file = tmp_path / "run"
    trained(file, steps=5)
    content, model = file.read_bytes(), network()
    optimizer = optimizer_of(model)
    optimizer.resume(file, steps=2)
    assert file.read_bytes() == content
    optimizer.step(fit(model, 2))
    assert Journal.open(file).steps == 3


def test_a_strided_parameter(tmp_path: Path) -> None:
    def model() -> nn.Parameter:
        return nn.Parameter(torch.linspace(-1, 1, 30).view(5, 6).t())

    ours, again = model(), model()
    optimizer = MeZO([ours], lr=1e-2)
    optimizer.record(tmp_path / "run")
    for _ in range(3):
        optimizer.step(lambda: (ours**2).sum())
    Journal.open(tmp_path / "run").replay([again])
    assert torch.equal(ours, again)


def test_twenty_thousand_steps_are_under_a_megabyte(tmp_path: Path) -> None:
    _, optimizer = trained(tmp_path / "run", steps=2)
    before = (tmp_path / "run").stat().st_size
    optimizer.step(lambda: 1.0)
    per_step = (tmp_path / "run").stat().st_size - before
    assert per_step == 44  # two groups; 36 with one
    assert before + 20_000 * per_step < 2**20
    record = list(Journal.open(tmp_path / "run").records())[-1]
    assert (record.step, record.points, record.rates) == (2, 2, (1e-2 * 0.9**2, 5e-3 * 0.9**2))


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [1, 20, 43])
def test_a_torn_last_record_is_dropped_with_a_message(
    tmp_path: Path, lost: int, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "run"
    whole, _ = trained(tmp_path / "whole", steps=4)
    trained(file, steps=5)
    content = file.read_bytes()
    file.write_bytes(content[:-lost])
    assert (Journal.open(file).steps, Journal.open(file).torn) == (4, 44 - lost)
    model = network()
    optimizer = optimizer_of(model)
    with caplog.at_level("WARNING", logger="fastpeft"):
        optimizer.resume(file)
    (warning,) = caplog.messages
    assert f"its {44 - lost} bytes are dropped" in warning
    assert equal(model, whole)
    optimizer.step(fit(model, 4))  # the torn bytes are written over
    assert len(file.read_bytes()) == len(content)
    assert Journal.open(file).steps == 5


def test_a_last_step_that_is_made_once_more_never_leaves_the_file(tmp_path: Path) -> None:
    """A resumed run makes its last step again, and may be killed again while it does."""
    file = tmp_path / "run"
    trained(file, steps=5)
    before, written = file.read_bytes(), file.stat().st_mtime_ns
    model = network()
    optimizer = optimizer_of(model)
    optimizer.resume(file, steps=4)
    schedule = falling(optimizer, done=4)
    optimizer.step(fit(model, 4))
    assert (file.read_bytes(), file.stat().st_mtime_ns) == (before, written)
    schedule.step()
    optimizer.step(fit(model, 5))
    assert file.read_bytes()[: len(before)] == before
    assert Journal.open(file).steps == 6


@pytest.mark.parametrize(
    "tail", [bytes(44), bytes(4096), b"\xff" * 100, b"x" * 44 + bytes(20)], ids=["zeros", "page", "ones", "garbage"]
)
def test_all_that_follows_the_last_whole_record_is_dropped(
    tmp_path: Path, tail: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """A power cut may leave the file longer than what reached the disk."""
    file = tmp_path / "run"
    whole, _ = trained(tmp_path / "whole", steps=6)
    trained(file, steps=5)
    content = file.read_bytes()
    file.write_bytes(content[:-44] + tail)
    assert Journal.open(file).steps == 4
    model = network()
    optimizer = optimizer_of(model)
    with caplog.at_level("WARNING", logger="fastpeft"):
        optimizer.resume(file)
    assert f"its {len(tail)} bytes are dropped" in caplog.text
    schedule = falling(optimizer, done=4)
    for step in (4, 5):
        optimizer.step(fit(model, step))
        schedule.step()
    assert equal(model, whole)
    assert file.read_bytes() == (tmp_path / "whole").read_bytes()


def test_damaged_records_that_a_whole_one_follows_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "run"
    trained(file, steps=6)
    content = file.read_bytes()
    file.write_bytes(content[: -4 * 44] + bytes(3 * 44) + content[-44:])
    with pytest.raises(FastpeftError, match="record 3 of 6"):
        Journal.open(file)
    file.write_bytes(content[: -4 * 44] + bytes(3 * 44) + content[-44:] + bytes(50))
    with pytest.raises(FastpeftError, match="record 3 of 7"):
        Journal.open(file)


def test_the_first_record_of_a_second_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut may take: the records since the last flush."""
    seconds, flushed = [100.0], []
    monkeypatch.setattr("fastpeft.mezo.journal.time", SimpleNamespace(monotonic=lambda: seconds[0]))
    model, optimizer = trained(tmp_path / "run", steps=0)
    monkeypatch.setattr(os, "fsync", lambda _: flushed.append(Journal.open(tmp_path / "run").steps))
    for step, passed in enumerate((0.0, 0.4, 0.5, 0.2, 0.7, 0.5)):
        seconds[0] += passed
        optimizer.step(fit(model, step))
    assert flushed == [1, 4, 6]


@pytest.mark.parametrize("place", [0, 4, 17, 43])
def test_a_damaged_record_before_the_last_is_refused_by_number(tmp_path: Path, place: int) -> None:
    trained(tmp_path / "run", steps=5)
    content = bytearray((tmp_path / "run").read_bytes())
    content[len(content) - 3 * 44 + place] ^= 1
    (tmp_path / "run").write_bytes(content)
    with pytest.raises(FastpeftError, match="record 3 of 5"):
        Journal.open(tmp_path / "run")


def test_a_record_out_of_its_place_is_refused(tmp_path: Path) -> None:
    trained(tmp_path / "run", steps=5)
    content = (tmp_path / "run").read_bytes()
    (tmp_path / "run").write_bytes(content[: -3 * 44] + content[-44:] + content[-2 * 44 :])
    with pytest.raises(FastpeftError, match="record 3 of 5"):
        Journal.open(tmp_path / "run")


@pytest.mark.parametrize("content", [b"", b"x" * 100, None], ids=["empty", "another", "header"])
def test_what_is_no_journal(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "run"
    if content is None:
        trained(file)
        content = file.read_bytes().replace(b'"seed": 0', b'"seed": 1')
    file.write_bytes(content)
    for path in (file, str(file)):
        with pytest.raises(FastpeftError, match="is not a journal"):
            Journal.open(path)


@pytest.mark.parametrize("kind", NAMES)
def test_a_journal_of_other_noise_is_refused_by_its_name(tmp_path: Path, kind: str) -> None:
    optimizer = optimizer_of(network(), estimator=SPSA(noise=kind))
    optimizer.record(tmp_path / "run")
    header = dict(Journal.open(tmp_path / "run").header)
    assert header["drawn_by"] == NAMES[kind]
    (tmp_path / "run").write_bytes(pack_header(header | {"drawn_by": "another"}))
    for read in (lambda: Journal.open(tmp_path / "run"), lambda: optimizer_of(network()).resume(tmp_path / "run")):
        with pytest.raises(FastpeftError, match=rf"{kind} noise was drawn by 'another'; .* by '{NAMES[kind]}'"):
            read()


def test_what_does_not_fit_the_journal_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run"
    model, optimizer = trained(file)
    with pytest.raises(FastpeftError, match="does not have the weights"):
        Journal.open(file).replay(model)  # already trained
    with pytest.raises(FastpeftError, match=r"no parameter '0\.weight'"):
        Journal.open(file).replay(nn.Linear(5, 7))
    with pytest.raises(FastpeftError, match="number, shape or dtype"):
        Journal.open(file).replay(network(torch.float64))
    with pytest.raises(FastpeftError, match=r"exists\. Resume"):
        optimizer_of(network()).record(file)
    for settings, what in (
        ({"seed": 1}, "seed 0, not 1"),
        ({"weight_decay": 0.5}, r"weight_decay of group 0 0\.0, not 0\.5"),
    ):
        with pytest.raises(FastpeftError, match=what):
            optimizer_of(network(), **settings).resume(file)
    for other, what in (
        (network(torch.float64), r"parameter 0 of group 0 .*'0\.weight'.*float32.*, not .*float64"),
        (nn.Sequential(nn.Linear(5, 7, bias=False), nn.Tanh(), nn.Linear(7, 3)), "parameter 1 of group 0 .*, not None"),
    ):
        with pytest.raises(FastpeftError, match=what):
            optimizer_of(other).resume(file)
    with pytest.raises(FastpeftError, match="cannot read the journal"):
        optimizer_of(network()).resume(tmp_path / "none")
    with pytest.raises(FastpeftError, match="takes no further parameters"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    optimizer.param_groups[0]["eps"] = 1.0
    with pytest.raises(FastpeftError, match="eps changed"):
        optimizer.step(fit(model, 0))


def test_names_are_those_of_the_model_that_was_compiled(tmp_path: Path) -> None:
    model = network()
    optimizer = MeZO(torch.compile(model, backend="eager"), lr=1e-2)
    optimizer.record(tmp_path / "run")
    optimizer.step(fit(model, 0))
    again = network()
    Journal.open(tmp_path / "run").replay(again)
    assert equal(again, model)
    MeZO(network(), lr=1e-2).resume(tmp_path / "run")


def test_parameters_without_names_are_given_in_their_order(tmp_path: Path) -> None:
    model, again = network(), network()
    optimizer = MeZO(model.parameters(), lr=1e-2)
    optimizer.record(tmp_path / "run")
    optimizer.step(fit(model, 0))
    with pytest.raises(FastpeftError, match="without names"):
        Journal.open(tmp_path / "run").replay(again)
    Journal.open(tmp_path / "run").replay(list(again.parameters()))
    assert equal(again, model)


# -- a run that is killed ----------------------------------------------------------------------------------------------

_KILLED = """
import sys, torch
from pathlib import Path
sys.path[:0] = {folders!r}
from fastpeft.mezo import InPlace
from mezo_networks import fit, network
from test_journal import optimizer_of
torch.set_num_threads(1)
model = network(torch.bfloat16)
optimizer = optimizer_of(model, rule=InPlace(defer=True))
file = Path(sys.argv[1])
optimizer.resume(file) if file.exists() else optimizer.record(file)
print("ready", flush=True)
for step in range(optimizer.steps_done, 1_000_000):
    optimizer.step(fit(model, step))
"""


@pytest.mark.kill
def test_a_killed_run_is_made_again_to_the_bit(tmp_path: Path) -> None:
    """Three times in a row, each from where the last kill left the journal."""
    script = _KILLED.format(folders=[str(folder) for folder in Path(__file__).parents[:2]])
    steps = 0
    for delay in (0.2, 0.05, 0.4):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        journal = Journal.open(tmp_path / "run")
        assert journal.steps > steps
        steps = journal.steps
    model, again = network(torch.bfloat16), network(torch.bfloat16)
    optimizer = optimizer_of(model)
    for step in range(steps):
        optimizer.step(fit(model, step))
    journal.replay(again)
    assert equal(again, model)
