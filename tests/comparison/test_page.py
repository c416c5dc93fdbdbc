"""The page of a comparison: what it holds, that texts of runs stay texts, and how it behaves in a browser."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from compared import ROWS, finish

from fastpeft import CompareConfig
from fastpeft.comparison.plan import Plan
from fastpeft.comparison.report import document, errors, figures
from fastpeft.comparison.report import output as report
from fastpeft.comparison.report.document import Code, Figure, Heading, Items, Strong, Table, Text
from fastpeft.comparison.report.results import variants
from fastpeft.support import files
from fastpeft.training.task import data_for

BAD = '</script><img src=x onerror="document.title=1">&'
VARIANT = f"head:prompt={{text}} {BAD} <mask>:label_words=bad+good"
SCORES = {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": ROWS // 2}  # of a class
NAMES = ["siva", "lora", "full", "bitfit", *(f"siva:rank={rank}" for rank in range(1, 17)), VARIANT]


def plan_of(place: Path, names: list[str], seeds: int = 1, **common: Any) -> Plan:
    """A finished comparison on `place/data`, whose dev rows can be loaded; each variant answers other rows wrongly."""
    data = place / "data"
    data.mkdir()
    for part in ("train", "dev"):
        with (data / f"{part}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows([f"{part} {row} {BAD}", ("bad", "good")[row % 2]] for row in range(ROWS))
    config = CompareConfig(output=str(place / "out"), methods=names, seeds=seeds, common={"data": str(data), **common})
    plan = Plan.make(config, f"fastpeft compare {BAD}")
    plan.save()
    for number, cell in enumerate(plan.results):
        wrong = range(number % 7, 10 + number % 50 + 2 * (cell.seed or 0))
        right = [int(row not in wrong) for row in range(ROWS)]
        hits = [sum(right[label::2]) for label in (0, 1)]
        matrix = [[hits[0], ROWS // 2 - hits[0]], [ROWS // 2 - hits[1], hits[1]]]
        finish(
            cell,
            right,
            100.0 + 3 * number,
            50.0 + 5 * number,
            confusion_matrix=matrix,
            per_class=dict.fromkeys(("bad", BAD), SCORES),
            warnings=[BAD],
            most_frequent_class={"class": BAD, "accuracy": 0.5},
        )
    return plan


# -- what it holds -----------------------------------------------------------------------------------------------------


class Outline(HTMLParser):
    """The elements of a page, and whether they close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, str] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.inside[self.open[-1]] = self.inside.get(self.open[-1], "") + data


def test_the_page_is_whole_and_needs_nothing_else(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, NAMES[:3], seeds=2)
    report.write(plan, whole=True)
    text = (plan.folder / "report.html").read_text()
    outline = Outline(text)
    assert outline.open == []
    addresses = [value or "" for _, given in outline.found for name, value in given.items() if name in ("src", "href")]
    assert all(address.startswith("data:") for address in addresses)
    tags = [tag for tag, _ in outline.found]
    assert [tags.count(tag) for tag in ("img", "script", "style", "h1")] == [3, 1, 1, 1]
    assert not {name for _, given in outline.found for name in given if name == "style" or name.startswith("on")}
    policy = next(given["content"] for _, given in outline.found if "http-equiv" in given)
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    for tag in ("script", "style"):
        assert f"{tag}-src '{document._digest(outline.inside[tag])}'" in policy
    parts = re.findall(r"<h2>(.*?)</h2>", text)
    assert parts[:3] == ["Warnings", "Paired tests", "Training curves"]
    assert parts[-3:] == ["Where and how", "Confusion matrices", "Rows on which variants differ"]
    charts = {"accuracy-memory.svg", "training-loss.svg", "dev-accuracy.svg"}
    assert {file.name for file in (plan.folder / "figures").iterdir()} == charts
    for chart in charts:
        ElementTree.parse(plan.folder / "figures" / chart)
    markdown = (plan.folder / "report.md").read_text()
    assert set(re.findall(r"\]\(figures/([\w-]+\.svg)\)", markdown)) == charts
    assert "Confusion" not in markdown, "which quotes no dev text"


def test_texts_are_escaped() -> None:
    bad = '<img src=x onerror="alert(1)">&</script>'
    chart = figures.scatter([figures.Point(0, bad, 1.0, 2.0, None, 1.0)], bad, bad)
    curves = figures.curves([figures.Curve(0, bad, [figures.Step(0, 1.0, 0.5, 2.0)])], bad)
    plain = [Heading(bad), Text(bad), Items([bad]), Strong(bad), Table([[bad, bad], [bad, bad]], caption=bad)]
    parts = [*plain, Code([bad]), Figure("f", bad, bad, chart), Figure("g", bad, bad, curves)]
    outline = Outline(document.page(bad, parts))
    found = [given for tag, given in outline.found if tag == "img"]
    assert [given["alt"] for given in found] == [bad, bad]
    assert all((given["src"] or "").startswith("data:image/svg+xml;base64,") for given in found)
    assert [tag for tag, _ in outline.found].count("script") == 1
    assert outline.inside["figcaption"] == bad * 2
    assert "| a&#124;b |" in document.markdown("t", [Table([["a|b"], ["c"]])])
    assert "<img" not in document.markdown(bad, plain)
    for drawn in (chart, curves):
        root = ElementTree.fromstring(drawn)
        assert {element.tag.rpartition("}")[2] for element in root.iter()}.isdisjoint({"img", "script"})


# -- charts ------------------------------------------------------------------------------------------------------------


def test_marks_differ_in_more_than_colour_and_are_seen() -> None:
    styles = [figures.style(index) for index in range(64)]
    assert len({tuple(each.values()) for each in styles}) == 64
    for name in ("color", "marker"):
        assert len({each[name] for each in styles[:8]}) == 8
    assert all(1.05 / (luminance(colour) + 0.05) >= 3 for colour in figures.COLOURS)


def luminance(colour: str) -> float:
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("values", [[231.0, 232.0], [100.0], [1e-5, 3.0], [0.5, 0.5], [0.0, 625.0]])
def test_every_variant_is_in_a_chart(values: list[float]) -> None:
    names = ["$x$ of formula", *(f"siva:rank={n}" for n in range(1, 21))]
    points = [figures.Point(n, name, values[n % len(values)], 0.8, (0.7, 0.9), 1.0 + n) for n, name in enumerate(names)]
    steps = [figures.Step(step, value, value, value) for step, value in enumerate(values)]
    drawn = figures.scatter(points, "MB", "accuracy")
    assert drawn == figures.scatter(points, "MB", "accuracy"), "the same bytes"
    for chart in (drawn, figures.curves([figures.Curve(n, name, steps) for n, name in enumerate(names)], "loss")):
        assert all(f">{name}</text>" in chart for name in names)


def test_a_curve_has_the_mean_and_the_range_over_seeds() -> None:
    steps = figures.over_seeds([[(1, 1.0), (2, 2.0), (3, float("nan"))], [(1, 3.0), (3, 4.0)]])
    assert steps == [(1, 2.0, 1.0, 3.0), (2, 2.0, 2.0, 2.0), (3, 4.0, 4.0, 4.0)]
    many = figures.over_seeds([[(step, float(step)) for step in range(1, 241)]])
    assert (len(many), many[0], many[-1]) == (120, (2, 1.5, 1.0, 2.0), (240, 239.5, 239.0, 240.0))
    assert figures.over_seeds([]) == []


# -- errors ------------------------------------------------------------------------------------------------------------


def test_confusion_matrices_are_summed_over_seeds(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, ["siva", "lora"], seeds=2)
    *_, first, second = errors.matrices(variants(plan.results))
    assert isinstance(first, Table)
    assert isinstance(second, Table)
    kept = [cell.metrics() or {} for cell in plan.results]
    assert first.rows[0] == ["", "bad", BAD]
    assert first.rows[1][:2] == ["bad", str(sum(kept[seed]["confusion_matrix"][0][0] for seed in (0, 1)))]
    assert [sum(int(count) for row in t.rows[1:] for count in row[1:]) for t in (first, second)] == [2 * ROWS] * 2
    assert (first.caption, second.caption) == ("siva", "lora")


def test_of_many_classes_the_most_frequent_mistakes_are_told(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, ["siva", "lora"])
    for cell, count in zip(plan.results, (5, 0)):
        matrix = [[10 if row == column else 0 for column in range(12)] for row in range(12)]
        matrix[3][7], matrix[1][0] = count, 1
        metrics = {
            **(cell.metrics() or {}),
            "confusion_matrix": matrix,
            "per_class": {f"c{n}": SCORES for n in range(12)},
        }
        cell.folder.metrics_file.write_text(json.dumps(metrics))
    *_, table = errors.matrices(variants(plan.results))
    assert isinstance(table, Table)
    assert table.rows == [["true label", "prediction", "siva", "lora"], ["c3", "c7", "5", "0"], ["c1", "c0", "1", "1"]]


def test_rows_on_which_variants_differ(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fastpeft")
    plan = plan_of(tmp_path, ["siva", "lora", "head"], seeds=2)
    caplog.clear()
    *_, text, table = errors.disagreements(variants(plan.results))
    assert isinstance(text, Text)
    assert isinstance(table, Table)
    assert table.rows[0] == ["row", "text", "label", "siva", "lora", "head"]
    assert caplog.messages == [], "the runs have told what they load"
    right = [list((cell.predictions() or {})["predictions"]) for cell in plan.results]
    shares = [tuple(sum(right[2 * v + s][row] == row % 2 for s in (0, 1)) for v in range(3)) for row in range(ROWS)]
    differ = [row for row in range(ROWS) if len(set(shares[row])) > 1]
    told = f"On {len(differ)} of {ROWS} dev rows some variants predict the true label and others do not; "
    assert text.text.startswith(told)
    assert len(table.rows) == 1 + min(20, len(differ))
    # the largest differences first, and of these the rows that about half of the variants answer rightly
    order = [(min(each) - max(each), abs(sum(each) - 3)) for each in shares]
    assert [order[int(number) - 1] for number, *_ in table.rows[1:]] == sorted(order[row] for row in differ)[:20]
    for number, shown, label, *marks in table.rows[1:]:
        row = int(number) - 1
        assert shown == f"dev {row} {BAD}"
        assert label == ("bad", BAD)[row % 2]
        assert marks == [("✗", "1/2", "✓")[share] for share in shares[row]]
    dev, folder = tmp_path / "data" / "dev.csv", plan.results[0].folder
    values = {**files.read_json(folder.config_file), "rows": data_for(plan.results[0].config).fingerprint}
    files.write_json(folder.config_file, values)
    for changed in (dev.read_text().replace("dev ", "another "), "text,label\nother,bad\n"):
        dev.write_text(changed)
        *_, text, table = errors.disagreements(variants(plan.results))
        assert isinstance(text, Text)
        assert isinstance(table, Table)
        assert "The texts could not be loaded again, or have changed, so only row numbers are shown." in text.text
        assert table.rows[0] == ["row", "label", "siva", "lora", "head"]


def test_without_answers_no_rows_differ(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, ["siva", "lora"])
    (plan.results[0].folder.path / "predictions.json").unlink()
    assert list(errors.disagreements(variants(plan.results))) == []
    shutil.copy(*(cell.folder.path / "predictions.json" for cell in reversed(plan.results)))
    assert list(errors.disagreements(variants(plan.results))) == [], "they answer alike"


# -- in a browser ------------------------------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium")
    with playwright.sync_playwright() as started:
        shown = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield shown
        shown.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page of 21 variants with two seeds each, one of them not finished."""
    plan = plan_of(tmp_path_factory.mktemp("page"), NAMES, seeds=2)
    report.write(plan, whole=True)
    return (plan.folder / "report.html").as_uri()


@pytest.fixture
def open_page(browser: Any, address: str) -> Iterator[Any]:
    """A function that opens the page; when the test ends, nothing went wrong there, and nothing else was loaded."""
    contexts, faults, known = [], [], []

    def opened(width: int = 1280, place: str = address, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: faults.append(request.url))
        known.append(place)
        page.goto(place)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [fault for fault in faults if fault not in known and not fault.startswith("data:")] == []


@pytest.mark.long
@pytest.mark.parametrize(("width", "theme"), [(390, "dark"), (1280, "light")])
def test_everyone_can_read_it(open_page: Any, width: int, theme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page = open_page(width, color_scheme=theme)
    found = axe.Axe().run(page).response["violations"]
    assert [(fault["id"], fault["nodes"][0]["html"]) for fault in found] == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "no horizontal scroll"
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert back == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 26)"}[theme]
    assert page.title() == "Comparison of SiVA, LoRA, full fine-tuning and 2 more on data"
    assert page.evaluate("[...document.images].map((image) => image.naturalWidth > 100)") == [True] * 3


@pytest.mark.long
def test_rows_are_sorted(open_page: Any) -> None:
    page = open_page()
    heads = page.locator("tbody").first.locator("tr > :first-child")
    memory = page.get_by_role("columnheader", name="CUDA allocator peak, MB")
    for order, first in (("descending", f"{VARIANT}"), ("ascending", "siva")):
        memory.get_by_role("button").click()
        assert memory.get_attribute("aria-sort") == order
        assert heads.first.inner_text() == first
    page.get_by_role("columnheader", name="method").first.get_by_role("button").click()
    assert "baseline" in heads.first.inner_text()
    assert memory.get_attribute("aria-sort") is None


@pytest.mark.long
def test_without_a_script_all_is_there(open_page: Any) -> None:
    page = open_page(java_script_enabled=False)
    assert page.locator("h1 + p.strong").inner_text().endswith(".")
    assert page.locator("figure img:visible").count() == 3
    assert page.locator("tbody").first.locator("tr:visible").count() == 22
    assert page.locator("button").count() == 0


@pytest.mark.long
def test_a_page_without_a_result(open_page: Any, tmp_path: Path) -> None:
    plan = Plan.make(CompareConfig(output=str(tmp_path / "out"), methods=["siva", "lora"]), "command")
    plan.save()
    plan.results[0].log.write_text(f"Error: {BAD}\n")
    report.write(plan, whole=True)
    page = open_page(place=(plan.folder / "report.html").as_uri())
    assert page.get_by_text(f"siva-seed0: {BAD}").is_visible()
    assert page.locator("img").count() == 0
