"""What the processor computes fast, by its flags: the same at every call on a machine."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}  # the last is of ARM
_INT8 = {"avx512_vnni", "avx_vnni", "amx_int8"}


@functools.cache
def _flags() -> frozenset[str]:
    """The flags of the first core, as Linux names them; none where there is no such list."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    name = "flags" if platform.machine() in ("x86_64", "AMD64") else "Features"
    found = (line.partition(":")[2] for line in text.splitlines() if line.startswith(name))
    return frozenset(next(found, "").split())


def has_bfloat16() -> bool:
    """Whether the CPU multiplies in bfloat16."""
    return not _BFLOAT16.isdisjoint(_flags())


def has_int8() -> bool:
    """Whether the CPU multiplies in int8 and adds up in int32, exactly."""
    return not _INT8.isdisjoint(_flags())
