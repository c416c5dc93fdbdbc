"""Files are data: nothing in them is run, no network is used unasked, and what they say is escaped where shown."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import reviews, save_tiny_model, write_csv
from typer.testing import CliRunner

from fastpeft import FastpeftError, TrainConfig, train
from fastpeft.cli import app
from fastpeft.comparison.cells import Cell
from fastpeft.comparison.report.document import Heading, Items, Table, page
from fastpeft.comparison.run import _arguments
from fastpeft.comparison.variants import ZERO_SHOT
from fastpeft.data.examples import load_data
from fastpeft.data.problems import CLASSIFICATION
from fastpeft.models import load_classifier
from fastpeft.support import hub
from fastpeft.support.launcher import import_path
from fastpeft.support.model_card import model_card

SOURCES = sorted((Path(__file__).parents[1] / "fastpeft").rglob("*.py"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data and runs of every way to keep weights, one of them unfinished."""
    place = tmp_path_factory.mktemp("place")
    save_tiny_model(place / "model")
    write_csv(place / "good.csv", reviews(24))
    common = {"model": str(place / "model"), "data": str(place / "good.csv"), "max_steps": 2, "save_steps": 1}
    for method in ("siva", "k-lst", "full", "mezo"):
        train(TrainConfig(output=str(place / method), method=method, **common))
    shutil.copytree(place / "siva", place / "unfinished")
    (place / "unfinished" / "metrics.json").unlink()
    return place


@pytest.mark.parametrize(
    "pattern", [r"\bpickle\b", r"trust_remote_code\W+True", r"\byaml\b", r"\b(eval|exec)\([^)]", "shell=True"]
)
def test_no_source_runs_what_a_file_says(pattern: str) -> None:
    found = [str(file) for file in SOURCES if re.search(rf"(?<![.\w]){pattern}", file.read_text(encoding="utf-8"))]
    assert found == []


def test_pickles_are_read_of_checkpoints_alone() -> None:
    lines = [line.strip() for file in SOURCES for line in file.read_text().splitlines() if "torch.load(" in line]
    assert len(lines) == 1
    assert "weights_only=True" in lines[0]


def commands(place: Path) -> list[list[str]]:
    made = [["predict", str(place / run), "a lovely film"] for run in ("siva", "k-lst", "full", "mezo")]
    made += [["eval", str(place / run)] for run in ("siva", "mezo")]
    made += [["export", str(place / "siva"), str(place / "merged")]]
    made += [["export", "--step", "1", str(place / "mezo"), str(place / "replayed")]]
    return made


@pytest.mark.long
def test_no_reader_unpickles(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("something was unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    for command in commands(place):
        shutil.rmtree(place / "merged", ignore_errors=True)
        shutil.rmtree(place / "replayed", ignore_errors=True)
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, (command, result.output, result.exception)


def test_a_resumed_run_unpickles_tensors_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, given = torch.load, []
    monkeypatch.setattr(torch, "load", lambda *args, **options: given.append(options) or load(*args, **options))
    shutil.rmtree(place / "unfinished" / "checkpoints" / "checkpoint-2")
    result = CliRunner().invoke(app, ["train", "--output", str(place / "unfinished"), "--resume"])
    assert result.exit_code == 0, result.output
    assert given
    assert all(options.get("weights_only") is True for options in given)


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.long(but="rng_state.pth")
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_code_in_a_checkpoint_does_not_run(place: Path, tmp_path: Path, name: str) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(place / "siva", bad)
    (bad / "metrics.json").unlink()
    (bad / "run.json").write_text((bad / "run.json").read_text().replace(str(place / "siva"), str(bad)))
    shutil.rmtree(bad / "checkpoints" / "checkpoint-2")
    torch.save({"state": Bomb(tmp_path / "mark")}, bad / "checkpoints" / "checkpoint-1" / name)
    result = CliRunner().invoke(app, ["train", "--output", str(bad), "--resume"])
    assert not (tmp_path / "mark").exists()
    assert result.exit_code in (0, 2), repr(result.exception)  # nothing reads training_args.bin


def test_code_beside_a_model_does_not_run(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shutil.copytree(place / "model", tmp_path / "model")
    config = (model / "config.json").read_text().replace('"roberta"', '"mine"')
    mapping = '{"AutoConfig": "code.C", "AutoModelForSequenceClassification": "code.M"}'
    (model / "config.json").write_text(config.replace("{", f'{{"auto_map": {mapping},', 1))
    (model / "code.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'mark')!r})\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what a person may answer who is asked
    with pytest.raises(FastpeftError, match="cannot load the model"):
        load_classifier(str(model), ["a", "b"], CLASSIFICATION)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("imported", [False, True])
def test_code_in_the_working_folder_runs_only_where_this_process_imports_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, imported: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beside.py").touch()
    others = [place for place in sys.path if place not in ("", str(tmp_path))]
    monkeypatch.setattr(sys, "path", [str(tmp_path)] * imported + others)
    done = subprocess.run([sys.executable, *import_path(), "-c", "import beside"], capture_output=True, check=False)
    assert (done.returncode == 0) == imported
    cells = [Cell("a", "a", method, 0, {"output": "a"}) for method in ("head", ZERO_SHOT)]
    assert all(_arguments(cell)[: len(import_path())] == import_path() for cell in cells)


def test_no_network_is_used_unasked(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the environment does not forbid it."""
    import huggingface_hub

    asked: list[tuple[Any, ...]] = []  # an error alone would be taken for a hub out of reach

    def refuse(*arguments: Any, **options: Any) -> None:
        asked.append(arguments)
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    hub.reachable.cache_clear()
    common = ["--model", str(place / "model"), "--data", str(place / "good.csv"), "--max-steps", "1", "--quiet"]
    commands = [
        *(
            ["train", "--method", method, *common, "--output", str(tmp_path / method)]
            for method in ("siva", "k-lst", "mezo")
        ),
        ["eval", str(tmp_path / "siva")],
        ["predict", str(tmp_path / "k-lst"), "a film"],
        ["export", str(tmp_path / "siva"), str(tmp_path / "merged")],
        ["export", "--to", "lora", str(tmp_path / "siva"), str(tmp_path / "lora")],
        ["info"],
    ]
    for command in commands:
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, (command, result.output, result.exception)
        assert asked == [], command


def test_a_hub_out_of_reach_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked, connected = [], []

    def refuse(*arguments: Any, **options: Any) -> None:
        connected.append(arguments)
        raise OSError("no network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)

    class Session:
        def head(self, *arguments: Any, **options: Any) -> None:
            asked.append(options["timeout"])
            raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils.get_session", Session)
    hub.reachable.cache_clear()
    try:
        for _ in range(2):
            with pytest.raises(FastpeftError, match="'some/model'"):
                load_classifier("some/model", ["a", "b"], CLASSIFICATION)
        with pytest.raises(FastpeftError, match="'some/data'"):
            load_data("some/data")
        assert len(asked) == 1
        assert len(connected) <= 1  # huggingface_hub may look up whom it runs for; one file alone would be six
    finally:
        hub.reachable.cache_clear()


HOSTILE = '<script>alert("1")</script>'


def test_texts_are_escaped_in_a_page() -> None:
    text = page(HOSTILE, [Heading(HOSTILE), Items([HOSTILE]), Table([[HOSTILE], [HOSTILE]])])
    assert HOSTILE not in text
    assert text.count("&lt;script&gt;") >= 5


def test_texts_are_escaped_in_a_card() -> None:
    name = "base\nlicense: mine"
    card = model_card(
        base_model=name,
        method="SiVA",
        snippet="code",
        data=HOSTILE,
        labels=[HOSTILE, "a|b", "![a](https://b.c/d.png)"],
        metrics={"accuracy": HOSTILE},
        settings={HOSTILE: HOSTILE},
    )
    assert "<script>" not in card
    assert "\nlicense:" not in card
    assert "a|b" not in card
    assert "](" not in card
