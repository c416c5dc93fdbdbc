"""Every candidate of the bench computes what it is compared on."""

from __future__ import annotations

import copy

import pytest
import torch

from bench import bench_siva_linear as bench
from bench import harness, plot

CPU = torch.device("cpu")


@pytest.mark.parametrize("layers", [bench.QUERY, bench.ATTENTION])
def test_all_start_from_the_same_layers(layers):
    case = bench.Case("tiny", features=16, rows=8, dtype="float32", work="forward", layers=layers)
    outputs = [run() for run in bench.candidates(case, CPU).values()]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("work", ["forward", "training"])
def test_rows_are_recorded_and_drawn(work, tmp_path):
    case = bench.Case("tiny", 16, 8, "float32", work, bench.ATTENTION)
    file = tmp_path / "siva_linear.csv"
    columns = {name: str(value) for name, value in vars(case).items()}
    harness.measure(file, columns, bench.candidates(case, CPU), CPU, rounds=3)
    assert {row["candidate"] for row in harness.read_rows(file)} == set(bench.LAYERS)
    plot.plot_timings(harness.read_rows(file), file.with_suffix(".png"))
    assert (tmp_path / "siva_linear.png").stat().st_size > 1000


def test_no_candidate_packs_its_weight():
    """The others' layers have no packs, so SiVA's would be faster by what is not its own."""
    linears = bench.Layers({name: torch.nn.Linear(16, 16) for name in bench.ATTENTION.split(", ")})
    for make in bench.LAYERS.values():
        made = make(copy.deepcopy(linears)).modules()
        assert not any(packs.enabled for module in made if (packs := getattr(module, "packs", None)))


def test_training_returns_every_gradient():
    case = bench.Case("tiny", 16, 8, "float32", "training")
    assert "siva layer by layer" not in bench.candidates(case, CPU)  # a single layer is no group
    gradients = {name: len(run()) for name, run in bench.candidates(case, CPU).items()}
    assert gradients.pop("frozen linear") == 1  # that of x
    assert gradients.pop("dora") == 4
    assert set(gradients.values()) == {3}


def test_on_a_card_a_case_that_has_its_rows_is_not_prepared_again(monkeypatch, tmp_path):
    """Preparing all takes longer than a call of bench.gpu may: it would begin with the first for ever."""
    monkeypatch.setattr(harness, "CARDS", tmp_path)
    monkeypatch.setattr(harness, "machine", lambda _: {"card": "A"})
    cases = [*bench.cases({"tiny": 16}, ("float32", "bfloat16", "float16"))]
    for case in cases[1:]:
        for name in bench.forms(case):
            row = {**harness.columns_of(case), "candidate": name, "how": "cold", "card": "A"}
            harness.put_row(tmp_path / bench.FILE.name, {**row, "source": harness.source()}, row)
    measured = []
    monkeypatch.setattr(bench, "LLAMA", {})
    monkeypatch.setattr(bench, "ROBERTA", {"tiny": 16})
    monkeypatch.setattr(bench, "candidates", lambda case, _: measured.append(case))
    monkeypatch.setattr(bench, "measure", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["bench_siva_linear", "--device", "cuda"])
    bench.main()
    assert measured == cases[:1]
