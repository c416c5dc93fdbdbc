"""MeZO in several processes: a loss from each, the same weights on all, tensors sharded among them.

All draw the same noise, so the loss on its own rows is all that a process has to tell the others, one number a forward.
Each then finds the same slope from the same numbers and makes the same step.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastpeft.errors import FastpeftError

if dist.is_available():  # some builds of torch come without
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Replicate, Shard


def is_sharded(params: Sequence[Tensor]) -> bool:
    """Whether some of `params` are DTensors, as `fully_shard` (FSDP2) makes them."""
    return dist.is_available() and any(isinstance(param, DTensor) for param in params)


def local_part(param: Tensor, offset: int, name: str) -> tuple[Tensor, int]:
    """What this process holds of a parameter, and where that begins in the noise.

    Args:
        param: any tensor; a DTensor may be replicated or sharded in its first dimension, evenly or not.
        offset: of the whole parameter in the noise.
        name: for the message.

    Returns:
        A tensor that shares the parameter's memory, and its offset.

    Raises:
        FastpeftError: another placement; what a process holds would not be one range of the parameter.
    """
    if not is_sharded([param]):
        return param, offset
    with torch.no_grad():
        local: Tensor = param.to_local()  # type: ignore[attr-defined]
    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    start, shape = 0, list(param.shape)
    fits = all(type(each) is Replicate or (type(each) is Shard and each.dim == 0) for each in placements)
    for parts, part, placement in zip(mesh.shape, mesh.get_coordinate() or (), placements):
        if fits and type(placement) is Shard:  # cut as torch.chunk does: all parts are full but the last ones
            most = -(-shape[0] // parts)
            begin = min(part * most, shape[0])
            start, shape[0] = start + begin, min(most, shape[0] - begin)
    if not fits or list(local.shape) != shape:
        raise FastpeftError(
            f"MeZO: parameter {name!r} of shape {tuple(param.shape)} is placed {', '.join(map(str, placements))}, with "
            f"a part of shape {tuple(local.shape)} here; allowed are Replicate() and Shard(0), cut as torch.chunk "
            "does. Call fully_shard without shard_placement_fn, and use no tensor parallelism for what is trained."
        )
    return local, offset + start * math.prod(shape[1:])


def local_parts(group: Mapping[str, Any], offsets: Sequence[int]) -> tuple[list[Tensor], list[int]]:
    """`local_part` of each parameter of an optimizer's group."""
    params = group["params"]
    if not is_sharded(params):
        return list(params), list(offsets)
    parts = [local_part(param, offset, name) for param, offset, name in zip(params, offsets, names_of(group))]
    return [part for part, _ in parts], [start for _, start in parts]


def names_of(group: Mapping[str, Any]) -> list[str]:
    """Names of the parameters of an optimizer's group, or their numbers in it."""
    return group.get("param_names") or [str(number) for number in range(len(group["params"]))]


def digest(params: Sequence[Tensor]) -> str:
    """A text that two lists of tensors share only where they are bit-equal.

    A sharded tensor counts with all its elements, for which all processes must call.
    """
    total = hashlib.sha256()
    for param in params:
        whole: Tensor = param.full_tensor() if is_sharded([param]) else param  # type: ignore[attr-defined]
        total.update(whole.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def fingerprints(group: Mapping[str, Any], offsets: Sequence[int]) -> dict[str, str]:
    """A digest of what this process holds of each parameter of a group, by words that name it and where it begins."""
    return {
        f"parameter {name} (flat index {start})": digest([part])
        for name, part, start in zip(names_of(group), *local_parts(group, offsets))
    }


def check_sharding(params: Sequence[Tensor], restore: str, model: nn.Module | None) -> None:
    """Raise a FastpeftError if some of `params` are sharded, and cannot be trained with these arguments of `MeZO`."""
    if not is_sharded(params):
        return
    if restore == "exact":
        raise FastpeftError(
            "MeZO: restore='exact' cannot show a forward other weights where parameters are sharded (DTensor). Use "
            "restore='in_place'; float32 shards with mixed precision (MixedPrecisionPolicy) hardly drift."
        )
    if model is None:
        raise FastpeftError(
            "MeZO: parameters are sharded (DTensor), so it needs the model, to have each forward gather them anew: "
            "pass model."
        )


def reshard(model: nn.Module) -> None:
    """Make the parameters of a model those that an optimizer changes: the shards.

    FSDP2 leaves it to the backward pass to free what the outermost module gathered. Without one that module would go on
    with the weights of its first forward.
    """
    if dist.is_available():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
