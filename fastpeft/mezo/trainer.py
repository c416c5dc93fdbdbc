"""`transformers.Trainer` with MeZO in the place of backward pass and optimizer."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from fastpeft.errors import FastpeftError
from fastpeft.mezo.optimizer import MeZO

logger = logging.getLogger(__name__)


@dataclass
class MeZOConfig(TrainingArguments):
    """`TrainingArguments` for `MeZOTrainer`.

    `seed` also seeds the noise, and `weight_decay` acts on what the Trainer decays: all but biases and norms. What
    concerns gradients (`optim`, `max_grad_norm`, `gradient_checkpointing`) has no effect.

    Args:
        eps: size of the perturbation.
        learning_rate, lr_scheduler_type, per_device_train_batch_size: as in `TrainingArguments`, with the defaults of
            the method's recipe: 1e-6, constant, 16.

    Raises:
        FastpeftError: `fp16` is asked for.
    """

    eps: float = field(default=1e-3, metadata={"help": "Size of the perturbation."})
    learning_rate: float = field(default=1e-6, metadata={"help": "Learning rate at the start of the schedule."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule of the learning rate."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Rows of a batch on each device."})

    def __post_init__(self) -> None:
        if self.fp16:
            raise FastpeftError(
                "MeZOConfig: fp16=True scales losses for a backward pass, which MeZO has not. Load the model in half "
                "precision instead (dtype=torch.float16), or use bf16=True."
            )
        super().__post_init__()


class MeZOTrainer(Trainer):
    """A Trainer that trains what requires a gradient by MeZO: two forward passes a step and no graph.

    Evaluation, logging, schedules, gradient accumulation, checkpoints, resuming and callbacks work as in `Trainer`;
    on a CPU a resumed run ends with the bits of the uninterrupted one. The log has `projected_grad`, that of the last
    step. A model that predicts no words, so one that is trained without a prompt, brings a warning: MeZO relies on a
    task that is close to what the model was pretrained for.

    Args:
        model, args: the model and its `MeZOConfig`.
        kwargs: all else as for `Trainer`. With `optimizers` the optimizer must be a `MeZO`.

    Raises:
        FastpeftError: `args` is no `MeZOConfig`, the optimizer no `MeZO`, or there are several processes.

    Notes:
        The model is in eval mode while it trains. The loss of a step is the mean over its micro-batches, all under the
        same noise; a `compute_loss_func` gets `num_items_in_batch` and divides by it itself, and its results are added
        up. Callbacks see restored weights, but for `on_pre_optimizer_step`: it comes between a step's two halves.
        The Trainer of transformers 5.0 itself loses the LayerNorm weights of a whole model that came from
        `from_pretrained` when it resumes (5.24 does not).

    Example:
        >>> args = MeZOConfig("out", learning_rate=1e-6, max_steps=20_000)  # doctest: +SKIP
        >>> MeZOTrainer(model, args, train_dataset=rows).train()  # doctest: +SKIP
    """

    optimizer: Any  # a MeZO, while training in accelerate's wrapper; None before

    def __init__(self, model: nn.Module | None = None, args: MeZOConfig | None = None, **kwargs: Any) -> None:
        args = MeZOConfig() if args is None else args
        if not isinstance(args, MeZOConfig):
            raise FastpeftError(f"MeZOTrainer takes its arguments as a MeZOConfig; got a {type(args).__name__}.")
        if args.world_size > 1:
            raise FastpeftError(
                f"MeZOTrainer trains in one process; this is one of {args.world_size}. Start it without a launcher."
            )
        optimizer = kwargs.get("optimizers", (None, None))[0]
        if not (optimizer is None or isinstance(optimizer, MeZO)):
            raise FastpeftError(f"MeZOTrainer: the optimizer is {type(optimizer).__name__}; leave it out or pass MeZO.")
        super().__init__(model, args, **kwargs)
        self._micro_batches: list[dict[str, Any]] = []
        if not _predicts_words(self.model):
            logger.warning(
                "MeZO trains %s, which predicts no words: without a prompt, or a head that was trained before, it "
                "learns little. Wrap a masked language model in fastpeft.PromptModel.",
                type(self.model).__name__,
            )

    @property
    def mezo(self) -> MeZO:
        """The optimizer, without accelerate's wrapper."""
        mezo: MeZO = getattr(self.optimizer, "optimizer", self.optimizer)
        return mezo

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.optimizer is not None:
                self.mezo.settle()  # after an interrupt between the two halves of a step

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
            groups: list[dict[str, Any]] = [{"params": [param for _, param in named]}]
            if self.args.weight_decay:
                decayed = set(self.get_decay_parameter_names(model))
                groups = [
                    {"params": [param for name, param in named if name in decayed]},
                    {"params": [param for name, param in named if name not in decayed], "weight_decay": 0.0},
                ]
            args = self.args
            self.optimizer = MeZO(groups, args.learning_rate, args.eps, args.weight_decay, args.seed)
        return self.optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Keep a micro-batch; with the last of a step, estimate the projected gradient on all of them.

        Returns:
            The loss of the step with its last micro-batch, 0 with those before: the Trainer adds them up.
        """
        # _prepare_inputs is not public, but it is where the Trainer, and what extends it, moves and casts a batch
        self._micro_batches.append(self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        # an epoch that a callback ended early may have left micro-batches of a step that was never made
        batches, self._micro_batches = self._micro_batches[-self.current_gradient_accumulation_steps :], []
        model.eval()
        loss = self.mezo.estimate(lambda: self._loss(model, batches, num_items_in_batch))
        return torch.tensor(loss, device=self.args.device)

    def _loss(self, model: nn.Module, batches: list[dict[str, Any]], num_items_in_batch: Tensor | int | None) -> Tensor:
        """The mean loss of `batches`, or the sum of what a user's function has divided already.

        The Trainer does not average the losses of models that accept `num_items_in_batch`, though many ignore it.
        Adam hides such a factor, MeZO would take larger steps; so models are not given it.
        """
        divided = self.compute_loss_func is not None
        total = torch.zeros((), device=self.args.device)
        for batch in batches:
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, dict(batch), num_items_in_batch=num_items_in_batch if divided else None)
            total = total + loss.mean()  # one loss per device under DataParallel
        return total if divided else total / len(batches)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the projected gradient beside the training loss, in the place of a gradient norm that is always 0."""
        if "loss" in logs and self.mezo.projected_grad is not None:
            logs.pop("grad_norm", None)
            logs["projected_grad"] = self.mezo.projected_grad
        super().log(logs, *args, **kwargs)


def _predicts_words(model: nn.Module) -> bool:
    """Whether `model` is, or is made around, a language model."""
    return any(
        isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None for module in model.modules()
    )
