"""MeZO by its usual loop in plain PyTorch, with which the library's own is compared."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fastpeft.errors import FastpeftError
from fastpeft.mezo.estimator import HOME
from fastpeft.mezo.optimizer import MeZO
from fastpeft.mezo.perturbed_weights import Pass, PerturbedWeights
from fastpeft.mezo.sharding import is_sharded


class LoopWeights(PerturbedWeights):
    """Weights that are restored in a pass of their own, and perturbed by PyTorch's noise."""

    def update(self, slopes: Sequence[float], drawn: Sequence[int]) -> list[Pass]:
        self.move(HOME, drawn)
        return super().update(slopes, drawn)

    @staticmethod
    def perturb(
        tensors: Sequence[Tensor],
        offsets: Sequence[int],
        seeds: Sequence[int] | Tensor,
        scales: Sequence[float] | Tensor,
        decay: float = 0.0,
        noise: str = "gaussian",
        rounding: str = "nearest",
    ) -> None:
        """As `fastpeft.functional.mezo_perturb_`, with PyTorch's noise."""
        for tensor in tensors:
            if decay:
                tensor.mul_(1 - decay)
        for seed, scale in zip(seeds, scales):
            # of several groups each begins elsewhere in the noise
            generator = torch.Generator(tensors[0].device).manual_seed((int(seed) + offsets[0]) % 2**63)
            for tensor in tensors:
                z = torch.normal(0.0, 1.0, tensor.shape, generator=generator, device=tensor.device, dtype=tensor.dtype)
                tensor.add_(z, alpha=float(scale))


class MeZOLoop(MeZO):
    """MeZO in the loop of its paper (Malladi et al., 2023, algorithm 1), in plain PyTorch.

    A step makes four passes over the weights: to theta + eps z, to theta - eps z, back to theta, and the update. Each
    time PyTorch's generator draws z anew, a tensor of noise for each parameter. The estimates are those of `MeZO` with
    other noise, which differs between devices.

    Args:
        model_or_params, lr, eps, weight_decay, seed, kwargs: as for `MeZO`. `noise` is "gaussian", `restore` is
            "in_place", and nothing is deferred, whatever `defer` says.

    Raises:
        FastpeftError: as for `MeZO`; or `noise` or `restore` is another.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = MeZOLoop(model, lr=1e-2)
        >>> loss = optimizer.step(lambda: model(torch.ones(2, 4)).square().mean())
    """

    weights_type = LoopWeights

    def __init__(self, model_or_params: nn.Module | Iterable[Any], lr: float, *args: Any, **kwargs: Any) -> None:
        for name, only in (("noise", "gaussian"), ("restore", "in_place")):
            if kwargs.get(name, only) != only:
                raise FastpeftError(f"the usual loop of MeZO allows {name} {only!r} alone; got {kwargs[name]!r}.")
        super().__init__(model_or_params, lr, *args, **{**kwargs, "defer": False})
        if is_sharded(self.weights.params()):
            raise FastpeftError("the usual loop of MeZO draws noise for whole parameters, not for shards. Use MeZO.")

    def record(self, path: str | Path) -> NoReturn:
        """Raise a `FastpeftError`: the noise of a journal is the library's."""
        raise FastpeftError("the usual loop of MeZO keeps no journal. Leave the journal out, or train by MeZO.")

    def resume(self, path: str | Path, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise a `FastpeftError`, as `record`."""
        self.record(path)
