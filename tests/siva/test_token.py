"""One row without gradients, as where a decoder says a token: the op is called as it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from siva_adapters import RESIDUALS
from torch import Tensor, nn

from fastpeft import FastpeftError, SivaLinear
from fastpeft.siva import grouping

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


class Attention(nn.Module):
    """Two layers of one input."""

    def __init__(self, residual: str) -> None:
        super().__init__()
        self.query, self.key = (SivaLinear.from_linear(nn.Linear(16, n), r=3, residual=residual) for n in (16, 8))
        grouping.arrange(self)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.query(x), self.key(x)], -1)


def made(residual: str = "frozen") -> Attention:
    torch.manual_seed(0)
    model = Attention(residual).eval()
    for name, parameter in model.named_parameters():
        if ".siva_d" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def expected(model: Attention, x: Tensor) -> Tensor:
    weight = torch.cat([layer._compute_weight() for layer in (model.query, model.key)])
    return x @ weight.t() + torch.cat([layer.base_layer.bias for layer in (model.query, model.key)])


def in_place(model: Attention) -> None:
    model.query.siva_du["default"].weight.mul_(2.0)


def another_tensor(model: Attention) -> None:
    model.key.siva_dv["default"].weight.data = torch.ones(3, 16)


def by_data(model: Attention) -> None:
    model.query.siva_du["default"].weight.data.mul_(3.0)


def loaded(model: Attention) -> None:
    model.load_state_dict(
        {name: 1.5 * each if ".siva_d" in name else each for name, each in model.state_dict().items()}
    )


def hooked(model: Attention) -> None:
    model.query.siva_du["default"].register_forward_hook(lambda _module, _args, factor: 2 * factor)


def disabled(model: Attention) -> None:
    for layer in (model.query, model.key):
        layer.enable_adapters(False)


def merged(model: Attention) -> None:
    for layer in (model.query, model.key):
        layer.merge()


@RESIDUALS
@pytest.mark.parametrize("change", [in_place, another_tensor, by_data, loaded, hooked, disabled, merged])
@torch.no_grad()
def test_a_token_sees_every_change(residual: str, change: Callable[[Attention], None]) -> None:
    model, x = made(residual), torch.randn(1, 1, 16)
    for _ in range(2):
        torch.testing.assert_close(model(x), expected(model, x), **CLOSE)
    before = model(x)
    change(model)
    torch.testing.assert_close(model(x), expected(model, x), **CLOSE)
    assert change is merged or not torch.allclose(model(x), before, atol=1e-3)


@torch.no_grad()
def test_what_does_not_fit_is_cast_or_refused_as_ever() -> None:
    model = made()
    with pytest.raises(FastpeftError, match=r"\(1, 1, 15\)"):
        model.query(torch.randn(1, 1, 15))
    with pytest.raises(FastpeftError, match=r"\(\)"):
        model.query(torch.tensor(1.0))
    model.query.base_layer.bias.data = model.query.base_layer.bias.bfloat16()
    assert model.query(torch.randn(1, 1, 16)).dtype is torch.float32
    assert model.query(torch.randn(1, 1, 16, dtype=torch.float64)).dtype is torch.float32


def test_a_token_with_gradients_goes_the_common_way() -> None:
    model, x = made(), torch.randn(1, 1, 16, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None
    assert model.query.siva_du["default"].weight.grad is not None
