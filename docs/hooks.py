"""What mkdocs does beside its own work.

Equations become MathML, measurements are copied into the site, and pages get the options of commands and of runs.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import commands
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

MEASUREMENTS = "bench/data"
ROOT = Path(__file__).parents[1]


def on_config(config: MkDocsConfig) -> None:
    """Add the fence `math`, whose LaTeX browsers then draw themselves: no script, no font from elsewhere."""
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "math", "format": equation})


def equation(source: str, *_: Any, **__: Any) -> str:
    """One equation, or one a line, as MathML."""
    return "".join(f"<p>{convert(line, display='block')}</p>" for line in source.splitlines() if line.strip())


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put tables and plots of bench/data beside the pages, which link to them; no page links to a folder of it."""
    for path in sorted(file for file in (ROOT / MEASUREMENTS).iterdir() if file.is_file()):
        files.append(File.generated(config, f"{MEASUREMENTS}/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in options; and a link to bench/data leaves docs/ in the repository, and does not in the site."""
    for marker, make in commands.PARTS.items():
        if marker in markdown:
            markdown = markdown.replace(marker, make())
    return re.sub(rf"\]\(\.\./((?:\.\./)*{MEASUREMENTS}/)", r"](\1", markdown)
