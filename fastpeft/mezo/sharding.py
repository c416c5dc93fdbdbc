"""Parameters that are sharded among processes: the part of this one, and digests by which processes compare weights."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastpeft.errors import FastpeftError
from fastpeft.mezo.parameters import names_of

if dist.is_available():  # some builds of torch come without
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, ShardingStrategy
    from torch.distributed.tensor import DTensor, Replicate, Shard


def is_sharded(params: Sequence[Tensor]) -> bool:
    """Whether some of `params` are DTensors, as `fully_shard` (FSDP2) makes them."""
    return dist.is_available() and any(isinstance(param, DTensor) for param in params)


def local_part(param: Tensor, offset: int, name: str) -> tuple[Tensor, int]:
    """The part of a parameter that this process holds, and the offset in the noise at which it begins.

    Args:
        param: any tensor; a DTensor may be replicated or sharded in its first dimension, evenly or not.
        offset: of the whole parameter in the noise.
        name: for the error message.

    Returns:
        A tensor that shares the parameter's memory, and its offset.

    Raises:
        FastpeftError: the placement is another, so the part is not one range of the parameter.
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


def digest(params: Sequence[Tensor]) -> str:
    """A text that is the same for two lists of tensors only if they are bit-equal.

    Of a sharded tensor all elements count, so all processes must call this.
    """
    total = hashlib.sha256()
    for param in params:
        whole: Tensor = param.full_tensor() if is_sharded([param]) else param  # type: ignore[attr-defined]
        total.update(whole.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def fingerprints(group: Mapping[str, Any], offsets: Sequence[int]) -> dict[str, str]:
    """A digest of what this process holds of each parameter of a group, under the parameter's name and offset."""
    return {
        f"parameter {name} (flat index {start})": digest([part])
        for name, part, start in zip(names_of(group), *local_parts(group, offsets))
    }


def check_sharding(params: Sequence[Tensor], model: nn.Module | None) -> None:
    """Raise a FastpeftError if some of `params` are sharded and the model is not known."""
    if model is None and is_sharded(params):
        raise FastpeftError(
            "MeZO: parameters are sharded (DTensor), so each forward must gather them anew, for which MeZO needs the "
            "model: pass model."
        )


def refuse_fsdp1(model: nn.Module) -> None:
    """Raise a FastpeftError if FSDP1 shards parts of a model, whose pieces have no place in the noise."""
    if not dist.is_available():
        return
    for module in model.modules():
        # one that shards nothing, as in one process, leaves parameters whole
        if isinstance(module, FullyShardedDataParallel) and module.sharding_strategy != ShardingStrategy.NO_SHARD:
            raise FastpeftError(
                "MeZO: FullyShardedDataParallel (FSDP1) cuts parameters into pieces that do not say where they belong. "
                "Shard the model by fully_shard (FSDP2), or not at all: MeZO needs no memory for gradients."
            )


def reshard(model: nn.Module | None, params: Sequence[Tensor] | None = None) -> None:
    """Free the gathered parameters of a model, so that the next forward gathers the changed shards.

    FSDP2 frees those of the outermost module in the backward pass, which MeZO does not make. Nothing is done where
    `params` are given and none is sharded.
    """
    if model is None or not dist.is_available() or not (params is None or is_sharded(params)):
        return
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
