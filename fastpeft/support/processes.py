"""Several processes that train together: what all agree on, and the loss of one of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from fastpeft.errors import FastpeftError, LostProcessError, first_line
from fastpeft.support.launcher import launched

T = TypeVar("T")

_OF_GLOO = re.compile("gloo|pair closure|(closed|reset) by peer")  # the place in its sources, or what its sockets say


def meet(timeout: float) -> None:
    """Join the processes of the launcher, if there are several, in a default group for CPUs.

    One that does not answer within `timeout` seconds is given up.

    Raises:
        LostProcessError: one of them is not there.
    """
    if launched() > 1 and dist.is_available() and not dist.is_initialized():
        with noticing_lost_processes():
            dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))


def is_held_by_fsdp(module: nn.Module) -> bool:
    """Whether FSDP shards the parameters of a module itself, which it may have gathered; also before the first pass."""
    held: bool = getattr(module, "_is_fsdp_managed_module", False)  # FSDP1 and FSDP2 leave this word for the compiler
    return held


def agreed(value: int, device: torch.device) -> int:
    """The `value` of the first process of the default group; all of them call this, with a device it can send from."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return value
    shared = torch.tensor([value], dtype=torch.int64, device=device)
    with noticing_lost_processes():
        dist.broadcast(shared, src=0)
    return int(shared.item())


@contextmanager
def noticing_lost_processes() -> Iterator[None]:
    """Let the loss of another process, which engines report in words of their own, be one error.

    Raises:
        LostProcessError: another process has ended, or did not answer within the time that the group has.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_lost_process(error):
            raise
        reason = re.sub(r"^\[[^\]]*\] ", "", first_line(error)).rstrip(".")  # without the place in gloo's sources
        raise LostProcessError(
            f"another process that trains with this one has ended, or does not answer ({reason}). Start all of them "
            "again, and go on from what is saved; it may be another number of them."
        ) from error


def _is_lost_process(error: RuntimeError) -> bool:
    """Whether an error comes from the exchange between processes; gloo's has no type of its own."""
    return (dist.is_available() and isinstance(error, dist.DistError)) or _OF_GLOO.search(str(error)) is not None


class Ranks:
    """The processes that train one model together, each on rows of its own; every method is called by all of them.

    Args:
        group: None is the default group of `torch.distributed` if that is initialised, or else this process alone.

    Attributes:
        size: how many there are.
        rank: the number of this one.

    Raises:
        FastpeftError: this process is not in the group.
    """

    def __init__(self, group: Any = None) -> None:
        alone = group is None and not (dist.is_available() and dist.is_initialized())
        self._group = group
        self.size = 1 if alone else dist.get_world_size(group)
        self.rank = 0 if alone else dist.get_rank(group)
        if self.rank < 0:
            raise FastpeftError(
                "this process is not in the process group that was given, so it has no part in the training. Train in "
                "the processes of the group only."
            )

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and logs."""
        return self.rank == 0

    def on(self, rank: int) -> str:
        """Words for a message: on which process something is, where there are several."""
        return f" on rank {rank}" if self.size > 1 else ""

    def losses(self, loss: float, device: torch.device) -> list[float]:
        """The losses of all processes by rank, as doubles and so to the bit; the group can send from `device`."""
        if self.size == 1:
            return [loss]
        each = torch.empty(self.size, dtype=torch.float64, device=device)
        own = torch.tensor([loss], dtype=torch.float64, device=device)
        with noticing_lost_processes():
            dist.all_gather_into_tensor(each, own, group=self._group)
            return each.tolist()

    def gather(self, value: T) -> list[T]:
        """The values of all processes by rank, of any kind that can be pickled."""
        if self.size == 1:
            return [value]
        each: list[Any] = [None] * self.size
        with noticing_lost_processes():
            dist.all_gather_object(each, value, group=self._group)
        return each

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether `flag` is true in some process; the group can send from `device`."""
        if self.size == 1:
            return flag
        shared = torch.tensor([flag], dtype=torch.uint8, device=device)
        with noticing_lost_processes():
            dist.all_reduce(shared, dist.ReduceOp.MAX, group=self._group)
            return bool(shared.item())

    def together(self, work: Callable[[], T]) -> T:
        """Do `work`, and wait for the others; a FastpeftError of one is raised on all.

        Returns:
            What `work` returned here.
        """
        fault: FastpeftError | None = None
        try:
            done = work()
        except FastpeftError as error:
            fault = error
        for each in self.gather(fault):
            if each is not None:
                raise each
        return done

    def first_does(self, work: Callable[[], None]) -> None:
        """Let the first process do `work`, for which the others wait; its FastpeftError is raised on all."""
        self.together(work if self.is_first else lambda: None)

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.gather(None)

    def check_same(self, what: Mapping[str, Any]) -> None:
        """Raise, on all, unless those that have a value under a name have the same one."""
        seen: dict[str, tuple[int, Any]] = {}
        for rank, entries in enumerate(self.gather(what)):
            for name, value in entries.items():
                first, expected = seen.setdefault(name, (rank, value))
                if value != expected:
                    raise FastpeftError(
                        f"of the processes that train together, rank {rank} differs from rank {first} in {name}, so "
                        "they would train different models. Begin with the same weights, files and settings in every "
                        "process, and change nothing in one alone."
                    )

    @torch.no_grad()
    def share(self, model: nn.Module) -> None:
        """Give all the parameters and buffers that the first process has."""
        if self.size == 1:
            return
        for tensor in (*model.parameters(), *model.buffers()):
            given = tensor.contiguous()  # what cannot be sent as it is, is copied
            with noticing_lost_processes():
                dist.broadcast(given, group=self._group, group_src=0)
            tensor.copy_(given)
