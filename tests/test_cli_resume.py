"""A run on the command line that ended early, or has ended, and goes on by --resume."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import ENVIRONMENT, TRAIN, go_to_work, run
from typer.testing import CliRunner

from fastpeft.cli import app
from fastpeft.mezo import Journal


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return go_to_work(tmp_path, monkeypatch)


def test_resume_needs_the_folder_only_and_leaves_a_finished_run(place: Path) -> None:
    run(*TRAIN, "--method", "lora", "--output", "out")
    before = {path: path.stat().st_mtime_ns for path in (place / "out").rglob("*")}
    assert "accuracy after" in run("train", "--output", "out", "--resume").stdout
    assert {path: path.stat().st_mtime_ns for path in (place / "out").rglob("*")} == before


def test_resume_by_the_file_of_a_run_goes_on_there_from_any_folder(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(*TRAIN, "--method", "lora", "--output", "out")
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    run("train", "--config", "../out/run.json", "--resume")
    assert not [*Path().iterdir()]


def test_resume_of_a_name_with_no_run_begins_none(place: Path) -> None:
    shown = CliRunner().invoke(app, ["train", "--output", "typo", "--resume"])
    assert shown.exit_code == 2
    assert "there is no run in 'typo' to resume. Check --output; to start a new run there, give its" in shown.stderr
    assert not (place / "typo").exists()


def test_resume_finds_the_default_output(place: Path) -> None:
    run(*TRAIN, "--method", "lora", "--max-steps", "2")
    resumed = run("train", "--data", "reviews.csv", "--method", "lora", "--resume")
    assert "accuracy after" in resumed.stdout
    assert len(list((place / "runs").iterdir())) == 1


def test_a_resume_of_nothing_says_that_it_starts_anew(place: Path) -> None:
    shown = run(*TRAIN, "--method", "head", "--output", "out", "--resume")
    assert "there is no run in out to resume; it starts from the beginning" in " ".join(shown.stderr.split())


def test_a_resume_says_what_it_starts_from(place: Path) -> None:
    for extra, told in (
        (("--save-steps", "1"), "continuing from out/checkpoints/checkpoint-4"),
        (("--overwrite",), "the run in out has no checkpoint yet; it starts from the beginning"),
    ):
        run(*TRAIN, "--method", "head", "--output", "out", *extra)
        (place / "out" / "metrics.json").unlink()
        assert told in " ".join(run("train", "--output", "out", "--resume").stderr.split())


@pytest.mark.long
@pytest.mark.kill
@pytest.mark.parametrize("seed", range(3))
def test_a_killed_run_resumes_to_the_bits_of_an_unbroken_one(place: Path, seed: int) -> None:
    """Ended without warning at a random moment between two random checkpoints, which a run of 60 steps often writes."""
    generator = random.Random(seed)
    arguments = (*TRAIN, "--method", "siva", "--max-steps", "60", "--save-steps", "2", "--quiet")
    run(*arguments, "--output", "whole")
    process = subprocess.Popen([sys.executable, "-m", "fastpeft", *arguments, "--output", "out"], env=ENVIRONMENT)
    step = 2 * generator.randrange(1, 20)
    while process.poll() is None and not any(
        int(path.name.rpartition("-")[2]) >= step for path in place.glob("out/checkpoints/checkpoint-*")
    ):
        time.sleep(0.001)
    time.sleep(generator.uniform(0, 0.05))
    process.kill()
    assert process.wait() != 0, "killed too late"
    run("train", "--output", "out", "--resume", "--quiet")
    adapters = [(place / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "out")]
    assert adapters[0] == adapters[1]
    assert {path.name for path in (place / "whole").iterdir()} == {path.name for path in (place / "out").iterdir()}


@pytest.mark.kill
@pytest.mark.parametrize("options", [(), ("--save-steps", "7", "--metric", "loss"), ("--set", "over=siva")], ids=str)
def test_a_killed_run_by_mezo_goes_on_from_its_journal(
    place: Path, options: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    """Ended without warning at two random moments, under --full at ten, of 60 steps, most of which save nothing."""
    generator = random.Random(str(options))
    kills = 10 if request.config.getoption("--full") else 2
    arguments = (*TRAIN, "--method", "mezo", "--max-steps", "60", "--learning-rate", "1e-3", "--quiet", *options)
    run(*arguments, "--output", "whole")
    command = [sys.executable, "-m", "fastpeft", *arguments, "--output", "out", "--resume"]
    journal = place / "out" / "mezo.journal"
    steps = 0
    for moment in sorted(generator.sample(range(1, 50), kills)):
        wanted = max(moment, steps + 1)  # at least one of its own
        process = subprocess.Popen(command, env=ENVIRONMENT)
        while process.poll() is None and not (journal.exists() and Journal.open(journal).steps >= wanted):
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.02))
        process.kill()
        assert process.wait() != 0, "killed too late"
        steps = Journal.open(journal).steps
        assert wanted <= steps < 60
    run("train", "--output", "out", "--resume", "--quiet")
    weights = "adapter_model.safetensors" if "over=siva" in options else "model.safetensors"
    for name in (weights, "mezo.journal"):
        assert (place / "whole" / name).read_bytes() == (place / "out" / name).read_bytes(), name
    for name in ("loss", "best_step", "steps"):
        whole, out = (json.loads((place / folder / "metrics.json").read_text())[name] for folder in ("whole", "out"))
        assert whole == out, name
    assert {path.name for path in (place / "whole").iterdir()} == {path.name for path in (place / "out").iterdir()}
