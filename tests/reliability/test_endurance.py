"""Nothing is left behind by a step; see `endurance`."""

from __future__ import annotations

from pathlib import Path

import pytest
from reliability import endurance
from reliability.endurance import Sample, endure


@pytest.mark.long
@pytest.mark.parametrize("method", ["siva", "mezo"])
def test_steps_keep_no_file_open_and_no_tensor_alive(tmp_path: Path, method: str) -> None:
    first, *later = endure(tmp_path, method, steps=100, samples=4)
    assert [(each.handles, each.tensors) for each in later] == [(first.handles, first.tensors)] * len(later)


def test_what_is_seen_goes_into_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [Sample(10, 3 * 2**19, 6, 41), Sample(20, 2**20, 6, 41)]
    monkeypatch.setattr(endurance, "endure", lambda *_: samples)
    file = tmp_path / "endurance.csv"
    for _ in range(2):
        endurance.main(["mezo", "20", "--file", str(file)])
    heads = "method,steps,step,resident_mb,open_files,live_tensors"
    assert file.read_text() == f"{heads}\nmezo,20,10,1.5,6,41\nmezo,20,20,1.0,6,41\n"
