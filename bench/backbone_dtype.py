"""What a backbone of fewer bits costs a side network in accuracy: `python -m bench.backbone_dtype`.

The bundled model as a classifier with a 9-LST beside it, for each `backbone_dtype`: `bench/data/backbone_dtype.csv`.
`feature_error` is `|B~ - B| / |B|` of the last layer's features of real tokens. Then the side network trains for one
epoch on 1,000 training rows of the demo data, and `accuracy` is that on 500 other training rows. One seed: the standard
error of an accuracy of 0.7 is 0.02 there, so this finds what breaks, not what is best.

`weights_mb` is what the backbone takes (2^20 bytes); its base is loaded in float32, and the embeddings stay in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bench.harness import DATA, option_parser, put_row
from fastpeft import LadderConfig, LadderModel
from fastpeft.comparison.learning_rates import take_slice
from fastpeft.data.examples import load_data
from fastpeft.ladder.config import BackboneDtype
from fastpeft.models import resolve_model
from fastpeft.support.environment import versions
from fastpeft.training.memory import MEBIBYTE

FILE = DATA / "backbone_dtype.csv"
DTYPES: tuple[BackboneDtype | None, ...] = (None, *get_args(BackboneDtype))
ROWS, DEV_ROWS, BATCH, RATE, SEED = 1000, 500, 16, 3e-3, 0


class Texts:
    """Rows of the demo data, tokenized batch by batch."""

    def __init__(self, rows: int = ROWS, dev_rows: int = DEV_ROWS) -> None:
        self.data = take_slice(load_data("demo"), rows, dev_rows)
        self._tokenizer = AutoTokenizer.from_pretrained(resolve_model("demo"))

    def batches(self, part: str, order: Tensor | None = None) -> Iterator[dict[str, Tensor]]:
        rows = getattr(self.data, part)
        for chosen in (torch.arange(len(rows)) if order is None else order).split(BATCH):
            batch = self._tokenizer([rows.texts[i] for i in chosen], padding=True, truncation=True, return_tensors="pt")
            yield {**batch, "labels": torch.tensor([rows.labels[i] for i in chosen])}


def beside(dtype: BackboneDtype | None) -> LadderModel:
    """A new side network beside the bundled model, the same for every dtype."""
    torch.manual_seed(SEED)
    base = AutoModelForSequenceClassification.from_pretrained(resolve_model("demo"), num_labels=2, dtype=torch.float32)
    return LadderModel(base, LadderConfig(backbone_dtype=dtype))


@torch.no_grad()
def features(model: LadderModel, batch: dict[str, Tensor]) -> Tensor:
    """The last layer's, of tokens that are no padding, `(tokens, d)` in float32."""
    given: dict[str, Any] = {name: batch[name] for name in ("input_ids", "attention_mask")}
    found: Tensor = model.backbone.body(**given).last_hidden_state
    return found[batch["attention_mask"].bool()].float()


def train(model: LadderModel, texts: Texts) -> None:
    """An epoch of AdamW with a rate that falls to zero."""
    model.train()
    order = torch.randperm(len(texts.data.train), generator=torch.Generator().manual_seed(SEED))
    steps = -(-len(order) // BATCH)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for batch in texts.batches("train", order):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def accuracy(model: LadderModel, texts: Texts) -> float:
    model.eval()
    right = [model(**batch).logits.argmax(-1) == batch["labels"] for batch in texts.batches("dev")]
    return float(torch.cat(right).float().mean())


def measure(dtype: BackboneDtype | None, texts: Texts) -> dict[str, str]:
    model, batch = beside(dtype), next(texts.batches("dev"))
    expected = features(beside(None), batch)
    error = (features(model, batch) - expected).norm() / expected.norm()
    frozen = [p for p in model.backbone.body.parameters() if not p.requires_grad]
    nbytes = sum(p.numel() * p.element_size() for p in frozen)
    train(model, texts)
    return {
        "backbone_dtype": dtype or "",
        "weights_mb": f"{nbytes / MEBIBYTE:.1f}",
        "feature_error": f"{float(error):.3g}",
        "accuracy": f"{accuracy(model, texts):.3f}",
        "train_rows": str(len(texts.data.train)),
        "dev_rows": str(len(texts.data.dev)),
        "torch": versions()["torch"],
    }


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("--dtype", choices=[dtype or "none" for dtype in DTYPES], help="this one only")
    only, texts = parser.parse_args().dtype, Texts()
    for dtype in DTYPES:
        if only in (None, dtype or "none"):
            row = measure(dtype, texts)
            put_row(FILE, row, key=("backbone_dtype",))
            print(", ".join(row.values()), flush=True)


if __name__ == "__main__":
    main()
