"""One of several processes is killed or stops to answer: the others end with one message, and any number goes on."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forking import PROCESSES
from reliability import kill
from safetensors.torch import load_file
from samples import reviews, save_tiny_model, write_csv
from transformers.trainer_callback import DefaultFlowCallback

from fastpeft.mezo import Journal
from fastpeft.training.export import export
from fastpeft.training.run_folder import RunFolder

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")

SECONDS = 60  # that anything may take: far above what it does
SIGNALLED_AT = 7  # of `kill.STEPS`, after two checkpoints
# plain gradient descent, since Adam makes whole steps of gradients that are all rounding; a window without dropout
RUNS = {
    "siva": ("--method=siva", "--learning-rate=0.1", "--set=optim=sgd", "--save-steps=3"),
    "k-lst": ("--method=k-lst", "--window=3", "--learning-rate=0.1", "--set=optim=sgd", "--save-steps=3"),
    "mezo": ("--method=mezo", "--learning-rate=1e-3"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without dropout, which processes draw each for itself, and rows that fill every batch."""
    folder = tmp_path_factory.mktemp("place")
    save_tiny_model(folder / "model", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    (folder / "data").mkdir()
    write_csv(folder / "data" / "train.csv", reviews(64))
    write_csv(folder / "data" / "dev.csv", reviews(24, seed=1))
    return folder


def command(place: Path, output: Path, arguments: tuple[str, ...]) -> list[str]:
    given = ("--model", str(place / "model"), "--data", str(place / "data"), "--output", str(output))
    return ["train", "--resume", f"--max-steps={kill.STEPS}", *given, *arguments]


def signal_at_a_step(number: signal.Signals) -> None:
    """Let this process send itself a signal when it has made a step in the middle, however fast it is."""
    on_step_end = DefaultFlowCallback.on_step_end

    def signalled(self: Any, args: Any, state: Any, *others: Any, **further: Any) -> Any:
        if state.global_step == SIGNALLED_AT:
            os.kill(os.getpid(), number)
        return on_step_end(self, args, state, *others, **further)

    DefaultFlowCallback.on_step_end = signalled


def work(
    rank: int, size: int, port: int, messages: Path, command: list[str], number: signal.Signals | None = None
) -> None:
    """What one of several processes does; its exit code is that of the command."""
    if number is not None:
        signal_at_a_step(number)
    from fastpeft.cli import app

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    file = os.open(messages, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(file, stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    app(command)


class Launched:
    """Processes that train together."""

    def __init__(
        self,
        place: Path,
        output: Path,
        size: int,
        *arguments: str,
        signals: dict[int, signal.Signals] | None = None,
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.output = output
        self.messages = [output.parent / f"{output.name} rank {rank} of {size}" for rank in range(size)]
        self.processes = [
            PROCESSES.Process(
                target=work,
                args=(rank, size, port, file, command(place, output, arguments), (signals or {}).get(rank)),
            )
            for rank, file in enumerate(self.messages)
        ]
        for process in self.processes:
            process.start()

    def exit_codes(self) -> list[int | None]:
        """Of all processes, once they have ended."""
        for process in self.processes:
            process.join(SECONDS)
            if process.exitcode is None:
                process.kill()
                process.join()
        return [process.exitcode for process in self.processes]

    def said(self) -> list[str]:
        """What each printed, in one line."""
        return [" ".join(file.read_text().split()) if file.exists() else "" for file in self.messages]


@pytest.fixture
def launch(place: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., Launched]:
    """Start processes, none of which outlives the test."""

    def start(size: int, *arguments: str, **signals: Any) -> Launched:
        launched = Launched(place, tmp_path / "run", size, *arguments, **signals)
        request.addfinalizer(lambda: [process.kill() for process in launched.processes])
        return launched

    return start


@pytest.fixture(scope="module")
def alone(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of one process that nobody disturbs, by its kind."""
    made: dict[str, Path] = {}

    def run(kind: str) -> Path:
        if kind not in made:
            launched = Launched(place, tmp_path_factory.mktemp(kind) / "run", 1, *RUNS[kind])
            assert launched.exit_codes() == [0], launched.said()
            made[kind] = launched.output
        return made[kind]

    return run


def weights(folder: Path) -> dict[str, Any]:
    """The weights of a result, adapter or side network or whole model."""
    (file,) = folder.glob("*model.safetensors")
    return load_file(file)


def assert_close(found: Path, expected: Path) -> None:
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=3e-4)  # other rows would move them by 1e-2
    found_metrics, expected_metrics = RunFolder(found).metrics(), RunFolder(expected).metrics()
    assert found_metrics["accuracy"] == expected_metrics["accuracy"]
    assert found_metrics["loss"] == pytest.approx(expected_metrics["loss"], rel=2e-3), "of the rows of all processes"


def lose(launched: Launched, rank: int) -> None:
    """See how the others end where one of the processes was killed in the middle."""
    codes = launched.exit_codes()
    assert codes.pop(rank) == -signal.SIGKILL, launched.said()
    assert set(codes) == {2}, launched.said()
    others = launched.said()
    del others[rank]
    for said in others:
        assert "another process that trains with this one has ended, or does not answer" in said
        assert f"`fastpeft train --output {launched.output} --resume`" in said
        assert "Traceback" not in said
    assert kill.unreadable(launched.output) == []


def test_a_folder_in_use_is_refused_by_all(launch: Callable[..., Launched], tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run").held():
        launched = launch(2, *RUNS["siva"])
        assert launched.exit_codes() == [2, 2], launched.said()
    for said in launched.said():
        assert "another run writes into the output folder" in said
        assert "Traceback" not in said
    assert list((tmp_path / "run").iterdir()) == []


SIZES = [
    pytest.param(2, 1, 1, id="2, then 1"),
    pytest.param(2, 0, 4, id="2, then 4", marks=pytest.mark.slow),
    pytest.param(4, 3, 2, id="4, then 2", marks=pytest.mark.slow),
]


@pytest.mark.long
@pytest.mark.parametrize(("size", "lost", "then"), SIZES)
@pytest.mark.parametrize("kind", [*(pytest.param(kind, marks=pytest.mark.slow) for kind in ("k-lst", "siva")), "mezo"])
def test_any_number_goes_on(
    launch: Callable[..., Launched],
    alone: Callable[[str], Path],
    tmp_path: Path,
    kind: str,
    size: int,
    lost: int,
    then: int,
) -> None:
    launched = launch(size, *RUNS[kind], signals={lost: signal.SIGKILL})
    lose(launched, lost)
    far, journal = kill.reached(launched.output), RunFolder(launched.output).journal
    before = list(Journal.open(journal).records())[:far] if kind == "mezo" else []
    resumed = launch(then, *RUNS[kind])
    assert resumed.exit_codes() == [0] * then, resumed.said()
    assert_close(resumed.output, alone(kind))
    if kind == "mezo":  # what it had found is kept, and replayed to the bit
        assert list(Journal.open(journal).records())[:far] == before
        replayed = weights(export(resumed.output, tmp_path / "replayed", step=kill.STEPS))
        assert all(torch.equal(replayed[name], tensor) for name, tensor in weights(resumed.output).items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["siva", "mezo"])
def test_one_that_does_not_answer_is_lost_after_the_timeout(launch: Callable[..., Launched], kind: str) -> None:
    launched = launch(2, *RUNS[kind], "--set=ddp_timeout=10", signals={1: signal.SIGSTOP})
    launched.processes[0].join(SECONDS)
    said = launched.said()[0]
    launched.processes[1].kill()
    assert launched.processes[0].exitcode == 2, said
    assert "does not answer (Timed out" in said or "does not answer (Application timeout" in said


@pytest.mark.long
@pytest.mark.parametrize("kind", ["siva", pytest.param("mezo", marks=pytest.mark.slow)])
def test_a_signal_to_one_stops_all_at_the_same_step(
    launch: Callable[..., Launched], alone: Callable[[str], Path], kind: str
) -> None:
    launched = launch(2, *RUNS[kind], signals={1: signal.SIGTERM})
    assert launched.exit_codes() == [130, 130], launched.said()
    resumed = launch(2, *RUNS[kind])
    assert resumed.exit_codes() == [0, 0], resumed.said()
    assert_close(resumed.output, alone(kind))
    assert RunFolder(resumed.output).metrics()["processes"] == 2


def test_a_step_that_spoils_the_weights_ends_all(launch: Callable[..., Launched]) -> None:
    launched = launch(2, "--method=siva", "--learning-rate=1e30", "--set=optim=sgd")
    assert launched.exit_codes() == [2, 2], launched.said()
    assert all("not finite" in said or "loss is" in said for said in launched.said())


@pytest.mark.slow
def test_by_torchrun(place: Path, alone: Callable[[str], Path], tmp_path: Path) -> None:
    """As a person starts them; the launcher says which one ended."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fastpeft"]
    arguments = command(place, tmp_path / "run", RUNS["siva"])
    done = subprocess.run([*torchrun, *arguments], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert_close(tmp_path / "run", alone("siva"))
