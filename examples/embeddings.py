"""Embeddings of sentence-transformers, trained so that texts of one class are close: a side network, or LoRA.

    python examples/embeddings.py --model sentence-transformers/all-MiniLM-L6-v2 --data questions --output out
    python examples/embeddings.py --tiny --output out

The second line needs no network: the bundled model learns from a few of the bundled film reviews. Pairs of training
texts of one class are positive; the score is Spearman's rank correlation between the cosine of pairs of dev texts and
whether they have one class.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import datasets
from peft import LoraConfig
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import set_seed

from fastpeft import LadderConfig, LadderModel
from fastpeft.data.examples import Examples, load_data
from fastpeft.models import resolve_model

Pairs = list[tuple[str, str]]
SIDE_NETWORKS = {"k-lst": {"window_size": 3}, "lst": {"window_size": 1, "fusion": "gated"}}


def pairs(examples: Examples, count: int, alike: bool, draw: random.Random) -> Pairs:
    """Pairs of texts of one class, or of two classes."""
    found: Pairs = []
    while len(found) < count:
        first, second = (draw.randrange(len(examples)) for _ in range(2))
        if first != second and (examples.labels[first] == examples.labels[second]) is alike:
            found.append((examples.texts[first], examples.texts[second]))
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train, save and load; returns the score before, after, and loaded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="name on the hub, or folder (default: bundled)")
    parser.add_argument("--data", default="demo", help="a table of texts and classes, or whatever fastpeft train takes")
    parser.add_argument("--method", choices=[*SIDE_NETWORKS, "lora"], default="k-lst")
    parser.add_argument("--pairs", type=int, default=1024, help="positive pairs to learn from, and a quarter to score")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="few pairs")
    parser.add_argument("--output", type=Path, required=True, help="folder for the model")
    options = parser.parse_args(arguments)
    count = 64 if options.tiny else options.pairs

    set_seed(options.seed)
    draw = random.Random(options.seed)
    data = load_data(options.data)
    anchors, positives = zip(*pairs(data.train, count, True, draw))
    held_out = {alike: pairs(data.dev, count // 4, alike, draw) for alike in (True, False)}
    firsts, seconds = zip(*held_out[True], *held_out[False])
    gold = [float(alike) for alike, some in held_out.items() for _ in some]
    evaluator = EmbeddingSimilarityEvaluator(list(firsts), list(seconds), gold)

    model = SentenceTransformer(str(resolve_model(options.model)))
    before = evaluator(model)["spearman_cosine"]
    if options.method == "lora":
        model.add_adapter(LoraConfig(r=8, task_type="FEATURE_EXTRACTION"))
    else:
        model[0].model = LadderModel(model[0].model, LadderConfig(**SIDE_NETWORKS[options.method]))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    SentenceTransformerTrainer(
        model,
        SentenceTransformerTrainingArguments(
            str(options.output),
            num_train_epochs=1,
            per_device_train_batch_size=16,
            learning_rate=options.learning_rate,
            warmup_steps=0.1,
            seed=options.seed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_dict({"anchor": anchors, "positive": positives}),
        loss=MultipleNegativesRankingLoss(model),
    ).train()
    after = evaluator(model)["spearman_cosine"]
    model.save_pretrained(str(options.output))
    loaded = evaluator(SentenceTransformer(str(options.output)))["spearman_cosine"]
    print(
        f"{options.method}: {trained} parameters; Spearman {before:.3f} before, {after:.3f} after, {loaded:.3f} loaded"
    )
    return {"before": before, "after": after, "loaded": loaded}


if __name__ == "__main__":
    main()
