"""Fingerprints of weights: short texts that tell whether two weights have the same values."""

from __future__ import annotations

import base64
import hashlib
import re

import numpy as np
import torch
from torch import Tensor

_BASE64 = "(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?"
_IN_4_BITS = "nf4"  # stands where others have a dtype
_FINGERPRINT = re.compile(rf"(?:{_IN_4_BITS}|bfloat16|float(?:16|32|64)) [\dx]* [0-9a-f]{{16}} {_BASE64}", re.ASCII)

# Entries compared where the storage dtypes differ and the digests therefore cannot be.
_SAMPLE_SIZE = 16
# Of a weight in 4 bits: the share by which an entry may differ on another device, and how many entries may differ more,
# since they were rounded the other way.
_SAME, _TIES = 1e-3, 2
# How much of the squares of both samples their difference may have, where one is in 4 bits. Rounding to nf4 takes 0.004
# of Gaussian weights, and a third where half of the entries become zero beside large ones. Of unrelated weights it is
# about 1, and below 0.75 in one layer of six, so not in all layers of a model.
_ROUNDED = 0.75


def fingerprint(weight: Tensor, *, in_4_bits: bool = False) -> str:
    """A short text that identifies the values of a weight whatever floating dtype they are stored in.

    `"DTYPE SHAPE SHA256 SAMPLE"`: the digest (first 16 hex digits) of the stored bytes, and 16 evenly spaced
    entries as float32 in base64. Compare two with `fingerprints_agree`. Numbers that are held `in_4_bits` may differ a
    little from device to device.
    """
    weight = weight.detach()
    stored = weight.cpu().contiguous()
    digest = hashlib.sha256(stored.flatten().view(torch.uint8).numpy().data).hexdigest()[:16]
    sample = stored.flatten()[evenly_spaced(stored.numel(), _SAMPLE_SIZE)].to(torch.float32)
    encoded = base64.b64encode(sample.numpy().astype("<f4").tobytes()).decode()
    shape = "x".join(str(size) for size in stored.shape)
    return f"{_IN_4_BITS if in_4_bits else str(weight.dtype).removeprefix('torch.')} {shape} {digest} {encoded}"


def fingerprints_agree(first: str, second: str) -> bool:
    """Whether two fingerprints are of the same weight.

    Of equal dtype, every bit counts. Of different dtypes, each sampled entry may differ by what rounding to both
    dtypes can change, since one weight may be a cast of the other or both a cast of a third. Two weights in 4 bits are
    compared closely. Between 4 bits and more bits the comparison is coarse: it refuses an unrelated weight, and does
    not see that a weight was trained further. What is no fingerprint, as a file from elsewhere may hold, agrees with
    none.
    """
    if not (_FINGERPRINT.fullmatch(first) and _FINGERPRINT.fullmatch(second)):
        return False
    dtype_1, shape_1, digest_1, sample_1 = first.split(" ")
    dtype_2, shape_2, digest_2, sample_2 = second.split(" ")
    if shape_1 != shape_2:
        return False
    if dtype_1 == dtype_2 != _IN_4_BITS:
        return digest_1 == digest_2
    first_bytes, second_bytes = (base64.b64decode(text) for text in (sample_1, sample_2))
    if len(first_bytes) != len(second_bytes) or len(first_bytes) % 4:  # of no sample
        return False
    a, b = (np.frombuffer(content, dtype="<f4") for content in (first_bytes, second_bytes))
    if dtype_1 == dtype_2:
        return int((abs(a - b) > _SAME * np.maximum(abs(a), abs(b))).sum()) <= _TIES
    if _IN_4_BITS in (dtype_1, dtype_2):
        return bool(((a - b) ** 2).sum() <= _ROUNDED * (a**2 + b**2).sum())
    relative = sum(torch.finfo(getattr(torch, name)).eps / 2 for name in (dtype_1, dtype_2, "float32"))
    absolute = sum(torch.finfo(getattr(torch, name)).smallest_normal * 2**-10 for name in (dtype_1, dtype_2))
    return bool((abs(a - b) <= relative * np.maximum(abs(a), abs(b)) + absolute).all())


def evenly_spaced(size: int, most: int) -> Tensor:
    """Positions among `size` entries, from the first to the last: so many, or all where there are fewer."""
    return torch.linspace(0, max(size - 1, 0), min(size, most), dtype=torch.float64).round().long()
