"""What the pages of docs/ show can be done, what they count was measured, and they build without a warning."""

from __future__ import annotations

import argparse
import contextlib
import doctest
import io
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from script_files import load_script

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if page.name != "report.md")  # that one `compare` wrote
TUTORIAL = DOCS / "tutorial.md"
NOTEBOOK = ROOT / "examples" / "tutorial.ipynb"
RUN = {"python", "sh"}
BROWSER = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
OUTPUT = "text"  # what the block before it prints, where ... stands for anything
SHOWN = {OUTPUT, "math"}
NEEDS = {
    "how-to/integrations.md": ("trl", "sentence_transformers", "lightning"),  # of the extra `integrations`
    "how-to/from-unsloth.md": ("trl",),
}
# the rows that the tutorial writes, which a reader of the other pages has
REVIEWS = "text,label\n" + "".join(
    f'"A warm and clever film, number {number}.",good\nScene {number} drags on and on.,bad\n' for number in range(60)
)
WRITTEN = r"""(?:--output |output="|fastpeft export (?:--\w+ \w+ )?\S+ )([\w./-]+)"""
FENCE = re.compile(r"^(?P<reason><!-- not run: \S.* -->\n)?```(?P<language>.*)\n(?P<code>(?s:.*?))^```$", re.MULTILINE)


@pytest.fixture(autouse=True)
def curves() -> None:
    """Drawn, as a page shows them."""


class Block(NamedTuple):
    language: str
    code: str
    place: str
    runs: bool


def name(page: Path) -> str:
    return page.relative_to(DOCS if page.is_relative_to(DOCS) else ROOT).as_posix()


def blocks(page: Path) -> Iterator[Block]:
    """The code of a page, from top to bottom."""
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        line = text.count("\n", 0, found.start("code")) + 1
        runs = found["language"] in RUN and found["reason"] is None
        yield Block(found["language"], found["code"], f"{name(page)}:{line}", runs)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_nothing_escapes_the_tests(page: Path) -> None:
    """Every fence is one that these tests know: code under another name, or inside a list, would not run."""
    found = list(blocks(page))
    assert {block.language for block in found} <= RUN | SHOWN
    assert page.read_text(encoding="utf-8").count("```") == 2 * len(found)
    assert "~~~" not in page.read_text(encoding="utf-8")


def running() -> Iterator[Any]:
    """The pages that have blocks to run; of all but the tutorial a sample is drawn."""
    for page in PAGES:
        if any(block.runs for block in blocks(page)):
            yield pytest.param(page, id=name(page), marks=() if page == TUTORIAL else pytest.mark.docs)


@pytest.mark.long
@pytest.mark.parametrize("page", [*running()])
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From top to bottom in one folder that has reviews.csv, as a reader's at the root of a clone, in one program."""
    for package in NEEDS.get(name(page), ()):
        pytest.importorskip(package, reason="the extra `integrations` is not installed")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "reviews.csv").write_text(REVIEWS, encoding="utf-8")
    commands = tmp_path / "bin"
    commands.mkdir()
    for command, arguments in (("fastpeft", "-m fastpeft"), ("python", "")):
        (commands / command).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        (commands / command).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    program: dict[str, Any] = {"__name__": "__main__"}
    printed: str | None = None
    for block in blocks(page):
        if block.language == OUTPUT and printed is not None:
            assert doctest.OutputChecker().check_output(block.code, printed, doctest.ELLIPSIS), (block.place, printed)
        elif block.language in RUN and not block.runs:
            printed = None
        elif block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as stdout:
                exec(compile(block.code, block.place, "exec"), program)
            printed = stdout.getvalue()
        elif block.language == "sh":
            shell = ["bash", "-euo", "pipefail", "-c", block.code]
            done = subprocess.run(shell, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{block.place}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
            printed = done.stdout


def test_no_two_pages_write_into_one_folder() -> None:
    """A folder that is not empty is refused, and a reader of two pages stays in one folder, where reviews.csv is."""
    writers: dict[str, set[str]] = {}
    for page in PAGES:
        if page.parent.name not in ("reference", "results"):  # whose lines stand each by itself
            for block in blocks(page):
                for target in re.findall(WRITTEN, block.code):
                    writers.setdefault(target, set()).add(name(page))
    assert {"runs/reviews", "model", "runs/python"} <= set(writers)
    assert not {target: pages for target, pages in writers.items() if len(pages) > 1}


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=name)
def test_tables_are_the_measurements(page: Path) -> None:
    """Where this fails a CSV has changed: `python docs/tables.py` writes the tables anew; then read the page again."""
    text = page.read_text(encoding="utf-8")
    assert load_script(DOCS / "tables.py").fill(text) == text


class Links(HTMLParser):
    """What a page of the site loads, and the images that do not say what they show."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.silent: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("script", "img", "iframe") and given.get("src"):
            self.loaded.append(str(given["src"]))
        if tag == "link" and given.get("rel") in ("stylesheet", "preconnect", "icon"):
            self.loaded.append(str(given["href"]))
        if tag == "img" and not given.get("alt"):
            self.silent.append(str(given.get("src")))


def test_the_table_of_files_has_every_one_and_each_once() -> None:
    """A measurement that the table lacks has no command that a reader could repeat it by."""
    page = (DOCS / "results" / "performance.md").read_text(encoding="utf-8")
    listed = re.findall(r"\(\.\./\.\./bench/data/([\w/]+\.csv)\)", page.partition("\n## Every file\n")[2])
    assert sorted(listed) == sorted(file.name for file in (ROOT / "bench" / "data").glob("*.csv"))


class ParsedError(Exception):
    """The arguments of a command were taken."""


def bench_commands() -> set[str]:
    """Those that pages name, each on one line; `...` stands for arguments that a reader has to choose."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = re.findall(r"`(python\s+-m\s+bench\.[^`]+)`|^(python -m bench\..+)$", text, re.MULTILINE)
    return {" ".join("".join(each).split()) for each in named}


@pytest.mark.parametrize("command", sorted(bench_commands()))
def test_a_bench_takes_the_arguments_of_a_page(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `...` they are all that it needs."""
    module, *arguments = shlex.split(command)[2:]
    file = ROOT / f"{module.replace('.', '/')}.py"
    text = file.read_text(encoding="utf-8")
    if "..." in arguments:
        return
    if "parse_args" not in text and "BENCH.main" not in text:
        assert not arguments
        return
    parse = argparse.ArgumentParser.parse_args

    def parsed(self: argparse.ArgumentParser, *given: Any) -> None:
        parse(self, *given)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    monkeypatch.setattr(sys, "argv", [str(file), *arguments])
    with pytest.raises(ParsedError):
        runpy.run_path(str(file), run_name="__main__")


def test_what_is_in_the_tests_folder_is_run_with_its_path() -> None:
    text = " ".join(" ".join(page.read_text(encoding="utf-8") for page in PAGES).split())
    named = re.findall(r"(\S+) python -m reliability", text)
    assert named
    assert {each.lstrip("`") for each in named} == {"PYTHONPATH=tests"}


@pytest.mark.long
@pytest.mark.docs
def test_the_site_builds_and_needs_no_network(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    site = tmp_path / "site"
    for page in PAGES:
        links = Links()
        links.feed((site / page.relative_to(DOCS)).with_suffix(".html").read_text(encoding="utf-8"))
        assert not [link for link in links.loaded if "//" in link], page
        assert not links.silent, page
    assert _within_two_clicks(site) >= {page.relative_to(DOCS).with_suffix(".html").as_posix() for page in PAGES}
    _search_finds(site, "residual_dtype", "SiVA")


def _search_finds(site: Path, words: str, page: str) -> None:
    """In a browser, with the site opened as files."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as library:
        browser = library.chromium.launch(executable_path=chromium, args=BROWSER)
        try:
            tab = browser.new_page()
            tab.goto((site / "index.html").as_uri())
            tab.fill("input.md-search__input", words)
            tab.wait_for_selector(f".md-search-result__item :text('{page}')")
        finally:
            browser.close()


def _within_two_clicks(site: Path) -> set[str]:
    """Pages that the first one links to, or that one of these does."""
    found = {"index.html"}
    for _ in range(2):
        for page in list(found):
            links = re.findall(r'href="([^"#:]+\.html)', (site / page).read_text(encoding="utf-8"))
            found |= {os.path.normpath(Path(page).parent / link) for link in links}
    return found


def test_the_notebook_is_the_tutorial() -> None:
    text = load_script(DOCS / "tutorial_notebook.py").text()
    assert NOTEBOOK.read_text(encoding="utf-8") == text, "python docs/tutorial_notebook.py writes it anew"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient", reason="the extra `docs` is not installed")
    pytest.importorskip("ipykernel", reason="the extra `docs` is not installed")
    with socket.socket() as free:  # the page itself may be served at the same moment
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    notebook = nbformat_of(NOTEBOOK.read_text(encoding="utf-8").replace("8123", str(port)))
    nbclient.NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "predicted.csv").is_file()


def nbformat_of(text: str) -> Any:
    import nbformat

    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_the_walk_passes_files_that_are_there_and_none_twice() -> None:
    text = (DOCS / "contributing.md").read_text(encoding="utf-8")
    walk = text.partition("\n## From the command to the kernel\n")[2].partition("\n## ")[0]
    files = re.findall(r"^\| \d+ \| `([\w/.]+)` \|", walk, re.MULTILINE)
    assert len(files) > 30
    assert len(set(files)) == len(files)
    assert not [file for file in files if not (ROOT / file).exists() and not (ROOT / "fastpeft" / file).exists()]
