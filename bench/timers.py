"""How long a call takes: on a CPU, on a card, on a card whose cache is cold, and as the replay of a CUDA graph."""

from __future__ import annotations

import ctypes
import platform
import time
from collections.abc import Callable, Mapping

import torch

WARM_UP = 3
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Let this process keep what it frees: glibc else gives it back, and the next call pays for fresh pages.

    Which candidate pays is chance where several take turns. `MALLOC_TRIM_THRESHOLD_=2147483647
    MALLOC_MMAP_THRESHOLD_=33554432` says the same to any process.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_MMAP_THRESHOLD, 32 * 2**20)  # the most that it takes; what is larger has pages of its own


def elapsed(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds that one `run` takes, averaged over `repeats`."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begin) / repeats


def captured(candidates: Mapping[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """The replays of what can be captured in a CUDA graph; of what cannot it is said why."""
    replays: dict[str, Callable[[], object]] = {}
    for name, run in candidates.items():
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    run()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
        except RuntimeError as error:
            print(f"{name} cannot be captured: {error}", flush=True)
            torch.cuda.synchronize()
            continue
        replays[name] = graph.replay
    return replays


def elapsed_cold(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """As `elapsed`, each time after more than the second-level cache was written."""
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    other = torch.empty(size, dtype=torch.int8, device=device)
    total = 0.0
    for _ in range(repeats):
        other.zero_()
        total += elapsed(run, device, 1)
    return total / repeats


def peak_mb(run: Callable[[], object]) -> float:
    """What the allocator of the card held at most while it ran, beside what others hold."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
