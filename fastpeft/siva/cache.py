"""Factors kept on disk, so that a weight is decomposed once whatever number of runs starts from it.

Off unless the environment variable `FASTPEFT_CACHE` names a folder. Each file there holds the factors of one weight at
one rank under a name made of both; it appears whole or not at all, so processes share the folder and may be killed.
Any file, or the folder, can be deleted at any time.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastpeft.support import files
from fastpeft.support.fingerprints import fingerprint

logger = logging.getLogger(__name__)

VARIABLE = "FASTPEFT_CACHE"
_FORMAT = 1  # to be raised when the same weight comes to give other factors


def entry(weight: Tensor, r: int) -> Path | None:
    """The file for the top r triplets of `weight`; None where nothing is kept."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        return None
    identity = f"{_FORMAT} {r} {fingerprint(weight)}"
    name = hashlib.sha256(identity.encode()).hexdigest()[:32]
    return Path(folder).expanduser() / f"siva-{name}.safetensors"


def read(path: Path) -> dict[str, Tensor] | None:
    """The tensors in an entry, on the CPU; None where there is none, or a damaged one, which is logged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            expected = (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError) as error:
        reason = str(error)
    else:
        if _digest(tensors) == expected:
            return tensors
        reason = "its checksum is wrong"
    logger.warning("the cached factors in %s cannot be used (%s); they are computed anew", path, reason)
    return None


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Keep tensors under `path`; a folder that cannot be written is logged and costs no run its result."""
    held = {name: tensor.cpu() for name, tensor in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(path, save(held, metadata={"sha256": _digest(held)}))
    except OSError as error:
        logger.warning("cannot keep factors in %s, which %s names (%s)", path.parent, VARIABLE, error.strerror)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {fingerprint(tensors[name])}".encode())
    return digest.hexdigest()
