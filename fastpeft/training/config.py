"""All that decides a training run, in one record: each option once, with its help, its range and its default."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
import reprlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, field
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, NoReturn, get_args, get_origin, get_type_hints

from fastpeft.data.names import DEMO, LOSS
from fastpeft.data.problems import OBJECTIVES, PROBLEMS, TITLES
from fastpeft.errors import FastpeftError, did_you_mean
from fastpeft.methods.peft_types import PREFIX
from fastpeft.methods.registry import METHODS, get_method, unknown
from fastpeft.methods.side_network import SIVA_LAYERS
from fastpeft.prompts.named import is_auto, parse_prompt
from fastpeft.prompts.template import HEADS, Prompt, is_text
from fastpeft.support.files import parse_json, path_of
from fastpeft.training.lineage import earlier_run
from fastpeft.training.run_folder import read_config

# without sense for an objective
FOR_LABELS = (
    *("problem_type", "label_column", "prompt", "label_words", "prompt_head"),
    "class_weights",
)
REPORTERS = ("tensorboard", "wandb", "mlflow", "trackio")  # each the name of its package, and of the Trainer's callback
_HIGHEST_SEED = 2**32 - 1

# what to do with a value that is in memory, where a name is asked for
_AS_FILE = {
    "data": " Write the rows to a csv, jsonl or parquet file and give its path.",
    "model": " Save it and its tokenizer by save_pretrained and give the folder.",
}
_JOINED = ("targets", "text_column", "label_column", "label_words")  # whose values may be several, joined by commas
_SHORT = 40  # characters of what is shown as it is, as a number of numpy


def _in_short(value: Any) -> str:
    """What an error says that was given: not every row of a table, nor every layer of a model."""
    if isinstance(value, (list, tuple, set, dict)):
        return reprlib.repr(value)
    shown = repr(value)
    return shown if isinstance(value, str) or len(shown) <= _SHORT else f"a {type(value).__name__}"


def _advice(known: Option, value: Any) -> str:
    """What to do with a value of another type than a text, after a space; nothing where that is not known."""
    if known.kind in (int, float, bool) and hasattr(value, "item"):  # of numpy or PyTorch
        return " Give its item(), a value of Python."
    if known.name in _JOINED and isinstance(value, (list, tuple)) and all(map(is_text, value)):
        return f" Join them by commas: {','.join(value)!r}."
    return _AS_FILE.get(known.name, "")


class Option(NamedTuple):
    """A field of `TrainConfig` as the command line, errors and the reference tell it.

    Attributes:
        kind: the type of its values beside None.
        default: `MISSING` where a value must be given.
        help: a sentence in which names of fields stand in backticks.
        unset: what None stands for.
        least, most: the range of a whole number.
        choices: the texts that are allowed. Empty: any text.
        metavar: what stands for a value on the command line. None: N for a number, NAME for a text.
        folder: whether the value is the name of a folder.
        panel: the heading under which help has it.
        letter: its short name on the command line.
        common: whether short help has it too.
    """

    name: str
    kind: type
    default: Any
    help: str
    unset: str = ""
    least: int = 0
    most: int | None = None
    choices: Collection[str] = ()
    metavar: str | None = None
    folder: bool = False
    panel: str = ""
    letter: str = ""
    common: bool = False

    @property
    def allowed(self) -> str:
        """What a value must be, as errors say it."""
        if self.choices:
            return " or ".join(self.choices) if len(self.choices) < 3 else f"one of {', '.join(self.choices)}"
        return {
            str: f"{'the name of a folder' if self.folder else 'a text'} in UTF-8 and not empty",
            int: f"a whole number from {self.least}{f' to {self.most}' if self.most else ''}",
            float: "a number above 0",
            bool: "true or false",
            dict: "an object of names and values that JSON can hold",
        }[self.kind]

    def takes(self, value: Any) -> bool:
        """Whether a value is allowed."""
        if value is None:
            return self.default is None
        if self.kind is str:
            return is_text(value) and (value in self.choices if self.choices else value != "")
        if self.kind is int:
            return type(value) is int and self.least <= value <= (self.most or math.inf)
        if self.kind is float:
            return type(value) in (int, float) and 0 < value < math.inf
        return _is_json_object(value) if self.kind is dict else isinstance(value, bool)

    def text(self, named: Callable[[str], str] = str) -> str:
        """The help with the choices and the default; `named` writes the name of a field."""
        default = self.unset or (self.default if self.default is not MISSING and self.kind in (str, int) else None)
        text = f"{self.help}{f': {self.allowed}' if self.choices else ''}"
        text += "." if default is None else f" (default: {default})"
        return re.sub(r"`(\w+)`", lambda found: named(found[1]), text)


# the headings of help, in their order
DATA, MODEL, METHOD, TRAINING, OUTPUT, ADVANCED = "Data", "Model", "Method", "Training", "Output", "Advanced"


def option(panel: str, help: str, default: Any = None, **others: Any) -> Any:
    """A field of `TrainConfig` that is an option of the command line; `others` are fields of `Option`."""
    return field(default=default, metadata={"panel": panel, "help": help, **others})


def _refuse(config: Any, name: str, reason: str) -> NoReturn:
    raise FastpeftError(f"`{name}` is {getattr(config, name)!r}, but {reason}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Rows, and the tokens that they become."""

    data: str = option(
        DATA,
        "demo; a csv, tsv, jsonl or parquet file; a folder with train.* and optionally dev.*, or one saved by the "
        "library datasets; or a data set on the hub, such as nyu-mll/glue:sst2",
        DEMO,
        metavar="DATA",
        letter="d",
        common=True,
    )
    objective: str | None = option(
        DATA,
        "Train a language model on texts without labels, such as a txt file: mlm predicts masked tokens; causal "
        "predicts next tokens, and of prompts with completions or of conversations only the completions or the "
        "assistant's turns. Another run can start from the result by `init_from`",
        choices=OBJECTIVES,
        unset="train on the labels",
    )
    problem_type: str | None = option(
        DATA,
        "What the labels are",
        choices=PROBLEMS,
        unset="found from the data",
        metavar="KIND",
    )
    text_column: str | None = option(
        DATA, "Column of texts, or two joined by a comma for pairs", unset="found by name", common=True
    )
    label_column: str | None = option(
        DATA,
        "Column of classes, numbers, tags or labels; or several of 0 and 1 joined by commas, one for each label",
        unset="found by name",
        common=True,
    )
    split_seed: int = option(
        DATA,
        "Random seed of the split into training and dev rows, where the data has no dev rows",
        0,
        most=_HIGHEST_SEED,
    )
    max_length: int | None = option(
        DATA,
        "Maximum length of a text in tokens; longer texts are truncated",
        least=2,
        unset="128, or 512 with the objective causal, but never more than the model's limit",
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model that a run starts from, and the prompt that texts are put into."""

    model: str = option(
        MODEL, "demo, a folder or a hub id", unset="demo, or the model of `init_from`", letter="m", common=True
    )
    init_from: str | None = option(
        MODEL,
        "Folder of a finished run to start from: a whole model; an adapter, which is merged into its base model; or a "
        "side network, which only a method with the same side network can continue",
        metavar="RUN",
        folder=True,
    )
    prompt: str | None = option(
        MODEL,
        "A template such as '{text} It was <mask>.', the name of a prompt such as sst2, or auto, which searches for "
        "one on training rows",
        metavar="PROMPT",
        unset="none",
    )
    label_words: str | None = option(
        MODEL,
        "Label words of the prompt, one for each class: terrible,great in the order of the classes, or "
        "negative=terrible,positive=great",
        unset="the named prompt's",
        metavar="WORDS",
    )
    prompt_head: str | None = option(
        MODEL,
        "Head that predicts the class from the prompt: the LM head by its label words, or a new classifier",
        choices=HEADS,
        unset=HEADS[0],
        metavar="KIND",
    )
    found_prompt: dict[str, Any] | None = field(
        default=None, metadata={"help": "What was found for the prompt auto. It is not searched for again"}
    )
    dtype: str | None = option(
        TRAINING,
        "Keep the model's frozen weights in this dtype. bfloat16 takes half the memory of float32 and computes by "
        "`bf16`; weights that train stay in float32",
        choices=("float32", "bfloat16"),
        unset="float32, whatever the files hold",
        metavar="DTYPE",
    )
    pack_weights: bool = option(
        TRAINING,
        "Keep copies of frozen weights, which costs memory and saves time: on a CPU in a packed layout (two where "
        "gradients pass through), on a GPU in autocast's dtype",
        True,
    )

    @property
    def in_bfloat16(self) -> bool:
        """Whether the model's frozen weights are kept in bfloat16."""
        return self.dtype == "bfloat16"

    @property
    def awaits_prompt(self) -> bool:
        """Whether a prompt is to be found and is not found yet."""
        return is_auto(self.prompt) and self.found_prompt is None

    def parse_prompt(self) -> Prompt | None:
        """The prompt, with its words as written; None where there is none, or none yet, see `awaits_prompt`."""
        if self.prompt is not None:
            written = parse_prompt(self.prompt, self.label_words, self.prompt_head or HEADS[0])
            return written if self.found_prompt is None else Prompt.from_values(self.found_prompt)
        for name in ("label_words", "prompt_head"):
            if getattr(self, name) is not None:
                _refuse(self, name, f"there is no prompt. Give one, or leave `{name}` out.")
        return None


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """The method, and what its own configuration is given: by options that methods share, else by `settings`."""

    method: str = option(
        METHOD,
        "How the model is trained; peft:TYPE is any type of adapter of PEFT",
        "siva",
        choices=METHODS,
        common=True,
    )
    targets: str | None = option(
        METHOD,
        "Layers to adapt: names joined by commas, all-linear or a regular expression; query, key and value mean these "
        "projections on any model",
        unset="the method's",
        metavar="LAYERS",
    )
    rank: int | None = option(METHOD, "Rank of the adapter", least=1, unset="the method's")
    window: int | None = option(METHOD, "Backbone features that each block of k-lst reads, odd", least=1, unset="9")
    reduction: int | None = option(
        METHOD, "How many times narrower than the backbone a side network is", least=1, unset="8"
    )
    cache_features: str | None = option(
        ADVANCED,
        "Folder in which to cache the features of the frozen backbone; every run with k-lst or lst reuses them",
        metavar="DIR",
        folder=True,
        unset="computed in every epoch",
    )
    settings: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Further fields of the method's configuration or of transformers.TrainingArguments"},
    )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Steps, rates and precision."""

    epochs: float | None = option(TRAINING, "Passes over the training rows", unset="the method's recipe", common=True)
    max_steps: int | None = option(TRAINING, "Optimizer steps, in place of `epochs`", least=1)
    batch_size: int = option(
        TRAINING, "Rows per step, over all processes of a launcher such as torchrun", 16, least=1, common=True
    )
    learning_rate: float | None = option(
        TRAINING, "Learning rate at the peak of the schedule", unset="the method's recipe", metavar="RATE", common=True
    )
    head_learning_rate: float | None = option(
        TRAINING, "Learning rate of a new head at the peak of the schedule", unset="the method's recipe", metavar="RATE"
    )
    packing: bool = option(
        TRAINING,
        "With the objective causal, pack short texts into rows of `max_length` tokens; no text attends to another",
        False,
    )
    class_weights: str | None = option(
        TRAINING,
        "Weight the classes in the loss so that each has the same share: by n / (k count) for n rows, k classes and "
        "count rows of the class",
        choices=("balanced",),
        unset="each row counts the same",
        metavar="HOW",
    )
    seed: int = option(TRAINING, "Random seed of the new head, the order of rows and dropout", 0, most=_HIGHEST_SEED)
    bf16: bool | None = option(
        TRAINING,
        "Compute in bfloat16 by autocast; weights that train stay in float32",
        unset="on when computing on a CPU with bfloat16 instructions, except by MeZO; else off",
    )
    optimizer_in_backward: bool = option(
        ADVANCED,
        "Update each parameter during the backward pass and free its gradient at once; gradients are not clipped",
        False,
    )
    deterministic: bool = option(ADVANCED, "Use deterministic kernels only", False)


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """The folder of a run, and the checkpoints in it."""

    output: str = option(
        OUTPUT,
        "Folder of the run; on the command line runs/METHOD-DATA is the default",
        MISSING,
        metavar="DIR",
        letter="o",
        common=True,
    )
    save_steps: int | None = option(OUTPUT, "Save a checkpoint every N steps", least=1, unset="none")
    metric: str | None = option(
        OUTPUT,
        "Keep the checkpoint with the best value of this metric on the dev rows, such as accuracy, f1 (of the "
        "second of two classes, else the mean over classes), pearson or loss",
        unset="the weights after the last step",
    )
    patience: int | None = option(
        OUTPUT, "Early stopping: end after N checkpoints in a row without a better `metric`", least=1, unset="never"
    )
    report_to: str | None = option(
        OUTPUT,
        "Also log to this service or library; TensorBoard's files are in the folder logs of the run",
        choices=REPORTERS,
        unset="none",
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(OutputConfig, TrainingConfig, MethodConfig, ModelConfig, DataConfig):
    """All that decides a run, of five parts under flat names; `run.json` holds it.

    Raises:
        FastpeftError: a value is of another type or out of its range.

    Example:
        >>> TrainConfig(output="runs/lora", method="lora", epochs=2).batch_size
        16
    """

    def __post_init__(self) -> None:
        for objective, problem in OBJECTIVES.items():
            if self.problem_type == problem.name:
                _refuse(self, "problem_type", f"this has no labels. Give `objective` {objective} instead.")
        self._check_each()
        if self.model is None:
            model = DEMO if self.init_from is None else earlier_run(self.init_from).config()["model"]
            object.__setattr__(self, "model", model)
        if not is_auto(self.prompt):
            object.__setattr__(self, "found_prompt", None)
        self._check_together()

    def _check_each(self) -> None:
        """Check every value by its option, and keep it as files have it."""
        for known in options():
            value = getattr(self, known.name)
            value = str(value) if isinstance(value, Path) else value
            if not known.takes(value):
                if isinstance(value, str) and value.startswith(PREFIX):
                    raise unknown(value)
                advice = did_you_mean(value, known.choices) if isinstance(value, str) else _advice(known, value)
                raise FastpeftError(f"`{known.name}` is {_in_short(value)}; it must be {known.allowed}.{advice}")
            object.__setattr__(self, known.name, copy.deepcopy(value))  # of dictionaries, which the caller may change

    def _check_together(self) -> None:
        """Raise `FastpeftError` where values do not go together."""
        measured = (*TITLES, LOSS)
        given = [name for name in FOR_LABELS if getattr(self, name) is not None] if self.objective is not None else []
        without_labels = f"the objective {self.objective!r} learns from texts without labels. Remove one of the two."
        conflicts: list[tuple[str, str]] = [(name, without_labels) for name in given]
        if self.cache_features is not None:
            conflicts.append(("cache_features", self._why_not_cached()))
        if self.in_bfloat16:
            conflicts.append(("dtype", self.why_not_in_bfloat16))
        if self.packing:
            conflicts.append(("packing", self._why_not_packed()))
        if self.metric is not None and self.metric not in measured:
            close = did_you_mean(self.metric, measured)
            allowed = f"Choose one of {', '.join(measured)}.{close}"
            conflicts.append(("metric", f"nothing of that name is measured. {allowed}"))
        if self.metric is not None and self.save_steps is None:
            conflicts.append(
                ("metric", "there are no checkpoints to choose from. Say by `save_steps` how often to save one.")
            )
        if self.patience is not None and self.metric is None:
            conflicts.append(("patience", "there is no metric to watch. Name one, or leave `patience` out."))
        for name, reason in conflicts:
            if reason:
                _refuse(self, name, reason)
        self.parse_prompt()

    def _why_not_packed(self) -> str:
        """Why texts cannot be packed; empty where they can."""
        if self.objective != "causal":
            return "only texts of the objective causal can be packed. Remove `packing`."
        if get_method(self.method, self.settings).frozen_features:
            return "a side network cannot tell packed texts apart. Remove `packing`, or choose siva or lora."
        return ""

    def _why_not_cached(self) -> str:
        """Why there are no features to cache; empty where there are."""
        method = get_method(self.method, self.settings)
        if not method.frozen_features:
            return (
                f"the method {self.method!r} has no frozen features: its layers change as it trains, or gradients pass "
                "through them. Remove `cache_features`, or choose k-lst, lst, or mezo over one of them."
            )
        if SIVA_LAYERS in self.settings:
            return f"with {SIVA_LAYERS} features of the backbone change at every step. Leave out either."
        if self.objective == "mlm":
            return "the objective mlm hides other words in every epoch. Leave out either."
        return ""

    @property
    def why_not_in_bfloat16(self) -> str:
        """Why the model's weights cannot be kept in bfloat16; empty where they can."""
        method = get_method(self.method, self.settings)
        if method.zeroth_order:
            return "the two losses that MeZO compares differ by less than a rounding to bfloat16. Leave `dtype` out."
        if method.saves_model:
            return (
                f"the method {self.method!r} saves the whole model, which stays in float32. Leave `dtype` out, or "
                "choose a method that saves what it trained alone, such as siva, lora or lst."
            )
        if self.init_from is not None:
            return "the run that it starts from is merged into weights in float32. Leave `dtype` out."
        if self.bf16 is False or self.settings.get("fp16"):
            return "it takes `bf16`, which is off, or has fp16 in its place. Turn it on, or leave `dtype` out."
        return ""

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> TrainConfig:
        """A configuration from names and values, as `values` gives them; see `from_file` for a `run.json`."""
        known = [item.name for item in dataclasses.fields(cls)]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise FastpeftError(
                f"unknown name {unknown[0]!r} in a run's configuration; allowed are {', '.join(known)}."
                f"{did_you_mean(unknown[0], known)}"
            )
        if "output" not in values:
            raise FastpeftError("a run's configuration needs an output: the folder to write to.")
        return cls(**values)

    @classmethod
    def from_file(cls, file: str | Path) -> TrainConfig:
        """The configuration in a `run.json`; an `output` that is no whole path is seen from the working folder."""
        return cls.from_values(read_config(Path(file)))

    def values(self) -> dict[str, Any]:
        """Names and values, as `run.json` holds them: with absolute paths of local files, to be found from anywhere."""
        given = dataclasses.asdict(self)
        folders = [known.name for known in options() if known.folder and given[known.name] is not None]
        paths = {name: _resolved(path_of(given[name])) for name in folders}
        return {**given, **paths, "model": _anchored(self.model), "data": _anchored(self.data)}


def check_config(config: Any) -> None:
    """Raise `FastpeftError` unless it is a `TrainConfig`."""
    if not isinstance(config, TrainConfig):
        raise FastpeftError(
            f"`config` is a {type(config).__name__}; it must be a TrainConfig. Make one by TrainConfig(...), of a "
            "dictionary by TrainConfig.from_values, or of a file by TrainConfig.from_file."
        )


@cache
def options() -> tuple[Option, ...]:
    """The fields of `TrainConfig` in their order, with what is said of each."""
    kinds = get_type_hints(TrainConfig)
    found = []
    for item in dataclasses.fields(TrainConfig):
        kind = get_args(kinds[item.name])[0] if isinstance(kinds[item.name], UnionType) else kinds[item.name]
        found.append(Option(item.name, get_origin(kind) or kind, item.default, **item.metadata))
    return tuple(found)


TrainConfig.__doc__ = f"{TrainConfig.__doc__}\n    Attributes:\n" + "".join(
    f"        {known.name}: {known.text()}\n" for known in options()
)


def parse_value(text: str) -> Any:
    """A value as written on a command line: JSON where it can be, else text."""
    try:
        return parse_json(text)
    except ValueError:
        return text


def _anchored(name: str) -> str:
    """The absolute path of a local file or folder; any other name as it is."""
    path = path_of(name)
    return _resolved(path) if name != DEMO and path.exists() else name


def _resolved(path: Path) -> str:
    """A path as an absolute one, which `run.json` can hold."""
    whole = str(path.resolve())
    if not is_text(whole):
        raise FastpeftError(f"the path {whole!r} is not in UTF-8. Rename its folders, or work in others.")
    return whole


def _is_json_object(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()  # as it is written
    except (TypeError, ValueError):
        return False
    return isinstance(value, dict)
