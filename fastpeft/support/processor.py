"""What the processor computes fast."""

from __future__ import annotations

import functools
from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")  # of Linux
_FLAGS = {"avx512_bf16", "amx_bf16", "bf16", "sve_bf16"}  # x86 (Intel, AMD), and ARM


@functools.cache
def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 by instructions of its own, as far as the system tells its flags."""
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:
        return False
    flags = next((line.partition(":")[2].split() for line in lines if line.lower().startswith(("flags", "features"))), [])
    return not _FLAGS.isdisjoint(flags)
