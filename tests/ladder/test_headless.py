"""A side network beside a model without a head gives hidden states, as embeddings need."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from backbones import IDS, MASK, dinov3, ladder, tiny, trainable
from pools import rows_of
from torch import Tensor
from torch.nn import functional as F

from bench.oracles.direct_run import DirectRun
from fastpeft import FastpeftError, LadderConfig, LadderModel, LadderPool, SivaConfig

BATCH = {"input_ids": IDS, "attention_mask": MASK}
T5 = {"num_layers": 3, "d_model": 16, "d_kv": 8}


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


@pytest.mark.parametrize("kind", ["Roberta", "Bert", "DistilBert", "ModernBert", "GPT2", "T5"])
def test_every_architecture_by_one_path(kind: str) -> None:
    base = tiny(kind, "EncoderModel", **T5) if kind == "T5" else tiny(kind, "Model")
    own = states(base)
    model = ladder(base)
    output = model.train()(**BATCH)
    assert type(output) is type(base(**BATCH))
    assert output.last_hidden_state.shape == own.shape
    assert model.config.causal is (kind == "GPT2")
    before = copy.deepcopy(model.state_dict())
    learned = train_a_little(model).state_dict()
    changed = {name for name, tensor in learned.items() if not tensor.equal(before[name])}
    assert changed == trainable(model).keys() == {f"side.{name}" for name, _ in model.side.named_parameters()}


def test_no_graph_below_the_side_network() -> None:
    model, seen, saved = ladder(tiny(head="Model")).train(), [], []
    embeddings = model.base.embeddings.word_embeddings(IDS).detach().requires_grad_()
    for module in model.base.encoder.modules():
        module.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        output = model(inputs_embeds=embeddings, attention_mask=MASK)
    output.last_hidden_state.square().sum().backward()
    assert embeddings.grad is None
    assert not any(seen[:-2])  # the last layer and the encoder itself return after the side network
    frozen = {p.data_ptr() for p in model.base.embeddings.parameters()}
    frozen |= {p.data_ptr() for p in model.base.encoder.parameters()}
    assert not frozen & {tensor.data_ptr() for tensor in saved}


def test_a_mix_begins_as_the_pretrained_model() -> None:
    base = tiny(head="Model")
    own = states(base)
    assert states(ladder(base, output_mix="add")).equal(own)
    assert not states(ladder(base)).allclose(own)


@pytest.mark.parametrize("config", [{}, {"output_mix": "add", "window_size": 5}, {"window_size": 1, "fusion": "gated"}])
def test_both_forms_agree(config: dict[str, Any]) -> None:
    model = train_a_little(ladder(tiny(head="Model"), **config))
    expected = states(model)
    model.side_run = DirectRun
    torch.testing.assert_close(states(model), expected, rtol=1e-5, atol=1e-6)


def test_training_repeats_to_the_bit() -> None:
    first, second = (train_a_little(ladder(tiny(head="Model"), feature_dropout=0.2)).state_dict() for _ in range(2))
    assert all(tensor.equal(second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_backbone(dtype: torch.dtype) -> None:
    model = train_a_little(ladder(tiny(head="Model").to(dtype)))
    assert states(model).dtype is dtype
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.float32}


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


def test_cached_features(tmp_path: Path) -> None:
    model = ladder(tiny(head="Model")).eval()
    expected = states(model)
    cache = model.cache_features(tmp_path)
    assert cache is not None
    for _ in range(2):
        torch.testing.assert_close(states(model)[MASK.bool()], expected[MASK.bool()], rtol=1e-2, atol=5e-3)
    assert (cache.hits, cache.misses) == (3, 3)


def test_a_pool_answers_with_hidden_states(tmp_path: Path) -> None:
    pool = LadderPool(tiny(head="Model"))
    for name in ("first", "second"):
        train_a_little(pool.add(name, LadderConfig(window_size=3, reduction_factor=2)), steps=1 + len(pool.tasks))
    pool["first"].save_pretrained(tmp_path)
    pool.add("third", tmp_path)
    tasks = ["second", "first", "third"]
    for row, (task, answer) in enumerate(zip(tasks, pool(BATCH, tasks))):
        torch.testing.assert_close(answer.last_hidden_state, states(pool[task], **rows_of(BATCH, row))[0])


def test_an_encoder_with_the_name_of_a_body_leaves_no_head() -> None:
    model = ladder(dinov3())
    assert all(name.startswith("side.") for name in trainable(model))


def test_what_is_refused() -> None:
    with pytest.raises(FastpeftError, match="a RobertaModel, has no head, so it makes no loss of labels"):
        ladder(tiny(head="Model"))(IDS, labels=torch.tensor([0, 1, 2]))

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
