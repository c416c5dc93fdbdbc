"""Tiny backbones of many architectures, one batch for all of them, side networks beside them, and a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from fastpeft import LadderConfig, LadderModel

TINY = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "num_labels": 3,
}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}
OWN_SHAPE = {
    "DistilBert": {"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 32, **TINY},
    "ModernBert": {**TINY, **SPECIAL, "cls_token_id": 1, "sep_token_id": 2},
    "GPT2": {**TINY, **SPECIAL},
    "Electra": {**TINY, "embedding_size": 12},
    "MobileBert": {**TINY, "embedding_size": 12, "intra_bottleneck_size": 8},
}
IDS = torch.randint(3, 30, (3, 9), generator=torch.Generator().manual_seed(2))
MASK = torch.ones(3, 9, dtype=torch.long)
MASK[0, 6:] = 0
IDS[MASK == 0] = 0


def tiny(kind: str = "Roberta", head: str = "ForSequenceClassification", **changes: Any) -> Any:
    """A randomly initialised model, the same at every call."""
    config = getattr(transformers, f"{kind}Config")(**{**OWN_SHAPE.get(kind, TINY), **changes})
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}{head}")(config).eval()


def ladder(base: nn.Module | None = None, **config: Any) -> LadderModel:
    base = tiny() if base is None else base
    torch.manual_seed(1)
    return LadderModel(base, LadderConfig(**{"window_size": 3, "reduction_factor": 2, **config}))


def moved(base: Any, **config: Any) -> LadderModel:
    """A ladder whose side network's parameters are all far from their start."""
    model = ladder(base, **config)
    with torch.no_grad():
        for parameter in model.side.parameters():
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


def vit(**changes: Any) -> Any:
    """A vision transformer for images `(B, 1, 8, 8)` with three classes."""
    shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    image = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 3}
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(transformers.ViTConfig(**{**shape, **image, **changes})).eval()


def sees_images(**tokens: int) -> Any:
    """A decoder beside a model of images, whose own configuration is a part of theirs.

    Args:
        tokens: the ids of those that stand for images.
    """
    text = {**TINY, "num_key_value_heads": 2, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    seen = {"embed_dim": 16, "hidden_size": 16, "num_heads": 2, "depth": 2, "mlp_ratio": 2, "patch_size": 4}
    torch.manual_seed(0)
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=seen, **tokens)
    return transformers.Qwen2VLForConditionalGeneration(config).eval()


def dinov3() -> Any:
    """A vision model without a head for images `(B, 1, 8, 8)`; its encoder's name is that of a body."""
    shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    config = transformers.DINOv3ViTConfig(**shape, image_size=8, patch_size=4, num_channels=1)
    return transformers.DINOv3ViTModel(config).eval()


def classifier(checkpoint: Path, **arguments: Any) -> Any:
    """A pretrained model with a new head of three classes, the same at every call."""
    torch.manual_seed(3)
    arguments = {"dtype": torch.float32, "id2label": {0: "bad", 1: "so-so", 2: "good"}, **arguments}
    return transformers.AutoModelForSequenceClassification.from_pretrained(checkpoint, **arguments)


def quantise_a_layer(base: Any) -> Any:
    """Give a RoBERTa a weight in int8, as libraries do that quantise; the layer returns zeros."""
    linear = base.roberta.encoder.layer[0].output.dense
    linear.forward = lambda x: x.new_zeros(*x.shape[:-1], 16)  # instead of dequantising
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    return base


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def train_a_little(model: Any, steps: int = 3, lr: float = 1e-2) -> Any:
    """Steps of a plain optimizer over all that trains."""
    model.train()
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        model(IDS, attention_mask=MASK, labels=torch.tensor([0, 1, 2])).loss.backward()
        optimizer.step()
    return model.eval()


def labels(head: str) -> dict[str, Tensor]:
    if head == "ForQuestionAnswering":
        return {"start_positions": torch.tensor([1, 0, 2]), "end_positions": torch.tensor([2, 4, 5])}
    if head == "ForSequenceClassification":
        return {"labels": torch.tensor([0, 1, 2])}
    return {"labels": IDS % 3 if head == "ForTokenClassification" else IDS}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS, attention_mask=MASK).logits
