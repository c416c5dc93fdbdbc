"""A side network beside a vision transformer: one that knows the digits 0 to 4 learns 5 to 9, and stays as it is.

    python examples/vit_digits.py --output out

The images are scikit-learn's handwritten digits, 8 x 8 pixels, so nothing is downloaded and a CPU will do. The first
part makes the pretrained model; with one from a hub, start at `LadderModel`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from fastpeft import LadderConfig, LadderModel

Rows = list[dict[str, Any]]


def digits(first: int) -> tuple[Rows, Rows]:
    """The images of five digits from `first` on, for training and for measuring; labels count from 0."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = found.target - first
    rows = [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels) if 0 <= label < 5]
    held_out = len(rows) // 4
    return rows[:-held_out], rows[-held_out:]


def trainer(model: nn.Module, rows: tuple[Rows, Rows], folder: Path, epochs: float, learning_rate: float) -> Trainer:
    """A Trainer that measures the accuracy."""
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=epochs,
        learning_rate=learning_rate,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=128,
        warmup_steps=20,
        save_strategy="no",
        report_to="none",
    )

    def accuracy(predicted: Any) -> dict[str, float]:
        return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}

    return Trainer(model, arguments, train_dataset=rows[0], eval_dataset=rows[1], compute_metrics=accuracy)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Pretrain, train beside it, save and load; returns the accuracy on held-out images of 5 to 9 before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="few epochs, to see that it works")
    parser.add_argument("--output", type=Path, required=True, help="folder for the side network, and the base in it")
    parser.add_argument("--window", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    set_seed(options.seed)
    epochs = 8 if options.tiny else 25
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=5,
    )
    pretrained = ViTForImageClassification(config)
    first = trainer(pretrained, digits(0), options.output / "trainer", epochs, 4e-3)
    first.train()
    known = first.evaluate()["eval_accuracy"]
    pretrained.save_pretrained(options.output / "base")

    base = AutoModelForImageClassification.from_pretrained(
        options.output / "base", id2label={place: str(digit) for place, digit in enumerate(range(5, 10))}
    )
    model = LadderModel(base, LadderConfig(window_size=options.window, reduction_factor=2, residual=True))
    second = trainer(model, digits(5), options.output / "trainer", epochs, 1e-2)
    before = second.evaluate()["eval_accuracy"]
    second.train()
    after = second.evaluate()["eval_accuracy"]
    model.save_pretrained(options.output)
    print(f"0 to 4: {known:.3f} by the base; 5 to 9: {before:.3f} before, {after:.3f} beside it")

    # what somebody else does with the folder
    loaded = LadderModel.from_pretrained(options.output)
    row = digits(5)[1][0]
    with torch.no_grad():
        found = int(loaded(pixel_values=row["pixel_values"][None]).logits.argmax())
    print(f"an image of {row['labels'] + 5} is read as {loaded.config.id2label[found]}")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main()
