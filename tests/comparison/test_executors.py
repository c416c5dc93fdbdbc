"""Several cells at once: on this machine and on Ray, with threads divided, failures, lost workers and interruptions."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from compared import STAND_IN, config, results, started
from typer.testing import CliRunner

from fastpeft import CompareConfig, FastpeftError, compare
from fastpeft.cli import app
from fastpeft.comparison import executors, run
from fastpeft.comparison.executors import Local
from fastpeft.comparison.run import Comparison
from fastpeft.comparison.schedule import next_ready, seconds_of_all
from fastpeft.training.config import TrainConfig
from fastpeft.training.estimates import Estimate

TOLD = '"device": "a chip", "threads": int(os.environ["OMP_NUM_THREADS"]), "jobs": int(os.environ["FASTPEFT_JOBS"]), '
TOGETHER = """
while len((folder.parent / "started").read_text().splitlines()) < 2:
    time.sleep(0.01)
"""
AFTER_ITS_START = """
if values["init_from"] and not (pathlib.Path(values["init_from"]) / "metrics.json").is_file():
    sys.exit("Error: what it starts from is not finished.")
"""
LOSES_ITS_WORKER = """
lost = folder.parent / "lost"
if values["method"] == "lora" and not lost.exists():
    lost.touch()
    os.kill(os.getppid(), 9)
    time.sleep(60)
    (folder.parent / "outlived").touch()
"""
TIMES = {"samples_per_second", "train_seconds", "peak_rss_mb", "jobs", "command"}


def stand_in_that(*does: str) -> None:
    """Let stand-ins tell what they were given, and do more before they write."""
    told = STAND_IN.replace('"device": "a chip", ', TOLD).replace('parent / "pid"', 'parent / f"{folder.name}.pid"')
    Path("cell.py").write_text(told.replace("folder.mkdir()", "\n".join([*does, "folder.mkdir()"])))


@pytest.mark.usefixtures("stand_in")
def test_cells_run_at_once_and_divide_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_that(TOGETHER)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert compare(config("head", "lora", "bitfit"), jobs=2).failed == {}, "each of two waits for the other"
    assert started()[2] == "bitfit-seed0"
    assert [(row["threads"], row["jobs"]) for row in results()] == [("3", "2")] * 3
    told = "- all variants: Up to 2 cells ran at once on the machine. Compare speed"
    assert told in Path("out/report.md").read_text()


@pytest.mark.usefixtures("stand_in")
def test_a_speed_measured_beside_others_is_marked() -> None:
    compare(config("head"))
    stand_in_that()
    compare(config("head", "lora", "bitfit"), jobs=2)
    report = Path("out/report.md").read_text()
    assert "- lora †, bitfit †: Up to 2 cells ran at once on the machine." in report
    assert "| head | 0.500" in report


@pytest.mark.usefixtures("stand_in")
def test_a_chain_waits_and_a_failure_stops_no_other() -> None:
    stand_in_that(AFTER_ITS_START)
    chains = ("lst:init_from=mezo", "head:learning_rate=0.5", "lst:init_from=bitfit:learning_rate=0.25")
    result = compare(config(*chains, "mezo", "bitfit:learning_rate=0.25", "lora"), jobs=3)
    failed = ["head-learning_rate=0.5-seed0", "bitfit-learning_rate=0.25-seed0"]
    follower = "lst-init_from=bitfit-learning_rate=0.25-seed0"
    assert set(result.failed) == {*failed, follower}
    assert result.failed[follower] == f"{failed[1]}, whose result it starts from, has failed."
    assert sorted(started()) == sorted([*failed, "mezo-seed0", "lst-init_from=mezo-seed0", "lora-seed0"])


def interrupt_when_both_run() -> list[int]:
    """Send SIGINT once two stand-ins wait; their process ids are in the list afterwards."""
    pids: list[int] = []
    files = [Path(f"out/cells/{name}-learning_rate=0.125-seed0.pid").absolute() for name in ("head", "lora")]

    def wait() -> None:
        while not all(file.is_file() and file.read_text() for file in files):
            time.sleep(0.01)
        pids.extend(int(file.read_text()) for file in files)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=wait, daemon=True).start()
    return pids


@pytest.mark.long(but="local")
@pytest.mark.usefixtures("stand_in", "interruptible")
@pytest.mark.parametrize("executor", ["local", "ray"])
def test_an_interruption_ends_all_and_the_same_goes_on(executor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if executor == "ray":
        pytest.importorskip("ray")
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    stand_in_that()
    methods = ("head:learning_rate=0.125", "lora:learning_rate=0.125", "bitfit")
    pids = interrupt_when_both_run()
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        compare(config(*methods), jobs=2, executor=executor)
    assert signal.getsignal(signal.SIGTERM) is handler
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert [row["state"] for row in results()] == ["waiting"] * 3
    Path("cell.py").write_text(Path("cell.py").read_text().replace("== 0.125", "== -1"))
    assert compare(config(*methods), jobs=2).failed == {}


@pytest.mark.long
@pytest.mark.usefixtures("stand_in")
@pytest.mark.skipif(not Path("/proc").exists(), reason="processes are looked up in /proc")
def test_a_lost_worker_of_ray_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    stand_in_that(LOSES_ITS_WORKER)
    comparison = Comparison(config("head:learning_rate=0.5", "lora", "head"), jobs=2, executor="ray")
    failed = comparison.run().failed
    assert list(failed) == ["head-learning_rate=0.5-seed0"]
    assert failed["head-learning_rate=0.5-seed0"].endswith("with exit code 1: ZeroDivisionError: division by zero")
    assert started().count("lora-seed0") == 2
    assert not Path("out/cells/outlived").exists(), "a cell ends with its worker"
    assert "The worker was lost. On " in Path("out/cells/lora-seed0.log").read_text()
    assert [row["state"] for row in results()] == ["failed", "finished", "finished"]
    assert [(row["threads"], row["jobs"]) for row in results()[1:]] == [("1", "2")] * 2

    assert isinstance(comparison.executor, executors.Ray)
    folder = comparison.executor._own_folder
    assert (bool(folder), Path(folder).exists(), ray.is_initialized()) == (True, False, False)
    assert not [file for file in Path("/proc").glob("[0-9]*/cmdline") if folder.encode() in said(file)]


def test_a_cell_is_not_tried_for_ever(tmp_path: Path) -> None:
    """Ray does not count the workers that its guard of memory ends."""
    log = tmp_path / "cell.log"
    log.write_text("On a:\n")
    given = (["-c", "print('ran')"], str(tmp_path), str(log), {}, executors._WATCH, 3)
    codes = [executors._remote()(*given)[1] for _ in range(4)]
    assert codes == [0, 0, 0, 1]
    assert log.read_text().count("ran") == 3
    assert log.read_text().endswith("\nError: the worker was lost 4 times, perhaps for lack of memory.\n")


def test_a_node_is_given_the_variables_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Task:
        def remote(self, *given: Any) -> tuple[str, str]:
            return repr(given[0]), repr(sorted(given[3].items()))

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("FASTPEFT_JOBS", "9")
    monkeypatch.setenv("MINE", "1")
    ray: Any = executors.Ray.__new__(executors.Ray)
    ray._running, ray._task, ray._beside = set(), Task(), 2
    ray._begin(["-V"], tmp_path / "log", ())
    ((_, passed),) = ray._running
    assert "('HF_HUB_OFFLINE', '1')" in passed
    assert "('FASTPEFT_JOBS', '2')" in passed
    assert "MINE" not in passed


def said(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:  # that process has just ended
        return b""


@pytest.mark.long
def test_results_are_the_same_bits(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = {"model": "model", "data": "reviews.csv", "max_steps": 3, "deterministic": True, "batch_size": 4}
    methods = ["siva:rank=2", "lora:rank=2"]
    for output, jobs in (("one", 1), ("two", 2)):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "get_num_threads", lambda: 2)  # of which each of two has one, as OMP_NUM_THREADS says
            assert compare(CompareConfig(output=output, methods=methods, common=common), jobs=jobs).failed == {}
    for name in ("siva-rank=2-seed0", "lora-rank=2-seed0"):
        one, two = (place / output / "cells" / name for output in ("one", "two"))
        weights = [file.name for file in one.glob("*.safetensors")]
        assert weights
        for file in (*weights, "curves.json", "predictions.json"):
            assert (one / file).read_bytes() == (two / file).read_bytes()
        first, second = (json.loads((folder / "metrics.json").read_text()) for folder in (one, two))
        assert (first["threads"], first["jobs"], second["threads"], second["jobs"]) == (1, 1, 1, 2)
        kept = first.keys() - TIMES
        assert {key: first[key] for key in kept} == {key: second[key] for key in kept}


def test_each_has_a_card_in_turn(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    caplog.set_level(logging.WARNING, "fastpeft")
    with Local(3) as three:
        assert caplog.messages == ["3 cells run at once and share 2 GPUs and the memory there"]
        assert [three._environment(place)["CUDA_VISIBLE_DEVICES"] for place in range(3)] == ["4", "6", "4"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert Local(2)._environment(1)["CUDA_VISIBLE_DEVICES"] == "1"
    assert Local(1)._environment(0) == {}, "one at a time has what it had before"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "CUDA_VISIBLE_DEVICES" not in Local(2)._environment(1)


def test_the_schedule() -> None:
    cells = config("lst:init_from=head", "head", "lora", "bitfit").cells()
    head, lst, lora, bitfit = (
        next(cell for cell in cells if cell.method == name) for name in ("head", "lst", "lora", "bitfit")
    )
    order = [head, lst, lora, bitfit]
    assert next_ready(order, []) is head
    assert next_ready([lst, lora, bitfit], [head.name]) is lora, "a chain waits for its start"
    assert next_ready([lst], [head.name]) is None
    assert next_ready([lst], []) is lst
    seconds = {head.name: 4.0, lst.name: 5.0, lora.name: 1.0}
    assert [seconds_of_all(order, seconds, jobs) for jobs in (1, 2, 3)] == [10.0, 9.0, 9.0]
    assert seconds_of_all([lora, bitfit], {lora.name: 1.0, bitfit.name: 3.0}, 2) == 3.0


@pytest.mark.usefixtures("stand_in")
def test_a_dry_run_tells_the_time_of_several_at_once() -> None:
    command = ["compare", "--methods", "head,head:batch_size=4,lora", "--output", "out", "--dry-run"]
    told = {
        "head": Estimate(100.0, 2.0, 0.0),
        "head:batch_size=4": Estimate(100.0, 3.0, 0.0),
        "lora": Estimate(100.0, 4.0, 0.0),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.Comparison, "estimates", lambda comparison, budget_mb: told)
        shown = [CliRunner().invoke(app, [*command, *more]).stdout for more in ([], ["--jobs", "2"])]
    one, two = (" ".join(text.split()) for text in shown)
    assert "0 of 3 finished, about 9 s for the cells with an estimated time; nothing was written" in one
    told_two = "about 6 s for the cells with an estimated time, if 2 cells at once, with 1 CPU thread each, do not slow"
    assert f"{told_two} one another" in two
    assert not Path("out").exists()


@pytest.mark.usefixtures("two_threads")
def test_a_dry_run_times_with_the_threads_of_a_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def estimate(config: TrainConfig, budget_mb: float | None) -> Estimate:
        seen.append(torch.get_num_threads())
        return Estimate()

    monkeypatch.setattr(run, "estimate", estimate)
    monkeypatch.setattr(run, "process_seconds", lambda: 0.0)
    comparison = Comparison(CompareConfig(output=str(tmp_path / "out"), methods=["head", "lora"]), jobs=2)
    comparison.estimates()
    assert seen == [1, 1]
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--jobs", "0"], "--jobs is 0; it must be a whole number from 1"),
        (["--jobs", "-2"], "--jobs is -2; it must be a whole number from 1"),
        (["--executor", "slurm"], "--executor is 'slurm'; it must be local or ray."),
        (["--executor", "ray"], "Run pip install 'ray>=2.40'"),
    ],
)
def test_what_cannot_run_is_refused(options: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else find(name, *rest))
    shown = CliRunner().invoke(app, ["compare", "--methods", "head", "--output", "out", *options])
    assert (shown.exit_code, shown.stdout) == (2, "")
    assert message in " ".join(shown.stderr.split())
    assert not Path("out").exists()


@pytest.mark.usefixtures("stand_in")
def test_a_cluster_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    for address in ("127.0.0.1:1", "nowhere:port"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(FastpeftError, match=f"there is no Ray at '{address}', which RAY_ADDRESS names"):
            compare(config("head"), executor="ray")
    assert not Path("out").exists()


def test_jobs_of_another_type_are_refused() -> None:
    for jobs in ("2", 1.5, True):
        given: Any = jobs
        with pytest.raises(FastpeftError, match="it must be a whole number from 1"):
            executors.make("local", given, 3)
    assert executors.make("local", 5, 3).jobs == 3, "no more than there are cells"
