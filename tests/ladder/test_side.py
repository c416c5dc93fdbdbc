"""The side network against loops written from its equations, layer by layer, slot by slot, token by token."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path

import pytest
import torch
from side_networks import EXACT, LAYERS, MASK, NARROW, WIDTH, features, network
from torch import Tensor, nn
from torch.nn import functional as F

from bench.oracles.direct_run import DirectRun
from fastpeft import FastpeftError, LadderConfig
from fastpeft.ladder import side as module
from fastpeft.ladder.side import SideNetwork, SideRun
from fastpeft.ladder.side_blocks import GatedFusion, SideBlock, WindowFusion
from fastpeft.methods.registry import get_method
from fastpeft.training.config import parse_value
from fastpeft.training.memory import MemoryTracker
from fastpeft.training.setup import sort_settings


def place(side: SideNetwork, block: int) -> int:
    """The layer of a block: the last one's is L, and others are n layers apart."""
    return LAYERS - side.config.step(LAYERS) * (len(side.blocks) - block)


def projection(side: SideNetwork, block: int, slot: int) -> Tensor:
    """`D_{block, slot}`, `(NARROW, WIDTH)`, out of the matrix of the layer that it reads, or the shared one."""
    step = side.config.step(LAYERS)
    layer = place(side, block) - side.config.window_size // 2 + slot
    if side.config.share_projections:
        slots = {slot for readers in side.readers.values() for _, slot in readers}
        slots = sorted(slots, key=lambda slot: (slot % step, -slot))
        row = slots.index(slot) * NARROW
        return side.shared_projection.weight[row : row + NARROW]
    row = side.readers[layer].index((block, slot)) * NARROW
    return side.projections[str(layer)].weight[row : row + NARROW]


def attend(q: Tensor, k: Tensor, v: Tensor, seen: list[list[int]], heads: int) -> Tensor:
    """Multi-head attention of one sequence, query by query: q (T, D), k and v (S, D), seen[t] the keys of query t."""
    out = torch.zeros_like(q)
    size = q.shape[1] // heads
    for t in range(q.shape[0]):
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            scores = torch.stack([q[t, part] @ k[s, part] / math.sqrt(size) for s in seen[t]])
            out[t, part] = sum(w * v[s, part] for w, s in zip(scores.softmax(0), seen[t]))
    return out


def encoder_block(block: SideBlock, x: Tensor, visible: list[list[int]]) -> Tensor:
    """A post-norm encoder block on one sequence (T, D)."""
    q, k, v = block.qkv(x).chunk(3, dim=-1)
    x = block.attention_norm(x + block.attention_output(attend(q, k, v, visible, block.num_heads)))
    return block.feed_forward_norm(x + block.feed_forward_out(F.gelu(block.feed_forward_in(x))))


def from_the_equations(side: SideNetwork, layers: list[Tensor], mask: Tensor, dropped: Collection[int] = ()) -> Tensor:
    """The up-projected output `(B, T, WIDTH)` for features `B_0 .. B_L`; a padding token's is not defined (NaN)."""
    config, reach = side.config, side.config.window_size // 2
    batch, tokens, _ = layers[0].shape
    output, last = torch.full_like(layers[0], math.nan), layers[-1]
    if config.normalise_features:
        layers = [feature * (feature.square().mean(-1, keepdim=True) + 1e-6).rsqrt() for feature in layers]
    for b in range(batch):
        real = [t for t in range(tokens) if mask[b, t]]
        before = {t: [s for s in real if not side.causal or s <= t] for t in real}
        theta = side.down(layers[0][b, real])
        for j in range(1, len(side.blocks) + 1):
            if j in dropped:
                continue
            fusion = side.blocks[j - 1].fusion
            keys = []  # C~, the slots one after the other along the tokens
            for i in range(config.window_size):
                layer = place(side, j) - reach + i
                for t in real:
                    inside = 0 <= layer <= side.num_layers
                    c = projection(side, j, i) @ layers[layer][b, t] if inside else torch.zeros(NARROW).double()
                    keys.append(c + fusion.positions[i])
            stacked = torch.stack(keys)
            index = {t: n for n, t in enumerate(real)}
            seen = [[i * len(real) + index[s] for i in range(config.window_size) for s in before[t]] for t in real]
            q, k, v = (
                theta @ fusion.query.weight.t(),
                stacked @ fusion.key.weight.t(),
                stacked @ fusion.value.weight.t(),
            )
            x = attend(q, k, v, seen, 1)
            if config.residual:
                x = x + stacked[reach * len(real) :][: len(real)]
            if config.residual == "state":
                x = x + theta
            theta = encoder_block(side.blocks[j - 1], x, [[index[s] for s in before[t]] for t in real])
        output[b, real] = side.up(theta)
    if config.output_mix == "add":
        return last + last.square().mean(-1, keepdim=True).sqrt() * output
    return output


@pytest.mark.parametrize("window", [1, 3, 5, 9])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"residual": True},
        {"residual": "state"},
        {"share_projections": True},
        {"output_mix": "add"},
        {"output_mix": "add", "residual": True, "normalise_features": True},
        {"layers_per_block": 2},
        {"layers_per_block": LAYERS, "residual": True},
        {"layers_per_block": 2, "share_projections": True},
    ],
    ids=[
        "plain",
        "residual",
        "state",
        "shared",
        "sum",
        "normalised",
        "every second",
        "one",
        "shared second",
    ],
)
def test_equals_the_equations_masked_and_ragged(window: int, causal: bool, options: dict[str, object]) -> None:
    side = network(causal, window_size=window, **options)
    with torch.no_grad():
        found = side(features(), MASK)
        expected = from_the_equations(side, features(), MASK)
    torch.testing.assert_close(found[MASK], expected[MASK], **EXACT)
    assert found.isfinite().all()


def test_blocks_stand_at_every_nth_layer_from_the_last() -> None:
    config = LadderConfig(window_size=1, layers_per_block=4)
    assert list(SideNetwork(config, 8, 10).places) == [2, 6, 10]
    with pytest.raises(FastpeftError, match="layers_per_block=4, but the backbone has 3 layers"):
        SideNetwork(config, 8, 3)


def test_there_are_six_blocks_at_most_where_nobody_says_it() -> None:
    places = {layers: list(SideNetwork(LadderConfig(window_size=1), 8, layers).places) for layers in (6, 7, 12)}
    assert places == {6: [1, 2, 3, 4, 5, 6], 7: [1, 3, 5, 7], 12: [2, 4, 6, 8, 10, 12]}


@pytest.mark.parametrize("causal", [False, True])
def test_padding_changes_nothing(causal: bool) -> None:
    side = network(causal, window_size=3)
    short = [feature[1:2, :3] for feature in features()]
    torch.testing.assert_close(side(features(), MASK)[1:2, :3], side(short), **EXACT)


@pytest.mark.parametrize("run", [SideRun, DirectRun])
@pytest.mark.parametrize("causal", [False, True])
def test_without_a_mask_it_is_as_with_one_that_hides_nothing(run: type[SideRun], causal: bool) -> None:
    side, layers, found = network(causal, window_size=3), features(), []
    for mask in (None, torch.ones_like(MASK)):
        one = run(side, mask, 0)
        for layer, feature in enumerate(layers):
            one.feed(layer, feature)
        found.append(one.output())
    torch.testing.assert_close(*found, **EXACT)


def test_blocks_share_one_mask() -> None:
    side, tokens = network(causal=True, window_size=1, fusion="gated").float(), 1024
    layers = [feature.float() for feature in features(1, tokens)]
    mask = torch.ones(1, tokens, dtype=torch.bool)
    mask[:, :2] = False
    with MemoryTracker() as tracker:
        side(layers, mask).sum().backward()
    assert LAYERS > 2
    assert tracker.peak < 2 * 4 * tokens**2, "two masks to be added"


@pytest.mark.parametrize("shared", [False, True])
def test_autocast_keeps_copies_of_shared_projections_alone(shared: bool) -> None:
    side = network(window_size=3, share_projections=shared).float()
    layers = [feature.float() for feature in features()]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), MemoryTracker() as tracker:
        tracker.add([*side.parameters(), *layers])
        kept = -tracker.current
        side(layers)
        kept += tracker.current
    assert (kept > 0) == shared


@pytest.mark.parametrize("causal", [False, True])
def test_rows_of_padding_only_are_finite_with_finite_gradients(causal: bool) -> None:
    side = network(causal, window_size=5)
    side(features(), torch.zeros(3, 5, dtype=torch.bool)).sum().backward()
    assert all(p.grad.isfinite().all() for p in side.parameters() if p.grad is not None)


def test_gated_fusion_of_a_window_of_one_is_lst() -> None:
    side = network(window_size=1, fusion="gated")
    layers = features()
    theta = side.down(layers[0])
    for j, block in enumerate(side.blocks, 1):
        gate = 1 / (1 + math.exp(-block.fusion.alpha.item() / 0.1))
        fused = gate * theta + (1 - gate) * side.projections[str(j)](layers[j])
        everything = [list(range(fused.shape[1]))] * fused.shape[1]
        theta = torch.stack([encoder_block(block, row, everything) for row in fused])
    torch.testing.assert_close(side(layers), side.up(theta), **EXACT)


def test_the_gate_starts_in_the_middle() -> None:
    fusion = GatedFusion(LadderConfig(window_size=1, fusion="gated"))
    theta, c = torch.randn(2, 3, 4), torch.randn(2, 1, 3, 4)
    assert fusion(theta, c, None, 0).equal((theta + c[:, 0]) / 2)


@pytest.mark.parametrize(
    ("gradients", "expected"),
    [
        (False, [1, 1, 2, 4]),  # theta_0; none; block 1; blocks 2 and 3
        (True, [1, 1, 1, 4]),  # all at the end, when the backbone has run
    ],
)
def test_blocks_run_as_soon_as_their_window_is_complete(gradients: bool, expected: list[int]) -> None:
    side = network(window_size=3)
    run = SideRun(side, None, 0, keep_states=True)
    lengths = []
    with torch.set_grad_enabled(gradients):
        for layer, feature in enumerate(features()):
            run.feed(layer, feature)
            lengths.append(len(run.states))
    assert lengths == expected
    assert [tuple(state.shape) for state in run.states] == [(3, 5, NARROW)] * 4


def test_slots_outside_the_backbone_have_no_projection() -> None:
    side = network(window_size=9)
    inside = sum(0 <= j - 4 + i <= LAYERS for j in range(1, LAYERS + 1) for i in range(9))
    assert sum(p.weight.numel() for p in side.projections.values()) == inside * NARROW * WIDTH
    assert [block.fusion.slots for block in side.blocks] == [[3, 4, 5, 6], [2, 3, 4, 5], [1, 2, 3, 4]]


def test_shared_projections_are_one_for_each_slot_that_reads() -> None:
    for window, slots in ((1, 1), (3, 3), (9, 6)):  # of 9 slots around layers 1 to 3, three never reach into 0 .. 3
        side = network(window_size=window, share_projections=True)
        assert side.shared_projection.weight.shape == (slots * NARROW, WIDTH)
        assert not side.projections
    gated = network(window_size=1, fusion="gated", share_projections=True)
    (projected,) = gated.project(2, features()[2])
    torch.testing.assert_close(projected, gated.shared_projection(features()[2]), **EXACT)


def test_a_sum_starts_as_the_backbone() -> None:
    side = SideNetwork(LadderConfig(reduction_factor=2, window_size=3, output_mix="add"), WIDTH, LAYERS).double()
    assert side(features()).equal(features()[-1])


def test_dropped_blocks_pass_the_state_on_in_training_only() -> None:
    side = network(window_size=3, layer_drop=0.5)
    whole, mask = from_the_equations(side, features(), MASK), MASK
    for _ in range(2):
        torch.testing.assert_close(side(features(), mask, seed=3)[mask], whole[mask], **EXACT)
    side.train()
    for seed in range(8):
        run = SideRun(side, mask, seed, keep_states=True)
        for layer, feature in enumerate(features()):
            run.feed(layer, feature)
        dropped = [j for j in range(1, LAYERS + 1) if run.states[j] is run.states[j - 1]]
        expected = from_the_equations(side, features(), mask, dropped)
        torch.testing.assert_close(run.output()[mask], expected[mask], **EXACT)
        assert run.output().equal(side(features(), mask, seed=seed))


def test_blocks_are_dropped_as_often_as_asked() -> None:
    side = network(window_size=1, fusion="gated", layer_drop=0.3).train()
    runs = [SideRun(side, None, seed)._dropped for seed in range(2000)]
    for block in range(1, LAYERS + 1):
        assert abs(sum(block in dropped for dropped in runs) / 2000 - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 2000)
    assert len(set(map(frozenset, runs))) == 2**LAYERS  # each by itself


def test_every_parameter_trains() -> None:
    for config in (
        {"window_size": 9, "residual": True, "share_projections": True},
        {"window_size": 1, "fusion": "gated"},
    ):
        side = network(**config)
        side(features(), MASK)[MASK].square().sum().backward()
        assert [name for name, p in side.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_feature_dropout_follows_its_seed_in_training_only() -> None:
    side = network(window_size=3, feature_dropout=0.3)
    evaluated = side(features(), MASK, seed=1)
    assert evaluated.equal(side(features(), MASK, seed=2))
    side.train()
    first = side(features(), MASK, seed=1)
    assert first.equal(side(features(), MASK, seed=1))
    assert not first.allclose(side(features(), MASK, seed=2))
    assert not first.allclose(evaluated)


def test_each_block_drops_other_features() -> None:
    config = LadderConfig(window_size=3, feature_dropout=0.3)
    first, second = (WindowFusion(config, NARROW, block, [0, 1, 2], causal=False) for block in (1, 2))
    second.load_state_dict(first.state_dict())
    given = torch.randn(2, 5, NARROW), torch.randn(2, 3, 5, NARROW), None, None, 7, None
    assert first(*given).equal(first(*given))
    assert not first(*given).allclose(second(*given))


def test_options_are_settings_of_the_command_line() -> None:
    written = {"layer_drop": "0.1", "share_projections": "true", "output_mix": "add"}
    given = {name: parse_value(text) for name, text in written.items()}
    for method in ("k-lst", "lst"):
        assert sort_settings(get_method(method), given) == (given, {})
    for name, value in (("layer_drop", "often"), ("share_projections", 1), ("output_mix", 2)):
        with pytest.raises(FastpeftError, match=f"the setting {name} is {value!r}; it must be of the type"):
            sort_settings(get_method("k-lst"), {name: value})


def test_options_are_saved_and_loaded(tmp_path: Path) -> None:
    options = {
        "layer_drop": 0.1,
        "share_projections": True,
        "output_mix": "add",
    }
    LadderConfig(**options).save_pretrained(tmp_path)
    loaded = LadderConfig.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in options} == options


def test_defaults_of_the_report() -> None:
    assert [LadderConfig(window_size=k).dropout for k in (1, 7, 9, 11)] == [0, 0, 0.2, 0.2]
    assert LadderConfig(feature_dropout=0.0).dropout == 0
    side = SideNetwork(LadderConfig(), hidden_size=2048, num_layers=1)
    assert (side.width, side.blocks[0].num_heads, side.blocks[0].feed_forward_in.out_features) == (256, 4, 1024)
    assert isinstance(side.blocks[0].fusion, WindowFusion)


@pytest.mark.parametrize("kind", [SideRun, DirectRun])
def test_features_out_of_order_are_refused(kind: type[SideRun]) -> None:
    run = kind(network(window_size=3), None, 0)
    run.feed(0, features()[0])
    with pytest.raises(FastpeftError, match="layer 2 came where that of layer 1"):
        run.feed(2, features()[2])
    with pytest.raises(FastpeftError, match="read 1 features of 4"):
        run.output()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"window_size": 4}, "window_size=4; .* odd number"),
        ({"window_size": 17}, "at most 15"),
        ({"window_size": 0}, "window_size=0; give a whole number from 1"),
        ({"window_size": True}, "window_size=True"),
        ({"reduction_factor": 2.0}, r"reduction_factor=2\.0"),
        ({"layer_drop": 1.0}, r"layer_drop=1\.0; give a probability from 0 to below 1\."),
        ({"output_mix": "yes"}, "output_mix='yes'; allowed are 'add' and False, or None"),
        ({"residual": "theta"}, "residual='theta'; allowed are 'state', True and False, or None"),
        ({"feature_dropout": 1.0}, r"feature_dropout=1\.0; give a probability"),
        ({"fusion": "sum"}, "fusion='sum'; allowed are 'cross_attention' and 'gated'"),
        ({"fusion": "gated"}, "fusion='gated' with window_size=9"),
        ({"fusion": "gated", "window_size": 1, "residual": True}, "a gate mixes one feature"),
        ({"feature_dropout": "0.1"}, "feature_dropout='0.1'; give a probability"),
        ({"layer_drop": None}, "layer_drop=None; give a probability"),
        ({"share_projections": "no"}, r"share_projections='no'; allowed are True and False\."),
        ({"causal": "yes"}, "causal='yes'; allowed are True and False, or None"),
        ({"feature_modules": []}, r"feature_modules=\[\]; give a list with the names"),
        ({"feature_modules": 3}, "feature_modules=3; give a list with the names"),
    ],
)
def test_bad_configurations_are_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(FastpeftError, match=message):
        LadderConfig(**config)


def test_a_configuration_keeps_lists_of_its_own() -> None:
    names = ["0", "2"]
    config = LadderConfig(feature_modules=names)
    names.append("4")
    assert config.feature_modules == ["0", "2"] == LadderConfig(feature_modules=("0", "2")).feature_modules


def test_widths_that_do_not_divide_are_refused() -> None:
    message = "reduction_factor=3 does not divide the backbone's width, 16. Choose one of 1, 2, 4"
    with pytest.raises(FastpeftError, match=message):
        SideNetwork(LadderConfig(reduction_factor=3), WIDTH, LAYERS)


@pytest.mark.parametrize(("width", "heads"), [(48, 1), (197, 1), (200, 2), (256, 4)])
def test_heads_are_one_per_64_of_the_width_or_as_many_fewer_as_divide_it(width: int, heads: int) -> None:
    assert SideNetwork(LadderConfig(reduction_factor=1), width, 1).blocks[0].num_heads == heads


def test_a_block_of_several_heads_equals_the_equations() -> None:
    block = SideBlock(nn.Identity(), NARROW, 4, "gelu", causal=False).double()
    x = torch.randn(1, 5, NARROW, dtype=torch.float64)
    expected = encoder_block(block, x[0], [[*range(5)]] * 5)
    torch.testing.assert_close(block.encode(x, None)[0], expected, **EXACT)


@pytest.mark.long(but="gated")
@pytest.mark.parametrize(
    "options",
    [
        {"window_size": 3},
        {"window_size": 3, "residual": "state"},
        {"window_size": 1, "fusion": "gated"},
    ],
    ids=["window", "residual", "gated"],
)
def test_compiled_it_is_the_same(options: dict[str, object]) -> None:
    """In one graph, with dropout drawn from the seed."""
    side = network(**options).train()
    compiled = torch.compile(side, backend="aot_eager", fullgraph=True)
    found = {}
    for name, call in (("plain", side), ("compiled", compiled)):
        side.zero_grad()
        torch.manual_seed(5)  # the gated fusion's dropout is PyTorch's
        output = call(features(), MASK, 7)
        output.square().sum().backward()
        found[name] = [output.detach(), *(p.grad.clone() for p in side.parameters() if p.grad is not None)]
    assert len(found["compiled"]) == len(found["plain"]) > 5
    for one, other in zip(found["compiled"], found["plain"]):
        torch.testing.assert_close(one, other, **EXACT)


HALVES = [
    {"window_size": 1, "fusion": "gated"},
    {"window_size": 3},
    {"window_size": 9},
    {"window_size": 3, "residual": True, "normalise_features": True},
    {"window_size": 3, "residual": "state"},
    {"window_size": 5, "share_projections": True},
    {"window_size": 3, "output_mix": "add"},
]


def loss_and_gradients(side: SideNetwork, layers: list[Tensor], run: type[SideRun] = SideRun) -> tuple[Tensor, Tensor]:
    """Of the real tokens' squared output; all gradients in one vector."""
    passed = run(side, MASK, seed=5)
    for layer, feature in enumerate(layers):
        passed.feed(layer, feature)
    loss = passed.output()[MASK].float().square().mean()
    found = torch.autograd.grad(loss, list(side.parameters()), allow_unused=True, materialize_grads=True)
    assert {gradient.dtype for gradient in found} == {torch.float32}
    return loss, torch.cat([gradient.flatten() for gradient in found])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("config", HALVES, ids=str)
def test_beside_a_bfloat16_backbone_is_float32_to_rounding(
    config: dict, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses differ by up to 0.6 % and gradients by up to 6.4 %, as 8 numbers a token and random norms let them, and
    both repeat to the bit. Features are rounded already."""
    side = network(causal=causal, feature_dropout=0.0, **config).float().train()
    halves = [feature.bfloat16() for feature in features()]
    monkeypatch.setattr(module, "has_bfloat16", lambda: False)
    exact, gradients = loss_and_gradients(side, halves)
    assert exact.equal(loss_and_gradients(side, [half.float() for half in halves])[0])
    monkeypatch.setattr(module, "has_bfloat16", lambda: True)
    found, of_found = loss_and_gradients(side, halves)
    assert not found.equal(exact)
    assert (found - exact).abs() < 0.02 * exact
    assert (of_found - gradients).norm() < 0.13 * gradients.norm()
    again, of_again = loss_and_gradients(side, halves)
    assert found.equal(again)
    assert of_found.equal(of_again)
    direct, _ = loss_and_gradients(side, halves, DirectRun)
    assert (direct - exact).abs() < 0.02 * exact


def test_bfloat16_drops_the_same_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    side = network(window_size=9, feature_dropout=0.4).float().train()
    halves = [feature.bfloat16() for feature in features()]
    found = {}
    for fast in (False, True):
        monkeypatch.setattr(module, "has_bfloat16", lambda fast=fast: fast)
        found[fast] = side(halves, MASK, seed=7)[MASK].float()
    assert (found[True] - found[False]).norm() < 0.05 * found[False].norm()
    assert (side(halves, MASK, seed=8)[MASK].float() - found[False]).norm() > 0.1 * found[False].norm()


def test_the_processor_decides_for_float32_networks_beside_bfloat16_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_bfloat16", lambda: True)
    side = network(window_size=3)
    assert side(features()).dtype == torch.float64
    assert side([feature.bfloat16() for feature in features()]).dtype == torch.float64
    assert side.float()([feature.float() for feature in features()]).dtype == torch.float32
    assert side([feature.bfloat16() for feature in features()]).dtype == torch.bfloat16
