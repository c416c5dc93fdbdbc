"""Permissions that hold for the superuser too, in whose containers tests often run."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

_VERSION = 0x20080522  # of the structures in linux/capability.h
_DAC_OVERRIDE, _DAC_READ_SEARCH = 1, 2  # which let a process write and read what its mode forbids


@contextmanager
def bound_by_modes() -> Iterator[None]:
    """Let the modes of files and folders bind this thread inside it, whoever runs it."""
    if sys.platform != "linux":
        if os.geteuid() == 0:
            pytest.skip("what the superuser may do is not refused here")
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_VERSION, 0)  # of this thread
    held = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; then of the higher numbers

    def call(function: str, values: ctypes.Array[ctypes.c_uint32]) -> None:
        if getattr(libc, function)(header, values) != 0:
            raise OSError(ctypes.get_errno(), f"{function} failed")

    call("capget", held)
    fewer = (ctypes.c_uint32 * 6)(*held)
    fewer[0] &= ~(1 << _DAC_OVERRIDE | 1 << _DAC_READ_SEARCH)
    call("capset", fewer)
    try:
        yield
    finally:
        call("capset", held)
