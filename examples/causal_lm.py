"""Fine-tune a causal language model on a text, with SiVA and transformers' Trainer.

    python examples/causal_lm.py --model Qwen/Qwen2.5-0.5B --text notes.txt --output out
    python examples/causal_lm.py --tiny --text README.md --output out

The second line needs no network: it trains a small random Llama on bytes, to see that everything works.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from fastpeft import SivaConfig


def save_tiny_llama(folder: Path) -> Path:
    """A base model of two random layers that reads bytes."""
    tokenizer = ByT5Tokenizer(extra_ids=0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,  # nothing else sets the scale of the logits, whose layer stays random
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def blocks(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> list[dict[str, list[int]]]:
    """The text as rows of `length` tokens, each of which the model learns to predict from those before it."""
    ids = tokenizer(text)["input_ids"]
    starts = range(0, len(ids) - length + 1, length)
    return [{"input_ids": ids[start : start + length], "labels": ids[start : start + length]} for start in starts]


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train, save and continue a text; returns the loss on the held-out end of the text before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name on the hub, or folder, of a causal language model")
    parser.add_argument("--tiny", action="store_true", help="a small random model in place of --model")
    parser.add_argument("--text", type=Path, required=True, help="file to learn from; its last tenth is held out")
    parser.add_argument("--output", type=Path, required=True, help="folder for the adapter")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens a row")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.tiny is (options.model is not None):
        parser.error("give --model or --tiny")

    set_seed(options.seed)
    name = str(save_tiny_llama(options.output / "base")) if options.tiny else options.model
    tokenizer = AutoTokenizer.from_pretrained(name)
    rows = blocks(tokenizer, options.text.read_text(encoding="utf-8"), options.length)
    held_out = max(1, len(rows) // 10)
    if len(rows) <= held_out:
        parser.error(f"{options.text} holds {len(rows)} rows of {options.length} tokens; at least two are needed")

    base = AutoModelForCausalLM.from_pretrained(name)
    config = SivaConfig(r=options.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    model.print_trainable_parameters()
    trainer = Trainer(
        model,
        TrainingArguments(
            str(options.output / "trainer"),
            learning_rate=options.learning_rate,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=options.batch_size,
            lr_scheduler_type="cosine",
            save_strategy="no",
            report_to="none",
            seed=options.seed,
        ),
        train_dataset=rows[:-held_out],
        eval_dataset=rows[-held_out:],
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    model.save_pretrained(options.output)
    print(f"held-out loss {before:.3f} before, {after:.3f} after; the adapter is in {options.output}")

    # what somebody else does with the folder; merged, the model is a plain one at its full speed
    merged = AutoPeftModelForCausalLM.from_pretrained(options.output).merge_and_unload()
    prompt = torch.tensor([rows[-1]["input_ids"][:16]])
    written = merged.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=32, do_sample=False)
    print(tokenizer.decode(written[0]))
    return {"before": before, "after": after}


if __name__ == "__main__":
    main()
