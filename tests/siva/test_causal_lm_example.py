"""The example that fine-tunes a causal language model."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def load_example() -> Any:
    spec = importlib.util.spec_from_file_location("causal_lm", EXAMPLES / "causal_lm.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    sys.modules["causal_lm"] = example
    spec.loader.exec_module(example)
    return example


@pytest.mark.parametrize("method", ["siva", "lst"])
def test_the_causal_lm_example_learns(tmp_path: Path, method: str) -> None:
    example = load_example()
    settings = {"--rank": 8, "--steps": 30, "--length": 32, "--batch-size": 8, "--learning-rate": 3e-2}
    losses = example.main(
        [
            "--tiny",
            "--method",
            method,
            "--data",
            str(EXAMPLES / "causal_lm.py"),
            "--output",
            str(tmp_path),
            *(str(part) for pair in settings.items() for part in pair),
        ]
    )
    assert losses["after"] < losses["before"] - 0.5
    assert (tmp_path / ("adapter_model.safetensors" if method == "siva" else "model.safetensors")).is_file()


def test_the_causal_lm_example_learns_completions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"{number}: ", "completion": "abcabc"} for number in range(40)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    arguments = ["--tiny", "--data", str(data), "--output", str(tmp_path / "out"), "--learning-rate", "3e-2"]
    losses = load_example().main([*arguments, "--steps", "30"])
    assert losses["after"] < losses["before"] - 0.5
    assert capsys.readouterr().out.splitlines()[-1].startswith("39: ")
