"""What a dry run says that cells would take."""

from __future__ import annotations

from pathlib import Path

import pytest
from samples import reviews, save_tiny_model, write_csv
from typer.testing import CliRunner

from fastpeft import CompareConfig, estimates
from fastpeft.cli import app
from fastpeft.comparison.run import Comparison
from fastpeft.estimates import Estimate, _padded_tokens, estimate, plan
from fastpeft.task import Task
from fastpeft.trainer import LengthGroupedOrder

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def config(tmp_path: Path) -> CompareConfig:
    save_tiny_model(tmp_path / "model")
    write_csv(tmp_path / "reviews.csv", reviews(60))
    common = {"model": str(tmp_path / "model"), "data": str(tmp_path / "reviews.csv"), "epochs": 2}
    methods = ["head", "lst:init_from=mezo:eps=1e-2", "mezo:eps=1e-2", "siva:rank=99", "zero-shot:prompt=sst2"]
    return CompareConfig(output=str(tmp_path / "out"), methods=methods, common=common, seeds=2)


def test_estimates(config: CompareConfig, tmp_path: Path) -> None:
    found = Comparison(config).estimates()
    assert list(found) == ["head", "mezo:eps=1e-2", "lst:init_from=mezo:eps=1e-2", "siva:rank=99"], "one for all seeds"
    assert found["head"].memory_mb == plan(config.cells()[0].config).peak_memory_mb
    for variant in ("head", "lst:init_from=mezo:eps=1e-2", "mezo:eps=1e-2"):
        few, many = (found[variant].seconds(rows) for rows in (10, 1000))
        assert few is not None
        assert many is not None
        assert 0 < few < many
    failed = found["siva:rank=99"]
    assert "99" in (failed.error or "")
    assert (failed.seconds(10), failed.fits(1000)) == (None, None)
    assert not (tmp_path / "out").exists()


def test_what_is_above_the_budget_is_not_run(config: CompareConfig) -> None:
    head = estimate(config.cells()[0].config, budget_mb=0.001)
    assert head.memory_mb is not None
    assert (head.fits(0.001), head.fits(head.memory_mb), head.seconds(10)) == (False, True, None)


def test_a_plan_loads_and_simulates_once(config: CompareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    load, simulated = Task.load, estimates.simulated_peak_mb
    monkeypatch.setattr(Task, "load", lambda config: [calls.append("load"), load(config)][1])
    monkeypatch.setattr(estimates, "simulated_peak_mb", lambda *args: [calls.append("peak"), simulated(*args)][1])
    head = config.cells()[0].config
    assert plan(head).estimate.seconds(10) is None
    assert calls == ["load", "peak"]
    timed = plan(head, timed=True)
    assert calls == ["load", "peak"] * 2
    assert timed.steps == 8, "of 54 rows in batches of 16, for two epochs"
    assert timed.estimate.seconds(10) is not None


def test_rows_are_told_of_once_for_all_variants(config: CompareConfig, tmp_path: Path) -> None:
    common = [f"--{key}={config.common[key]}" for key in ("model", "data")]
    command = ["compare", "--methods", "head,bitfit", *common, "--output", str(tmp_path / "out"), "--dry-run"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    assert "".join(shown.stderr.split()).count("reviews.csv:60rows") == 1, "lines break where they are full"


def test_seconds_are_of_start_and_rows() -> None:
    assert Estimate(1.0, 2.0, 0.5).seconds(10) == 7.0


def test_tokens_with_padding() -> None:
    order = LengthGroupedOrder([3, 5, 9, 2, 7], batch_size=2, seed=0)
    tokens = _padded_tokens(order, 1)
    assert len(tokens) == 3
    assert 26 <= sum(tokens) <= 2 * 9 + 2 * 7 + 5
    assert sum(_padded_tokens(order, 2)) == sum(tokens)
    assert len(_padded_tokens(order, 2)) == 2
