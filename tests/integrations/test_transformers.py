"""transformers' own `add_adapter`, which puts SiVA's layers into a model without a model of PEFT around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model
from samples import add_adapter, load_adapter
from siva_adapters import move, tiny
from torch import Tensor
from trainers import quiet

from fastpeft import SivaConfig

IDS = torch.randint(3, 50, (4, 7), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": row, "labels": label} for row, label in zip(IDS, (0, 1, 0, 1))]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@add_adapter
@load_adapter
@pytest.mark.long(but="frozen")
@pytest.mark.parametrize("residual", ["frozen", "implicit"])
def test_an_added_adapter_trains_is_saved_and_loads(residual: Any, tmp_path: Path) -> None:
    model = tiny()
    before = logits(model)
    model.add_adapter(SivaConfig(r=2, target_modules="all-linear", residual=residual))
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("siva_" in name for name in trained)

    settings = quiet(tmp_path / "out", max_steps=3, learning_rate=0.1, save_strategy="no")
    transformers.Trainer(model, settings, train_dataset=ROWS).train()
    after = logits(model)
    assert not torch.allclose(after, before, rtol=0, atol=1e-4)
    model.disable_adapters()
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    model.enable_adapters()
    assert torch.equal(logits(model), after)

    model.save_pretrained(tmp_path / "adapter")
    fresh = tiny()
    fresh.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(fresh), after)


@add_adapter
def test_an_adapter_can_be_deleted_and_another_takes_its_place() -> None:
    model = tiny()
    before = logits(model)
    model.add_adapter(SivaConfig(r=2), "one")
    model.add_adapter(SivaConfig(r=2), "two")
    assert model.active_adapters() == ["two"]
    model.delete_adapter(["one", "two"])
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    model.add_adapter(SivaConfig(r=3), "one")
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


@add_adapter
@load_adapter
def test_an_adapter_is_deleted_while_another_has_not_run_yet(tmp_path: Path) -> None:
    trained = move(get_peft_model(tiny(), SivaConfig(r=2, target_modules="all-linear")))
    trained.save_pretrained(tmp_path)
    model = tiny()
    model.load_adapter(str(tmp_path), "one")
    expected = logits(model)
    model.load_adapter(str(tmp_path), "two")
    model.delete_adapter("one")
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
