"""SiVA under TRL's trainers, from the base model and from an adapter that was trained before."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing
from tokenizers_for_prompts import make_tokenizer

from fastpeft import FastpeftError, LadderConfig, LadderModel, SivaConfig

trl = pytest.importorskip("trl", reason="the extra `integrations` is not installed")

NAMES = ("gradient_checkpointing", "activation_checkpointing")  # the older one first
CHECKPOINTING = NAMES[hasattr(transformers.TrainingArguments, NAMES[1])]
PROMPTS, GOOD, BAD = ["this film is", "the plot was", "it is", "a story"], [" great", " lovely"], [" bad", " dull"]
SHARED = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.1, "logging_steps": 1, "seed": 0}
SHARED |= {
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    CHECKPOINTING: False,
    "save_strategy": "no",
}
SHARED |= {"disable_tqdm": True, "lr_scheduler_type": "constant"}


def tokenizer() -> Any:
    """One that ends no prompt by itself."""
    made = copy.deepcopy(make_tokenizer("unigram"))
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return made


def base() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def config() -> SivaConfig:
    return SivaConfig(r=2, target_modules=["q_proj", "k_proj"], task_type="CAUSAL_LM")


def sft(model: Any, folder: Path, adapter: SivaConfig | None = None, **changes: Any) -> trl.SFTTrainer:
    texts = [prompt + word for prompt in PROMPTS for word in GOOD]
    return trl.SFTTrainer(
        model,
        trl.SFTConfig(str(folder / "sft"), **{"max_length": 32, **SHARED, **changes}),
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=tokenizer(),
        peft_config=adapter,
    )


def fine_tuned(folder: Path) -> trl.SFTTrainer:
    trainer = sft(base(), folder, config())
    trainer.train()
    return trainer


def preferences(paired: bool) -> datasets.Dataset:
    if paired:
        return datasets.Dataset.from_dict({"prompt": PROMPTS, "chosen": GOOD * 2, "rejected": BAD * 2})
    return datasets.Dataset.from_dict(
        {"prompt": PROMPTS * 2, "completion": GOOD * 2 + BAD * 2, "label": [True] * 4 + [False] * 4}
    )


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([[0, 33, 34, 35]])).logits


def test_sft_trains_the_adapter_alone_and_its_result_loads(tmp_path: Path) -> None:
    trainer = fine_tuned(tmp_path)
    before = base()
    trained = trainer.model
    for name, parameter in before.named_parameters():
        if not any(part in name for part in ("q_proj", "k_proj")):
            assert torch.equal(trained.get_base_model().get_parameter(name), parameter), name
    assert not torch.allclose(logits(trained), logits(before), atol=1e-3)
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = peft.PeftModel.from_pretrained(base(), str(tmp_path / "adapter"))
    assert torch.equal(logits(loaded), logits(trained))


@pytest.mark.long(but="KTO-base")
@pytest.mark.parametrize("start", ["base", "adapter"])
@pytest.mark.parametrize("method", ["DPO", "KTO"])
def test_the_first_reward_is_zero(method: str, start: str, tmp_path: Path) -> None:
    """The reference is what training starts from: the base model, or the adapter as it was loaded."""
    arguments = getattr(trl, f"{method}Config")(str(tmp_path / "out"), max_length=32, **SHARED)
    model, given = base(), {"peft_config": config()}
    if start == "adapter":
        trainer = fine_tuned(tmp_path)
        trainer.save_model(str(tmp_path / "adapter"))
        model, given = peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter"), is_trainable=True), {}
        expected = logits(trainer.model)
    else:
        expected = logits(model)
    trainer = getattr(trl, f"{method}Trainer")(
        model, args=arguments, train_dataset=preferences(method == "DPO"), processing_class=tokenizer(), **given
    )
    with trl.trainer.utils.use_adapter(trainer.model, "ref" if start == "adapter" else None):
        assert torch.allclose(logits(trainer.model), expected, rtol=1e-5, atol=1e-5)
    trainer.train()
    first, second = (
        {key: value for key, value in step.items() if key in ("rewards/chosen", "rewards/rejected")}
        for step in trainer.state.log_history[:2]
    )
    assert first
    assert set(first.values()) == {0.0}
    assert 0.0 not in second.values()


# -- side networks -----------------------------------------------------------------------------------------------------


def beside(model: Any) -> LadderModel:
    torch.manual_seed(0)
    return LadderModel(model, LadderConfig(window_size=3, reduction_factor=2))


@pytest.mark.parametrize("changes", [{}, {CHECKPOINTING: True}], ids=["plain", "checkpointed"])
def test_sft_trains_a_side_network_as_the_trainer_does(tmp_path: Path, changes: dict[str, Any]) -> None:
    """TRL computes the loss from hidden states: it and the gradients are those of the model's own loss."""
    trainer = sft(beside(base()), tmp_path, **changes)
    batch = next(iter(trainer.get_train_dataloader()))
    own = beside(base())
    own(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss.backward()
    trainer.model(**batch, fused_lm_head=True).loss.backward()
    compared = 0
    for (name, parameter), other in zip(trainer.model.named_parameters(), own.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)
            compared += 1
    assert compared > 10
    trainer.model.zero_grad()
    trainer.train()
    assert not torch.allclose(logits(trainer.model), logits(base()), atol=1e-3)
    trainer.save_model(str(tmp_path / "side"))
    assert torch.equal(logits(LadderModel.from_pretrained(tmp_path / "side", base=base())), logits(trainer.model))


def test_a_head_of_several_layers_has_its_loss_and_gradients() -> None:
    """TRL multiplies states by the layer of all words: they are those that this layer reads."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0}
    torch.manual_seed(0)
    model = beside(transformers.ModernBertDecoderForCausalLM(transformers.ModernBertDecoderConfig(**sizes)))
    with torch.no_grad():
        model.side.up.weight.normal_()  # or the side network adds nothing yet
    batch = {"input_ids": torch.randint(3, 60, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    batch["labels"] = batch["input_ids"]
    loss = model(**batch).loss
    loss.backward()
    expected = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    assert {"base.lm_head.dense.weight", "base.lm_head.norm.weight"} < expected.keys()
    model.zero_grad()
    trl.trainer.utils.add_fused_lm_head(model)
    found = model(**batch, fused_lm_head=True).loss
    found.backward()
    torch.testing.assert_close(found, loss)
    torch.testing.assert_close({name: model.get_parameter(name).grad for name in expected}, expected)


@pytest.mark.parametrize("shape", [{"window_size": 9}, {"window_size": 1, "fusion": "gated", "feature_dropout": 0.2}])
def test_preferences_turn_the_dropout_of_features_off(tmp_path: Path, shape: dict[str, Any]) -> None:
    """As TRL does with every dropout, since the reference has none: so the first reward beside a copy is 0."""
    torch.manual_seed(0)
    model = LadderModel(base(), LadderConfig(reduction_factor=2, **shape))
    with torch.no_grad():
        model.side.up.weight.normal_()  # or the side network adds nothing yet
    trainer = trl.DPOTrainer(
        model,
        ref_model=copy.deepcopy(model),
        args=trl.DPOConfig(str(tmp_path), max_length=32, **SHARED),
        train_dataset=preferences(paired=True),
        processing_class=tokenizer(),
    )
    trainer.train()
    first, second = (step["rewards/chosen"] for step in trainer.state.log_history[:2])
    assert first == 0.0
    assert second != 0.0


@pytest.mark.parametrize("changes", [{"packing": True}, {"padding_free": True, "max_length": None}])
def test_joined_texts_are_refused_beside_a_side_network(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(FastpeftError, match="a side network cannot tell"):
        sft(beside(base()), tmp_path, **changes).train()
    with pytest.raises(FastpeftError, match="position_ids begin anew within a row"):
        beside(base())(input_ids=torch.tensor([[3, 4, 5, 6]]), position_ids=torch.tensor([[0, 1, 0, 1]]))
    padded = {"input_ids": torch.tensor([[1, 1, 5, 6]]), "position_ids": torch.tensor([[0, 0, 0, 1]])}
    with pytest.raises(FastpeftError, match="or an attention_mask to rows of one text"):  # or texts of one token
        beside(base())(**padded)
    assert beside(base())(**padded, attention_mask=torch.tensor([[0, 0, 1, 1]])).logits.shape == (1, 4, 64)


def test_a_head_that_changes_its_logits_is_refused(tmp_path: Path) -> None:
    config = transformers.Gemma2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    with pytest.raises(FastpeftError, match="the Gemma2ForCausalLM changes its logits"):
        sft(beside(transformers.Gemma2ForCausalLM(config)), tmp_path).train()
