"""Joined rows: each text is in one of them, and neither sees the others nor learns otherwise than by itself."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from backbones import TINY
from samples import chats, completions, save_tiny_decoder, write_jsonl

from fastpeft import FastpeftError, TrainConfig, train
from fastpeft.data.packed_rows import PackedCollator, pack, prepare_for_joined_rows, texts_of
from fastpeft.training.estimates import plan
from fastpeft.training.run_folder import RunFolder


def _rows(lengths: list[int]) -> list[dict[str, list[int]]]:
    """Rows of different tokens, of which the first has no label."""
    generator = random.Random(0)
    rows = [[generator.randrange(4, 50) for _ in range(length)] for length in lengths]
    return [{"input_ids": row, "attention_mask": [1] * len(row), "labels": [-100, *row[1:]]} for row in rows]


def test_every_text_is_whole_in_one_row() -> None:
    rows = _rows(random.Random(1).choices(range(1, 21), k=200))
    joined = pack(rows, 20)
    found = []
    for row in joined:
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["position_ids"]) <= 20
        starts = [place for place, position in enumerate(row["position_ids"]) if position == 0]
        for start, end in zip(starts, [*starts[1:], None]):
            assert row["position_ids"][start:end] == [*range(len(row["input_ids"][start:end]))]
            found.append((row["input_ids"][start:end], row["labels"][start:end]))
        assert texts_of(row) == len(starts)
    assert sorted(found) == sorted((row["input_ids"], row["labels"]) for row in rows)
    tokens = sum(len(row["input_ids"]) for row in rows)
    assert len(joined) < 1.02 * tokens / 20 + 1, "little is left free"
    assert [*pack(rows, 20)] == [*joined]


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Qwen2", "GPTNeoX", "Gemma2"])
def test_a_joined_batch_learns_as_its_texts_do(kind: str, tmp_path: Path) -> None:
    """The loss over all of a batch's words, and its gradients, are those of the texts in rows of their own."""
    model = _model(kind)
    tokenizer = transformers.AutoTokenizer.from_pretrained(save_tiny_decoder(tmp_path))
    rows = _rows([3, 9, 5, 12, 1, 8])
    prepare_for_joined_rows(model, rows, kind)
    collate = PackedCollator(tokenizer, pad_to_multiple_of=8)
    joined, alone = collate(pack(rows, 13)), collate(rows)
    assert joined["input_ids"].shape == (3, 16)
    assert texts_of(joined) == texts_of(alone) == 6
    found = []
    for batch in (joined, alone):
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["Bloom", "Mamba", "FalconH1"])
def test_a_model_that_does_not_keep_texts_apart_is_refused(kind: str) -> None:
    with pytest.raises(FastpeftError, match=f"packing is on, but (in )?the model '{kind}'"):
        prepare_for_joined_rows(_model(kind), _rows([9, 9]), kind)


def test_each_module_is_left_in_its_mode() -> None:
    model = _model("Llama").train()
    model.model.embed_tokens.eval()
    modes = [module.training for module in model.modules()]
    prepare_for_joined_rows(model, _rows([9, 9]), "Llama")
    assert [module.training for module in model.modules()] == modes


def _model(kind: str) -> Any:
    torch.manual_seed(0)
    more = {"Gemma2": {"head_dim": 8, "num_key_value_heads": 2}, "Qwen2": {"num_key_value_heads": 2}}.get(kind, {})
    config = getattr(transformers, f"{kind}Config")(**TINY, **more)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("method", ["siva", "mezo"])
def test_a_run_joins_its_texts(tmp_path: Path, method: str) -> None:
    config = _config(tmp_path, method, completions(60))
    steps = plan(config).steps
    metrics = train(config).metrics
    assert metrics["steps"] == steps < 54 / 4
    assert metrics["train_rows"] == 54
    assert metrics["peak_memory_mb"] > 0
    apart = train(replace(config, output=str(tmp_path / "apart"), packing=False)).metrics
    assert metrics["next_accuracy_before"] == apart["next_accuracy_before"], "dev rows stay as they are"
    assert RunFolder(config.output).config()["packing"] is True


def test_conversations_are_joined_too(tmp_path: Path) -> None:
    metrics = train(_config(tmp_path, "lora", chats(40))).metrics
    assert metrics["steps"] < 36 / 4


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"objective": None}, "only texts of the objective causal can be packed"),
        ({"method": "k-lst"}, "a side network cannot tell packed texts apart"),
        ({"method": "mezo", "settings": {"over": "lst"}}, "a side network cannot tell packed texts apart"),
    ],
)
def test_where_nothing_can_be_joined(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    config = TrainConfig(output=str(tmp_path / "run"), method="siva", objective="causal")
    with pytest.raises(FastpeftError, match=told):
        replace(config, **{"packing": True, **changes})


def _config(folder: Path, method: str, rows: list[dict[str, Any]]) -> TrainConfig:
    return TrainConfig(
        output=str(folder / "run"),
        method=method,
        model=str(save_tiny_decoder(folder / "model")),
        data=str(write_jsonl(folder / "rows.jsonl", rows)),
        objective="causal",
        epochs=1,
        batch_size=4,
        max_length=38,
        packing=True,
    )
