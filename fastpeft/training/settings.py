"""The settings of a run: what is the method's and what the Trainer's, and what each may be."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from transformers import TrainingArguments

from fastpeft.errors import FastpeftError
from fastpeft.methods.method import Method
from fastpeft.mezo.trainer import MeZOConfig

# names that settings may not touch, with what decides them
_DECIDED_ELSEWHERE = {
    "r": "use rank in its place",
    "target_modules": "use targets in its place",
    "window_size": "use window in its place",
    "reduction_factor": "use reduction in its place",
    "output_dir": "use output in its place",
    "per_device_train_batch_size": "use batch_size in its place",
    "learning_rate": "use learning_rate in its place",
    "num_train_epochs": "use epochs in its place",
    "max_steps": "use max_steps in its place",
    "seed": "use seed in its place",
    "data_seed": "use seed in its place, which decides the order of rows too",
    "bf16": "use bf16 in its place",
    "save_steps": "use save_steps in its place",
    "save_strategy": "use save_steps in its place",
    "save_total_limit": "the newest checkpoints are kept",
    "save_only_model": "a checkpoint holds all that resume needs",
    "ignore_data_skip": "a resumed run meets the rows that it would have met",
    "enable_jit_checkpoint": "a run that is told to end saves a checkpoint",
    "auto_find_batch_size": "use batch_size in its place; a dry run tells how much memory it needs",
    "eval_strategy": "dev rows are measured a few times a run, or with metric at each checkpoint",
    "eval_on_start": "dev rows are always measured before the first step",
    "load_best_model_at_end": "use metric in its place",
    "metric_for_best_model": "use metric in its place",
    "greater_is_better": "it follows from metric",
    "dataloader_drop_last": "every row is trained on in every epoch",
    "train_sampling_strategy": "rows of about one length share a batch",
    "group_by_length": "rows of about one length share a batch",  # its name in transformers 5.0
    "prediction_loss_only": "metrics are always measured",
    "eval_do_concat_batches": "metrics are of all rows together",
    "batch_eval_metrics": "metrics are of all rows together",
    "bf16_full_eval": "it would round the weights that train",
    "fp16_full_eval": "it would round the weights that train",
    "dataloader_in_order": "rows keep their order",
    "label_names": "the model's labels are in the column labels",
    "resume_from_checkpoint": "use resume in its place",
    "push_to_hub": "push the folder of the finished run",
    "full_determinism": "use deterministic in its place",
    "accelerator_config": "a batch is divided among the processes of a launcher",
    "parallelism_config": "each process of a launcher has the whole model",
    "fsdp": "each process of a launcher has the whole model",
    "fsdp_config": "each process of a launcher has the whole model",
    "deepspeed": "each process of a launcher has the whole model",
    "journal": "a run by MeZO always keeps one",
    "save_weights": "leave save_steps out, and the journal is the only checkpoint",
}


def sort_settings(method: Method, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide settings between the method's configuration and TrainingArguments.

    Raises:
        FastpeftError: a name is unknown or decided elsewhere, or a value is not of its type.
    """
    of_method = method.settings()
    arguments_class = arguments_of(method)
    hints = get_type_hints(arguments_class)
    fields = {item.name: item for item in dataclasses.fields(arguments_class) if item.init}
    of_training = {name: hints[name] for name in fields}
    for name, value in settings.items():
        if name not in of_method and name in _DECIDED_ELSEWHERE:
            raise FastpeftError(f"{name} cannot be set as a setting; {_DECIDED_ELSEWHERE[name]}.")
        if name not in of_method and name not in of_training:
            close = difflib.get_close_matches(name, [*of_method, *of_training], 3)
            advice = f" Did you mean {' or '.join(close)}?" if close else ""
            raise FastpeftError(
                f"unknown setting {name!r}; allowed for the method {method.name!r} are "
                f"{', '.join(of_method) or 'none of its own'}, and the fields of "
                f"{'fastpeft.MeZOConfig' if method.optimization.zeroth_order else 'transformers.TrainingArguments'}."
                f"{advice}"
            )
        hint = of_method[name] if name in of_method else of_training[name]
        if not _fits(value, hint):
            allowed = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            raise FastpeftError(f"the setting {name} is {value!r}; it must be of the type {allowed}.")
        choices = None if name in of_method else fields[name].metadata.get("choices")
        if choices and value not in (*choices, fields[name].default):
            raise FastpeftError(f"the setting {name} is {value!r}; it must be one of {', '.join(choices)}.")
    return (
        {name: value for name, value in settings.items() if name in of_method},
        {name: value for name, value in settings.items() if name not in of_method},
    )


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value that came from JSON can be of a type; of types that JSON does not have, their owner decides."""
    kind = get_origin(hint) or hint
    if kind in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if kind is Literal:  # its owner may take more than it lists, as PEFT does pissa_niter_16
        return any(_fits(value, type(listed)) for listed in get_args(hint))
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind or kind not in (bool, int, str, list, dict, NoneType)


def arguments_of(method: Method) -> type[TrainingArguments]:
    """The class of a method's arguments for its Trainer."""
    return MeZOConfig if method.optimization.zeroth_order else TrainingArguments


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
