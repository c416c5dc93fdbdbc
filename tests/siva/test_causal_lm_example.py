"""The example that fine-tunes a causal language model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from script_files import EXAMPLES, load_script

EXAMPLE = EXAMPLES / "causal_lm.py"


@pytest.mark.parametrize("method", ["siva", "lst"])
def test_the_causal_lm_example_learns(tmp_path: Path, method: str) -> None:
    settings = {"--rank": 8, "--steps": 30, "--length": 32, "--batch-size": 8, "--learning-rate": 3e-2}
    losses = load_script(EXAMPLE).main(
        [
            "--tiny",
            "--method",
            method,
            "--data",
            str(EXAMPLE),
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
    losses = load_script(EXAMPLE).main([*arguments, "--steps", "30"])
    assert losses["after"] < losses["before"] - 0.5
    assert capsys.readouterr().out.splitlines()[-1].startswith("39: ")
