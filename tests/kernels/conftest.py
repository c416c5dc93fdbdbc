"""What Triton's interpreter needs beside `device`, and the tiles of SiVA's kernels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fastpeft.kernels import tiles
from fastpeft.ops.dispatch import tuners

TILES = {
    f"{'x'.join(map(str, tile[:3]))}{'-apart' if tile.apart else ''}": tile
    for tile in dict.fromkeys(itertools.chain(*tiles.SIVA_LINEAR.values()))
}


@pytest.fixture(scope="session", autouse=True)
def bfloat16_products(device: str) -> Iterator[None]:
    """The interpreter keeps bfloat16 as raw 16-bit integers and would multiply those; widen them for `tl.dot`."""
    if device == "cuda":
        yield
        return
    import triton.language as tl
    from triton.runtime.interpreter import interpreter_builder as builder

    multiply = builder.create_dot

    def create_dot(a: Any, b: Any, *rest: Any) -> Any:
        return multiply(
            *(builder.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)), *rest
        )

    builder.create_dot = create_dot
    yield
    del builder.create_dot


@pytest.fixture(params=TILES.values(), ids=TILES)
def tile(request: pytest.FixtureRequest, device: str) -> tiles.Tile:
    """Each tile that is shipped; on a GPU those that are shipped to it."""
    given: tiles.Tile = request.param
    if device == "cuda" and given not in tiles.siva_linear(tiles.gpu(torch.device(device, 0)).architecture, 1):
        pytest.skip("not shipped to this GPU")
    return given


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[[tiles.Tile], None]:
    """Makes every launch use this tile."""

    def launched(tile: tiles.Tile) -> None:
        for tuner in tuners.values():
            monkeypatch.setattr(tuner, "configs", [tile.config()])
        monkeypatch.setattr(tiles, "siva_linear_mixed", lambda *_: tile)

    return launched
