"""The weights of an optimizer that it moves along seeded noise: where they are, and how they come elsewhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fastpeft.functional import mezo_perturb_
from fastpeft.mezo.checks import check_choice, check_positive
from fastpeft.mezo.estimator import HOME, Point, Term, moves, update
from fastpeft.mezo.sharding import check_sharding, local_part, local_parts, reshard


class Pass(NamedTuple):
    """What one pass over a group's weights adds: the weights shrink by `decay`, then get `scale * z` of each seed."""

    seeds: list[int]
    scales: list[float]
    decay: float


class Weights:
    """The trained weights of an optimizer, which can be brought to the points of a step.

    Args:
        model: that has the weights, if it is known.
        noise: its kind.
        rounding: of what is added, to the storage dtype.

    Attributes:
        model, noise, rounding: as given.
        param_groups: the optimizer's, which sets them here.
        point: of the present step where the weights are; not `HOME` only between estimate and update.
        scratch_bytes: memory that is used beside the weights.
    """

    scratch_bytes = 0

    def __init__(self, model: nn.Module | None, noise: str, rounding: str) -> None:
        self.model = model
        self.noise = noise
        self.rounding = rounding
        self.param_groups: Sequence[Mapping[str, Any]] = ()
        self.point = HOME
        self._owed: list[Pass] = []  # of each group, for the weights to be those of the model

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
            FastpeftError: a parameter cannot be perturbed.
        """
        trained: dict[int, Any] = {}
        tensors = [part for group, offsets in self.groups() for part in local_parts(group, offsets)[0]]
        for number, item in enumerate([given] if isinstance(given, Tensor) else given):
            name, param = item if isinstance(item, tuple) else (str(number), item)  # as torch allows
            if param.requires_grad and id(param) not in trained:
                trained[id(param)] = item
                self.check([param])
                tensors.append(local_part(param, 0, name)[0])
        if tensors:  # a perturbation of no terms: its checks of dtypes and of memory, before the first step
            mezo_perturb_(tensors, [0] * len(tensors), seeds=[], scales=[])
        return list(trained.values())

    def check(self, params: Sequence[Tensor]) -> None:
        """Raise a FastpeftError if `params` are sharded where they cannot be."""
        check_sharding(params, self.model)

    def set_groups(self, param_groups: Sequence[Mapping[str, Any]]) -> None:
        """Take the groups of the optimizer, which has made them or changed which parameters they hold."""
        self.param_groups = param_groups

    def show(self, check: bool) -> None:
        """Let the model's forward see the point, until `hide`; `check` looks for reads that would not."""

    def hide(self) -> None:
        """End what `show` began."""

    def move(self, point: Point, drawn: Sequence[int]) -> None:
        """Bring the weights to another point of the step of seeds `drawn`, in one pass with what is owed."""
        self._add(moves(self.point, point), drawn)
        self.point = point

    def update(self, slopes: Sequence[float], drawn: Sequence[int]) -> list[Pass]:
        """The pass over each group that restores and updates the weights in one."""
        first_eps = self.epses()[0]
        passes = []
        for group, _ in self.groups():
            lr = float(group["lr"])
            decay = lr * group["weight_decay"]
            terms = update(self._stored(self.point), slopes, first_eps, lr, group["eps"], decay)
            passes.append(Pass([drawn[draw] for draw, _ in terms], [scale for _, scale in terms], decay))
        return passes

    def owe(self, passes: list[Pass]) -> None:
        """Leave `passes` to the next `move`, which makes them together with its own."""
        self._owed, self.point = passes, HOME

    def _stored(self, point: Point) -> Point:
        """Where the stored weights are when the forward is to see `point`."""
        return point

    def _add(self, terms: list[Term], drawn: Sequence[int]) -> None:
        """One pass: what is owed, then terms of the present step with scales in units of eps."""
        if not (terms or self._owed):
            return
        reshard(self.model, self.params())
        for index, (group, offsets) in enumerate(self.groups()):
            seeds, scales, decay = self._owed[index] if self._owed else ([], [], 0.0)
            seeds = [*seeds, *(drawn[draw] for draw, _ in terms)]
            scales = [*scales, *(scale * group["eps"] for _, scale in terms)]
            mezo_perturb_(*local_parts(group, offsets), seeds, scales, decay, self.noise, self.rounding)
        self._owed = []
        torch.clear_autocast_cache()  # an autocast around the step would go on with casts of the weights before


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """How a step changes the weights: `InPlace` or `Exact`.

    Raises:
        FastpeftError: an attribute is out of its range.
    """

    max_projected_grad: float | None = None
    on_nonfinite: str = "stop"

    restore: ClassVar[str]  # as `MeZOConfig` and a journal call it
    defer: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_choice("on_nonfinite", self.on_nonfinite, ("stop", "skip"))
        if self.max_projected_grad is not None:
            check_positive("max_projected_grad", self.max_projected_grad)

    @abstractmethod
    def weights(self, model: nn.Module | None, noise: str) -> Weights:
        """The weights that train; the optimizer then sets their groups."""


@dataclass(frozen=True, kw_only=True)
class InPlace(Rule):
    """Perturb the weights themselves; restoring and updating them are one pass.

    Args:
        defer: leave the end of a step to the next one, which saves one pass over the weights a step. Between steps the
            weights are not those of the model until `MeZO.settle()` is called, so call it before anything else reads or
            saves them, as `save_state` of accelerate. Deferring changes no bit.
        max_projected_grad: limit of the size of g, of each direction and group, above 0; None sets no limit.
        on_nonfinite: what to do when a loss or an update is not finite. "stop" raises an error; "skip" logs a warning
            and makes a step that changes nothing, to rounding.
    """

    defer: bool = False  # type: ignore[misc]

    restore = "in_place"
    rounding = "nearest"

    def weights(self, model: nn.Module | None, noise: str) -> Weights:
        return Weights(model, noise, self.rounding)
