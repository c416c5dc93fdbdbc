"""Makes examples/tutorial.ipynb of docs/tutorial.md: `python docs/tutorial_notebook.py`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
_PART = re.compile(r"^(?P<reason><!-- not run: .* -->\n)?```(?P<language>\w+)\n(?P<code>(?s:.*?))^```\n", re.MULTILINE)


def notebook(page: str) -> dict[str, Any]:
    """A notebook with the text and the blocks of a page; what a block prints is left out, for it is printed anew."""
    cells, end = [], 0
    for found in _PART.finditer(page):
        if found["reason"]:  # it stays a part of the text
            continue
        cells.append(_cell("markdown", page[end : found.start()]))
        end = found.end()
        if found["language"] == "python":
            cells.append(_cell("code", found["code"]))
        elif found["language"] == "sh":
            cells.append(_cell("code", f"%%bash\n{found['code']}"))
    cells.append(_cell("markdown", page[end:]))
    shown = [cell for cell in cells if cell["source"]]
    for number, cell in enumerate(shown):
        cell["id"] = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": shown, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def _cell(kind: str, text: str) -> dict[str, Any]:
    # links of the page lead to other pages, which a notebook by itself does not have
    lines = re.sub(r"\]\((?!http)([^)]+)\)", r"](../docs/\1)", text).strip() if kind == "markdown" else text.strip()
    cell = {"cell_type": kind, "metadata": {}, "source": lines.splitlines(keepends=True)}
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def text() -> str:
    """What the file holds."""
    made = notebook((DOCS / "tutorial.md").read_text(encoding="utf-8"))
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    (DOCS.parent / "examples" / "tutorial.ipynb").write_text(text(), encoding="utf-8")
