"""Where the processes of cells run: on this machine, or on the nodes of a Ray cluster. Both run the same command."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastpeft.errors import FastpeftError, did_you_mean, first_line, install
from fastpeft.support.launcher import JOBS

logger = logging.getLogger(__name__)

_RETRIES = 3  # of a cell whose worker is lost
_PATIENCE_S = 10.0  # for a cluster to answer
_PASSED_ON = ("FASTPEFT_", "HF_", "WANDB_", "MLFLOW_")  # how variables begin that a node is given


class ProcessExit(NamedTuple):
    """The end of a process: the seconds that it took, and the reason, in words that follow `the process ended`."""

    seconds: float
    reason: str


class Executor(ABC):
    """What runs processes, several at once. They are started only inside `with`, after which none is left.

    Attributes:
        jobs, threads: how many run at once, and the CPU threads of each; known inside `with`.
    """

    jobs = 1
    threads = 1

    def __enter__(self) -> Executor:
        try:
            self._open()
        except BaseException:
            self._close()
            raise
        self._pool = ThreadPoolExecutor(self.jobs)
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._pool.shutdown()
        self._close()

    def start(self, arguments: Sequence[str], log: Path, kept: Sequence[int] = ()) -> Future[ProcessExit]:
        """Start Python with `arguments`. What it says is added to the file `log`.

        The process has the file descriptors `kept` too, if it runs on this machine.
        """
        return self._pool.submit(self._begin(arguments, log, kept))

    @abstractmethod
    def _open(self) -> None:
        """Prepare, and set `jobs` and `threads`."""

    @abstractmethod
    def _begin(self, arguments: Sequence[str], log: Path, kept: Sequence[int]) -> Callable[[], ProcessExit]:
        """Start a process, and return what waits for its end."""

    @abstractmethod
    def stop(self) -> None:
        """Ask what runs to save where it has come to, and to end."""

    @abstractmethod
    def kill(self) -> None:
        """End what runs at once."""

    def _close(self) -> None:
        """Undo `_open`."""


class Local(Executor):
    """Processes on this machine. Several at once share its CPU threads, and where it has several GPUs, each has one.

    With one at a time the environment stays as it is.
    """

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self.threads = max(1, torch.get_num_threads() // jobs)
        self._gpus = _gpus() if jobs > 1 else []
        self._slots = list(range(jobs))  # that are free
        self._running: dict[subprocess.Popen[bytes], int] = {}  # and their slots

    def _open(self) -> None:
        if 0 < len(self._gpus) < self.jobs:
            shared = f"{len(self._gpus)} GPUs" if len(self._gpus) > 1 else "one GPU"
            logger.warning("%d cells run at once and share %s and the memory there", self.jobs, shared)

    def _begin(self, arguments: Sequence[str], log: Path, kept: Sequence[int]) -> Callable[[], ProcessExit]:
        slot, began = self._slots.pop(0), time.monotonic()
        with log.open("ab") as out:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                pass_fds=() if os.name == "nt" else kept,
                env={**os.environ, **self._environment(slot)},
            )
        self._running[process] = slot

        def wait() -> ProcessExit:
            code = process.wait()
            self._slots.append(self._running.pop(process))
            return ProcessExit(time.monotonic() - began, _reason(code))

        return wait

    def _environment(self, slot: int) -> dict[str, str]:
        if self.jobs == 1:
            return {}
        own = _threads_environment(self.threads, self.jobs)
        if len(self._gpus) > 1:
            own["CUDA_VISIBLE_DEVICES"] = self._gpus[slot % len(self._gpus)]
        return own

    def stop(self) -> None:
        for process in list(self._running):
            process.terminate()

    def kill(self) -> None:
        for process in list(self._running):
            process.kill()


class Ray(Executor):
    """Processes on the nodes of a Ray cluster: that of `RAY_ADDRESS`, or else one on this machine, for this time.

    Each is started by a task of Ray, which has it tried again elsewhere if the worker is lost. All nodes have the
    working folder and the log in the same place, and this library. Where the cluster has GPUs, each process has one.

    Args:
        jobs: how many run at once; None: as many as the cluster has GPUs, or else nodes.
        most: the most that there is to run.

    Raises:
        FastpeftError: Ray is not installed.
    """

    def __init__(self, jobs: int | None, most: int) -> None:
        if importlib.util.find_spec("ray") is None:
            raise FastpeftError(
                f"the executor ray needs the package ray, which is not installed. Run {install('ray')}, or "
                "choose the executor local."
            )
        self._asked, self._most = jobs, most
        self._running: set[Any] = set()
        self._own, self._own_folder = False, ""  # whether the connection, and where the cluster, is ours to end

    def _open(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        self._ray = ray
        self._own = not ray.is_initialized()
        if self._own:
            self._connect()
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        cpus = [int(node["CPU"]) for node in nodes]
        limit = torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else max(cpus, default=1)
        gpus = [int(node.get("GPU", 0)) for node in nodes]
        self.jobs = min(self._most, self._asked or sum(gpus) or max(1, len(nodes)))
        room = {  # by threads of a process, how many each node takes
            threads: [min(cpu // threads, gpu) if any(gpus) else cpu // threads for cpu, gpu in zip(cpus, gpus)]
            for threads in range(1, 1 + min(limit, max(cpus, default=0)))
        }
        enough = [threads for threads, slots in room.items() if sum(slots) >= self.jobs]
        self.threads = max(enough, default=1)
        slots = room.get(self.threads, [0])
        self._beside = min(self.jobs, max(1, *slots))
        if not enough:
            logger.warning("Ray has room for %d cells at once; others wait in its queue", sum(slots))
        self._task = ray.remote(
            max_retries=_RETRIES, num_cpus=self.threads, num_gpus=int(any(gpus)), scheduling_strategy="SPREAD"
        )(_remote())

    def _connect(self) -> None:
        """Connect to the cluster, or start one, with as little as possible said or kept by Ray itself."""
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        address, handler = os.environ.get("RAY_ADDRESS") or "local", signal.getsignal(signal.SIGTERM)
        if address == "local":
            # Ray's own guard of memory would end a cell before the machine has to
            os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
            self._own_folder = tempfile.mkdtemp(prefix="ray-")
            cpus = max(torch.get_num_threads(), self._asked or 1)
            quiet |= {"num_cpus": cpus, "include_dashboard": False, "_temp_dir": self._own_folder}
        try:
            if ":" in address:  # Ray itself would look for minutes
                host, _, port = address.removeprefix("ray://").rpartition(":")
                socket.create_connection((host.strip("[]"), int(port)), _PATIENCE_S).close()
            self._ray.init(address, **quiet)
        except Exception as error:  # of very many types
            fault = f"Ray does not start on this machine ({first_line(error)}). Choose the executor local."
            if address != "local":
                fault = (
                    f"there is no Ray at {address!r}, which RAY_ADDRESS names ({first_line(error)}). Correct it, or "
                    "unset it to have one on this machine."
                )
            raise FastpeftError(fault) from error
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)  # of which Ray has set its own

    def _close(self) -> None:
        if self._own:
            self._ray.shutdown()
        if self._own_folder:
            shutil.rmtree(self._own_folder, ignore_errors=True)

    def _begin(self, arguments: Sequence[str], log: Path, kept: Sequence[int]) -> Callable[[], ProcessExit]:
        environment = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
        environment |= _threads_environment(self.threads, self._beside)
        given = (list(arguments), str(Path.cwd()), str(log.absolute()), environment, _WATCH, _RETRIES)
        task = self._task.remote(*given)
        self._running.add(task)
        began = time.monotonic()

        def wait() -> ProcessExit:
            try:
                seconds, code = self._ray.get(task)
                return ProcessExit(seconds, _reason(code))
            except self._ray.exceptions.RayError as error:
                reason = f"with its worker ({first_line(error)})"
                if cause := getattr(error, "cause", None):
                    reason = f"before it began ({cause}). All nodes need the working folder and the output in one place"
                return ProcessExit(time.monotonic() - began, reason)
            finally:
                self._running.discard(task)

        return wait

    def stop(self) -> None:
        for task in list(self._running):
            self._ray.cancel(task)

    def kill(self) -> None:
        for task in list(self._running):
            self._ray.cancel(task, force=True)


def make(name: str, jobs: int | None, most: int) -> Executor:
    """The executor of a name, for `most` processes in all.

    Raises:
        FastpeftError: there is no such executor, it lacks what it needs, or `jobs` is no number of processes.
    """
    if jobs is not None and (type(jobs) is not int or jobs < 1):
        raise FastpeftError(f"`jobs` is {jobs!r}; it must be a whole number from 1: how many cells run at once.")
    if name == "ray":
        return Ray(jobs, most)
    if name != "local":
        close = did_you_mean(name, ("local", "ray"))
        raise FastpeftError(f"`executor` is {name!r}; it must be local or ray.{close}")
    return Local(min(jobs or 1, max(1, most)))


def _threads_environment(threads: int, jobs: int) -> dict[str, str]:
    """What a process is told that is one of several: threads that wait for work leave the CPU to the others."""
    policy = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": policy, JOBS: str(jobs)}


def _gpus() -> list[str]:
    """The GPUs that processes may use, as `CUDA_VISIBLE_DEVICES` names them."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(number) for number in range(count)] if named is None else named.split(",")[:count]


def _reason(code: int) -> str:
    if code >= 0:
        return f"with exit code {code}"
    return f"by signal {-code}{' (perhaps for lack of memory)' if -code == getattr(signal, 'SIGKILL', 9) else ''}"


# Ray ends the children of a worker that it ends itself, but not those of one that is killed, which this does
_WATCH = "import os, sys; sys.stdin.read(); os.kill(int(sys.argv[1]), 9)"


def _remote() -> Callable[[list[str], str, str, dict[str, str], str, int], tuple[float, int]]:
    """What a worker of Ray does. Ray sends its code, since it has no module: a worker need not load this package."""

    def cell(
        arguments: list[str], cwd: str, log: str, environment: dict[str, str], watch: str, retries: int
    ) -> tuple[float, int]:
        import os
        import platform
        import subprocess
        import sys
        import time

        with open(log, "ab+") as out:
            lost = "The worker was lost. " if out.tell() else ""
            out.seek(0)
            tried_again = out.read().count(b"The worker was lost. On ")
            if lost and tried_again >= retries:  # Ray itself counts no worker that it ended for lack of memory
                told = f"Error: the worker was lost {tried_again + 1} times, perhaps for lack of memory."
                out.write(f"{lost}\n{told}\n".encode())
                return 0.0, 1
            out.write(f"{lost}On {platform.node()}:\n".encode())
            out.flush()
            began = time.monotonic()
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=cwd,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        watcher = subprocess.Popen([sys.executable, "-S", "-c", watch, str(process.pid)], stdin=subprocess.PIPE)
        try:
            while True:
                try:
                    code = process.wait(0.2)
                    return time.monotonic() - began, code
                except subprocess.TimeoutExpired:
                    continue  # now and then a request to end can be raised
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
        finally:
            process.kill()
            watcher.kill()
            watcher.communicate()

    return cell
