"""Fine-tune a causal language model by MeZO: forward passes alone, and a journal from which the weights come back.

    python examples/mezo_decoder.py --model Qwen/Qwen2.5-0.5B --text notes.txt --output out
    python examples/mezo_decoder.py --tiny --output out

The second line needs no network: a small random Llama learns the bytes of this file.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, set_seed

from fastpeft import MeZO, MeZOConfig, MeZOTrainer


def tiny_llama() -> tuple[LlamaForCausalLM, ByT5Tokenizer]:
    """Two random layers that read bytes."""
    tokenizer = ByT5Tokenizer(extra_ids=0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config), tokenizer


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train, and make the weights again from the journal; returns the held-out loss before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name on the hub, or folder, of a causal language model")
    parser.add_argument("--tiny", action="store_true", help="a small random model in place of --model")
    parser.add_argument("--text", type=Path, default=Path(__file__), help="file to learn from; its end is held out")
    parser.add_argument("--learning-rate", type=float, help="default: 1e-6, with --tiny 1e-2")
    parser.add_argument("--steps", type=int, help="default: 2,000, with --tiny 500")
    parser.add_argument("--output", type=Path, required=True, help="folder for the journal, which must hold none")
    options = parser.parse_args(arguments)
    if options.tiny is (options.model is not None):
        parser.error("give --model or --tiny")

    set_seed(0)
    if options.tiny:
        model, tokenizer = tiny_llama()
    else:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype="float32")
    start = copy.deepcopy(model)
    ids = tokenizer(options.text.read_text(encoding="utf-8"))["input_ids"]
    rows = [{"input_ids": ids[at : at + 64], "labels": ids[at : at + 64]} for at in range(0, len(ids) - 63, 64)]
    held_out = max(1, len(rows) // 10)

    trainer = MeZOTrainer(
        model,
        MeZOConfig(
            str(options.output),
            learning_rate=options.learning_rate or (1e-2 if options.tiny else 1e-6),
            max_steps=options.steps or (500 if options.tiny else 2_000),
            journal=True,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=rows[:-held_out],
        eval_dataset=rows[-held_out:],
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]

    # somebody who has the base model needs the journal alone, some 40 bytes a step
    start.eval()
    MeZO(start, lr=trainer.args.learning_rate, seed=trainer.args.seed).resume(trainer.journal_file)
    same = all(torch.equal(one, other) for one, other in zip(start.parameters(), model.parameters()))
    print(f"held-out loss {before:.3f} before, {after:.3f} after; the replayed weights are equal: {same}")
    return {"before": before, "after": after, "replayed": same}


if __name__ == "__main__":
    main()
