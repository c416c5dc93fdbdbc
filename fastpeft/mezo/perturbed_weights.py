"""The weights of an optimizer that it moves along seeded noise: where they are, and how they come elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastpeft.errors import FastpeftError
from fastpeft.functional import mezo_perturb_
from fastpeft.mezo.estimator import HOME, Point, Term, moves, update
from fastpeft.mezo.scratch_weights import ScratchWeights
from fastpeft.mezo.sharding import check_sharding, is_sharded, local_part, local_parts, reshard


class Pass(NamedTuple):
    """What one pass over a group's weights adds: the weights shrink by `decay`, then get `scale * z` of each seed."""

    seeds: list[int]
    scales: list[float]
    decay: float


class PerturbedWeights:
    """The trained weights of an optimizer, which can be brought to the points of a step.

    Args:
        model: that has the weights, if it is known.
        noise, restore, rounding: as for `MeZO`.

    Attributes:
        model, noise: as given.
        param_groups: the optimizer's, which sets them here.
        point: of the present step where the weights are; not `HOME` only between estimate and update.

    Notes:
        Where the weights are has three parts: the point, what the step before still owes (see `owe`), and with
        `restore="exact"` what the model's forward sees in their place.
    """

    def __init__(self, model: nn.Module | None, noise: str, restore: str, rounding: str) -> None:
        self.model = model
        self.noise = noise
        self.param_groups: Sequence[Mapping[str, Any]] = ()
        self.point = HOME
        self._restore = restore
        self._rounding = rounding
        self._scratch: ScratchWeights | None = None  # with restore="exact"
        self._owed: list[Pass] = []  # of each group, for the weights to be those of the model

    @property
    def scratch_bytes(self) -> int:
        return 0 if self._scratch is None else self._scratch.nbytes

    def modules(self) -> Iterator[nn.Module]:
        """The modules of the model, where it is known."""
        return iter(()) if self.model is None else self.model.modules()

    def groups(self) -> Iterator[tuple[Mapping[str, Any], list[int]]]:
        """Each group with parameters, and the offset of each of them in the noise."""
        offset = 0
        for group in self.param_groups:
            offsets = []
            for param in group["params"]:
                offsets.append(offset)
                offset += param.numel()
            if offsets:
                yield group, offsets

    def params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def epses(self) -> list[float]:
        """The eps of each group with parameters; losses are taken over that of the first."""
        return [group["eps"] for group, _ in self.groups()]

    def trained(self, given: Tensor | Iterable[Any]) -> list[Any]:
        """What a further group trains of the parameters `given`, with or without names: those that require a gradient.

        Raises:
            FastpeftError: a parameter is no tensor, or cannot be trained.
        """
        trained: dict[int, Any] = {}
        tensors = [part for group, offsets in self.groups() for part in local_parts(group, offsets)[0]]
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
                check_sharding([param], self._restore, self.model)
                tensors.append(local_part(param, 0, name)[0])
        if tensors:  # a perturbation of no terms: its checks of dtypes and of memory, before the first step
            mezo_perturb_(tensors, [0] * len(tensors), seeds=[], scales=[])
        return list(trained.values())

    def set_groups(self, param_groups: Sequence[Mapping[str, Any]]) -> None:
        """Take the groups of the optimizer, which has made them or changed which parameters they hold."""
        self.param_groups = param_groups
        if self._restore == "exact" and self.model is not None:
            places = {p: at for group, offsets in self.groups() for p, at in zip(group["params"], offsets)}
            self._scratch = ScratchWeights(self.model, places)

    def show(self, check: bool) -> None:
        """With `restore="exact"`: let the model's forward see the point, until `hide`. `check` looks at each op."""
        if self._scratch is not None:
            self._scratch.begin(check)

    def hide(self) -> None:
        if self._scratch is not None:
            self._scratch.end()

    def move(self, point: Point, drawn: Sequence[int]) -> None:
        """Bring the weights, or with "exact" what the forward sees, to another point of the step of seeds `drawn`."""
        if self._scratch is None:
            self._add(moves(self.point, point), drawn)
        else:
            self._add([], drawn)
            draw, position = point
            scales = {p: position * group["eps"] for group, _ in self.groups() for p in group["params"]}
            self._scratch.perturb(drawn[draw], scales if position else {}, self.noise)
        self.point = point

    def update(self, slopes: Sequence[float], drawn: Sequence[int]) -> list[Pass]:
        """The pass over each group that restores and updates the weights in one."""
        stored = self.point if self._scratch is None else (self.point[0], 0)
        first_eps = self.epses()[0]
        passes = []
        for group, _ in self.groups():
            lr = float(group["lr"])
            decay = lr * group["weight_decay"]
            terms = update(stored, slopes, first_eps, lr, group["eps"], decay)
            passes.append(Pass([drawn[draw] for draw, _ in terms], [scale for _, scale in terms], decay))
        return passes

    def owe(self, passes: list[Pass]) -> None:
        """Leave `passes` to the next `move`, which makes them together with its own."""
        self._owed, self.point = passes, HOME

    def _add(self, terms: list[Term], drawn: Sequence[int]) -> None:
        """One pass: what is owed, then terms of the present step with scales in units of eps."""
        if not (terms or self._owed):
            return
        self.reshard()
        for index, (group, offsets) in enumerate(self.groups()):
            seeds, scales, decay = self._owed[index] if self._owed else ([], [], 0.0)
            seeds = [*seeds, *(drawn[draw] for draw, _ in terms)]
            scales = [*scales, *(scale * group["eps"] for _, scale in terms)]
            mezo_perturb_(*local_parts(group, offsets), seeds, scales, decay, self.noise, self._rounding)
        self._owed = []
        torch.clear_autocast_cache()  # an autocast around the step would go on with casts of the weights before

    def reshard(self) -> None:
        """Make what the optimizer changes what the next forward sees."""
        if self.model is not None and is_sharded(self.params()):
            reshard(self.model)
