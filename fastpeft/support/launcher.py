"""What a launcher, as `torchrun` or a comparison, says of the processes that it started."""

from __future__ import annotations

import os
import sys

from fastpeft.errors import FastpeftError

JOBS = "FASTPEFT_JOBS"  # a comparison tells its processes by it how many of them a machine may run at once


def import_path() -> list[str]:
    """Options of a Python that is to import what this process imports, and nothing else from the working folder."""
    return [] if {"", os.getcwd()} & set(sys.path) else ["-P"]  # which `-m` and `-c` alone would put first


def launched() -> int:
    """How many processes a launcher started, by what it tells each of them."""
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if size.isdigit() else 1


def refuse_several(what: str) -> None:
    """Raise `FastpeftError` where a launcher started several processes for `what`, which has one."""
    if launched() > 1:
        raise FastpeftError(
            f"{what} runs in one process, but a launcher such as torchrun started {launched()}. Start it without the "
            "launcher; only `fastpeft train` shares the rows of a run among processes."
        )


def is_first() -> bool:
    """Whether this is the one of them that writes and shows things."""
    return os.environ.get("RANK", "0") == "0"


def jobs() -> int:
    """How many processes of a comparison, of which this may be one, run at once on this machine."""
    count = os.environ.get(JOBS, "1")
    return int(count) if count.isdigit() else 1
