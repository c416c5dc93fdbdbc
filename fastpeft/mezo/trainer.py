"""`transformers.Trainer` with MeZO instead of backward pass and optimizer."""

from __future__ import annotations

import logging
import math
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, ExportableState

from fastpeft.errors import FastpeftError, NotFiniteError
from fastpeft.mezo.checkpoints import STATE_FILE, Checkpoint, Start, where_to_begin
from fastpeft.mezo.checks import check_choice, warn_of_rounding
from fastpeft.mezo.estimator import estimator_of
from fastpeft.mezo.exact import Exact
from fastpeft.mezo.in_place import InPlace, Rule
from fastpeft.mezo.journal import FILE_NAME, Journal
from fastpeft.mezo.optimizer import MeZO
from fastpeft.mezo.sharding import is_sharded
from fastpeft.ops.fused_head import fuse_any_head
from fastpeft.prompts.model import inside_prompt
from fastpeft.support import files
from fastpeft.support.nonfinite import where_it_began
from fastpeft.support.processes import Ranks

logger = logging.getLogger(__name__)

_MEASURING_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
# callbacks that do not look at the weights, or that save them by the Trainer, which settles; trackers may look
_NOT_LOOKING = {
    f"transformers.{name}"
    for name in (
        "DefaultFlowCallback",
        "EarlyStoppingCallback",
        "JITCheckpointCallback",
        "NotebookProgressCallback",
        "PrinterCallback",
        "ProgressCallback",
        "TensorBoardCallback",
    )
}


@dataclass
class MeZOConfig(TrainingArguments):
    """`TrainingArguments` for `MeZOTrainer`.

    `seed` also seeds the noise. `weight_decay` acts on what the Trainer decays: all but biases and norms. Settings of
    gradients (`optim`, `max_grad_norm`, `gradient_checkpointing`) have no effect.

    Args:
        eps: as for `fastpeft.MeZO`.
        estimator, num_estimates, noise: "spsa" or "fzoo", as for `fastpeft.SPSA` and `fastpeft.FZOO`.
        restore, rounding, max_projected_grad, on_nonfinite: "in_place" or "exact", as for `fastpeft.InPlace` and
            `fastpeft.Exact`.
        journal: append a record of each step, some 40 bytes, to `mezo.journal` in the output folder. With the base
            model this is a checkpoint of every step: `resume_from_checkpoint=True` goes on from the last one. The log
            is not in it, nor what a callback does to the weights.
        save_weights: whether checkpoints hold the weights. If not, they hold a copy of the journal, and resuming
            repeats its steps on the base model, or on the newest checkpoint with weights.
        learning_rate, lr_scheduler_type, per_device_train_batch_size: as in `TrainingArguments`, with the defaults of
            the method's recipe beside RoBERTa-large: 1e-6, constant, 16.

    Raises:
        FastpeftError: `fp16` or `neftune_noise_alpha` is set; `save_weights` is False without `journal`, or with
            `load_best_model_at_end`; or `journal` and `auto_find_batch_size` are set.
    """

    eps: float = field(default=1e-3, metadata={"help": "Size of the perturbation."})
    estimator: str = field(default="spsa", metadata={"help": "How a step estimates: spsa or fzoo."})
    num_estimates: int = field(default=1, metadata={"help": "Directions a step."})
    noise: str = field(default="gaussian", metadata={"help": "Noise of the perturbation: gaussian or rademacher."})
    max_projected_grad: float | None = field(default=None, metadata={"help": "Largest projected gradient."})
    on_nonfinite: str = field(default="stop", metadata={"help": "After a loss that is not finite: stop or skip."})
    restore: str = field(default="in_place", metadata={"help": "How perturbed weights return: in_place or exact."})
    rounding: str = field(default="stochastic", metadata={"help": "With restore exact: stochastic or nearest."})
    journal: bool = field(default=False, metadata={"help": "Append each step to mezo.journal in the output folder."})
    save_weights: bool = field(default=True, metadata={"help": "Whether checkpoints hold weights, or the journal."})
    learning_rate: float = field(default=1e-6, metadata={"help": "Learning rate at the start of the schedule."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule of the learning rate."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Rows of a batch on each device."})

    def __post_init__(self) -> None:
        if self.fp16:
            raise FastpeftError(
                "MeZOConfig: fp16=True scales losses for a backward pass, and MeZO makes none. Load the model in half "
                "precision instead (dtype=torch.float16), or use bf16=True."
            )
        if self.neftune_noise_alpha:
            raise FastpeftError(
                "MeZOConfig: neftune_noise_alpha is for embeddings in training mode, in which MeZO has none; it is "
                f"{self.neftune_noise_alpha}. Leave it out."
            )
        if not self.save_weights and (not self.journal or self.load_best_model_at_end):
            raise FastpeftError(
                "MeZOConfig: save_weights=False needs journal=True, from which the weights are made again, and "
                "load_best_model_at_end=False, which reads weights. Correct these, or let checkpoints hold weights."
            )
        if self.journal and self.auto_find_batch_size:
            raise FastpeftError(
                "MeZOConfig: auto_find_batch_size=True counts its steps anew with each batch size that it tries, and "
                "the journal goes on counting. Set per_device_train_batch_size, or leave out one of the two."
            )
        super().__post_init__()

    def rule(self) -> Rule:
        """How a step changes the weights."""
        check_choice("restore", self.restore, ("in_place", "exact"))
        limits: dict[str, Any] = {"max_projected_grad": self.max_projected_grad, "on_nonfinite": self.on_nonfinite}
        exact = Exact(rounding=self.rounding, **limits)
        return exact if self.restore == "exact" else InPlace(defer=True, **limits)


class MeZOTrainer(Trainer):
    """A Trainer that trains what requires a gradient by MeZO: two forward passes a step and no graph.

    Evaluation, logging, schedules, gradient accumulation, checkpoints, resuming and callbacks work as in `Trainer`.
    On a CPU a resumed run ends with the bits of the uninterrupted one. The log has the `projected_grad` of the last
    step. A model that predicts no words brings a warning: MeZO needs a task that is close to what the model was
    pretrained for, so train it with a prompt.

    Args:
        model, args: the model and its `MeZOConfig`.
        kwargs: all else as for `Trainer`. An optimizer among `optimizers` must be a `MeZO`, and its settings are used.

    Raises:
        FastpeftError: `args` is no `MeZOConfig`, the optimizer is no `MeZO`, or `optimizer_cls_and_kwargs`, FSDP or
            DeepSpeed is asked for.

    Notes:
        The model is in eval mode while it trains. One that predicts words gets `fastpeft.fuse_head`, so that its loss
        makes no logits. The loss of a step is the mean over its micro-batches, all under the
        same noise. A `compute_loss_func` gets `num_items_in_batch`, must divide by it, and its results are added up. A
        skipped step is logged with the loss of the step before it.
        In place, the end of a step is left to the next one (`InPlace(defer=True)`), but evaluation, saving and
        callbacks see settled weights; only `on_pre_optimizer_step` comes between the two halves of a step. So each
        event that a callback handles costs one more pass over the weights. Callbacks known not to look at the weights
        are excepted: this library's, and of transformers the progress bars, early stopping, saving at a signal and
        TensorBoard.
        Under a launcher (`torchrun`) all processes begin with the weights of the first, and each sends its loss, one
        number a forward. The model is not wrapped in DistributedDataParallel. The first writes journal and checkpoints.
        When the Trainer of transformers 5.0 resumes, it loses the LayerNorm weights of a whole model that came from
        `from_pretrained` (5.24 does not).

    Example:
        >>> args = MeZOConfig("out", learning_rate=1e-6, max_steps=20_000)  # doctest: +SKIP
        >>> MeZOTrainer(model, args, train_dataset=rows).train()  # doctest: +SKIP
    """

    callback_handler: Any
    optimizer: Any  # a MeZO, while training in accelerate's wrapper; None before

    def __init__(self, model: nn.Module | None = None, args: MeZOConfig | None = None, **kwargs: Any) -> None:
        args = MeZOConfig() if args is None else args
        if not isinstance(args, MeZOConfig):
            raise FastpeftError(f"MeZOTrainer takes its arguments as a MeZOConfig; got a {type(args).__name__}.")
        optimizer = kwargs.get("optimizers", (None, None))[0]
        if not (optimizer is None or isinstance(optimizer, MeZO)):
            raise FastpeftError(f"MeZOTrainer: the optimizer is {type(optimizer).__name__}; leave it out or pass MeZO.")
        if kwargs.get("optimizer_cls_and_kwargs") is not None:
            raise FastpeftError(
                "MeZOTrainer got optimizer_cls_and_kwargs, but makes its optimizer by the MeZOConfig. Leave it out, or "
                "give a MeZO in optimizers."
            )
        super().__init__(model, args, **kwargs)
        self._micro_batches: list[dict[str, Any]] = []
        self._last_loss = 0.0
        self._warned = False  # of losses in half precision
        self._start: Start | None = None  # of a resumed run with a journal
        self._loaded_from: str | None = None  # the checkpoint whose weights are being loaded
        self._resumes = False  # from a checkpoint, given or made
        handler = self.callback_handler
        at_work = handler.model, handler.processing_class, handler.optimizer, handler.lr_scheduler
        self.callback_handler = _SettlingHandler(self, handler.callbacks, *at_work)
        for what, asked in (("FSDP", self.is_fsdp_enabled), ("DeepSpeed", self.is_deepspeed_enabled)):
            if asked:
                raise _sharded(what)
        fuse_any_head(self.model)  # its loss asks for no gradient here, even where the decoder trains
        for warning in self.warnings_of_head():
            logger.warning("%s", warning)

    def call_model_init(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As `Trainer.call_model_init`: each `train` begins with another model."""
        model: nn.Module = super().call_model_init(*args, **kwargs)
        fuse_any_head(model)
        return model

    def warnings_of_head(self) -> list[str]:
        """What is to be said where the model is no language model, and contains none."""
        models = (module for module in self.model.modules() if isinstance(module, PreTrainedModel))
        if any(model.get_output_embeddings() is not None for model in models):
            return []
        return [
            f"MeZO trains {type(self.model).__name__}, which has no LM head: with a newly initialised head MeZO learns "
            "little. Train with a prompt (--prompt, or in Python fastpeft.PromptModel), or start from a trained head "
            "(--init-from)."
        ]

    def _wrap_model(self, model: nn.Module, training: bool = True, *args: Any, **kwargs: Any) -> Any:
        """Keep the model out of DistributedDataParallel, which has buffers for gradients and sends at each forward.

        Prepared for evaluation, it is not wrapped later. All processes get the weights of the first, as that would give
        them.
        """
        wrapped = super()._wrap_model(model, training, *args, **kwargs)
        if training and wrapped is self.model:
            wrapped = self.accelerator.prepare_model(wrapped, evaluation_mode=True)
            Ranks().share(wrapped)
        return wrapped

    @property
    def mezo(self) -> MeZO:
        """The optimizer, without accelerate's wrapper."""
        mezo: MeZO = getattr(self.optimizer, "optimizer", self.optimizer)
        return mezo

    @property
    def journal_file(self) -> Path:
        """The file of the journal, if the run has one."""
        return Path(self.args.output_dir) / FILE_NAME

    def checkpoints(self) -> list[Path]:
        """The checkpoints that were written whole, in the order of their steps."""
        return [each for each in files.checkpoints_in(Path(self.args.output_dir)) if (each / STATE_FILE).exists()]

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`. With a journal, `resume_from_checkpoint=True` goes on from its last step.

        That step is made once more, since the run may have ended before the step was logged.

        Raises:
            FastpeftError: a step cannot be made; the output folder holds a journal and the run is not resumed; or the
                journal is of another run.
        """
        try:
            with self._started(resume_from_checkpoint) as checkpoint:
                return super().train(checkpoint, *args, **kwargs)
        finally:
            self.settle()  # also after an interrupt between the two halves of a step

    def settle(self) -> None:
        """Make the weights those of the model, see `MeZO.settle`."""
        if self.optimizer is not None:
            self.mezo.settle()

    def before_event(self, event: str) -> None:
        """Settle before events at which a callback may look at the weights; go on with a run before the first one."""
        if event == "on_train_begin" and self._resumes:
            self._go_on()
        looked_at = event == "on_train_end" or any(_may_look(each, event) for each in self.callback_handler.callbacks)
        if looked_at and event != "on_pre_optimizer_step":
            self.settle()

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.settle()
        return super().evaluation_loop(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`; a checkpoint of a run with `save_weights=False` gets the journal instead."""
        self.settle()
        journal = None if self.optimizer is None else self.mezo.journal
        if _internal_call and self.optimizer is not None:  # all processes are here; a user may save in one alone
            self.mezo.check_same()
        if journal is not None and self.is_world_process_zero():
            journal.flush()
        if journal is None or self.args.save_weights or not _internal_call or output_dir is None:
            super().save_model(output_dir, _internal_call)
        elif self.is_world_process_zero():
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            files.write_bytes(Path(output_dir) / FILE_NAME, journal.content())

    def _load_best_model(self) -> None:
        self.settle()  # before other weights are loaded, to which the deferred step does not belong
        self._loaded_from = self.state.best_model_checkpoint
        super()._load_best_model()

    @contextmanager
    def _started(self, resume: str | bool | None) -> Iterator[str | bool | None]:
        """Give the checkpoint for the Trainer; one made for the journal's last step exists inside the block only."""
        self._start, self._resumes = None, False
        if not self.args.journal:
            yield resume
            return
        file = self.journal_file
        if not resume:
            if file.exists():
                raise FastpeftError(
                    f"{file} is the journal of another run. Resume it (resume_from_checkpoint=True), or give another "
                    "output folder."
                )
            yield None
            return
        saved = [Checkpoint.read(path) for path in self.checkpoints()]
        given = None if isinstance(resume, bool) else Checkpoint.read(Path(resume))
        copies = [each.path / FILE_NAME for each in ([given] if given else saved[-1:]) if not each.weights]
        journal = next((Journal.open(path) for path in (file, *copies) if path.exists()), None)
        start = where_to_begin(saved, given, None if journal is None else (journal.begins_at[0], journal.steps))
        begins = start.steps if journal is None else journal.begins_at[0]
        if begins and not self.args.save_weights:
            raise FastpeftError(
                f"save_weights=False, but the journal in {file.parent} begins after {begins} steps of the run, so the "
                "base model and the journal do not give the weights. Let checkpoints hold weights (save_weights=True)."
            )
        self._start = start
        if start.at_checkpoint or journal is None:
            yield True if start.newest is None else str(start.newest.path)
            return
        if self.args.lr_scheduler_type in _MEASURING_SCHEDULES:
            raise FastpeftError(
                f"the journal {file} has later steps than any checkpoint, but the schedule "
                f"{self.args.lr_scheduler_type!s} follows measured losses, which a journal does not hold. Resume from "
                "a checkpoint, by its path."
            )
        with tempfile.TemporaryDirectory() as folder:
            self._state_at(start).save_to_json(str(Path(folder) / STATE_FILE))
            yield folder

    def _state_at(self, start: Start) -> TrainerState:
        """The Trainer's own state after a step that only the journal has."""
        if start.newest is not None:
            state = TrainerState.load_from_json(str(start.newest.path / STATE_FILE))
        else:
            parts = (*self.callback_handler.callbacks, self.control)
            with_state = [part for part in parts if isinstance(part, ExportableState)]
            state = TrainerState(stateful_callbacks=with_state)  # the Trainer looks for these when it saves
        state.global_step = start.steps
        for name in ("logging_steps", "eval_steps", "save_steps", "train_batch_size"):
            setattr(state, name, getattr(self.args, name))
        return state

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights with which the journal continues, unless they are those of the base model."""
        if self._start is not None:
            if self._start.weights is None:
                return
            resume_from_checkpoint = str(self._start.weights.path)
        self._loaded_from = resume_from_checkpoint
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Load weights that transformers saved by older names, as those of GPT-NeoX, which its Trainer skips."""
        model = inside_prompt(self.model)
        if load_result.unexpected_keys and isinstance(model, PreTrainedModel):
            saved: Any = type(model).from_pretrained(self._loaded_from, use_safetensors=True)
            model.load_state_dict(saved.state_dict())
        else:
            super()._issue_warnings_after_load(load_result)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._resumes = checkpoint is not None

    def _go_on(self) -> None:
        """Bring weights, optimizer and schedule to the step after which the run is resumed.

        Not before the Trainer has its state, which up to transformers 5.2 it reads after the optimizer's.
        """
        start, file = self._start, self.journal_file
        if not self.mezo.steps_done:  # not in what save_only_model leaves
            self.mezo.steps_done = self.state.global_step  # or noise that was used would be drawn again
        if start is None:
            return
        if not start.at_checkpoint and start.steps >= self.state.max_steps:
            raise FastpeftError(
                f"the journal {file} has {start.steps + 1} steps, but this run is to end after {self.state.max_steps}. "
                f"Let it make {start.steps + 1} or more (max_steps, num_train_epochs). The weights after fewer steps "
                "are those of fastpeft.mezo.Journal.open(file).replay(model, stop=...) on the base model."
            )
        if start.newest is not None and not start.newest.weights:
            with self.args.main_process_first(local=False):
                if not file.exists():
                    files.write_bytes(file, (start.newest.path / FILE_NAME).read_bytes())
        if file.exists():
            self.mezo.resume(file, None if start.weights is None else start.weights.position(), start.steps)
        if not start.at_checkpoint:
            self.state.compute_steps(self.args, self.state.max_steps)  # of shares, as in logging_steps=0.1
            with warnings.catch_warnings(action="ignore"):  # that the optimizer made no step: the journal made them
                for _ in range(start.steps):
                    self.lr_scheduler.step()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            if is_sharded(list(model.parameters())):
                raise _sharded("a sharded model (DTensor)")
            named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
            groups: list[dict[str, Any]] = [{"params": named}]
            if self.args.weight_decay:
                decayed = set(self.get_decay_parameter_names(model))
                groups = [
                    {"params": [(name, param) for name, param in named if name in decayed]},
                    {"params": [(name, param) for name, param in named if name not in decayed], "weight_decay": 0.0},
                ]
                groups = [group for group in groups if group["params"]]  # factors all decay, biases none
            estimator, rule = estimator_of(vars(self.args)), self.args.rule()
            numbers = self.args.learning_rate, self.args.eps, self.args.weight_decay, self.args.seed
            self.optimizer = MeZO(groups, *numbers, estimator=estimator, rule=rule, model=model)
        return self.optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Keep a micro-batch; at the last one of a step, estimate the projected gradient on all of them.

        Returns:
            The loss of the step at its last micro-batch, 0 at those before: the Trainer adds them up.
        """
        # _prepare_inputs is not public, but there the Trainer, and what extends it, moves and casts a batch
        self._micro_batches.append(self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        # an epoch that a callback ended early may have left micro-batches of a step that was never made
        batches, self._micro_batches = self._micro_batches[-self.current_gradient_accumulation_steps :], []
        model.eval()
        if self.args.journal and self.mezo.journal is None:
            self.journal_file.parent.mkdir(parents=True, exist_ok=True)
            self.mezo.record(self.journal_file)
        compute = partial(self._loss, model, batches, num_items_in_batch)
        began = ""

        def closure() -> Tensor:
            nonlocal began
            loss = compute()
            if self.mezo.rule.on_nonfinite == "stop" and not loss.isfinite():
                began = where_it_began(model, compute)
            return loss

        try:
            loss = self.mezo.estimate(closure)
        except NotFiniteError as error:
            raise NotFiniteError(f"{error} {began}".rstrip()) from None
        if not math.isnan(loss):
            self._last_loss = loss
        return torch.tensor(self._last_loss, device=self.args.device)

    def _loss(self, model: nn.Module, batches: list[dict[str, Any]], num_items_in_batch: Tensor | int | None) -> Tensor:
        """The mean loss of `batches`; the sum, where a user's function has divided already."""
        total = torch.zeros((), device=self.args.device)
        for batch in batches:
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, dict(batch), num_items_in_batch=num_items_in_batch)
            if not isinstance(loss, Tensor):  # a number, as an error rate may be
                loss = torch.tensor(loss, dtype=torch.float64)
            loss = loss.mean()  # one loss per device under DataParallel
            if not self._warned and self.is_world_process_zero():
                self._warned = warn_of_rounding(loss, self.mezo.weights.epses()[0])
            total = total + loss
        return total / len(batches) if self.compute_loss_func is None else total

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As `Trainer.compute_loss`, but only a user's function is given `num_items_in_batch`, not a model.

        The Trainer assumes that a model that accepts this number divides its loss by it: it does not average such
        losses, and multiplies them by the number of processes. Many models ignore the number. Adam hides such a factor;
        MeZO would take larger steps.
        """
        divisor = None if self.compute_loss_func is None else num_items_in_batch
        return super().compute_loss(model, inputs, return_outputs, divisor)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the projected gradient beside the training loss, instead of a gradient norm, which is always 0."""
        if "loss" in logs and self.mezo.projected_grad is not None:
            logs.pop("grad_norm", None)
            logs["projected_grad"] = self.mezo.projected_grad
        super().log(logs, *args, **kwargs)


class _SettlingHandler(CallbackHandler):
    """Calls the callbacks of a `MeZOTrainer`."""

    def __init__(self, trainer: MeZOTrainer, *args: Any) -> None:
        super().__init__(*args)
        self._trainer = trainer

    def call_event(self, event: str, *args: Any, **kwargs: Any) -> Any:
        self._trainer.before_event(event)
        return super().call_event(event, *args, **kwargs)


def _sharded(what: str) -> FastpeftError:
    return FastpeftError(
        f"MeZOTrainer got {what}, but it keeps and saves the whole model in every process. Leave that out: MeZO needs "
        "no memory for gradients. Train a model that is too large for one device by fastpeft.MeZO in a loop, with "
        "torch's fully_shard."
    )


def _may_look(callback: TrainerCallback, event: str) -> bool:
    """Whether a callback handles an event and may look at the weights then."""
    handles = getattr(getattr(callback, event), "__func__", None) is not getattr(TrainerCallback, event)
    package, name = type(callback).__module__.partition(".")[0], type(callback).__name__
    return handles and package != "fastpeft" and f"{package}.{name}" not in _NOT_LOOKING
