"""The screening of variants: what is tried can be compared, and each table keeps its columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import screen, slices
from bench.harness import DATA, read_rows, write_rows
from fastpeft import CompareConfig
from fastpeft.comparison.run import CompareResult
from fastpeft.data.examples import load_data

TABLES = list(screen.SCREENS)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[CompareConfig]:
    """What was to be compared, of which nothing runs: the cells of `lst` fail, all others are finished."""
    asked: list[CompareConfig] = []

    def compare(config: CompareConfig) -> CompareResult:
        asked.append(config)
        rows: list[dict[str, Any]] = []
        for cell in config.cells():
            figures = {"accuracy": "0.75", "dev_rows": "1200", "learning_rate": "0.5", "next_accuracy": "0.6"}
            state = {"state": "failed", "error": "no"} if cell.method == "lst" else {"state": "finished", "error": ""}
            data = {"model": "a/path", "data": "a/path"}  # as metrics.json has them, and so the csv file
            rows.append({"variant": cell.variant, "seed": str(cell.seed), **data, **figures, **state})
        write_rows(Path(config.output) / "results.csv", rows)
        return CompareResult(Path(config.output), {row["variant"]: row["error"] for row in rows if row["error"]})

    monkeypatch.setattr(screen, "compare", compare)
    monkeypatch.setattr(screen, "DATA", tmp_path)
    return asked


@pytest.mark.parametrize("table", TABLES)
def test_every_variant_can_be_compared(table: str, tmp_path: Path) -> None:
    tried = screen.SCREENS[table]
    config = CompareConfig(output=str(tmp_path / "run"), methods=tried.variants, common=tried.common)
    assert tuple(cell.variant for cell in config.cells()) == tried.variants


@pytest.mark.parametrize("table", TABLES)
def test_columns_are_those_of_the_table(table: str) -> None:
    tried = screen.SCREENS[table]
    assert (*tried.key, *tried.figures) == tuple(read_rows(DATA / f"{table}.csv")[0])


def test_a_slice_of_e2e_is_of_next_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("valid", "test"):
        lines = (f"name[{part} {row // 2}] || said {row}\n" for row in range(40))
        (tmp_path / f"{part}.txt").write_text("".join(lines))
    sizes = ["--rows", "20", "--dev-rows", "6"]
    monkeypatch.setattr("sys.argv", ["slices", str(tmp_path), str(tmp_path / "slice"), *sizes, "--e2e"])
    slices.main()
    found = load_data(str(tmp_path / "slice"), problem_type="next_words")
    assert (len(found.train), len(found.dev)) == (20, 6)
    learned, asked = ({prompt for prompt, _ in part.texts} for part in (found.train, found.dev))
    assert not learned & asked, "the dev rows have other meanings"
    assert all(prompt.startswith("name[valid ") for prompt in learned | asked)


def test_a_row_is_named_and_has_its_standard_error(asked: list[CompareConfig], tmp_path: Path) -> None:
    command = ["ladder_options", "a/slice", str(tmp_path / "run"), "--variants", "k-lst", "siva"]
    for name in ("demo", "sst2", "demo"):
        assert screen.main([*command, "--name", name, "--seeds", "2", "--set", "model=a/model", "epochs=2"]) == 0
    rows = read_rows(tmp_path / "ladder_options.csv")
    expected = [(name, variant, seed) for name in ("demo", "sst2") for variant in ("k-lst", "siva") for seed in "01"]
    assert [(row["data"], row["variant"], row["seed"]) for row in rows] == expected
    assert {(row["standard_error"], row["learning_rate"], row["entity_f1"]) for row in rows} == {("0.0125", "0.5", "")}
    assert asked[0].common == {"bf16": False, "data": "a/slice", "model": "a/model", "epochs": 2}


def test_options_are_as_the_variant_has_them(asked: list[CompareConfig], tmp_path: Path) -> None:
    assert screen.main(["siva_rates", "demo", str(tmp_path / "run"), "--name", "MPNet", "--set", "bf16=true"]) == 0
    rows = read_rows(tmp_path / "siva_rates.csv")
    assert len(rows) == 12
    assert list(rows[1].values())[:5] == ["MPNet", "all-linear", "spectral", "1e-3", "0.75"]
    assert asked[0].common == {"bf16": True, "max_steps": 250, "data": "demo"}


def test_a_cell_that_failed_is_told(
    asked: list[CompareConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = ["--variants", "lst", "k-lst"]
    assert screen.main(["ladder_options", "demo", str(tmp_path / "options"), *variants]) == 1
    assert capsys.readouterr().err == "lst failed: no\n"
    assert [row["variant"] for row in read_rows(tmp_path / "ladder_options.csv")] == ["k-lst"]
    assert screen.main(["words_rates", "demo", str(tmp_path / "words"), *variants]) == 1
    rows = read_rows(tmp_path / "words_rates.csv")
    assert [(row["variant"], row["error"]) for row in rows] == [("lst", "no"), ("k-lst", "")]
