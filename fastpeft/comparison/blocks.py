"""What a report is made of, and how it is written: as Markdown, and as a page of HTML that needs no other file."""

from __future__ import annotations

import base64
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
class Items:
    items: Sequence[str]


@dataclass(frozen=True)
class Code:
    lines: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Rows of texts, the header first; `numbers` is how many columns, the last ones, are set as numbers."""

    rows: Sequence[Sequence[str]]
    numbers: int = 0


@dataclass(frozen=True)
class Figure:
    """A picture: the name of its file, what it shows in words, and its PNG."""

    name: str
    alt: str
    png: bytes

    @property
    def data(self) -> str:
        """The picture as an address of its own, for a page without other files."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


Block = Heading | Text | Items | Code | Table | Figure


def markdown(title: str, blocks: Sequence[Block]) -> str:
    """The report in Markdown, with links to the pictures in `FIGURES`."""
    parts = [[f"# {title}"], *(_lines(block) for block in blocks)]
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def _lines(block: Block) -> list[str]:
    match block:
        case Heading(text):
            return [f"## {text}"]
        case Text(text):
            return [text]
        case Items(items):
            return [f"- {item}" for item in items]
        case Code(lines):
            return ["```", *lines, "```"]
        case Table(rows):
            return table_lines(rows)
        case Figure(name, alt):
            return [f"![{alt}]({FIGURES}/{name}.png)"]


def table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown, given its rows, the header first."""
    lines = [f"| {' | '.join(text.replace('|', '&#124;') for text in row)} |" for row in rows]
    return [lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]]


def page(title: str, blocks: Sequence[Block]) -> str:
    """The report as a page of HTML, every text escaped, pictures inside."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_PAGE.read_text(encoding="utf-8"))
    return template.render(title=title, blocks=[(type(block).__name__, block) for block in blocks])
