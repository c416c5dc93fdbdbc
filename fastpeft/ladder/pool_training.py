"""Training many side networks together: joined batches, and the steps and random numbers of each member."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from fastpeft.errors import FastpeftError
from fastpeft.ladder.backbone import INPUTS

LABELS = ("labels", "start_positions", "end_positions")

Batch: TypeAlias = Mapping[str, Tensor]
Stepping: TypeAlias = Optimizer | tuple[Optimizer, LRScheduler]
Stop: TypeAlias = Callable[[str, int, float], bool]


def source_of(batch: Batch) -> Tensor:
    """The input whose shape gives the rows and tokens of a batch."""
    return batch["input_ids"] if "input_ids" in batch else batch["inputs_embeds"]


def join(batches: Mapping[int, Batch], pad_token_id: int) -> tuple[Batch, dict[int, Any]]:
    """The inputs of several batches as one, padded on the right, and the place of each: its rows and its tokens."""
    if len(batches) == 1:
        return next(iter(batches.values())), dict.fromkeys(batches, ...)
    shapes = {name: source_of(batch).shape[:2] for name, batch in batches.items()}
    longest = max(tokens for _, tokens in shapes.values())
    ends = list(itertools.accumulate(rows for rows, _ in shapes.values()))
    places = {
        name: (slice(end - rows, end), slice(tokens)) for end, (name, (rows, tokens)) in zip(ends, shapes.items())
    }
    keys = {key for batch in batches.values() for key in INPUTS if key in batch}
    if any(tokens != longest for _, tokens in shapes.values()):
        keys.add("attention_mask")
    joined = {}
    for key in keys:
        parts = []
        for name, batch in batches.items():
            part = batch.get(key)
            if part is None and key in ("attention_mask", "token_type_ids"):
                part = source_of(batch).new_full(shapes[name], int(key == "attention_mask"), dtype=torch.long)
            if part is None:
                raise FastpeftError(f"some of the batches have {key} and others do not. Give it to all or none.")
            widths = (0, 0) * (part.dim() - 2) + (0, longest - part.shape[1])
            parts.append(F.pad(part, widths, value=pad_token_id if key == "input_ids" else 0))
        joined[key] = torch.cat(parts)
    return joined, places


def steps_of(
    data: Iterable[Batch] | Mapping[str, Iterable[Batch]], names: Sequence[str], epochs: int, stopped: set[str]
) -> Iterator[dict[str, Batch]]:
    """For each step, the batch of every member that still trains; the caller adds to `stopped` between steps."""
    sources = [data[name] for name in names if name in data] if isinstance(data, Mapping) else [data]
    if epochs > 1 and (spent := [source for source in sources if isinstance(source, Iterator)]):
        raise FastpeftError(
            f"epochs={epochs}, but the batches come from a {type(spent[0]).__name__}, which ends after one. Give a "
            "list, a DataLoader or another iterable that can start again."
        )
    if not isinstance(data, Mapping):
        for batch in itertools.chain.from_iterable(itertools.repeat(data, epochs)):
            active = [name for name in names if name not in stopped]
            if not active:
                return
            yield dict.fromkeys(active, batch)
        return
    if extra := [name for name in data if name not in names]:
        raise FastpeftError(f"there are batches for {', '.join(map(repr, extra))}, but no optimizer. Leave them out.")
    left = {name: itertools.chain.from_iterable(itertools.repeat(data[name], epochs)) for name in names}
    while True:
        batches = {name: batch for name in names if name not in stopped for batch in itertools.islice(left[name], 1)}
        if not batches:
            return
        yield batches


class StepLock:
    """Lets answers of several threads run at once, but a step of training only alone.

    A step changes weights and torch's random state. It holds `lock`, a re-entrant one.
    """

    def __init__(self, lock: Any) -> None:
        self._changed = threading.Condition(lock)
        self._answers = self._waiting_steps = 0

    @contextmanager
    def answer(self) -> Iterator[None]:
        """Wait while a step waits or runs; then none does while the block runs."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting_steps)
            self._answers += 1
        try:
            yield
        finally:
            with self._changed:
                self._answers -= 1
                self._changed.notify_all()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Wait until each answer that has begun has ended; then none runs while the block does."""
        with self._changed:
            self._waiting_steps += 1
            try:
                self._changed.wait_for(lambda: not self._answers)
                yield
            finally:
                self._waiting_steps -= 1
                self._changed.notify_all()


class RandomStream:
    """A context in which torch draws from a stream of its own, which continues at the next entry.

    Args:
        seed: the stream starts as after `torch.manual_seed(seed)`.
        device: the device whose generator is exchanged, besides the CPU's.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._generators = [torch.default_generator]
        if device.type == "cuda":
            self._generators.append(torch.cuda.default_generators[device.index])
        self._states = [torch.Generator(each.device).manual_seed(seed).get_state() for each in self._generators]

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *error: object) -> None:
        self._swap()

    def _swap(self) -> None:
        states = [each.get_state() for each in self._generators]
        for each, state in zip(self._generators, self._states):
            each.set_state(state)
        self._states = states


class MemberTrainer:
    """A member in training.

    Args:
        name: the name of its task.
        model: the member.
        stepping: its optimizer, or a pair of optimizer and scheduler.
        stream: its random numbers.
        max_grad_norm: where to clip its gradient norm; None does not clip.

    Attributes:
        losses: the loss of each step.

    Raises:
        FastpeftError: the optimizer has no parameter of the member.
    """

    def __init__(
        self, name: str, model: nn.Module, stepping: Stepping, stream: RandomStream, max_grad_norm: float | None
    ) -> None:
        self.name, self.model = name, model
        self.losses: list[float] = []
        self._scheduler: LRScheduler | None
        self._optimizer, self._scheduler = stepping if isinstance(stepping, tuple) else (stepping, None)
        self._stream, self._max_grad_norm = stream, max_grad_norm
        own = {id(parameter) for parameter in model.parameters()}
        if not any(id(stepped) in own for group in self._optimizer.param_groups for stepped in group["params"]):
            raise FastpeftError(
                f"the optimizer of {name!r} has none of its parameters, so nothing would train. Make it of "
                f"pool[{name!r}].parameters()."
            )

    def step(self, compute: Callable[[], Any]) -> None:
        """A step on the loss of the output that `compute` returns.

        Raises:
            FastpeftError: the loss is not finite. No step is made then.
        """
        with self._stream:
            loss = compute().loss
            loss.backward()
            self.losses.append(loss.item())
            if not math.isfinite(self.losses[-1]):
                self._clear_gradients()
                raise FastpeftError(
                    f"the loss of {self.name!r} is {self.losses[-1]} at step {len(self.losses)}. Lower its learning "
                    "rate, give max_grad_norm, or look at that batch."
                )
            if self._max_grad_norm is not None:
                trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
                nn.utils.clip_grad_norm_(trained, self._max_grad_norm)
            self._optimizer.step()
            self._clear_gradients()
            torch.clear_autocast_cache()  # an autocast around `fit` would go on with casts of the weights before
            if isinstance(self._scheduler, ReduceLROnPlateau):
                self._scheduler.step(self.losses[-1])
            elif self._scheduler is not None:
                self._scheduler.step()

    def _clear_gradients(self) -> None:
        """Clear also those that the optimizer does not step: the next step would be clipped by them."""
        self._optimizer.zero_grad()
        self.model.zero_grad()
