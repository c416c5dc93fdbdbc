"""MeZO, the memory-efficient zeroth-order optimizer (Malladi et al., 2023, arXiv 2305.17333)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.errors import FastpeftError
from fastpeft.functional import mezo_perturb_

_MASK = 2**64 - 1
_LARGEST = torch.finfo(torch.float32).max


def step_seed(seed: int, step: int) -> int:
    """The seed of the noise of step number `step`, counted from 0.

    It is output number `step` of the generator splitmix64 started at `seed`, without its top bit: a seed of the noise
    has 63 bits.

    Example:
        >>> step_seed(0, 0) == 0xE220A8397B1DCDAF % 2**63
        True
    """
    x = (seed + (step + 1) * 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return (x ^ (x >> 31)) % 2**63


class MeZO(torch.optim.Optimizer):
    r"""Train any parameters by two forward passes a step and no backward pass.

    With z standard normal noise of this step's seed, L the loss and theta what is trained:

        g     = (L(theta + eps z) - L(theta - eps z)) / (2 eps)
        theta = (1 - lr * weight_decay) * theta - lr * g * z

    The weights are perturbed in place, z exists only while it is added, and restoring and updating are one pass.

    Args:
        model_or_params: a model, or parameters or parameter groups as any optimizer takes them. What requires a
            gradient when it is given is trained; the rest is left alone. Tied weights count once. A model is put in
            eval mode while its losses are computed; with parameters alone, turn dropout off yourself.
        lr: learning rate, 0 or more. The update has no normalisation: rates are far below those of Adam (1e-6 for a
            full RoBERTa-large).
        eps: size of the perturbation, above 0.
        weight_decay: 0 or more, decoupled: the update shrinks theta by `lr * weight_decay`.
        seed: of the noise, 0 to 2^63 - 1.

    Groups may set `lr`, `eps` and `weight_decay`. With several eps each group is perturbed by its own, and its g is the
    difference of the losses over twice its own.

    Attributes:
        projected_grad: g of the last step (of the first group), None before the first.
        seed: as given, or as loaded.
        steps_done: updates made so far.

    Raises:
        FastpeftError: nothing to train, a number out of its range, parameters that share memory.

    Notes:
        The noise of a step is `fastpeft.noise` at `step_seed(seed, steps_done)`: flat indices follow the parameter
        groups, each tensor in C order, so a run repeats to the bit on any device. In half precision each pass rounds
        the weights to storage. `state_dict` holds all that a resumed run needs to continue to the bit.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = MeZO(model, lr=1e-2)
        >>> x, y = torch.randn(8, 4), torch.randn(8, 1)
        >>> loss = optimizer.step(lambda: torch.nn.functional.mse_loss(model(x), y))
    """

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        lr: float,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        if not 0 <= seed < 2**63:
            raise FastpeftError(f"MeZO: seed is {seed}; allowed are 0 to 2^63 - 1.")
        if isinstance(model_or_params, Tensor):
            raise FastpeftError("MeZO got one tensor; pass a model, a list of parameters or a list of groups.")
        self._model = model_or_params if isinstance(model_or_params, nn.Module) else None
        params = list(model_or_params.parameters() if isinstance(model_or_params, nn.Module) else model_or_params)
        self.seed = seed
        self.steps_done = 0
        self.projected_grad: float | None = None
        self._position = 0.0  # the weights are theta + position * eps * z; not 0 only between estimate and update
        self._checked = False  # whether the closure was seen to repeat its loss
        if params:  # torch refuses an empty list in words of its own
            super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})
        if not params or not any(group["params"] for group in self.param_groups):
            raise FastpeftError(
                "MeZO got no parameter that requires a gradient, so there is nothing to train. Call "
                "requires_grad_(True) on what is to be trained, before making the optimizer."
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; of its parameters those that require a gradient now are trained."""
        group = self.defaults | param_group
        for name, allowed, fits in (
            ("lr", "0 or more", group["lr"] >= 0),
            ("eps", "above 0", group["eps"] > 0),
            ("weight_decay", "0 or more", group["weight_decay"] >= 0),
        ):
            if not (fits and math.isfinite(group[name])):
                raise FastpeftError(f"MeZO: {name} is {group[name]}; allowed is a finite number, {allowed}.")
        given = group["params"]
        trained: dict[int, Any] = {}
        tensors = [param for other in self.param_groups for param in other["params"]]
        for item in [given] if isinstance(given, Tensor) else given:
            param = item[1] if isinstance(item, tuple) else item  # torch allows (name, parameter)
            if not isinstance(param, Tensor):
                raise FastpeftError(f"MeZO trains tensors, but among the parameters is a {type(param).__name__}.")
            if param.requires_grad and id(param) not in trained:
                trained[id(param)] = item
                tensors.append(param)
        if tensors:  # a perturbation of no terms: its checks of dtypes and of memory, before the first step
            mezo_perturb_(tensors, [0] * len(tensors), seeds=[], scales=[])
        super().add_param_group({**group, "params": list(trained.values())})

    def step(self, closure: Callable[[], Any] | None = None) -> float | None:  # type: ignore[override]
        """Make one step.

        Args:
            closure: computes the loss of the batch, a number or a tensor of one element, and calls no backward. It is
                called twice, at the first step three times, and must return the same loss for the same weights. None
                applies what `estimate` found.

        Returns:
            The mean of the two losses; None without a closure.

        Raises:
            FastpeftError: as `estimate`, or there is no closure and no estimate, or the update is not finite; the
                weights are then those before the step, to rounding.
        """
        loss = None if closure is None else self.estimate(closure)
        self._update()
        return loss

    @torch.no_grad()
    def estimate(self, closure: Callable[[], Any]) -> float:
        """The first half of a step, as a backward pass is for other optimizers: find `projected_grad`.

        The weights stay perturbed until `step()` restores and updates them in one pass, or `settle()` restores them.

        Args and returns are those of `step`.

        Raises:
            FastpeftError: a loss is not finite, or at the first step two losses at equal weights differ. Here and
                after any exception in `closure` the weights are those before, to rounding.
        """
        try:
            with self._dropout_off():
                self._move_to(1.0)
                plus = self._loss(closure)
                if not self._checked:
                    self._check_repeats(plus, self._loss(closure))
                self._move_to(-1.0)
                minus = self._loss(closure)
        except BaseException:
            self.settle()
            raise
        self.projected_grad = (plus - minus) / (2 * self.param_groups[0]["eps"])
        return (plus + minus) / 2

    @torch.no_grad()
    def settle(self) -> None:
        """Take the perturbation of an estimate that no step has applied out of the weights, to rounding."""
        self._move_to(0.0)

    def state_dict(self) -> dict[str, Any]:
        """Groups, seed and number of steps: with the weights, all that a run is continued from."""
        if self._position:
            raise FastpeftError("MeZO: the weights are perturbed; call step() or settle() before saving anything.")
        return {**super().state_dict(), "seed": self.seed, "steps_done": self.steps_done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the optimizer of `state_dict` stood; its seed and groups replace those given."""
        if not {"seed", "steps_done"} <= state_dict.keys():
            raise FastpeftError(
                f"MeZO: the state has {', '.join(map(str, state_dict))} but not seed and steps_done, so another "
                "optimizer wrote it. Load the state of a MeZO optimizer, or begin anew."
            )
        self.settle()
        super().load_state_dict(state_dict)
        self.seed, self.steps_done = state_dict["seed"], state_dict["steps_done"]

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

    def _move_to(self, position: float) -> None:
        """Bring the weights to theta + position * eps * z."""
        distance = position - self._position
        if distance:
            moves = [(group["params"], offsets, distance * group["eps"], 0.0) for group, offsets in self._groups()]
            self._add_noise(moves, position)

    def _add_noise(self, changes: list[tuple[list[Tensor], list[int], float, float]], position: float) -> None:
        """For each (parameters, offsets, scale, decay) `p <- (1 - decay) p + scale z`, which leads to `position`."""
        seed = step_seed(self.seed, self.steps_done)
        for params, offsets, scale, decay in changes:
            mezo_perturb_(params, offsets, [seed], [scale], decay)
        self._position = position
        torch.clear_autocast_cache()  # an autocast around the step would go on with casts of the weights before

    @torch.no_grad()
    def _update(self) -> None:
        """Restore and update: `theta <- (1 - lr wd) theta + ((1 - lr wd) eps - lr g) z` from theta - eps z."""
        if not self._position or self.projected_grad is None:
            raise FastpeftError("MeZO.step needs a closure that returns the loss, or a call of estimate before it.")
        first_eps = self.param_groups[0]["eps"]
        updates = []
        for group, offsets in self._groups():
            lr, eps = float(group["lr"]), group["eps"]
            decay = lr * group["weight_decay"]
            g = self.projected_grad * (first_eps / eps)
            updates.append((group["params"], offsets, (1 - decay) * eps - lr * g, decay))
        if not all(abs(scale) <= _LARGEST for _, _, scale, _ in updates):
            self.settle()
            raise FastpeftError(
                f"MeZO: the update of {self._where()} is not finite (projected gradient {self.projected_grad:g}); the "
                "weights are those before it. Lower the learning rate."
            )
        self._add_noise(updates, 0.0)
        self.steps_done += 1

    def _loss(self, closure: Callable[[], Any]) -> float:
        """The loss as a double; a float32 or half precision loss is exact in it."""
        loss = closure()
        if not isinstance(loss, (int, float)) and not (isinstance(loss, Tensor) and loss.numel() == 1):
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise FastpeftError(f"MeZO: the closure returned {what}; it must return the loss, one number.")
        value = float(loss)
        if not math.isfinite(value):
            raise FastpeftError(
                f"MeZO: the loss at theta {'+' if self._position > 0 else '-'} eps z is {value} at {self._where()}. "
                "The weights are those before that step. Lower the learning rate or look for a fault in the data."
            )
        return value

    def _check_repeats(self, first: float, second: float) -> None:
        if first != second:
            raise FastpeftError(
                f"MeZO: the closure returned {first!r} and then {second!r} for the same weights. A step takes the "
                "small difference of two losses for a slope, and would take this noise for one too. Turn dropout off "
                "(pass the model to MeZO, or call model.eval()), let every call see the same batch, and use "
                "deterministic kernels (torch.use_deterministic_algorithms(True))."
            )
        self._checked = True

    def _where(self) -> str:
        return f"step {self.steps_done + 1} (noise seed {step_seed(self.seed, self.steps_done)})"

    @contextmanager
    def _dropout_off(self) -> Iterator[None]:
        """The model, if one was given, in eval mode; afterwards each module is as it was."""
        training = [] if self._model is None else [module for module in self._model.modules() if module.training]
        if self._model is not None:
            self._model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True  # not train(), which would change the modules below it as well
