"""What a launcher, as `torchrun`, says of the processes that it started."""

from __future__ import annotations

import os


def launched() -> int:
    """How many processes a launcher started, by what it tells each of them."""
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if size.isdigit() else 1


def is_first() -> bool:
    """Whether this is the one of them that writes and shows things."""
    return os.environ.get("RANK", "0") == "0"
