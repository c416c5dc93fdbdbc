"""A side network beside a model without a head gives hidden states, as embeddings need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from backbones import IDS, MASK, dinov3, ladder, tiny, trainable
from torch import Tensor
from torch.nn import functional as F

from fastpeft import FastpeftError, LadderModel, SivaConfig

BATCH = {"input_ids": IDS, "attention_mask": MASK}


def states(model: Any, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**(inputs or BATCH)).last_hidden_state
    return found


def train_a_little(model: LadderModel, steps: int = 3) -> LadderModel:
    """Steps that bring the first two texts together and the third away from them."""
    torch.manual_seed(4)
    optimizer = torch.optim.AdamW(trainable(model.train()).values(), lr=1e-2)
    for _ in range(steps):
        embeddings = F.normalize(model(**BATCH).last_hidden_state.mean(1), dim=-1)
        similarity = embeddings @ embeddings.T
        (similarity[0, 2] - similarity[0, 1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_a_mix_begins_as_the_pretrained_model() -> None:
    base = tiny(head="Model")
    own = states(base)
    assert states(ladder(base, output_mix="add")).equal(own)
    assert not states(ladder(base)).allclose(own)


@pytest.mark.parametrize("adapted", [False, True], ids=["side network", "with SiVA"])
def test_save_and_load_by_the_auto_class(tmp_path: Path, checkpoint: Path, adapted: bool) -> None:
    base: Any = transformers.AutoModel.from_pretrained(checkpoint, add_pooling_layer=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    if adapted:
        base = peft.get_peft_model(base, SivaConfig(r=2, layers_to_transform=[1], residual="implicit"))
    model = train_a_little(ladder(base, train_adapters=adapted))
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is LadderModel
    assert loaded.config.hidden_size == 16  # which libraries of embeddings read
    assert states(loaded).equal(states(model))
    said = transformers.pipeline("feature-extraction", str(tmp_path), tokenizer=tokenizer)("a lovely film")
    expected = states(model, **tokenizer("a lovely film", return_tensors="pt"))
    torch.testing.assert_close(torch.tensor(said), expected)


def test_an_encoder_with_the_name_of_a_body_leaves_no_head() -> None:
    model = ladder(dinov3())
    assert all(name.startswith("side.") for name in trainable(model))


def test_what_is_refused() -> None:
    class RobertaWithAClassifier(transformers.RobertaModel):
        """Whose head would not train."""

    with pytest.raises(FastpeftError, match="RobertaWithAClassifier has no head separate from its body"):
        ladder(RobertaWithAClassifier(tiny().config))
    tower = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    clip = transformers.CLIPModel(transformers.CLIPConfig(text_config=tower, vision_config=tower))
    with pytest.raises(FastpeftError, match=r"CLIPModel has no head.* load the model of one of them"):
        ladder(clip)
    sound = {"spec_size": 16, "num_mel_bins": 4, "patch_embeds_hidden_size": 8, "depths": [1], "hidden_size": 8}
    sound |= {"num_attention_heads": [1], "window_size": 2, "patch_stride": 2, "patch_size": 2, "projection_dim": 16}
    clap = transformers.ClapModel(transformers.ClapConfig(text_config=tower, audio_config=sound, projection_dim=16))
    with pytest.raises(FastpeftError, match=r"ClapModel has no head.* one for sound: load the model of one of them"):
        ladder(clap)
