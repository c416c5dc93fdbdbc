"""A side network (k-LST) trained by a loop of your own, without a Trainer.

    python examples/plain_loop.py --model FacebookAI/roberta-base --data reviews.csv --output out
    python examples/plain_loop.py --tiny --output out

The second line needs no network: the bundled model learns from a few of the bundled film reviews.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed

from fastpeft import LadderConfig, LadderModel
from fastpeft.data.examples import load_data
from fastpeft.models import resolve_model


@torch.no_grad()
def measure(model: LadderModel, batches: DataLoader) -> float:
    """Mean loss of a row."""
    model.eval()
    losses = [(model(**batch).loss.item(), len(batch["labels"])) for batch in batches]
    return sum(loss * rows for loss, rows in losses) / sum(rows for _, rows in losses)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train, save and load a side network; returns the loss on the training rows before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="name on the hub, or folder, of an encoder (default: bundled)")
    parser.add_argument("--data", default="demo", help="a table of texts and classes, or whatever fastpeft train takes")
    parser.add_argument("--tiny", action="store_true", help="few rows")
    parser.add_argument("--window", type=int, default=9)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True, help="folder for the side network")
    options = parser.parse_args(arguments)

    set_seed(0)
    data = load_data(options.data)
    name = resolve_model(options.model)
    tokenizer = AutoTokenizer.from_pretrained(name)
    limit = 64 if options.tiny else None
    train, dev = (
        DataLoader(
            [
                {**tokenizer(text, truncation=True, max_length=128), "labels": label}
                for text, label in zip(part.texts[:limit], part.labels[:limit])
            ],
            batch_size=16,
            shuffle=part is data.train,
            collate_fn=DataCollatorWithPadding(tokenizer),
        )
        for part in (data.train, data.dev)
    )

    base = AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(data.labels), dtype="float32")
    model = LadderModel(base, LadderConfig(window_size=options.window))
    # the backbone asks for no gradient: what does is the side network and the head
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, total_iters=options.epochs * len(train))

    before = measure(model, train)
    for epoch in range(options.epochs):
        model.train()
        for batch in train:
            model(**batch).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        print(
            f"epoch {epoch + 1}: loss {measure(model, train):.3f} on training rows, {measure(model, dev):.3f} on others"
        )

    model.save_pretrained(options.output)
    return {"before": before, "after": measure(LadderModel.from_pretrained(options.output), train)}


if __name__ == "__main__":
    main()
