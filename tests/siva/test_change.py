"""What trains is the change of the factors, which is 0 at the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from siva_adapters import CLOSE, RESIDUALS, move, tiny
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import optimizer as optimizers

from fastpeft import FastpeftError, MeZO, SivaConfig, SivaLinear
from fastpeft.siva.change import scales
from fastpeft.siva.decompose import decompose
from fastpeft.siva.model import SPECTRAL_STEP


def linear(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(20, 12)


def tiny_bert() -> Any:
    return tiny("Bert", "Model", vocab_size=30)


IDS = torch.arange(12).view(2, 6)


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).last_hidden_state


def adapted(**given: Any) -> Any:
    model = peft.get_peft_model(tiny_bert(), SivaConfig(r=3, target_modules=["query", "key"], **given)).eval()
    for layer in model.modules():
        if isinstance(layer, SivaLinear):
            move(layer, 1, 0.05)
    return model


def test_adam_takes_the_steps_that_it_takes_on_the_factors_themselves() -> None:
    weight = linear().weight.detach().double()
    (u, s, v), rest = decompose(weight, 4)
    u, s, v = (factor.double() for factor in (u, s, v))
    rest = weight - (u * s) @ v
    u.requires_grad_(), v.requires_grad_()
    layer = SivaLinear.from_linear(linear().double(), 4)
    layer.siva_du.double(), layer.siva_dv.double()
    layer.base_layer.weight.data = rest
    torch.manual_seed(2)
    xs, ys = torch.randn(200, 7, 20).double(), torch.randn(200, 7, 12).double()
    whole = torch.optim.AdamW([u, v], lr=1e-3, weight_decay=0.0)
    change = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    for x, y in zip(xs, ys, strict=True):
        (F.linear(x, rest + (u * s) @ v, layer.bias) - y).square().mean().backward()
        (layer(x) - y).square().mean().backward()
        for optimizer in (whole, change):
            optimizer.step()
            optimizer.zero_grad()
    trained = layer._trained("default")
    assert (u - layer.siva_u0["default"]).abs().max() > 0.01
    torch.testing.assert_close(trained.u, u, rtol=0, atol=1e-10)
    torch.testing.assert_close(trained.v, v, rtol=0, atol=1e-10)


@RESIDUALS
@pytest.mark.parametrize("trained", [False, True])
def test_weight_decay_goes_back_to_the_pretrained_weight(residual: str, trained: bool) -> None:
    weight = linear().weight.detach().clone()
    layer = SivaLinear.from_linear(linear(), 4, residual=residual)
    if trained:
        move(layer, 1, 0.05)
        assert (layer.weight - weight).abs().max() > 1e-2
    parameters = [p for p in layer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.5, weight_decay=0.1)
    for _ in range(300):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    layer.merge()
    torch.testing.assert_close(layer.base_layer.weight.detach(), weight, **CLOSE)


@pytest.mark.parametrize("given", [{"d": 8}, {"residual_dtype": "int8"}])
def test_a_lossy_residual_decays_to_its_own_start(given: dict[str, Any]) -> None:
    layer = SivaLinear.from_linear(linear(), 4, **given)
    start = layer.weight.detach()
    move(layer, 1, 0.05)
    for change in layer.changes("default"):
        change.weight.data *= 0
    assert layer.weight.detach().equal(start)
    assert not start.equal(linear().weight)


def test_hooks_of_a_change_run() -> None:
    layer = SivaLinear.from_linear(linear(), 4)
    change, seen = layer.siva_du["default"], []
    hooks = [
        change.register_forward_pre_hook(lambda *_: seen.append("before")),
        change.register_forward_hook(lambda *_: seen.append("after")),
        change.register_full_backward_pre_hook(lambda *_: seen.append("before its gradient")),
        change.register_full_backward_hook(lambda *_: seen.append("after its gradient")),
        nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module)),
    ]
    for hook in hooks:
        seen.clear()
        layer(torch.randn(2, 20)).sum().backward()
        assert seen
        hook.remove()
    seen.clear()
    layer(torch.randn(2, 20)).sum().backward()
    assert not seen


def test_mezo_takes_the_steps_that_it_takes_on_the_factors_themselves() -> None:
    torch.manual_seed(2)
    x, y = torch.randn(7, 20), torch.randn(7, 12)
    layer = SivaLinear.from_linear(linear(), 4)
    u, s, v = (t.clone() for t in layer.initial("default"))
    rest, bias = layer.base_layer.weight.detach(), layer.bias.detach()
    u, v = nn.Parameter(u), nn.Parameter(v)
    of_factors = MeZO([u, v], lr=1e-3, eps=1e-3, seed=5)
    of_change = MeZO([p for p in layer.parameters() if p.requires_grad], lr=1e-3, eps=1e-3, seed=5)
    for _ in range(20):
        of_factors.step(lambda: (F.linear(x, rest + (u * s) @ v, bias) - y).square().mean())
        of_change.step(lambda: (layer(x) - y).square().mean())
    assert (u - layer.siva_u0["default"]).abs().max() > 1e-3
    torch.testing.assert_close(layer._trained("default").u.detach(), u.detach(), rtol=0, atol=2e-4)


def test_small_steps_of_half_precision_adapters_are_kept() -> None:
    layer = SivaLinear.from_linear(linear().bfloat16(), 4)
    layer.siva_du.bfloat16()
    du = layer.siva_du["default"].weight
    for _ in range(100):
        du.data += 1e-5  # an entry of U0 in bfloat16, of 0.3, would round it away
    torch.testing.assert_close(du.float(), torch.full_like(du, 1e-3, dtype=torch.float32), rtol=0.05, atol=0)


# -- half precision ------------------------------------------------------------------------------------------------


@RESIDUALS
@pytest.mark.parametrize("cast", [lambda model: model, lambda model: model.to(torch.bfloat16)])
def test_half_precision_factors_merge_and_convert(residual: str, cast: Any) -> None:
    model = peft.get_peft_model(
        tiny_bert().to(torch.bfloat16), SivaConfig(r=3, residual=residual), autocast_adapter_dtype=False
    )
    model = cast(model).eval()
    layer = next(each for each in model.modules() if isinstance(each, SivaLinear))
    move(layer, 1, 0.1)
    assert layer.siva_du["default"].weight.dtype == torch.bfloat16
    expected = output(model).float()
    delta = layer.get_delta_weight("default")
    assert delta.dtype == torch.float32
    assert delta.abs().max() > 1e-2
    model.merge_adapter()
    assert (output(model) - expected).abs().max() < 0.05
    model.unmerge_adapter()
    assert (output(model) - expected).abs().max() < 0.05
    if hasattr(peft, "convert_to_lora"):  # of newer versions
        lora, _ = peft.convert_to_lora(model, rank=6)
        assert lora.r == 6
    assert (output(model.merge_and_unload()) - expected).abs().max() < 0.05


# -- starts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [None, SPECTRAL_STEP])
def test_random_changes_over_the_real_decomposition(step: float | None) -> None:
    weight = linear().weight.detach()
    layer = SivaLinear(linear(), r=4, init_weights=False, step=step)
    assert 1e-2 < (layer.weight - weight).abs().max() < 10 * weight.abs().max()
    torch.testing.assert_close(layer.siva_u0["default"], decompose(weight, 4).factors.u)
    layer.restore()
    torch.testing.assert_close(layer.base_layer.weight.detach(), weight, **CLOSE)


def test_only_known_ways_to_start() -> None:
    with pytest.raises(FastpeftError, match="init_weights='pissa'; allowed are True, False and 'saved'"):
        SivaConfig(init_weights="pissa")  # type: ignore[arg-type]


@RESIDUALS
@pytest.mark.parametrize("reloaded", [False, True])
def test_a_reference_adapter_of_the_same_configuration_takes_a_copy(
    residual: str, reloaded: bool, tmp_path: Path
) -> None:
    """As TRL makes one beside the adapter that trains, and copies what has its name in it.

    Until then a new one is the base model. One of a saved configuration waits, as it does alone.
    """
    expected, model = output(tiny_bert()), adapted(residual=residual)
    if reloaded:
        model.save_pretrained(str(tmp_path))
        model = peft.PeftModel.from_pretrained(tiny_bert(), str(tmp_path), is_trainable=True).eval()
    trained = output(model)
    model.add_adapter("ref", model.peft_config["default"])
    model.set_adapter("ref")
    if reloaded:
        with pytest.raises(FastpeftError, match="'ref' was made with init_weights='saved' and holds nothing yet"):
            output(model)
    else:
        torch.testing.assert_close(output(model), expected, **CLOSE)
    parameters = dict(model.named_parameters())
    copied = [name for name in parameters if ".default." in name]
    for name in copied:
        parameters[name.replace(".default.", ".ref.")].data.copy_(parameters[name].data)
    assert len(copied) == 8
    assert output(model).equal(trained)


# -- the size of a step --------------------------------------------------------------------------------------------


def test_a_step_is_as_large_for_every_triplet_of_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Adam moves every entry by eta, the weight moves by a share of it that the number of layers decides."""
    monkeypatch.setattr("fastpeft.siva.model.SPECTRAL_STEP", 9 * 3.0)  # layers as narrow as these would limit more
    pretrained, config = tiny_bert(), SivaConfig(r=3, target_modules=["query", "dense"])
    model = peft.get_peft_model(tiny_bert(), config)
    layers = [module for module in model.modules() if isinstance(module, SivaLinear)]
    assert len(layers) == 9
    assert {(layer.out_features, layer.in_features) for layer in layers} == {(16, 16), (32, 16), (16, 32)}
    for layer in layers:
        weight = pretrained.get_submodule(layer.name).weight.detach()
        size = torch.linalg.svdvals(weight).square().mean().sqrt().item()
        for change in layer.changes("default"):
            for i in range(3):
                change.weight.data.zero_()
                triplet = change.weight.data[:, i] if change is layer.siva_du["default"] else change.weight.data[i]
                triplet += 1e-3
                moved = torch.linalg.matrix_norm(layer.get_delta_weight("default"), ord=2)
                assert moved.item() == pytest.approx(1e-3 * 3.0 * size, rel=1e-3)
            change.weight.data.zero_()


def test_a_step_has_a_limit_with_which_plain_sgd_stays_finite() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 3))
    model = peft.get_peft_model(base, SivaConfig(r=2, target_modules=["0", "2"]))
    for layer in (module for module in model.modules() if isinstance(module, SivaLinear)):
        q = torch.linalg.matrix_norm(layer.weight.detach()) / min(layer.weight.shape) ** 0.5
        for change in layer.changes("default"):
            torch.testing.assert_close(change.scale.flatten() * layer.siva_s["default"] / q, torch.ones(2))
    optimizer, x, labels = torch.optim.SGD(model.parameters(), lr=0.5), torch.randn(9, 20), torch.arange(9) % 3
    losses = []
    for _ in range(20):
        losses.append(F.cross_entropy(model(x), labels))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("rank", "share"), [(1, 1), (4, 1), (8, 0.5), (16, 0.25)])
def test_triplets_share_a_step(rank: int, share: float) -> None:
    """All of them together move a weight equally far at any rank, and one alone no further than four do each."""
    of_u, of_v = scales(torch.ones(rank), torch.eye(20), step=1.0)
    torch.testing.assert_close(of_u, torch.full((rank,), share * 20**-0.5))
    torch.testing.assert_close(of_v, of_u[:, None])


def test_of_small_singular_values_a_tenth_of_the_largest_counts() -> None:
    """Of the largest of the same weight, however large that is."""
    for size in (0.02, 5.0):
        s = size * torch.tensor([1.0, 0.5, 0.1, 0.01])
        of_u, of_v = scales(s, torch.diag(s), step=1.0)
        for scale in (of_u, of_v[:, 0]):
            torch.testing.assert_close(scale / scale[0], torch.tensor([1.0, 2.0, 10.0, 10.0]))


def test_the_plain_form_moves_a_triplet_in_proportion_to_its_singular_value() -> None:
    model = peft.get_peft_model(tiny_bert(), SivaConfig(r=3, scaling="plain"))
    layer = next(module for module in model.modules() if isinstance(module, SivaLinear))
    assert layer.siva_du["default"].scale is None
    layer.siva_du["default"].weight.data += 1e-4
    torch.testing.assert_close(layer._trained("default").u, layer.siva_u0["default"] + 1e-4)
    with pytest.raises(FastpeftError, match="scaling='even'; allowed are 'spectral' and 'plain'"):
        SivaConfig(scaling="even")  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", [0, 2])
def test_triplets_of_a_weight_that_lacks_them_stay_finite(rank: int) -> None:
    weight = torch.randn(12, rank) @ torch.randn(rank, 20)
    base = linear()
    base.weight.data.copy_(weight)
    layer = SivaLinear(base, r=4, step=1.0)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.01)
    for _ in range(20):
        layer(torch.randn(8, 20)).square().mean().backward()
        optimizer.step()
    assert layer.weight.isfinite().all()
    assert (layer.weight - weight).abs().max() < 1


def test_scales_stay_in_float32() -> None:
    layer = SivaLinear(linear(), r=4, step=1.0)
    scale = layer.siva_du["default"].scale.clone()
    layer.to(torch.bfloat16)
    assert layer.siva_du["default"].weight.dtype == torch.bfloat16
    assert layer.siva_du["default"].scale.equal(scale)


# -- what others see -----------------------------------------------------------------------------------------------


def test_no_optimizer_of_the_process_is_watched() -> None:
    assert not optimizers._global_optimizer_pre_hooks


def test_a_weight_that_is_asked_for_its_dtype_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny("T5", "EncoderModel", d_ff=32, d_kv=8, num_layers=1)
    model = peft.get_peft_model(base, SivaConfig(r=3, target_modules=["wo", "q"]))
    model.add_adapter("other", SivaConfig(r=3, target_modules=["wo", "q"], residual="frozen"))
    computed = []
    monkeypatch.setattr(SivaLinear, "_compute_weight", lambda layer: computed.append(layer))
    first = output(model)
    mixed = model(input_ids=IDS, adapter_names=["default", "other"]).last_hidden_state
    torch.testing.assert_close(mixed, first, **CLOSE)
    assert not computed
