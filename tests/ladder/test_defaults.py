"""What form a side network has where nobody says it, and what becomes of it when it is saved and taken over."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import ladder, moved, sees_images, tiny, trainable
from causal_models import PADDED, WORDS, causal_model
from torch import Tensor

from fastpeft import FastpeftError, LadderConfig, LadderModel, LadderPool
from fastpeft.methods.side_network import GATED

LST = dict(GATED)


def losses(model: Any, ids: Tensor, steps: int, lr: float = 1e-2) -> list[float]:
    """Of so many steps of training on one batch."""
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=lr)
    found = []
    for _ in range(steps):
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def spread(model: LadderModel) -> float:
    """How far the last states of a text's tokens, after its first, are from their mean, as a share of their size."""
    found: list[Tensor] = []
    model.side.up.register_forward_pre_hook(lambda _, args: found.append(args[0][0, 1:]))
    with torch.no_grad():
        model.eval()(input_ids=WORDS % 50)
    return float((found[0] - found[0].mean(0)).norm() / found[0].norm())


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering", "Model"])
def test_where_tokens_are_answered_for_they_start_apart(head: str) -> None:
    base = tiny(head=head, num_labels=2)
    assert spread(ladder(copy.deepcopy(base), window_size=9, residual=False)) < 1e-3
    assert spread(ladder(base, window_size=9)) > 0.4


def test_one_token_of_large_features_does_not_drown_the_others() -> None:
    """As the first token's are in a pretrained decoder."""
    base = causal_model("llama")
    base.model.embed_tokens.weight.data[WORDS[0, 0] % 50] *= 1e5
    assert spread(ladder(copy.deepcopy(base), window_size=9, normalise_features=False)) < 1e-3
    assert spread(ladder(base, window_size=9)) > 0.4


@pytest.mark.parametrize("residual", ["state", True, False])
def test_features_are_normalised_with_the_residual(residual: Any) -> None:
    assert ladder(tiny(), residual=residual).config.normalise_features is bool(residual)
    assert ladder(tiny(), residual=residual, normalise_features=True).config.normalise_features
    for head, expected in (
        ("ForSequenceClassification", False),
        ("ForMaskedLM", True),
        ("ForTokenClassification", "state"),
        ("ForQuestionAnswering", True),
        ("Model", True),
    ):
        assert ladder(tiny(head=head)).config.residual == expected
    gated = ladder(causal_model("llama"), **LST).config  # a gate mixes a token's own feature anyway
    assert (gated.residual, gated.normalise_features) == (False, True)
    classes = ladder(tiny("GPT2")).config
    assert (classes.residual, classes.normalise_features) == (False, True)


@pytest.mark.parametrize("network", [LST, {"window_size": 9}], ids=["LST", "9-LST"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "masked words"])
def test_beside_a_head_of_words_it_starts_as_its_model(kind: str, network: dict[str, Any]) -> None:
    base = (tiny(head="ForMaskedLM") if kind == "masked words" else causal_model(kind)).eval()
    inputs = {"input_ids": WORDS % 50, "attention_mask": PADDED}
    with torch.no_grad():
        expected = base(**inputs).logits
        model = ladder(base, **network)
        assert model.config.output_mix == "add"
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    before = {name: parameter.clone() for name, parameter in trainable(model).items()}
    losses(model, inputs["input_ids"], 3)
    still = [name for name, parameter in trainable(model).items() if parameter.equal(before[name])]
    assert not [name for name in still if name.endswith(".weight")]


def test_a_decoder_that_sees_images_too_is_taken_for_a_decoder() -> None:
    base = sees_images()
    with torch.no_grad():
        expected = base(input_ids=WORDS % 49).logits
    model = ladder(base)
    assert model.config.output_mix == "add"
    assert model.config.residual is True
    assert model.config.base_activation == "silu"
    assert (model.config.vocab_size, model.config.hidden_size) == (50, 16)
    assert all(name.startswith("side.") for name in trainable(model)), "not the LM head"
    torch.testing.assert_close(model(input_ids=WORDS % 49).logits, expected)


def test_beside_other_heads_the_output_is_the_side_networks() -> None:
    model = ladder(tiny())
    assert model.config.output_mix is False
    assert model.side.up.weight.any()


def test_what_was_saved_without_the_sum_loads_without_it(tmp_path: Path) -> None:
    model = moved(causal_model("llama"), output_mix=False).eval()
    model.save_pretrained(tmp_path)
    loaded = LadderModel.from_pretrained(tmp_path, base=causal_model("llama"))
    assert loaded.config.output_mix is False
    with torch.no_grad():
        assert loaded(input_ids=WORDS).logits.equal(model(input_ids=WORDS).logits)


def test_a_later_task_takes_over_the_form(tmp_path: Path) -> None:
    words = moved(tiny(head="ForMaskedLM"))
    words.save_pretrained(tmp_path)
    model = ladder(tiny())
    model.take_over(tmp_path, head=False)
    form = model.config
    assert (form.output_mix, form.residual, form.normalise_features) == ("add", True, True)
    with torch.no_grad():
        states = [one(input_ids=WORDS % 50, output_hidden_states=True).hidden_states for one in (words, model)]
    assert all(one.equal(other) for one, other in zip(*states))
    with pytest.raises(FastpeftError, match="output_mix is 'add', here False"):
        ladder(tiny(), output_mix=False).take_over(tmp_path, head=False)


def test_what_is_refused_changes_nothing(tmp_path: Path) -> None:
    ladder(tiny(head="ForMaskedLM")).save_pretrained(tmp_path)
    model = ladder(tiny(), window_size=5)
    before = model.config.to_dict()
    with pytest.raises(FastpeftError, match="window_size is 3, here 5"):
        model.take_over(tmp_path, head=False)
    assert model.config.to_dict() == before


def test_the_number_of_blocks_is_kept(tmp_path: Path) -> None:
    base = tiny(num_hidden_layers=8)
    ladder(base, layers_per_block=1).save_pretrained(tmp_path)
    assert len(LadderModel.from_pretrained(tmp_path, base=base).side.blocks) == 8
    assert ladder(base).config.layers_per_block == 2, "the number that None is, is kept"


def test_a_member_that_takes_over_another_form_leaves_its_pool(tmp_path: Path) -> None:
    moved(tiny(head="ForTokenClassification"), residual=False).save_pretrained(tmp_path)
    pool = LadderPool(tiny(head="ForTokenClassification"))
    for name in ("a", "b"):
        pool.add(name, LadderConfig(window_size=3, reduction_factor=2))
    batch = {"input_ids": WORDS % 50}
    pool(batch, ["a", "b", "b"])
    pool["a"].take_over(tmp_path, head=False)
    with pytest.raises(FastpeftError, match="changed its form"):
        pool(batch, ["a", "b", "b"])


def test_the_sum_learns_faster_than_the_place_of_the_output() -> None:
    """A decoder that has begun to learn to count, and side networks that go on."""
    counted = (torch.arange(16) + torch.arange(24)[:, None]) % 48 + 5
    base = causal_model("llama")
    losses(base, counted, 8)
    added, replaced = (losses(ladder(copy.deepcopy(base), output_mix=mix), counted, 20, 2e-3) for mix in ("add", False))
    assert added[-1] < min(added[0], replaced[-1])
