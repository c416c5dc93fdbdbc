"""The pages of files that a process holds: those of a checkpoint stay in its memory once they were read.

Checkpoints are mapped, not read: a page comes into memory when it is first used, and stays. Nobody uses it again once
the weight was cast, or something else took its place, but only a system that runs out of memory takes it back.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_PAGEOUT = (
    21  # of madvise(2), from Linux 5.4 on: changed pages stay, those of a file are read again where they are used
)
_ALIGNED = 64  # bytes, as PyTorch's own allocator has it
_PERIOD = 0.02  # seconds, in which a disk reads some 50 MB
_MAPPED = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) .*\.safetensors$", re.MULTILINE)


def give_back(tensor: Tensor) -> None:
    """Take the pages of a file that hold `tensor`, and hold nothing else, out of memory until they are used again."""
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        _page_out(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)


def keep_in_file(tensors: Iterable[Tensor]) -> None:
    """Let tensors on the CPU lie in a file without a name; the system keeps in memory what is used of it.

    They are those of models that only answer: what was changed would be written to a disk again and again. Where there
    is no room for the file they stay as they are.
    """
    held = {id(each): each for each in tensors if each.is_cpu and each.nbytes and each.is_contiguous()}
    sizes = [-(-each.nbytes // _ALIGNED) * _ALIGNED for each in held.values()]
    if not held or sys.platform != "linux":  # others keep the name of a file in use, or cannot reserve its room
        return
    with tempfile.NamedTemporaryFile(prefix="fastpeft-") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, sum(sizes))
        except OSError as error:  # else a write to a page that has no room would end the process
            logger.info("%s: what models have of their own stays in memory", error)
            return
        whole = torch.from_file(file.name, shared=True, size=sum(sizes), dtype=torch.uint8)
    for each, place in zip(held.values(), whole.split(sizes)):
        each.data = place[: each.nbytes].view(each.dtype).view(each.shape).copy_(each.detach())


@contextmanager
def files_paged_out() -> Iterator[None]:
    """Take the pages of checkpoints out of memory again and again while a model is loaded in another dtype."""
    if sys.platform != "linux":
        yield
        return
    done = threading.Event()

    def page_out() -> None:
        while not done.wait(_PERIOD):
            with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
                for start, end in _MAPPED.findall(maps.read()):
                    _page_out(int(start, 16), int(end, 16))

    thread = threading.Thread(target=page_out, name="page-out", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _page_out(start: int, end: int) -> None:
    """Advise the kernel, which may refuse: of whole pages in an address range."""
    size = mmap.PAGESIZE
    start, end = -(-start // size) * size, end // size * size
    if sys.platform == "linux" and end > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _PAGEOUT)
