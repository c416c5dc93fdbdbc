"""The arithmetic of a step: at which points it looks at the loss, and what it adds to the weights.

The optimizer uses it, and the replay of a journal.

A step draws `num_estimates` noises z_0, z_1, ... A point is a pair (draw, position) and stands for
theta + position * eps * z_draw. A term (draw, scale) is one addition, theta <- theta + scale * z_draw.
"""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fastpeft.errors import FastpeftError
from fastpeft.mezo.checks import check_choice
from fastpeft.ops.noise import NAMES, NOISE

Point = tuple[int, int]
Term = tuple[int, float]

HOME: Point = (0, 0)  # theta itself
_MASK = 2**64 - 1


def step_seed(seed: int, draw: int) -> int:
    """The seed of the noise of draw number `draw` of a run, from 0. Step t, from 0, begins with draw t * num_estimates.

    It is output number `draw` of the generator splitmix64 started at `seed`, without its top bit: a seed of the noise
    has 63 bits.

    Example:
        >>> step_seed(0, 0) == 0xE220A8397B1DCDAF % 2**63
        True
    """
    x = (seed + (draw + 1) * 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return (x ^ (x >> 31)) % 2**63


@dataclass(frozen=True)
class Estimator(ABC):
    """At which points a step looks at the loss, and the slopes that it finds.

    Raises:
        FastpeftError: an attribute is out of its range.
    """

    num_estimates: int
    noise: str

    name: ClassVar[str]
    fewest: ClassVar[int] = 1  # directions

    def __post_init__(self) -> None:
        check_choice("noise", self.noise, tuple(NOISE))
        if type(self.num_estimates) is not int or not self.fewest <= self.num_estimates <= 255:
            raise FastpeftError(
                f"MeZO: num_estimates is {self.num_estimates!r}; allowed are {self.fewest} to 255 for the estimator "
                f"{self.name!r}."
            )

    @property
    def settings(self) -> dict[str, Any]:
        """What a saved state and the header of a journal say of it."""
        how = {"noise": self.noise, "drawn_by": NAMES[self.noise]}
        return {"estimator": self.name, "num_estimates": self.num_estimates, **how}

    def seeds(self, seed: int, step: int) -> list[int]:
        """The seed of each draw of step number `step`, from 0."""
        return [step_seed(seed, step * self.num_estimates + draw) for draw in range(self.num_estimates)]

    def slopes(self, losses: Sequence[float], eps: float, limit: float | None) -> list[float]:
        """The factor of each z in the estimated gradient, `g_i / n`, with g_i at most `limit` in size."""
        bound = math.inf if limit is None else limit
        return [max(-bound, min(bound, g)) / self.num_estimates for g in self.projected_grads(losses, eps)]

    @property
    @abstractmethod
    def points(self) -> list[Point]:
        """Where the losses of a step are computed, in order."""

    @abstractmethod
    def projected_grads(self, losses: Sequence[float], eps: float) -> list[float]:
        """g of each direction, from the losses at `points`."""

    @abstractmethod
    def loss(self, losses: Sequence[float]) -> float:
        """The loss that a step reports."""


@dataclass(frozen=True)
class SPSA(Estimator):
    """Two-sided differences, `g_i = (L(theta + eps z_i) - L(theta - eps z_i)) / (2 eps)`: 2 n forward passes a step.

    Args:
        num_estimates: directions a step, n, over which it averages: 1 to 255.
        noise: "gaussian", or "rademacher" (+1 or -1).
    """

    num_estimates: int = 1
    noise: str = "gaussian"

    name = "spsa"

    @property
    def points(self) -> list[Point]:
        return [(draw, side) for draw in range(self.num_estimates) for side in (1, -1)]

    def projected_grads(self, losses: Sequence[float], eps: float) -> list[float]:
        return [(plus - minus) / (2 * eps) for plus, minus in zip(losses[::2], losses[1::2])]

    def loss(self, losses: Sequence[float]) -> float:
        return sum(losses) / len(losses)


@dataclass(frozen=True)
class FZOO(Estimator):
    """One-sided differences over their spread (Dang et al., 2025, arXiv 2506.09034): n + 1 forward passes a step.

    With l_0 the loss at theta, l_i those at theta + eps z_i and sigma the standard deviation of l_1 .. l_n, g_i is
    `(l_i - l_0) / (eps sigma)`; all are 0 where sigma is 0. Where the slope outweighs the curvature over eps, each
    weight moves by about `lr / (eps sqrt(n))`, so its rates differ from those of `SPSA`. Near a minimum sigma vanishes
    and l_i - l_0 does not; then only `max_projected_grad` bounds the step. g is usually at most a few times 1 / eps:
    with a limit of 10 / eps and noise "rademacher" no weight moves by more than `10 lr / eps` a step.

    Args:
        num_estimates: directions a step, n: 2 to 255.
        noise: "rademacher" (+1 or -1), as its authors use it, or "gaussian".
    """

    num_estimates: int = 8
    noise: str = "rademacher"

    name = "fzoo"
    fewest = 2

    @property
    def points(self) -> list[Point]:
        return [HOME, *((draw, 1) for draw in range(self.num_estimates))]

    def projected_grads(self, losses: Sequence[float], eps: float) -> list[float]:
        at_home, *beside = losses
        scale = eps * statistics.stdev(beside)
        return [(loss - at_home) / scale if scale else 0.0 for loss in beside]

    def loss(self, losses: Sequence[float]) -> float:
        return losses[0]


ESTIMATORS: dict[str, type[SPSA | FZOO]] = {each.name: each for each in (SPSA, FZOO)}


def estimator_of(settings: Mapping[str, Any]) -> Estimator:
    """The estimator with `settings`, as `Estimator.settings` has them.

    Raises:
        FastpeftError: one is out of its range.
    """
    check_choice("estimator", settings["estimator"], tuple(ESTIMATORS))
    return ESTIMATORS[settings["estimator"]](settings["num_estimates"], settings["noise"])


def check_drawn_by(settings: Mapping[str, Any], what: str) -> None:
    """Raise a FastpeftError if `what`, a state or a journal with these settings, has noise that was drawn otherwise."""
    noise, drawn_by = settings["noise"], settings["drawn_by"]
    if drawn_by != NAMES.get(noise):
        raise FastpeftError(
            f"{what} is of a run whose {noise} noise was drawn by {drawn_by!r}; this version draws it by "
            f"{NAMES.get(noise)!r}, so it cannot repeat those steps. Use the version of fastpeft that wrote it, or "
            "move it away and begin anew from a checkpoint with weights."
        )


def moves(start: Point, end: Point) -> list[Term]:
    """The terms, scales in units of eps, that lead from one point to another."""
    (draw, position), (new_draw, new_position) = start, end
    terms: list[Term] = []
    if position and new_draw != draw:
        terms.append((draw, -position))
        position = 0
    if new_position != position:
        terms.append((new_draw, new_position - position))
    return terms


def update(point: Point, slopes: Sequence[float], first_eps: float, lr: float, eps: float, decay: float) -> list[Term]:
    """The terms of one pass that restores and updates: from `point` to `(1 - decay) theta - lr sum slope_i z_i`.

    Args:
        point: where the weights are.
        slopes: those of the first group that has parameters, in which the losses were taken over `first_eps`.
        first_eps, lr, eps: of that group and of this one.
        decay: learning rate times weight decay of this group; it goes with the first term.
    """
    draw, position = point
    own = [slope * (first_eps / eps) for slope in slopes]
    first = (draw, -position * (1 - decay) * eps - lr * own[draw])
    return [first, *((other, -lr * slope) for other, slope in enumerate(own) if other != draw)]
