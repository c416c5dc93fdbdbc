"""One training run on `transformers.Trainer`, shared by all methods."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import math
import os
import platform
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from fastpeft import files
from fastpeft.cards import classification_snippet, model_card
from fastpeft.curves import draw_curves
from fastpeft.data import Examples, TextData, load_data
from fastpeft.errors import FastpeftError
from fastpeft.memory import MEBIBYTE, peak_rss_mb, simulate_training_step
from fastpeft.methods import Method, Preparation, get_method, parse_targets
from fastpeft.models import Classifier, load_classifier
from fastpeft.runs import RunFolder, read_config

logger = logging.getLogger(__name__)

_EVAL_BATCH_SIZE = 64
_WARMUP_SHARE = 0.06
_LOGS = 100  # points of the loss curve
_EVALUATIONS = 5  # points of the accuracy curve
_CURVE_ROWS = 1_000  # dev rows behind a point of the accuracy curve

# fields of TrainingArguments that `settings` may not touch, with the option that decides them
_OWN_ARGUMENTS = {
    "output_dir": "output",
    "per_device_train_batch_size": "batch_size",
    "learning_rate": "learning_rate",
    "num_train_epochs": "epochs",
    "max_steps": "max_steps",
    "seed": "seed",
    "bf16": "bf16",
    "save_steps": "save_steps",
    "full_determinism": "deterministic",
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All that decides a run; `run.json` holds it.

    Attributes:
        output: folder of the run.
        method: a name of the registry `fastpeft.methods`.
        model: `"demo"`, a folder or a hub id.
        data: `"demo"`, a csv, tsv, jsonl or parquet file, or a folder with `train.*` and perhaps `dev.*`.
        targets: layers to adapt: names joined by commas, `all-linear` or a regular expression. None: the method's.
        rank: rank of the adapter. None: the method's.
        epochs: passes over the training rows.
        max_steps: optimizer steps, in place of `epochs`.
        batch_size: rows a step, on each device.
        learning_rate: peak rate of AdamW. None: the method's.
        max_length: longest text in tokens; what is longer is cut.
        seed: decides the new head, the order of rows and dropout.
        split_seed: decides which rows become the dev part where the data has none.
        save_steps: a checkpoint every so many steps. None: none.
        bf16: compute in bfloat16 by autocast; weights stay in float32.
        deterministic: only deterministic kernels.
        text_column, label_column: columns of the data. None: found by their names.
        settings: further fields of the method's configuration or of `transformers.TrainingArguments`.

    Raises:
        FastpeftError: a value is out of its range.
    """

    output: str
    method: str = "siva"
    model: str = "demo"
    data: str = "demo"
    targets: str | None = None
    rank: int | None = None
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 16
    learning_rate: float | None = None
    max_length: int = 128
    seed: int = 0
    split_seed: int = 0
    save_steps: int | None = None
    bf16: bool = False
    deterministic: bool = False
    text_column: str | None = None
    label_column: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("rank", 1), ("max_steps", 1), ("batch_size", 1), ("max_length", 2), ("save_steps", 1)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise FastpeftError(f"{name} is {value!r}; it must be a whole number from {least}.")
        for name in ("epochs", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and 0 < value < math.inf):
                raise FastpeftError(f"{name} is {value!r}; it must be a number above 0.")
        for name in ("seed", "split_seed"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 0 <= value < 2**32:
                raise FastpeftError(f"{name} is {value!r}; it must be a whole number from 0 to 2^32 - 1.")
        get_method(self.method)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> TrainConfig:
        """A configuration from names and values, as a `run.json` holds them."""
        known = [item.name for item in dataclasses.fields(cls)]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise FastpeftError(f"unknown setting {unknown[0]!r}; allowed are {', '.join(known)}. Remove or rename it.")
        return cls(**values)

    @classmethod
    def from_file(cls, file: str | Path) -> TrainConfig:
        """The configuration in a `run.json`."""
        return cls.from_values(read_config(Path(file)))

    def values(self) -> dict[str, Any]:
        """Names and values, as `run.json` holds them."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class TrainResult:
    """A finished run: its folder, and what `metrics.json` in it holds."""

    folder: Path
    metrics: dict[str, Any]


@dataclass(frozen=True)
class TrainPlan:
    """What a run would do.

    Attributes:
        trainable_parameters, parameters: numbers of values.
        peak_memory_mb: simulated peak of a step on the longest batch, in MB (2^20 bytes); None where it cannot be told.
        steps: optimizer steps.
        train_rows, dev_rows: rows of data.
        max_tokens: tokens of the longest training row.
    """

    trainable_parameters: int
    parameters: int
    peak_memory_mb: float | None
    steps: int
    train_rows: int
    dev_rows: int
    max_tokens: int


def plan(config: TrainConfig) -> TrainPlan:
    """What `train(config)` would do, without training and without writing anything."""
    task = _Task.load(config)
    longest = max(len(row["input_ids"]) for row in task.train_rows)
    trainable, total = count_parameters(task.model)
    return TrainPlan(
        trainable_parameters=trainable,
        parameters=total,
        peak_memory_mb=_simulated_peak_mb(task.model, config, longest),
        steps=_total_steps(task.arguments("."), len(task.train_rows)),
        train_rows=len(task.train_rows),
        dev_rows=len(task.dev_rows),
        max_tokens=longest,
    )


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    command: str | None = None,
) -> TrainResult:
    """Train as `config` says and leave in `config.output` what loads, evaluates and repeats the result.

    Args:
        config: all that decides the run.
        resume: continue from the newest checkpoint in the folder; with none, or no folder, start from the beginning; a
            finished run is returned as it is.
        overwrite: replace the run that the folder holds. A folder that holds anything else is left alone.
        callbacks: further Trainer callbacks, as a progress bar.
        command: how the run was started, for `metrics.json`.

    Raises:
        FastpeftError: something given cannot be used; then nothing was written. Or the loss or a gradient was not
            finite; then the weights before that step are kept in the folder.

    Example:
        >>> result = train(TrainConfig(output="runs/lora", method="lora"))  # doctest: +SKIP
        >>> result.metrics["accuracy"]  # doctest: +SKIP
    """
    folder = RunFolder(config.output)
    folder.check(config.values(), resume=resume, overwrite=overwrite)
    if resume and folder.finished:
        logger.info("the run in %s is finished; nothing to do", folder.path)
        return TrainResult(folder.path, folder.metrics())
    with _determinism(config.deterministic):
        task = _Task.load(config)
        arguments = task.arguments(str(folder.staging))
        folder.open(config.values(), overwrite=overwrite)
        trainer = _RunTrainer(task, arguments, folder, callbacks)
        before = trainer.evaluate(task.dev_rows)
        checkpoint = folder.newest_checkpoint() if resume else None
        if checkpoint is not None:
            logger.info("continuing from %s", checkpoint)
        set_seed(config.seed)
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except _NonFiniteError as error:
            raise FastpeftError(f"{error} {_keep_last_good(trainer, folder)}") from None
        after = trainer.evaluate(task.dev_rows)
        metrics = _metrics(trainer, task, before, after, command or f"fastpeft train --config {folder.config_file}")
        staged = folder.staging / "result"
        _save(trainer.model, task.tokenizer, staged)
        files.write_text(staged / "README.md", _card(task, metrics, folder))
        accuracy = [(0, before["eval_accuracy"]), *trainer.points("eval_accuracy")]  # the last one is `after`
        draw_curves(staged / "curves.png", f"{task.method.title} on {config.data}", trainer.points("loss"), accuracy)
        folder.close(metrics, staged)
    return TrainResult(folder.path, metrics)


@dataclass(frozen=True)
class _Task:
    """A configuration brought to life: data, model and method."""

    config: TrainConfig
    method: Method
    model: Any
    tokenizer: Any
    data: TextData
    train_rows: list[dict[str, Any]]
    dev_rows: list[dict[str, Any]]
    extra_arguments: dict[str, Any]

    @classmethod
    def load(cls, config: TrainConfig) -> _Task:
        method = get_method(config.method)
        method_settings, extra_arguments = _sort_settings(method, config.settings)
        if not method.adapts and (config.rank is not None or config.targets is not None):
            raise FastpeftError(f"the method {method.name!r} takes no targets and no rank; leave them out.")
        targets = parse_targets(config.targets)
        data = load_data(
            config.data,
            text_column=config.text_column,
            label_column=config.label_column,
            split_seed=config.split_seed,
        )
        set_seed(config.seed)  # the new head
        classifier = load_classifier(config.model, data.labels)
        if config.max_length > classifier.max_length:
            raise FastpeftError(
                f"max_length {config.max_length} is above what the model {config.model!r} reads, "
                f"{classifier.max_length} tokens. Choose that or less."
            )
        preparation = Preparation(classifier.head, config.rank, targets, method_settings)
        model = method.prepare(classifier.model, preparation)
        train_rows, dev_rows = (encode(classifier, part, config.max_length) for part in (data.train, data.dev))
        return cls(config, method, model, classifier.tokenizer, data, train_rows, dev_rows, extra_arguments)

    def arguments(self, output: str) -> TrainingArguments:
        """The Trainer's arguments."""
        config = self.config
        values: dict[str, Any] = {
            "output_dir": output,
            "per_device_train_batch_size": config.batch_size,
            "per_device_eval_batch_size": _EVAL_BATCH_SIZE,
            "learning_rate": self.method.learning_rate if config.learning_rate is None else config.learning_rate,
            "weight_decay": self.method.weight_decay,
            "num_train_epochs": config.epochs,
            "max_steps": -1 if config.max_steps is None else config.max_steps,
            "seed": config.seed,
            "bf16": config.bf16,
            "save_strategy": "no" if config.save_steps is None else "steps",
            "save_steps": config.save_steps or 1,
            "eval_strategy": "no",  # `_Evaluations` decides when
            "logging_nan_inf_filter": False,
            "dataloader_pin_memory": torch.cuda.is_available(),
            "disable_tqdm": True,
            "report_to": "none",
            **self.extra_arguments,
        }
        try:
            arguments = TrainingArguments(**values)
            steps = _total_steps(arguments, len(self.train_rows))
            values.setdefault("warmup_steps", round(_WARMUP_SHARE * steps))
            values.setdefault("logging_steps", max(1, steps // _LOGS))
            return TrainingArguments(**values)
        except (ValueError, TypeError, ImportError) as error:
            raise FastpeftError(
                f"TrainingArguments refuses these values ({error}). Correct "
                f"{', '.join(self.extra_arguments) or 'them'}."
            ) from error


def encode(classifier: Classifier, examples: Examples, max_length: int) -> list[dict[str, Any]]:
    """Examples as rows of token ids and a label, cut at `max_length` tokens and not padded."""
    encoded = classifier.tokenizer(examples.texts, truncation=True, max_length=max_length)
    return [
        {**{name: column[i] for name, column in encoded.items()}, "labels": label}
        for i, label in enumerate(examples.labels)
    ]


def _sort_settings(method: Method, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide settings between the method's configuration and TrainingArguments."""
    of_method = method.settings()
    of_training = [item.name for item in dataclasses.fields(TrainingArguments) if item.init]
    for name in settings:
        if name in of_method:
            continue
        if name in _OWN_ARGUMENTS:
            raise FastpeftError(f"{name} cannot be set here; use {_OWN_ARGUMENTS[name]} in its place.")
        if name not in of_training:
            close = difflib.get_close_matches(name, [*of_method, *of_training], 3)
            hint = f" Did you mean {' or '.join(close)}?" if close else ""
            raise FastpeftError(
                f"unknown setting {name!r}; allowed for the method {method.name!r} are "
                f"{', '.join(of_method) or 'none'}, and the fields of transformers.TrainingArguments.{hint}"
            )
    return (
        {name: value for name, value in settings.items() if name in of_method},
        {name: value for name, value in settings.items() if name not in of_method},
    )


def _total_steps(arguments: TrainingArguments, rows: int) -> int:
    """Optimizer steps of a run, as the Trainer counts them."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    batches = math.ceil(rows / arguments.train_batch_size)
    per_epoch = max(1, math.ceil(batches / arguments.gradient_accumulation_steps))
    return math.ceil(arguments.num_train_epochs * per_epoch)


class LengthGroupedOrder(Sampler[int]):
    """A random order of rows in which each batch holds rows of about one length, so that little is padded.

    The order is a function of (seed, epoch) alone: a resumed run meets the rows that it would have met.
    """

    _BATCHES_SORTED_TOGETHER = 50

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = random.Random(f"{self.seed}:{self.epoch}")
        order = list(range(len(self.lengths)))
        generator.shuffle(order)
        group = self.batch_size * self._BATCHES_SORTED_TOGETHER
        rest = len(order) % self.batch_size  # an incomplete batch can only come last
        full, last = order[: len(order) - rest], order[len(order) - rest :]
        batches = []
        for start in range(0, len(full), group):
            grouped = sorted(full[start : start + group], key=self.lengths.__getitem__)
            batches += [grouped[i : i + self.batch_size] for i in range(0, len(grouped), self.batch_size)]
        generator.shuffle(batches)
        for batch in (*batches, last):
            yield from batch


class _NonFiniteError(Exception):
    """The loss or a gradient of a step is not finite; the weights are those before the step."""


class _RunTrainer(Trainer):
    """A Trainer that groups rows by length, keeps whole checkpoints only, and stops before a step that would spoil the
    weights."""

    def __init__(
        self, task: _Task, arguments: TrainingArguments, folder: RunFolder, callbacks: Iterable[TrainerCallback]
    ) -> None:
        self.order = LengthGroupedOrder(
            [len(row["input_ids"]) for row in task.train_rows], arguments.train_batch_size, task.config.seed
        )
        self.samples_seen = 0
        self.longest_seen = 0
        self.clock = _Clock()
        slice_rows = random.Random(0).sample(task.dev_rows, min(len(task.dev_rows), _CURVE_ROWS))
        multiple = 8 if arguments.device.type == "cuda" else None  # the tile of matrix units
        super().__init__(
            model=task.model,
            args=arguments,
            train_dataset=task.train_rows,
            eval_dataset=_by_length(slice_rows),
            processing_class=task.tokenizer,
            data_collator=DataCollatorWithPadding(task.tokenizer, pad_to_multiple_of=multiple),
            compute_metrics=classification_metrics,
            callbacks=[
                _EpochOfOrder(self.order),
                _Evaluations(len(slice_rows)),
                _AtomicCheckpoints(folder),
                self.clock,
                *callbacks,
            ],
        )
        self.remove_callback(PrinterCallback)

    def get_train_dataloader(self) -> DataLoader[Any]:
        return self.accelerator.prepare(
            DataLoader(
                self.train_dataset,
                batch_size=self.args.train_batch_size,
                sampler=self.order,
                collate_fn=self.data_collator,
                num_workers=self.args.dataloader_num_workers,
                pin_memory=self.args.dataloader_pin_memory,
            )
        )

    def evaluate(self, eval_dataset: list[dict[str, Any]] | None = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        rows = None if eval_dataset is None else _by_length(eval_dataset)
        return super().evaluate(rows, *args, **kwargs)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        rows, tokens = inputs["input_ids"].shape
        self.samples_seen += rows
        self.longest_seen = max(self.longest_seen, tokens)
        loss = super().training_step(model, inputs, *args, **kwargs)
        # fp16 scales its losses and expects gradients that overflow
        gradients = [] if self.args.fp16 else [p.grad for p in model.parameters() if p.grad is not None]
        finite = torch.stack([loss.isfinite(), torch.nn.utils.get_total_norm(gradients).isfinite()])
        if not finite.all():
            what = f"the loss is {loss.item()}" if not finite[0] else "a gradient is not finite"
            raise _NonFiniteError(
                f"{what} at step {self.state.global_step + 1}, so training stopped. Lower the learning rate (it was "
                f"{self.args.learning_rate:g} at its peak) or check the data."
            )
        return loss

    def points(self, name: str) -> list[tuple[int, float]]:
        """The logged values of `name`, with their steps."""
        return [(entry["step"], entry[name]) for entry in self.state.log_history if name in entry]


def _by_length(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows in an order that pads little."""
    return sorted(rows, key=lambda row: len(row["input_ids"]))


class _EpochOfOrder(TrainerCallback):
    """Tells the order of rows which epoch begins."""

    def __init__(self, order: LengthGroupedOrder) -> None:
        self.order = order

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.order.epoch = int(state.epoch or 0)


class _Evaluations(TrainerCallback):
    """Asks for the inner points of the accuracy curve.

    At least as many rows are trained on as an evaluation reads, so that evaluating stays the smaller part of the work.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rows_a_step = args.train_batch_size * args.gradient_accumulation_steps
        every = max(math.ceil(state.max_steps / _EVALUATIONS), math.ceil(self.rows / rows_a_step))
        if state.global_step % every == 0 and state.global_step < state.max_steps:
            control.should_evaluate = True


class _AtomicCheckpoints(TrainerCallback):
    """Moves each checkpoint, once the Trainer has written it, from the staging place to its final name."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.folder.keep_checkpoint(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class _Clock(TrainerCallback):
    """Seconds spent in training steps, without evaluating and saving."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._begin = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self._begin


@contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    """Run the block with deterministic kernels only, if `wanted`."""
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy, and F1 of the second of two classes or the mean over more."""
    from sklearn.metrics import accuracy_score, f1_score

    guesses, labels = np.argmax(prediction.predictions, axis=-1), prediction.label_ids
    classes = prediction.predictions.shape[-1]
    f1 = f1_score(labels, guesses, zero_division=0.0, **({} if classes == 2 else {"average": "macro"}))
    return {"accuracy": float(accuracy_score(labels, guesses)), "f1": float(f1)}


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Numbers of trained and of all values."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in counts if trained), sum(n for n, _ in counts)


def _simulated_peak_mb(model: Any, config: TrainConfig, tokens: int) -> float | None:
    """Simulated peak of one step on a batch of `tokens` tokens a row, in MB."""
    device = next(model.parameters()).device
    shape = (config.batch_size, tokens)
    batch = {
        "input_ids": torch.zeros(shape, dtype=torch.long, device=device),
        "attention_mask": torch.ones(shape, dtype=torch.long, device=device),
        "labels": torch.zeros(config.batch_size, dtype=torch.long, device=device),
    }
    try:
        estimate = simulate_training_step(model, batch, autocast_dtype=torch.bfloat16 if config.bf16 else None)
    except Exception as error:  # a model whose forward reads data cannot be simulated; that must not end a run
        logger.warning("peak memory cannot be simulated for this model: %s", error)
        return None
    return round(estimate.peak / MEBIBYTE, 1)


def _metrics(
    trainer: _RunTrainer, task: _Task, before: Mapping[str, float], after: Mapping[str, float], command: str
) -> dict[str, Any]:
    """What `metrics.json` holds."""
    config, device = task.config, trainer.args.device
    trainable, total = count_parameters(trainer.model)
    on_cuda = device.type == "cuda"
    if on_cuda:
        peak: float | None = round(torch.cuda.max_memory_allocated(device) / MEBIBYTE, 1)
    else:
        peak = _simulated_peak_mb(trainer.model, config, trainer.longest_seen)
    seconds = trainer.clock.seconds
    return {
        "method": config.method,
        "model": config.model,
        "data": config.data,
        "labels": task.data.labels,
        "accuracy": after["eval_accuracy"],
        "f1": after["eval_f1"],
        "accuracy_before": before["eval_accuracy"],
        "loss": after["eval_loss"],
        "samples_per_second": round(trainer.samples_seen / seconds, 2) if seconds else None,
        "train_seconds": round(seconds, 2),
        "steps": trainer.state.global_step,
        "train_rows": len(task.train_rows),
        "dev_rows": len(task.dev_rows),
        "trainable_parameters": trainable,
        "parameters": total,
        "peak_memory_mb": peak,
        "peak_memory_source": "CUDA allocator" if on_cuda else "simulated",
        "peak_rss_mb": round(peak_rss_mb(), 1),
        "learning_rate": trainer.args.learning_rate,
        "seed": config.seed,
        "device": torch.cuda.get_device_name(device) if on_cuda else device.type,
        "versions": versions(),
        "command": command,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    packages = ("fastpeft", "torch", "triton", "transformers", "peft", "accelerate", "safetensors")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write adapter or model, and the tokenizer, as `from_pretrained` reads them."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _keep_last_good(trainer: _RunTrainer, folder: RunFolder) -> str:
    """Save the weights before a step that failed, and say where."""
    checkpoint = folder.newest_checkpoint()
    resumable = f" The newest checkpoint is {checkpoint}." if checkpoint else ""
    if not all(p.isfinite().all() for p in trainer.model.parameters()):
        return f"The weights before that step were no longer finite.{resumable or ' No checkpoint was saved.'}"
    staged, target = folder.staging / "last-good", folder.path / "last-good"
    _save(trainer.model, trainer.processing_class, staged)
    files.discard(target)
    files.publish(staged, target)
    return f"The weights before that step are in {target}.{resumable}"


def _card(task: _Task, metrics: Mapping[str, Any], folder: RunFolder) -> str:
    """The model card of the run."""
    config = task.config
    adapter = task.method.adapts
    shown = ("epochs", "max_steps", "batch_size", "max_length", "targets", "rank", "seed", "bf16")
    settings = {name: value for name, value in config.values().items() if name in shown and value is not None}
    return model_card(
        base_model=config.model,
        method=task.method.title,
        snippet=classification_snippet(str(folder.path), task.data.labels, adapter),
        adapter=adapter,
        data=task.data.description,
        labels=task.data.labels,
        metrics={
            "accuracy": f"{metrics['accuracy']:.3f} (before training {metrics['accuracy_before']:.3f})",
            "F1": f"{metrics['f1']:.3f}",
            "trained parameters": f"{metrics['trainable_parameters']:,} of {metrics['parameters']:,}",
        },
        settings={"learning_rate": metrics["learning_rate"], **settings, **config.settings},
    )
