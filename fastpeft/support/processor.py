"""What the processor can do, by the flags that the system tells."""

from __future__ import annotations

from functools import cache
from pathlib import Path

_INFO = Path("/proc/cpuinfo")
_LISTS = ("flags", "Features")  # their names on x86 and on ARM
_BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # the last on ARM


@cache
def has_bfloat16() -> bool:
    """Whether the processor multiplies in bfloat16: AVX512-BF16, AMX or ARM's BF16.

    By its flags and never by a timing, so that the answer is the same in every process on it. False where the system
    does not tell them.
    """
    try:
        lines = _INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    listed = (line.partition(":") for line in lines)
    flags = next((values.split() for name, _, values in listed if name.strip() in _LISTS), [])
    return not _BFLOAT16.isdisjoint(flags)
