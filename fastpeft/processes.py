"""Several processes that a launcher such as `torchrun` started: what all agree on, and what is said if one is lost."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from fastpeft.errors import FastpeftError, LostProcessError, first_line

_OF_GLOO = re.compile("gloo|pair closure|(closed|reset) by peer")  # the place in its sources, or what its sockets say


def launched() -> int:
    """How many processes a launcher started, by what it tells each of them."""
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if size.isdigit() else 1


def is_first() -> bool:
    """Whether this is the one of them that writes and shows things."""
    return os.environ.get("RANK", "0") == "0"


def refuse_several(what: str) -> None:
    """Raise `FastpeftError` where a launcher started several processes for `what`, which has one."""
    if launched() > 1:
        raise FastpeftError(
            f"{what} has one process, but a launcher started {launched()}. Start it without; `fastpeft train` shares "
            "the rows of a run among several."
        )


def meet(timeout: float) -> None:
    """Join the processes of the launcher, if there are several, in a default group for CPUs.

    Args:
        timeout: seconds after which one that does not answer is given up.

    Raises:
        LostProcessError: one of them is not there.
    """
    if launched() > 1 and dist.is_available() and not dist.is_initialized():
        with noticing_losses():
            dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))


def agreed(value: int, device: torch.device) -> int:
    """The whole number that the first process of the default group has; all of them call this together.

    Args:
        value: of this process.
        device: of a kind that the group can send from.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return value
    shared = torch.tensor([value], dtype=torch.int64, device=device)
    with noticing_losses():
        dist.broadcast(shared, src=0)
    return int(shared.item())


@contextmanager
def noticing_losses() -> Iterator[None]:
    """Let the loss of another process, which engines report in words of their own, be one error.

    Raises:
        LostProcessError: another process has ended, or did not answer within the time that the group has.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_loss(error):
            raise
        reason = re.sub(r"^\[[^\]]*\] ", "", first_line(error)).rstrip(".")  # without the place in gloo's sources
        raise LostProcessError(
            f"another process that trains with this one has ended, or does not answer ({reason}). Start all of them "
            "again, and go on from what is saved; it may be another number of them."
        ) from error


def _is_loss(error: RuntimeError) -> bool:
    """Whether an error comes from the exchange between processes; gloo's has no type of its own."""
    return (dist.is_available() and isinstance(error, dist.DistError)) or _OF_GLOO.search(str(error)) is not None
