"""Comparisons that run: what is repeated, what goes on, and what failures and interruptions leave behind."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from samples import reviews, save_tiny_model, write_csv
from typer.testing import CliRunner

import fastpeft
from fastpeft import CompareConfig, FastpeftError, compare, console
from fastpeft.cli import app
from fastpeft.comparison import run
from fastpeft.comparison.run import Comparison
from fastpeft.config import TrainConfig
from fastpeft.data import Examples, TextData, load_data
from fastpeft.estimates import Estimate
from fastpeft.methods import get_method
from fastpeft.problems import CLASSIFICATION, PROBLEMS, Problem

ROOT = Path(fastpeft.__file__).parents[1]

# In the place of a training process: what it leaves depends on its learning rate and its seed.
STAND_IN = """
import json, os, pathlib, sys, time
values = json.loads(pathlib.Path(sys.argv[1]).read_text())
folder = pathlib.Path(values["output"])
with (folder.parent / "started").open("a") as file:
    file.write(folder.name + "\\n")
if values["learning_rate"] == 0.5:
    sys.exit("Traceback ...\\nZeroDivisionError: division by zero")
if values["learning_rate"] == 0.25:
    sys.exit("a warning\\nError: the rate is not to its taste.")
if values["learning_rate"] == 0.125:
    (folder.parent / "pid").write_text(str(os.getpid()))
    time.sleep(60)
folder.mkdir()
(folder / "run.json").write_text(json.dumps({"fastpeft_version": "0", **values}))
(folder / "metrics.json").write_text(json.dumps({
    "method": values["method"], "model": values["model"], "data": values["data"], "labels": ["a", "b"],
    "accuracy": 0.5 + values["seed"] / 10, "f1": 0.25, "samples_per_second": 8.0, "peak_memory_mb": 1234.5,
    "train_rows": 5000, "dev_rows": 50, "trainable_parameters": 1234, "learning_rate": 1e-5, "seed": values["seed"],
    "device": "a chip", "versions": {"python": "3.11", "torch": "2.10"}, "command": "fastpeft train",
}))
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells that take no time, in the folder `out` of the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cell.py").write_text(STAND_IN)
    monkeypatch.setattr(run, "_command", lambda cell: [sys.executable, "-S", "cell.py", str(cell.config_file)])
    rows = Examples(["good", "bad"], [1, 0])
    data = TextData(rows, rows, ["negative", "positive"], "two words", CLASSIFICATION)
    monkeypatch.setattr(run, "data_for", lambda config: data)
    told = {"head": Estimate(100.0, 2.0, 0.5), "lora:learning_rate=0.25": Estimate(error="no such layers")}
    monkeypatch.setattr(run.Comparison, "estimates", lambda comparison, budget_mb: told)


def started() -> list[str]:
    """The cells whose process was started, in order."""
    return Path("out/cells/started").read_text().splitlines()


def results(folder: Path = Path("out")) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def config(*methods: str, **changes: int) -> CompareConfig:
    return CompareConfig(output="out", methods=methods, **changes)  # type: ignore[arg-type]


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
    header = (
        "method | variant | seeds | accuracy | F1 | samples/s | peak memory, MB | trained parameters | learning rate"
    )
    assert f"| {header} |\n|---|---|---|---|---|---|---|---|---|\n" in report
    assert "| SiVA | targets=query+value | 2 | 0.550 ± 0.071 | 0.250 | 8 | 1,234 | 1,234 | 1e-05 |\n" in report
    assert "| head only | - | 2 |" in report
    assert "- data: demo, 5,000 rows to train on, 50 to measure on\n" in report
    assert "- device: a chip\n- versions: python 3.11, torch 2.10\n" in report
    assert "```\nfastpeft compare ...\n```" in report
    assert "Failed" not in report


@pytest.mark.usefixtures("stand_in")
def test_the_report_tells_what_does_not_compare() -> None:
    measured = '"device": "a chip", '
    chosen = measured + '"threads": 2 + values["seed"], "best_step": values["save_steps"], '
    Path("cell.py").write_text(STAND_IN.replace(measured, chosen))
    compare(config("head"))
    report = Path("out/report.md").read_text()
    assert "- device: a chip, CPU threads: 2\n" in report
    assert "best checkpoint" not in report
    assert "Not all cells" not in report

    compare(config("head", "lora:metric=f1:save_steps=2", seeds=2))
    report = Path("out/report.md").read_text()
    assert "- device: a chip, CPU threads: 2\n- device: a chip, CPU threads: 3\n" in report
    assert "- Not all cells ran on the same device with as many threads" in report
    assert "look better than on new rows: lora:metric=f1:save_steps=2 (by f1).\n" in report
    assert [row["threads"] for row in results()] == ["2", "3", "2", "3"]


@pytest.mark.usefixtures("stand_in")
def test_the_metric_to_look_at_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    tags = Problem("tags", "", "", "tags", ("f1", "accuracy"), lambda outputs, labels, names: {})
    monkeypatch.setitem(PROBLEMS, "tags", tags)
    Path("cell.py").write_text(STAND_IN.replace('"train_rows"', '"problem_type": "tags", "train_rows"'))
    compare(config("head"))
    assert "| method | variant | F1 | accuracy | samples/s | peak memory" in Path("out/report.md").read_text()


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
    by_rate = '{0.003: 0.6, 0.001: 0.9, 0.009: 0.7}.get(values["learning_rate"], 0)'
    used = STAND_IN.replace(accuracy, by_rate).replace(
        '"learning_rate": 1e-5', '"learning_rate": values["learning_rate"]'
    )
    Path("cell.py").write_text(used)
    full = CompareConfig(output="out", methods=["head"], protocol="full")
    assert compare(full).failed == {}
    tried = [f"search-head-learning_rate={rate}" for rate in ("0.003", "0.001", "0.009")]
    assert started() == [*tried, "head-seed0", "head-seed1", "head-seed2"]
    sliced = load_data("out/slice")
    assert (len(sliced.train), len(sliced.dev), sliced.labels) == (20, 10, data.labels)
    assert set(sliced.train.texts) | set(sliced.dev.texts) == set(rows.texts)
    assert [row["learning_rate"] for row in results() if not row["search"]] == ["0.001"] * 3
    report = Path("out/report.md").read_text()
    assert "| head | 0.001 | 0.900 | taken |\n| head | 0.009 | 0.700 |  |" in report
    assert "| head only | - | 3 |" in report
    assert compare(full).failed == {}
    assert len(started()) == 6, "nothing is repeated"


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
    best = "out/cells/search-bitfit-learning_rate=0.009"
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


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT as a person's Ctrl-C has it: what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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
    assert "the same command goes on" in shown.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert [row["state"] for row in results()] == ["finished", "waiting", "waiting"]
    assert "## Not run yet\n\n- head-learning_rate=0.125-seed0\n- lora-seed0\n" in Path("out/report.md").read_text()
    Path("cell.py").write_text(STAND_IN.replace("== 0.125", "== -1"))
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    assert started() == ["head-seed0", "head-learning_rate=0.125-seed0", "head-learning_rate=0.125-seed0", "lora-seed0"]


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
    with run._lock(Path("out")) as lock, Path("log").open("wb") as log:
        cell = threading.Thread(target=run._wait, args=([sys.executable, "-S", "-c", code], log, lock))
        cell.start()
        while not Path("on").exists():
            time.sleep(0.01)
    with pytest.raises(FastpeftError, match="or a cell that it left, still runs in 'out'"):
        compare(config("head"))
    Path("off").touch()
    cell.join()
    assert compare(config("head")).failed == {}


@pytest.mark.usefixtures("stand_in")
def test_on_the_command_line() -> None:
    command = ["compare", "--methods", "head,siva:rank=2", "--methods", "lora:learning_rate=0.25", "--output", "out"]
    dry = CliRunner().invoke(app, [*command, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    for text in ("head-seed0", "siva-rank=2-seed0", "waiting", "no such layers", "0 of 3 finished, about 3 s for"):
        assert text in dry.stdout
    assert "fits" not in dry.stdout
    budget = CliRunner().invoke(app, [*command, "--dry-run", "--memory-budget", "50"])
    assert budget.exit_code == 0, budget.output
    head = next(line for line in budget.stdout.splitlines() if "head-seed0" in line)
    assert [text.strip() for text in head.split("│")[2:6]] == ["waiting", "100", "no", "3 s"]
    alone = CliRunner().invoke(app, [*command, "--memory-budget", "50"])
    assert (alone.exit_code, "goes with --dry-run" in alone.stderr) == (2, True)
    assert not Path("out").exists()

    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 1
    assert "1 of 3: head-seed0" in shown.stderr
    assert "head-seed0: accuracy 0.500" in shown.stderr
    assert shown.stderr.splitlines()[-1] == "lora-learning_rate=0.25-seed0 failed: the rate is not to its taste."
    for text in ("SiVA", "rank=2", "peak memory, MB", "1,234", "report.md"):
        assert text in shown.stdout
    again = CliRunner().invoke(app, [*command, "--dry-run"])
    assert "2 of 3 finished, about 625 s left" not in again.stdout, "a failed cell is not promised"
    assert "2 of 3 finished" in again.stdout

    quiet = CliRunner().invoke(app, ["compare", "--methods", "head", "--output", "out", "--quiet"])
    assert (quiet.exit_code, quiet.output) == (0, "")
    refused = CliRunner().invoke(app, ["compare", "--methods", "head", "--output", "out", "--epochs", "2"])
    assert refused.exit_code == 2
    assert refused.stderr.startswith("Error: the cell 'head-seed0' cannot be run in 'out'")


@pytest.mark.usefixtures("stand_in")
def test_a_template_with_a_comma_on_the_command_line() -> None:
    prompts = '"{text}, <mask>":label_words=No+Yes,none'
    shown = CliRunner().invoke(app, ["compare", "--methods", "head", "--prompts", prompts, "--output", "out"])
    assert shown.exit_code == 0, shown.output
    assert [row["variant"] for row in results()] == ['head:prompt="{text}, <mask>":label_words=No+Yes', "head"]


@pytest.mark.usefixtures("stand_in")
def test_the_live_table(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(console, "errors", Console(file=terminal, force_terminal=True, width=120))
    comparison = Comparison(config("head", "head:max_steps=4:batch_size=8"))
    assert comparison.seconds_left() is None
    with console.live_comparison(comparison, quiet=True):
        assert terminal.getvalue() == ""
    with console.live_comparison(comparison, quiet=False):
        comparison.run()
    assert "head-max_steps=4-batch_size=8-seed0" in terminal.getvalue()
    assert "2 of 2 finished" in terminal.getvalue()
    steps = "head:max_steps=4:batch_size=8:gradient_accumulation_steps=3"
    more = Comparison(config(steps, "lora", "mezo", "lora:epochs=0.5", "head"))
    by_recipe = [get_method(method).recipe_for("demo").epochs for method in ("lora", "mezo")]
    assert len(set(by_recipe)) == 2
    epochs = sum(by_recipe) + 0.5
    assert more.seconds_left() == (4 * 8 * 3 + epochs * 5000) / 8.0, "rows by the rows a second of finished cells"


def test_the_public_name_is_the_function() -> None:
    """Whatever is imported before: a module of that name would take its place."""
    assert fastpeft.compare is run.compare
    assert importlib.util.find_spec("fastpeft.compare") is None


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a person with a model and data."""
    save_tiny_model(tmp_path / "model")
    write_csv(tmp_path / "reviews.csv", reviews(60))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def test_real_cells_are_not_repeated(place: Path) -> None:
    command = [sys.executable, "-m", "fastpeft", "compare", "--model", "model", "--data", "reviews.csv"]
    command += ["--methods", "head,zero-shot:calibrate=true:prompt={text} it is <mask>:label_words=awful+lovely"]
    command += ["--max-steps", "2", "--output", "out"]
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    trained, asked = results()
    assert (trained["state"], asked["state"]) == ("finished", "finished")
    assert all(0 <= float(row["accuracy"]) <= 1 for row in (trained, asked))
    assert (trained["steps"], asked["steps"]) == ("2", "")
    assert (trained["threads"], asked["threads"]) == ("1", "")
    assert asked["trainable_parameters"] == "0"
    files = {file: file.stat().st_mtime_ns for file in (place / "out" / "cells").rglob("*")}
    again = CliRunner().invoke(app, command[3:])
    assert again.exit_code == 0, again.output
    assert {file: file.stat().st_mtime_ns for file in (place / "out" / "cells").rglob("*")} == files


def test_data_that_cannot_be_loaded_is_told_before_the_first_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run.Comparison, "estimates", lambda comparison, budget_mb: {})
    command = ["compare", "--methods", "head,zero-shot:prompt=sst2", "--data", "reviews.csv", "--output", "out"]
    for arguments in (command, [*command, "--dry-run"]):
        shown = CliRunner().invoke(app, arguments)
        assert (shown.exit_code, shown.stdout) == (2, "")
        assert "reviews.csv" in shown.stderr
        assert not Path("out").exists()
    write_csv(Path("reviews.csv"), reviews(20))
    assert CliRunner().invoke(app, [*command, "--dry-run"]).exit_code == 0
    shown = CliRunner().invoke(app, [*command, "--dry-run", "--set", "label_column=stars"])
    assert (shown.exit_code, "no column 'stars'" in shown.stderr) == (2, True)


@pytest.mark.parametrize(
    ("variant", "fault"),
    [
        ("head:prompt={a} or {b}? <mask>:label_words=No+Yes", "takes a pair of texts a row, but the data has one text"),
        ("zero-shot:prompt=mnli", "has no word for negative, positive"),
        ("head:prompt=trec", "has no word for negative, positive"),
        ("head:metric=pearson:save_steps=2", "the metric 'pearson' is not measured"),
    ],
)
def test_what_does_not_fit_the_data_is_told_before_the_first_cell(stand_in: None, variant: str, fault: str) -> None:
    with pytest.raises(FastpeftError) as raised:
        compare(config("head", variant))
    assert str(raised.value).startswith(f"the variant '{variant}' cannot be used: ")
    assert fault in str(raised.value)
    assert not Path("out").exists()


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
