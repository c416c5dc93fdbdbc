"""SiVA by transformers' Trainer, measured while it trains; the best checkpoint is kept.

    python examples/trainer.py --model FacebookAI/roberta-base --data reviews.csv --targets all-linear --output out
    python examples/trainer.py --tiny --output out

The second line needs no network: the bundled model learns from a few of the bundled film reviews.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from peft import get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    set_seed,
)

from fastpeft import SivaConfig
from fastpeft.data.examples import load_data
from fastpeft.models import resolve_model


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train and save an adapter; returns the loss on the dev rows before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="name on the hub, or folder, of an encoder (default: bundled)")
    parser.add_argument("--data", default="demo", help="a table of texts and classes, or whatever fastpeft train takes")
    parser.add_argument("--tiny", action="store_true", help="few rows")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument(
        "--targets", help="all-linear, or names joined by commas (default: all that read hidden states)"
    )
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--epochs", type=float, default=3)
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
    targets = options.targets if options.targets in (None, "all-linear") else options.targets.split(",")
    base = AutoModelForSequenceClassification.from_pretrained(
        name, label2id={label: index for index, label in enumerate(data.labels)}, dtype="float32"
    )
    model = get_peft_model(base, SivaConfig(r=options.rank, target_modules=targets, task_type="SEQ_CLS"))

    trainer = Trainer(
        model,
        TrainingArguments(
            str(options.output / "trainer"),
            learning_rate=options.learning_rate,
            warmup_steps=2,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=16,
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=1,
            load_best_model_at_end=True,
            metric_for_best_model="accuracy",
            report_to="none",
        ),
        train_dataset=train,
        eval_dataset=dev,
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    print(f"accuracy {before['eval_accuracy']:.3f} before, {after['eval_accuracy']:.3f} after")
    model.save_pretrained(options.output)
    return {"before": before["eval_loss"], "after": after["eval_loss"]}


if __name__ == "__main__":
    main()
