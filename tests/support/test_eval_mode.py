"""Evaluation mode for a while."""

from __future__ import annotations

from torch import nn

from fastpeft.support.eval_mode import in_eval_mode


def test_each_module_is_afterwards_as_it_was() -> None:
    """Also one in training inside one that is not."""
    model = nn.Sequential(nn.Sequential(nn.Dropout(0.5)), nn.Dropout(0.5)).eval()
    model[0][0].train()
    before = [module.training for module in model.modules()]
    with in_eval_mode(model.modules()):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before
