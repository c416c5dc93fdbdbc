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

_EXTRA = ("fastapi", "prometheus_client", "pydantic", "starlette", "uvicorn")
_CONNECTIONS = 1_024
_FILES = 1_024  # beside them, as of the models


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
        host, port: where to listen; port 0 is any free one.
        max_rows: texts of one pass.
        max_wait: seconds that the first request of a batch waits for others.
        max_length: as `Tasks` takes it.
        device: where the models are put. None: the best device there is.
        runs: a folder from which clients may add runs. None: they may not.
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
    _check_device(device)
    _let_open(_CONNECTIONS + _FILES)
    with _bound(host, port) as listening:
        with loading:
            tasks = Tasks(folders, device=device, max_length=max_length, max_rows=max_rows)
        limits = Limits()
        app = create_app(tasks, runs=runs, max_wait=max_wait, limits=limits)
        config = uvicorn.Config(
            app,
            http="h11",  # httptools, which uvicorn prefers where it is installed, reads headers without end
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=_CONNECTIONS,
            timeout_graceful_shutdown=int(limits.seconds + limits.generation),
        )
        for line in described(tasks):
            say(line)
        try:
            listening.listen(_CONNECTIONS)
        except OSError as error:  # another came since
            raise _address_error(host, port, error) from None
        shown = f"[{host}]" if ":" in host else host
        say(f"listening on http://{shown}:{listening.getsockname()[1]}, described at /docs; Ctrl-C ends it")
        with contextlib.suppress(KeyboardInterrupt):  # which the signal that ended it raises, once all is answered
            uvicorn.Server(config).run(sockets=[listening])


def described(tasks: Tasks) -> list[str]:
    """Which tasks share a backbone, and why others do not."""
    lines, said = [], set()
    for task in tasks:
        together = [task.name, *tasks.beside(task)]
        if task.name in said:
            continue
        said |= set(together)
        if len(together) > 1:
            lines.append(f"{', '.join(sorted(together))}: one backbone for all")
        else:
            why = f" ({task.reason})" if task.reason else ""
            held = f"; {task.held / 2**20:,.0f} MB of its weights are shared" if task.held else ""
            lines.append(f"{task.name}: a model of its own{why}{held}")
    return lines


def _check_device(device: str | None) -> None:
    try:
        if device is not None:
            torch.ones(1, device=device).item()
    except Exception as error:  # each kind of device has its own
        raise FastpeftError(
            f"the device {device!r} cannot be used: {first_line(error)} Give cpu or cuda, or leave --device out."
        ) from None


def _let_open(number: int) -> None:
    """Let this process have so many files and connections open, as far as the system lets it: many begin with 1,024."""
    try:
        import resource  # absent on Windows
    except ImportError:
        return
    own, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number if most == resource.RLIM_INFINITY else min(number, most)
    if own != resource.RLIM_INFINITY and own < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def _bound(host: str, port: int) -> socket.socket:
    """A socket with the address, which does not listen yet: no client comes before the models are loaded."""
    made = None
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except (OSError, UnicodeError) as error:
        if made is not None:
            made.close()
        raise _address_error(host, port, error) from None
    return made


def _address_error(host: str, port: int, error: Exception) -> FastpeftError:
    return FastpeftError(f"cannot listen on {host}:{port}: {first_line(error)} Give another --port or --host.")
