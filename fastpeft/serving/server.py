"""`fastpeft serve`: what it checks before it loads anything, and the server itself."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from fastpeft.errors import FastpeftError, first_line, install
from fastpeft.serving.tasks import Tasks, parse_runs
from fastpeft.training.run_folder import RunFolder

_EXTRA = ("fastapi", "pydantic", "starlette", "uvicorn")
_CONNECTIONS = 512  # many systems let a process open 1,024 files


def serve(
    items: Sequence[str],
    *,
    host: str,
    port: int,
    max_rows: int,
    max_wait: float,
    max_length: int | None,
    device: str | None,
    runs: Path | None,
    loading: AbstractContextManager[None],
    say: Callable[[str], object],
) -> None:
    """Serve finished runs until Ctrl-C or SIGTERM, after which the requests that came before are answered.

    Args:
        items: folders of runs, RUN or NAME=RUN.
        host, port, max_rows, max_wait, max_length, device, runs: the options of the command line.
        loading: is entered while the models are loaded, to show that.
        say: is given messages for a person.

    Raises:
        FastpeftError: the extra `serve` is not installed, a run cannot be served, or the address cannot be used.
    """
    try:
        import uvicorn

        from fastpeft.serving.app import Limits, create_app
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        raise FastpeftError(f"serve needs {error.name}, which is not installed. Run {install('serve')}.") from None
    folders = parse_runs(items)
    for folder in folders.values():
        RunFolder(folder).check_finished()  # before any is loaded
    if runs is not None and not runs.is_dir():
        raise FastpeftError(f"the folder of runs {str(runs)!r} is not there. Name one that is, or leave --runs out.")
    try:
        if device is not None:
            torch.ones(1, device=device).item()
    except Exception as error:  # each kind of device has its own
        raise FastpeftError(
            f"the device {device!r} cannot be used: {first_line(error)} Give cpu or cuda, or leave --device out."
        ) from None
    is_ipv6 = ":" in host
    try:  # before the models load; who connects meanwhile waits
        listening = socket.create_server(
            (host, port), family=socket.AF_INET6 if is_ipv6 else socket.AF_INET, backlog=_CONNECTIONS
        )
    except (OSError, UnicodeError) as error:
        raise FastpeftError(
            f"cannot listen on {host}:{port}: {first_line(error)} Give another --port or --host."
        ) from None
    with listening:
        with loading:
            tasks = Tasks(folders, device=device, max_length=max_length, max_rows=max_rows)
        limits = Limits()
        config = uvicorn.Config(
            create_app(tasks, runs=runs, max_wait=max_wait, limits=limits),
            http="h11",  # httptools, which uvicorn prefers where it is installed, reads headers without end
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=_CONNECTIONS,
            timeout_graceful_shutdown=int(limits.seconds + limits.generation),
        )
        for line in described(tasks):
            say(line)
        shown = f"[{host}]" if is_ipv6 else host
        say(f"listening on http://{shown}:{listening.getsockname()[1]}, described at /openapi.json; Ctrl-C ends it")
        with contextlib.suppress(KeyboardInterrupt):  # which the signal that ended it raises, once all is answered
            uvicorn.Server(config).run(sockets=[listening])


def described(tasks: Tasks) -> list[str]:
    """Which tasks share a backbone, and why others do not."""
    lines: dict[str, None] = {}
    for task in tasks:
        if beside := tasks.beside(task):
            line = f"{', '.join(sorted([task.name, *beside]))}: one backbone for all"
        else:
            why = f" ({task.reason})" if task.reason else ""
            held = f"; {task.held / 2**20:,.0f} MB of its weights are shared" if task.held else ""
            line = f"{task.name}: a model of its own{why}{held}"
        lines[line] = None
    return list(lines)
