"""What a processor can do is read from its flags."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fastpeft.support import processor


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    processor._told.cache_clear()
    yield
    processor._told.cache_clear()


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("processor\t: 0\nmodel name\t: A 4 bf16\nflags\t\t: fpu avx512f avx512_bf16 clzero\n", True),
        ("flags\t\t: fpu avx512f amx_bf16 amx_tile\n", True),
        ("processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\n", True),
        ("flags\t\t: fpu avx2 avx512f avx512_vnni\n", False),
        ("Features\t: fp asimd svebf16x\n", False),
        ("model name\t: bf16\n", False),
        ("", False),
        (None, False),
    ],
)
def test_bfloat16_by_flags(told: str | None, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "cpuinfo"
    if told is not None:
        info.write_text(told)
    monkeypatch.setattr(processor, "_INFO", info)
    assert processor.has_bfloat16() is expected


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("flags\t\t: fpu avx512f avx512_vnni\n", True),
        ("flags\t\t: fpu avx2 avx_vnni\n", True),
        ("flags\t\t: fpu amx_int8\n", True),
        ("flags\t\t: fpu avx512f avx512_bf16\n", False),
        ("", False),
    ],
)
def test_int8_by_flags(told: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(told)
    monkeypatch.setattr(processor, "_INFO", info)
    assert processor.has_int8() is expected
