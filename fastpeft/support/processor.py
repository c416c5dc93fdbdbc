"""What the processor is called, and which formats it multiplies fast.

The flags that the system lists say so, and never a timing: the answer is the same in every process. Where the system
lists no flags, no format is fast.
"""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path

_INFO = Path("/proc/cpuinfo")
_BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # the last on ARM
_INT8 = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})


@cache
def _told(*names: str) -> str:
    """What the system tells of the first core under one of these names."""
    try:
        lines = _INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    listed = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in listed if name.strip() in names), "")


def cpu_name() -> str:
    """The processor as the system calls it."""
    return _told("model name") or platform.processor() or platform.machine()


def _flags() -> frozenset[str]:
    return frozenset(_told("flags", "Features").split())  # their names on x86 and on ARM


def has_bfloat16() -> bool:
    """Whether the processor multiplies in bfloat16: AVX512-BF16, AMX or ARM's BF16."""
    return not _BFLOAT16.isdisjoint(_flags())


def prefers_bfloat16() -> bool:
    """Whether runs that do not say it compute in bfloat16: `has_bfloat16`, unless the variable FASTPEFT_BF16 is 0."""
    return os.environ.get("FASTPEFT_BF16") != "0" and has_bfloat16()


def has_int8() -> bool:
    """Whether the processor multiplies in int8 and adds up in int32, exactly: VNNI or AMX."""
    return not _INT8.isdisjoint(_flags())
