"""The page of a comparison: what it holds, that texts of runs stay texts, and how it behaves in a browser."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from compared import ROWS, finish

from fastpeft import CompareConfig
from fastpeft.comparison.plan import Plan
from fastpeft.comparison.report import document, figures, mistakes
from fastpeft.comparison.report import output as report
from fastpeft.comparison.report.document import Code, Figure, Heading, Items, Matrix, Strong, Table, Text
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
        if tag not in ("meta", "link", "wbr"):
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
    assert all(address.startswith(("data:,", "#part")) for address in addresses)
    tags = [tag for tag, _ in outline.found]
    assert [tags.count(tag) for tag in ("img", "script", "style", "h1")] == [0, 1, 1, 1]
    assert not {name for _, given in outline.found for name in given if name == "style" or name.startswith("on")}
    policy = next(given["content"] for _, given in outline.found if "http-equiv" in given)
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    for tag in ("script", "style"):
        assert f"{tag}-src '{document._digest(outline.inside[tag])}'" in policy
    assert outline.inside["script"].count("\n") <= 300
    parts = re.findall(r"<h2 [^>]*>(.*?)</h2>", text)
    assert parts[:4] == ["Warnings", "Training curves", "Confusion matrices", "Rows on which variants differ"]
    charts = {"accuracy-memory.svg", "training-loss.svg", "dev-accuracy.svg"}
    assert {file.name for file in (plan.folder / "figures").iterdir()} == charts
    for chart in charts:
        drawn = ElementTree.parse(plan.folder / "figures" / chart)
        assert drawn.getroot().get("aria-label")
    markdown = (plan.folder / "report.md").read_text()
    assert set(re.findall(r"\]\(figures/([\w-]+\.svg)\)", markdown)) == charts
    assert "Confusion" not in markdown


def test_texts_are_escaped() -> None:
    bad = '<img src=x onerror="alert(1)">&</script>'
    chart = figures.Scatter([figures.Point(0, bad, 1.0, 2.0, None, 1.0, [bad])], bad, bad, bad)
    curves = figures.Curves([figures.Curve(0, bad, [figures.Step(0, 1.0, 0.5, 2.0)], 2)], bad)
    parts = [
        Heading(bad),
        Text(bad),
        Items([bad]),
        Code([bad]),
        Strong(bad),
        Table([[bad, bad], [bad, bad]], caption=bad),
    ]
    parts += [Table([[bad, bad], [bad, bad], [bad, bad]], variants=1), Matrix(0, bad, [bad], [[1]])]
    parts += [Figure("f", bad, bad, chart), Figure("g", bad, bad, curves)]
    outline = Outline(document.page(bad, parts))
    tags = [tag for tag, _ in outline.found]
    assert tags.count("img") == 0
    assert tags.count("script") == 1
    assert sum(value == bad for _, given in outline.found for value in given.values()) == 5, (
        "captions and names of charts"
    )
    assert outline.inside["figcaption"] == bad * 2
    assert "| a&#124;b |" in document.markdown("t", [Table([["a|b"], ["c"]])])
    plain = [part for part in parts if not isinstance(part, Code)]
    assert "<img" not in document.markdown(bad, plain)
    for drawn in (chart, curves):
        ElementTree.fromstring(drawn.svg(bad, file=True))


# -- charts ------------------------------------------------------------------------------------------------------------


def test_marks_differ_in_more_than_colour() -> None:
    shapes = [(figures.colour(index), figures.mark(index)) for index in range(64)]
    assert len(set(shapes)) == 64
    for first, second in combinations(range(8), 2):
        assert shapes[first][0] != shapes[second][0]
        assert shapes[first][1] != shapes[second][1]


def luminance(colour: str) -> float:
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_marks_are_seen_on_both_grounds() -> None:
    for light, dark in figures.COLOURS:
        assert 1.05 / (luminance(light) + 0.05) >= 3
        assert (luminance(dark) + 0.05) / (luminance("#14171a") + 0.05) >= 3


@pytest.mark.parametrize("width", [figures.WIDE, figures.NARROW])
def test_names_stand_beside_their_marks_and_cover_nothing(width: int) -> None:
    points = [figures.Point(n, f"variant {n}", 100.0 + n % 5, 0.8 + n / 500, None, 1.0 + n) for n in range(21)]
    drawn = ElementTree.fromstring(figures.Scatter(points, "MB", "accuracy", "s").svg("a chart", width, file=True))
    space = "{http://www.w3.org/2000/svg}"
    series = drawn.findall(f"{space}g[@data-variant]")
    assert sorted(int(part.get("data-variant", "")) for part in series) == list(range(21))
    names = {part.findtext(f"{space}title"): part.find(f"{space}text") for part in series}
    boxes = []
    for name, text in names.items():
        if text is not None:
            assert text.text == name
            left, bottom = float(text.get("x", "")), float(text.get("y", ""))
            boxes.append((left, bottom - 11, left + 7 * len(name or ""), bottom + 3))
    assert len(boxes) == 21 if width == figures.WIDE else len(boxes) >= 3
    for one, other in combinations(boxes, 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
    assert all(left >= 0 and right <= width for left, _, right, _ in boxes)
    areas = {}
    for part in series:
        mark = part.find(f"{space}path[@class='mark']")
        assert mark is not None
        (radius,) = re.findall(r"scale\(([\d.]+)\)", mark.get("transform", ""))
        areas[int(part.get("data-variant", ""))] = float(radius) ** 2
    assert areas[20] / areas[6] == pytest.approx(3, rel=0.02), "the area is the time"


@pytest.mark.parametrize(
    "values",
    [[231.0, 232.0], [100.0], [1e-5, 3.0], [0.5, 0.5], [0.0, 625.0], [-3.0, 40_000.0], [0.0, 1e30], [1e-9, 3e-9]],
)
def test_axes_have_round_values_where_they_belong(values: list[float]) -> None:
    for log in (True, False) if min(values) > 0 else (False,):
        axis = figures._Axis(values, 50, 450, log=log)
        ticks = axis.ticks(40)
        assert 1 <= len(ticks) <= 11
        assert all(50 <= pixel <= 450 for pixel, _ in ticks)
        for pixel, text in ticks:
            assert axis(float(text.replace(",", ""))) == pytest.approx(pixel, abs=0.5), (
                "what is written is where it stands"
            )
        if not log:
            factor, offset = map(float, axis.inverse.split())
            assert factor * axis(values[0]) + offset == pytest.approx(values[0], rel=1e-6, abs=1e-6 * max(values))


def test_a_curve_has_the_mean_and_the_range_over_seeds() -> None:
    steps = figures.over_seeds([[(1, 1.0), (2, 2.0), (3, float("nan"))], [(1, 3.0), (3, 4.0)]])
    assert steps == [(1, 2.0, 1.0, 3.0), (2, 2.0, 2.0, 2.0), (3, 4.0, 4.0, 4.0)]
    many = figures.over_seeds([[(step, float(step)) for step in range(1, 241)]])
    assert (len(many), many[0], many[-1]) == (120, (2, 1.5, 1.0, 2.0), (240, 239.5, 239.0, 240.0))
    assert figures.over_seeds([]) == []


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_confusion_matrices_are_summed_over_seeds(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, ["siva", "lora"], seeds=2)
    *_, first, second = mistakes.matrices(variants(plan.results))
    assert isinstance(first, Matrix)
    assert isinstance(second, Matrix)
    kept = [cell.metrics() or {} for cell in plan.results]
    assert first.counts[0][0] == kept[0]["confusion_matrix"][0][0] + kept[1]["confusion_matrix"][0][0]
    assert [sum(map(sum, matrix.counts)) for matrix in (first, second)] == [2 * ROWS] * 2
    assert (first.variant, second.index, first.classes) == ("siva", 1, ["bad", BAD])


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
    *_, table = mistakes.matrices(variants(plan.results))
    assert isinstance(table, Table)
    assert table.rows == [["true label", "prediction", "siva", "lora"], ["c3", "c7", "5", "0"], ["c1", "c0", "1", "1"]]


def test_rows_on_which_variants_differ(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fastpeft")
    plan = plan_of(tmp_path, ["siva", "lora", "head"], seeds=2)
    caplog.clear()
    *_, text, table = mistakes.disagreements(variants(plan.results))
    assert isinstance(text, Text)
    assert isinstance(table, Table)
    assert table.rows[0] == ["row", "text", "label", "siva", "lora", "head"]
    assert caplog.messages == [], "the runs have told what they load"
    right = [list((cell.predictions() or {})["predictions"]) for cell in plan.results]
    shares = [tuple(sum(right[2 * v + s][row] == row % 2 for s in (0, 1)) for v in range(3)) for row in range(ROWS)]
    differ = [row for row in range(ROWS) if len(set(shares[row])) > 1]
    told = f"On {len(differ)} of {ROWS} dev rows some variants predict the true label and others do not. "
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
        *_, text, table = mistakes.disagreements(variants(plan.results))
        assert isinstance(text, Text)
        assert isinstance(table, Table)
        assert "The texts could not be loaded again, or have changed, so only row numbers are shown." in text.text
        assert table.rows[0] == ["row", "label", "siva", "lora", "head"]


def test_without_answers_no_rows_differ(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, ["siva", "lora"])
    (plan.results[0].folder.path / "predictions.json").unlink()
    assert list(mistakes.disagreements(variants(plan.results))) == []
    shutil.copy(*(cell.folder.path / "predictions.json" for cell in reversed(plan.results)))
    assert list(mistakes.disagreements(variants(plan.results))) == [], "they answer alike"


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
def faults() -> list[str]:
    """What a page complains of, and addresses that it loads."""
    return []


@pytest.fixture
def open_page(browser: Any, address: str, faults: list[str]) -> Iterator[Any]:
    """A function that opens the page; when the test ends, nothing went wrong there."""
    contexts, known = [], ["data:,"]

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
    assert [fault for fault in faults if fault not in known and not fault.startswith("blob:file:")] == []


@pytest.mark.long
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 820, 1280])
def test_everyone_can_read_it(open_page: Any, width: int, theme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page = open_page(width, color_scheme=theme)
    found = axe.Axe().run(page).response["violations"]
    assert [(fault["id"], fault["nodes"][0]["html"]) for fault in found] == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "no horizontal scroll"
    small = "[...document.querySelectorAll('.chart')].filter((chart) => chart.getBoundingClientRect().width)"
    sizes = page.evaluate(f"{small}.map((chart) => 13 * chart.getScreenCTM().a)")
    assert len(sizes) == 3
    assert min(sizes) >= 9, "letters of charts stay legible"
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert back == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 26)"}[theme]
    assert page.title() == "Comparison of SiVA, LoRA, full fine-tuning and 2 more on data"


@pytest.mark.long
def test_rows_are_sorted_hidden_and_taken_along(open_page: Any) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    rows = page.locator("#results tbody tr")
    memory = page.get_by_role("columnheader", name="CUDA allocator peak, MB")
    for order, first in (("descending", VARIANT), ("ascending", "siva")):
        memory.get_by_role("button").click()
        assert memory.get_attribute("aria-sort") == order
        assert rows.first.locator(".name").inner_text() == first
    page.get_by_role("columnheader", name="method").get_by_role("button").click()
    assert [rows.nth(place).locator(".name").inner_text() for place in (0, 1)] == ["bitfit", "full"]
    assert memory.get_attribute("aria-sort") is None
    memory.get_by_role("button").click()
    page.get_by_role("button", name="Hide lora").click()
    assert page.locator("[data-variant='1']:visible").count() == 0, "its marks, lines and matrix are hidden too"
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Hide siva", "the next row's"
    assert page.get_by_role("status").inner_text() == "lora is hidden."
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Download CSV").click()
    with Path(waiting.value.path()).open(newline="") as file:
        saved = list(csv.DictReader(file))
    assert waiting.value.suggested_filename == "comparison.csv"
    names = [row["method"] for row in saved]
    assert names == [*reversed([name for name in NAMES if name != "lora"]), f"baseline: most frequent class ({BAD})"]
    assert saved[-2]["CUDA allocator peak, MB"] == "102 ± 2"
    page.get_by_role("button", name="Copy as Markdown").click()
    page.get_by_text("Copied the rows that are shown.").wait_for()
    lines = page.evaluate("navigator.clipboard.readText()").splitlines()
    assert lines[0].startswith("| method | accuracy | F1 |")
    assert lines[1].startswith("|---|---:|---:|")
    assert len(lines) == 2 + 20 + 1
    assert r"\<img src=x" in lines[2]
    page.get_by_role("button", name="Show all (1 hidden)").click()
    assert page.locator("[data-variant='1']:visible").count() > 3


@pytest.mark.long
def test_values_are_shown_under_the_pointer_and_at_the_focus(open_page: Any) -> None:
    page = open_page(reduced_motion="reduce")
    scatter, loss = page.locator(".chart:visible").nth(0), page.locator(".chart:visible").nth(1)
    tip = page.locator("#tip")
    assert not tip.is_visible()
    scatter.locator("[data-variant='0']").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Shift+Tab")
    assert tip.inner_text().splitlines()[0] == "siva"
    assert "accuracy: 0." in tip.inner_text()
    assert "lit" in (page.locator("#results tbody tr").first.get_attribute("class") or "")
    page.keyboard.press("Escape")
    assert not tip.is_visible()
    loss.scroll_into_view_if_needed()
    box = loss.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 3, box["y"] + box["height"] * 0.85)
    name, value = tip.inner_text().splitlines()
    assert name in NAMES
    step, shown = re.fullmatch(r"step (\d+): ([\d.]+)", value).groups()  # type: ignore[union-attr]
    assert float(shown) == pytest.approx(1 / int(step), abs=0.001), "the loss of the stand-ins"
    page.mouse.move(0, 0)
    assert not tip.is_visible()


@pytest.mark.long
def test_the_theme_is_chosen_and_kept(open_page: Any) -> None:
    page = open_page(color_scheme="light")
    mark = "getComputedStyle(document.querySelector('.chart .c0')).color"
    light = page.evaluate(mark)
    page.get_by_role("button", name="Dark theme").click()
    assert page.evaluate(mark) != light, "charts follow"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
    page.reload()
    assert page.get_by_role("button", name="Light theme").is_visible()


@pytest.mark.long
def test_without_a_script_all_is_there(open_page: Any) -> None:
    page = open_page(java_script_enabled=False)
    assert page.locator("p.verdict").inner_text().endswith(".")
    assert page.locator(".chart:visible").count() == 3
    assert page.locator("#results tbody tr:visible").count() == 21
    assert page.locator("button").count() == 0


@pytest.mark.long
def test_a_page_over_plain_http_is_copied_too(open_page: Any, address: str) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    page.get_by_role("button", name="Copy as Markdown").click()
    page.get_by_text("Copied the rows that are shown.").wait_for()
    other = page.context.new_page()
    other.goto(address)
    assert other.evaluate("navigator.clipboard.readText()").startswith("| method | accuracy |")


@pytest.mark.long
def test_a_page_without_a_result(open_page: Any, tmp_path: Path) -> None:
    plan = Plan.make(CompareConfig(output=str(tmp_path / "out"), methods=["siva", "lora"]), "command")
    plan.save()
    plan.results[0].log.write_text(f"Error: {BAD}\n")
    report.write(plan, whole=True)
    page = open_page(place=(plan.folder / "report.html").as_uri())
    assert page.get_by_text(f"siva-seed0: {BAD}").is_visible()
    page.get_by_role("button", name="Hide siva").click()
    assert page.get_by_role("button", name="Show all (1 hidden)").is_visible()
    assert page.locator(".chart").count() == 0
