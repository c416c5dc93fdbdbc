"""What Triton's interpreter needs beside `device`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


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
