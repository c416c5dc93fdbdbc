"""The example that fine-tunes a causal language model."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_causal_lm_example_learns(tmp_path: Path) -> None:
    file = EXAMPLES / "causal_lm.py"
    spec = importlib.util.spec_from_file_location("causal_lm", file)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    sys.modules["causal_lm"] = example
    spec.loader.exec_module(example)
    settings = {"--rank": 8, "--steps": 30, "--length": 32, "--batch-size": 8, "--learning-rate": 3e-2}
    losses = example.main(
        [
            "--tiny",
            "--text",
            str(file),
            "--output",
            str(tmp_path),
            *(str(part) for pair in settings.items() for part in pair),
        ]
    )
    assert losses["after"] < losses["before"] - 0.5
    assert (tmp_path / "adapter_model.safetensors").is_file()
