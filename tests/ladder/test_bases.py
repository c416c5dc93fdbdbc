"""Bases other than language models: transformers' models of images, and what is asked of a base's problem."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import cpu_offload
from backbones import IDS, ladder, tiny, trainable, vit
from script_files import EXAMPLES, load_script
from torch import nn

from fastpeft import FastpeftError, LadderConfig, LadderModel

IMAGES = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
NETWORKS = [{}, {"window_size": 1, "fusion": "gated"}, {"output_mix": "add", "layer_drop": 0.5}]


def test_what_trains_and_what_stays() -> None:
    model = ladder(vit()).train()
    before = copy.deepcopy(model.base.state_dict())
    trained = trainable(model)
    head = ["classifier.weight", "classifier.bias"]
    assert [name.removeprefix("base.") for name in trained if not name.startswith("side.")] == head
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        output = model(pixel_values=IMAGES, labels=torch.arange(3))
        output.loss.backward()
        losses.append(output.loss.item())
        assert [name for name, p in trained.items() if p.grad is None] == []
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]
    assert {name for name, tensor in model.base.state_dict().items() if not tensor.equal(before[name])} == set(head)


@pytest.mark.parametrize("options", NETWORKS)
def test_save_and_load_to_the_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    vit().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    model = ladder(base, **options).eval()
    for parameter in trainable(model).values():
        parameter.data += 0.1
    model.save_pretrained(tmp_path / "ladder")
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "ladder")
    assert isinstance(loaded, LadderModel)
    with torch.no_grad():
        assert loaded(pixel_values=IMAGES).logits.equal(model(pixel_values=IMAGES).logits)


def test_a_body_that_the_model_does_not_name() -> None:
    """`base_model` of CLIP's classifier of images is itself."""
    tower = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    image = {"image_size": 8, "patch_size": 4, "num_channels": 1}
    config = transformers.CLIPConfig(vision_config=tower | image, text_config=tower | {"hidden_size": 24}, num_labels=3)
    base = transformers.CLIPForImageClassification(config)
    if not isinstance(base.vision_model, transformers.PreTrainedModel):  # in transformers 5.0
        with pytest.raises(FastpeftError, match="no head separate from its body"):
            ladder(base)
        return
    model = ladder(base)
    assert model.side.hidden_size == 16
    assert {name for name in trainable(model) if name.startswith("base")} == {
        "base.classifier.weight",
        "base.classifier.bias",
    }
    assert model(pixel_values=IMAGES).logits.shape == (len(IMAGES), 3)


def test_a_model_that_names_no_embeddings_is_saved(tmp_path: Path) -> None:
    shape = {"num_encoder_blocks": 1, "depths": [2], "sr_ratios": [1], "hidden_sizes": [16], "num_channels": 1}
    stage = {"patch_sizes": [3], "strides": [2], "num_attention_heads": [2], "mlp_ratios": [2], "num_labels": 3}
    base = transformers.SegformerForImageClassification(transformers.SegformerConfig(**shape, **stage)).eval()
    (layers,) = (name for name, part in base.named_modules() if isinstance(part, nn.ModuleList) and len(part) == 2)
    model = ladder(copy.deepcopy(base), feature_modules=layers).eval()
    model.save_pretrained(tmp_path)
    loaded = LadderModel.from_pretrained(tmp_path, base=base).eval()
    assert loaded(pixel_values=IMAGES).logits.equal(model(pixel_values=IMAGES).logits)


def test_the_problem_type_that_is_asked_for_is_the_bases_too() -> None:
    """Whose head computes the loss, by the dtype of labels if nothing else is said."""
    labels = torch.randn(3, 3)
    model = LadderModel(tiny(num_labels=3), LadderConfig(reduction_factor=4, problem_type="regression")).eval()
    output = model(IDS, labels=labels)
    torch.testing.assert_close(output.loss, (output.logits - labels).square().mean())
    with pytest.raises(FastpeftError, match="the base's is 'regression'"):
        LadderModel(model.base, LadderConfig(reduction_factor=4, problem_type="multi_label_classification"))
    with pytest.raises(FastpeftError, match="problem_type='multi_label'; allowed are 'regression'"):
        LadderModel(tiny(num_labels=3), LadderConfig(reduction_factor=4, problem_type="multi_label"))


def test_the_problem_that_the_bases_head_sees_in_labels_is_told_to_pipelines() -> None:
    """As a transformers model tells it: its pipelines give a number as it is, and of several labels the sigmoid."""
    for labels, problem in ((torch.randn(3, 1), "regression"), (torch.ones(3, 2), "multi_label_classification")):
        model = LadderModel(tiny(num_labels=labels.shape[1]), LadderConfig(reduction_factor=4))
        model(IDS, labels=labels)
        assert model.config.problem_type == problem


@pytest.mark.long
def test_the_vit_example_learns(tmp_path: Path) -> None:
    accuracy = load_script(EXAMPLES / "vit_digits.py").main(["--tiny", "--output", str(tmp_path)])
    assert accuracy["after"] > accuracy["before"] + 0.3
    assert (tmp_path / "model.safetensors").is_file()


def test_an_offloaded_base_is_refused() -> None:
    """Its weights would be on the meta device, and so the side network."""
    base = tiny()
    cpu_offload(base, execution_device=torch.device("cpu"))
    with pytest.raises(FastpeftError, match=r"embeddings: accelerate keeps .* device_map"):
        LadderModel(base, LadderConfig())


def test_inputs_that_are_not_the_bases_are_refused() -> None:
    with pytest.raises(FastpeftError, match="got neither input_ids, inputs_embeds nor pixel_values"):
        ladder(vit())()
    with pytest.raises(FastpeftError, match="got inputs, which it does not take"):
        ladder(vit())(pixel_values=IMAGES, inputs=IMAGES)


def test_what_is_no_transformers_model_is_refused() -> None:
    with pytest.raises(FastpeftError, match=r"the base is a Sequential; give a transformers model"):
        LadderModel(nn.Sequential(nn.Linear(8, 3)), LadderConfig(feature_modules=["0"]))
