"""Readers of files and texts take any bytes: they return, or raise `FastpeftError`.

Here every reader gets drawn bytes, inputs with drawn edits, and journals whose header is drawn under a right checksum;
`make fuzz` lets the code that was reached steer what is drawn, for minutes.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fuzz.seeds import HEADER, SEEDS, journal
from fuzz.targets import TARGETS
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

few = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
many = settings(few, max_examples=3000)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.integers(2**63, 2**1100),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def edited(draw: st.DrawFn, name: str) -> bytes:
    """A whole input in which some parts were cut out, put in or repeated."""
    content = draw(st.sampled_from(SEEDS[name]))
    for _ in range(draw(st.integers(0, 4))):
        start, end = sorted(draw(st.tuples(*[st.integers(0, len(content))] * 2)))
        content = content[:start] + draw(st.binary(max_size=6) | st.just(content[start:end] * 2)) + content[end:]
    return content


def try_out(name: str, budget: settings) -> None:
    @budget
    @given(st.binary(max_size=200) | edited(name))
    def take(content: bytes) -> None:
        TARGETS[name](content)

    for content in (*SEEDS[name], b"", b"[" * 100_000, b"\xef\xbb\xbf", b"\xff\xfea\0", b"1" * 5000, b"\0"):
        TARGETS[name](content)
    take()


@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes(name: str) -> None:
    try_out(name, few)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes_for_long(name: str) -> None:
    try_out(name, many)


@few
@given(
    st.dictionaries(st.sampled_from([*HEADER]), VALUES), st.dictionaries(st.sampled_from(["eps", "parameters"]), VALUES)
)
@example({"num_estimates": 10**12}, {})
@example({"groups": [{}]}, {})
def test_any_header_of_a_journal(changes: dict[str, Any], group: dict[str, Any]) -> None:
    header = {**HEADER, "groups": [{**HEADER["groups"][0], **group}], **changes}
    TARGETS["journal"](journal(header))


@few
@given(st.sampled_from(["configuration", "run", "prompt"]), st.data())
def test_any_value_in_a_file(name: str, data: st.DataObject) -> None:
    import json

    values = json.loads(SEEDS[name][0])
    values |= data.draw(st.dictionaries(st.sampled_from([*values]), VALUES))
    TARGETS[name](json.dumps(values).encode())


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="needs atheris")
def test_a_steered_fuzzer_runs() -> None:
    command = [sys.executable, "-m", "fuzz.steered", "label words", "-runs=200"]
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2]), *sys.path]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
