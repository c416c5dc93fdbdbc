"""Which rows are evaluated together: so many, and of long ones fewer."""

from __future__ import annotations

import logging
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from samples import reviews, write_csv

from fastpeft import TrainConfig, train
from fastpeft.data import batches
from fastpeft.data.batches import by_length, compute_by_length, eval_limits
from fastpeft.data.problems import CLASSIFICATION, NEXT_WORDS
from fastpeft.errors import NotEnoughMemoryError
from fastpeft.training import prediction
from fastpeft.training.evaluation import evaluate
from fastpeft.training.trainer import RunTrainer


def rows(*lengths: int) -> list[dict[str, Any]]:
    return [{"input_ids": [0] * length} for length in lengths]


def test_batches_are_of_rows_and_of_tokens() -> None:
    lengths = random.Random(0).choices((0, 3, 20, 128, 129, 512, 9000), k=900)
    limits = eval_limits(CLASSIFICATION, 2)
    found = list(by_length(rows(*lengths), *limits))
    assert sorted(place for batch in found for place in batch) == list(range(900))
    sizes: dict[int, int] = {}
    for batch in found:
        longest = max(lengths[place] for place in batch)
        sizes[longest] = max(sizes.get(longest, 0), len(batch))
        assert len(batch) == 1 or len(batch) * longest <= 64 * 128
    assert sizes == {0: 64, 3: 64, 20: 64, 128: 64, 129: 63, 512: 16, 9000: 1}
    assert [len(batch) for batch in by_length(rows(*[512] * 5), *eval_limits(NEXT_WORDS, 2))] == [2, 2, 1]
    assert list(by_length([], *limits)) == []


@pytest.mark.parametrize("most", [60, 12, 9])
def test_where_memory_is_not_enough_batches_are_halved(most: int, caplog: pytest.LogCaptureFixture) -> None:
    computed: list[list[int]] = []
    given = rows(*[4] * 9, *[6] * 3, 12)

    def compute(chosen: list[int]) -> None:
        if len(chosen) * max(len(given[place]["input_ids"]) for place in chosen) > most:
            raise MemoryError("no room")
        computed.append(chosen)

    caplog.set_level(logging.WARNING, logger="fastpeft")
    if most == 9:
        with pytest.raises(NotEnoughMemoryError, match=r"for one row of 12 tokens, computed alone \(no room\)\. Give"):
            compute_by_length(compute, given, 8)
    else:
        compute_by_length(compute, given, 8)
    assert sorted(place for chosen in computed for place in chosen) == list(range(13 if most > 9 else 12))
    told = {60: [], 12: [(8, 4, 4), (4, 4, 2)], 9: [(8, 4, 4), (4, 4, 2), (2, 6, 1)]}[most]
    assert [record.getMessage() for record in caplog.records] == [
        f"memory is not enough for {count} rows of up to {length} tokens (no room); going on with {half} at once"
        for count, length, half in told
    ]


def test_several_processes_share_batches_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which accelerate divides; of others it would leave rows out."""
    monkeypatch.setattr("fastpeft.training.trainer.evaluated_tokens", lambda task: 64 * 128)
    trainer: Any = SimpleNamespace(args=SimpleNamespace(eval_batch_size=66), task=None)
    trainer.ranks = SimpleNamespace(size=3)
    for longest, size in (128, 66), (512, 48), (9000, 3):
        assert RunTrainer._eval_batches(trainer, rows(3, longest)) == {"batch_size": size}


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of each batch that is evaluated."""
    found: list[tuple[int, int]] = []
    step, collator = RunTrainer.prediction_step, prediction.collator

    def prediction_step(self: Any, model: Any, inputs: Any, *others: Any, **options: Any) -> Any:
        found.append(tuple(inputs["input_ids"].shape))
        return step(self, model, inputs, *others, **options)

    def recorded(*given: Any) -> Any:
        def collate(some: Any) -> Any:
            batch = collator(*given)(some)
            found.append(tuple(batch["input_ids"].shape))
            return batch

        return collate

    monkeypatch.setattr(RunTrainer, "prediction_step", prediction_step)
    monkeypatch.setattr(prediction, "collator", recorded)
    return found


def test_long_rows_take_no_more_memory_than_short_ones(
    config: TrainConfig, tmp_path: Path, shapes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    long = [(" ".join([text] * (1 + number % 3)), label) for number, (text, label) in enumerate(reviews(120))]
    config = replace(config, data=str(write_csv(tmp_path / "long.csv", long)), max_steps=1)
    monkeypatch.setattr(batches, "EVALUATED", (64, 60))
    result = train(config)
    apart = evaluate(result.folder)
    assert max(count for count, _ in shapes) > 2
    assert all(count * length <= 60 or count == 1 for count, length in shapes)
    monkeypatch.undo()
    together = evaluate(result.folder)
    for name in ("accuracy", "loss"):
        assert apart[name] == pytest.approx(together[name], abs=1e-5)
        assert result.metrics[name] == pytest.approx(together[name], abs=1e-5)


def test_a_size_that_is_set_is_that_of_every_batch(
    config: TrainConfig, shapes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "EVALUATED", (64, 8))
    rows = train(replace(config, max_steps=1, settings={"per_device_eval_batch_size": 4})).metrics["dev_rows"]
    assert {count for count, _ in shapes} == {4, rows % 4 or 4}
