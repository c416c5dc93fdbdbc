"""What is fuzzed: every reader of bytes that others may have written.

Each takes any bytes, and must return or raise `FastpeftError`, at once and in little memory; anything else is a fault.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fastpeft import FastpeftError
from fastpeft.data.examples import load_data
from fastpeft.data.tables import read_apart
from fastpeft.mezo.journal import Journal
from fastpeft.prompts.named import parse_prompt
from fastpeft.prompts.template import Prompt
from fastpeft.support.fingerprints import fingerprints_agree
from fastpeft.support.safe_paths import check_named_files
from fastpeft.training.config import TrainConfig, parse_value
from fastpeft.training.lineage import check_start
from fastpeft.training.run_folder import RunFolder


def _file(name: str, read: Callable[[Path], object]) -> Callable[[bytes], None]:
    """A target that reads a file of that name."""

    def target(content: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder, suppress(FastpeftError):
            path = Path(folder) / name
            path.write_bytes(content)
            read(path)

    return target


def _text(read: Callable[[str], object]) -> Callable[[bytes], None]:
    """A target that reads a text, as of an argument, whose bytes may be no UTF-8."""

    def target(content: bytes) -> None:
        with suppress(FastpeftError):
            read(content.decode("utf-8", "surrogateescape"))

    return target


def _run(path: Path) -> None:
    """A folder whose `run.json` and `metrics.json` are both what `path` holds."""
    path.with_name("run.json").write_bytes(path.read_bytes())
    folder = RunFolder(path.parent)
    folder.metrics()
    check_start(folder)


def _journal(path: Path) -> None:
    journal = Journal.open(path)
    list(journal.records())
    journal.rewind(journal.begins_at)


def _fingerprints(text: str) -> None:
    known = "float32 2 0123456789abcdef AAAAAAAAAAA="
    assert fingerprints_agree(text, known) is fingerprints_agree(known, text)


def _label_words(text: str) -> None:
    parse_prompt("{text} It was <mask>.", text)


TARGETS: dict[str, Callable[[bytes], None]] = {
    **{f"table.{kind}": _file(f"rows.{kind}", lambda path: load_data(str(path))) for kind in ("csv", "tsv", "jsonl")},
    "lines": _file("texts.txt", lambda path: read_apart(str(path))),
    "configuration": _file("run.json", TrainConfig.from_file),
    "run": _file("metrics.json", _run),
    "prompt": _file("prompt.json", lambda path: Prompt.load(path.parent)),
    "journal": _file("mezo.journal", _journal),
    "index": _file("model.safetensors.index.json", lambda path: check_named_files(path.parent)),
    "value": _text(parse_value),
    "template": _text(parse_prompt),
    "label words": _text(_label_words),
    "fingerprint": _text(_fingerprints),
}
