"""Layers that read the same x as one group: the same results as each by itself, whatever happens in between."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import peft
import pytest
import torch
from siva_adapters import RESIDUALS, move, tiny
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastpeft import SivaConfig, SivaLinear
from fastpeft.siva import grouping

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
ALL = ["query", "key", "value"]
Check = Callable[[nn.Module, Tensor], Tensor]


def same(x: Tensor) -> Tensor:
    return x


class Attention(nn.Module):
    """Three layers of one input. The second and third read what `between` makes of it, in the mode of `mode`."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8, bias=False)
        self.order = ALL
        self.between: Callable[[Tensor], Tensor] = same
        self.mode: Callable[[], Any] = nullcontext

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        found = {}
        for name in self.order:
            with self.mode() if found else nullcontext():
                found[name] = getattr(self, name)(x if name == "query" or other is None else other)
            x = x if len(found) > 1 else self.between(x)
        return torch.cat([found[name] for name in ALL], -1)


class Model(nn.Module):
    """What PEFT adapts: an attention under the given name."""

    def __init__(self, name: str = "attention") -> None:
        super().__init__()
        self.add_module(name, Attention())
        self.name = name

    @property
    def attention(self) -> Attention:
        return self._modules[self.name]

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        return self.attention(x, *args)


def adapted(targets: list[str] = ALL, name: str = "attention", **config: Any) -> tuple[peft.PeftModel, Any]:
    """A model with trained adapters, and its attention."""
    torch.manual_seed(0)
    model = peft.get_peft_model(Model(name), SivaConfig(r=2, target_modules=targets, **config))
    return move(model, size=0.01), model.get_base_model().attention


def alone(model: nn.Module) -> nn.Module:
    """A copy whose layers compute for themselves."""
    model = copy.deepcopy(model)
    grouping.part(model)
    return model


def inputs(seed: int = 0) -> Tensor:
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module, run: Check = lambda model, x: model(x)) -> list[Tensor | None]:
    """The output, and the gradients of x and of all parameters."""
    x = inputs().requires_grad_()
    model.zero_grad()
    out = run(model, x)
    out.square().sum().backward()
    return [out, *(tensor.grad for tensor in (x, *model.parameters()))]


def assert_same(model: nn.Module, run: Check = lambda model, x: model(x)) -> None:
    torch.testing.assert_close(gradients(model, run), gradients(alone(model), run), **CLOSE)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of layers in every grouped product that is computed."""
    found: list[int] = []
    compute = grouping.siva_products

    def counted(x: Tensor, dtype: torch.dtype, weights: list[Any], *rest: Any) -> Any:
        found.append(len(weights))
        return compute(x, dtype, weights, *rest)

    monkeypatch.setattr(grouping, "siva_products", counted)
    return found


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Any:
    yield
    assert not grouping._open.groups


# -- what is computed ------------------------------------------------------------------------------------------------


@RESIDUALS
@pytest.mark.parametrize("targets", [ALL, ["query", "key"], ["key", "value"]])
def test_a_group_computes_once_what_its_layers_would(sizes: list[int], residual: str, targets: list[str]) -> None:
    model, _ = adapted(targets, residual=residual)
    found = gradients(model)
    assert sizes == [len(targets)]
    torch.testing.assert_close(found, gradients(alone(model)), **CLOSE)
    assert sizes == [len(targets)]


def test_one_layer_is_no_group(sizes: list[int]) -> None:
    model, _ = adapted(["query"])
    assert_same(model)
    assert sizes == []


def test_activations_are_saved_once() -> None:
    model, attention = adapted()
    kept: list[Tensor] = []
    own = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(inputs())
    nbytes = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in kept
        if t.untyped_storage().data_ptr() not in own
    }
    rows = 10
    changed = [change.weight.nbytes for name in ALL for change in getattr(attention, name).changes("default")]
    # U and V of three layers of rank 2, their p, and x
    assert sorted(nbytes.values()) == sorted([*changed, 4 * rows * 3 * 2, 4 * rows * 16])


def test_ranks_may_differ(sizes: list[int]) -> None:
    model, _ = adapted(rank_pattern={"key": 5})
    assert_same(model)
    assert sizes == [3]


@pytest.mark.parametrize("order", [["value", "key", "query"], ["key", "query", "value"]])
def test_any_order(sizes: list[int], order: list[str]) -> None:
    model, attention = adapted()
    attention.order = order
    for _ in range(2):
        gradients(model)
    assert sizes == [3, 3]
    assert_same(model)


def test_no_grad_and_eval(sizes: list[int]) -> None:
    model, _ = adapted()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(inputs()), alone(model)(inputs()), **CLOSE)
    assert sizes == [3]


def test_inference_mode_computes_alone(sizes: list[int]) -> None:
    """Its tensors have no version."""
    model, _ = adapted()
    with torch.inference_mode():
        torch.testing.assert_close(model(inputs()), alone(model)(inputs()), **CLOSE)
    assert sizes == []


@pytest.mark.parametrize("targets", [["query", "key", "value"], ["q_proj"]])
def test_models_of_transformers(sizes: list[int], targets: list[str]) -> None:
    if targets == ["q_proj"]:
        base = tiny("Llama", "ForCausalLM", num_key_value_heads=1)
        targets, expected = "all-linear", [3, 2] * 2  # query, key, value; gate, up
    else:
        base = tiny()
        expected = [3] * 2
    model = peft.get_peft_model(base, SivaConfig(r=2, target_modules=targets)).eval()
    ids = torch.arange(3, 11)[None]
    found = torch.autograd.grad(model(ids).logits.square().sum(), [p for p in model.parameters() if p.requires_grad])
    assert sizes == expected
    model = alone(model)
    plain = torch.autograd.grad(model(ids).logits.square().sum(), [p for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(found, plain, **CLOSE)


# -- inputs that differ ----------------------------------------------------------------------------------------------


def test_layers_that_read_another_tensor_are_parted(sizes: list[int]) -> None:
    model, _ = adapted()
    other = inputs(1)
    for _ in range(3):
        assert_same(model, lambda model, x: model(x, other))
    assert sizes == [3, 2, 2]  # the query leaves after the first time; key and value go on together


def test_the_query_of_a_cross_attention_is_not_in_the_group(sizes: list[int]) -> None:
    model, _ = adapted(name="crossattention")
    assert_same(model, lambda model, x: model(x, inputs(1)))
    assert sizes == [2]


def test_a_change_in_place_is_seen() -> None:
    model, attention = adapted()
    attention.between = lambda x: x.mul_(1.5)
    with torch.no_grad():
        torch.testing.assert_close(model(inputs()), alone(model)(inputs()), **CLOSE)


def test_an_equal_tensor_is_another_tensor(sizes: list[int]) -> None:
    model, attention = adapted()
    attention.between = torch.clone
    for _ in range(2):
        assert_same(model)
    assert sizes == [3, 2]


@pytest.mark.parametrize("mode", [torch.no_grad, partial(torch.autocast, "cpu", torch.bfloat16)])
def test_a_change_of_mode_is_seen(mode: Callable[[], Any]) -> None:
    model, attention = adapted()
    attention.mode = mode
    assert_same(model)


def test_a_second_tensor_in_one_run_is_read_alone(sizes: list[int]) -> None:
    """As DeBERTa's projections read the hidden states and then the relative positions."""
    model, attention = adapted()
    attention.order = [*ALL, "key", "query"]
    assert_same(model)
    assert sizes == [3]


# -- what else happens -----------------------------------------------------------------------------------------------


class StopError(Exception):
    pass


def test_an_exception_between_takes_leaves_nothing(sizes: list[int]) -> None:
    model, attention = adapted()

    def stop(_: Tensor) -> Tensor:
        raise StopError

    attention.between = stop
    x = inputs()
    for _ in range(2):
        with pytest.raises(StopError):
            model(x)
        assert not grouping._open.groups
    attention.between = same
    for parameter in model.parameters():
        parameter.data *= 1.1
    torch.testing.assert_close(model(x), alone(model)(x), **CLOSE)  # computed anew, by all three
    assert sizes == [3, 3, 3]


def test_a_layer_called_by_itself_computes_for_itself(sizes: list[int]) -> None:
    _, attention = adapted()
    x = inputs()
    attention.query(x)
    before = attention.key(x)
    attention.key.siva_du["default"].weight.data += 1
    assert not attention.key(x).equal(before)
    assert sizes == []


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(sizes: list[int], use_reentrant: bool) -> None:
    model, _ = adapted()
    assert_same(model, lambda model, x: checkpoint(model, x, use_reentrant=use_reentrant))
    assert sizes == [3, 3]


class CheckpointsWithin(Attention):
    """Backward repeats its layers, but not its own call, in which their group would be open."""

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def test_a_checkpoint_within_the_module_saves_the_same_tensors(sizes: list[int]) -> None:
    model, attention = adapted()
    attention.__class__ = CheckpointsWithin
    assert_same(model)
    assert not sizes


def test_checkpointing_saves_the_same_tensors_where_a_group_is_parted(sizes: list[int]) -> None:
    model, _ = adapted()
    other = inputs(1)
    for _ in range(2):
        assert_same(model, lambda model, x: checkpoint(model, x, other, use_reentrant=False))
    assert sizes == [3, 3, 2, 2]


@pytest.mark.parametrize("between", [False, True])
def test_a_group_is_not_parted_before_all_checkpointed_runs_have_run_again(sizes: list[int], between: bool) -> None:
    """A block that is used twice, and backward of the first use before or after another forward."""
    model, _ = adapted()
    other = inputs(1)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(model, x, other, use_reentrant=False).square().sum()

    def run(model: nn.Module, x: Tensor) -> Tensor:
        first, second = loss(model, x), loss(model, 2 * x)
        if between:
            first.backward()
            first = loss(model, 3 * x)
        return first + second

    for _ in range(2):
        assert_same(model, run)
    runs = 3 if between else 2
    assert sizes == [3] * 2 * runs + [2] * 2 * runs


def test_disabled_and_merged_adapters(sizes: list[int]) -> None:
    model, _ = adapted()
    expected = alone(model)
    with model.disable_adapter(), expected.disable_adapter():
        torch.testing.assert_close(model(inputs()), expected(inputs()), **CLOSE)
    assert sizes == [3]  # with a frozen residual the initial factors are added
    out = model(inputs())
    model.merge_adapter()
    torch.testing.assert_close(model(inputs()), out, **CLOSE)
    assert sizes == [3, 3]
    model.unmerge_adapter()
    torch.testing.assert_close(model(inputs()), out, **CLOSE)
    assert sizes == [3, 3, 3]


def test_a_merged_layer_stays_out_of_the_group(sizes: list[int]) -> None:
    model, attention = adapted()
    out = model(inputs())
    attention.key.merge()
    torch.testing.assert_close(model(inputs()), out, **CLOSE)
    assert sizes == [3, 2]


def test_several_adapters(sizes: list[int]) -> None:
    model, _ = adapted(residual="implicit")
    model.add_adapter("second", SivaConfig(r=3, target_modules=["query", "key"], residual="implicit"))
    assert_same(model)
    model.set_adapter("second")
    for _ in range(2):
        assert_same(model)
    model.base_model.set_adapter(["default", "second"])
    assert_same(model)
    assert sizes == [3, 2, 2, 3]


def test_rows_of_different_adapters_are_no_group(sizes: list[int]) -> None:
    model, _ = adapted(residual="implicit")
    model.add_adapter("second", SivaConfig(r=3, target_modules=["query", "key"], residual="implicit"))
    with torch.no_grad():
        found = model(inputs(), adapter_names=["second", "default"])
        assert sizes == []
        expected = model(inputs())[1]
        model.set_adapter("second")
        torch.testing.assert_close(found, torch.stack([model(inputs())[0], expected]))


def test_hooks_on_layers() -> None:
    model, attention = adapted()
    attention.key.register_forward_hook(lambda _m, _x, out: 2 * out)
    assert_same(model)
    attention.value.register_forward_pre_hook(lambda _m, x: (x[0] + 1,))
    assert_same(model)
    attention.query.register_full_backward_hook(lambda _m, dx, _dh: (3 * dx[0],))
    for _ in range(2):
        assert_same(model)


def test_a_layer_whose_forward_was_replaced_stays_out(sizes: list[int]) -> None:
    model, attention = adapted()
    attention.value.forward = lambda x: torch.zeros(*x.shape[:-1], 8)
    assert model(inputs())[..., -8:].count_nonzero() == 0
    assert sizes == [2]


def test_autocast(sizes: list[int]) -> None:
    model, _ = adapted()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = model(inputs()), alone(model)(inputs())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)
    assert sizes == [3]


def test_threads_do_not_share_what_is_open(sizes: list[int]) -> None:
    """Two threads run one model at once, the one within the other."""
    model, attention = adapted()
    results = {}

    def within(x: Tensor) -> Tensor:
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=lambda: results.update(other=model(inputs(1))))
            thread.start()
            thread.join()
        return x

    plain = alone(model)
    attention.between = within
    torch.testing.assert_close(model(inputs()), plain(inputs()), **CLOSE)
    torch.testing.assert_close(results["other"], plain(inputs(1)), **CLOSE)
    assert sizes == [3, 3]


def test_copies_are_groups_of_their_own(sizes: list[int]) -> None:
    model, attention = adapted()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        for parameter in other.parameters():
            parameter.data *= 1.1
        assert not other(inputs()).equal(model(inputs()))
        assert_same(other)
    assert sizes == [3] * 6
    assert copy.deepcopy(attention.key)(inputs()).equal(attention.key(inputs()))


@pytest.mark.parametrize("leave", ["unload", "merge_and_unload"])
def test_unloading_takes_the_hooks_off(leave: str) -> None:
    model, attention = adapted()
    model(inputs())
    base = getattr(model, leave)()
    assert base.attention is attention
    assert not attention._forward_hooks
    assert not attention._forward_pre_hooks
    assert not any(isinstance(value, grouping.SharedInput) for value in vars(attention).values())
    assert not any(isinstance(module, SivaLinear) for module in base.modules())
    base(inputs())


def test_a_second_adapter_arranges_anew_and_once() -> None:
    model, attention = adapted(["query"], residual="implicit")
    assert not attention._forward_hooks
    for name in ("second", "third"):
        model.add_adapter(name, SivaConfig(r=2, target_modules=ALL, residual="implicit"))
        assert len(attention._forward_hooks) == len(attention._forward_pre_hooks) == 1


def test_a_layer_that_was_put_back_is_left_alone(sizes: list[int]) -> None:
    model, attention = adapted()
    attention.value = nn.Linear(16, 8)
    assert_same(model)
    assert sizes == [2]


def test_compiled_and_exported_graphs_hold_no_group(sizes: list[int]) -> None:
    model, _ = adapted()
    expected = model(inputs())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs()), expected, **CLOSE)
    exported = torch.export.export(model.get_base_model(), (inputs(),))
    torch.testing.assert_close(exported.module()(inputs()), expected, **CLOSE)
    assert sizes == [3]
    model(inputs())
    assert sizes == [3, 3]
