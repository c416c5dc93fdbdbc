"""What a comparison shows on a terminal, and what it refuses before the first cell."""

from __future__ import annotations

import io
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from compared import config, results
from rich.console import Console
from samples import reviews, write_csv
from typer.testing import CliRunner

from fastpeft import CompareConfig, FastpeftError, compare, console
from fastpeft.cli import app
from fastpeft.comparison import run
from fastpeft.comparison.run import Comparison
from fastpeft.data.examples import Examples, TextData
from fastpeft.data.problems import CLASSIFICATION
from fastpeft.methods.registry import get_method
from fastpeft.training.config import TrainConfig
from fastpeft.training.estimates import Estimate
from fastpeft.training.setup import resolve


@pytest.mark.usefixtures("stand_in")
def test_on_the_command_line() -> None:
    methods = ["--methods", "head,siva:rank=2", "--methods", "lora:learning_rate=0.25"]
    command = ["compare", *methods, "--output", "out", "--epochs", "1"]
    dry = CliRunner().invoke(app, [*command, "--dry-run"])
    assert dry.exit_code == 1, dry.output
    for text in ("head-seed0", "siva-rank=2-seed0", "waiting", "fails", "0 of 3 finished, about 3 s for"):
        assert text in dry.stdout
    assert "lora:learning_rate=0.25 would fail: no such layers\n" in dry.stderr
    assert "fits" not in dry.stdout
    budget = CliRunner().invoke(app, [*command, "--dry-run", "--memory-budget", "50"])
    assert budget.exit_code == 1, budget.output
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
    for text in ("siva:rank=2", "peak memory, MB", "1,234", "report.md"):
        assert text in shown.stdout
    again = CliRunner().invoke(app, [*command, "--dry-run"])
    assert "2 of 3 finished, about 625 s left" not in again.stdout, "a failed cell is not promised"
    assert "2 of 3 finished" in again.stdout

    quiet = CliRunner().invoke(app, ["compare", "--methods", "head", "--output", "out", "--epochs", "1", "--quiet"])
    assert (quiet.exit_code, quiet.output) == (0, "")
    refused = CliRunner().invoke(app, ["compare", "--methods", "head", "--output", "out", "--epochs", "2"])
    assert refused.exit_code == 2
    assert refused.stderr.startswith("Error: the cell 'head-seed0' cannot be run in 'out'")


@pytest.mark.usefixtures("stand_in")
def test_what_does_not_fit_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"head": Estimate(100.0), "siva": Estimate()}
    monkeypatch.setattr(run.Comparison, "estimates", lambda comparison, budget_mb: told)
    command = ["compare", "--methods", "head,siva", "--output", "out", "--dry-run", "--memory-budget", "50"]
    shown = CliRunner().invoke(app, command).stdout
    cells = [[text.strip() for text in line.split("│")[1:6]] for line in shown.splitlines() if "seed0" in line]
    assert cells == [
        ["head-seed0", "waiting", "100", "no", "not timed: does not fit"],
        ["siva-seed0", "waiting", "-", "unknown", "unknown"],
    ]
    assert shown.endswith("0 of 2 finished; nothing was written\n")


@pytest.mark.usefixtures("stand_in")
def test_options_of_a_run_are_for_all_cells() -> None:
    common = ["--bf16", "--max-length", "32", "--batch-size", "4", "--learning-rate", "1e-3", "--rank", "2"]
    shown = CliRunner().invoke(app, ["compare", "--methods", "siva,lora:rank=3", "--output", "out", *common])
    assert shown.exit_code == 0, shown.output
    cells = [cell["values"] for cell in json.loads(Path("out/comparison.json").read_text())["cells"]]
    assert [
        [cell[name] for name in ("bf16", "max_length", "batch_size", "learning_rate", "rank")] for cell in cells
    ] == [
        [True, 32, 4, 1e-3, 2],
        [True, 32, 4, 1e-3, 3],
    ], "a variant's own come before them"
    refused = CliRunner().invoke(app, ["compare", "--methods", "siva", "--output", "new", "--seed", "1"])
    assert (refused.exit_code, "--seed" in refused.stderr) == (2, True)


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
    assert "0 of 2 finished, time left not known yet" in view(comparison)
    with console.live_comparison(comparison, quiet=True):
        assert terminal.getvalue() == ""
    with console.live_comparison(comparison, quiet=False):
        comparison.run()
    assert "head-max_steps=4-batch_size=8-seed0" in terminal.getvalue()
    assert "2 of 2 finished" in terminal.getvalue()
    steps = "head:max_steps=4:batch_size=8:gradient_accumulation_steps=3"
    more = Comparison(config(steps, "lora", "mezo", "lora:epochs=0.5", "head"))
    by_recipe = [get_method(method).recipe.epochs_of(5000 / 16) for method in ("lora", "mezo")]
    assert len(set(by_recipe)) == 2
    epochs = sum(by_recipe) + 0.5
    for cell, whole in zip(comparison.plan.wanted, ("7.0", "9.0")):
        assert cell.seconds() is not None
        cell.clock.write_text(whole)
        metrics = {**json.loads(cell.folder.metrics_file.read_text()), "train_seconds": 6.0}
        cell.folder.metrics_file.write_text(json.dumps(metrics))
    beside = 4 * (1.0 + 3.0) / 2  # of four cells: to start, load, measure and end
    expected = (4 * 8 * 3 + epochs * 5000) / 8.0 + beside
    assert more.seconds_left() == pytest.approx(expected), "by the seconds of finished cells"


@pytest.mark.usefixtures("stand_in")
def test_the_live_table_resolves_each_cell_once(monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = Comparison(config("head:max_steps=4", "head:max_steps=8"))
    resolved: list[TrainConfig] = []
    monkeypatch.setattr(run, "resolve", lambda config: resolved.append(config) or resolve(config))
    first, second = comparison.plan.wanted
    batch = first.config.batch_size
    for _ in range(3):
        assert [comparison.rows_trained(cell) for cell in (first, second)] == [4 * batch, 8 * batch]
    assert [config.max_steps for config in resolved] == [4, 8]

    filled = replace(first, values={**first.values, "max_steps": 6})  # a cell of the same name, as it is filled in
    assert [comparison.rows_trained(filled) for _ in range(2)] == [6 * batch] * 2
    assert [config.max_steps for config in resolved] == [4, 8, 6]


def view(comparison: Comparison) -> str:
    """What the live table shows."""
    shown = console.errors.render_lines(console._cells_view(comparison), pad=False)
    return "\n".join("".join(part.text for part in line) for line in shown)


@pytest.mark.usefixtures("stand_in")
def test_the_live_table_fits_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many cells the running one, the progress and what is next stay in sight."""
    monkeypatch.setattr(console, "errors", Console(file=io.StringIO(), force_terminal=True, width=80, height=24))
    rows = Examples([f"{word} {row}" for row in range(20) for word in ("good", "bad")], [1, 0] * 20)
    data = TextData(rows, rows, ["negative", "positive"], "words", CLASSIFICATION)
    monkeypatch.setattr(run, "data_for", lambda config: data)
    comparison = Comparison(CompareConfig(output="out", suite="table2", protocol="full"))
    cells = comparison.plan.wanted
    assert len(cells) == 108
    states = {cell.name: "waiting" for cell in cells}
    states |= {cell.name: "finished" for cell in cells[:60]} | {cells[index].name: "failed" for index in (3, 70)}
    monkeypatch.setattr(comparison, "state", lambda cell: states[cell.name])
    states[cells[60].name] = "running"
    comparison.running[cells[60].name] = time.monotonic() - 300
    lines = view(comparison).splitlines()
    assert len(lines) <= 23
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("59 of 108 finished, 2 failed, ")
    shown = [[part.strip() for part in line.split("│")[1:4]] for line in lines if line.startswith("│")]
    assert shown[0][1:] == ["running", "5 min"]
    assert [row[1] for row in shown[1:]] == ["failed"] * 2 + ["finished"] * 7 + ["waiting"] * 7
    assert shown[-1][0][-5:] == cells[67].name[-5:], "the ends of names are kept"
    assert lines[-1] == "not shown: 52 finished, 39 waiting"

    states[cells[61].name] = "running"
    comparison.running[cells[61].name] = time.monotonic() - 20
    shown = [line.split("│")[2:4] for line in view(comparison).splitlines() if line.startswith("│")]
    assert [[part.strip() for part in row] for row in shown[:2]] == [["running", "5 min"], ["running", "20 s"]]


def test_a_dry_run_counts_the_process_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "process_seconds", lambda: 4.0)
    monkeypatch.setattr(run, "estimate", lambda config, budget_mb: Estimate(100.0, 2.0, 0.5))
    known = Comparison(CompareConfig(output=str(tmp_path / "out"), methods=["head", "lora"])).estimates()
    assert [known[variant].seconds(10) for variant in ("head", "lora")] == [4.0 + 2.0 + 5.0] * 2


def test_hours_are_told_as_hours() -> None:
    assert [console._duration(seconds) for seconds in (99, 100, 5400, 12_240)] == ["99 s", "2 min", "90 min", "3.4 h"]


@pytest.mark.usefixtures("stand_in")
def test_a_suite_on_other_classes_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Examples(["good", "bad"] * 20, [1, 0] * 20)
    data = TextData(rows, rows, ["neg", "pos"], "two words", CLASSIFICATION)
    monkeypatch.setattr(run, "data_for", lambda config: data)
    with pytest.raises(FastpeftError, match=r"no word for neg, pos") as raised:
        Comparison(CompareConfig(output="out", suite="table2"))  # of which MeZO needs the words
    assert "--prompts sst2:label_words=terrible+great, or let them be found by --prompts auto." in str(raised.value)
    for prompt in ("sst2:label_words=terrible+great", "auto", "none"):
        Comparison(CompareConfig(output="out", suite="table2", prompts=[prompt]))
    Comparison(CompareConfig(output="out", suite="table1"))  # whose prompts are but templates


@pytest.mark.usefixtures("stand_in")
def test_a_model_that_is_not_there_is_told_before_the_first_cell() -> None:
    command = ["compare", "--methods", "head,lora", "--model", "nosuch/model", "--output", "out"]
    for arguments in (command, [*command, "--dry-run"]):
        shown = CliRunner().invoke(app, arguments)
        assert (shown.exit_code, shown.stdout) == (2, "")
        assert "cannot load the model 'nosuch/model'" in shown.stderr
        assert not Path("out").exists()


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
    shown = CliRunner().invoke(app, [*command, "--dry-run", "--label-column", "stars"])
    assert (shown.exit_code, "no column 'stars'" in shown.stderr) == (2, True)


@pytest.mark.parametrize(
    ("variant", "fault"),
    [
        ("head:prompt={a} or {b}? <mask>:label_words=No+Yes", "takes a pair of texts a row, but the data has one text"),
        ("zero-shot:prompt=mnli", "has no word for negative, positive"),
        ("head:prompt=trec", "has no word for negative, positive"),
        ("head:prompt=trec", "write them in this order, as prompt=trec:label_words=word1+word2, or"),
        ("prompt-tuning:prompt=sst2", "prompt tuning is for a classification head"),
        ("head:model=nosuch/model", "cannot load the model 'nosuch/model': "),
        ("head:metric=pearson:save_steps=2", "the metric 'pearson' is not measured"),
    ],
)
def test_what_does_not_fit_the_data_is_told_before_the_first_cell(stand_in: None, variant: str, fault: str) -> None:
    with pytest.raises(FastpeftError) as raised:
        compare(config("head", variant))
    assert str(raised.value).startswith(f"the variant '{variant}' cannot be used: ")
    assert fault in str(raised.value)
    assert not Path("out").exists()
