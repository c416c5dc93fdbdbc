"""The tiles of SiVA's kernels."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from fastpeft.kernels import tiles
from fastpeft.ops.dispatch import tuners

TILES = {
    f"{'x'.join(map(str, tile[:3]))}{'-apart' if tile.apart else ''}": tile
    for tile in dict.fromkeys(itertools.chain(*tiles.SIVA_LINEAR.values()))
}


@pytest.fixture(scope="session", autouse=True)
def interpreted(bfloat16_products: None) -> None:
    """All kernels here multiply bfloat16."""


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
