"""The parts of a report, and their two forms: Markdown, and a page of HTML that needs no other file."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_PAGE = Path(__file__).with_name("page.html")  # beside it page.css and page.js, which each page holds
FIGURES = "figures"  # the folder beside the report


def listed(names: Sequence[str]) -> str:
    """Names as a sentence has them."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Strong:
    """An emphasised paragraph."""

    text: str


@dataclass(frozen=True)
class Items:
    items: Sequence[str]


@dataclass(frozen=True)
class Code:
    lines: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Rows of texts, the header first.

    Attributes:
        rows: the header and the rows.
        numbers: the columns that are aligned on the right.
        caption: what a page calls it.
    """

    rows: Sequence[Sequence[str]]
    numbers: range = range(0)
    caption: str = "Table"


@dataclass(frozen=True)
class Figure:
    """A chart: the name of its file, a description for readers who cannot see it, its caption, and its SVG."""

    name: str
    alt: str
    caption: str
    svg: str

    @property
    def file(self) -> str:
        return f"{self.name}.svg"

    @property
    def address(self) -> str:
        """The chart as an address, so that its style and its texts stay apart from the page's."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg.encode()).decode()}"


Block = Heading | Text | Strong | Items | Code | Table | Figure

# What Markdown takes for markup inside a line: tags and entities, but not the < of "< 0.001"; emphasis and code, but
# not the _ of "label_words"; the middle of a link; a backslash before punctuation.
_MARKUP = re.compile(r"<(?![\d ])|[&>]|[*`]|(?<![^\W_])_|_(?![^\W_])|\](?=\()|\\(?=[!-/:-@\[-`{-~])")


def markdown(title: str, blocks: Sequence[Block]) -> str:
    """The report in Markdown, with links to the pictures in `FIGURES`."""
    return "\n\n".join("\n".join(lines) for lines in ([f"# {_plain(title)}"], *map(_lines, blocks))) + "\n"


def _lines(block: Block) -> list[str]:
    match block:
        case Heading(text):
            return [f"## {_plain(text)}"]
        case Text(text):
            return [_plain(text)]
        case Strong(text):
            return [f"**{_plain(text)}**"]
        case Items(items):
            return [f"- {_plain(item)}" for item in items]
        case Code(lines):
            return ["```", *lines, "```"]
        case Table():
            return table_lines(block)
        case Figure():
            return [f"![{_plain(block.alt)}]({FIGURES}/{block.file})", "", _plain(block.caption)]


def _plain(text: str) -> str:
    """A text as one line of Markdown, with markup escaped, which a variant, a class or an error may hold."""
    line = re.sub(r"\s*[\r\n]\s*", " ", text)
    return _MARKUP.sub(lambda found: html.escape(found[0]) if found[0] in "<>&" else f"\\{found[0]}", line)


def table_lines(table: Table) -> list[str]:
    """The lines of a table in Markdown."""
    lines = [f"| {' | '.join(_plain(text).replace('|', '&#124;') for text in row)} |" for row in table.rows]
    rule = "".join("---:|" if column in table.numbers else "---|" for column in range(len(table.rows[0])))
    return [lines[0], f"|{rule}", *lines[1:]]


def page(title: str, blocks: Sequence[Block]) -> str:
    """The report as a page of HTML that loads nothing: every text escaped; charts, style and script inside.

    Its policy allows the style and the script that are written here, by their hashes, and nothing else.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    style, script = (_PAGE.with_suffix(suffix).read_text(encoding="utf-8") for suffix in (".css", ".js"))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_PAGE.read_text(encoding="utf-8")).render(
        title=title,
        blocks=[(type(block).__name__, block) for block in blocks],
        style=Markup(style),
        script=Markup(script),
        style_hash=_digest(style),
        script_hash=_digest(script),
    )


def _digest(text: str) -> str:
    """The hash of a style or a script, as a policy names it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
