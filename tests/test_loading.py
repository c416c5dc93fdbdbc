"""How a run's model is put together, saved and put together again: every method, head and subset."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import reviews, save_tiny_model, write_csv

from fastpeft import TrainConfig, train
from fastpeft.evaluation import evaluate
from fastpeft.loading import load_run
from fastpeft.methods import METHODS
from fastpeft.prompts import HEADS
from fastpeft.task import Task

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = {"prompt": "{text} the film is <mask>", "label_words": "negative=awful,positive=lovely"}
SUBSETS = [name for name in METHODS if name != "mezo"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and data."""
    place = tmp_path_factory.mktemp("place")
    save_tiny_model(place / "model")
    write_csv(place / "reviews.csv", reviews(60))
    return place


@pytest.fixture
def config(tmp_path: Path, place: Path) -> TrainConfig:
    return TrainConfig(
        output=str(tmp_path / "run"),
        method="full",
        model=str(place / "model"),
        data=str(place / "reviews.csv"),
        max_steps=2,
        learning_rate=1e-2,
    )


def logits(model: Any, config: TrainConfig) -> torch.Tensor:
    """Logits of the first rows of the task, `(4, 2)`."""
    task = Task.load(config)
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**_batch(task.dev_rows[:4], task.tokenizer)).logits
    return found


def _batch(rows: list[Any], tokenizer: Any) -> Any:
    from fastpeft import PromptCollator

    batch = PromptCollator(tokenizer)(rows)
    batch.pop("labels")
    return batch


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("over", SUBSETS)
def test_mezo_trains_what_another_method_leaves_to_train(config: TrainConfig, over: str, head: str) -> None:
    settings = {"over": over, **({"layers": 1} if over == "last-n" else {})}
    config = replace(config, method="mezo", **PROMPT, prompt_head=head, settings=settings)
    before = Task.load(config).model
    other = Task.load(replace(config, method=over, settings={k: v for k, v in settings.items() if k != "over"})).model
    trained = {name for name, parameter in before.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in other.named_parameters() if parameter.requires_grad}
    result = train(config)
    after = dict(load_run(result.folder).classifier.model.named_parameters())
    assert after.keys() == dict(before.named_parameters()).keys()
    changed = {
        name
        for name, parameter in before.named_parameters()
        # PEFT keeps the original of a head, unused: what was drawn when it was loaded
        if ".original_module." not in name and not torch.equal(parameter, after[name])
    }
    assert changed <= trained
    assert len(changed) > len(trained) / 2, "biases at attention's keys have no effect"
    assert evaluate(result.folder)["accuracy"] == result.metrics["accuracy"]
