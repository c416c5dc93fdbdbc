"""What a Trainer of the tests is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainingArguments


def quiet(folder: Path, **options: Any) -> TrainingArguments:
    """Arguments for a Trainer on the CPU that reports nothing and shows no progress."""
    return TrainingArguments(str(folder), report_to="none", disable_tqdm=True, use_cpu=True, **options)
