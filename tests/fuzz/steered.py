"""A reader fuzzed by inputs that the code they reach steers: `python -m fuzz.steered TARGET [libFuzzer's options]`.

It sets out from the inputs in `seeds` and ends at the first fault, with its traceback and the input's file.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["fastpeft", "json", "csv"]):
    from fuzz.seeds import SEEDS
    from fuzz.targets import TARGETS


def main() -> None:
    name, *options = sys.argv[1:]
    logging.disable()
    with tempfile.TemporaryDirectory() as corpus:
        for number, content in enumerate(SEEDS[name]):
            (Path(corpus) / f"{number}").write_bytes(content)
        atheris.Setup([sys.argv[0], *options, corpus], TARGETS[name])
        atheris.Fuzz()


if __name__ == "__main__":
    main()
