"""Window attention's Triton kernels against the reference in float64, with NaN wherever they must not read or leave a
value."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from poison import in_nan, poisoned_memory
from tolerances import FORWARD, GRADIENT, assert_as_accurate
from torch import Tensor

from fastpeft.ops import aten, noise, reference

pytest.importorskip("triton")
import triton

from fastpeft.kernels import tiles, window
from fastpeft.kernels.window_attention import window_attention
from fastpeft.kernels.window_attention_backward import window_attention_backward

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEED, BLOCK = 2**40 + 3, 7  # of a dropout that no test looks at


def operands(
    batch: int, heads: int, tokens: int, width: int, window: int, real: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """q, c and p, with scores of about 1."""
    generator = torch.Generator().manual_seed(batch + 10 * heads + 100 * tokens + 10_000 * width + window)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(device, dtype)

    q = normal(batch, heads, tokens, width, scale=width**-0.5)
    return q, normal(batch, real, tokens, width), normal(window, width)


def seed_on(q: Tensor) -> Tensor:
    return torch.tensor(SEED, device=q.device)


def attend(
    q: Tensor,
    c: Tensor,
    p: Tensor,
    mask: Tensor | None,
    slots: list[int],
    causal: bool,
    dropout: float,
    seed: Tensor,
    block: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The keys (B, N, D), the weights (B, H, T, N) and lse, composed of PyTorch's functions in the operands' dtype."""
    batch, real, tokens, width = c.shape
    kept = noise.kept(batch * tokens * width, dropout, seed, [16 * block + slot for slot in slots], c.device)
    kept = kept.view(real, batch, tokens, width).transpose(0, 1)
    keys = (c * kept / (1 - dropout) + p[slots][:, None]).flatten(1, 2)
    absent = p[[slot for slot in range(p.shape[0]) if slot not in slots]].expand(batch, -1, -1)
    visible = torch.ones(batch, tokens, tokens, dtype=torch.bool, device=q.device)
    visible = visible if mask is None else visible & mask[:, None]
    visible = visible.tril() if causal else visible
    number = visible.sum(-1)[:, None, :, None]  # (B, 1, T, 1)
    scores = (q @ keys.mT[:, None]).masked_fill(~visible.repeat(1, 1, real)[:, None], -torch.inf)
    scores = torch.cat((scores, q @ absent.mT[:, None] + number.clamp(min=1).to(q.dtype).log()), -1)
    nothing = number == 0
    scores = scores.masked_fill(nothing, 0)  # the softmax of -inf alone has no gradient
    lse = scores.logsumexp(-1).masked_fill(nothing[..., 0], -torch.inf).float()
    return torch.cat((keys, absent), 1), scores.softmax(-1).masked_fill(nothing, 0), lse


def composed(*args: Any) -> tuple[Tensor, Tensor]:
    """What plain PyTorch makes of it in the operands' dtype."""
    keys, weights, lse = attend(*args)
    return weights @ keys[:, None], lse


def magnitudes(dout: Tensor, q: Tensor, c: Tensor, p: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """The terms that out, lse, dq, dc and dp add up, by their absolute values."""
    keys, weights, lse = attend(q, c, p, *rest)
    dout, q, keys = dout.abs(), q.abs(), keys.abs()[:, None]
    out = weights @ keys
    dscores = weights * (dout @ keys.mT + (dout * out).sum(-1, keepdim=True))
    dkeys = (weights.mT @ dout + dscores.mT @ q).sum(1)  # (B, N, D)
    dc, dabsent = dkeys[:, : c.shape[1] * c.shape[2]], dkeys[:, c.shape[1] * c.shape[2] :]
    dp = torch.cat((dc.unflatten(1, c.shape[1:3]).sum((0, 2)), dabsent.sum(0)))
    lse = torch.cat((lse[lse.isfinite()].abs().flatten(), (q @ keys.mT).flatten()))
    return out, lse, dscores @ keys, dc / (1 - rest[3]), dp


def gradients(function: Any, dout: Tensor, q: Tensor, c: Tensor, p: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """out, lse, dq, dc and dp of `function` by autograd."""
    leaves = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in (q, c, p)]
    out, lse = function(*leaves, *rest)
    found = torch.autograd.grad(out, leaves, dout, allow_unused=True, materialize_grads=True)
    return out.detach(), lse.detach(), *found


def check(
    q: Tensor,
    c: Tensor,
    p: Tensor,
    mask: Tensor | None = None,
    slots: list[int] | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> None:
    """Launch both directions, twice for the same bits, and compare with float64."""
    rest = (mask, list(range(p.shape[0])) if slots is None else slots, causal, dropout, seed_on(q), BLOCK)
    dout = in_nan(torch.randn(q.shape, generator=torch.Generator().manual_seed(0)).to(q))
    plain = gradients(composed, dout.clone(), q, c, p, *rest)
    terms = magnitudes(*(x.double() for x in (dout, q, c, p)), *rest)
    exact = gradients(reference.window_attention, dout.double(), q.double(), c.double(), p.double(), *rest)
    with poisoned_memory():
        forward, again = window_attention(q, c, p, *rest), window_attention(q, c, p, *rest)
        arguments = (dout, q, c, p, mask, *forward, *rest[1:], *needs)
        backward = window_attention_backward(*arguments)
        again += window_attention_backward(*arguments)
    factors = (FORWARD, FORWARD, GRADIENT, GRADIENT, GRADIENT)
    for ours, repeated, needed, factor, most, *others in zip(
        forward + backward, again, (True, True, *needs), factors, terms, plain, exact
    ):
        assert ours.is_contiguous()
        assert torch.equal(ours, repeated)
        if not needed:
            assert ours.shape == (0,)
            continue
        something = others[1].isfinite()  # lse is -inf where nothing is seen
        assert torch.equal(ours.isfinite(), something)
        ours, *others = (x[something] for x in (ours, *others))
        assert_as_accurate(ours, *others, most, factor)


def masks(batch: int, tokens: int, device: str) -> Tensor:
    """Padding behind, before and between tokens, none, all but one, and a sentence of nothing else."""
    positions = torch.arange(tokens)
    kinds = (
        positions < tokens - 3,
        positions >= 2,
        positions % 3 != 1,
        positions >= 0,
        positions == tokens // 2,
        positions < 0,
    )
    return torch.stack([kinds[b % len(kinds)] for b in range(batch)]).to(device)


@pytest.mark.long(but="causal-torch.bfloat16-1-1-16-1-slots0")
@pytest.mark.parametrize(
    ("heads", "tokens", "width", "window", "slots"),
    [
        (1, 1, 16, 1, [0]),
        (2, 15, 24, 3, [0, 1, 2]),
        (3, 17, 18, 5, [0, 2, 3]),
        (1, 33, 48, 9, [4, 5, 6, 7, 8]),
        (2, 65, 96, 2, [1]),
    ],
)
@pytest.mark.parametrize(
    ("causal", "dtype"),
    [(False, torch.float32), (True, torch.bfloat16), (False, torch.float16)],
    ids=["all-torch.float32", "causal-torch.bfloat16", "all-torch.float16"],
)
def test_ragged_sizes(heads, tokens, width, window, slots, causal, dtype, device):
    args = operands(2, heads, tokens, width, window, len(slots), dtype, device)
    check(*map(in_nan, args), slots=slots, causal=causal, dropout=0.2)


@pytest.mark.long(but="16-15-torch.float32")
@pytest.mark.interp_full
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 15, 17, 33, 65])
@pytest.mark.parametrize("width", [16, 24, 48, 96])
def test_every_ragged_size(tokens, width, dtype, device):
    window = 1 + (tokens + width) % 15
    slots = list(range(window // 3, window))
    args = operands(1, 2, tokens, width, window, len(slots), dtype, device)
    check(*map(in_nan, args), mask=masks(1, tokens, device), slots=slots, causal=tokens % 3 == 0, dropout=0.1)


@pytest.mark.long(but="[]-all")
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("slots", [[0, 1, 2], [1, 2], []], ids=str)
def test_masks_of_every_shape(slots, causal, device):
    q, c, p = operands(6, 2, 19, 16, 3, len(slots), torch.float32, device)
    check(q, c, p, in_nan_mask(masks(6, 19, device)), slots, causal)


def in_nan_mask(mask: Tensor) -> Tensor:
    """The mask as a view between columns of the opposite."""
    return torch.stack((mask, ~mask), -1)[..., 0]


@pytest.mark.long(but="torch.float16")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_is_not_read(dtype, device):
    q, c, p = operands(5, 1, 20, 16, 3, 2, dtype, device)
    mask = masks(5, 20, device)
    rest = (mask, [0, 2], False, 0.0, None, BLOCK)
    hidden = ~mask[:, None, :, None]
    results = []
    for poisoned in (c.masked_fill(hidden, 0), c.masked_fill(hidden, torch.nan)):
        out, lse = window_attention(q, poisoned, p, *rest)
        backward = window_attention_backward(
            q, q, poisoned, p, mask, out, lse, *rest[1:], need_dq=True, need_dc=True, need_dp=True
        )
        results.append((out, lse, *backward))
    for zeros, nans in zip(*results):
        assert torch.equal(zeros, nans)
    assert results[0][3].masked_select(hidden).eq(0).all()


@pytest.mark.long(but="20-half")
@pytest.mark.parametrize("kind", ["half", "tf32", "ieee"])
@pytest.mark.parametrize("width", [20, 100, 140])
def test_every_tile(kind, width, device, monkeypatch):
    monkeypatch.setattr(window, "dot_kind_of", lambda _: kind)
    dtype = torch.bfloat16 if kind == "half" else torch.float32
    args = operands(1, 2, 35, width, 3, 2, dtype, device)
    if kind == "tf32" and device == "cuda":
        pytest.skip("TF32 errs more than float32 products do; the interpreter checks its tiles")
    if width > tiles.window_attention_width(kind):
        pytest.skip("left to the composed form")
    for dropout in (0.0, 0.1):  # whose tiles differ
        check(*map(in_nan, args), slots=[0, 1], causal=True, dropout=dropout)


@pytest.mark.long(but="2")
@pytest.mark.parametrize("heads", [2, 3])
def test_causal_heads(heads, device):
    """Tiles of queries straddle heads, of which the first is passed over in part; the last keys are 3."""
    args = operands(1, heads, 35, 20, 3, 2, torch.float32, device)
    check(*map(in_nan, args), mask=masks(1, 35, device), slots=[0, 2], causal=True)


@pytest.mark.long(but="10000-True-slots5")
@pytest.mark.parametrize(
    ("multiprocessors", "causal", "slots"),
    [
        (1, False, [0, 1, 2, 3]),
        (1, True, [1, 2]),
        (20, False, []),
        (20, True, [0, 1, 2, 3]),
        (10_000, False, [1, 2]),
        (10_000, True, [0, 1, 2, 3]),
        (10_000, True, []),
    ],
)
def test_splits(multiprocessors, causal, slots, device, monkeypatch):
    """One, some, and one for each tile of keys; with causal queries the last of these have nothing to do."""
    monkeypatch.setattr(tiles, "gpu", lambda _: tiles.Gpu(tiles.ANY, multiprocessors))
    args = operands(1, 2, 70, 16, 4, len(slots), torch.float16, device)
    check(*map(in_nan, args), mask=masks(1, 70, device), slots=slots, causal=causal, dropout=0.1)


def test_splits_fill_the_gpu():
    gpu = tiles.Gpu("sm_90", 132)
    tile = tiles.window_attention("fwd", "half", 96, False, "sm_90")
    programs = 16 * triton.cdiv(128, tile.block_m)  # of 16 sentences of 128 tokens and one head
    assert programs * window.splits_of(programs, 9 * triton.cdiv(128, tile.block_n), gpu) >= 132
    assert window.splits_of(132, 18, gpu) == 1
    assert window.splits_of(1, 0, gpu) == 1
    for programs, steps in itertools.product(range(1, 140, 3), range(1, 40)):
        splits = window.splits_of(programs, steps, gpu)
        assert programs * splits >= min(132, programs * steps)
        assert (splits - 1) * triton.cdiv(steps, splits) < steps  # none is empty


@pytest.mark.long(but="(False, False, False)")
@pytest.mark.parametrize("needs", list(itertools.product((True, False), repeat=3)), ids=str)
def test_only_what_is_needed(needs, device):
    check(*operands(2, 1, 18, 16, 5, 3, torch.float32, device), slots=[0, 1, 3], needs=needs)


@pytest.mark.long(but="0-0-21")
@pytest.mark.parametrize("width", [16, 18, 21])
@pytest.mark.parametrize(("seed", "block"), [(0, 0), (1, 1), (SEED, 5), (2**63 - 1, 2**28 - 1)], ids=str)
def test_the_dropout_of_the_reference(width, seed, block, device):
    batch, tokens, dropout, slots = 2, 18, 0.4, [1, 2]
    q, c, p = operands(batch, 1, tokens, width, 3, 2, torch.float32, device)
    kept = noise.kept(batch * tokens * width, dropout, seed, [16 * block + slot for slot in slots], c.device)
    kept = kept.view(2, batch, tokens, width).transpose(0, 1)
    seed = torch.tensor(seed, device=device)
    out, lse = window_attention(q, c, p, None, slots, False, dropout, seed, block)
    dout = torch.ones_like(q)
    _, dc, _ = window_attention_backward(
        dout, q, c, p, None, out, lse, slots, False, dropout, seed, block, False, True, False
    )
    assert torch.equal(dc != 0, kept)
    first = noise.kept(batch * tokens * width, dropout, seed, [16 * block], c.device)[0].view(batch, tokens, width)
    for t in (0, 7, 17):  # the only token of the only slot is what comes out
        mask = torch.arange(tokens, device=c.device).eq(t).expand(batch, tokens)
        alone = (c[:, :1], torch.zeros_like(p[:1]), mask, [0])
        found, _ = window_attention(q, *alone, False, dropout, seed, block)
        assert torch.equal(found[:, 0, 0] != 0, first[:, t])


@pytest.mark.parametrize("dropout", [1e-12, 1 - 1e-6])
def test_dropout_of_almost_nothing_and_almost_all(dropout, device):
    q, c, p = operands(1, 1, 16, 16, 1, 1, torch.float32, device)
    rest = (None, [0], False, dropout, seed_on(q), BLOCK)
    ours, theirs = window_attention(q, c, p, *rest)[0], reference.window_attention(q, c, p, *rest)[0]
    torch.testing.assert_close(ours, theirs)


@pytest.mark.long
def test_strides_are_honoured(device):
    q, c, p = operands(2, 3, 20, 16, 5, 3, torch.float32, device)
    projected = c.permute(0, 2, 1, 3).reshape(2, 20, 48)  # (B, T, S D), the output of one projection
    check(
        q.transpose(1, 2).contiguous().transpose(1, 2),
        projected.view(2, 20, 3, 16).transpose(1, 2),
        p.t().contiguous().t(),
        masks(2, 20, device),
        [0, 2, 4],
        causal=True,
    )
    check(q[:, :1].expand(2, 3, 20, 16), c[:1].expand(2, 3, 20, 16), p, slots=[0, 2, 4])


def test_offsets_pass_32_bits(device):
    """The last of 5 tokens starts at element 2^31 of a storage of which only the tokens are touched."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 5 GB of GPU memory")
    q, c, p = operands(1, 1, 5, 16, 1, 1, torch.float16, device)
    room = torch.empty(2**31 + 16, dtype=c.dtype, device=device)
    far = room.as_strided(c.shape, (0, 0, 2**29, 1)).copy_(c)
    rest = (None, [0], False, 0.0, None, 0)
    out, lse = window_attention(q, far, p, *rest)
    assert torch.equal(out, window_attention(q, c, p, *rest)[0])
    near, apart = (
        window_attention_backward(q, q, some, p, None, out, lse, *rest[1:], True, True, True) for some in (c, far)
    )
    for one, other in zip(near, apart):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("batch", "heads", "tokens"), [(0, 1, 3), (2, 0, 3), (2, 1, 0)])
def test_empty_sizes(batch, heads, tokens, device):
    q, c, p = operands(batch, heads, tokens, 16, 3, 2, torch.float32, device)
    out, lse = window_attention(q, c, p, None, [0, 1], False, 0.0, None, 0)
    assert out.shape == q.shape
    assert lse.shape == q.shape[:3]
    needs = (True, True, True)
    found = window_attention_backward(out, q, c, p, None, out, lse, [0, 1], False, 0.0, None, 0, *needs)
    for gradient, operand in zip(found, (q, c, p)):
        assert torch.equal(gradient, torch.zeros_like(operand))


@pytest.mark.parametrize(
    ("width", "dtype"),
    [(16, torch.float64), (129, torch.float32), (257, torch.bfloat16)],
    ids=["float64", "wide-ieee", "wide-half"],
)
def test_what_the_kernels_leave_to_the_composed_form(width, dtype, device, monkeypatch):
    q, c, p = operands(1, 1, 3, width, 3, 3, dtype, device)
    rest = (None, [0, 1, 2], False, 0.0, None, BLOCK)
    found, expected = window_attention(q, c, p, *rest), aten.window_attention(q, c, p, *rest)
    for ours, theirs in zip(found, expected):
        assert torch.equal(ours, theirs)
    monkeypatch.setattr(aten, "window_attention_backward", lambda *args: args, raising=False)
    args = (q, q, c, p, None, *found, *rest[1:], True, False, True)
    assert window_attention_backward(*args) == args


@pytest.mark.parametrize(("width", "expected"), [(1, 16), (16, 16), (17, 32), (48, 64), (128, 128), (256, 256)])
def test_width_block(width, expected):
    assert tiles.width_block(width) == expected


def test_a_width_takes_the_narrowest_tile_that_holds_it():
    for (arch, name, kind), found in tiles.WINDOW_ATTENTION.items():
        for width in range(1, tiles.window_attention_width(kind) + 1):
            pair = next(found[limit] for limit in sorted(found) if width <= limit)
            assert pair == tuple(tiles.window_attention(name, kind, width, dropout, arch) for dropout in (False, True))


def test_a_warp_has_rows_of_its_own():
    """By which Triton lays out chained products: on sm_90 64 rows of four warps, elsewhere no fewer than columns."""
    for (arch, name, kind), found in tiles.WINDOW_ATTENTION.items():
        for width, tile in ((width, tile) for width, pair in found.items() for tile in pair):
            if kind == "half" and width <= 128 and name != "bwd_bases" and arch != "gfx942":
                rows = tile.block_n if name == "bwd_keys" else tile.block_m
                assert rows >= (64 if arch == "sm_90" else width)
                assert rows == 16 * tile.num_warps or arch != "sm_90"
