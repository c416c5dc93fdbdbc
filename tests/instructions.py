"""What this processor has for tests to choose from."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch

from fastpeft.ops import backends
from fastpeft.ops.packing import can_pack

PACKED_DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if can_pack(torch.ones(1, 1), dtype)]


def supported() -> list[str]:
    """What FASTPEFT_SIMD can name here, fastest first; nothing without the compiled module."""
    if not any(choice.op == "feature_dropout_" and choice.backend == "cpp" for choice in backends.choices()):
        return []
    with mock.patch.dict(os.environ, FASTPEFT_SIMD="none"), pytest.raises(RuntimeError) as refused:
        torch.ops.fastpeft.feature_dropout_(torch.ones(1, 1, 1, 1), [0], 0.5, 0, 0)
    return str(refused.value).partition("are ")[2].partition(". Correct")[0].split(", ")
