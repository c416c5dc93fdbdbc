"""A side network's step in C++: what the plain form computes, for any shapes, and what it leaves to that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from instructions import supported
from poison import poisoned_memory
from torch import Tensor

from fastpeft.ops import reference
from fastpeft.ops.side_step import ACTIVATIONS, weights_of

op = torch.ops.fastpeft.side_step_
compiled = pytest.mark.skipif(not supported(), reason="without the compiled module there is the plain form alone")


def operands(
    batch: int = 1,
    width: int = 12,
    slots: int = 3,
    tokens: int = 5,
    fused_heads: int = 1,
    heads: int = 1,
    hidden: int = 20,
    number: int = 1,
    masked: bool = False,
    eps: float = 1e-6,
    activation: str = "silu",
    wide: int = 7,
    dtype: torch.dtype = torch.float32,
) -> list[Any]:
    """Of a network of three blocks, of which two read the feature; rooms are larger than what is kept."""
    generator = torch.Generator().manual_seed(batch + width + tokens)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    slots = slots if fused_heads else 1
    side = fused_heads * width
    fusion = [draw(side, width) / 4, draw(width, side), draw(width)] if fused_heads else []
    linears = [draw(3 * width, width), draw(3 * width), draw(width, width), draw(width)]
    linears += [draw(hidden, width), draw(hidden), draw(width, hidden), draw(width)]
    block = weights_of(fusion, [*linears, *(draw(width) for _ in range(4))])
    window, keys = draw(batch, 1, tokens + 3, slots * width), draw(batch, 1, tokens + 2, 2 * width)
    visible = torch.rand(batch, 1, 1, tokens, generator=generator) > 0.4
    visible[..., -1] = True  # the token itself
    return [
        *(draw(batch, wide), draw(batch, width), draw(batch, 3, slots, width)),
        *(draw(2 * width, wide), draw(2 * width), [0, slots + slots // 2], eps, number, block),
        *(window[:, :, :tokens], keys[:, :, :tokens], visible if masked else None),
        *(hidden, fused_heads, slots // 2 if fused_heads else -1, 0.3, heads, 1e-5, 1e-6, ACTIVATIONS[activation]),
    ]


def run(compute: Any, arguments: list[Any]) -> list[Tensor]:
    """The state, and what was written."""
    copied = [each.clone() if isinstance(each, Tensor) and each.is_contiguous() else each for each in arguments]
    for place in (9, 10):
        copied[place] = torch.empty_strided(
            arguments[place].shape, arguments[place].stride(), dtype=arguments[place].dtype
        ).copy_(arguments[place])
    return [compute(*copied), copied[2], copied[9], copied[10]]


def check(**given: Any) -> None:
    arguments = operands(**given)
    with poisoned_memory():
        found = run(op, arguments)
    doubled = [each.double() if isinstance(each, Tensor) and each.is_floating_point() else each for each in arguments]
    exact = run(reference.side_step_, doubled)
    for ours, plain, true in zip(found, run(reference.side_step_, arguments), exact):
        error = (plain - true).abs().max()
        # twice the plain form's error, which sums in another order; 1e-6 where that happens to have none
        assert (ours - true).abs().max() <= 2 * error + 1e-6 * true.abs().max()


@pytest.mark.parametrize("simd", supported())
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"fused_heads": 0},
        {"fused_heads": 0, "width": 1, "hidden": 1, "tokens": 1},
        {"batch": 3, "masked": True, "heads": 3, "fused_heads": 2},
        {"batch": 2, "width": 72, "hidden": 288, "slots": 9, "tokens": 33, "heads": 2},
        {"width": 37, "hidden": 5, "slots": 5, "tokens": 70, "masked": True, "eps": 0.0},
        {"number": -1, "batch": 2},
        *({"activation": name} for name in ACTIVATIONS),
    ],
    ids=str,
)
def test_it_computes_the_plain_form(simd: str, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTPEFT_SIMD", simd)
    check(**given)


@pytest.mark.parametrize("given", [{"batch": 9}, {"dtype": torch.float64}])
def test_what_it_leaves_to_pytorch_is_the_same(given: dict[str, Any]) -> None:
    arguments = operands(**given)
    for ours, plain in zip(run(op, arguments), run(reference.side_step_, arguments)):
        torch.testing.assert_close(ours, plain)


@compiled
@pytest.mark.parametrize("batch", [1, 4])
def test_threads_change_no_bit(two_threads: None, batch: int) -> None:
    """Those of one text share the rows of its matrices."""
    arguments = operands(batch=batch, width=148, hidden=256, slots=9, tokens=20, wide=300)
    both = run(op, arguments)
    torch.set_num_threads(1)
    assert all(map(torch.equal, both, run(op, arguments)))
    assert not both[0].equal(run(reference.side_step_, arguments)[0])  # which sums in another order: it is C++


@pytest.mark.parametrize("fused_heads", [0, 2])
def test_opcheck(fused_heads: int) -> None:
    torch.library.opcheck(op.default, tuple(operands(batch=2, fused_heads=fused_heads, masked=True)))


@compiled
@pytest.mark.parametrize(
    ("place", "value"),
    [
        (3, torch.randn(168, 1)),  # as many numbers as the weight has
        (5, [0, 9]),
        (7, 3),
        (8, torch.randn(5)),
        (9, torch.randn(1, 1, 0, 36)),
        (10, torch.randn(1, 1, 0, 24)),
        (11, torch.ones(2, 1, 1, 5, dtype=torch.bool)),
        (12, -1),
        (13, -1),
        (14, 3),
        (16, 5),
    ],
)
def test_what_would_be_read_elsewhere_is_refused(place: int, value: Any) -> None:
    arguments = operands()
    arguments[place] = value
    with pytest.raises((RuntimeError, IndexError)):
        op(*arguments)


def test_parts_of_any_layout_are_written() -> None:
    arguments = operands()
    arguments[2] = torch.randn(1, 3, 5, 12)[:, :, :3]
    before = arguments[2].clone()
    op(*arguments)
    changed = (arguments[2] != before).any(-1).flatten().nonzero().flatten()
    assert changed.tolist() == arguments[5]
