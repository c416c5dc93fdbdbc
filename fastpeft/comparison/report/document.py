"""The parts of a report, and their two forms: Markdown, and a page of HTML that needs no other file."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_PAGE = Path(__file__).with_name("page.html")
FIGURES = "figures"  # the folder beside the report


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
    """Rows of texts, the header first; the columns `numbers` are aligned on the right."""

    rows: Sequence[Sequence[str]]
    numbers: range = range(0)


@dataclass(frozen=True)
class Figure:
    """A picture: the name of its file, a description for readers who cannot see it, its caption and its PNG."""

    name: str
    alt: str
    caption: str
    png: bytes

    @property
    def data(self) -> str:
        """The picture as a data URL."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


# What Markdown takes for markup inside a line: tags and entities, but not the < of "< 0.001"; emphasis and code, but
# not the _ of "label_words"; the middle of a link; a backslash before punctuation.
_MARKUP = re.compile(r"<(?![\d ])|[&>]|[*`]|(?<![^\W_])_|_(?![^\W_])|\](?=\()|\\(?=[!-/:-@\[-`{-~])")

Block = Heading | Text | Strong | Items | Code | Table | Figure


def markdown(title: str, blocks: Sequence[Block]) -> str:
    """The report in Markdown, with links to the pictures in `FIGURES`."""
    parts = [[f"# {_plain(title)}"], *(_lines(block) for block in blocks)]
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


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
        case Figure(name, alt, caption):
            return [f"![{_plain(alt)}]({FIGURES}/{name}.png)", "", _plain(caption)]


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
    """The report as a page of HTML, every text escaped, pictures inside."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_PAGE.read_text(encoding="utf-8"))
    return template.render(title=title, blocks=[(type(block).__name__, block) for block in blocks])
