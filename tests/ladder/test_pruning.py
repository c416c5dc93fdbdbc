"""A side network that starts from its backbone: which weights it takes over, and what it does with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from backbones import IDS, classifier, ladder, logits, quantise_a_layer, tiny, trainable, vit
from torch import Tensor, nn

from fastpeft import FastpeftError, LadderModel, SivaConfig

KEPT = [1, 2, 5, 6, 8, 11, 12, 15]  # channels of 16


def parts(model: LadderModel, layer: int) -> list[nn.Linear]:
    """Query, key, value, output and the two of the feed-forward part of a RoBERTa's layer."""
    block = model.base.roberta.encoder.layer[layer]
    attention = block.attention.self
    return [
        attention.query,
        attention.key,
        attention.value,
        block.attention.output.dense,
        block.intermediate.dense,
        block.output.dense,
    ]


def uneven(head: str = "ForSequenceClassification") -> Any:
    """A RoBERTa whose channels in `KEPT` have much larger weights than the others, and rows of all sizes."""
    base = tiny("Roberta", head)
    scale = torch.full((16,), 0.01)
    scale[KEPT] = 1.0
    generator = torch.Generator().manual_seed(3)
    for module in base.roberta.encoder.modules():
        if isinstance(module, nn.Linear):
            n, k = module.weight.shape
            module.weight.data.mul_(torch.rand(n, 1, generator=generator)).mul_(torch.rand(1, k, generator=generator))
            module.bias.data.normal_(generator=generator)
    for layer in base.roberta.encoder.layer:
        attention = layer.attention.self
        for reader in (attention.query, attention.key, attention.value, layer.intermediate.dense):
            reader.weight.data.mul_(scale)
        for writer in (layer.attention.output.dense, layer.output.dense):
            writer.weight.data.mul_(scale[:, None])
    return base


def largest(first: Tensor, second: Tensor, count: int) -> list[int]:
    """The rows of `first` that are largest together with the columns of `second`, one by one."""
    sums = [float(first[i].abs().sum() + second[:, i].abs().sum()) for i in range(len(first))]
    return sorted(sorted(range(len(sums)), key=lambda i: -sums[i])[:count])


def test_weights_of_which_an_adapter_holds_a_part_are_refused() -> None:
    with pytest.raises(FastpeftError, match=r"init='pruned'.* PEFT has an adapter in them"):
        ladder(peft.get_peft_model(tiny(), SivaConfig(r=2)), init="pruned")


@pytest.mark.parametrize("heads", [1, 2])
@torch.no_grad()
def test_the_largest_channels_rows_and_neurons_stay(heads: int) -> None:
    model = ladder(uneven(), init="pruned", num_heads=heads)
    selection = torch.eye(16)[KEPT]
    assert model.side.down.weight.equal(selection)
    assert model.side.up.weight.equal(selection.mT)
    assert not model.side.down.bias.any()
    assert not model.side.up.bias.any()
    for projection in model.side.projections.values():
        assert all(part.equal(selection) for part in projection.weight.split(8))
    for number, block in enumerate(model.side.blocks):
        layers = parts(model, number)
        q, k, v, o, inner, outer = (layer.weight for layer in layers)
        q, k, v, inner, o, outer = q[:, KEPT], k[:, KEPT], v[:, KEPT], inner[:, KEPT], o[KEPT], outer[KEPT]
        scored, carried, firing = largest(q, k.mT, 8), largest(v, o, 8), largest(inner, outer, 32)
        assert block.qkv.weight.equal(torch.cat([q[scored], k[scored], v[carried]]))
        biases = [layers[0].bias[scored], layers[1].bias[scored], layers[2].bias[carried]]
        assert block.qkv.bias.equal(torch.cat(biases))
        assert block.attention_output.weight.equal(o[:, carried])
        assert block.attention_output.bias.equal(layers[3].bias[KEPT])
        assert block.feed_forward_in.weight.equal(inner[firing])
        assert block.feed_forward_in.bias.equal(layers[4].bias[firing])
        assert block.feed_forward_out.weight.equal(outer[:, firing])
        assert block.feed_forward_out.bias.equal(layers[5].bias[KEPT])
        assert block.fusion.query.weight.equal(q[scored])
        assert block.fusion.key.weight.equal(k[scored])
        carry = block.fusion.value.weight if heads == 1 else block.fusion.output.weight @ block.fusion.value.weight
        torch.testing.assert_close(carry, o[:, carried] @ v[carried])


@torch.no_grad()
@pytest.mark.parametrize("step", [1, 2])
def test_at_full_width_a_side_block_is_the_backbones_layer(step: int) -> None:
    """But for the norms, which start as new ones: those of a new backbone too."""
    base = tiny(intermediate_size=64)
    for layer in base.roberta.encoder.layer:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                module.weight.data.mul_(10)
                module.bias.data.normal_()
            elif isinstance(module, nn.LayerNorm):
                module.eps = 1e-5
    model = ladder(base, reduction_factor=1, side_heads=2, init="pruned", layers_per_block=step).eval()
    x = torch.randn(3, 5, 16)
    layers = base.roberta.encoder.layer[-1::-step][::-1]
    for block, layer in zip(model.side.blocks, layers, strict=True):
        block.fusion.forward = lambda theta, *_: theta
        expected = layer(x)
        expected = expected[0] if isinstance(expected, tuple) else expected
        torch.testing.assert_close(block(x, x[:, None], None, None, 0, None), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_query_key_and_value_are_told_by_their_names() -> None:
    """OPT has the key first, then the value, then the query."""
    base = tiny("OPT", ffn_dim=32, word_embed_proj_dim=16)
    layer = base.model.decoder.layers[0].self_attn
    for projection in (layer.q_proj, layer.k_proj, layer.v_proj):
        projection.weight.data.normal_()
    block = ladder(base, init="pruned", reduction_factor=1).side.blocks[0]
    assert block.qkv.weight.equal(torch.cat([layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight]))


def test_gated_and_shared_projections_select_too() -> None:
    gated = ladder(uneven(), init="pruned", window_size=1, fusion="gated", share_projections=True)
    assert gated.side.shared_projection.weight.equal(torch.eye(16)[KEPT])
    assert not gated.side.shared_projection.bias.any()
    assert gated(IDS).logits.isfinite().all()


def test_neurons_that_the_backbone_lacks_stay_random() -> None:
    torch.manual_seed(1)
    model = ladder(tiny(intermediate_size=8), init="pruned")
    block = model.side.blocks[0]
    inner = model.base.roberta.encoder.layer[0].intermediate.dense.weight
    assert all(any(row.equal(other) for row in block.feed_forward_in.weight[:8]) for other in inner[:, channels(model)])
    assert block.feed_forward_in.weight[8:].ne(0).all()


def channels(model: LadderModel) -> list[int]:
    return model.side.down.weight.argmax(dim=1).tolist()


def test_layers_without_biases() -> None:
    side = ladder(vit(qkv_bias=False), init="pruned").side
    assert not side.blocks[0].qkv.bias.any()
    assert side.blocks[0].qkv.weight.any()


def test_what_is_loaded_is_not_pruned_again(tmp_path: Path, checkpoint: Path) -> None:
    model = ladder(classifier(checkpoint), init="pruned")
    for parameter in trainable(model).values():
        parameter.data += 0.1
    model.eval().save_pretrained(tmp_path / "ladder")
    loaded = LadderModel.from_pretrained(tmp_path / "ladder")
    assert logits(loaded).equal(logits(model))
    assert loaded.config.init == "pruned"
    quantised = quantise_a_layer(classifier(checkpoint))
    LadderModel.from_pretrained(tmp_path / "ladder", base=quantised)
    with pytest.raises(FastpeftError, match=r"not quantised; a RobertaLayer has .*int8 \(16, 32\)"):
        ladder(quantised, init="pruned")


@pytest.mark.parametrize(
    ("base", "config", "message"),
    [
        (lambda: tiny("GPT2"), {}, "a GPT2Block has none"),
        (lambda: tiny("ModernBert"), {}, r"a ModernBertEncoderLayer has Wqkv float32 \(48, 16\)"),
        (lambda: nn.Sequential(nn.Linear(16, 16)), {"feature_modules": ["0"]}, r"a Linear has float32 \(16, 16\)"),
        (
            lambda: nn.Sequential(nn.Sequential(nn.Sequential(*(nn.Linear(16, 16) for _ in range(6))))),
            {"feature_modules": ["0"], "feature_sizes": [16, 16]},
            r"q, k or v in the names of .*; a Sequential has 0 float32 \(16, 16\)",
        ),
    ],
)
def test_layers_of_another_make_are_refused(base: Any, config: dict[str, Any], message: str) -> None:
    with pytest.raises(FastpeftError, match=f"init='pruned' takes over layers of six .*{message}.* init='random'"):
        ladder(base(), init="pruned", **config)
