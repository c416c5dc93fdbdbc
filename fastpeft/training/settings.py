"""The settings of a run: what is the method's and what the Trainer's, and what each may be."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from transformers import TrainingArguments

from fastpeft.errors import FastpeftError, did_you_mean
from fastpeft.methods.method import Method
from fastpeft.methods.registry import METHODS
from fastpeft.mezo.trainer import MeZOConfig
from fastpeft.training.config import TrainConfig

# fields of TrainingArguments that settings may have; in the last line those of MeZOConfig alone
_ARGUMENTS = """
    optim optim_args optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm
    lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio
    gradient_accumulation_steps average_tokens_across_devices label_smoothing_factor neftune_noise_alpha
    fp16 tf32 torch_compile torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config use_cpu
    gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing activation_checkpointing_kwargs
    torch_empty_cache_steps dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context
    per_device_eval_batch_size eval_steps eval_accumulation_steps
    logging_strategy logging_steps logging_first_step logging_nan_inf_filter log_level log_level_replica
    log_on_each_node include_num_input_tokens_seen run_name project
    trackio_space_id trackio_bucket_id trackio_static_space_id
    ddp_backend ddp_timeout ddp_bucket_cap_mb ddp_broadcast_buffers ddp_find_unused_parameters ddp_static_graph
    eps estimator num_estimates noise max_projected_grad on_nonfinite restore rounding
"""

# what has an option of another name
_OPTIONS = {
    "r": "rank",
    "target_modules": "targets",
    "window_size": "window",
    "reduction_factor": "reduction",
    "output_dir": "output",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "save_strategy": "save_steps",
    "metric_for_best_model": "metric",
    "full_determinism": "deterministic",
}


def sort_settings(method: Method, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Check settings, and give them as `divide_settings` does.

    Raises:
        FastpeftError: a name is none of theirs that may be set, or a value is not of its type.
    """
    of_method, arguments = method.settings(), arguments_of(method)
    fields = {item.name: item for item in dataclasses.fields(arguments) if item.name in _ARGUMENTS.split()}
    hints = {name: hint for name, hint in get_type_hints(arguments).items() if name in fields} | of_method
    for name, value in settings.items():
        option = _OPTIONS.get(name, name)
        if name not in hints and option in TrainConfig.__dataclass_fields__:
            raise FastpeftError(f"{name} cannot be set as a setting; use `{option}`.")
        if name not in hints:
            takers = [other.name for other in METHODS.values() if name in other.settings()]
            advice = f" The name is one of {' and '.join(takers)}." if takers else ""
            raise FastpeftError(
                f"unknown setting {name!r}; allowed for the method {method.name!r} are "
                f"{', '.join(of_method) or 'none of its own'}, and {len(fields)} fields of {arguments.__name__}, as "
                f"lr_scheduler_type and weight_decay.{did_you_mean(name, hints)}{advice}"
            )
        hint = hints[name]
        if not _fits(value, hint):
            allowed = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            raise FastpeftError(f"the setting {name} is {value!r}; it must be of the type {allowed}.")
        choices = None if name in of_method else fields[name].metadata.get("choices")
        if choices and value not in (*choices, fields[name].default):
            raise FastpeftError(f"the setting {name} is {value!r}; it must be one of {', '.join(choices)}.")
    return divide_settings(method, settings)


def divide_settings(method: Method, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings that were checked, as those of the method's configuration and those of TrainingArguments."""
    of_method = method.settings()
    own = {name: value for name, value in settings.items() if name in of_method}
    return own, {name: value for name, value in settings.items() if name not in of_method}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from JSON can be of a type; what takes a type that JSON does not have checks it itself."""
    kind = get_origin(hint) or hint
    if kind in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if kind is Literal:  # PEFT takes more than it lists, as pissa_niter_16
        return any(_fits(value, type(listed)) for listed in get_args(hint))
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind or kind not in (bool, int, str, list, dict, NoneType)


def arguments_of(method: Method) -> type[TrainingArguments]:
    """The class of a method's arguments for its Trainer."""
    return MeZOConfig if method.zeroth_order else TrainingArguments


def checkpointing_options(arguments: TrainingArguments) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `gradient_checkpointing_kwargs` have for transformers, and what for `torch.utils.checkpoint.checkpoint`.

    Raises:
        ValueError: they are nothing of the kind.
    """
    options = dict(arguments.gradient_checkpointing_kwargs or {})
    own = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
    every = own.get("every_n_layers", 1)
    if type(every) is not int or every < 1:
        raise ValueError(f"every_n_layers is {every!r}, but must be a whole number from 1.")
    return own, options
