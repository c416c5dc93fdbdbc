"""Paired tests of a person's own variants: what a report begins with, its table of pairs, and what it warns of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compared import finish
from rich.console import Console

from fastpeft import CompareConfig, console
from fastpeft.comparison import significance
from fastpeft.comparison.plan import Plan
from fastpeft.comparison.report import document, paired_tests, results, sections
from fastpeft.comparison.report import output as report
from fastpeft.comparison.report.document import Table
from fastpeft.comparison.run import Comparison


def plan_of(place: Path, right: dict[str, Any], seeds: int = 1, **changes: dict[str, Any]) -> Plan:
    """A finished comparison: of each variant how many of 200 rows are right, or which; `changes` of its metrics."""
    plan = Plan.make(CompareConfig(output=str(place / "out"), methods=list(right), seeds=seeds), "command")
    plan.save()
    for cell in plan.results:
        finish(cell, right[cell.variant], 200.0, 100.0, **changes.get(cell.method.replace("-", "_"), {}))
    return plan


def first_lines(plan: Plan) -> list[str]:
    compared = results.variants(plan.results)
    return sections.opening(compared, paired_tests.all_pairs(compared))


def tables(plan: Plan) -> list[Table]:
    """The table of results, and that of pairs."""
    return [part for part in sections.report(plan, pictures=False) if isinstance(part, Table)]


def without(*wrong: int, rows: int = 1000) -> list[int]:
    """Answers of which those of some rows are wrong."""
    return [int(row not in wrong) for row in range(rows)]


# -- the first lines ---------------------------------------------------------------------------------------------------

ONE_SEED = (
    "With one seed the test accounts only for the choice of dev rows, not for variation between seeds. Run with "
    "--seeds 3 or more."
)


def test_nothing_is_significant(tmp_path: Path) -> None:
    six = {name: without(index) for index, name in enumerate(("siva", "lora", "head", "bitfit", "full", "lst"))}
    plan = plan_of(tmp_path, six)
    told = (
        "No significant difference among these 6 variants on 1,000 dev rows; siva, lora, head and 3 more share the "
        "highest accuracy, 0.999."
    )
    assert first_lines(plan) == [told, ONE_SEED]
    report.write(plan, whole=True)
    text, page = ((plan.folder / f"report.{end}").read_text() for end in ("md", "html"))
    assert f"\n\n**{told}**\n\n{ONE_SEED}\n\n6 variants, 1 seed each." in text
    assert f'</h1>\n<p class="strong">{told}</p>\n<p>{ONE_SEED}</p>' in page


def test_two_variants_are_named(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, {"siva": without(1), "head": without(2, 3)}, seeds=3)
    assert first_lines(plan) == [
        "No significant difference between siva and head on 1,000 dev rows; siva has the highest accuracy, 0.999, at "
        "200 MB peak memory."
    ]


def test_the_best_is_named_with_those_it_is_significantly_above(tmp_path: Path) -> None:
    """10 rows of one against none of the other are McNemar's 2 / 2^10, times 3 pairs."""
    plan = plan_of(tmp_path, {"head": without(*range(10)), "siva": without(), "lora": without(*range(4))})
    assert first_lines(plan)[0] == (
        "siva has the highest accuracy, 1.000, at 200 MB peak memory; significantly above head; not significantly "
        "above lora (Holm)."
    )
    (_, table) = tables(plan)
    assert table.rows[0] == ["variants", "significant", "difference", "95 % interval", "p", "p by Holm"]
    assert [row[:2] for row in table.rows[1:]] == [
        ["siva above head", "yes"],
        ["lora above head", "no"],
        ["siva above lora", "no"],
    ]
    assert table.rows[1][2:] == ["+0.010", "+0.004 to +0.016", "0.002", "0.006"]
    assert [row[-1] for row in table.rows[2:]] == ["0.062", "0.125"]


@pytest.mark.parametrize(
    ("right", "told"),
    [
        ({"head": 20, "siva": 190, "lora": 150, "full": 140}, "siva has ; significantly above head, lora and full"),
        (
            {"siva": 190, **{f"lora:rank={rank}": 150 for rank in range(1, 5)}, "head": 189},
            "siva has ; significantly above 4 of the other 5; not significantly above head",
        ),
        (
            {"siva": 190, **{f"lora:rank={rank}": 150 for rank in range(1, 5)}},
            "siva has ; significantly above 4 of the other 4",
        ),
        (  # siva is above lora, but not significantly above head, which is wrong on other rows
            {"siva": without(1, rows=20), "head": without(2, 3, rows=20), "lora": [0] * 13 + [1] * 7},
            "siva has ; significantly above lora; not significantly above head",
        ),
        ({"head": 20, "siva": 180, "lora": 180}, "head has"),
    ],
)
def test_names_or_counts(tmp_path: Path, right: dict[str, Any], told: str) -> None:
    line = first_lines(plan_of(tmp_path, right))[0]
    if told == "head has":
        assert (
            line
            == "siva and lora share the highest accuracy, 0.900; 2 of 3 pairs of variants differ significantly (Holm)."
        )
        return
    name, _, rest = told.partition(" has ;")
    assert line.startswith(f"{name} has the highest accuracy, 0.95")
    assert line.endswith(f", at 200 MB peak memory;{rest} (Holm).")


def test_the_highest_may_be_significantly_above_none(tmp_path: Path) -> None:
    """The highest is not tested against those whose predictions were not kept."""
    plan = plan_of(tmp_path, {"siva": 190, "lora": 180, "head": 100})
    (plan.results[0].folder.path / "predictions.json").unlink()
    assert first_lines(plan)[0] == (
        "siva has the highest accuracy, 0.950, at 200 MB peak memory; 1 of 1 pairs of variants differ significantly "
        "(Holm)."
    )


@pytest.mark.parametrize("seeds", [1, 3])
def test_few_rows_are_told(tmp_path: Path, seeds: int) -> None:
    plan = plan_of(tmp_path, {"siva": without(1, rows=30), "head": without(2, rows=30)}, seeds=seeds)
    few = "30 dev rows are few: the test can miss a difference that more rows would show."
    assert first_lines(plan)[1:] == [f"{ONE_SEED} {few}" if seeds == 1 else few]


def test_two_seeds_are_the_limit_and_not_the_rows(tmp_path: Path) -> None:
    """For each seed alone the rows make the difference certain."""
    plan = Plan.make(CompareConfig(output=str(tmp_path / "out"), methods=["siva", "head"], seeds=2), "command")
    plan.save()
    for cell, wrong in zip(sorted(plan.results, key=lambda cell: cell.variant), (111, 111, 60, 90)):
        finish(cell, without(*range(wrong), rows=150), 200.0, 100.0)
    first, *rest = first_lines(plan)
    assert first.startswith("No significant difference between siva and head on 150 dev rows")
    assert rest == [
        "With two seeds the variation between seeds is poorly known: the test can miss even a large difference. Run "
        "with --seeds 3 or more."
    ]


def test_without_scores_of_rows_nothing_is_tested(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, {"siva": 100, "head": 100, "lora": 100})
    for cell in plan.results[1:]:
        (cell.folder.path / "predictions.json").unlink()
    told = (
        "no difference was tested: a paired test needs two finished variants with a score for every dev row, and there "
        "is none for regression."
    )
    assert first_lines(plan) == [f"siva, head and lora share the highest accuracy, 0.500; {told}"]
    assert len(tables(plan)) == 1


def test_variants_that_could_not_be_tested_are_not_counted(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, dict.fromkeys(("siva", "lora", "head", "full"), 150))
    (plan.results[0].folder.path / "predictions.json").unlink()
    told = "No significant difference among those tested of the 4 variants on 200 dev rows; "
    assert first_lines(plan)[0].startswith(told)


def test_another_metric_than_accuracy_is_tested(tmp_path: Path) -> None:
    """F1 of entities, as sums of two numbers a row: the metric that is told is the one that was tested."""
    plan = Plan.make(CompareConfig(output=str(tmp_path / "out"), methods=["siva", "head", "lora"], seeds=1), "command")
    plan.save()
    for cell, above in zip(plan.results, (4, 2, 4)):
        rows = [(above, 4), (above - 1, 4)] * 75 + [(0, 0)] * 50
        f1 = (above - 0.5) / 4
        finish(cell, 100, 200.0, 100.0, problem_type="token_classification", word_f1=0.3, entity_f1=f1)
        scores = {"metric": "entity_f1", "above": [a for a, _ in rows], "below": [b for _, b in rows]}
        (cell.folder.path / "predictions.json").unlink()
        (cell.folder.path / "row_scores.json").write_text(json.dumps(scores))
    told, _ = first_lines(plan)
    assert told == (
        "siva and lora share the highest entity F1, 0.875; 2 of 3 pairs of variants differ significantly (Holm)."
    )
    text = document.markdown("", sections.report(plan, pictures=False))
    assert "Entity F1 of every pair of variants, paired by dev row: a sign test over rows. " in text
    assert "| 0.375 (0.355 to 0.395) | 0.300 |" in text, "the metric that is tested comes first, with its interval"
    (plan.results[1].folder.path / "row_scores.json").write_text(
        json.dumps({"metric": "entity_f1", "above": [1], "below": [1]})
    )
    assert len(paired_tests.all_pairs(results.variants(plan.results))) == 1, "rows of another number are not paired"


def test_a_variant_of_which_a_seed_kept_no_scores_is_not_tested(tmp_path: Path) -> None:
    """Its mean would be of other seeds than its interval."""
    plan = plan_of(tmp_path, {"siva": 190, "head": 150, "lora": 140}, seeds=2)
    (plan.results[0].folder.path / "predictions.json").unlink()
    compared = results.variants(plan.results)
    assert [variant.interval is None for variant in compared] == [True, False, False]
    assert [str(pair) for pair in paired_tests.all_pairs(compared)] == ["head above lora"]


def test_objectives_are_tested_apart(tmp_path: Path) -> None:
    """Of classes and of words each has its own pairs, correction and words; the verdict is of the first."""
    words = ["siva:objective=mlm", "head:objective=mlm"]
    plan = Plan.make(CompareConfig(output=str(tmp_path / "out"), methods=["lora", "full", *words]), "command")
    plan.save()
    for cell, right in zip(plan.results, (190, 150, 0, 0)):
        if cell.variant in words:
            finish(cell, right, 200.0, 100.0, accuracy=None, problem_type="masked_words", masked_accuracy=0.5)
            (cell.folder.path / "predictions.json").unlink()
            scores = {"metric": "masked_accuracy", "above": [1, 0, 2, 1], "below": [2] * 4}
            (cell.folder.path / "row_scores.json").write_text(json.dumps(scores))
        else:
            finish(cell, right, 200.0, 100.0)
    compared = results.variants(plan.results)
    tested = paired_tests.all_pairs(compared)
    assert [(str(pair), pair.metric, pair.p == pair.difference.p) for pair in tested] == [
        ("lora above full", "accuracy", True),
        ("siva:objective=mlm and head:objective=mlm", "masked_accuracy", True),
    ]
    assert first_lines(plan)[0] == (
        "lora has the highest accuracy, 0.950, at 200 MB peak memory; significantly above full (Holm)."
    )
    text = document.markdown("", paired_tests.report(tested))
    assert text.count("## Paired tests") == 1
    assert "Accuracy of every pair of variants, paired by dev row: McNemar's exact test. 'p by Holm'" in text
    assert "Masked-token accuracy of every pair of variants, paired by dev row: a sign test over rows. " in text


def test_variants_that_were_measured_on_other_words_are_not_compared(tmp_path: Path) -> None:
    """A smaller `max_length` or another tokenizer leaves other words to say, and to tag, in the same rows."""
    methods = ["siva", "lora", "siva:max_length=8", "head:objective=mlm", "head:objective=mlm:max_length=8"]
    plan = Plan.make(CompareConfig(output=str(tmp_path / "out"), methods=methods), "command")
    plan.save()
    for cell in plan.results:
        tags, few = "mlm" not in cell.name, "max_length" in cell.name
        metric, problem = ("entity_f1", "token_classification") if tags else ("masked_accuracy", "masked_words")
        below = [2 if few else 4 - 2 * (row % 2) for row in range(100)]
        per_class = {"O": {"f1": 1.0, "recall": 1.0, "support": sum(below)}}
        own = {"problem_type": problem, metric: 0.5, **({"per_class": per_class} if tags else {})}
        finish(cell, 100, 200.0, 100.0, **{"accuracy": None, **own})
        (cell.folder.path / "predictions.json").unlink()
        scores = {"metric": metric, "above": [2] * 100, "below": below}
        (cell.folder.path / "row_scores.json").write_text(json.dumps(scores))
    compared = results.variants(plan.results)
    assert [str(pair) for pair in paired_tests.all_pairs(compared)] == ["siva and lora"]
    assert first_lines(plan)[1] == (
        "Do not compare entity F1 between these, which were measured on different words, as their max_length or their "
        "tokenizer differs: siva and lora; siva:max_length=8. Do not compare masked-token accuracy between these, "
        "which were measured on different words, as their max_length or their tokenizer differs: head:objective=mlm; "
        "head:objective=mlm:max_length=8."
    )


# -- pairs -------------------------------------------------------------------------------------------------------------


def test_pairs_are_of_rows_and_of_seeds(tmp_path: Path) -> None:
    """Of two with the same accuracy the rows that are right may differ; only seeds of both count."""
    config = CompareConfig(output=str(tmp_path / "out"), methods=["siva", "head"], seeds=3)
    plan = Plan.make(config, "command")
    plan.save()
    generator = np.random.default_rng(0)
    for cell in plan.results:
        if (cell.variant, cell.seed) != ("head", 2):
            finish(cell, generator.integers(0, 2, 200).tolist(), 1.0, 1.0)
    (pair,) = paired_tests.all_pairs(results.variants(plan.results))
    assert (pair.seeds, pair.difference.test) == (2, "a t test over seeds and rows")
    first, second = (np.stack([pair_of.row_scores[seed] for seed in (0, 1)]) for pair_of in (pair.first, pair.second))
    assert pair.difference == significance.compare_pair(first, second)
    assert pair.difference.mean >= 0, "the higher one is first"


def test_zero_shot_answers_alike_beside_each_seed(tmp_path: Path) -> None:
    prompts = {"zero-shot:prompt=sst2": 100, "zero-shot:prompt=MR": 110, "siva": 180}
    plan = plan_of(tmp_path, prompts, seeds=2)
    found = {str(pair): pair.seeds for pair in paired_tests.all_pairs(results.variants(plan.results))}
    assert found == {
        "zero-shot:prompt=MR above zero-shot:prompt=sst2": 0,
        "siva above zero-shot:prompt=sst2": 2,
        "siva above zero-shot:prompt=MR": 2,
    }
    assert ONE_SEED not in " ".join(first_lines(plan)), "where nothing trains no seed changes anything"


# -- warnings ----------------------------------------------------------------------------------------------------------

CONSTANT = "It predicts negative for every dev row."
FEW = "200 dev rows are few."


def shown(plan: Plan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    comparison = object.__new__(Comparison)
    comparison.plan = plan
    monkeypatch.setattr(console, "console", Console(highlight=False, markup=False, width=200))
    console.show_report(comparison)
    return capsys.readouterr().out


def test_warnings_stand_beside_their_variant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(
        tmp_path,
        {"siva": 150, "head": 190, "lora": 180},
        siva={"warnings": [FEW]},
        head={"warnings": [FEW, CONSTANT]},
        lora={"warnings": [FEW]},
    )
    report.write(plan, whole=True)
    text, page = ((plan.folder / f"report.{end}").read_text() for end in ("md", "html"))
    assert f"\n## Warnings\n\n- all variants: {FEW}\n- head †: {CONSTANT}\n" in text
    assert "\n| head † | 0.950 (" in text
    assert "\n| siva | 0.750 (" in text, "what all warn of marks none"
    told = "head † has the highest accuracy, 0.950, at 200 MB peak memory; significantly above siva and lora (Holm)."
    assert f"\n**{told}**\n" in text
    assert f"<li>head †: {CONSTANT}</li>" in page
    assert all("†: of this variant alone, or of some, there is a warning." in each for each in (text, page))
    lines = shown(plan, monkeypatch, capsys).splitlines()
    assert lines[0] == told
    assert lines[-4:-1] == ["Warnings (†: not of all variants):", f"all variants: {FEW}", f"head †: {CONSTANT}"]
    assert any(line.startswith("| head † | 0.950 (") for line in lines)


def test_a_warning_of_some_seeds_names_them(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, {"siva": 150, "head": 150}, seeds=3)
    for cell in plan.results:
        warned = [CONSTANT] if cell.variant == "head" and cell.seed != 1 else []
        metrics = {**json.loads(cell.folder.metrics_file.read_text()), "warnings": warned}
        cell.folder.metrics_file.write_text(json.dumps(metrics))
    assert results.warnings(results.variants(plan.results)) == [f"head † (seeds 0 and 2): {CONSTANT}"]


def test_a_mean_of_fewer_seeds_is_told(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, {"siva": 150, "head": 150}, seeds=3)
    plan.results[0].folder.metrics_file.unlink()
    assert [row[-1] for row in tables(plan)[0].rows] == ["seeds", "2 of 3", "3"]


@pytest.mark.parametrize(("kind", "measured"), [("class", {}), ("tag", {"word_f1": 0.0})])
def test_the_most_frequent_class_has_a_row(tmp_path: Path, kind: str, measured: dict[str, float]) -> None:
    always = {"class": "bad", "accuracy": 0.51, **measured}
    constant = {"most_frequent_class": always, "peak_memory_source": "simulated"}
    plan = plan_of(
        tmp_path, {"siva": 150, "head": 150}, seeds=2, head=constant, siva={"peak_memory_source": "simulated"}
    )
    table = tables(plan)[0]
    assert table.rows[0][:5] == ["method", "accuracy", "F1", "samples/s", "simulated step peak, MB"]
    assert table.rows[-1] == [f"baseline: most frequent {kind} (bad)", "0.510", *["-"] * (len(table.rows[0]) - 2)]
    assert [row[0] for row in table.rows].count(f"baseline: most frequent {kind} (bad)") == 1
