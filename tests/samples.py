"""Tiny models and data that the tests share."""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = {
    "negative": ("awful", "dull", "clumsy", "tedious"),
    "positive": ("lovely", "brilliant", "touching", "funny"),
    "mixed": ("uneven", "odd", "passable", "slight"),
}
_FILLERS = ("the", "a", "film", "plot", "scene", "actor", "is", "was", "very", "rather", "and", "with", "story", "end")
_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


def reviews(rows: int, labels: Sequence[str] = ("negative", "positive"), seed: int = 0) -> list[tuple[str, str]]:
    """Made-up (text, label) rows that a tiny model can learn: each text has one word that tells its label."""
    generator = random.Random(seed)
    made = []
    for row in range(rows):
        label = labels[row % len(labels)]
        words = generator.choices(_FILLERS, k=generator.randint(3, 14))
        words.insert(generator.randint(0, len(words)), generator.choice(WORDS[label]))
        made.append((" ".join(words), label))
    return made


def write_csv(file: Path, rows: Sequence[Sequence[Any]], header: Sequence[str] = ("text", "label")) -> Path:
    """Write a csv file with a header."""
    with open(file, "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])
    return file


def save_tiny_model(folder: Path, kind: str = "Roberta", head: str = "ForMaskedLM", **changes: Any) -> Path:
    """Save a randomly initialised model of two layers, and its tokenizer, as a pretrained checkpoint."""
    vocabulary = [*_SPECIAL, *_FILLERS, *(word for words in WORDS.values() for word in words)]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token="<mask>",
        model_max_length=38,
    )
    shape = {
        "vocab_size": len(vocabulary),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 40,
        "type_vocab_size": 1,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
    }
    config = getattr(transformers, f"{kind}Config")(**{**shape, **changes})
    torch.manual_seed(0)
    getattr(transformers, f"{kind}{head}")(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
