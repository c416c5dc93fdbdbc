"""Every candidate of the bench computes the same attention, and the same gradients of it."""

from __future__ import annotations

import pytest
import torch

from bench import bench_window_attention as bench
from bench import harness

CPU = torch.device("cpu")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("work", ["forward", "training"])
def test_all_compute_the_same(work, padded):
    case = bench.Case("tiny", width=8, batch=4, tokens=8, window=3, dtype="float32", work=work, padded=padded)
    found = {name: run() for name, run in bench.candidates(case, CPU).items()}
    assert tuple(found) == bench.NAMES
    for name in bench.NAMES[1:]:
        torch.testing.assert_close(found[name], found["op"], **CLOSE)
    if work == "training":
        assert [tuple(gradient.shape) for gradient in found["op"]] == [(4, 1, 8, 8), (4, 3, 8, 8), (3, 8)]
        if padded:
            assert found["op"][1][1::2, :, -2:].eq(0).all()  # a quarter, which no query of these texts sees


def test_dropout_is_drawn_by_all():
    """The op and the reference draw the same; PyTorch's generator others, of the same share."""
    case = bench.Case("tiny", 8, 4, 8, 3, "float32", "training", dropout=0.5)
    found = {name: run() for name, run in bench.candidates(case, CPU).items()}
    torch.testing.assert_close(found["reference"], found["op"], **CLOSE)
    for _, dc, _ in found.values():
        assert 0.4 < dc.eq(0).double().mean() < 0.6


def test_rows_are_recorded(tmp_path):
    case = bench.Case("tiny", 8, 2, 4, 3, "float32", "training")
    file = tmp_path / "window_attention.csv"
    columns = {name: str(value) for name, value in vars(case).items()}
    harness.measure(file, columns, bench.candidates(case, CPU), CPU, rounds=3)
    assert [row["candidate"] for row in harness.read_rows(file)] == list(bench.NAMES)


def test_cases_differ_in_name():
    named = [str(case) for case in bench.cases(("float32", "bfloat16"))]
    assert len(set(named)) == len(named)
    assert {(case.tokens, case.window) for case in bench.cases()} == {(64, 9), (128, 9), (512, 9), (128, 3)}
