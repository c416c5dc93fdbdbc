"""Members with a prompt in a `LadderPool`: rows of several prompts and rows without one share a batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from backbones import classifier, ladder, trainable
from pools import ROUNDING, SMALL, shuffled
from torch import Tensor

from fastpeft import FastpeftError, LadderConfig, LadderModel, LadderPool, Prompt, PromptCollator, PromptModel

PROMPTS = {
    "opinion": Prompt("{text} is <mask>", {0: "awful", 1: "lovely"}),
    "degree": Prompt("a <mask> story : {text}", {0: "dull", 1: "odd", 2: "funny"}),
}
CLASSES = {"opinion": 2, "degree": 3, "plain": 3}
TASKS = ["degree", "plain", "opinion", "degree", "opinion", "plain"]
TEXTS = ["the film", "a very brilliant story", "end", "plot and actor was clumsy", "touching", "rather tedious scene"]


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(checkpoint)


def masked_lm(checkpoint: Path) -> Any:
    return transformers.AutoModelForMaskedLM.from_pretrained(checkpoint)


def member(checkpoint: Path, tokenizer: Any, task: str, seed: int = 1) -> Any:
    """A model of a task by itself, with weights of its own."""
    if task == "plain":
        return shuffled(ladder(classifier(checkpoint)), seed)
    model = shuffled(PromptModel(ladder(masked_lm(checkpoint)), tokenizer, PROMPTS[task]), seed)
    return model.calibrate() if task == "degree" else model


def encoded(tokenizer: Any, task: str, texts: Sequence[str], **options: Any) -> list[dict[str, Any]]:
    """Rows as a task reads them; those without a prompt have no mask."""
    if task in PROMPTS:
        return PROMPTS[task].encode(tokenizer, texts, **options)
    return [{"mask_positions": 0, **tokenizer(text)} for text in texts]


def batch_of(tokenizer: Any, positions: bool = True) -> dict[str, Tensor]:
    """A row of each text for the task at its place."""
    rows = [row for task, text in zip(TASKS, TEXTS) for row in encoded(tokenizer, task, [text])]
    batch = dict(PromptCollator(tokenizer)(rows))
    return batch if positions else {name: value for name, value in batch.items() if name != "mask_positions"}


def alone(model: Any, tokenizer: Any, task: str, text: str) -> Tensor:
    if task in PROMPTS:
        logits: Tensor = model.predict_logits([text])[0]
        return logits
    with torch.no_grad():
        return model(**tokenizer([text], return_tensors="pt")).logits[0]


# -- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [True, False], ids=["positions given", "masks looked for"])
def test_every_row_gets_its_models_answer_from_one_pass(checkpoint: Path, tokenizer: Any, positions: bool) -> None:
    pool, expected = LadderPool(classifier(checkpoint)), {}
    for seed, task in enumerate(CLASSES):
        model = member(checkpoint, tokenizer, task, seed)
        expected[task] = [alone(model, tokenizer, task, text) for text in TEXTS]
        assert pool.add(task, model) is pool[task]
    passes: list[None] = []
    pool.backbone.layers[0].register_forward_hook(lambda *_: passes.append(None))
    answers = pool(batch_of(tokenizer, positions), TASKS)
    assert len(passes) == 1
    for row, (task, answer) in enumerate(zip(TASKS, answers)):
        assert answer.logits.shape == (CLASSES[task],)
        torch.testing.assert_close(answer.logits, expected[task][row], **ROUNDING)
    assert len({answer.logits.sum().item() for answer in answers}) == len(TASKS)


def test_a_new_side_network_gets_a_prompt(checkpoint: Path, tokenizer: Any) -> None:
    pool = LadderPool(masked_lm(checkpoint))
    pool.add("opinion", LadderConfig(**SMALL))
    model = pool.add("opinion", PromptModel(pool.remove("opinion"), tokenizer, PROMPTS["opinion"]))
    rows = PromptCollator(tokenizer)(encoded(tokenizer, "opinion", TEXTS[:1]))
    expected = alone(model, tokenizer, "opinion", TEXTS[0])
    torch.testing.assert_close(pool(dict(rows), ["opinion"])[0].logits, expected, **ROUNDING)


def test_a_row_without_its_mask_is_refused(checkpoint: Path, tokenizer: Any) -> None:
    pool = LadderPool(masked_lm(checkpoint))
    pool.add("opinion", member(checkpoint, tokenizer, "opinion"))
    with pytest.raises(FastpeftError, match="a row has no mask token or several"):
        pool(dict(tokenizer(["the film"], return_tensors="pt")), ["opinion"])


# -- files -----------------------------------------------------------------------------------------------------------


def test_saved_members_come_back_with_their_prompts(tmp_path: Path, checkpoint: Path, tokenizer: Any) -> None:
    pool, expected = LadderPool(masked_lm(checkpoint)), {}
    for seed, task in enumerate(PROMPTS):
        model = member(checkpoint, tokenizer, task, seed)
        model.save_pretrained(tmp_path / task)
        expected[task] = alone(model, tokenizer, task, TEXTS[1])
        assert isinstance(pool.add(task, tmp_path / task), PromptModel)
        rows = PromptCollator(tokenizer)(encoded(tokenizer, task, [TEXTS[1]]))
        torch.testing.assert_close(pool(dict(rows), [task])[0].logits, expected[task], **ROUNDING)
    pool["degree"].save_pretrained(tmp_path / "again")
    for model in (pool.remove("degree"), PromptModel.from_pretrained(tmp_path / "again")):
        torch.testing.assert_close(alone(model, tokenizer, "degree", TEXTS[1]), expected["degree"], **ROUNDING)


def test_a_prompt_on_a_base_with_another_head_is_told_how_to_come_in(
    tmp_path: Path, checkpoint: Path, tokenizer: Any
) -> None:
    model = member(checkpoint, tokenizer, "opinion")
    model.save_pretrained(tmp_path)
    pool = LadderPool(classifier(checkpoint))
    with pytest.raises(FastpeftError, match=r"head of a RobertaForMaskedLM.* PromptModel\.from_pretrained loads"):
        pool.add("opinion", tmp_path)
    pool.add("opinion", PromptModel.from_pretrained(tmp_path))
    rows = PromptCollator(tokenizer)(encoded(tokenizer, "opinion", TEXTS[:1]))
    expected = alone(model, tokenizer, "opinion", TEXTS[0])
    torch.testing.assert_close(pool(dict(rows), ["opinion"])[0].logits, expected, **ROUNDING)


def test_a_prompt_for_a_classifier_changes_its_rows_alone(tmp_path: Path, checkpoint: Path, tokenizer: Any) -> None:
    member(checkpoint, tokenizer, "plain").save_pretrained(tmp_path)
    Prompt("{text} is <mask>", head="classifier").save(tmp_path)
    assert type(LadderPool(classifier(checkpoint)).add("plain", tmp_path)) is LadderModel


def test_a_prompt_around_another_model_is_refused(checkpoint: Path, tokenizer: Any) -> None:
    pool = LadderPool(masked_lm(checkpoint))
    with pytest.raises(FastpeftError, match="not a PromptModel around a RobertaForMaskedLM"):
        pool.add("opinion", PromptModel(masked_lm(checkpoint), tokenizer, PROMPTS["opinion"]))


# -- training --------------------------------------------------------------------------------------------------------


def batches(tokenizer: Any, task: str) -> list[dict[str, Tensor]]:
    labels = [0, 1, 1, 0, 1, 0]
    rows = encoded(tokenizer, task, TEXTS)
    for row, label in zip(rows, labels):
        row["labels"] = label
        if task == "plain":
            del row["mask_positions"]
    return [dict(PromptCollator(tokenizer)(rows[start : start + 3])) for start in (0, 3)]


def test_members_with_a_prompt_train_from_one_pass_to_the_bit(checkpoint: Path, tokenizer: Any) -> None:
    pool = LadderPool(masked_lm(checkpoint))
    alone = member(checkpoint, tokenizer, "opinion")
    pool.add("opinion", member(checkpoint, tokenizer, "opinion"))
    (batch, _) = batches(tokenizer, "opinion")
    found = dict(pool.outputs(batch))["opinion"]
    found.loss.backward()
    alone(**batch).loss.backward()
    gradients = {name: parameter.grad for name, parameter in trainable(pool["opinion"]).items()}
    assert all(parameter.grad.equal(gradients[name]) for name, parameter in trainable(alone).items())


def test_positions_of_masks_reach_only_members_with_a_prompt(checkpoint: Path, tokenizer: Any) -> None:
    pool = LadderPool(masked_lm(checkpoint))
    pool.add("opinion", member(checkpoint, tokenizer, "opinion"))
    pool.add("words", LadderConfig(**SMALL))
    (batch, _) = batches(tokenizer, "opinion")
    found = dict(pool.outputs({name: value for name, value in batch.items() if name != "labels"}))
    assert found["opinion"].logits.shape == (3, 2)
    assert found["words"].logits.shape[:2] == batch["input_ids"].shape
