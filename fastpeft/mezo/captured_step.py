"""A step of MeZO for CUDA graphs: the numbers that it reads and makes stay on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastpeft.errors import FastpeftError
from fastpeft.functional import mezo_perturb_
from fastpeft.mezo.estimator import HOME, Number, Term, moves, update
from fastpeft.mezo.optimizer import LARGEST, MeZO
from fastpeft.mezo.sharding import is_sharded
from fastpeft.support.eval_mode import in_eval_mode


class CapturedStep:
    """The step of a `MeZO` as one CUDA graph, which neither waits for the device nor is launched part by part.

    The first call makes a step, the second captures one in a graph, and from then on each call replays it. On a CPU
    each call makes the step.

    Args:
        optimizer: with the estimator "spsa", `restore="in_place"` and `on_nonfinite="skip"`, without a journal, and
            alone: one process, one device, no shards.
        closure: returns the loss, a tensor of one element on that device. It is called while the step is captured and
            not when it is replayed: copy each batch into the tensors that it reads.

    Attributes:
        loss: the mean of the losses of the last step, float64 `()`, on the device.
        projected_grad: g of the last step, likewise; see `MeZO`.

    Raises:
        FastpeftError: the optimizer is another, or its settings are.

    Notes:
        Weights and `projected_grad` have the bits that `optimizer.step` gives them. The seeds of the noise and the
        learning rates are read from the device, so both change from step to step; the product of learning rate and
        weight decay may not, and other settings are those of the capture. A step whose losses or update are not finite
        adds nothing and is not told of: look at `projected_grad`. Weight decay acts on it.

    Example:
        >>> model, x = torch.nn.Linear(4, 1), torch.ones(2, 4)
        >>> optimizer = MeZO(model, lr=1e-2, on_nonfinite="skip")
        >>> step = CapturedStep(optimizer, lambda: model(x).square().mean())
        >>> for _ in range(3):
        ...     loss = step()
    """

    def __init__(self, optimizer: MeZO, closure: Callable[[], Tensor]) -> None:
        _check(optimizer)
        weights = optimizer.weights
        params = weights.params()
        self._optimizer, self._weights, self._closure = optimizer, weights, closure
        self._device = params[0].device
        self._seeds = torch.zeros(optimizer.estimator.num_estimates, dtype=torch.int64, device=self._device)
        self._rates = self._constants([0.0] * len(weights.epses()))
        self._scales: dict[tuple[float, ...], Tensor] = {}  # those that are the same in each step
        self._span = self._constants([2 * weights.epses()[0]])[0]
        self._decays = [0.0] * len(weights.epses())
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self.loss, self.projected_grad = self._constants([torch.nan])[0], self._constants([torch.nan])[0]

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Make one step; returns `loss`.

        Raises:
            FastpeftError: the optimizer has a journal now, or another setting that this class does not take; or after
                the capture, learning rate times weight decay is not what it was.
        """
        optimizer = self._optimizer
        _check(optimizer)
        optimizer.settle()
        groups = [group for group, _ in self._weights.groups()]
        rates = [float(group["lr"]) for group in groups]
        decays = [rate * group["weight_decay"] for rate, group in zip(rates, groups)]
        self._seeds.copy_(torch.tensor(optimizer.draw_seeds()), non_blocking=True)
        self._rates.copy_(torch.tensor(rates, dtype=torch.float64), non_blocking=True)
        if self._graph is not None and decays != self._decays:
            raise FastpeftError(
                f"CapturedStep: learning rate times weight decay is {decays} and was {self._decays} when the step was "
                "captured. Make another CapturedStep, or train without weight decay."
            )
        self._decays = decays
        if self._graph is None and self._calls > 0 and self._device.type == "cuda":
            self._graph = self._captured()
        if self._graph is not None:
            with torch.cuda.device(self._device):
                self._graph.replay()
        else:
            try:
                self.run()
            except BaseException:
                optimizer.settle()
                raise
        self._calls += 1
        optimizer.steps_done += 1
        return self.loss

    def _captured(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            # its own stream is one of the device that was current at the first capture of the process
            with torch.cuda.device(self._device), torch.cuda.graph(graph, stream=torch.cuda.Stream(self._device)):
                self.run()
        finally:
            self._weights.point = HOME  # where an exception ended it, no weight was moved
        return graph

    @torch.no_grad()
    def run(self) -> None:
        """What the graph holds: a step with the seeds and rates that are on the device."""
        weights, estimator = self._weights, self._optimizer.estimator
        epses = weights.epses()
        losses: list[Tensor] = []
        with in_eval_mode(weights.modules()):
            for point in estimator.points:
                terms = moves(weights.point, point)
                each = [[(draw, scale * eps) for draw, scale in terms] for eps in epses]
                self._add(each, [self._fixed(group) for group in each])
                weights.point = point
                losses.append(self._closure().detach().reshape(()).to(torch.float64))
        at = weights.point
        slopes = (torch.stack(losses[::2]) - torch.stack(losses[1::2])) / self._span
        if self._optimizer.max_projected_grad is not None:
            limit = self._optimizer.max_projected_grad * (min(epses) / epses[0])
            slopes = slopes.clamp(-limit, limit)
        # by a tensor: a GPU multiplies by the reciprocal of a number, which rounds twice
        slopes = slopes / torch.full_like(slopes, estimator.num_estimates)
        made = [
            update(at, slopes.unbind(), epses[0], rate, eps, decay)
            for rate, eps, decay in zip(self._rates.unbind(), epses, self._decays)
        ]
        scales = [torch.stack([scale for _, scale in terms]) for terms in made]
        are_finite = (torch.cat([*scales, torch.stack(losses)]).abs() <= LARGEST).all()
        back = [[(draw, 0.0) for draw, _ in terms] for terms in made]
        for terms, eps in zip(back, epses):
            terms[0] = at[0], -at[1] * eps
        self._add(
            made,
            [torch.where(are_finite, scale, self._fixed(terms)) for scale, terms in zip(scales, back)],
            self._decays,
        )
        weights.point = HOME
        self.loss.copy_(torch.stack(losses).mean())
        self.projected_grad.copy_(torch.where(are_finite, slopes.sum(), torch.nan))

    def _add(
        self, terms: Sequence[Sequence[tuple[int, Number]]], scales: Sequence[Tensor], decays: Sequence[float] = ()
    ) -> None:
        """One pass over the weights: the terms of each group, with their scales as tensors."""
        for index, (group, offsets) in enumerate(self._weights.groups()):
            seeds = torch.cat([self._seeds[draw : draw + 1] for draw, _ in terms[index]])
            decay = decays[index] if decays else 0.0
            mezo_perturb_(group["params"], offsets, seeds, scales[index], decay, self._weights.noise)
        torch.clear_autocast_cache()  # as in PerturbedWeights

    def _fixed(self, terms: Sequence[Term]) -> Tensor:
        """The scales of terms that are the same in each step, made once: a graph takes no number from the host."""
        scales = tuple(scale for _, scale in terms)
        if scales not in self._scales:
            self._scales[scales] = self._constants(scales)
        return self._scales[scales]

    def _constants(self, numbers: Sequence[float]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64, device=self._device)


def _check(optimizer: MeZO) -> None:
    """Raise `FastpeftError` where a step of `optimizer` asks for numbers while it runs, as one with a journal does."""
    if not isinstance(optimizer, MeZO):
        raise FastpeftError(
            f"CapturedStep takes a MeZO, and the optimizer is a {type(optimizer).__name__}. Give a MeZO."
        )
    params = optimizer.weights.params()
    if (
        (optimizer.estimator.kind, optimizer.restore, optimizer.on_nonfinite) != ("spsa", "in_place", "skip")
        or optimizer.journal is not None
        or optimizer.ranks.size > 1
        or is_sharded(params)
        or len({param.device for param in params}) > 1
    ):
        raise FastpeftError(
            "CapturedStep takes a MeZO with estimator='spsa', restore='in_place' and on_nonfinite='skip', of one "
            "process and device and without a journal: all else asks for numbers while a step runs. Use its step()."
        )
