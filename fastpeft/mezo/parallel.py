"""MeZO in several processes: a loss from each, the same weights on all, tensors sharded among them.

All draw the same noise, so the loss on its own rows is all that a process has to tell the others, one number a forward.
Each then finds the same slope from the same numbers and makes the same step.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastpeft.errors import FastpeftError
from fastpeft.processes import noticing_losses

if dist.is_available():  # some builds of torch come without
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Replicate, Shard

T = TypeVar("T")


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
                "MeZO: this process is not in process_group, so it has no part in the training. Make the optimizer in "
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
        """The losses of all processes by rank, as doubles and so to the bit.

        Args:
            loss: of this one.
            device: of a kind that the group can send from.
        """
        if self.size == 1:
            return [loss]
        each = torch.empty(self.size, dtype=torch.float64, device=device)
        own = torch.tensor([loss], dtype=torch.float64, device=device)
        with noticing_losses():
            dist.all_gather_into_tensor(each, own, group=self._group)
            return each.tolist()

    def gather(self, value: T) -> list[T]:
        """The values of all processes by rank, of any kind that can be pickled."""
        if self.size == 1:
            return [value]
        each: list[Any] = [None] * self.size
        with noticing_losses():
            dist.all_gather_object(each, value, group=self._group)
        return each

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether `flag` is true in some process.

        Args:
            flag: of this one.
            device: of a kind that the group can send from.
        """
        if self.size == 1:
            return flag
        shared = torch.tensor([flag], dtype=torch.uint8, device=device)
        with noticing_losses():
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
                        "they would train different models. Begin with the same weights and settings in every process, "
                        "and change nothing in one alone."
                    )

    @torch.no_grad()
    def share(self, model: nn.Module) -> None:
        """Give all the parameters and buffers that the first process has."""
        if self.size == 1:
            return
        for tensor in (*model.parameters(), *model.buffers()):
            given = tensor.contiguous()  # what cannot be sent as it is, is copied
            with noticing_losses():
                dist.broadcast(given, group=self._group, group_src=0)
            tensor.copy_(given)


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
