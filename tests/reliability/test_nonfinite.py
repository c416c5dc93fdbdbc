"""A NaN or an infinity is told with its step and with the first module in which it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from fastpeft import FastpeftError, TrainConfig, train
from fastpeft.support.nonfinite import where_it_began


class Doubled(nn.Module):
    """Returns a tuple, as layers of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return 2 * self.inner(x), None


class Small(nn.Module):
    def __init__(self, spoil: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(2, 2), Doubled(), nn.Linear(2, 1)
        self.spoil = spoil

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.spoil(self.block(self.first(x))[0])).sum()


def told(model: nn.Module, x: Tensor, backward: bool = True) -> str:
    found = where_it_began(model, lambda: model(x).backward() if backward else model(x))
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(weight._backward_hooks for weight in model.parameters())
    return found


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_was_spoilt_before(value: float) -> None:
    model = Small()
    model.block.inner.weight.data[1, 1] = value
    assert told(model, torch.ones(1, 2)) == "The weight block.inner.weight was not finite before it."


def test_the_innermost_module_comes_first() -> None:
    model = Small()
    model.block.inner.weight.data.fill_(3e38)
    model.block.inner.bias.data.fill_(3e38)
    found = told(model, torch.full((1, 2), 1e3), backward=False)
    assert found == "The first value that is not finite is in the output of block.inner."


def test_a_module_that_spoils_what_its_parts_return() -> None:
    model = Small()
    model.block.inner.weight.data.zero_()
    model.block.inner.bias.data.fill_(3e38)
    assert told(model, torch.ones(1, 2)) == "The first value that is not finite is in the output of block."


def test_a_gradient_of_a_finite_loss() -> None:
    """The square root of zero is finite, its slope is not."""
    model = Small(lambda x: (0 * x).sqrt())
    expected = "The first value that is not finite is in the gradient that reaches the output of block."
    assert told(model, torch.ones(1, 2)) == expected
    assert told(model, torch.ones(1, 2), backward=False) == "Computed again, all of it was finite."


# -- in a run ----------------------------------------------------------------------------------------------------------


class Overflow(TrainerCallback):
    """Lets one layer of the encoder return too much from a step on."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            layer = next(m for name, m in model.named_modules() if name.endswith("encoder.layer.1.intermediate.dense"))
            layer.register_forward_hook(lambda module, inputs, output: output * math.inf)


@pytest.mark.long(but="mezo")
@pytest.mark.parametrize("method", ["siva", "full", "k-lst", "mezo"])
def test_a_run_names_step_and_module(place: Path, tmp_path: Path, method: str) -> None:
    given = {"model": str(place / "model"), "data": str(place / "reviews.csv"), "max_steps": 4}
    with pytest.raises(FastpeftError) as raised:
        train(TrainConfig(output=str(tmp_path / "run"), method=method, **given), callbacks=[Overflow(3)])
    said = str(raised.value)
    assert "at step 3" in said
    assert "in the output of " in said
    assert "encoder.layer.1.intermediate.dense. " in said
    assert (tmp_path / "run" / "last-good").is_dir()


class Slope(TrainerCallback):
    """Spoils the gradient of the first batch of the second step; its loss is finite."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 1:
            spoilt: list[Tensor] = []

            def spoil(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                spoilt.extend(inputs[: not spoilt])
                if inputs[0].equal(spoilt[0]):  # in the second computation too, which looks for the place
                    output.register_hook(lambda gradient: gradient * math.inf)

            words = next(m for name, m in model.named_modules() if name.endswith("word_embeddings"))
            words.register_forward_hook(spoil)


@pytest.mark.long
def test_a_gradient_of_a_batch_before_the_last_of_its_step(place: Path, tmp_path: Path) -> None:
    given = {"model": str(place / "model"), "data": str(place / "reviews.csv"), "max_steps": 4, "batch_size": 4}
    config = TrainConfig(
        output=str(tmp_path / "run"), method="full", settings={"gradient_accumulation_steps": 3}, **given
    )
    with pytest.raises(FastpeftError, match=r"a gradient is not finite at step 2.*output of .*word_embeddings\. "):
        train(config, callbacks=[Slope()])
    assert (tmp_path / "run" / "last-good").is_dir()
