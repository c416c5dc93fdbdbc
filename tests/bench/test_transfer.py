"""The rows of each task of the suite of transfer, and a cell that is not run twice."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from samples import save_tiny_model

from bench import transfer
from bench.harness import read_rows
from fastpeft.data.examples import load_data

PAIR = "a dog runs\tan animal moves"
FILES = {  # of each task: what is before its rows, and one of them
    "sst2": {"train.tsv dev.tsv": ("sentence\tlabel\n", 'so "good\t{}\n')},
    "trec": {"train.tsv test.tsv": ("text\tlabel\n", "who is it ?\tHUM{}\n")},
    "banking77": {"train.csv test.csv": ("text,category\n", '"where, then",card_{}\n')},
    "sms": {"sms.csv": ("label,text\n", "spam{},text {n}\n")},
    "wnut17": {"train.conll test.conll": ("", "a\tO\nb c\tB-person\n\n")},
    "sick": {"SICK_train.txt SICK_trial.txt": ("pair_ID\ta\tb\tc\td\n", f"{{n}}\t{PAIR}\t3.5\tNEUTRAL{{}}\n")},
    "sts": {"2015.train.tsv 2015.test.tsv": ("", f"{{n}}.5\t{PAIR}\tmore\n")},
}


def _write(task: str, folder: Path) -> None:
    folder.mkdir()
    for names, (head, row) in FILES[task].items():
        for name in names.split():
            rows = "".join(row.format(n % 2, n=n) for n in range(48))
            (folder / name).write_text(head + rows, encoding="utf-8")


@pytest.mark.parametrize("task", FILES)
def test_rows_of_a_task(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SICK measures on its 48 rows of trial and on 8 of its others, SMS on what it does not learn."""
    monkeypatch.setattr(transfer, "TRAIN_ROWS", 20)
    monkeypatch.setattr(transfer, "TEST_ROWS", 56)
    _write(task, tmp_path / task)
    found = load_data(str(transfer.write_task(task, tmp_path, tmp_path)))
    assert len(found.train) == {"sms": 20, "sick": 20}.get(task, 48)
    assert len(found.dev) == {"sms": 28, "sick": 56}.get(task, 48)


def test_a_cell_runs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write("trec", tmp_path / "trec")
    rows = transfer.write_task("trec", tmp_path, tmp_path)
    model = str(save_tiny_model(tmp_path / "model"))
    variant = "siva:max_steps=2:bf16=false:scaling=plain"
    cell = transfer.Cell("tiny", model, "trec", rows, variant, 0, tmp_path / "run")
    broken = dataclasses.replace(cell, variant="siva:targets=nowhere", output=tmp_path / "broken")
    found = transfer.run([broken, cell], tmp_path / "table.csv", 1)
    row = next(found)
    expected = {"task": "trec", "variant": variant, "metric": "accuracy", "steps": "2", "compute_dtype": "float32"}
    assert row | expected == row
    with pytest.raises(RuntimeError, match="nowhere"):
        next(found)
    assert read_rows(tmp_path / "table.csv") == [row]
    monkeypatch.setattr(transfer.Cell, "run", None)
    assert not [*transfer.run([cell], tmp_path / "table.csv", 1)]
