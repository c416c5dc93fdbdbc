"""What the processor multiplies fast, by the flags that the system tells.

By flags and never by a timing, so that the answer is the same in every process on it. None where the system tells none.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

_INFO = Path("/proc/cpuinfo")
_LISTS = ("flags", "Features")  # their names on x86 and on ARM
_BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # the last on ARM
_INT8 = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})


@cache
def _flags() -> frozenset[str]:
    """Those of the first core."""
    try:
        lines = _INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    listed = (line.partition(":") for line in lines)
    return frozenset(next((values.split() for name, _, values in listed if name.strip() in _LISTS), []))


def has_bfloat16() -> bool:
    """Whether the processor multiplies in bfloat16: AVX512-BF16, AMX or ARM's BF16."""
    return not _BFLOAT16.isdisjoint(_flags())


def prefers_bfloat16() -> bool:
    """Whether runs that do not say it compute in bfloat16: `has_bfloat16`, unless the variable FASTPEFT_BF16 is 0."""
    return os.environ.get("FASTPEFT_BF16") != "0" and has_bfloat16()


def has_int8() -> bool:
    """Whether the processor multiplies in int8 and adds up in int32, exactly: VNNI or AMX."""
    return not _INT8.isdisjoint(_flags())
