"""Every candidate of the bench computes the same rows, each by its own adapter, and the same gradients."""

from __future__ import annotations

import pytest
import torch

from bench import bench_siva_linear_mixed as bench
from bench import harness

CPU = torch.device("cpu")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def tiny(order: str, work: str) -> bench.Case:
    return bench.Case("tiny", features=16, rows=12, tokens=2, adapters=3, order=order, dtype="float32", work=work)


@pytest.mark.parametrize("order", ["sorted", "mixed"])
def test_all_give_the_same_rows(order):
    found = {name: run() for name, run in bench.candidates(tiny(order, "forward"), CPU).items()}
    assert tuple(found) == bench.NAMES
    one = found.pop("one adapter")
    for name in bench.NAMES[1:-1]:
        torch.testing.assert_close(found[name], found["op"], **CLOSE)
    same = torch.isclose(one, found["op"], **CLOSE).flatten(1).all(1)
    assert same.sum() == 4  # the rows of that adapter: the others have factors of their own
    assert same.equal(torch.arange(12) < 4) is (order == "sorted")


@pytest.mark.parametrize("order", ["sorted", "mixed"])
def test_all_give_the_same_gradients(order, monkeypatch):
    made = []
    lora = bench.lora
    monkeypatch.setattr(bench, "lora", lambda linear, us, ss, vs: made.extend(ss) or lora(linear, us, ss, vs))
    found = {name: run() for name, run in bench.candidates(tiny(order, "training"), CPU).items()}
    assert len(found.pop("one adapter")) == 3
    dx, *rest = found["peft lora"]
    found["peft lora"] = (dx, *rest[:3], *(db * s for db, s in zip(rest[3:], made)))  # of B = U diag(s)
    for gradients in found.values():
        assert len(gradients) == 7
        torch.testing.assert_close(tuple(gradients), tuple(found["op"]), **CLOSE)


def test_rows_are_recorded(tmp_path):
    case = tiny("mixed", "training")
    file = tmp_path / "siva_linear_mixed.csv"
    columns = {name: str(value) for name, value in vars(case).items()}
    harness.measure(file, columns, bench.candidates(case, CPU), CPU, rounds=3)
    assert [row["candidate"] for row in harness.read_rows(file)] == list(bench.NAMES)


def test_cases_differ_in_name():
    named = [str(case) for case in bench.cases(("float32", "bfloat16"))]
    assert len(set(named)) == len(named)
