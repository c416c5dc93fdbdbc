"""Backbones other than language models: a vision transformer, and modules that are no transformers model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from accelerate import cpu_offload
from backbones import IDS, ladder, tiny, trainable, vit
from safetensors.torch import load_file
from script_files import EXAMPLES, load_script
from torch import Tensor, nn
from trainers import quiet

from fastpeft import FastpeftError, LadderConfig, LadderModel
from fastpeft.ladder.backbone import Backbone
from fastpeft.ladder.passes import skip_layers

LABELS = torch.tensor([0, 1, 2])
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def perceptron() -> nn.Sequential:
    """Features of the widths 8, 24 and 16, one token each."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 3)).eval()


def convolutions(**arguments: Any) -> nn.Sequential:
    """Features of 1, 8 and 16 channels, 64 tokens each; a norm with running statistics is in between."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 16, 3, **{"padding": 1, **arguments}),
        nn.BatchNorm2d(16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 3),
    ).eval()


class Texts(nn.Module):
    """A module whose layers run in a loop, with a parameter of its own, that reads tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.ones(16))
        self.embedding = nn.Embedding(50, 16)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(3))
        self.head = nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) * self.scale
        for block in self.blocks:
            x = block(src=x, is_causal=False)
        logits: Tensor = self.head(x[:, 0])
        return logits


class Padded(nn.Module):
    """An encoder of torch's own, whose padding is 0."""

    def __init__(self, rows_first: bool, **arguments: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=rows_first)
        self.embedding, self.rows_first = nn.Embedding(50, 16), rows_first
        self.encoder = nn.TransformerEncoder(layer, 3, **arguments)
        self.head = nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x, padding = self.embedding(ids), ids == 0
        x = self.encoder(x if self.rows_first else x.transpose(0, 1), src_key_padding_mask=padding)
        logits: Tensor = self.head(x[:, 0] if self.rows_first else x[0])
        return logits


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
TEXTS = torch.randint(3, 30, (3, 6), generator=torch.Generator().manual_seed(1))
NORM = ("3.weight", "3.bias")
BASES: dict[str, tuple[Callable[[], Any], Any, dict[str, Any], list[str]]] = {
    "vit": (vit, IMAGES, {}, ["classifier.weight", "classifier.bias"]),
    "perceptron": (perceptron, X, {"feature_modules": ["0", "2"]}, ["4.weight", "4.bias"]),
    "convolutions": (
        convolutions,
        IMAGES,
        {"feature_modules": ["0", "2"]},
        ["3.weight", "3.bias", "6.weight", "6.bias"],
    ),
    "texts": (Texts().eval, TEXTS, {"feature_modules": "blocks"}, ["head.weight", "head.bias"]),
}


class Pair(nn.Sequential):
    """A module that returns more than its logits."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x


def made(kind: str, **changes: Any) -> LadderModel:
    make, _, config, _ = BASES[kind]
    return ladder(copy.deepcopy(make()), **{**config, **changes})


def run(model: LadderModel, kind: str, **arguments: Any) -> Any:
    return model(**{model.main_input_name: BASES[kind][1]}, **arguments)


@pytest.mark.parametrize("kind", BASES)
def test_what_trains_and_what_stays(kind: str) -> None:
    model = made(kind).train()
    before = copy.deepcopy(model.base.state_dict())
    trained = trainable(model)
    assert [name.removeprefix("base.") for name in trained if not name.startswith("side.")] == BASES[kind][3]
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        output = run(model, kind, labels=LABELS)
        output.loss.backward()
        losses.append(output.loss.item())
        assert [name for name, p in trained.items() if p.grad is None] == []
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]
    state = model.base.state_dict()
    changed = {name for name, tensor in state.items() if not tensor.equal(before[name])}
    statistics = {f"3.{name}" for name in STATISTICS} if kind == "convolutions" else set()
    assert changed == set(BASES[kind][3]) | statistics


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize(
    "options", [{}, {"window_size": 1, "fusion": "gated"}, {"output_mix": "add", "layer_drop": 0.5}]
)
def test_save_and_load_to_the_bit(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    model = made(kind, **options).train()
    run(model, kind)  # moves running statistics of the head
    model.eval()
    for parameter in trainable(model).values():
        parameter.data += 0.1
    model.save_pretrained(tmp_path)
    loaded = LadderModel.from_pretrained(tmp_path, base=copy.deepcopy(BASES[kind][0]()))
    with torch.no_grad():
        assert run(loaded, kind).logits.equal(run(model, kind).logits)
    kept = {f"base.3.{name}" for name in STATISTICS} if kind == "convolutions" else set()
    assert load_file(tmp_path / "model.safetensors").keys() == trainable(model).keys() | kept


def test_a_vision_model_by_its_name(tmp_path: Path) -> None:
    vit().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    model = ladder(base).eval()
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
    assert model.side.feature_sizes == 4 * [16]
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


def test_one_sequence_of_layers_is_taken_apart() -> None:
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)))
    base = nn.Sequential(layers, nn.Linear(8, 2))
    assert len(ladder(base, feature_modules="0").backbone.layers) == 3


def test_a_perceptron_computes_what_its_parts_do() -> None:
    model = made("perceptron").eval()
    zero, one, two, three, four = model.base
    first = zero(X)
    second = two(one(first))
    features = [feature[:, None] for feature in (X, first, second)]
    assert model.side.feature_sizes == [8, 24, 16]
    assert model.side.width == 12
    expected = four(three(model.side(features)[:, 0]))
    torch.testing.assert_close(run(model, "perceptron").logits, expected)


def test_activations_in_place_change_no_feature() -> None:
    def gradients(inplace: bool) -> list[Tensor]:
        base = perceptron()
        base[1], base[3] = nn.ReLU(inplace), nn.ReLU(inplace)
        model = ladder(base, feature_modules=["0", "2"], output_mix="add").train()
        nn.init.normal_(model.side.up.weight)
        model(inputs=X, labels=LABELS).loss.backward()
        return [p.grad for p in trainable(model).values()]

    assert all(one.equal(other) for one, other in zip(gradients(False), gradients(True), strict=True))


def test_channels_last_are_told_from_images() -> None:
    """As Swin's blocks have them."""
    model = ladder(nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24)), feature_modules=["0"])
    with pytest.raises(FastpeftError, match=r"shape \(2, 192, 8\), read from \(2, 8, 8, 24\) as \(B, C, H, W\)"):
        model(inputs=torch.randn(2, 8, 8, 24))


def test_convolutions_compute_what_their_parts_do() -> None:
    model = made("convolutions").eval()
    first = model.base[0](IMAGES)
    second = model.base[2](model.base[1](first))
    features = [torch.stack([image.flatten(1).t() for image in feature]) for feature in (IMAGES, first, second)]
    output = model.side(features)  # (B, 64, 16)
    image = torch.stack([tokens.t().reshape(16, 8, 8) for tokens in output])
    torch.testing.assert_close(run(model, "convolutions").logits, model.base[3:](image))


def test_padding_of_a_plain_module_is_kept_from_the_side_network() -> None:
    model, mask = made("texts").eval(), torch.ones(3, 6, dtype=torch.long)
    with torch.no_grad():
        whole = model(inputs=TEXTS).logits
        assert model(inputs=TEXTS, attention_mask=mask).logits.equal(whole)
        mask[0, 4:] = 0
        masked = model(inputs=TEXTS, attention_mask=mask).logits
    torch.testing.assert_close(masked[1:], whole[1:])
    assert not masked[0].allclose(whole[0])
    with pytest.raises(FastpeftError, match=r"attention_mask has the shape \(3, 5\).* here \(3, 6\)"):
        model(inputs=TEXTS, attention_mask=mask[:, 1:])


@pytest.mark.long(but="perceptron")
@pytest.mark.parametrize("kind", ["vit", "perceptron"])
def test_trainer(tmp_path: Path, kind: str) -> None:
    generator = torch.Generator().manual_seed(4)
    model = made(kind, layer_drop=0.2)
    name = model.main_input_name
    inputs = torch.randn(48, *BASES[kind][1].shape[1:], generator=generator)
    rows = [{name: x, "labels": int(x.mean() > 0)} for x in inputs]

    def trainer(model: LadderModel, folder: str) -> transformers.Trainer:
        settings = quiet(
            tmp_path / folder,
            max_steps=40,
            save_steps=20,
            eval_steps=20,
            eval_strategy="steps",
            logging_steps=1,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
        )
        return transformers.Trainer(model, settings, train_dataset=rows, eval_dataset=rows)

    whole = trainer(model, "whole")
    before = whole.evaluate()["eval_loss"]
    whole.train()
    assert whole.evaluate()["eval_loss"] < 0.7 * before
    resumed = trainer(made(kind, layer_drop=0.2), "parts")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-20"))  # what is dropped follows the seed
    expected = dict(model.named_parameters())
    assert all(p.equal(expected[name]) for name, p in resumed.model.named_parameters())


def test_over_a_peft_model_of_a_plain_module() -> None:
    torch.manual_seed(0)
    base = peft.get_peft_model(perceptron(), peft.LoraConfig(target_modules=["0"], init_lora_weights=False))
    model = ladder(base, feature_modules=["0", "2"]).train()
    run(model, "perceptron", labels=LABELS).loss.backward()
    trained = {name for name in trainable(model) if not name.startswith("side.")}
    assert trained == {"base.base_model.model.4.weight", "base.base_model.model.4.bias"}


def test_the_problem_type_that_is_asked_for_is_the_bases_too() -> None:
    """Whose head computes the loss, by the dtype of labels if nothing else is said."""
    labels = torch.randn(3, 3)
    model = LadderModel(tiny(num_labels=3), LadderConfig(reduction_factor=4, problem_type="regression")).eval()
    output = model(IDS, labels=labels)
    torch.testing.assert_close(output.loss, (output.logits - labels).square().mean())
    with pytest.raises(FastpeftError, match="the base's is 'regression'"):
        LadderModel(model.base, LadderConfig(reduction_factor=4, problem_type="multi_label_classification"))
    misspelt = LadderConfig(reduction_factor=4, feature_modules=["0", "2"], problem_type="multi_label")
    for base in (tiny(num_labels=3), perceptron()):
        misspelt.feature_modules = ["0", "2"] if isinstance(base, nn.Sequential) else None
        with pytest.raises(FastpeftError, match="problem_type='multi_label'; allowed are 'regression'"):
            LadderModel(base, misspelt)


def test_the_problem_that_the_bases_head_sees_in_labels_is_told_to_pipelines() -> None:
    """As a transformers model tells it: its pipelines give a number as it is, and of several labels the sigmoid."""
    for labels, problem in ((torch.randn(3, 1), "regression"), (torch.ones(3, 2), "multi_label_classification")):
        model = LadderModel(tiny(num_labels=labels.shape[1]), LadderConfig(reduction_factor=4))
        model(IDS, labels=labels)
        assert model.config.problem_type == problem


def test_losses_beside_a_plain_module() -> None:
    model = made("perceptron").eval()
    logits = run(model, "perceptron").logits
    classes = run(model, "perceptron", labels=LABELS)
    torch.testing.assert_close(classes.loss, -logits.log_softmax(-1).diagonal().mean())
    numbers = run(model, "perceptron", labels=torch.ones(3, 3))
    torch.testing.assert_close(numbers.loss, (logits - 1).square().mean())
    model.config.problem_type = "multi_label_classification"
    several = run(model, "perceptron", labels=torch.eye(3))
    expected = nn.functional.binary_cross_entropy_with_logits(several.logits, torch.eye(3))
    torch.testing.assert_close(several.loss, expected)
    as_tuple = run(model, "perceptron", labels=LABELS, return_dict=False, output_hidden_states=True)
    assert [part.shape for part in as_tuple[:2]] == [(), (3, 3)]
    assert [state.shape for state in as_tuple[2]] == [(3, 1, 12)] * 3
    for labels, message in (
        (torch.ones(3), r"\(3,\) and the logits \(3, 3\)\. Give numbers in the shape"),
        (torch.ones(3, 3).long(), r"\(3, 3\) and the logits \(3, 3\), whose last dimension is the classes"),
    ):
        with pytest.raises(FastpeftError, match=message):
            run(model, "perceptron", labels=labels)


def test_another_plain_module_is_refused(tmp_path: Path) -> None:
    made("convolutions").save_pretrained(tmp_path)
    for change in ("0.weight", "1.running_mean", "1.bias"):
        base = convolutions()
        base.state_dict()[change][0] += 1e-3
        with pytest.raises(FastpeftError, match="trained on another backbone: weights of the layers differ"):
            LadderModel.from_pretrained(tmp_path, base=base)
    base = convolutions()
    base[6].weight.data += 1  # of the head, which is loaded
    LadderModel.from_pretrained(tmp_path, base=base)
    with pytest.raises(FastpeftError, match=r"a base without a name of class Sequential.* base=model"):
        LadderModel.from_pretrained(tmp_path)


def test_a_plain_module_has_no_pass_without_layers() -> None:
    with (
        pytest.raises(FastpeftError, match="can run without its layers; the base is a Sequential"),
        skip_layers(Backbone(perceptron(), ["0", "2"]), torch.zeros(3, 1, 16), {}),
    ):
        pass


def test_widths_that_are_not_found_are_asked_for() -> None:
    layers = ["1", "3"]
    with pytest.raises(FastpeftError, match=r"a Tanh, holds no matrix\. Give them in feature_sizes"):
        made("perceptron", feature_modules=layers)
    with pytest.raises(FastpeftError, match="feature_sizes names 2 widths of 3 features"):
        made("perceptron", feature_modules=layers, feature_sizes=[24, 16])
    model = made("perceptron", feature_modules=layers, feature_sizes=[24, 24, 16])
    assert run(model, "perceptron").logits.shape == (3, 3)
    wrong = made("perceptron", feature_modules=layers, feature_sizes=[24, 16, 16])
    with pytest.raises(FastpeftError, match=r"layer 1 has the shape \(3, 1, 24\).* here \(3, 1, 16\).* feature_sizes"):
        run(wrong, "perceptron")


@pytest.mark.parametrize(
    ("base", "config", "given", "message"),
    [
        (lambda: convolutions(stride=2), {"feature_modules": ["0", "2"]}, IMAGES, r"layer 2 .*\(3, 16, 16\).*H W"),
        (Texts, {"feature_modules": ["embedding", "blocks.0"]}, TEXTS, r"layer 0 is int64 \(3, 6\); allowed are float"),
        (lambda: Pair(nn.Linear(8, 8)), {"feature_modules": ["0"]}, X, r"returned a tuple; .* a tensor\. Wrap"),
    ],
)
def test_features_that_do_not_fit_are_refused(base: Any, config: dict[str, Any], given: Tensor, message: str) -> None:
    model = ladder(base(), **config)
    with pytest.raises(FastpeftError, match=message):
        model(inputs=given)


@pytest.mark.parametrize("rows", [1, 3])
def test_tokens_before_rows_are_refused(rows: int) -> None:
    """As layers of torch have them by default: rows would see each other."""
    model = ladder(Padded(False, enable_nested_tensor=False), feature_modules="encoder.layers")
    with pytest.raises(FastpeftError, match=rf"\(6, {rows}, 16\) in a pass over {rows} rows: .* batch_first=True"):
        model(inputs=TEXTS[:rows])
    fits = ladder(Padded(True, enable_nested_tensor=False), feature_modules="encoder.layers").eval()
    together = fits(inputs=TEXTS).logits
    torch.testing.assert_close(fits(inputs=TEXTS[:rows]).logits, together[:rows])


def test_as_many_tokens_as_rows_by_chance_are_no_tokens_before_rows() -> None:
    """Beside a module that makes a row of each channel; a pass before has shown that."""

    class Channels(Texts):
        def forward(self, series: Tensor) -> Tensor:
            return super().forward(series.flatten(0, 1)).view(len(series), -1)

    model = ladder(Channels(), feature_modules="blocks").eval()
    series = torch.randint(3, 30, (6, 2, 6))
    with pytest.raises(FastpeftError, match=r"\(12, 6, 16\) in a pass over 6 rows"):
        model(inputs=series)  # which may be 12 tokens of 6 rows
    expected = model(inputs=series[:5]).logits
    torch.testing.assert_close(model(inputs=series).logits[:5], expected)


def test_nested_tensors_are_refused() -> None:
    with pytest.raises(FastpeftError, match=r"layer 0 is a nested tensor, .* with enable_nested_tensor=False"):
        ladder(Padded(True).eval(), feature_modules="encoder.layers")(inputs=IDS)


def test_a_head_that_is_made_before_the_layers_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Before(Texts):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = self._modules.pop("blocks")

    ladder(Texts(), feature_modules="blocks")
    ladder(Before().blocks, feature_modules=["0", "1", "2"])  # which are all
    assert "comes after" not in caplog.text
    ladder(Before(), feature_modules="blocks").save_pretrained(tmp_path)
    LadderModel.from_pretrained(tmp_path, base=Before())
    assert caplog.text.count("no parameter of the Before comes after its layers") == 1


def test_inputs_under_another_name_are_refused() -> None:
    with pytest.raises(FastpeftError, match="beside a Sequential got no inputs"):
        made("perceptron")(input_ids=X)
    with pytest.raises(FastpeftError, match="ViTForImageClassification got no input_ids, inputs_embeds or pix"):
        made("vit")(inputs=IMAGES)
    for kind, given in (
        ("perceptron", {"inputs": X, "start_positions": IDS[:, 0]}),
        ("vit", {"pixel_values": IMAGES, "inputs": IMAGES}),
    ):
        with pytest.raises(FastpeftError, match=r"got (start_positions|inputs), which it does not take"):
            made(kind)(**given)


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
