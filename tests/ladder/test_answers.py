"""A base must answer by the output of its last layer alone, or a side network in its place would be passed by."""

from __future__ import annotations

import pytest
import torch
import transformers
from backbones import IDS, SPECIAL, TINY, moved, tiny, vit
from torch import nn

from fastpeft import FastpeftError
from fastpeft.ladder.backbone import Backbone
from fastpeft.ladder.probe import check_answers

XLM = {"vocab_size": 50, "emb_dim": 16, "n_layers": 3, "n_heads": 2, "num_labels": 3}
CHARACTERS = {**SPECIAL, "local_transformer_stride": 8}
SHAPE = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
IMAGE = {"image_size": 16, "patch_size": 8, "num_labels": 3}
MAPS = {"neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 16}
OF_ALL_LAYERS = {  # class: configuration, layers
    "BeitForSemanticSegmentation": (
        transformers.BeitConfig(**SHAPE, image_size=32, patch_size=8, out_indices=[1, 2, 3, 4], pool_scales=[1, 2]),
        "beit.layers",
    ),
    "DPTForDepthEstimation": (
        transformers.DPTConfig(**SHAPE, **IMAGE, **MAPS, is_hybrid=False, backbone_out_indices=[0, 1, 2, 3]),
        "dpt.encoder.layer",
    ),
    "SegformerForSemanticSegmentation": (  # names no size of images
        transformers.SegformerConfig(hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 1, 2, 2]),
        "segformer.stages.3.blocks",
    ),
    "CLIPSegForImageSegmentation": (  # reads a text too
        transformers.CLIPSegConfig(
            text_config={**SHAPE, **SPECIAL, "vocab_size": 200},
            vision_config={**SHAPE, **IMAGE},
            projection_dim=16,
            reduce_dim=16,
            extract_layers=[1, 2, 3],
            decoder_num_attention_heads=2,
        ),
        "clip.vision_model.encoder.layers",
    ),
}


def xlm(kind: str) -> nn.Module:
    model = getattr(transformers, f"{kind}ForSequenceClassification")
    return model(getattr(transformers, f"{kind}Config")(**XLM)).eval()


@pytest.mark.parametrize("causal", [None, False])
@pytest.mark.parametrize("kind", ["XLM", "Flaubert"])
def test_parts_of_layers_are_refused(kind: str, causal: bool | None) -> None:
    """Their lists of modules hold parts of layers, whose outputs are added to the backbone's stream."""
    with pytest.raises(FastpeftError, match=r"comes not from the output of transformer\.ffns\.2 alone"):
        moved(xlm(kind), causal=causal)
    model = moved(xlm(kind), feature_modules="transformer.layer_norm2")  # which ends each layer
    before = model(IDS).logits
    nn.init.zeros_(model.side.up.weight)
    assert not model(IDS).logits.allclose(before)
    assert model(IDS).logits.std(0).max() < 1e-6  # nothing else tells one text from another


def test_layers_that_the_head_does_not_read_are_refused() -> None:
    """The classes of CANINE come from its molecules of characters, and its tags from what follows them."""
    named = {"feature_modules": "canine.final_char_encoder.layer"}
    with pytest.raises(FastpeftError, match=r"comes not from the output of canine\.final_char_encoder\.layer\.0 alone"):
        moved(tiny("Canine", **CHARACTERS), **named)
    tags = moved(tiny("Canine", "ForTokenClassification", **CHARACTERS), **named)
    assert tags(IDS).logits.shape == (*IDS.shape, TINY["num_labels"])


@pytest.mark.parametrize("kind", OF_ALL_LAYERS)
def test_heads_of_images_that_read_several_layers_are_refused(kind: str) -> None:
    config, layers = OF_ALL_LAYERS[kind]
    base = getattr(transformers, kind)(config).eval()
    with pytest.raises(FastpeftError, match=rf"of the {kind} comes not from the output of {layers}\.\d alone"):
        moved(base, feature_modules=layers)


@pytest.mark.parametrize("mode", [True, False])
def test_a_pass_over_images_leaves_no_trace(mode: bool) -> None:
    """A head of images with the statistics of a batch, which passes in training mode would change."""
    base = vit()
    base.classifier = nn.Sequential(nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 3))
    base.train(mode)
    before, state = {name: value.clone() for name, value in base.state_dict().items()}, torch.get_rng_state()
    check_answers(Backbone(base))
    assert torch.get_rng_state().equal(state)
    assert all(value.equal(before[name]) for name, value in base.state_dict().items())
    assert all(module.training is mode for module in base.modules())


def test_heads_of_images_that_read_the_last_layer_are_kept() -> None:
    """ViTMAE draws the patches that it reads, and SegFormer's classes come from its last stage."""
    small = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    moved(
        transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**SHAPE, **IMAGE, **small)),
        feature_modules="vit.layers",
    )
    config, layers = OF_ALL_LAYERS["SegformerForSemanticSegmentation"]
    moved(transformers.SegformerForImageClassification(config), feature_modules=layers)


def test_a_head_that_reads_beside_layers_of_several_rows_an_image_is_refused() -> None:
    """MobileViT's layers have a row for each place in a patch, and a convolution joins what they made with what was."""
    sizes = {"hidden_sizes": [16, 16, 16], "neck_hidden_sizes": 7 * [8], "num_attention_heads": 2, "num_labels": 3}
    torch.manual_seed(0)
    base = transformers.MobileViTForImageClassification(transformers.MobileViTConfig(image_size=64, **sizes))
    for module in base.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    base.train()(torch.randn(4, 3, 64, 64))  # statistics, without which no image differs from another
    joins = base.mobilevit.encoder.layer[4].fusion.convolution
    nn.init.normal_(joins.weight[:, :8])  # of what was
    named = {"feature_modules": "mobilevit.encoder.layer.4.transformer.layer"}
    with pytest.raises(FastpeftError, match=r"comes not from the output of mobilevit\.encoder\.layer\.4\.\S+ alone"):
        moved(base.eval(), **named)
