"""An optimizer that moves what it trains along seeded noise: the ground on which MeZO's estimates and updates stand."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.errors import FastpeftError
from fastpeft.functional import mezo_perturb_
from fastpeft.mezo.exact import ScratchWeights
from fastpeft.mezo.sharding import check_sharding, is_sharded, local_part, local_parts, reshard
from fastpeft.mezo.steps import HOME, Point, Term, is_number, moves


class PerturbingOptimizer(torch.optim.Optimizer):
    """An optimizer that can bring its weights to the points of a step, as `steps` defines them.

    Args:
        params: what requires a gradient among them is trained; as any optimizer takes them.
        lr, eps, weight_decay: of groups that do not set their own.
        model, noise, restore, rounding: as for `MeZO`.

    Attributes:
        noise, restore: as given.
        rounding: of the update; "nearest" with `restore="in_place"`.

    Raises:
        FastpeftError: nothing requires a gradient, or a parameter or a setting of its group cannot be trained with.

    Notes:
        Where the weights are is one state of three parts: the point of the present step, what the step before still
        owes, and with `restore="exact"` what the model's forward is shown in their place.
    """

    def __init__(
        self,
        params: list[Any],
        lr: float,
        eps: float,
        weight_decay: float,
        *,
        model: nn.Module | None,
        noise: str,
        restore: str,
        rounding: str,
    ) -> None:
        self._model = model
        self.noise = noise
        self.restore = restore
        self.rounding = rounding if restore == "exact" else "nearest"
        self._point = HOME  # where the weights are; not HOME only between estimate and update
        self._shown: ScratchWeights | None = None  # with restore="exact"
        # for each group the terms (seeds, scales) and the decay that the weights still lack to be those of the model
        self._deferred: list[tuple[list[int], list[float], float]] = []
        if params:  # torch refuses an empty list in words of its own
            super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})
        if not params or not any(group["params"] for group in self.param_groups):
            raise FastpeftError(
                "MeZO got no parameter that requires a gradient, so there is nothing to train. Call "
                "requires_grad_(True) on what is to be trained, before making the optimizer."
            )

    @property
    def scratch_bytes(self) -> int:
        """Memory that `restore="exact"` needs beside the weights, as far as the forwards so far have shown."""
        return 0 if self._shown is None else self._shown.nbytes

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; of its parameters those that require a gradient now are trained."""
        group = self.defaults | param_group
        for name, allowed, fits in (
            ("lr", "0 or more", operator.ge),
            ("eps", "above 0", operator.gt),
            ("weight_decay", "0 or more", operator.ge),
        ):
            value = group[name]
            if name == "lr" and isinstance(value, Tensor) and value.numel() == 1:  # as torch allows
                value = value.item()
            if not (is_number(value) and fits(value, 0) and math.isfinite(value)):
                raise FastpeftError(f"MeZO: {name} is {value!r}; allowed is a finite number, {allowed}.")
        given = group["params"]
        trained: dict[int, Any] = {}
        tensors = [part for other, offsets in self._groups() for part in local_parts(other, offsets)[0]]
        for item in [given] if isinstance(given, Tensor) else given:
            name, param = item if isinstance(item, tuple) else (str(len(trained)), item)  # as torch allows
            if not isinstance(param, Tensor):
                raise FastpeftError(f"MeZO trains tensors, but among the parameters is a {type(param).__name__}.")
            if param.requires_grad and id(param) not in trained:
                trained[id(param)] = item
                if param.is_meta:
                    raise FastpeftError(
                        f"MeZO: parameter {name!r} is on the meta device, so it has no values to train. Load the "
                        "model's weights first."
                    )
                check_sharding([param], self.restore, self._model)
                tensors.append(local_part(param, 0, name)[0])
        if tensors:  # a perturbation of no terms: its checks of dtypes and of memory, before the first step
            mezo_perturb_(tensors, [0] * len(tensors), seeds=[], scales=[])
        super().add_param_group({**group, "params": list(trained.values())})
        if self.restore == "exact" and self._model is not None:
            places = {p: at for group, offsets in self._groups() for p, at in zip(group["params"], offsets)}
            self._shown = ScratchWeights(self._model, places)

    def _groups(self) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """Each group with parameters, and where each of them stands in the noise."""
        offset = 0
        for group in self.param_groups:
            offsets = []
            for param in group["params"]:
                offsets.append(offset)
                offset += param.numel()
            if offsets:
                yield group, offsets

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _epses(self) -> list[float]:
        """The eps of each group with parameters; losses are taken over that of the first."""
        return [group["eps"] for group, _ in self._groups()]

    def _move(self, point: Point, drawn: Sequence[int]) -> None:
        """Bring the weights, or with "exact" what the forward sees, to another point of the step of seeds `drawn`."""
        if self._shown is None:
            self._add(moves(self._point, point), drawn)
        else:
            self._add([], drawn)
            draw, position = point
            scales = {p: position * group["eps"] for group, _ in self._groups() for p in group["params"]}
            self._shown.perturb(drawn[draw], scales if position else {}, self.noise)
        self._point = point

    def _add(self, terms: list[Term], drawn: Sequence[int]) -> None:
        """One pass: what a deferred step owes, then terms of the present step with scales in units of eps."""
        if not (terms or self._deferred):
            return
        self._reshard()
        for index, (group, offsets) in enumerate(self._groups()):
            seeds, scales, decay = self._deferred[index] if self._deferred else ([], [], 0.0)
            seeds = [*seeds, *(drawn[draw] for draw, _ in terms)]
            scales = [*scales, *(scale * group["eps"] for _, scale in terms)]
            self._perturb(*local_parts(group, offsets), seeds, scales, decay, self.noise, self.rounding)
        self._deferred = []
        torch.clear_autocast_cache()  # an autocast around the step would go on with casts of the weights before

    @staticmethod
    def _perturb(*args: Any, **kwargs: Any) -> None:
        """Add noise to weights, as `mezo_perturb_` does; a subclass may have noise of its own."""
        mezo_perturb_(*args, **kwargs)

    def _reshard(self) -> None:
        """Make what the optimizer changes what the next forward sees."""
        if self._model is not None and is_sharded(self._params()):
            reshard(self._model)
