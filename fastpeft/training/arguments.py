"""The Trainer's arguments for a task: of the recipe, the run's configuration and its settings; and what they mean."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import TrainingArguments, get_scheduler
from transformers.utils import is_liger_kernel_available

from fastpeft.data.batches import eval_limits
from fastpeft.data.problems import MULTI_LABEL, REGRESSION
from fastpeft.errors import FastpeftError, NotEnoughMemoryError, first_line, is_out_of_memory
from fastpeft.ladder.model import LadderModel
from fastpeft.prompts.model import inside_prompt
from fastpeft.support import processes
from fastpeft.support.interrupts import init_worker
from fastpeft.training.config import TrainConfig
from fastpeft.training.setup import arguments_of, checkpointing_options
from fastpeft.training.task import Task

_LOGS = 50  # points of the loss curve

# names of optimizers that treat each parameter by itself
ADAMW = ("adamw_torch", "adamw_torch_fused")
ADAMW_8BIT = ("adamw_8bit", "adamw_bnb_8bit")
_OF_SOME_LAYERS = ("galore", "apollo")  # how the names begin of those that are told layers
_STEP_IN_BACKWARD = (*ADAMW, *ADAMW_8BIT)


def training_arguments(task: Task, output: str) -> TrainingArguments:
    """The Trainer's arguments of a task, with checkpoints below `output`.

    The batches are those of a step whatever the number of processes that a launcher started, which share each.
    """
    config, recipe = task.config, task.setup.recipe
    values = _values(task, output)
    with refusing(task):
        arguments_class = arguments_of(task.method)
        if values["use_cpu"]:  # then the Trainer would take no notice of its timeout
            processes.meet(values.get("ddp_timeout", TrainingArguments.ddp_timeout))
        arguments = arguments_class(**values)
        # on several GPUs the Trainer would give each a whole batch, by `nn.DataParallel`. It sets this itself too, for
        # a model that lies on several
        arguments._n_gpu = min(arguments.n_gpu, 1)
        _check(arguments, task)
        steps = total_steps(arguments, task)
        if values.keys().isdisjoint(("warmup_steps", "warmup_ratio")):
            arguments.warmup_steps = round(recipe.warmup * steps)
        if "logging_steps" not in values:
            arguments.logging_steps = max(1, steps // _LOGS)
        if arguments.world_size > 1:
            _divide(arguments, config)
        return arguments


def _values(task: Task, output: str) -> dict[str, Any]:
    """What the arguments are given: fixed by how runs are made, by the configuration, the recipe, or a setting."""
    config, recipe, given = task.config, task.setup.recipe, task.setup.arguments
    # where nobody asked for checkpoints, that of a run that is stopped holds no weights: the journal leads to them
    of_mezo = {"journal": True, "save_weights": config.save_steps is not None}
    return {
        "output_dir": output,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": eval_limits(task.data.problem, config.batch_size)[0],
        "learning_rate": recipe.learning_rate if config.learning_rate is None else config.learning_rate,
        "weight_decay": recipe.weight_decay,
        "lr_scheduler_type": recipe.schedule,
        "num_train_epochs": task.setup.epochs(len(task.train_rows)),
        "max_steps": -1 if config.max_steps is None else config.max_steps,
        "seed": config.seed,
        "bf16": config.bf16,
        "save_strategy": "no" if config.save_steps is None else "steps",
        "save_steps": config.save_steps or 1,
        "eval_strategy": "no",  # the run's Trainer decides when
        "logging_nan_inf_filter": False,  # the run's Trainer stops at such a loss
        "use_cpu": not torch.accelerator.is_available(),  # the Trainer refuses bf16 on a CPU it found by itself
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": True,
        "report_to": "none",  # the run's Trainer begins when its folder is there
        "run_name": Path(config.output).name,
        **(of_mezo if task.method.zeroth_order else {}),
        **({"max_grad_norm": 0.0} if config.optimizer_in_backward else {}),
        **given,
    }


def _check(arguments: TrainingArguments, task: Task) -> None:
    """Raise almost any exception where arguments cannot do what they say, before anything is written."""
    title, problem, optim = task.method.title, task.data.problem, arguments.optim
    is_beside = isinstance(inside_prompt(task.model), LadderModel)
    smooths = arguments.label_smoothing_factor
    # of a side network its own blocks are computed again, whatever the frozen model can do
    checkpoints = is_beside or _supports_checkpointing(task.model)
    conflicts = {
        "gradient_accumulation_steps must be at least 1.": arguments.gradient_accumulation_steps < 1,
        f"{title} does not support gradient_checkpointing on this model.": (
            arguments.gradient_checkpointing and not checkpoints
        ),
        "use_liger_kernel needs the package liger-kernel, which is not installed.": (
            arguments.use_liger_kernel and not is_liger_kernel_available()
        ),
        "fp16 is for GPUs, and on a CPU everything would be computed in float32; use `bf16` there.": (
            arguments.fp16 and arguments.device.type == "cpu"
        ),
        f"optim_args has no effect on {optim.value}: set adam_beta1, adam_beta2 and adam_epsilon instead.": (
            arguments.optim_args and optim in _STEP_IN_BACKWARD
        ),
        f"optim_target_modules has no effect on {optim.value}, which optimises all trainable parameters.": (
            arguments.optim_target_modules and not optim.startswith(_OF_SOME_LAYERS)
        ),
        "with `metric`, dev rows are measured at each checkpoint: use `save_steps`.": (
            arguments.eval_steps and task.config.metric is not None
        ),
        **{
            f"{name} must be at least 0.": (getattr(arguments, name) or 0) < 0
            for name in ("neftune_noise_alpha", "label_smoothing_factor", "weight_decay", "eval_steps")
        },
        f"neftune_noise_alpha is for embeddings in training mode, in which {title} has none.": (
            arguments.neftune_noise_alpha and is_beside
        ),
        f"label_smoothing_factor is for classes, but the data has {problem.labels}.": (
            smooths and problem in (REGRESSION, MULTI_LABEL)
        ),
        "label_smoothing_factor does not go with class_weights.": smooths and task.config.class_weights,
        **(_conflicts_in_backward(arguments) if task.config.optimizer_in_backward else {}),
    }
    if found := next(filter(conflicts.get, conflicts), None):
        raise ValueError(found)
    stand_in = torch.optim.SGD([torch.zeros(1)], arguments.learning_rate)
    get_scheduler(arguments.lr_scheduler_type, stand_in, 0, 1, arguments.lr_scheduler_kwargs)
    if arguments.gradient_checkpointing:
        _, options = checkpointing_options(arguments)
        checkpoint(torch.sin, torch.zeros(1, requires_grad=True), **{"use_reentrant": False, **options})
    DataLoader(task.dev_rows, arguments.eval_batch_size, **loader_options(arguments))  # type: ignore[arg-type]


def _conflicts_in_backward(arguments: TrainingArguments) -> dict[str, bool]:
    """What does not go with an optimizer that steps in backward, and whether it is given."""
    needed = {"max_grad_norm": 0, "gradient_accumulation_steps": 1, "fp16": False}
    goes_with = f"optimizer_in_backward goes with optim={' or '.join(_STEP_IN_BACKWARD)}"
    return {
        f"{goes_with}, not {arguments.optim.value}.": arguments.optim not in _STEP_IN_BACKWARD,
        **{
            f"{name}={getattr(arguments, name)} needs all gradients at once, which optimizer_in_backward never has; "
            f"it must be {off}.": getattr(arguments, name) != off
            for name, off in needed.items()
        },
    }


def _divide(arguments: TrainingArguments, config: TrainConfig) -> None:
    """Let several processes share each batch in equal parts."""
    size = arguments.world_size
    if arguments.train_batch_size % size:
        raise FastpeftError(
            f"`batch_size` is {config.batch_size}, which {size} processes cannot share in equal parts. "
            f"Give a multiple of {size}, or start another number of them."
        )
    if config.optimizer_in_backward:
        raise FastpeftError(
            f"`optimizer_in_backward` with {size} processes: a gradient is used before that of the others is "
            "added. Leave it out, or start one process."
        )
    arguments.accelerator_config.split_batches = True
    if arguments.ddp_broadcast_buffers is None:  # as SiVA's first factors, which never change
        arguments.ddp_broadcast_buffers = False
    arguments.per_device_eval_batch_size = math.ceil(arguments.eval_batch_size / size) * size


@contextmanager
def refusing(task: Task) -> Iterator[None]:
    """Blame the settings for what the Trainer, or a part of it, raises in the block."""
    try:
        yield
    except FastpeftError:
        raise
    except Exception as error:  # transformers raises almost any type
        reason = str(error).strip().rstrip(".")
        if not isinstance(error, (ValueError, TypeError, ImportError, RuntimeError)):  # which speak for themselves
            reason = f"{type(error).__name__}: {reason}"
        raise FastpeftError(
            f"the Trainer cannot take the settings {dict(task.setup.arguments) or 'of this run'}: {reason}. "
            "Correct them, or leave them out."
        ) from error


def evaluated_tokens(task: Task) -> int | None:
    """The most tokens that a process evaluates together, with their padding; None where rows alone count."""
    is_given = "per_device_eval_batch_size" in task.setup.arguments
    return None if is_given else eval_limits(task.data.problem, task.config.batch_size)[1]


@contextmanager
def noticing_lack_of_memory(task: Task) -> Iterator[None]:
    """Let a lack of memory be one error, which says what would need less of it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        config, given = task.config, task.setup.arguments
        measured = given.get("per_device_eval_batch_size", eval_limits(task.data.problem, config.batch_size)[0])
        keeps = not (task.method.zeroth_order or given.get("gradient_checkpointing"))
        more = "" if config.optimizer_in_backward else " (for the same steps with more gradient_accumulation_steps)"
        ways = {
            f"a smaller `batch_size`{more}": config.batch_size > 1,
            "a smaller `max_length`": True,
            "--set per_device_eval_batch_size=N for measuring": measured > 1,
            "--set gradient_checkpointing=true": keeps and _supports_checkpointing(task.model),
            "`dtype` bfloat16": not (config.in_bfloat16 or replace(config, bf16=None).why_not_in_bfloat16),
        }
        reason, advice = first_line(error).rstrip("."), ", or ".join(filter(ways.get, ways))
        longest = max(len(row["input_ids"]) for row in chain(task.train_rows, task.dev_rows))
        raise NotEnoughMemoryError(
            f"memory is not enough for `batch_size` {config.batch_size}, or for measuring {measured} rows at once, "
            f"with rows of up to {longest} tokens ({reason}). Give {advice}; --dry-run with that tells what a step "
            "would take."
        ) from error


def _supports_checkpointing(model: Any) -> bool:
    """Whether activations can be computed again in all of a model, whatever wraps what."""
    return all(getattr(module, "supports_gradient_checkpointing", True) for module in model.modules())


def recipe_used(task: Task, arguments: TrainingArguments) -> dict[str, Any]:
    """What a recipe decides where nobody else does, for people to read."""
    head = task.head_learning_rate
    used = {
        "learning_rate": arguments.learning_rate,
        **({} if head is None else {"head_learning_rate": head}),
        "schedule": str(arguments.lr_scheduler_type.value),
        **(arguments.lr_scheduler_kwargs or {}),
        "warmup_steps": arguments.warmup_steps,
        "weight_decay": arguments.weight_decay,
    }
    length = {"max_steps": arguments.max_steps} if arguments.max_steps > 0 else {"epochs": arguments.num_train_epochs}
    return {**used, **length}


def shortness(task: Task, arguments: TrainingArguments) -> str:
    """What is told of a run with less than half of the steps in which its recipe learns a new task; else nothing.

    A run that starts from an earlier one has learned before.
    """
    steps, least = total_steps(arguments, task), task.setup.recipe.least_steps
    if 2 * steps >= least or task.config.init_from is not None:
        return ""
    epochs = math.ceil(least / task.setup.steps_per_epoch(len(task.train_rows)))
    return (
        f"the run has {steps:,} steps, in which {task.method.title} learns little of a new task; its recipe has at "
        f"least {least:,}, which are {epochs:,} epochs of these rows"
    )


def compute_dtype(arguments: TrainingArguments) -> str:
    """What a step computes in, by autocast where it is not float32, in which weights that train are."""
    return "bfloat16" if arguments.bf16 else "float16" if arguments.fp16 else "float32"


def loader_options(arguments: TrainingArguments) -> dict[str, Any]:
    """What a DataLoader takes from the Trainer's arguments."""
    return {
        "num_workers": arguments.dataloader_num_workers,
        "pin_memory": arguments.dataloader_pin_memory,
        "persistent_workers": arguments.dataloader_persistent_workers,
        "worker_init_fn": init_worker,
        "prefetch_factor": arguments.dataloader_prefetch_factor,
        "multiprocessing_context": getattr(arguments, "dataloader_multiprocessing_context", None),  # not in the older
    }


def total_steps(arguments: TrainingArguments, task: Task) -> int:
    """Optimizer steps of a run, as the Trainer counts them."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    return math.ceil(arguments.num_train_epochs * task.setup.steps_per_epoch(len(task.train_rows)))
