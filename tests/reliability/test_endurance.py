"""Nothing is left behind by a step; see `endurance`."""

from __future__ import annotations

from pathlib import Path

import pytest
from reliability.endurance import endure

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("method", ["siva", "mezo"])
def test_steps_keep_no_file_open_and_no_tensor_alive(tmp_path: Path, method: str) -> None:
    first, *later = endure(tmp_path, method, steps=100, samples=4)
    assert [(each.handles, each.tensors) for each in later] == [(first.handles, first.tensors)] * len(later)
