"""Whole training steps as CUDA graphs: recorded once on a CPU, a replay is a step with random numbers of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")
from backbones import IDS, MASK, ladder, tiny
from launches import Recording
from peft import get_peft_model

from fastpeft import SivaConfig
from fastpeft.ops.frozen_linear import unpack_frozen

LABELS = torch.tensor([0, 2, 1])


@pytest.fixture(autouse=True)
def capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers leaves out what would wait for the device when it sees that a graph is captured."""
    monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda *_: True)


def within(recording: Recording, call: Callable[[], Any]) -> Any:
    with recording:
        return call()


def siva() -> nn.Module:
    base = tiny(num_hidden_layers=2, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.0)
    return get_peft_model(base, SivaConfig(r=2, pack_weights=False, task_type="SEQ_CLS")).train()


def side_network() -> nn.Module:
    return unpack_frozen(ladder(tiny(num_hidden_layers=2), window_size=9)).train()  # packs are for a CPU


def by_gradients(model: nn.Module, ids: Tensor) -> Callable[[], Tensor]:
    """A step of SGD with momentum, whose loss stays on the device."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9, foreach=False)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = model(input_ids=ids, attention_mask=MASK, labels=LABELS).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("make", [siva, side_network])
def test_a_replay_of_a_step_by_gradients_is_the_next_step(make: Callable[[], nn.Module]) -> None:
    captured, eager = make(), make()
    ids, others = IDS.clone(), IDS.clone()
    step, expected_step = by_gradients(captured, ids), by_gradients(eager, others)
    random = [torch.random.get_rng_state()] * 2  # of each, as they take turns

    def next_of(which: int, make_step: Callable[[], Any]) -> Any:
        torch.random.set_rng_state(random[which])
        found = make_step()
        random[which] = torch.random.get_rng_state()
        return found

    recorded = Recording()
    losses = []
    for number in range(3):
        for some in (ids, others):
            some.copy_(IDS.roll(number, 0) * MASK)
        expected = next_of(1, partial(within, Recording(), expected_step))
        if number < 2:  # one to warm up, one to record
            loss = next_of(0, partial(within, recorded if number else Recording(), step))
        else:
            next_of(0, recorded.replay)
        assert torch.equal(loss, expected)
        losses.append(loss.item())
    assert len(set(losses)) == 3
    for one, other in zip(captured.parameters(), eager.parameters()):
        assert torch.equal(one, other)


class NoWait(TorchDispatchMode):
    """Refuses what a card waits for: numbers read from it, and copies between it and the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, found)) if isinstance(x, Tensor)]
        assert len({x.device.type for x in tensors if x.dim() > 0}) <= 1, f"{func.name()} copies"
        return found


def on_card(model: nn.Module) -> nn.Module:
    """The model with fake weights on a card."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None and param not in made:
                made[param] = nn.Parameter(torch.empty(param.shape, device="cuda"), param.requires_grad)
            module._parameters[name] = None if param is None else made[param]
        for name, buffer in module._buffers.items():
            module._buffers[name] = (
                None if buffer is None else torch.empty(buffer.shape, device="cuda").to(buffer.dtype)
            )
    return model


@pytest.mark.parametrize("make", [siva, side_network], ids=["siva", "k-lst"])
def test_nothing_waits_for_a_card(make: Callable[[], nn.Module]) -> None:
    """The forward on fake tensors, on which reading a number raises."""
    model = make()
    with FakeTensorMode():
        model = on_card(model)
        ids, mask, labels = (torch.empty(x.shape, dtype=torch.long, device="cuda") for x in (IDS, MASK, LABELS))

        def step() -> Tensor:
            return model(input_ids=ids, attention_mask=mask, labels=labels).loss

        step()  # makes what is made once
        with NoWait():
            step()
