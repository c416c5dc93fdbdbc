"""MeZO, the memory-efficient zeroth-order optimizer (Malladi et al., 2023, arXiv 2305.17333)."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.errors import FastpeftError, NotFiniteError
from fastpeft.mezo.checks import check_group, check_repeated, check_trained, warn_of_rounding
from fastpeft.mezo.estimator import HOME, SPSA, Estimator, check_drawn_by, estimator_of
from fastpeft.mezo.in_place import InPlace, Rule
from fastpeft.mezo.journal import Journal, Kind
from fastpeft.mezo.parameters import describe_groups, names_of, without_parallel
from fastpeft.mezo.sharding import fingerprints, refuse_fsdp1, reshard
from fastpeft.support.eval_mode import in_eval_mode
from fastpeft.support.four_bits import keep_form
from fastpeft.support.interrupts import uninterrupted
from fastpeft.support.processes import Ranks

logger = logging.getLogger(__name__)

_WATCH_EVERY = 100  # steps; to look at each op takes long
_LARGEST = torch.finfo(torch.float32).max
_STATE = ("seed", "steps_done", "dropped", "estimator", "num_estimates", "noise", "drawn_by")


class MeZO(torch.optim.Optimizer):
    r"""Train any parameters by two forward passes a step and no backward pass.

    With z standard normal noise of this step's seed, L the loss and theta what is trained:

        g     = (L(theta + eps z) - L(theta - eps z)) / (2 eps)
        theta = (1 - lr * weight_decay) * theta - lr * g * z

    The weights are perturbed in place. z exists only while it is added. Restoring and updating are one pass.

    Args:
        model_or_params: a model, or parameters or parameter groups as any optimizer takes them. Those that require a
            gradient now are trained; tied weights count once. A model is put in eval mode while its losses are
            computed; with parameters alone, turn dropout off yourself.
        lr: learning rate, 0 or more. The update is not normalised, so rates are far below those of Adam (1e-6 for a
            full RoBERTa-large).
        eps: size of the perturbation, above 0.
        weight_decay: 0 or more, decoupled: the update shrinks theta by `lr * weight_decay`.
        seed: of the noise, 0 to 2^63 - 1; of several processes that of the first.
        estimator: `SPSA` as above, also over several directions, or `FZOO`; each has its kind of noise.
        rule: how a step changes the weights: `InPlace` as above, or `Exact` for half precision. Each has a limit of g
            and says what happens where a loss is not finite.
        model: the model that has the parameters or groups, where these are given.
        process_group: the processes that train together. All make the optimizer and call its methods, each with the
            loss of its own rows; a step follows the mean of these losses. DistributedDataParallel is not needed. None
            is the default group if `torch.distributed` is initialised, or else this process alone.

    Groups may set `lr`, `eps` and `weight_decay`. With several eps each group is perturbed by its own, and its g is the
    difference of the losses over twice its own. When one group meets the limit, the g of all are scaled down.

    Attributes:
        projected_grad: g of the last step (of the first group; the mean over the directions), None before the first,
            NaN after a skipped one.
        seed, estimator: as given, or as loaded.
        rule: as given.
        steps_done: updates made so far, skipped ones included.
        journal: where each step is recorded, see `record`; None where none is.

    Raises:
        FastpeftError: nothing to train, an argument out of its range, or parameters that share memory or are not
            sharded in their first dimension.

    Notes:
        The noise of direction i of a step is `fastpeft.ops.noise` at `step_seed(seed, steps_done * num_estimates + i)`:
        flat indices follow the parameter groups, each tensor in C order, so a run repeats to the bit on any device. In
        half precision each pass rounds the weights to storage. `state_dict` and the weights are all that a resumed run
        needs to continue to the bit. A journal (`record`, `resume`) and the weights before it are all that is needed to
        make the later weights again.
        A signal whose handler raises, such as Ctrl-C, waits for the end of a pass over the weights. After `settle()`
        they are those before the step or after it, as `steps_done` and the journal say.
        Several processes exchange one float64 a loss and nothing else. They see equal losses, so they make equal steps,
        and stop or skip together. The first step raises if their weights or settings differ, as `check_same` does.
        Parameters may be sharded by `fully_shard` (FSDP2) in their first dimension, evenly or not, which changes no
        bit; this needs `model`, and the rule `InPlace`.

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
        *,
        estimator: Estimator = SPSA(),  # noqa: B008  # which nothing changes
        rule: Rule = InPlace(),  # noqa: B008
        model: nn.Module | None = None,
        process_group: Any = None,
    ) -> None:
        if type(seed) is not int or not 0 <= seed < 2**63:
            raise FastpeftError(f"MeZO: seed is {seed!r}; allowed are whole numbers from 0 to 2^63 - 1.")
        if isinstance(model_or_params, nn.Module):
            reshard(model_or_params)
            model, model_or_params = model_or_params, without_parallel(model_or_params).named_parameters()
        params = list(model_or_params)
        if model is not None:
            refuse_fsdp1(model)
            keep_form(model)
        self.ranks = Ranks(process_group)
        self.seed = self.ranks.gather(seed)[0]
        self.estimator = estimator
        self.rule = rule
        self.weights = rule.weights(model, estimator.noise)
        self.steps_done = 0
        self.journal: Journal | None = None
        self._dropped = 0  # estimates since the last step of which settle() left the roundings
        self._slopes: list[float] | None = None  # of the estimate that step() applies, or else of the last step
        self._points_seen = 0  # of the estimate that no step has applied yet
        self._skip = False  # whether that estimate is not finite
        self._held = False  # inside `settled()`
        self._checked = False  # whether the closure was seen to repeat its loss, and all processes to be the same
        super().__init__(params or [{"params": []}], {"lr": lr, "eps": eps, "weight_decay": weight_decay})
        if not self.weights.params():
            raise FastpeftError(
                "MeZO got no parameter that requires a gradient, so there is nothing to train. Call "
                "requires_grad_(True) on what is to be trained, before making the optimizer."
            )

    @property
    def projected_grad(self) -> float | None:
        """g of the last step, see the class."""
        return None if self._slopes is None else sum(self._slopes)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; of its parameters those that require a gradient now are trained."""
        if self.journal is not None:
            raise FastpeftError("MeZO: a run with a journal takes no further parameters. Add them before `record`.")
        self.settle()
        group = self.defaults | param_group
        check_group(group)
        for name in ("lr", "eps", "weight_decay"):
            if not isinstance(group[name], Tensor):  # as a schedule may change in place
                group[name] = float(group[name])  # of numpy, as of a sweep, it could be neither recorded nor loaded
        super().add_param_group({**group, "params": self.weights.trained(group["params"])})
        self.weights.set_groups(self.param_groups)

    # -- a step --------------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> float | None:  # type: ignore[override]
        """Make one step.

        Args:
            closure: returns the loss of the batch, a number or a tensor of one element, and calls no backward. It is
                called once for each point of the estimator, and once more at the first step. It must return the same
                loss for the same weights. None applies what `estimate` found.

        Returns:
            The loss, as `estimate`; None without a closure.

        Raises:
            FastpeftError: as `estimate`, or there is no closure and no estimate, or the update is not finite; the
                weights are then those before the step, to rounding.
        """
        try:
            loss = None if closure is None else self.estimate(closure)
            self._update()
        except BaseException:
            self.settle()
            raise
        return loss

    @torch.no_grad()
    def estimate(self, closure: Callable[[], Any]) -> float:
        """The first half of a step, as a backward pass is for other optimizers: find `projected_grad`.

        The weights stay perturbed until `step()` restores and updates them in one pass, or `settle()` restores them.

        Args:
            closure: as for `step`.

        Returns:
            The mean of the losses (with `FZOO` the loss at theta), over all processes; NaN where one was not finite
            and is skipped.

        Raises:
            FastpeftError: a group's setting is out of its range, a parameter was frozen since, a loss is not finite, or
                at the first step two losses at equal weights differ, or processes do. Here and after any exception in
                `closure` the weights are those before, to rounding.
        """
        self._begin()
        losses: list[float] = []
        try:
            with in_eval_mode(self.weights.modules()):
                self.weights.show(check=self._watches())
                for point in self.estimator.points:  # theta + eps z, then theta - eps z
                    self._move(point)
                    losses.append(self._loss(closure))
                    if self._skip:
                        return math.nan
        except BaseException:
            self.settle()
            raise
        finally:
            self.weights.hide()
        self._slopes = self.estimator.slopes(losses, self.weights.epses()[0], self._limit())
        return self.estimator.loss(losses)

    @uninterrupted()
    @torch.no_grad()
    def _update(self) -> None:
        """The second half of a step: restore and update, at once or with the first pass of the next step."""
        if not self._points_seen or self._slopes is None:
            raise FastpeftError(
                "MeZO.step needs a closure that returns the loss, or a call of estimate before it. Trainer of "
                "transformers gives none: use fastpeft.MeZOTrainer. For checkpoints take its own state_dict(): "
                "get_state_dict of torch.distributed.checkpoint makes such a step."
            )
        owed = self.weights.update(self._slopes, self._seeds())
        if not self._skip and not all(abs(scale) <= _LARGEST for each in owed for scale in each.scales):
            self._give_up(f"the update is not finite (projected gradient {self.projected_grad:g})")
        self._record(Kind.SKIPPED if self._skip else Kind.MADE, self._points_seen)  # which may raise, so it comes first
        if self._skip:
            self.weights.move(HOME, self._seeds())
        else:
            self.weights.owe(owed)
        self._points_seen = 0
        self.steps_done, self._dropped = self.steps_done + 1, 0
        if not self.rule.defer:
            self.settle()

    @uninterrupted()
    @torch.no_grad()
    def settle(self) -> None:
        """Make the weights those of the model.

        A deferred step is finished, which changes no bit. An estimate that no step has applied is dropped, and its
        perturbation is taken out, to rounding.
        """
        self.weights.hide()
        dropped, self._points_seen = self._points_seen, 0
        self.weights.move(HOME, self._seeds())
        if dropped and isinstance(self.rule, InPlace):
            self._record(Kind.DROPPED, dropped)
            self._dropped += 1

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Settle the weights; a step inside the block is refused.

        Example:
            >>> model = torch.nn.Linear(4, 1)
            >>> optimizer = MeZO(model, lr=1e-2, rule=InPlace(defer=True))
            >>> loss = optimizer.step(lambda: model(torch.ones(2, 4)).square().mean())
            >>> with optimizer.settled():
            ...     state = model.state_dict()
        """
        self.settle()
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    def _begin(self) -> None:
        """Check what may have changed since the last step."""
        if self._held:
            raise FastpeftError("MeZO: no step inside `with optimizer.settled()`: it would perturb the weights.")
        for group in self.param_groups:  # which schedules and others change
            check_group(group)
        check_trained(self.weights.params())
        if self._points_seen:
            self.settle()
        self._skip = False
        if not self._checked:
            self.check_same()

    def _seeds(self) -> list[int]:
        """The seeds of the noise of the present step, one a draw."""
        return self.estimator.seeds(self.seed, self.steps_done)

    def _limit(self) -> float | None:
        """That of g of the first group; the g of the group with the smallest eps is the largest."""
        limit, epses = self.rule.max_projected_grad, self.weights.epses()
        return None if limit is None else float(limit) * min(epses) / epses[0]

    def _watches(self) -> bool:
        """Whether this step looks for reads that would not see the perturbation."""
        return not self._checked or self.steps_done % _WATCH_EVERY == 0 or not any(self._slopes or ())

    @uninterrupted()
    def _move(self, point: tuple[int, int]) -> None:
        """Bring the weights to another point of the present step, and count it."""
        self._points_seen += 1
        self.weights.move(point, self._seeds())

    def _loss(self, closure: Callable[[], Any]) -> float:
        """The loss at the present point, the mean over the processes."""
        each = self._losses(closure)
        if not self._checked and all(map(math.isfinite, each)):
            again = self._losses(closure, warn=True)
            check_repeated(each, again, self.ranks)
            each, self._checked = again, True
        for rank, loss in enumerate(each):
            if not math.isfinite(loss):
                where = {1: "theta + eps z", -1: "theta - eps z", 0: "theta"}[self.weights.point[1]]
                self._give_up(f"the loss at {where} is {loss}{self.ranks.on(rank)}")
                break
        return statistics.fmean(each)

    def _losses(self, closure: Callable[[], Any], *, warn: bool = False) -> list[float]:
        """The loss of each process as a double, in which one of float32 or half precision is exact."""
        loss = closure()
        if warn and self.ranks.is_first:
            warn_of_rounding(loss, self.weights.epses()[0])
        return self.ranks.losses(float(loss), self.weights.params()[0].device)

    def _give_up(self, what: str) -> None:
        """Raise an error about a value that is not finite, or note that the step is to be skipped."""
        seed = self._seeds()[self.weights.point[0]]
        fault = f"MeZO: {what} at step {self.steps_done + 1} (noise seed {seed})"
        if self.rule.on_nonfinite == "stop":
            raise NotFiniteError(
                f"{fault}; the weights are those before that step. Lower the learning rate, look for a fault in the "
                "data, or skip such steps (on_nonfinite='skip')."
            )
        if self.ranks.is_first:
            logger.warning("%s; the step is skipped", fault)
        self._skip = True
        self._slopes = [math.nan] * self.estimator.num_estimates

    # -- a run: its journal, its state, its processes ------------------------------------------------------------------

    def record(self, path: str | Path) -> None:
        """Begin a journal: from now on each step appends a record to `path`, 36 bytes for one direction and one group.

        With the present weights, which it does not hold, it is a checkpoint of every step: see `resume`. All processes
        must call this; the first of them writes the file.

        Raises:
            FastpeftError: there is a file at `path`, or it cannot be written, or processes differ.
        """
        self.check_same()
        begun = {"first_step": self.steps_done, "dropped": self._dropped}
        self.journal = Journal.begin(Path(path), self._described() | begun, self.weights.params(), self.ranks)

    def resume(
        self, path: str | Path, weights_at: int | Mapping[str, Any] | None = None, steps: int | None = None
    ) -> None:
        """Make the weights of a journal's run, to the bit, and continue the run and the journal.

        All processes must call this, and must be able to read the file.

        Args:
            path: of the journal. A last record that was not written whole is dropped.
            weights_at: the `state_dict` of the optimizer that was saved with the present weights, or the number of
                steps of that run behind them (enough if no exception ended a step there). None: they are those from
                which the journal began.
            steps: the step of that run after which to go on. The next step deletes the records of later ones. None: the
                last.

        Raises:
            FastpeftError: the journal is damaged or of other weights or settings, or does not hold those steps.
        """
        self.settle()
        reshard(self.weights.model)
        start = _position(weights_at) if isinstance(weights_at, Mapping) else weights_at
        params = self.weights.params()
        self.journal = Journal.resumed(Path(path), self._described(), params, start, steps, self.ranks)
        self.steps_done, self._dropped = self.journal.steps, self.journal.dropped

    def _record(self, kind: Kind, points: int) -> None:
        """Record what became of the present estimate, if there is a journal."""
        if self.journal is not None:
            groups, slopes = [group for group, _ in self.weights.groups()], self._slopes or ()
            self.journal.add(kind, self.steps_done, points, slopes, groups)

    def _described(self) -> dict[str, Any]:
        """What the header of a journal says of the run, but for its beginning."""
        rule = {"restore": self.rule.restore, "rounding": self.weights.rounding}
        return {"seed": self.seed, **self.estimator.settings, **rule, "groups": describe_groups(self.weights.groups())}

    def check_same(self) -> None:
        """Raise if processes that train together differ in a setting or in a bit of the weights that they train.

        All of them must call this. The first step does, and `MeZOTrainer` does before it saves.

        Raises:
            FastpeftError: on all processes, naming one that differs from an earlier one, and in what.
        """
        self.settle()
        self.weights.check(self.weights.params())
        if self.ranks.size > 1:
            rates = [float(group["lr"]) for group in self.param_groups]
            found = {**self._described(), "steps_done": self.steps_done, "lr": rates}
            for group, offsets in self.weights.groups():
                found |= fingerprints(group, offsets)
            self.ranks.check_same(found)

    def state_dict(self) -> dict[str, Any]:
        """Settle the weights; return groups, seed and number of steps, all that a run needs beside them to go on."""
        if self._points_seen:
            raise FastpeftError("MeZO: the weights are perturbed; call step() or settle() before saving anything.")
        self.settle()
        position = {"seed": self.seed, "steps_done": self.steps_done, "dropped": self._dropped}
        return {**super().state_dict(), **position, **self.estimator.settings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the optimizer of `state_dict` stood, with its groups, seed, noise and estimator.

        A journal goes back to there.

        Raises:
            FastpeftError: another optimizer wrote it, or one of parameters with other names or in another order; or
                there is a journal, of other settings or of other steps.
        """
        position = _position(state_dict)
        own, given = (
            [name for group in groups if "param_names" in group for name in names_of(group)]
            for groups in (self.param_groups, state_dict["param_groups"])
        )
        for name, other in zip(own, given):
            if name != other:
                raise FastpeftError(
                    f"MeZO: where the optimizer has the parameter {name}, the state has {other}. The noise follows the "
                    "order of the parameters. Make the optimizer of the same parameters, in the same order."
                )
        self.settle()
        estimator = estimator_of(state_dict)
        if self.journal is not None:
            self.journal.check_settings({"seed": state_dict["seed"], **estimator.settings})
            self.journal.find(position)
        super().load_state_dict(state_dict)
        self.weights.set_groups(self.param_groups)
        if self.journal is not None:
            self.journal.rewind(position)
        self.seed, self.estimator, self.weights.noise = state_dict["seed"], estimator, estimator.noise
        self.steps_done, self._dropped = position


def _position(state_dict: Mapping[str, Any]) -> tuple[int, int]:
    """Where a run stood when `state_dict` was made: steps, and estimates that were dropped after them.

    Raises:
        FastpeftError: another optimizer wrote it, or its noise was drawn otherwise than now.
    """
    if not state_dict.keys() >= set(_STATE):
        raise FastpeftError(
            f"MeZO: the state has {', '.join(map(str, state_dict))} but not {', '.join(_STATE)}, so another optimizer "
            "wrote it. Load the state of a MeZO optimizer, or begin anew."
        )
    check_drawn_by(state_dict, "MeZO: the state")
    return state_dict["steps_done"], state_dict["dropped"]
