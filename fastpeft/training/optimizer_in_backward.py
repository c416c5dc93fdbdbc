"""An optimizer that steps in the backward pass, so that few gradients are alive at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastpeft.errors import FastpeftError

BUCKET = 16 * 2**20  # bytes


class StepsInBackward:
    """Lets an optimizer step during backward, as soon as gradients of a bucket's size are there, and frees them.

    What is left at the end is for the step that follows backward as ever. An optimizer that treats each parameter by
    itself, as AdamW, gives the same bits as without; nothing that needs all gradients at once goes with it.

    Args:
        optimizer: it skips parameters without a gradient, as PyTorch's and bitsandbytes' do.
        check: called with the gradients of a bucket before they are used; it may raise.
        bucket: bytes of gradients that are waited for: a few large steps take much less time than many small ones.

    Raises:
        FastpeftError: in backward, where a gradient comes a second time before the optimizer's own step.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        check: Callable[[list[Tensor]], None] = lambda gradients: None,
        bucket: int = BUCKET,
    ) -> None:
        self.optimizer, self.check, self.bucket = optimizer, check, bucket
        self._waiting: list[Tensor] = []
        self._nbytes = 0  # of what waits
        self._arrived: set[int] = set()
        self._in_backward = False
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(self._on_gradient)
        optimizer.register_step_post_hook(self._after_step)

    def _on_gradient(self, parameter: nn.Parameter) -> None:
        if id(parameter) in self._arrived:
            raise FastpeftError(
                "a gradient came twice for one step, when its parameter may have made it. An optimizer that steps in "
                "backward takes one backward pass a step, and no reentrant gradient checkpointing of shared weights."
            )
        self._arrived.add(id(parameter))
        gradient = parameter.grad
        assert gradient is not None
        self._waiting.append(gradient)
        self._nbytes += gradient.nbytes
        if self._nbytes >= self.bucket:
            self.check(self._waiting)
            self._in_backward = True
            try:
                self.optimizer.step()
            finally:
                self._in_backward = False
            self.optimizer.zero_grad()
            self._forget()

    def _forget(self) -> None:
        self._waiting.clear()
        self._nbytes = 0

    def _after_step(self, *_: object) -> None:
        """After the optimizer's own step the next backward begins anew."""
        if not self._in_backward:
            self._forget()
            self._arrived.clear()
