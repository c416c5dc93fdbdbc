"""A cache of factors on disk, so that a weight is decomposed once for any number of runs.

It is off unless the environment variable `FASTPEFT_CACHE` names a folder. Each file there holds the factors of one
weight at one rank. It appears whole or not at all, so processes may share the folder and may be killed. Any file, or
the folder, can be deleted at any time.
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
_FORMAT = 1  # raise it when the same weight gives other factors than before


def entry(weight: Tensor, r: int, niter: int | None = None) -> Path | None:
    """The file for the top r triplets of `weight`, by so many power iterations; None if the cache is off."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        return None
    near = "" if niter is None else f" {niter}"
    identity = f"{_FORMAT} {r}{near} {fingerprint(weight)}"
    name = hashlib.sha256(identity.encode()).hexdigest()[:32]
    return files.path_of(folder) / f"siva-{name}.safetensors"


def read(path: Path) -> dict[str, Tensor] | None:
    """The tensors of an entry, on the CPU; None if there is none, or if it is damaged, which is logged."""
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
    """Keep tensors under `path`. If the folder cannot be written, that is logged and the run goes on."""
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
