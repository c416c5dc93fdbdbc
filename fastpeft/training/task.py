"""A configuration brought to life: its data as tokens, its model made ready by its method, the Trainer's arguments."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import DataCollatorForTokenClassification, TrainingArguments, get_scheduler, set_seed
from transformers.utils import is_liger_kernel_available

from fastpeft.data import next_words, packed_rows
from fastpeft.data.examples import Examples, Row, TextData, load_data
from fastpeft.data.masking import Masker
from fastpeft.data.models import Classifier
from fastpeft.data.packed_rows import PackedCollator
from fastpeft.data.problems import MASKED_WORDS, MULTI_LABEL, NEXT_WORDS, OBJECTIVES, REGRESSION, UNLABELLED, Problem
from fastpeft.errors import FastpeftError
from fastpeft.ladder.model import LadderModel
from fastpeft.methods.method import Method
from fastpeft.ops.frozen_linear import pack_frozen
from fastpeft.ops.fused_head import can_fuse_head, fuse_head
from fastpeft.prompts.model import PromptCollator, inside_prompt
from fastpeft.prompts.template import Prompt
from fastpeft.support import processes
from fastpeft.support.environment import best_device
from fastpeft.support.stages import report
from fastpeft.training.config import TrainConfig
from fastpeft.training.loading import continue_earlier, load_start
from fastpeft.training.prompt_search import search_prompt
from fastpeft.training.settings import arguments_of, checkpointing_options
from fastpeft.training.setup import RunSetup, resolve

logger = logging.getLogger(__name__)

DEFAULT_MAX_LENGTH = 128  # tokens
LONGEST_SAID = 512  # tokens, by default, of what a decoder learns to say: prompts and turns are in it
_EVAL_BATCH_SIZE = 64
_LOGS = 50  # points of the loss curve
_CHUNK = 1_000  # texts that are encoded again at one time

# names of optimizers that treat each parameter by itself
ADAMW = ("adamw_torch", "adamw_torch_fused")
ADAMW_8BIT = ("adamw_8bit", "adamw_bnb_8bit")
_STEP_IN_BACKWARD = (*ADAMW, *ADAMW_8BIT)


@dataclass(frozen=True)
class Task:
    """What a run works on.

    Attributes:
        setup: what its configuration came to.
        model: the module to train, with what trains requiring gradients.
        tokenizer: the model's tokenizer.
        data: texts and labels.
        train_rows, dev_rows: the texts as tokens, not padded; where masked words are learned, they are hidden in the
            dev rows and not yet in the others; with `packing` those to train on are joined.
        apart_rows: likewise those to choose a threshold by; none where there are none.
        max_length: where texts were cut, in tokens.
    """

    setup: RunSetup
    model: Any
    tokenizer: Any
    data: TextData
    train_rows: list[Row]
    dev_rows: list[Row]
    apart_rows: list[Row]
    max_length: int

    @classmethod
    def load(cls, config: TrainConfig) -> Task:
        """Load all that `config` names.

        Raises:
            FastpeftError: something named is missing, broken or does not fit the rest.
        """
        plan = resolve(config)
        report("reading data")
        data = data_for(config)
        setup = plan.for_data(data)  # refuses before a prompt is searched for, which takes its time
        if config.awaits_prompt:
            found = search_prompt(plan.config, data, config.max_length or DEFAULT_MAX_LENGTH)
            setup = dataclasses.replace(plan, config=found).for_data(data)
        prompt = setup.prompt
        report("loading the model")
        classifier = draw_start(setup)
        usual = LONGEST_SAID if data.problem is NEXT_WORDS else DEFAULT_MAX_LENGTH
        max_length = _max_length(config, usual, classifier.max_length, setup.method.own_tokens(setup.preparation))
        report("encoding texts")
        train_rows, dev_rows, apart_rows = (
            [] if part is None else encode(classifier.tokenizer, part, max_length, prompt, data.problem)
            for part in (data.train, data.dev, data.apart)
        )
        for part, rows in ((data.train, train_rows), (data.dev, dev_rows)):
            warn_of_texts(part, rows, classifier.tokenizer, max_length, prompt, data.problem)
        if data.problem is MASKED_WORDS:
            dev_rows = Masker(classifier.tokenizer).fixed(dev_rows)
        report("preparing the model")
        model = prepare(classifier, setup)
        if config.packing:
            packed_rows.keep_apart(model, train_rows, str(config.model))
            train_rows = packed_rows.pack(train_rows, max_length)
        if data.problem.of_texts_alone and can_fuse_head(model):
            fuse_head(model)
        if best_device() == "cpu" or not config.pack_weights:
            pack_frozen(model, config.pack_weights)
        return cls(setup, model, classifier.tokenizer, data, train_rows, dev_rows, apart_rows, max_length)

    @property
    def config(self) -> TrainConfig:
        """Where it all came from, with the prompt that was found for it."""
        return self.setup.config

    @property
    def method(self) -> Method:
        return self.setup.method

    @property
    def metric(self) -> str:
        """The metric to look at while training, and to choose by where that is wanted."""
        return self.config.metric or self.data.problem.primary

    def training_arguments(self, output: str) -> TrainingArguments:
        """The Trainer's arguments, with checkpoints below `output`.

        The batches are those of a step whatever the number of processes that a launcher started, which share each.
        """
        config, recipe, given, optimization = (
            self.config,
            self.setup.recipe,
            self.setup.arguments,
            self.method.optimization,
        )
        if config.report_to is not None and find_spec(config.report_to) is None:
            raise FastpeftError(
                f"`report_to` is {config.report_to!r}, but that package is not installed. Run pip install "
                f"{config.report_to}, or leave it out."
            )
        learning_rate = recipe.learning_rate if config.learning_rate is None else config.learning_rate
        if "lr_scheduler_type" in given:
            schedule: dict[str, Any] = {}
        else:
            settings = recipe.schedule_settings(learning_rate)
            schedule = {"lr_scheduler_type": recipe.schedule, "lr_scheduler_kwargs": settings}
        values: dict[str, Any] = {
            "output_dir": output,
            "per_device_train_batch_size": config.batch_size,
            # outputs over the whole vocabulary fit where a batch to train on does
            "per_device_eval_batch_size": _EVAL_BATCH_SIZE if self.data.problem.digest is None else config.batch_size,
            "learning_rate": learning_rate,
            "weight_decay": recipe.weight_decay,
            **schedule,
            "num_train_epochs": recipe.epochs if config.epochs is None else config.epochs,
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
            **({"journal": optimization.keeps_journal} if optimization.zeroth_order else {}),
            **({"max_grad_norm": 0.0} if config.optimizer_in_backward else {}),
            **given,
        }
        with self.refusing():
            arguments_class = arguments_of(self.method)
            if values["use_cpu"]:  # then the Trainer would take no notice of its timeout
                processes.meet(values.get("ddp_timeout", TrainingArguments.ddp_timeout))
            first = arguments_class(**values)
            if first.gradient_accumulation_steps < 1:
                raise ValueError("gradient_accumulation_steps must be at least 1.")
            if first.gradient_checkpointing and not _supports_checkpointing(self.model):
                raise ValueError(f"{self.method.title} does not go with gradient_checkpointing.")
            if (first.neftune_noise_alpha or 0) < 0:
                raise ValueError("neftune_noise_alpha must be at least 0.")
            if first.use_liger_kernel and not is_liger_kernel_available():
                raise ValueError("use_liger_kernel needs the package liger-kernel, which is not installed.")
            if first.label_smoothing_factor and self.data.problem in (REGRESSION, MULTI_LABEL):
                raise ValueError(f"label_smoothing_factor is for classes, but the data has {self.data.problem.labels}.")
            is_beside = isinstance(inside_prompt(self.model), LadderModel)
            if first.label_smoothing_factor and is_beside and self.data.problem is NEXT_WORDS:
                raise ValueError(  # the Trainer knows by the class's name whether labels are to be shifted
                    "with label_smoothing_factor it would teach a side network to say the word that it has just read."
                )
            if first.neftune_noise_alpha and (is_beside or optimization.zeroth_order):
                raise ValueError(
                    f"neftune_noise_alpha is for embeddings in training mode, in which {self.method.title} has none."
                )
            if first.eval_steps and config.metric is not None:
                raise ValueError("with `metric`, dev rows are measured at each checkpoint: use `save_steps`.")
            if first.label_smoothing_factor and self.config.own_loss:
                raise ValueError("label_smoothing_factor does not go with class_weights or focal_gamma.")
            if config.optimizer_in_backward:
                _check_steps_in_backward(first)
            # refuse what they cannot do before anything is written
            stand_in = torch.optim.SGD([torch.zeros(1)], learning_rate)
            get_scheduler(first.lr_scheduler_type, stand_in, 0, 1, first.lr_scheduler_kwargs)
            if first.gradient_checkpointing:
                _, options = checkpointing_options(first)
                checkpoint(torch.sin, torch.zeros(1, requires_grad=True), **{"use_reentrant": False, **options})
            DataLoader(self.dev_rows, first.eval_batch_size, **loader_options(first))  # type: ignore[arg-type]
            steps = total_steps(first, len(self.train_rows))
            if "warmup_ratio" not in values:
                values.setdefault("warmup_steps", round(recipe.warmup * steps))
            values.setdefault("logging_steps", max(1, steps // _LOGS))
            arguments = arguments_class(**values)
            if arguments.world_size > 1:
                self._divide(arguments)
            return arguments

    def _divide(self, arguments: TrainingArguments) -> None:
        """Let several processes share each batch in equal parts."""
        size = arguments.world_size
        if arguments.train_batch_size % size:
            raise FastpeftError(
                f"`batch_size` is {self.config.batch_size}, which {size} processes cannot share in equal parts. "
                f"Give a multiple of {size}, or start another number of them."
            )
        if self.config.optimizer_in_backward:
            raise FastpeftError(
                f"`optimizer_in_backward` with {size} processes: a gradient is used before that of the others is "
                "added. Leave it out, or start one process."
            )
        arguments.accelerator_config.split_batches = True
        if arguments.ddp_broadcast_buffers is None:  # as SiVA's first factors, which never change
            arguments.ddp_broadcast_buffers = False
        arguments.per_device_eval_batch_size = math.ceil(arguments.eval_batch_size / size) * size

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Lay to the settings what the Trainer, or what it is made of, raises in the block.

        Raises:
            FastpeftError: with what was raised in words; one that is raised in the block stays as it is.
        """
        try:
            yield
        except FastpeftError:
            raise
        except Exception as error:  # transformers raises almost any type
            reason = str(error).strip().rstrip(".")
            if not isinstance(error, (ValueError, TypeError, ImportError, RuntimeError)):  # which speak for themselves
                reason = f"{type(error).__name__}: {reason}"
            raise FastpeftError(
                f"the Trainer cannot take the settings {dict(self.setup.arguments) or 'of this run'}: {reason}. "
                "Correct them, or leave them out."
            ) from error


def data_for(config: TrainConfig) -> TextData:
    """The rows of a run with `config`.

    Raises:
        FastpeftError: as `load_data`.
    """
    return load_data(
        config.data,
        problem_type=config.problem_type if config.objective is None else OBJECTIVES[config.objective].name,
        text_column=config.text_column,
        label_column=config.label_column,
        split_seed=config.split_seed,
        split=config.split,
        keep_apart=config.threshold is not None,
    )


def draw_start(setup: RunSetup) -> Classifier:
    """What `load_start` loads, with the new head that a run draws."""
    set_seed(setup.config.seed)
    return load_start(setup)


def prepare(start: Classifier, setup: RunSetup) -> Any:
    """The module that a run trains, made of what `draw_start` loaded, as it is before the first step.

    Raises:
        FastpeftError: the method finds nothing to train, as biases where there are none.
    """
    preparation = dataclasses.replace(setup.preparation, head=start.head, head_is_new=start.head_is_new)
    model = setup.method.prepare(start.model, preparation)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise FastpeftError(
            f"the method {setup.method.name!r} finds nothing to train in the model {setup.config.model!r}, whose head "
            "or biases, if it has some, do not train. Choose another method, as siva or lora."
        )
    continue_earlier(model, setup)
    return model


def _max_length(config: TrainConfig, usual: int, reads: int, own: int) -> int:
    """Where texts are cut, for a model that reads so many tokens, of which its method takes some for itself.

    Where nobody says it, at `usual`.
    """
    limit = reads - own
    before = f", of which the method takes {own} for itself" if own else ""
    if limit < 2:  # a text has two special tokens
        raise FastpeftError(f"the model {config.model!r} reads {reads} tokens{before}. Let it take fewer.")
    max_length = config.max_length or min(usual, limit)
    if max_length > limit:
        raise FastpeftError(
            f"`max_length` {max_length} is above what the model {config.model!r} reads: {reads} tokens{before}. Choose "
            f"{limit} tokens or less."
        )
    return max_length


def _check_steps_in_backward(arguments: TrainingArguments) -> None:
    """Raise `ValueError` where an optimizer that steps in backward does not go with the rest."""
    if arguments.optim not in _STEP_IN_BACKWARD:
        raise ValueError(
            f"optimizer_in_backward goes with optim={' or '.join(_STEP_IN_BACKWARD)}, not {arguments.optim.value}."
        )
    for name, off in ("max_grad_norm", 0), ("gradient_accumulation_steps", 1), ("fp16", False):
        if (value := getattr(arguments, name)) != off:
            raise ValueError(
                f"{name}={value} needs all gradients at once, which optimizer_in_backward never has; it must be {off}."
            )


def _supports_checkpointing(model: Any) -> bool:
    """Whether activations can be computed again in all of a model, whatever wraps what."""
    return all(getattr(module, "supports_gradient_checkpointing", True) for module in model.modules())


def recipe_used(arguments: TrainingArguments) -> dict[str, Any]:
    """What of the Trainer's arguments a recipe decides where nobody else does, for people to read."""
    used = {
        "learning_rate": arguments.learning_rate,
        "schedule": str(arguments.lr_scheduler_type.value),
        **(arguments.lr_scheduler_kwargs or {}),
        "warmup_steps": arguments.warmup_steps,
        "weight_decay": arguments.weight_decay,
    }
    length = {"max_steps": arguments.max_steps} if arguments.max_steps > 0 else {"epochs": arguments.num_train_epochs}
    return {**used, **length}


def compute_dtype(arguments: TrainingArguments) -> str:
    """What a step computes in, by autocast where it is not float32, in which weights that train are."""
    return "bfloat16" if arguments.bf16 else "float16" if arguments.fp16 else "float32"


def loader_options(arguments: TrainingArguments) -> dict[str, Any]:
    """What a DataLoader takes from the Trainer's arguments."""
    return {
        "num_workers": arguments.dataloader_num_workers,
        "pin_memory": arguments.dataloader_pin_memory,
        "persistent_workers": arguments.dataloader_persistent_workers,
        "prefetch_factor": arguments.dataloader_prefetch_factor,
        "multiprocessing_context": getattr(arguments, "dataloader_multiprocessing_context", None),  # not in the older
    }


def encode(tokenizer: Any, examples: Examples, max_length: int, prompt: Prompt | None, problem: Problem) -> list[Row]:
    """Examples as rows of token ids and what is to be said of them, cut at `max_length` tokens and not padded.

    Of two texts the longer is cut first. Where words have tags, the first token of each word is labelled. Where masked
    words are learned, rows have no labels yet but `special_tokens_mask`, and rows without a word are left out. Next
    words are encoded by `next_words.encode`.

    Raises:
        FastpeftError: no row has a word that could be hidden.
    """
    if prompt is not None:
        return prompt.encode(tokenizer, examples.texts, examples.labels, max_length)
    if problem is NEXT_WORDS:
        return next_words.encode(tokenizer, examples.texts, max_length)
    texts = zip(*examples.texts) if examples.is_pair else [examples.texts]
    unlabelled = problem is MASKED_WORDS
    encoded = tokenizer(
        *map(list, texts),
        truncation=True,
        max_length=max_length,
        is_split_into_words=problem.per_token and not unlabelled,
        return_special_tokens_mask=unlabelled,
    )
    if unlabelled:
        rows = [{name: column[i] for name, column in encoded.items()} for i in range(len(examples))]
        rows = [row for row in rows if 0 in row["special_tokens_mask"]]
        if not rows:
            raise FastpeftError(
                f"no text has a word among its first {max_length} tokens. Give longer texts or a larger `max_length`."
            )
        return rows
    labels = examples.labels
    if problem.per_token:
        labels = [_first_tokens(encoded.word_ids(i), tags) for i, tags in enumerate(labels)]
    return [
        {**{name: column[i] for name, column in encoded.items()}, "labels": label} for i, label in enumerate(labels)
    ]


def warn_of_texts(
    examples: Examples, rows: Sequence[Row], tokenizer: Any, max_length: int, prompt: Prompt | None, problem: Problem
) -> None:
    """Warn of texts that are empty, and of what `encode` cut off these rows, which is neither learned nor measured."""
    if problem.of_texts_alone:  # of which the empty ones are left out, and `next_words.encode` warns
        return
    if empty := sum(not any(map(str.strip, [text] if isinstance(text, str) else text)) for text in examples.texts):
        logger.warning("%d of %d texts are empty; they are learned and measured as the others", empty, len(examples))
    if not problem.per_token:
        full = [index for index, row in enumerate(rows) if len(row["input_ids"]) == max_length]
        cut = 0
        for start in range(0, len(full), _CHUNK):
            some = full[start : start + _CHUNK]
            given = Examples([examples.texts[index] for index in some], [examples.labels[index] for index in some])
            cut += sum(
                len(row["input_ids"]) > max_length for row in encode(tokenizer, given, max_length + 1, prompt, problem)
            )
        if cut:
            logger.warning(
                "%d of %d texts are longer than the %d tokens that are read, and were cut; a larger max_length (of the "
                "model at most) reads more",
                cut,
                len(examples),
                max_length,
            )
        return
    words = sum(map(len, examples.texts))
    read = sum(label != UNLABELLED for row in rows for label in row["labels"])
    if read < words:
        logger.warning(
            "%d of %d words have no token among the %d that are read of a row, and are left out; a larger max_length "
            "(of the model at most) or shorter rows keep them",
            words - read,
            words,
            max_length,
        )


def _first_tokens(words: Sequence[int | None], tags: Sequence[int]) -> list[int]:
    """A label for each token, given the word that it is of: the word's tag where a word begins."""
    before = [None, *words]
    return [UNLABELLED if word is None or word == last else tags[word] for word, last in zip(words, before)]


def collator(tokenizer: Any, problem: Problem, pad_to_multiple_of: int | None = None) -> Any:
    """What makes a batch of rows of `encode`."""
    if problem is NEXT_WORDS:
        return PackedCollator(tokenizer, pad_to_multiple_of=pad_to_multiple_of)
    kind = DataCollatorForTokenClassification if problem.per_token else PromptCollator
    return kind(tokenizer, pad_to_multiple_of=pad_to_multiple_of)


def total_steps(arguments: TrainingArguments, rows: int) -> int:
    """Optimizer steps of a run over `rows` rows, as the Trainer counts them."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    return math.ceil(arguments.num_train_epochs * steps_per_epoch(arguments, rows))


def steps_per_epoch(arguments: TrainingArguments, rows: int) -> int:
    """Optimizer steps of one pass over `rows` rows, as the Trainer counts them."""
    batches = math.ceil(rows / arguments.train_batch_size)
    return max(1, math.ceil(batches / arguments.gradient_accumulation_steps))
