"""SiVA under Lightning Fabric: training, and a checkpoint from which another process would go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from siva_adapters import tiny

from fastpeft import SivaConfig

fabric_module = pytest.importorskip("lightning.fabric", reason="the extra `integrations` is not installed")

IDS = torch.randint(3, 50, (4, 7), generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 0, 1])


def prepared(precision: Any) -> tuple[Any, Any, Any]:
    fabric = fabric_module.Fabric(accelerator="cpu", devices=1, precision=precision)
    torch.manual_seed(1)
    model = peft.get_peft_model(tiny(), SivaConfig(r=2, task_type="SEQ_CLS"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0)
    return fabric, *fabric.setup(model.eval(), optimizer)  # no dropout


def step(fabric: Any, model: Any, optimizer: Any) -> float:
    loss = model(input_ids=IDS, labels=LABELS).loss
    fabric.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_goes_on_from_a_checkpoint(precision: Any, tmp_path: Path) -> None:
    parts = fabric, model, optimizer = prepared(precision)
    losses = [step(*parts) for _ in range(3)]
    assert losses[-1] < losses[0]
    fabric.save(tmp_path / "checkpoint.ckpt", {"model": model, "optimizer": optimizer})
    expected = [step(*parts) for _ in range(2)]

    others = fabric, model, optimizer = prepared(precision)
    fabric.load(tmp_path / "checkpoint.ckpt", {"model": model, "optimizer": optimizer})
    assert [step(*others) for _ in range(2)] == expected
