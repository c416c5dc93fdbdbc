"""Runs on a disk that is full, and then has room again: a process of `test_full_disk.py`, which mounts it.

Of what a whole run takes, a part is left free, so that another of its files is the first that does not fit each time.
Then one message must say so, every file that is there must be whole, and with room again the run must come to the bits
of one that had it all the time.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from reliability import kill

from fastpeft import FastpeftError, TrainConfig, train
from fastpeft.training.run_folder import RunFolder

RUNS: dict[str, dict[str, Any]] = {
    "siva": {"method": "siva", "save_steps": 2},
    "k-lst": {"method": "k-lst", "save_steps": 2},
    "full": {"method": "full", "save_steps": 2},
    "mezo": {"method": "mezo", "learning_rate": 1e-3},
    "mezo, with checkpoints": {"method": "mezo", "learning_rate": 1e-3, "save_steps": 2},
}


def fill(disk: Path, room: int) -> Path:
    """Leave so many bytes free on a disk; the file that takes the rest."""
    filler = disk / "filler"
    free = os.statvfs(disk)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, free.f_bavail * free.f_frsize - room))
    return filler


def taken(folder: Path) -> int:
    return sum(file.lstat().st_blocks * 512 for file in folder.rglob("*"))


def try_out(place: Path, disk: Path, kind: str, shares: list[float]) -> int:
    """Fill the disk before runs of one kind; how many of them it kept from their end."""
    given = {"model": str(place / "model"), "data": str(place / "reviews.csv"), "max_steps": 4, **RUNS[kind]}
    whole = train(TrainConfig(output=str(disk / "whole"), **given)).folder
    expected, needed = kill.results(whole), taken(whole)
    shutil.rmtree(whole)
    refused = 0
    for share in shares:
        run = TrainConfig(output=str(disk / "run"), **given)
        filler = fill(disk, int(share * needed))
        message = None
        try:
            train(run)
        except FastpeftError as error:
            refused += 1
            message = str(error)
        reasons = "No space left on device", "writing broke off, as on a full disk"
        assert message is None or (any(each in message for each in reasons) and "\n" not in message), message
        assert kill.unreadable(disk / "run") == []
        filler.unlink()
        if not RunFolder(disk / "run").finished:
            train(run, resume=True)
        assert kill.results(disk / "run") == expected, f"{kind} with {share:.2f} of its room has other bits"
        shutil.rmtree(disk / "run")
    return refused


def main() -> None:
    place, disk, kinds, shares = sys.argv[1:]
    torch.set_num_threads(1)
    for kind in kinds.split(";"):
        each = [float(share) for share in shares.split()]
        print(f"{kind}: {try_out(Path(place), Path(disk), kind, each)} of {len(each)} did not fit")


if __name__ == "__main__":
    main()
