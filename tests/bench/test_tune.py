"""`bench.tune` calls the ops with arguments that fit them, keeps the times, and goes on where it was."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from bench import tune
from fastpeft.ops import backends
from fastpeft.ops.define import OPS

SMALL = [
    *tune.siva_calls(24, (16,), 32, 4, torch.bfloat16, "cpu"),
    *tune.siva_calls(24, (16, 8), 32, 4, torch.bfloat16, "cpu"),
    *tune.window_calls(2, 5, 8, 3, 0.2, torch.bfloat16, "cpu", True),
    *tune.head_calls(8, 30, 5, torch.bfloat16, "cpu"),
]


def test_it_times_and_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    timed: list[str] = []

    def forms(op: str) -> dict[str, object]:
        timed.append(op)
        return {"triton": OPS[op].reference, "aten": OPS[op].aten}

    monkeypatch.setattr(backends, "gpu_forms", forms)
    file = tmp_path / "sm_90.json"
    assert tune.tune(file, iter(SMALL[:3])) == 3
    before = json.loads(file.read_text())
    assert tune.tune(file, iter(SMALL)) == len(SMALL) == 8
    after = json.loads(file.read_text())
    assert before.items() <= after.items()
    assert all(set(times) == {"triton", "aten"} for times in after.values())
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_every_op_that_is_chosen_is_timed() -> None:
    """But for rows of several adapters, whose classes are too many to bring."""
    named = {name for (name, device), forms in backends.IMPLEMENTED.items() if device == "cuda" and len(forms) == 2}
    assert {op for op, _ in SMALL} == {name for name in named if not name.startswith(("mezo", "siva_linear_mixed"))}


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    tune.main()
    assert "no GPU" in capsys.readouterr().out
    assert len(list(itertools.islice(tune.calls("meta"), 3000))) < 1000
