"""Commands where what only Linux or POSIX has is hidden: `python -m reliability.other_machine COMMAND...`.

Libraries are loaded before, since they have chosen for this machine what of theirs to load.
"""

from __future__ import annotations

import importlib
import os
import shlex
import signal
import sys
from typing import Any

LIBRARIES = (
    "accelerate.utils datasets matplotlib.font_manager peft rich.progress safetensors.torch sklearn.metrics "
    "transformers.trainer typer"
)
MODULES = "fcntl", "grp", "pty", "pwd", "resource", "termios", "tty"
CALLS = {
    os: "fork getuid geteuid getpgid killpg posix_fadvise posix_fallocate sched_getaffinity sched_setaffinity statvfs "
    "sysconf uname",
    signal: "SIGALRM SIGCHLD SIGHUP SIGKILL SIGQUIT SIGUSR1 SIGUSR2 pthread_sigmask setitimer sigwaitinfo",
}
FOLDERS = "/proc/", "/sys/", "/dev/shm"


def hide() -> None:
    """From here on it looks like Windows to Python code; each name exists on Linux, so that none is out of date."""
    for name in MODULES:
        __import__(name)
        sys.modules[name] = None  # type: ignore[assignment]  # its import fails
    for module, names in CALLS.items():
        for name in names.split():
            delattr(module, name)
    sys.addaudithook(_refuse)
    sys.platform = "win32"


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event in {"open", "os.listdir", "os.scandir"} and str(arguments[0]).startswith(FOLDERS):
        raise FileNotFoundError(arguments[0])


if __name__ == "__main__":
    for library in LIBRARIES.split():
        importlib.import_module(library)
    hide()
    from fastpeft.cli import main

    for command in sys.argv[1:]:
        sys.argv = ["fastpeft", *shlex.split(command)]
        try:
            main()
        except SystemExit as ended:
            if ended.code:
                sys.exit(f"{command}: {ended.code}")
