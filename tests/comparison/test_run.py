"""Comparisons that run: what is repeated, what goes on, and what failures and interruptions leave behind."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from compared import STAND_IN, config, finish, results, started
from typer.testing import CliRunner

import fastpeft
from fastpeft import CompareConfig, FastpeftError, compare
from fastpeft.cli import app
from fastpeft.comparison import run
from fastpeft.comparison.executors import Local
from fastpeft.comparison.run import Comparison
from fastpeft.data.examples import Examples, TextData, load_data
from fastpeft.data.problems import CLASSIFICATION, NEXT_WORDS, PROBLEMS, REGRESSION, Problem
from fastpeft.prompts.template import Prompt
from fastpeft.support import interrupts
from fastpeft.training.config import TrainConfig
from fastpeft.training.evaluation import evaluate_zero_shot
from fastpeft.training.task import data_for


@pytest.mark.usefixtures("stand_in")
def test_results_and_report() -> None:
    result = compare(config("siva:targets=query+value", "head", seeds=2), command="fastpeft compare ...")
    assert (result.folder, result.failed) == (Path("out"), {})
    rows = results()
    assert [(row["variant"], row["method"], row["seed"], row["state"]) for row in rows] == [
        ("siva:targets=query+value", "siva", "0", "finished"),
        ("siva:targets=query+value", "siva", "1", "finished"),
        ("head", "head", "0", "finished"),
        ("head", "head", "1", "finished"),
    ]
    assert rows[1]["accuracy"] == "0.6"
    assert rows[1]["versions"] == "python 3.11, torch 2.10"
    assert rows[1]["command"] == "fastpeft train"
    assert "labels" not in rows[1]
    report = Path("out/report.md").read_text()
    header = "method | accuracy | F1 | samples/s | peak memory, MB | trainable parameters | learning rate | seeds"
    assert f"| {header} |\n|---|---:|---:|---:|---:|---:|---:|---:|\n" in report
    assert "| siva:targets=query+value | 0.550 ± 0.071 | 0.250 | 8.0 | 1,234 | 1,234 | 1e-05 | 2 |\n" in report
    assert "| head | 0.550 ± 0.071 |" in report
    assert "- data: demo, 5,000 training rows, 50 dev rows\n" in report
    assert "- device: a chip\n- versions: python 3.11, torch 2.10\n" in report
    assert "```\nfastpeft compare ...\n```" in report
    assert "Failed" not in report


@pytest.mark.usefixtures("stand_in")
def test_the_report_tells_what_does_not_compare() -> None:
    measured = '"device": "a chip", '
    chosen = measured + '"threads": 2 + values["seed"], "best_step": values["save_steps"], '
    chosen += '"steps": 20 if values["method"] == "lora" else 10, '
    Path("cell.py").write_text(STAND_IN.replace(measured, chosen))
    compare(config("head"))
    report = Path("out/report.md").read_text()
    assert "- device: a chip, CPU threads: 2\n" in report
    assert "kept the checkpoint that was best" not in report
    assert "Not all cells" not in report
    assert "- steps: 10\n" in report

    compare(config("head", "lora:metric=f1:save_steps=2", seeds=2))
    report = Path("out/report.md").read_text()
    assert "- device: a chip, CPU threads: 2\n- device: a chip, CPU threads: 3\n" in report
    assert "- Not all cells ran on the same device with as many threads" in report
    assert "- steps: 10 (head)\n- steps: 20 (lora:metric=f1:save_steps=2)\n" in report
    assert "results on the dev rows are optimistic: lora:metric=f1:save_steps=2 (by f1).\n" in report
    assert [row["threads"] for row in results()] == ["2", "3", "2", "3"]


@pytest.mark.usefixtures("stand_in")
def test_the_metric_to_look_at_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    tags = Problem("tags", "tags", "", "tags", ("f1", "accuracy"), lambda outputs, labels, names: {})
    monkeypatch.setitem(PROBLEMS, "tags", tags)
    Path("cell.py").write_text(STAND_IN.replace(CLASSIFICATION.name, "tags"))
    compare(config("head"))
    assert "| method | F1 | accuracy | samples/s | peak memory" in Path("out/report.md").read_text()


@pytest.mark.usefixtures("stand_in")
def test_what_failed_is_recorded_and_tried_again() -> None:
    methods = ("head:learning_rate=0.5", "head", "head:learning_rate=0.25")
    for _ in range(2):
        failed = compare(config(*methods)).failed
        assert failed == {
            "head-learning_rate=0.5-seed0": "the process ended with exit code 1: ZeroDivisionError: division by zero",
            "head-learning_rate=0.25-seed0": "the rate is not to its taste.",
        }
    assert started() == [
        "head-learning_rate=0.5-seed0",
        "head-seed0",
        "head-learning_rate=0.25-seed0",
        "head-learning_rate=0.5-seed0",
        "head-learning_rate=0.25-seed0",
    ]
    assert [row["state"] for row in results()] == ["failed", "finished", "failed"]
    assert results()[2]["error"] == "the rate is not to its taste."
    report = Path("out/report.md").read_text()
    assert "## Failed\n\n- head-learning_rate=0.5-seed0: the process ended with exit code 1" in report
    assert "Traceback" in Path("out/cells/head-learning_rate=0.5-seed0.log").read_text()

    Path("cell.py").write_text(STAND_IN.replace("== 0.5", "== -1"))
    assert list(compare(config(*methods)).failed) == ["head-learning_rate=0.25-seed0"]


@pytest.mark.usefixtures("stand_in")
def test_a_reporter_is_asked_for_of_unfinished_cells_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report of finished ones is made anew on a machine that has none."""
    compare(config("head:report_to=tensorboard"))
    monkeypatch.setattr("fastpeft.training.setup.find_spec", lambda name: None)
    assert compare(config("head:report_to=tensorboard")).failed == {}
    with pytest.raises(FastpeftError, match=r"variant 'lora:report_to=tensorboard' .* that package is not installed"):
        compare(config("lora:report_to=tensorboard"))
    assert started() == ["head-report_to=tensorboard-seed0"]


@pytest.mark.usefixtures("stand_in")
def test_a_chain_fails_with_its_start_and_goes_on_with_it() -> None:
    methods = ("lst:init_from=mezo:learning_rate=0.25", "head", "mezo:learning_rate=0.25")
    failed = compare(config(*methods)).failed
    start, follower = "mezo-learning_rate=0.25-seed0", "lst-init_from=mezo-learning_rate=0.25-seed0"
    assert started() == [start, "head-seed0"], "the start of a chain comes before it"
    assert failed[follower] == f"{start}, whose result it starts from, has failed."
    Path("cell.py").write_text(STAND_IN.replace("== 0.25", "== -1"))
    assert compare(config(*methods)).failed == {}
    assert started()[2:] == [start, follower]


@pytest.mark.usefixtures("stand_in")
def test_full_searches_on_a_slice_of_the_training_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate that measures best on the slice is what every seed is run with."""
    rows = Examples([f"text {row}" for row in range(30)], [row % 2 for row in range(30)])
    data = TextData(rows, Examples(["dev"], [1]), ["negative", "positive"], "words", CLASSIFICATION)
    monkeypatch.setattr(run, "data_for", lambda config: data)
    accuracy = '0.5 + values["seed"] / 10'
    by_rate = '{0.015: 0.6, 0.005: 0.9, 0.045: 0.7}.get(values["learning_rate"], 0)'
    used = STAND_IN.replace(accuracy, by_rate).replace(
        '"learning_rate": 1e-5', '"learning_rate": values["learning_rate"]'
    )
    Path("cell.py").write_text(used)
    full = CompareConfig(output="out", methods=["head"], protocol="full")
    assert compare(full).failed == {}
    tried = [f"search-head-learning_rate={rate}" for rate in ("0.015", "0.005", "0.045")]
    assert started() == [*tried, "head-seed0", "head-seed1", "head-seed2"]
    sliced = load_data("out/slice")
    assert (len(sliced.train), len(sliced.dev), sliced.labels) == (20, 10, data.labels)
    assert set(sliced.train.texts) | set(sliced.dev.texts) == set(rows.texts)
    assert [row["learning_rate"] for row in results() if not row["search"]] == ["0.005"] * 3
    report = Path("out/report.md").read_text()
    assert "| head | 0.005 | 0.900 | taken |\n| head | 0.045 | 0.700 |  |" in report
    assert "| head | 0.900 | 0.250 | 8.0 | 1,234 | 1,234 | 0.005 | 3 |" in report
    assert compare(full).failed == {}
    assert len(started()) == 6, "nothing is repeated"
    shutil.rmtree(Comparison(full).plan.searches[0].folder.path)
    assert compare(full).failed == {}
    assert len(started()) == 7, "a search alone is not finished"


@pytest.mark.usefixtures("stand_in")
def test_full_does_not_guess_again_what_the_labels_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores that are whole but for one, which is not in the slice: alone they would be classes."""
    rows = Examples([f"text {row}" for row in range(30)], [float(row % 5) for row in range(30)])
    data = TextData(rows, Examples(["dev"], [2.5]), ["label"], "words", REGRESSION)
    monkeypatch.setattr(run, "data_for", lambda config: data)
    full = CompareConfig(output="out", methods=["head"], protocol="full", seeds=1)
    comparison = Comparison(full)
    assert comparison.run().failed == {}
    assert load_data("out/slice").problem is CLASSIFICATION
    found = {cell.name: json.loads(cell.config_file.read_text()) for cell in comparison.plan.wanted}
    told = {name: values["problem_type"] for name, values in found.items()}
    assert {told[cell.name] for cell in comparison.plan.searches} == {REGRESSION.name}
    assert [told[cell.name] for cell in comparison.plan.results] == [None]
    searched = TrainConfig.from_values(found[comparison.plan.searches[0].name])
    assert data_for(searched).problem is REGRESSION
    for cell in (*comparison.plan.searches[:2], *comparison.plan.results):  # these go on
        cell.folder.metrics_file.unlink()
    assert {cell.values["problem_type"] for cell in Comparison(full).plan.searches} == {REGRESSION.name}


@pytest.mark.parametrize(("f1", "taken"), [((0.8, 0.5), 0), ((0.5, 0.8), 1), ((0.8, 0.81), 0)])
def test_a_rate_is_chosen_by_what_is_tested(tmp_path: Path, f1: tuple[float, float], taken: int) -> None:
    """F1 of words, which is not tested, is higher with the second rate; F1 of entities decides."""
    config = CompareConfig(
        output=str(tmp_path / "out"),
        methods=["head:learning_rate=0.1", "head:learning_rate=0.2"],
        common={"model": "model"},
    )
    cells = config.cells()
    for cell, words, entities in zip(cells, (0.8, 0.9), f1):
        finish(cell, 100, 1.0, 1.0, problem_type="token_classification", word_f1=words, entity_f1=entities)
        (cell.folder.path / "predictions.json").unlink()
        above = [2 * (row < 200 * entities) for row in range(200)]
        scores = {"metric": "entity_f1", "above": above, "below": [2] * 200}
        (cell.folder.path / "row_scores.json").write_text(json.dumps(scores))
    later = replace(cells[0], name="later", values={**cells[0].values, "output": "later"})
    later = replace(later, rates=tuple(cell.name for cell in cells))
    found = later.filled_in({cell.name: cell for cell in cells})
    assert found.values["learning_rate"] == (0.1, 0.2)[taken]


@pytest.mark.usefixtures("stand_in")
def test_full_searches_on_rows_without_labels_too(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Examples([(f"prompt {row // 2}", f"completion {row}") for row in range(30)], [])
    data = TextData(rows, rows, [], "words", NEXT_WORDS)
    monkeypatch.setattr(run, "data_for", lambda config: data)
    monkeypatch.setattr(run, "check_model", lambda model: None)
    common = {"objective": "causal", "model": "decoder"}
    full = CompareConfig(output="out", methods=["siva"], protocol="full", seeds=1, common=common)
    assert compare(full).failed == {}
    sliced = load_data("out/slice", problem_type="next_words")
    assert (len(sliced.train), len(sliced.dev)) == (20, 10)
    mixed = CompareConfig(
        output="other",
        methods=["siva:objective=causal", "siva:objective=mlm"],
        protocol="full",
        common={"model": "decoder"},
    )
    with pytest.raises(FastpeftError, match="the rows of one objective, and the variants have several"):
        compare(mixed)


@pytest.mark.usefixtures("stand_in")
def test_a_chain_searches_from_the_best_of_its_starts_search() -> None:
    rows = Examples([f"text {row}" for row in range(30)], [row % 2 for row in range(30)])
    Path("cell.py").write_text(STAND_IN.replace('0.5 + values["seed"] / 10', 'values["learning_rate"]'))
    full = CompareConfig(output="out", methods=["head:init_from=bitfit", "bitfit"], protocol="full", seeds=1)
    data = TextData(rows, rows, ["negative", "positive"], "words", CLASSIFICATION)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "data_for", lambda config: data)
        comparison = Comparison(full)
        assert comparison.run().failed == {}
    best = "out/cells/search-bitfit-learning_rate=0.0012"
    searches = [cell for cell in comparison.plan.searches if cell.variant == "head:init_from=bitfit"]
    assert {Path(cell.values["init_from"]).as_posix()[-len(best) :] for cell in searches} == {best}
    result = next(cell for cell in comparison.plan.results if cell.method == "head")
    assert result.values["init_from"].endswith("cells/bitfit-seed0")


@pytest.mark.kill
@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_moment_nothing_finished_is_repeated(seed: int) -> None:
    """The comparison itself is killed; a cell of it may live on, finish, and count."""
    moments = random.Random(seed)
    variants = [f"head:batch_size={size}" for size in range(1, 9)]
    finished: list[str] = []
    for _ in range(4):
        process = os.fork()
        if process == 0:
            with contextlib.suppress(BaseException):
                compare(config(*variants))
            os._exit(0)
        time.sleep(moments.uniform(0.0, 0.6))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        wait_for_the_folder()
        finished = [file.parent.name for file in Path("out/cells").glob("*/metrics.json")]
    before = len(started()) if Path("out/cells/started").exists() else 0
    assert compare(config(*variants)).failed == {}
    again = started()[before:]
    assert len(set(again)) == len(again)
    assert set(again).isdisjoint(finished)
    assert {*again, *finished} == {cell.name for cell in config(*variants).cells()}
    assert [row["state"] for row in results()] == ["finished"] * 8
    assert Path("out/report.md").read_text().count("| 0.500 |") == 8
    assert Path("out/report.html").read_text().count(">0.500</td>") == 8


def wait_for_the_folder() -> None:
    """Wait until no cell is left that holds the folder's lock."""
    while True:
        try:
            with run._lock(Path("out")):
                return
        except FastpeftError:
            time.sleep(0.01)


@pytest.mark.usefixtures("stand_in")
def test_a_killed_cell_is_told() -> None:
    started_pid(lambda pid: os.kill(pid, signal.SIGKILL))
    failed = compare(config("head:learning_rate=0.125", "head")).failed
    assert list(failed.values()) == ["the process ended by signal 9 (perhaps for lack of memory)."]
    assert [row["state"] for row in results()] == ["failed", "finished"]


@pytest.mark.long(but="15")
@pytest.mark.usefixtures("stand_in", "interruptible")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interruption_ends_the_cell_and_reports(number: signal.Signals) -> None:
    pids = []

    def interrupt(pid: int) -> None:
        pids.append(pid)
        os.kill(os.getpid(), number)

    started_pid(interrupt)
    handler = signal.getsignal(signal.SIGTERM)
    command = ["compare", "--methods", "head,head:learning_rate=0.125,lora", "--output", "out"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 130, shown.output
    assert "repeat the same command to continue" in shown.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert [row["state"] for row in results()] == ["finished", "waiting", "waiting"]
    assert "## Not run yet\n\n- head-learning_rate=0.125-seed0\n- lora-seed0\n" in Path("out/report.md").read_text()
    Path("cell.py").write_text(STAND_IN.replace("== 0.125", "== -1"))
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    assert started() == ["head-seed0", "head-learning_rate=0.125-seed0", "head-learning_rate=0.125-seed0", "lora-seed0"]


SAVES_WHEN_ASKED_TWICE = """import signal
    def save(*_):
        (folder.parent / "saving").touch()
        while not (folder.parent / "asked twice").exists():
            time.sleep(0.01)
        (folder.parent / "saved").touch()
        sys.exit(130)
    signal.signal(signal.SIGTERM, save)
    """


@pytest.mark.usefixtures("stand_in", "interruptible")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_that_comes_twice_lets_the_cell_save(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a scheduler to all processes, and from what passes it on to its own."""
    monkeypatch.setattr(interrupts, "_ONE_REQUEST", math.inf)  # as if no time passed
    killed: list[Any] = []
    monkeypatch.setattr(Local, "kill", lambda self: killed.extend(self._running))
    pid = '(folder.parent / "pid")'
    Path("cell.py").write_text(STAND_IN.replace(pid, SAVES_WHEN_ASKED_TWICE + pid))
    cells = Path("out/cells").absolute()

    def interrupt(_: int) -> None:
        os.kill(os.getpid(), number)
        while not (cells / "saving").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)
        (cells / "asked twice").touch()

    started_pid(interrupt)
    with pytest.raises(KeyboardInterrupt):
        compare(config("head:learning_rate=0.125"))
    assert (cells / "saved").exists()
    assert killed == []


@pytest.mark.usefixtures("stand_in")
def test_two_comparisons_do_not_meet_in_one_folder() -> None:
    refused = []

    def second(pid: int) -> None:
        try:
            compare(config("head"))
        except FastpeftError as error:
            refused.append(str(error))
        os.kill(pid, signal.SIGKILL)

    started_pid(second)
    compare(config("head:learning_rate=0.125"))
    assert "another comparison, or a cell that it left, still runs in 'out'" in refused[0]
    assert [row["variant"] for row in results()] == ["head:learning_rate=0.125"], "nothing was written"


@pytest.mark.usefixtures("stand_in")
def test_a_cell_that_outlives_its_comparison_keeps_the_folder() -> None:
    code = "import pathlib, time\npathlib.Path('on').touch()\nwhile not pathlib.Path('off').exists(): time.sleep(0.01)"
    with Local(1) as local:
        with run._lock(Path("out")) as lock:
            cell = local.start(["-S", "-c", code], Path("log"), [lock.fileno()])
            while not Path("on").exists():
                time.sleep(0.01)
        with pytest.raises(FastpeftError, match="or a cell that it left, still runs in 'out'"):
            compare(config("head"))
        Path("off").touch()
        assert cell.result().reason == "with exit code 0"
    assert compare(config("head")).failed == {}


def test_the_public_name_is_the_function() -> None:
    """Whatever is imported before: a module of that name would take its place."""
    assert fastpeft.compare is run.compare
    assert importlib.util.find_spec("fastpeft.compare") is None


def test_real_cells_are_not_repeated(place: Path) -> None:
    command = ["compare", "--model", "model", "--data", "reviews.csv"]
    command += ["--methods", "head,zero-shot:calibrate=true:prompt={text} it is <mask>:label_words=awful+lovely"]
    command += ["--max-steps", "2", "--output", "out"]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    trained, asked = results()
    assert (trained["state"], asked["state"]) == ("finished", "finished")
    assert all(0 <= float(row["accuracy"]) <= 1 for row in (trained, asked))
    assert (trained["steps"], asked["steps"]) == ("2", "")
    assert (trained["threads"], asked["threads"]) == ("1", "")
    assert asked["trainable_parameters"] == "0"
    prompt = Prompt("{text} it is <mask>", ["awful", "lovely"])
    (calibrated,) = (place / "out" / "cells").glob("zero-shot*/metrics.json")
    expected = evaluate_zero_shot("model", prompt, load_data("reviews.csv"), calibrate=True)["loss"]
    assert json.loads(calibrated.read_text())["loss"] == pytest.approx(expected)
    assert trained["problem_type"] == asked["problem_type"] == CLASSIFICATION.name
    (other,) = (place / "out" / "method_comparison").iterdir()  # zero-shot is no run
    found = json.loads(other.read_text())
    assert set(found) == {"run_info", "train_info", "meta_info"}  # of PEFT's suite
    assert found["run_info"]["experiment_name"] == "head/head-seed0"
    assert found["run_info"]["train_config"]["optimizer_kwargs"] == {
        "lr": float(trained["learning_rate"]),
        "weight_decay": 0.01,
    }
    assert found["train_info"]["num_trainable_params"] == int(trained["trainable_parameters"])
    assert found["train_info"]["file_size"] > 0
    last = found["train_info"]["metrics"][-1]
    assert (last["step"], last["valid accuracy"]) == (2, float(trained["accuracy"]))
    assert last["train loss"] > 0
    files = {file: file.stat().st_mtime_ns for file in (place / "out" / "cells").rglob("*")}
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0, again.output
    assert {file: file.stat().st_mtime_ns for file in (place / "out" / "cells").rglob("*")} == files
    lines = (place / "reviews.csv").read_text().splitlines(keepends=True)
    (place / "reviews.csv").write_text("".join(lines[:-5]))
    more = CliRunner().invoke(app, [*command, "--methods", "bitfit"])
    assert more.exit_code == 2
    assert "has other rows, or in another order, than there are now" in " ".join(more.output.split())
    assert {file: file.stat().st_mtime_ns for file in (place / "out" / "cells").rglob("*")} == files


@pytest.mark.usefixtures("stand_in")
def test_rows_that_change_while_it_runs_are_told(tmp_path: Path) -> None:
    noted = '"rows": "as they were" if values["method"] == "head" else "changed", "fastpeft_version"'
    (tmp_path / "cell.py").write_text(STAND_IN.replace('"fastpeft_version"', noted))
    for _ in range(2):  # also where all are finished, and no rows are loaded
        with pytest.raises(FastpeftError, match=r"has changed: lora-seed0 in .* has other rows"):
            compare(config("head", "lora"))
    assert started() == ["head-seed0", "lora-seed0"]


@pytest.mark.usefixtures("stand_in")
def test_a_finished_comparison_needs_no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    compare(config("head"))

    def data_for(config: TrainConfig) -> None:
        raise FastpeftError(f"{config.data} is gone.")

    monkeypatch.setattr(run, "data_for", data_for)
    assert compare(config("head")).failed == {}
    with pytest.raises(FastpeftError, match="demo is gone"):
        compare(config("head", "lora"))
    assert [row["variant"] for row in results()] == ["head"], "nothing was written"


@pytest.mark.kill
def test_a_killed_cell_goes_on_inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = {"model": "model", "data": "reviews.csv", "max_steps": 60, "save_steps": 3}
    long = CompareConfig(output="out", methods=["head"], common=common)
    comparison = Comparison(long)
    cell = comparison.plan.wanted[0]
    processes: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def recorded(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        processes.append(popen(*arguments, **options))
        return processes[-1]

    monkeypatch.setattr(subprocess, "Popen", recorded)

    def kill() -> None:
        while cell.folder.newest_checkpoint() is None:
            time.sleep(0.01)
        processes[0].kill()

    threading.Thread(target=kill, daemon=True).start()
    assert "signal 9" in comparison.run().failed[cell.name]
    reached = cell.folder.newest_checkpoint()
    assert reached is not None
    step = int(reached.name.rpartition("-")[2])
    assert 3 <= step < 60, "killed too late"
    assert compare(long).failed == {}
    metrics = cell.metrics()
    assert metrics is not None
    assert metrics["steps"] == 60
    trained_rows = metrics["samples_per_second"] * metrics["train_seconds"]
    assert trained_rows < 1.2 * 16 * (60 - step), "only the steps that were left"


def started_pid(act: Callable[[int], None]) -> None:
    """Call `act` with the process id of the stand-in that waits, once it does."""

    def wait() -> None:
        file = Path("out/cells/pid").absolute()
        while not (file.is_file() and file.read_text()):
            time.sleep(0.01)
        act(int(file.read_text()))

    threading.Thread(target=wait, daemon=True).start()
