"""Killed at random moments, a run goes on to the result of one that was left alone; see `kill`."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SEED
from PIL import Image
from reliability import kill
from safetensors.torch import save

from fastpeft.support.record_store import RecordStore


def picture() -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((32, 32), 50).save(stream, format="png")
    return stream.getvalue()


PICTURE = picture()


def check(folder: Path, kind: str, kills: int) -> None:
    kill.prepare(folder)
    found = kill.attack(folder, kind, kills, seed=int(SEED))
    assert found.faults == []
    assert found.kills == kills


@pytest.mark.long(but="mezo")
@pytest.mark.parametrize("kind", ["siva", "k-lst", "k-lst, features cached", "full", "mezo", kill.ONE_CELL])
def test_nothing_is_lost_at_one_moment(tmp_path: Path, kind: str) -> None:
    check(tmp_path, kind, kills=1)


@pytest.mark.long
@pytest.mark.kill
@pytest.mark.parametrize("kind", [*kill.RUNS, kill.COMPARE])
def test_nothing_is_lost(tmp_path: Path, kind: str) -> None:
    check(tmp_path, kind, kills=3)


@pytest.mark.parametrize(
    ("name", "whole", "half"),
    [
        ("checkpoint-1/model.safetensors", save({"w": torch.zeros(3)}), slice(20)),
        ("metrics.json", b'{"loss": 0.5}', slice(9)),
        ("results.csv", b"variant,seed\nhead,0\n", slice(-3)),
        ("results.csv", b"variant,seed\nhead,0\n", slice(-1)),
        ("README.md", b"# A model\n", slice(5)),
        ("report.html", b"<html>\n</html>", slice(9)),
        ("curves.png", PICTURE, slice(len(PICTURE) // 2)),
    ],
)
def test_what_cannot_be_read_is_found(tmp_path: Path, name: str, whole: bytes, half: slice) -> None:
    """The harness itself: half of a file at its final name is a fault, one that is marked is none."""
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(whole)
    (tmp_path / f".{file.name}.a1b2.part").write_bytes(whole[half])
    assert kill.unreadable(tmp_path) == []
    file.write_bytes(whole[half])
    (fault,) = kill.unreadable(tmp_path)
    assert fault.startswith(f"{name}: ")
    assert kill.half_written(tmp_path)


@pytest.mark.parametrize("part", ["records", "index"])
def test_features_that_are_lost_are_found(tmp_path: Path, part: str) -> None:
    kind, output = "k-lst, features cached", tmp_path / "run"
    place, cache = kill.places(kind, output)
    assert (place, cache.parent) == (output, tmp_path)
    assert kill.places("siva", output) == [output]
    RecordStore(cache, "a", 10_000).append({bytes([n] * 16): np.full(70, n, np.uint8) for n in range(3)})
    assert kill.unreadable(cache) == []
    content = bytearray((cache / "a" / part).read_bytes())
    (cache / "a" / part).write_bytes(content[: 140 if part == "records" else -3])
    faults = kill.unreadable(cache)
    if part == "index":  # half a line names nothing
        assert faults == []
        content[0] ^= 1
        (cache / "a" / part).write_bytes(content)
        faults = kill.unreadable(cache)
    (fault,) = faults
    assert fault.startswith("a/index: 3 lines name ")


def test_what_is_found_goes_into_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([kill.Report(2, 1, 1), kill.Report(2, 0, 2), kill.Report(2, 0, 1, ["lost"])])
    monkeypatch.setattr(kill, "attack", lambda *_: next(found))
    monkeypatch.setattr(kill, "prepare", lambda _: None)
    file = tmp_path / "kills.csv"
    for kinds, code in ((["siva", "compare"], 0), (["siva"], '[\n  "lost"\n]')):
        with pytest.raises(SystemExit) as ended:
            kill.main(["--file", str(file), *kinds])
        assert ended.value.code == code
    assert file.read_text() == "run,kills,while_writing,runs,faults\nsiva,2,0,1,1\ncompare,2,0,2,0\n"
