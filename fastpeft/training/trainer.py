"""The Trainer of a run: rows grouped by length, whole checkpoints, a stop before a step that spoils the weights."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks

from fastpeft.data.batches import by_length, most_rows, order_by_length
from fastpeft.data.masking import MaskedRows
from fastpeft.data.names import LOSS, UNLABELLED
from fastpeft.data.packed_rows import texts_of
from fastpeft.data.problems import MASKED_WORDS, NEXT_WORDS
from fastpeft.data.token_rows import TokenRow, TokenRows
from fastpeft.errors import FastpeftError, NotFiniteError
from fastpeft.mezo.sharding import digest
from fastpeft.mezo.trainer import MeZOTrainer
from fastpeft.support.interrupts import StopRequest
from fastpeft.support.nonfinite import where_it_began
from fastpeft.support.processes import Ranks, noticing_lost_processes
from fastpeft.training.arguments import evaluated_tokens, loader_options
from fastpeft.training.callbacks import (
    Clock,
    CudaPeak,
    CurvePoints,
    EpochOfOrder,
    KeptChoices,
    MeasuredCheckpoints,
    Patience,
    Reports,
    Stopping,
    WholeCheckpoints,
    logged,
)
from fastpeft.training.encoding import collator
from fastpeft.training.losses import training_loss
from fastpeft.training.optimizer_in_backward import StepsInBackward
from fastpeft.training.row_order import LengthGroupedOrder
from fastpeft.training.run_folder import LOGS, RunFolder
from fastpeft.training.task import Task

logger = logging.getLogger(__name__)

CURVE_ROWS = 1_000  # dev rows behind an inner point


class RunTrainer(Trainer):
    """The Trainer of one run. A step whose loss or gradient is not finite is not made but raises `NotFiniteError`.

    Of several processes each has its part of every batch; the first writes.

    Attributes:
        task, folder: what it works on, and where it all ends up.
        ranks: the processes that train together.
        samples_seen: rows trained on since the start of this process, by all of them.
        longest_seen: tokens of the longest batch among them.
        custom_loss: what training lowers in place of the model's own loss, None where it lowers that.
        clock, cuda_peak: seconds spent in steps, and most memory allocated in one on a CUDA device.
        stop, stopping: once the first is asked, the other ends the run after its step, with a checkpoint.
    """

    def __init__(
        self, task: Task, arguments: TrainingArguments, folder: RunFolder, callbacks: Iterable[TrainerCallback]
    ) -> None:
        lengths = [len(row["input_ids"]) for row in task.train_rows]
        masked = task.data.problem is MASKED_WORDS
        self.order = LengthGroupedOrder(lengths, arguments.train_batch_size, task.config.seed, with_epoch=masked)
        self.samples_seen = 0
        self.longest_seen = 0
        self.clock = Clock()
        self.cuda_peak = CudaPeak()
        self._of_step: list[dict[str, Any]] = []  # the micro-batches of the present step
        self.stop = StopRequest()
        self.folder = folder
        self.ranks = Ranks()
        self.stopping = Stopping(self.stop, self.ranks)
        self.task = task
        self.problem, self.labels = task.data.problem, task.data.labels
        self.custom_loss = training_loss(task.data) if task.config.class_weights else None
        curve_rows: Sequence[TokenRow] = task.dev_rows
        measuring: list[TrainerCallback] = [MeasuredCheckpoints()]
        if task.config.metric is None:
            curve_rows = random.Random(0).sample(curve_rows, min(len(curve_rows), CURVE_ROWS))
            measuring = [CurvePoints(len(curve_rows))]
        elif task.config.patience is not None:
            measuring.append(Patience(task.config.metric, task.config.patience))
        self.reports = Reports(self.clock, self.problem.primary, task.method.zeroth_order)
        multiple = 8 if arguments.device.type == "cuda" else None  # the tile of matrix units
        super().__init__(
            model=task.model,
            args=arguments,
            train_dataset=MaskedRows(task.train_rows, task.tokenizer, task.config.seed) if masked else task.train_rows,
            eval_dataset=_by_length(curve_rows),
            processing_class=task.tokenizer,
            data_collator=collator(task.tokenizer, self.problem, multiple),
            compute_metrics=self._score,
            preprocess_logits_for_metrics=_logits_alone,
            callbacks=[
                EpochOfOrder(self.order, task.setup.steps_per_epoch(len(lengths))),
                *measuring,
                KeptChoices(folder),
                WholeCheckpoints(folder, task.config.metric, self.ranks),
                self.stopping,
                self.clock,
                self.cuda_peak,
                self.reports,
                *callbacks,
            ],
        )
        self.remove_callback(PrinterCallback)
        self._weigh_tokens(task.method.zeroth_order)

    def _weigh_tokens(self, zeroth_order: bool) -> None:
        """Let all tokens of a step have the same weight where the model does that, and warn where it does not."""
        # the Trainer takes the losses of models that accept it for divided by the items of all processes and
        # micro-batches, and leaves out that division; many models ignore it, as RoBERTa's, but decoders do not
        divides = self.problem is NEXT_WORDS and not zeroth_order
        self.model_accepts_loss_kwargs = divides and vars(self)["model_accepts_loss_kwargs"]
        parts = self.args.gradient_accumulation_steps * self.ranks.size
        if self.problem.of_texts_alone and parts > 1 and not self.model_accepts_loss_kwargs:
            alone = self.ranks.size == 1  # processes share a batch of any size
            logger.warning(
                "each of the %d micro-batches of a step has the same weight, however many tokens count in its loss; "
                "%s, every token has the same weight",
                parts,
                "with a larger batch_size instead" if alone else "in one process without gradient accumulation",
            )

    def warnings_of_head(self) -> list[str]:
        """Warnings about a head that the method trains badly."""
        return []

    def begin_reports(self, to: str) -> None:
        """Log to a service or library from here on; its set-up may refuse."""
        for kind in get_reporting_integration_callbacks(to):
            callback = kind()
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(self.folder.path / LOGS)
            if hasattr(callback, "setup"):
                callback.setup(self.args, self.state, self.model)
            self.add_callback(callback)

    def get_train_dataloader(self) -> DataLoader[Any]:
        return self.accelerator.prepare(
            DataLoader(
                self.train_dataset,
                batch_size=self.args.train_batch_size,
                sampler=self.order,
                collate_fn=self.data_collator,
                **loader_options(self.args),
            )
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        # the Trainer's own goes on with the first rows that were ever measured, where workers persist, and a signal to
        # all ends its workers
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        return self.accelerator.prepare(
            DataLoader(
                rows,
                **self._eval_batches(rows),
                collate_fn=self.data_collator,
                **{**loader_options(self.args), "persistent_workers": False},
            )
        )

    def _eval_batches(self, rows: Sequence[TokenRow]) -> dict[str, Any]:
        """What a DataLoader of `rows`, which are in the order of their lengths, is told of its batches."""
        size, tokens, ranks = self.args.eval_batch_size, evaluated_tokens(self.task), self.ranks.size
        if ranks == 1:
            return {"batch_sampler": list(by_length(rows, size, tokens))}
        longest = max(len(row["input_ids"]) for row in rows)  # accelerate divides batches of one size only
        return {"batch_size": ranks * most_rows(longest, size // ranks, tokens)}

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        # its loader draws from the stream that dropout draws from: how often a run is measured would change its weights
        with torch.random.fork_rng(devices=[]):
            return super().evaluate(*args, **kwargs)

    def measure(self, rows: Sequence[TokenRow]) -> dict[str, float]:
        """Loss and metrics on `rows`, by their names in `metrics.json`."""
        measured = self.evaluate(_by_length(rows))
        # accelerate marks what was evaluated first as prepared, and would not wrap it for training: each of several
        # processes would then follow gradients of its own
        self.model.__dict__.pop("_is_accelerate_prepared", None)
        return {name: measured[f"eval_{name}"] for name in (*self.problem.metrics, LOSS)}

    def classes(self, rows: Sequence[TokenRow]) -> list[int]:
        """The likeliest class of each of `rows`, which were measured last."""
        return _as_given(rows, self.problem.answers(self._outputs))

    def parts(self, rows: Sequence[TokenRow]) -> list[list[int]]:
        """The `parts` of the problem's tested metric of each of `rows`, which were measured last."""
        assert self.problem.parts is not None  # which is so where the problem has a tested metric
        return _as_given(rows, self.problem.parts(self._outputs, self._labels, self.labels))

    def answers(self) -> tuple[np.ndarray, np.ndarray]:
        """Outputs and labels, as the problem scores them, of the rows that were measured last."""
        return self._outputs, self._labels

    def lowered(self, measured: float) -> float:
        """The loss that training lowers, of the rows that were measured last.

        `measured` is their loss in reports: the model's own, without label smoothing, weights of classes or focus.
        """
        if smoothing := self.args.label_smoothing_factor:
            if not self.problem.has_classes:
                return math.inf  # unknown
            outputs, labels = torch.from_numpy(self._outputs), torch.from_numpy(self._labels)
            return float(cross_entropy(outputs.flatten(0, -2), labels.flatten(), label_smoothing=smoothing))
        if self.custom_loss is None:
            return measured
        return float(self.custom_loss(torch.from_numpy(self._outputs), torch.from_numpy(self._labels)))

    @property
    def _lower_rate(self) -> str:
        rate = self.task.head_learning_rate
        of_head = "" if rate is None else f", {rate:g} for the new head"
        return f"Lower the learning rate (its peak is {self.args.learning_rate:g}{of_head})"

    def _score(self, prediction: EvalPrediction) -> dict[str, float]:
        self._outputs, self._labels = outputs, labels = prediction.predictions, prediction.label_ids
        if not np.isfinite(outputs[labels != UNLABELLED] if self.problem.per_token else outputs).all():
            raise FastpeftError(
                f"the model's outputs are not finite after step {self.state.global_step}, so the run ended. "
                f"{self._lower_rate} or look for a fault in the data. "
                f"{self.folder.newest_in_words()}"
            )
        scores = self.problem.score(outputs, labels, self.labels)
        if self.problem.loss is not None:
            # the Trainer's is a mean over batches, which depends on what was batched together
            scores[LOSS] = self.problem.loss(outputs, labels)
        return scores

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self.samples_seen += texts_of(inputs) * self.ranks.size
        self.longest_seen = max(self.longest_seen, inputs["input_ids"].shape[1])
        return self._step(model, inputs, *args, **kwargs)

    def _step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """The loss of a micro-batch, where it is finite, as the gradients must be after the last one of a step."""
        step, ends = super().training_step, self.accelerator.sync_gradients
        self._of_step.append(inputs)

        def again() -> None:
            own = self.accelerator.unwrap_model(model)  # which exchanges nothing with other processes
            for each in self._of_step:
                if self.task.config.optimizer_in_backward:
                    with torch.no_grad():  # a backward pass would step
                        self.compute_loss(own, self._prepare_inputs(each))
                else:
                    step(own, each, *args, **kwargs)

        try:
            loss = step(model, inputs, *args, **kwargs)
            # fp16 scales its losses, and its gradients may overflow on the way to the right scale
            looked_at = () if self.args.fp16 or not ends else model.parameters()
            self._check_finite([p.grad for p in looked_at if p.grad is not None], loss)
        except NotFiniteError as error:
            raise NotFiniteError(f"{error} {where_it_began(self.accelerator.unwrap_model(model), again)}") from None
        if ends:
            self._of_step.clear()
        return loss

    def _check_finite(self, gradients: list[torch.Tensor], loss: torch.Tensor | None = None) -> None:
        """Stop the run where a loss or a gradient is not finite, in all processes where it is so in one."""
        norm = torch.nn.utils.get_total_norm(gradients)
        loss = torch.zeros_like(norm) if loss is None else loss
        bad = not (loss.isfinite() & norm.to(loss.device).isfinite())
        if self.ranks.any(bad, self.args.device):
            what = "a gradient is not finite" if loss.isfinite() else f"the loss is {loss.item()}"
            what = what if bad else "in another process the loss or a gradient is not finite"
            raise NotFiniteError(
                f"{what} at step {self.state.global_step + 1}, so training stopped. {self._lower_rate} "
                "or look for a fault in the data."
            )

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        # where the Trainer measures, it asks for outputs: what is reported is the model's own loss
        if self.custom_loss is None or return_outputs:
            with self._without_label_smoothing() if return_outputs else nullcontext():
                found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if return_outputs and self.problem.digest is not None:
                loss, outputs = found  # the Trainer would detach the logits, and so make those that are not made
                found = loss, {"logits": self.problem.digest(outputs["logits"], inputs["labels"])}
        else:
            labels = inputs.pop("labels")
            found = self.custom_loss(model(**inputs).logits, labels)
        if (
            self.task.config.optimizer_in_backward and torch.is_grad_enabled()
        ):  # what training_step looks at comes too late for it
            self._check_finite([], found[0] if isinstance(found, tuple) else found)
        return found

    @contextmanager
    def _without_label_smoothing(self) -> Iterator[None]:
        smoother: Any = self.__dict__["label_smoother"]
        self.label_smoother = None
        try:
            yield
        finally:
            self.label_smoother = smoother

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        rate = self.task.head_learning_rate
        if is_new and rate is not None:
            named = [(f".{name}", p) for name, p in self.model.named_parameters() if p.requires_grad]
            head = {id(p) for name, p in named if any(f".{module}." in name for module in self.task.new_head)}
            optimizer.param_groups[:] = _with_rate(optimizer.param_groups, head, rate)
            if not head <= {id(p) for group in optimizer.param_groups for p in group["params"]}:  # one for each layer
                logger.warning("%s has one learning rate for all, also for the new head", self.args.optim.value)
        if is_new and self.task.config.optimizer_in_backward:
            StepsInBackward(optimizer, self._check_finite)
        return optimizer

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        # not public, but all that the Trainer writes into a checkpoint is written here
        self.check_same()
        with self.folder.saving("a checkpoint"), noticing_lost_processes():
            super()._save_checkpoint(*args, **kwargs)

    def check_same(self) -> None:
        """Raise a `FastpeftError` if processes that train together have come to other weights."""
        if self.ranks.size > 1:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            self.ranks.check_same({"the trained weights": digest(trained)})

    def points(self, name: str) -> list[tuple[int, float]]:
        """The logged values of `name`, with their steps."""
        return logged(self.state, name)


class MeZORunTrainer(RunTrainer, MeZOTrainer):
    """The Trainer of one run by MeZO, which has no gradients to look at and refuses losses that are not finite.

    Its journal and its checkpoints are those of the run's folder.
    """

    def warnings_of_head(self) -> list[str]:
        return [] if self.task.config.init_from is not None else MeZOTrainer.warnings_of_head(self)

    def _step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        return MeZOTrainer.training_step(self, model, inputs, *args, **kwargs)

    @property
    def journal_file(self) -> Path:
        return self.folder.journal

    def checkpoints(self) -> list[Path]:
        return self.folder.all_checkpoints()


def trainer_class(task: Task) -> type[RunTrainer]:
    """The Trainer of a run on `task`."""
    return MeZORunTrainer if task.method.zeroth_order else RunTrainer


def _with_rate(
    groups: Sequence[Mapping[str, Any]], parameters: set[int], learning_rate: float
) -> Iterator[dict[str, Any]]:
    """An optimizer's groups, where some parameters, given by their `id`, have groups with a rate of their own."""
    for group in groups:
        for chosen, rate in (False, group["lr"]), (True, learning_rate):
            if part := [parameter for parameter in group["params"] if (id(parameter) in parameters) == chosen]:
                yield {**group, "params": part, "lr": rate}


def _logits_alone(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
    """The logits; an encoder-decoder model as T5 gives its encoder's hidden states beside them."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def _by_length(rows: Sequence[TokenRow]) -> TokenRows:
    """Rows in an order that pads little."""
    return TokenRows(rows[place] for place in order_by_length(rows))


def _as_given(rows: Sequence[TokenRow], values: np.ndarray) -> list[Any]:
    """Values `(N, ...)` of rows in the order of `_by_length`, in that of the rows."""
    found: list[Any] = values[np.argsort(order_by_length(rows))].tolist()
    return found
