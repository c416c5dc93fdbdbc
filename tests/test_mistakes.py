"""Mistakes on the command line: each ends with code 2 and one message that says what to do, and writes nothing."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest
from samples import reviews, save_tiny_model, write_csv
from typer.testing import CliRunner

from fastpeft.cli import app


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a finished run, and files that are not as they should be."""
    folder = tmp_path_factory.mktemp("mistakes")
    save_tiny_model(folder / "model")
    write_csv(folder / "reviews.csv", reviews(60), ("review", "stars"))
    write_csv(folder / "columns.csv", reviews(8), ("left", "right"))
    (folder / "empty.csv").write_text("")
    (folder / "header.csv").write_text("text,label\n")
    (folder / "one.csv").write_text("text,label\n" + "".join(f"film {number},good\n" for number in range(20)))
    (folder / "broken.jsonl").write_text('{"text": "a film", "label"\n')
    (folder / "picture.png").write_bytes(b"\x89PNG\0")
    (folder / "broken-model").mkdir()
    (folder / "broken-model" / "config.json").write_text("{")
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("mine")
    (folder / "no-run.json").write_text('{"epoch": 3}')
    before = Path.cwd()
    os.chdir(folder)
    try:
        done = CliRunner().invoke(app, shlex.split(f"{TRAIN} --method head --output run --max-steps 1 --quiet"))
        assert done.exit_code == 0, done.output
    finally:
        os.chdir(before)
    return folder


TRAIN = "train --model model --data reviews.csv --label-column stars"
COMPARE = "compare --model model --data reviews.csv --label-column stars --output table"

# what was typed, and what the message has
MISTAKES = [
    # names
    ("trian", "Did you mean 'train'"),
    ("train --modle demo", "--model"),
    ("train --lr 0.1", "Possible options: --learning-rate\\)"),
    ("eval run --lr 0.1", "No such option: --lr(?! \\(Possible)"),
    ("train reviews.csv", "A value follows the name of its option, as in --data reviews.csv"),
    ("compare --methods siva lora --output table", "a list has no spaces"),
    ("predict run '- dull'", "Write -- before texts"),
    ("predict run --fil", "No such option: --fil \\(Possible"),
    ("train --method lorra", "--method is 'lorra'.* Did you mean lora"),
    ("train --method LORA", "--method is 'LORA'"),
    ("train --metric acc --save-steps 5", "--metric is 'acc'.* Did you mean accuracy"),
    ("train --metric meteor --save-steps 5", "--metric is 'meteor'.*accuracy"),
    ("train --problem-type clasification", "--problem-type is 'clasification'"),
    ("train --prompt-head word --prompt sst2", "--prompt-head is 'word'"),
    ("train --prompt sst3", "Did you mean sst5"),
    # values
    ("train --epochs 0", "--epochs is 0.0; it must be a number above 0"),
    ("train --epochs ten", "--epochs.*valid number"),
    ("train --batch-size 0", "--batch-size is 0; it must be a whole number from 1"),
    ("train --learning-rate -1", "--learning-rate is -1.0; it must be a number above 0"),
    ("train --max-steps -5", "--max-steps is -5"),
    ("train --rank 0", "--rank is 0"),
    ("train --seed -1", "--seed is -1"),
    ("train --output ''", "--output is ''"),
    (f"{TRAIN} --method k-lst --window 4", "4.*odd"),
    (f"{TRAIN} --max-length 100000", "--max-length 100000 is above what the model"),
    # settings
    ("train --set", "requires an argument"),
    ("train --set rank", "--set 'rank' is not of the form key=value"),
    (f"{TRAIN} --set learning_rate=0.1", "use --learning-rate"),
    (f"{TRAIN} --set num_train_epochs=2", "use --epochs"),
    (f"{TRAIN} --set weigth_decay=0.1", "Did you mean weight_decay"),
    (f"{TRAIN} --set weight_decay=high", "weight_decay is 'high'; it must be of the type float"),
    (f"{TRAIN} --set optim=adam", "adam"),
    # what does not go together
    ("train --patience 3", "--patience is 3, but there is no metric"),
    ("train --metric accuracy", "--save-steps"),
    ("train --cache-features kept --method lora", "--cache-features is 'kept'.*no frozen features"),
    ("train --label-words bad,good", "--label-words is 'bad,good', but there is no prompt"),
    ("train --memory-budget 100", "goes with --dry-run"),
    ("train --objective mlm --label-column stars", "--label-column is 'stars', but"),
    (f"{TRAIN} --method mezo --optimizer-in-backward", "--optimizer-in-backward is on, but"),
    # data
    ("train --data absent.csv", "absent.csv"),
    ("train --data empty.csv", "empty.csv"),
    ("train --data header.csv", "header.csv"),
    ("train --data one.csv", "class"),
    ("train --data broken.jsonl", "broken.jsonl.*1"),
    ("train --data picture.png", "picture.png"),
    ("train --data columns.csv", "--text-column|--label-column"),
    ("train --data reviews.csv --label-column star", "star.*stars"),
    ("train --data reviews.csv --text-column review,review", "--text-column is 'review,review'"),
    # models and runs
    ("train --model absent-model", "absent-model"),
    ("train --model broken-model --data reviews.csv", "broken-model"),
    (f"{TRAIN} --output notes", "notes"),
    (f"{TRAIN} --output run", "not empty.*--resume.*--overwrite"),
    ("train --init-from absent", "absent"),
    ("train --config no-run.json", "unknown name 'epoch'.*Did you mean epochs"),
    ("train --config absent.json", "absent.json"),
    ("eval absent", "absent"),
    ("eval", "either DIR, the folder of a finished run, or --model"),
    ("eval run --model demo", "Give one of the two"),
    ("eval --model demo", "--prompt is missing"),
    (
        "eval --model demo --prompt sst2 --max-new-tokens 3",
        "--max-new-tokens is 3, but a model that answers by a prompt generates no text",
    ),
    ("eval run --text-column review", "--data"),
    ("predict run", "nothing to classify"),
    ("predict absent 'a film'", "absent"),
    ("predict run 'a film' --max-new-tokens 4", "--max-new-tokens is 4"),
    ("predict run --file absent.csv", "absent.csv"),
    ("predict run --format csv", "--file"),
    ("predict run 'a film' --overwrite", "no --output"),
    ("predict run 'a film' --all --output found.csv", "--all changes only what is printed"),
    ("predict run 'a film' --output found.docx", "docx"),
    ("export run run/out --to onxx", "onxx"),
    ("export absent out", "absent"),
    # comparisons
    (COMPARE, "Give --methods with one or more of siva, k-lst"),
    (f"{COMPARE} --methods siva,lorra", "unknown method 'lorra'.*Did you mean lora"),
    (f"{COMPARE} --methods siva:rnak=3", "Did you mean rank"),
    (f"{COMPARE} --suite table3", "unknown suite 'table3'.*Did you mean table"),
    (f"{COMPARE} --methods siva --protocol ful", "--protocol is 'ful'.*Did you mean full"),
    (f"{COMPARE} --methods siva --seeds 0", "--seeds is 0"),
    (f"{COMPARE} --methods siva --jobs 0", "--jobs is 0"),
    (f"{COMPARE} --methods siva --executor rya", "--executor is 'rya'.*Did you mean ray"),
    (f"{COMPARE} --methods siva --memory-budget 100", "--memory-budget is 100 MB"),
    (f"{COMPARE} --methods siva --metric acc --save-steps 2", "cannot be used: --metric is 'acc'"),
    (f"{COMPARE} --methods siva:metric=acc --save-steps 2", "cannot be used: metric is 'acc'"),
    (
        f"{COMPARE} --methods siva --set learning_rate=1",
        "learning_rate cannot be set as a setting; use --learning-rate",
    ),
    ("compare --methods siva", "--output"),
]


def state(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(("typed", "told"), MISTAKES, ids=[typed for typed, _ in MISTAKES])
def test_a_mistake(place: Path, monkeypatch: pytest.MonkeyPatch, typed: str, told: str) -> None:
    monkeypatch.chdir(place)
    before = state(place)
    result = CliRunner().invoke(app, shlex.split(typed))
    shown = " ".join(result.stderr.replace("│", " ").split())
    assert result.exit_code == 2, result.output
    assert re.search(told, shown), shown
    assert len(re.findall(r"Error(?:: | ─)", shown)) == 1, shown
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert state(place) == before


def test_there_are_sixty() -> None:
    assert len(MISTAKES) >= 60
