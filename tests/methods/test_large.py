"""A model of RoBERTa-large's shape with random weights goes through one step of every method, as the report's would."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from samples import reviews, save_tiny_model, write_csv

from fastpeft import TrainConfig, train
from fastpeft.methods.registry import METHODS

pytestmark = pytest.mark.slow

# but for the vocabulary, which is that of the tiny tokenizer
SHAPE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("large")
    save_tiny_model(folder / "model", **SHAPE)
    write_csv(folder / "reviews.csv", reviews(20))
    yield folder
    shutil.rmtree(folder)  # gigabytes


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_one_step(method: str, large: Path, tmp_path: Path) -> None:
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    prompted = {"prompt": "{text} is <mask>", "label_words": "awful,lovely"} if method == "mezo" else {}
    config = TrainConfig(
        output=str(tmp_path / "run"),
        method=method,
        model=str(large / "model"),
        data=str(large / "reviews.csv"),
        max_steps=1,
        batch_size=4,
        **prompted,
    )
    try:
        metrics = train(config).metrics
        assert metrics["parameters"] > 300e6
        assert math.isfinite(metrics["loss"])
    finally:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
