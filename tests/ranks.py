"""Processes that share a gloo group on the CPU, and run functions of a test's module together."""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from forking import PROCESSES

from fastpeft import FastpeftError

SECONDS = 60  # that a call, or one of its collectives, may take: far above what any takes


@contextmanager
def started(folder: Path, size: int = 2) -> Iterator[Callable[..., list[Any]]]:
    """Start the processes, once for many calls.

    Args:
        folder: an empty one, where they find each other, so that no port is needed.
        size: how many.

    Yields:
        `run(function, *args)`: calls a function of a module's top level in all processes and returns what it returned
        by rank, an error of the library as well. Any other exception is raised.
    """
    pipes = [PROCESSES.Pipe() for _ in range(size)]
    processes = [
        PROCESSES.Process(target=_serve, args=(rank, size, str(folder / "store"), there), daemon=True)
        for rank, (_, there) in enumerate(pipes)
    ]
    for process in processes:
        process.start()

    def run(function: Callable[..., Any], *args: Any) -> list[Any]:
        module = sys.modules[function.__module__]
        for here, _ in pipes:
            here.send((module.__name__, module.__file__, function.__name__, args))
        results = []
        for rank, (here, _) in enumerate(pipes):
            assert here.poll(SECONDS), f"rank {rank} does not answer"
            results.append(here.recv())
        for result in results:
            if isinstance(result, Exception) and not isinstance(result, FastpeftError):
                raise result
        return results

    try:
        yield run
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _serve(rank: int, size: int, store: str, pipe: Connection) -> None:
    """Call what is asked for, until terminated."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}  # as torchrun does
    os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=timedelta(seconds=SECONDS)
    )
    while True:
        module, file, function, args = pipe.recv()
        if module not in sys.modules:
            spec = importlib.util.spec_from_file_location(module, file)
            sys.modules[module] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[module])
        try:
            result = getattr(sys.modules[module], function)(*args)
        except Exception as error:
            error.add_note("".join(traceback.format_exception(error)))  # a traceback cannot be sent
            result = error
        pipe.send(result)
