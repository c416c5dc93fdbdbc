"""Order and statistics of the timings, and tables that stay whole."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from bench import harness, timers
from bench.harness import Bench, elapsed, interleave, put_row, read_rows, spread, write_rows

CPU = torch.device("cpu")


def test_candidates_take_turns_and_the_first_changes():
    calls = []

    def timer(run, device, repeats):
        run()
        return 1.0

    candidates = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = interleave(candidates, CPU, rounds=3, timer=timer)
    assert "".join(calls[-18:]) == "aabbccbbccaaccaabb"  # each once before it is timed
    assert seconds == {name: [1.0] * 3 for name in "abc"}


def test_fast_candidates_are_repeated_within_a_sample():
    repeats = {}

    def timer(run, device, count):
        repeats[run()] = count
        return {"fast": 1e-5, "slow": 1.0}[run()]

    interleave({"fast": lambda: "fast", "slow": lambda: "slow"}, CPU, rounds=1, timer=timer)
    assert repeats == {"fast": 100, "slow": 1}


def test_elapsed_is_per_run(monkeypatch):
    runs = []
    monkeypatch.setattr(timers.time, "perf_counter", lambda: 3.0 * len(runs))
    assert elapsed(lambda: runs.append(0), CPU, repeats=5) == 3.0
    assert len(runs) == 5


def test_spread_is_three_percentiles():
    assert spread(range(101)) == (20, 50, 80)


@dataclass(frozen=True)
class Case:
    op: str = "nothing"
    rows: int = 1


def bench(*names: str) -> Bench:
    return Bench("", "op.csv", lambda _: [Case()], lambda *_: {name: lambda: lambda: None for name in names}, rounds=5)


def test_measure_writes_a_row_for_each_candidate(tmp_path):
    for _ in range(2):  # measuring again replaces
        bench("ours", "theirs", "another").main(["--candidates", "ours,theirs", "--rows", "1", "2"], tmp_path)
    rows = read_rows(tmp_path / "op.csv")
    assert [(row["rows"], row["candidate"]) for row in rows] == [
        (size, name) for size in "12" for name in ("ours", "theirs")
    ]
    assert [float(rows[0][f"ratio_p{p}"]) for p in (20, 50, 80)] == [1, 1, 1]
    for row in rows:
        assert row["torch"] == torch.__version__.partition("+")[0]
        assert row["device"] == "cpu"
        assert row["card"]
        assert float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"])


def test_rows_of_other_machines_stay(tmp_path):
    file = tmp_path / "table.csv"
    put_row(file, {"case": "1", "card": "A", "ms": "1"}, ("case", "card"))
    put_row(file, {"case": "1", "card": "B", "ms": "2"}, ("case", "card"))
    put_row(file, {"case": "1", "card": "A", "ms": "3"}, ("case", "card"))
    assert [(row["card"], row["ms"]) for row in read_rows(file)] == [("A", "3"), ("B", "2")]


def test_a_failed_write_leaves_the_table(tmp_path):
    file = tmp_path / "table.csv"
    write_rows(file, [{"a": "1"}])
    with pytest.raises(ValueError, match="b"):
        write_rows(file, [{"a": "1"}, {"a": "2", "b": "3"}])
    assert read_rows(file) == [{"a": "1"}]


def test_on_a_card_every_way_has_its_rows_and_is_measured_once(monkeypatch, tmp_path):
    """With a CPU in the card's place, and a replay that is the call itself."""
    made = []
    monkeypatch.setattr(harness, "captured", lambda runs: made.append("graph") or dict(runs))
    monkeypatch.setattr(harness, "elapsed_cold", elapsed)
    monkeypatch.setattr(harness, "peak_mb", lambda run: 1.5)
    for _ in range(2):
        bench("ours", "theirs")._measure_on_card(Case(), CPU, 3, None, tmp_path)
        monkeypatch.setattr(Bench, "ready", lambda *_: made.append("ready"))  # preparing takes longer than a call may
    rows = read_rows(tmp_path / "op.csv")
    assert [(row["how"], row["candidate"]) for row in rows] == [
        (how, name) for how in ("eager", "graph", "cold") for name in ("ours", "theirs")
    ]
    assert made == ["graph"]
    assert all(row["source"] == harness.source() and row["peak_mb"] == "1.5" for row in rows)
    monkeypatch.undo()
    monkeypatch.setattr(harness, "source", lambda: "of other kernels")
    monkeypatch.setattr(harness, "captured", lambda runs: {})
    monkeypatch.setattr(harness, "elapsed_cold", elapsed)
    monkeypatch.setattr(harness, "peak_mb", lambda run: 1.5)
    bench("ours")._measure_on_card(Case(), CPU, 3, None, tmp_path)
    assert [row["how"] for row in read_rows(tmp_path / "op.csv")[len(rows) :]] == ["eager", "cold"]
