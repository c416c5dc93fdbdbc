"""The arithmetic of a step: at which points it looks at the loss, and what it adds to the weights.

The optimizer uses it, and the replay of a journal.

A step draws `num_estimates` noises z_0, z_1, ... A point is a pair (draw, position) and stands for
theta + position * eps * z_draw. A term (draw, scale) is one addition, theta <- theta + scale * z_draw.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from fastpeft.errors import FastpeftError

Point = tuple[int, int]
Term = tuple[int, float]

HOME: Point = (0, 0)  # theta itself
ESTIMATORS = ("spsa", "fzoo")
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
class Estimator:
    """At which points a step looks at the loss, and the slopes that it finds.

    Attributes:
        kind: "spsa" looks at both sides of theta in each direction; "fzoo" (arXiv 2506.09034) looks at theta once and
            at one side, and divides the step by the standard deviation of the losses.
        num_estimates: directions a step, n; at least 1, for "fzoo" at least 2.

    Raises:
        FastpeftError: an attribute is out of its range.
    """

    kind: str = "spsa"
    num_estimates: int = 1

    def __post_init__(self) -> None:
        if self.kind not in ESTIMATORS:
            raise FastpeftError(f"MeZO: estimator is {self.kind!r}; allowed are {', '.join(ESTIMATORS)}.")
        least = 2 if self.kind == "fzoo" else 1
        if type(self.num_estimates) is not int or not least <= self.num_estimates <= 255:
            raise FastpeftError(
                f"MeZO: num_estimates is {self.num_estimates!r}; allowed are {least} to 255 for the estimator "
                f"{self.kind!r}."
            )

    @property
    def points(self) -> list[Point]:
        """Where the losses of a step are computed, in order."""
        draws = range(self.num_estimates)
        if self.kind == "fzoo":
            return [HOME, *((draw, 1) for draw in draws)]
        return [(draw, side) for draw in draws for side in (1, -1)]

    def seeds(self, seed: int, step: int) -> list[int]:
        """The seed of each draw of step number `step`, from 0."""
        return [step_seed(seed, step * self.num_estimates + draw) for draw in range(self.num_estimates)]

    def slopes(self, losses: Sequence[float], eps: float, limit: float | None) -> list[float]:
        """The factor of each z in the estimated gradient, from the losses at `points`.

        It is `g_i / n`, with g_i at most `limit` in size. "spsa": g_i is the difference of the two losses over 2 eps.
        "fzoo": `(l_i - l_0) / (eps sigma)` with the sample standard deviation sigma of l_1 .. l_n; all 0 where sigma is
        0.
        """
        n = self.num_estimates
        bound = math.inf if limit is None else limit
        if self.kind == "fzoo":
            at_home, *beside = losses
            scale = eps * statistics.stdev(beside)
            found = [(loss - at_home) / scale if scale else 0.0 for loss in beside]
        else:
            found = [(losses[2 * draw] - losses[2 * draw + 1]) / (2 * eps) for draw in range(n)]
        return [max(-bound, min(bound, g)) / n for g in found]


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
