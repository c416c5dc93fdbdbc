"""A run's configuration, resolved once: its method and what that is given, the Trainer's arguments, and its head."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from transformers import TrainingArguments

from fastpeft.data.examples import Examples, TextData, texts_in_words
from fastpeft.data.problems import CLASSIFICATION, NEXT_WORDS, OBJECTIVES, Problem, get_problem
from fastpeft.errors import FastpeftError, did_you_mean, refuse
from fastpeft.methods.method import OPTIONS, OVER, Method
from fastpeft.methods.preparation import Preparation, parse_targets
from fastpeft.methods.recipes import Recipe
from fastpeft.methods.registry import METHODS, get_method
from fastpeft.mezo.trainer import MeZOConfig
from fastpeft.models import hidden_size
from fastpeft.prompts.template import Prompt
from fastpeft.support.environment import best_device
from fastpeft.support.processor import prefers_bfloat16
from fastpeft.training.config import OutputConfig, TrainConfig
from fastpeft.training.prompt_search import check_searchable
from fastpeft.training.run_folder import RunFolder

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


@dataclass(frozen=True)
class Head:
    """What the head of a model is for.

    Attributes:
        labels: names of its outputs: classes or tags, or what a number is; none where they are the vocabulary.
        prompt: what texts are put into, with its words in the order of `labels`; None for the texts alone.
        problem: what the labels are.
    """

    labels: list[str]
    prompt: Prompt | None
    problem: Problem

    @property
    def by_words(self) -> bool:
        """Whether it is the head of a language model: its words, or label words among them, are the outputs."""
        return self.problem.of_texts_alone or (self.prompt is not None and self.prompt.head == "label_words")

    def can_take_over(self, earlier: Head) -> bool:
        """Whether the weights of an earlier head can stay: one for words whatever the classes, else for the same."""
        if self.by_words != earlier.by_words:
            return False
        if self.by_words:
            return (self.problem is NEXT_WORDS) == (earlier.problem is NEXT_WORDS)
        return self.labels == earlier.labels and self.problem is earlier.problem

    @classmethod
    def of(cls, config: TrainConfig, labels: Sequence[str], problem: Problem) -> Head:
        """The head of a run with `config` on data with `labels`."""
        prompt = config.parse_prompt()
        if prompt is not None and problem.per_token:
            raise FastpeftError(
                f"the prompt {prompt.template!r} is for texts, but the data has a tag for every word. Remove `prompt`."
            )
        if prompt is not None and problem is not CLASSIFICATION and prompt.head == "label_words":
            raise FastpeftError(
                f"the prompt {prompt.template!r} answers by label words, which stand for classes, but this is "
                f"{problem.short}. Add --prompt-head classifier, or leave it out."
            )
        return cls(list(labels), None if prompt is None else prompt.for_labels(labels), problem)


@dataclass(frozen=True)
class Setup:
    """What a configuration comes to, as far as that can be told without model and data.

    Attributes:
        config: where it all came from, and whether it computes in bfloat16.
        method: what trains.
        preparation: what the method is given, without what the loaded model tells.
        arguments: fields of the Trainer's arguments that the settings name.
    """

    config: TrainConfig
    method: Method
    preparation: Preparation
    arguments: Mapping[str, Any]

    @cached_property
    def recipe(self) -> Recipe:
        """How the method trains this model where the configuration says nothing."""
        causal_lm = OBJECTIVES.get(self.config.objective or "") is NEXT_WORDS
        return self.method.recipe.for_model(causal_lm=causal_lm, hidden_size=hidden_size(self.config.model))

    @property
    def _accumulated(self) -> int:
        count: int = max(1, self.arguments.get("gradient_accumulation_steps", 1))
        return count

    @property
    def rows_a_step(self) -> int:
        """Rows that a step trains on."""
        return self.config.batch_size * self._accumulated

    def steps_per_epoch(self, train_rows: int) -> int:
        """Optimizer steps of one pass over `train_rows` rows, as the Trainer counts them."""
        return math.ceil(math.ceil(train_rows / self.config.batch_size) / self._accumulated)

    def epochs(self, train_rows: int) -> float:
        """Passes over the training rows, where the data has `train_rows` and no number of steps is given."""
        return self.config.epochs or self.recipe.epochs_of(self.steps_per_epoch(train_rows))

    def rows_trained(self, train_rows: int) -> float:
        """Rows that the run trains on, those of every epoch counted, where the data has `train_rows`."""
        if self.config.max_steps is not None:
            return float(self.config.max_steps * self.rows_a_step)
        return self.epochs(train_rows) * train_rows

    def with_head(self, head: Head) -> RunSetup:
        """This setup with a head; nothing is checked."""
        by_words = head.by_words or (self.config.awaits_prompt and self.config.prompt_head != "classifier")
        preparation = dataclasses.replace(self.preparation, task_type=head.problem.task_type, by_words=by_words)
        return RunSetup(self.config, self.method, preparation, self.arguments, head)

    def for_data(self, data: TextData) -> RunSetup:
        """This setup with its head on `data`; the head's prompt is missing while the configuration awaits it."""
        if self.config.class_weights is not None and not data.problem.has_classes:
            raise FastpeftError(
                f"`class_weights` is {self.config.class_weights!r}, which is for classes, tags and labels, but the "
                f"data has {data.problem.labels}. Leave it out."
            )
        if self.config.awaits_prompt:
            check_searchable(data)
        if self.config.metric is not None:
            data.problem.check_metric(self.config.metric)
        setup = self.with_head(Head.of(self.config, data.labels, data.problem))
        check_texts(setup.head.prompt, data.train)
        if (count := setup.method.examples(setup.preparation)) and data.problem is not NEXT_WORDS:
            raise FastpeftError(
                f"examples is {count}, which is of a decoder that learns next words, but the data has "
                f"{data.problem.labels}. Leave it out, or add --objective causal."
            )
        setup.method.check(setup.preparation)
        return setup


@dataclass(frozen=True)
class RunSetup(Setup):
    """What a configuration comes to on its data, which tell what the model's head is for."""

    head: Head

    def after(self, context: Sequence[int]) -> RunSetup:
        """This setup, where every text comes after these tokens."""
        return dataclasses.replace(self, preparation=dataclasses.replace(self.preparation, context=context))

    @property
    def problem(self) -> Problem:
        return self.head.problem

    @property
    def prompt(self) -> Prompt | None:
        return self.head.prompt


def check_reporter(config: OutputConfig) -> None:
    """Raise `FastpeftError` where a run that is to be made would report to what is not installed here."""
    if config.report_to is not None and find_spec(config.report_to) is None:
        raise FastpeftError(
            f"`report_to` is {config.report_to!r}, but that package is not installed. Run pip install "
            f"{config.report_to}, or leave it out."
        )


def resolve(config: TrainConfig) -> Setup:
    """What `config` of a run that is to be made comes to; of a finished one see `setup_of_run`."""
    method = get_method(config.method, config.settings)
    settings, arguments = sort_settings(method, config.settings)
    alone = [option for option in OPTIONS if option not in method.options and getattr(config, option) is not None]
    taken = ", ".join((*method.options, *method.settings())) or "nothing of its own"
    conflicts = {
        f"`optimizer_in_backward` is on, but the method {method.name!r} has no gradients and no backward pass. Leave "
        "it out.": method.zeroth_order and config.optimizer_in_backward,
        f"`head_learning_rate` is {config.head_learning_rate}, but {method.title} has one rate for all that it "
        "perturbs. Leave it out.": method.zeroth_order and config.head_learning_rate is not None,
        "the estimator 'fzoo' has no learning rate of its own here, and that of MeZO is too high for steps that are "
        "scaled by the spread of the losses. Give one; 1e-6 serves the bundled model with 8 estimates.": (
            arguments.get("estimator") == "fzoo" and config.learning_rate is None
        ),
        f"the method {method.name!r} takes no `{''.join(alone[:1])}`; leave it out. What it takes is {taken}.": alone,
    }
    refuse(conflicts)
    if config.bf16 is None:
        config = dataclasses.replace(config, bf16=config.in_bfloat16 or _bfloat16(method, arguments))
    setup = _setup(config, method, settings, arguments)
    method.check(setup.preparation)
    return setup


def training_device(settings: Mapping[str, Any]) -> str:
    """The type of the device that a run with these settings trains on: the accelerator, unless it refuses that."""
    return "cpu" if settings.get("use_cpu") else torch.device(best_device()).type


def _bfloat16(method: Method, arguments: Mapping[str, Any]) -> bool:
    """Whether a run that does not say it computes in bfloat16: on a CPU that has the instructions.

    Not by MeZO, whose two losses differ by less than a rounding to bfloat16.
    """
    on_cpu = training_device(arguments) == "cpu"
    chosen = arguments.get("fp16")  # another one
    return bool(on_cpu and not chosen and not method.zeroth_order and prefers_bfloat16())


def _setup(config: TrainConfig, method: Method, settings: Mapping[str, Any], arguments: Mapping[str, Any]) -> Setup:
    preparation = Preparation(
        head=(),
        rank=config.rank,
        targets=parse_targets(config.targets),
        settings={name: value for name, value in settings.items() if name != OVER},
        window=config.window,
        reduction=config.reduction,
    )
    return Setup(config, method, preparation, arguments)


def setup_of_run(folder: RunFolder) -> RunSetup:
    """What the configuration of a finished run came to; its settings were accepted when it was made."""
    metrics = folder.metrics()
    config = TrainConfig.from_values(folder.config())
    method = get_method(config.method, config.settings)
    settings, arguments = divide_settings(method, config.settings)
    head = Head.of(config, metrics["labels"], get_problem(metrics["problem_type"]))
    return _setup(config, method, settings, arguments).with_head(head)


def check_texts(prompt: Prompt | None, examples: Examples) -> None:
    """Raise `FastpeftError` unless the template takes as many texts as a row has."""
    if prompt is not None and prompt.is_pair != examples.is_pair:
        raise FastpeftError(
            f"the template {prompt.template!r} takes {'a pair of texts' if prompt.is_pair else 'one text'} a row, but "
            f"the data has {texts_in_words(examples)}. Use {'{a} and {b}' if examples.is_pair else '{text}'} in the "
            "template, or name other columns with --text-column."
        )


# -- settings: of the method, or of the Trainer -----------------------------------------------------------------------


def sort_settings(method: Method, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Check settings, and give them as `divide_settings` does."""
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
    """What `gradient_checkpointing_kwargs` have for transformers, and what for `torch.utils.checkpoint.checkpoint`."""
    options = dict(arguments.gradient_checkpointing_kwargs or {})
    own = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
    every = own.get("every_n_layers", 1)
    if type(every) is not int or every < 1:
        raise ValueError(f"every_n_layers is {every!r}, but must be a whole number from 1.")
    return own, options
