"""What the report says of made-up results, and the page of HTML, in a browser too."""

from __future__ import annotations

import html
import re
import shutil
from pathlib import Path

import pytest
from compared import finish
from markdown_it import MarkdownIt

from fastpeft import CompareConfig
from fastpeft.comparison.plan import Plan
from fastpeft.comparison.report import document
from fastpeft.comparison.report import output as report
from fastpeft.comparison.report.document import Heading, Items, Strong, Table, Text

RIGHT = {"full": 160, "lora": 150, "siva": 190, "k-lst": 150}
MEMORY = {"full": 400.0, "lora": 231.0, "siva": 232.0, "k-lst": 130.0}


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """A finished `figure5`."""
    config = CompareConfig(output=str(tmp_path / "out"), suite="figure5")
    made = Plan.make(config, "fastpeft compare --suite figure5 --output <b>out</b>")
    made.save()
    for cell in made.results:
        finish(cell, RIGHT[cell.method], MEMORY[cell.method], 100.0)
    return made


def written(plan: Plan, *, whole: bool) -> str:
    """The report, once it is written, in Markdown."""
    report.write(plan, whole=whole)
    return (plan.folder / "report.md").read_text()


def test_the_first_lines_say_what_was_compared(plan: Plan, tmp_path: Path) -> None:
    text = written(plan, whole=True)
    assert text.startswith(
        "# Figure 5: training curves with one set of hyper-parameters, on demo\n\n"
        "**siva:rank=4:targets=query+key has the highest accuracy, 0.950, at 232 MB peak memory; significantly above "
        "full, lora:rank=4:targets=query+key and k-lst:window=9:layers_per_block=1 (Holm).**\n\n"
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
        assert "| siva | 0.003 | 0.900 | taken |" in text
        assert "**These did best at the lowest or the highest rate that was tried" in text
        assert ": siva.**" in text
        assert text.count("| taken |") == 2


def test_results_stand_beside_the_papers(plan: Plan) -> None:
    text = written(plan, whole=False)
    assert "| method | accuracy | F1 | samples/s | CUDA allocator peak, MB |" in text
    assert "\n|---|---:|---:|---:|---:|---:|---:|---:|\n" in text
    assert (
        "| siva:rank=4:targets=query+key | 0.950 (0.910 to 0.973) | 0.500 | 100.0 | 232 | 12 | 0.001 | 96.56 |" in text
    )
    assert "RoBERTa-large, SST-2, batch 16" in text
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
    assert "| method | bad | good |\n" in few
    assert "| siva | 0.062 (1.000) | 0.188 (0.875) |\n" in few
    many = write([f"class {number}" for number in range(7)])
    assert "Of 7 classes, the 5 of the lowest F1 of each variant." in many
    assert "| siva | class 0 0.062 (1.000) | class 1 0.188 (0.875) |" in many
    assert "class 5" not in many


@pytest.mark.parametrize("known", [True, False])
def test_without_predictions_no_accuracy_is_judged(plan: Plan, known: bool) -> None:
    for cell in plan.results:
        (cell.folder.path / "predictions.json").unlink()
        if not known:
            (cell.folder.path / "curves.json").unlink()
    text = written(plan, whole=True)
    assert "## Paired tests" not in text
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
