"""What the report says of made-up results, and the page of HTML, in a browser too."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path

import pytest
from compared import finish
from markdown_it import MarkdownIt

from fastpeft import CompareConfig
from fastpeft.comparison import suites
from fastpeft.comparison.plan import Plan
from fastpeft.comparison.report import document, paper, sections
from fastpeft.comparison.report import output as report
from fastpeft.comparison.report.document import Heading, Items, Strong, Table, Text
from fastpeft.comparison.report.results import variants

RIGHT = {"full": 160, "lora": 150, "siva": 190, "9-lst": 150}
FIGURE5 = suites.get_suite("figure5").common
MEMORY = {"full": 400.0, "lora": 231.0, "siva": 232.0, "9-lst": 130.0}


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """A finished `figure5`."""
    config = CompareConfig(output=str(tmp_path / "out"), suite="figure5")
    made = Plan.make(config, "fastpeft compare --suite figure5 --output <b>out</b>")
    made.save()
    for cell in made.results:
        finish(cell, RIGHT[cell.row or ""], MEMORY[cell.row or ""], 100.0)
    return made


def written(plan: Plan, *, whole: bool) -> str:
    """The report, once it is written, in Markdown."""
    report.write(plan, whole=whole)
    return (plan.folder / "report.md").read_text()


def test_the_papers_orderings_are_judged(plan: Plan) -> None:
    text = written(plan, whole=True)
    orders = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| accuracy: ")]
    assert {row[0]: row[1] for row in orders} == {
        "accuracy: SiVA above full fine-tuning": "seen, for this seed alone",
        "accuracy: SiVA above LoRA": "seen, for this seed alone",
        "accuracy: full fine-tuning above LoRA": "seen, for this seed alone",
    }, "10 rows of one against none of the other are McNemar's 2 / 2^10, times 1 of Holm's"
    assert orders[2][2].startswith("+0.050 (")
    assert orders[2][3:] == ["0.002", "0.002"]
    assert orders[0][3:] == ["<0.001", "<0.001"]
    assert "**Accuracies of one seed: a verdict holds for this seed alone." in text
    assert '<p class="strong">Accuracies of one seed' in (plan.folder / "report.html").read_text()
    assert "| memory: LoRA below SiVA | undecided | 231 and 232 (-0.4 %) | - | - |" in text, "1 MB is no order"
    assert "| memory: SiVA below full fine-tuning | seen | 232 and 400 (-42.0 %) | - | - |" in text
    assert "| samples/s: SiVA above LoRA | undecided | 100 and 100 (+0.0 %) | - | - |" in text
    assert "\naccuracy: 3 seen, 0 reversed, 0 undecided; memory: 1 seen, " in text
    assert text.count("; reversed if the opposite ordering is significant. ") == 1


def test_the_first_lines_say_what_was_compared(plan: Plan, tmp_path: Path) -> None:
    text = written(plan, whole=True)
    assert text.startswith(
        "# Figure 5: training curves with one set of hyper-parameters, on demo\n\n"
        "**SiVA has the highest accuracy, 0.950, at 232 MB peak memory; significantly above full fine-tuning, LoRA and "
        "9-LST (Holm).**\n\n"
        "With one seed the test accounts only for the choice of dev rows, not for variation between seeds. Run with "
        "--seeds 3 or more.\n\n"
        "4 variants, 1 seed each. Model: demo. Data: reviews.csv, 1,000 training rows, 200 dev rows.\n"
    )
    methods = ["siva", "lora", "siva:rank=2"]
    own = CompareConfig(output=str(tmp_path / "own"), methods=methods, seeds=2, common={"data": "some.csv"})
    made = Plan.make(own, "command")
    made.save()
    text = written(made, whole=False)
    assert text.startswith(
        "# Comparison of SiVA and LoRA on some.csv\n\n**No difference was tested: a paired test needs two finished "
        "variants with a score for every dev row, and there is none for regression.**\n\n3 variants, 2 seeds each. "
        "Model: demo. Data: some.csv.\n"
    )


def test_a_second_comparison_leaves_rows_in_their_suite(plan: Plan) -> None:
    """What the suite has as a row stays one where it is named by itself too."""
    again = Plan.make(
        CompareConfig(output=str(plan.folder), methods=["siva:rank=4:targets=query+key"], common=FIGURE5), "command"
    )
    assert [cell.row for cell in again.results] == ["full", "lora", "siva", "9-lst"]
    again.save()
    assert "| SiVA | 96.56 | 95.00 |" in written(again, whole=False)


def test_rows_of_two_prompts_are_told_apart(tmp_path: Path) -> None:
    """Two comparisons of one folder, each with the paper's rows by a prompt of its own."""
    for prompts in ([], ["MR"]):
        suite = CompareConfig(output=str(tmp_path / "out"), suite="table1", prompts=prompts)
        plan = Plan.make(suite, "command")
        plan.save()
        for cell in plan.wanted:
            if not cell.folder.finished:
                finish(cell, 180 if prompts else 150, 1.0, 1.0)
    parts = sections.report(plan, pictures=False)
    table, beside, orders = [part for part in parts if isinstance(part, Table)][:3]
    prompted = ["LST + prompt", "9-LST + prompt", "last 3 layers + prompt"]
    names = {f"{name} ({prompt})" for name in prompted for prompt in ("sst2", "MR")}
    for shown in (table, beside):
        assert {row[0] for row in shown.rows if "prompt" in row[0]} == names
        assert "LST" in {row[0] for row in shown.rows}, "of which there is one"
    told = {row[0]: row[1] for row in orders.rows}
    assert told["accuracy: LST + prompt (sst2) above LST"] == "undecided"
    assert told["accuracy: LST + prompt (MR) above LST"] == "seen, for this seed alone"
    curves = [part.alt for part in sections.report(plan, pictures=True) if isinstance(part, document.Figure)]
    assert "Dev accuracy over the steps: 14 curves." in curves


def test_orderings_of_two_prompts_are_of_the_same(tmp_path: Path) -> None:
    for prompt in ("sst2", "MR:label_words=bad+good"):
        plan = Plan.make(CompareConfig(output=str(tmp_path / "out"), suite="table2", prompts=[prompt]), "command")
        plan.save()
        for cell in plan.wanted:
            if not cell.folder.finished:
                finish(cell, 150, 1.0, 1.0)
    shown = "".join(map(str, paper.orderings(variants(plan.results))))
    assert "LST + MeZO (sst2) above MeZO (sst2)" in shown
    assert "LST + MeZO (MR:label_words=bad+good) above MeZO (MR:label_words=bad+good)" in shown
    assert "LST + MeZO (sst2) above MeZO (MR" not in shown


def test_a_rate_at_the_edge_of_the_search_is_told(tmp_path: Path) -> None:
    full = CompareConfig(output=str(tmp_path / "out"), methods=["siva", "lora"], protocol="full", seeds=1)
    plan = Plan.make(full, "command")
    plan.save()
    for cell in plan.searches:  # siva's highest rate is best, and lora's middle one
        tried = sorted(other.values["learning_rate"] for other in plan.searches if other.variant == cell.variant)
        best = tried[2 if cell.variant == "siva" else 1]
        rate = cell.values["learning_rate"]
        finish(cell, 180 if rate == best else 100, 1.0, 1.0, learning_rate=rate)
    for cell in plan.results:
        settled = plan.fill_in(cell)
        finish(settled, 190, 1.0, 1.0, learning_rate=settled.values["learning_rate"])
    later = Plan.make(CompareConfig(output=str(tmp_path / "out"), methods=["head"]), "another command")
    for known in (plan, later):  # which reads of the first what was known before rates were chosen
        report.write(known, whole=False)
        text = (plan.folder / "report.md").read_text()
        assert "| siva | 0.003 | 0.900 | taken, the highest tried |" in text
        assert "**1 of 2 did best at the lowest or the highest rate that was tried" in text
        assert ": siva.**" in text
        assert text.count("| taken |") == 1


@pytest.mark.parametrize("right", [(100, 10, 101), (100, 101, 10)], ids=["highest", "lowest"])
def test_a_best_rate_at_the_edge_is_told_where_the_recipe_s_is_taken(tmp_path: Path, right: tuple[int, ...]) -> None:
    """One row of 200 more than the recipe's has is no significant difference."""
    plan = Plan.make(CompareConfig(output=str(tmp_path / "out"), methods=["siva"], protocol="full", seeds=1), "command")
    plan.save()
    for cell, rows in zip(plan.searches, right, strict=True):
        finish(cell, rows, 1.0, 1.0, learning_rate=cell.values["learning_rate"])
    for cell in plan.results:
        settled = plan.fill_in(cell)
        finish(settled, 190, 1.0, 1.0, learning_rate=settled.values["learning_rate"])
    text = written(plan, whole=False)
    assert "| siva | 0.001 | 0.500 | taken |" in text
    assert "**1 of 1 did best at the lowest or the highest rate that was tried" in text


def test_an_ordering_of_searched_rates_says_which_they_were(tmp_path: Path) -> None:
    """A method and its rate are one there: neither alone is what differs."""
    full = CompareConfig(output=str(tmp_path / "out"), suite="table1", prompts=["none"], protocol="full", seeds=1)
    plan = Plan.make(full, "command")
    plan.save()
    for cell in plan.results:
        finish(cell, 150, 1.0, 1.0, learning_rate=0.003 if cell.row == "siva" else 0.001)
    text = written(plan, whole=False)
    assert "| accuracy: SiVA above LoRA, at rates 0.003 and 0.001 | undecided |" in text
    assert "| accuracy: full fine-tuning above LoRA | undecided |" in text, "at the same rate"
    assert "| memory: LoRA below SiVA | undecided |" in text, "which no rate changes"
    assert text.count("\nAt rates: the two variants have different learning rates, ") == 1


def test_rates_that_were_not_searched_are_not_told_again(plan: Plan) -> None:
    file = plan.results[0].folder.metrics_file
    file.write_text(json.dumps({**json.loads(file.read_text()), "learning_rate": 0.003}))
    assert "t rates" not in written(plan, whole=False)


def test_without_an_allocator_the_peak_is_the_process(plan: Plan) -> None:
    for cell in plan.results:
        file = cell.folder.path / "metrics.json"
        metrics = {**json.loads(file.read_text()), "peak_memory_source": "simulated", "peak_rss_mb": 1507.0}
        file.write_text(json.dumps(metrics))
    text = written(plan, whole=False)
    assert "| variant | estimated, MB | resident peak of the process, MB |\n|---|---:|---:|\n" in text
    assert "| SiVA | 255 | 1,507 |\n" in text


def test_the_baseline_has_a_cell_in_every_column(plan: Plan) -> None:
    """In that of variants as written too, which a suite's table has."""
    file = plan.results[0].folder.metrics_file
    always = {"most_frequent_class": {"class": "bad", "accuracy": 0.5}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **always}))
    table = next(part for part in sections.report(plan, pictures=False) if isinstance(part, Table))
    assert table.rows[-1][0] == "baseline: most frequent class (bad)"
    assert {len(row) for row in table.rows} == {len(table.rows[0])}


def test_results_stand_beside_the_papers(plan: Plan) -> None:
    text = written(plan, whole=False)
    assert "| SiVA | 96.56 | 95.00 | 96.63 | 50.00 | 4,529 | 232 | 73.3 | 100.0 |" in text
    assert "| method | accuracy | F1 | samples/s | CUDA allocator peak, MB |" in text
    assert "\n|---|---:|---:|---:|---:|---:|---:|---|\n" in text
    row = "| SiVA | 0.950 (0.910 to 0.973) | 0.500 | 100.0 | 232 | 12 | 0.001 | siva:rank=4:targets=query+key |"
    assert row in text
    assert "RoBERTa-large, SST-2, batch 16" in text
    assert "+10.0% on average, at most +10.0%" in text
    assert "| SiVA | 255 | 232 | +10.0% |" in text
    assert "![" not in text, "pictures come with the last cell"


def test_classes_have_their_scores(tmp_path: Path) -> None:
    made = Plan.make(CompareConfig(output=str(tmp_path / "out"), methods=["lora", "siva"], seeds=2), "fastpeft compare")

    def write(names: list[str]) -> str:
        for number, cell in enumerate(made.results):
            shutil.rmtree(cell.folder.path, ignore_errors=True)
            scores = {
                name: {"precision": 0.5, "recall": 1 - place / 8, "f1": (place + number % 2) / 8, "support": 7}
                for place, name in enumerate(names)
            }
            finish(cell, 150, 1.0, 1.0, per_class=scores)
        return written(made, whole=False)

    few = write(["bad", "good"])
    assert "## Scores by class" in few
    assert "| method | bad (7) | good (7) |\n" in few
    assert "| siva | 0.062 (1.000) | 0.188 (0.875) |\n" in few
    many = write([f"class {number}" for number in range(7)])
    assert "Of 7 classes, the 5 of the lowest F1 of each variant." in many
    assert "| siva | class 0 0.062 (1.000) | class 1 0.188 (0.875) |" in many
    assert "class 5" not in many


def test_loras_lag_is_told_in_steps(plan: Plan) -> None:
    """By a loss, which falls, as by an accuracy that rises as much."""
    for cell in plan.results:
        file = cell.folder.path / "curves.json"
        curves = json.loads(file.read_text())
        curves["dev loss"] = [(step, 1 - value) for step, value in curves["dev accuracy"]]
        file.write_text(json.dumps(curves))
    (table,) = [
        part
        for part in sections.report(plan, pictures=False)
        if isinstance(part, Table) and part.rows[0][0] == "LoRA behind"
    ]
    assert table.rows[0] == ["LoRA behind", "by dev accuracy, steps", "by dev loss, steps"]
    lags = {name: steps for name, *steps in table.rows[1:]}
    assert lags["9-LST"] == ["+21", "+21"], "40 steps at the end, and in the middle of 20 levels half of them"
    assert set(lags) == {"full fine-tuning", "SiVA", "9-LST"}


def test_loras_lag_is_told_behind_every_variant_that_was_added(plan: Plan) -> None:
    own = CompareConfig(output=str(plan.folder), methods=["head", "bitfit", "lora:rank=2"], common=FIGURE5)
    added = Plan.make(own, "command")
    for cell in added.wanted:
        finish(cell, 160, 100.0, 100.0)
    (table,) = [part for part in paper.lags(variants(added.results)) if isinstance(part, Table)]
    assert [row[0] for row in table.rows[1:]] == ["full fine-tuning", "SiVA", "9-LST", "head", "bitfit", "lora:rank=2"]


def test_one_seed_more_makes_other_tests(tmp_path: Path) -> None:
    config = CompareConfig(output=str(tmp_path / "out"), suite="figure5", seeds=2)
    plan = Plan.make(config, "command")
    plan.save()
    for cell in plan.results:
        finish(cell, RIGHT[cell.row or ""] - 2 * (cell.seed or 0), MEMORY[cell.row or ""], 100.0 + (cell.seed or 0))
    text = written(plan, whole=False)
    assert "| SiVA | 0.945 (" in text
    assert "2 seeds each" in text
    assert re.search(r"\| accuracy: SiVA above LoRA \| seen \| \+0\.200 \(\+0\.\d+ to \+0\.\d+\) \| ", text)
    assert "one seed:" not in text
    assert "seed alone" not in text


@pytest.mark.parametrize("known", [True, False])
def test_without_predictions_no_accuracy_is_judged(plan: Plan, known: bool) -> None:
    for cell in plan.results:
        (cell.folder.path / "predictions.json").unlink()
        if not known:
            (cell.folder.path / "curves.json").unlink()
    text = written(plan, whole=True)
    assert "| accuracy: " not in text.partition("## Orderings of the paper")[2]
    assert "| 0.950 | 0.500 |" in text
    assert ("## Training curves" in text) == known


@pytest.mark.parametrize(
    "text",
    [
        "head:prompt={text} It was <mask>.:label_words=bad+good",
        "<img src=x onerror=alert(1)> &lt; & <!-- --> </td>",
        "**bold** *slanted* _slanted_ `code` a*b*c __init__",
        "[here](javascript:alert) ![x](http://example.org/x.png)",
        r"C:\data \<b> \*a* \\*a* a\|b \[here](x)",
        "a | b",
    ],
)
def test_markdown_shows_texts_letter_by_letter(text: str) -> None:
    parts = [Heading(text), Text(text), Strong(text), Items([text]), Table([[text], [text]])]
    rendered = MarkdownIt("commonmark").enable("table").render(document.markdown(text, parts))
    shown = re.sub(r"</?(h1|h2|p|ul|li|strong|table|thead|tbody|tr|th|td)>", "", rendered)
    assert [html.unescape(line) for line in shown.splitlines() if line] == [text] * 7


@pytest.mark.parametrize(
    "text", ["<0.001", "p < 0.001", "label_words=bad+good", "0.950 (0.910 to 0.973)", "5 of 8 [1], (2^20)"]
)
def test_markdown_leaves_what_is_no_markup(text: str) -> None:
    assert document.markdown("t", [Text(text)]) == f"# t\n\n{text}\n"


def test_markdown_has_a_text_in_one_line() -> None:
    table = document.table_lines(Table([["a\r\n# b\r| c"], ["d\n\n- e"]]))
    assert table == ["| a # b &#124; c |", "|---|", "| d - e |"]
