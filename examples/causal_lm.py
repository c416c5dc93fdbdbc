"""Fine-tune a causal language model with transformers' Trainer: by a side network or SiVA, on prompts or a text.

    python examples/causal_lm.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data e2e.jsonl --method lst --output out
    python examples/causal_lm.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data notes.txt --method siva --output out
    python examples/causal_lm.py --tiny --data README.md --output out

Of a jsonl file with `prompt` and `completion` the completions are learned, of any other file the text. The last line
needs no network: it trains beside a small random Llama on bytes, to see that everything works.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    DataCollatorForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from fastpeft import LadderConfig, LadderModel, SivaConfig

METHODS = {"siva": 1e-3, "lst": 3e-3, "k-lst": 3e-3}  # and their learning rates


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


def read(file: Path, tokenizer: PreTrainedTokenizerBase, length: int) -> list[dict[str, Any]]:
    """Rows of at most `length` tokens; labels of -100 are not learned."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".jsonl":
        ids = tokenizer(text)["input_ids"]
        starts = range(0, len(ids) - length + 1, length)
        return [{"input_ids": ids[start : start + length], "labels": ids[start : start + length]} for start in starts]
    rows = []
    for line in text.splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        completion = tokenizer(row["completion"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        ids, labels = prompt + completion, [-100] * len(prompt) + completion
        rows.append({"input_ids": ids[:length], "labels": labels[:length]})
    return rows


def beside(name: str, method: str, rank: int) -> Any:
    """The model that trains."""
    base = AutoModelForCausalLM.from_pretrained(name, dtype="float32")
    if method == "siva":
        return get_peft_model(base, SivaConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    return LadderModel(base, LadderConfig(window_size=1, fusion="gated") if method == "lst" else LadderConfig())


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train, save and go on from a prompt; returns the loss on the held-out rows before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name on the hub, or folder, of a causal language model")
    parser.add_argument("--tiny", action="store_true", help="a small random model in place of --model")
    parser.add_argument("--data", type=Path, required=True, help="file to learn from; its last tenth is held out")
    parser.add_argument("--output", type=Path, required=True, help="folder for what was trained")
    parser.add_argument("--method", choices=METHODS, default="lst")
    parser.add_argument("--rank", type=int, default=8, help="of SiVA")
    parser.add_argument("--learning-rate", type=float, help=f"default: {METHODS}")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="most tokens a row")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.tiny is (options.model is not None):
        parser.error("give --model or --tiny")

    set_seed(options.seed)
    name = str(save_tiny_llama(options.output / "base")) if options.tiny else options.model
    tokenizer = AutoTokenizer.from_pretrained(name)
    rows = read(options.data, tokenizer, options.length)
    held_out = max(1, len(rows) // 10)
    if len(rows) <= held_out:
        parser.error(f"{options.data} holds {len(rows)} rows of {options.length} tokens; at least two are needed")

    model = beside(name, options.method, options.rank)
    model.print_trainable_parameters()
    trainer = Trainer(
        model,
        TrainingArguments(
            str(options.output / "trainer"),
            learning_rate=options.learning_rate or METHODS[options.method],
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
        data_collator=DataCollatorForTokenClassification(tokenizer),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    model.save_pretrained(options.output)
    print(f"held-out loss {before:.3f} before, {after:.3f} after; what was trained is in {options.output}")

    # what somebody else does with the folder; merged, an adapter leaves a plain model
    loaded: Any
    if options.method == "siva":
        loaded = AutoPeftModelForCausalLM.from_pretrained(options.output).merge_and_unload()
    else:
        loaded = AutoModelForCausalLM.from_pretrained(options.output)
    asked = [token for token, label in zip(rows[-1]["input_ids"], rows[-1]["labels"]) if label == -100]
    prompt = tokenizer.pad([{"input_ids": asked or rows[-1]["input_ids"][:16]}], return_tensors="pt")
    written = loaded.generate(**prompt, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    print(tokenizer.decode(written[0], skip_special_tokens=True))
    return {"before": before, "after": after}


if __name__ == "__main__":
    main()
