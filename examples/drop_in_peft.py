"""A LoRA script with PEFT, in which one line makes the adapter SiVA's and everything else stays as it was.

    python examples/drop_in_peft.py --model FacebookAI/roberta-base --data reviews.csv --output out
    python examples/drop_in_peft.py --adapter lora --tiny --output out

The second line needs no network: the bundled model learns from a few of the bundled film reviews.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from peft import AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, set_seed

from fastpeft import SivaConfig
from fastpeft.data.examples import load_data
from fastpeft.models import resolve_model


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train, save, load and merge an adapter; returns the loss on the dev rows before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="name on the hub, or folder, of an encoder (default: bundled)")
    parser.add_argument("--data", default="demo", help="a table of texts and classes, or whatever fastpeft train takes")
    parser.add_argument("--tiny", action="store_true", help="few rows and few steps")
    parser.add_argument("--adapter", choices=("siva", "lora"), default="siva")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--output", type=Path, required=True, help="folder for the adapter")
    options = parser.parse_args(arguments)

    set_seed(0)
    data = load_data(options.data)
    name = resolve_model(options.model)
    tokenizer = AutoTokenizer.from_pretrained(name)
    limit = 64 if options.tiny else None
    train, dev = (
        [
            {**tokenizer(text, truncation=True, max_length=128), "labels": label}
            for text, label in zip(part.texts[:limit], part.labels[:limit])
        ]
        for part in (data.train, data.dev)
    )
    base = AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(data.labels), dtype="float32")

    if options.adapter == "siva":
        config = SivaConfig(task_type="SEQ_CLS")  # this line in place of the other
    else:
        config = LoraConfig(r=4, target_modules=["query", "key"], task_type="SEQ_CLS")
    model = get_peft_model(base, config)
    model.print_trainable_parameters()

    trainer = Trainer(
        model,
        TrainingArguments(
            str(options.output / "trainer"),
            learning_rate=options.learning_rate,
            num_train_epochs=5 if options.tiny else 1,
            per_device_train_batch_size=16,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=train,
        eval_dataset=dev,
        processing_class=tokenizer,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    model.save_pretrained(options.output)
    print(f"dev loss {before:.3f} before, {after:.3f} after; the adapter is in {options.output}")

    loaded = AutoPeftModelForSequenceClassification.from_pretrained(options.output, num_labels=len(data.labels))
    loaded.merge_and_unload().save_pretrained(options.output / "merged")  # a plain model at its full speed
    return {"before": before, "after": after}


if __name__ == "__main__":
    main()
