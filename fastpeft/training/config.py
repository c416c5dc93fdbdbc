"""All that decides a training run, in one record."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from fastpeft.data.examples import DEMO
from fastpeft.data.problems import MASKED_WORDS, OBJECTIVES, get_problem
from fastpeft.data.splitting import SPLITS, STRATIFIED
from fastpeft.errors import FastpeftError
from fastpeft.methods.method import Method
from fastpeft.methods.registry import get_method
from fastpeft.methods.side_network import SIVA_LAYERS
from fastpeft.prompts.named import is_auto, parse_prompt
from fastpeft.prompts.template import HEADS, Prompt, is_text
from fastpeft.support.files import parse_json
from fastpeft.training.run_folder import earlier_run, read_config

_TEXTS = (
    "objective",
    "problem_type",
    "targets",
    "metric",
    "text_column",
    "label_column",
    "prompt",
    "label_words",
    "prompt_head",
)

FOR_LABELS = ("problem_type", "label_column", "prompt", "label_words", "prompt_head")  # without sense for an objective


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All that decides a run; `run.json` holds it.

    Attributes:
        output: folder of the run.
        method: a name of the registry `fastpeft.methods`.
        model: `"demo"`, a folder or a hub id. None: `"demo"`, or the model of the run that `init_from` names.
        init_from: folder of a finished run, to train on with what it left: the weights of a whole model, an adapter
            merged into its base, or a side network, which only a method with the same side network goes on with. None:
            `model` as it is.
        data: `"demo"`, a csv, tsv, jsonl or parquet file, a folder with `train.*` and perhaps `dev.*`, or a data set
            of the hub, `owner/name` or `owner/name:configuration`.
        objective: `mlm` to learn masked words of the texts, whose labels are not read, also of a txt file with a text a
            line; another run goes on with what this one leaves by `init_from`. None: the labels.
        problem_type: `single_label_classification`, `regression` or `token_classification`. None: told by the data.
        targets: layers to adapt: names joined by commas, `all-linear` or a regular expression. None: the method's.
        rank: rank of the adapter. None: the method's.
        window: backbone features that each block of a side network reads, odd. None: the method's.
        reduction: how many times narrower than the backbone a side network is. None: the method's.
        epochs: passes over the training rows. None: the recipe's.
        max_steps: optimizer steps, in place of `epochs`.
        batch_size: rows a step, which the processes of a launcher share; one process takes so many on each device.
        learning_rate: peak rate of AdamW, or the rate of MeZO. None: the recipe's.
        max_length: longest text in tokens; what is longer is cut. None: 128, or the model's limit where that is less.
        seed: decides the new head, the order of rows and dropout.
        split_seed: decides which rows become the dev part where the data has none.
        split: how they are chosen: `stratified`, every class on both sides and equal texts on one; or `shuffled`, as in
            runs whose `run.json` does not say.
        save_steps: a checkpoint every so many steps. None: none.
        metric: the result is the checkpoint that is best by this metric of the dev rows, or by `loss`. None: the
            weights after the last step.
        patience: the run ends where `metric` was not better than before for so many checkpoints in a row. None: it
            goes on to its last step.
        prompt: a template, a name of `fastpeft.prompts.named.NAMED_PROMPTS`, `auto` to find one for
            `model` on training rows, or `none`. None: no prompt.
        label_words: the prompt's words, `terrible,great` in the order of the classes or `negative=terrible,...`. None:
            those of the named prompt.
        prompt_head: `label_words` or `classifier`, see `fastpeft.Prompt`. None: `label_words`.
        found_prompt: what was found for `auto`, as a run's `run.json` holds it, so that its repetition does not search
            again. None: it is searched for. Dropped where `prompt` is another.
        cache_features: folder in which a frozen backbone's features are kept, for methods with a side network: rows
            found there are not computed again, in any run. None: they are computed in every epoch.
        cache_dtype: what features are rounded to, `bfloat16`, `float32` or `int8`. None: `bfloat16`. Rounding decides
            the result, so a run is resumed with the values it was started with; what the folder holds does not.
        bf16: compute in bfloat16 by autocast; weights stay in float32.
        optimizer_in_backward: the optimizer steps during backward and frees the gradients that it has used, see
            `fastpeft.training.optimizer_in_backward`. Gradients are then not clipped by their norm.
        deterministic: only deterministic kernels.
        text_column, label_column: columns of the data, of pairs of texts two joined by a comma. None: found by name.
        settings: further fields of the method's configuration or of `transformers.TrainingArguments`.

    Raises:
        FastpeftError: a value is of another type or out of its range.

    Example:
        >>> TrainConfig(output="runs/lora", method="lora", epochs=2).batch_size
        16
    """

    output: str
    method: str = "siva"
    model: str = None  # type: ignore[assignment]  # always filled in
    init_from: str | None = None
    data: str = DEMO
    objective: str | None = None
    problem_type: str | None = None
    targets: str | None = None
    rank: int | None = None
    window: int | None = None
    reduction: int | None = None
    epochs: float | None = None
    max_steps: int | None = None
    batch_size: int = 16
    learning_rate: float | None = None
    max_length: int | None = None
    seed: int = 0
    split_seed: int = 0
    split: str = STRATIFIED
    save_steps: int | None = None
    metric: str | None = None
    patience: int | None = None
    prompt: str | None = None
    label_words: str | None = None
    prompt_head: str | None = None
    found_prompt: dict[str, Any] | None = None
    cache_features: str | None = None
    cache_dtype: str | None = None
    bf16: bool = False
    optimizer_in_backward: bool = False
    deterministic: bool = False
    text_column: str | None = None
    label_column: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            self._check(item.name, not isinstance(value, str) or is_text(value), "text in UTF-8")
        for name in ("init_from", "cache_features"):
            value = getattr(self, name)
            self._check(name, isinstance(value, (str, NoneType)) and value != "", "a folder's name")
        if self.model is None:
            model = DEMO if self.init_from is None else earlier_run(self.init_from).config()["model"]
            object.__setattr__(self, "model", model)
        for name in ("output", "method", "model", "data"):
            self._check(name, isinstance(value := getattr(self, name), str) and value != "", "a text that is not empty")
        for name in _TEXTS:
            self._check(name, isinstance(getattr(self, name), (str, type(None))), "a text")
        whole = {
            "rank": 1,
            "window": 1,
            "reduction": 1,
            "max_steps": 1,
            "batch_size": 1,
            "max_length": 2,
            "save_steps": 1,
            "patience": 1,
        }
        for name, least in whole.items():
            value = getattr(self, name)
            optional = value is None and name != "batch_size"
            self._check(name, optional or (_is_whole(value) and value >= least), f"a whole number from {least}")
        for name in ("epochs", "learning_rate"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
            self._check(name, value is None or number, "a number above 0")
        for name in ("seed", "split_seed"):
            value = getattr(self, name)
            self._check(name, _is_whole(value) and 0 <= value < 2**32, "a whole number from 0 to 2^32 - 1")
        self._check("split", self.split in SPLITS, " or ".join(SPLITS))
        for name in ("bf16", "optimizer_in_backward", "deterministic"):
            self._check(name, isinstance(getattr(self, name), bool), "true or false")
        self._check("settings", _is_json_object(self.settings), "an object of names and values that JSON can hold")
        self._check_cache(get_method(self.method, self.settings))
        if self.objective is not None:
            self._check_objective()
        if self.problem_type is not None and get_problem(self.problem_type) is MASKED_WORDS:
            raise FastpeftError(
                f"problem_type is {self.problem_type!r}, which has no labels. Give objective mlm instead."
            )
        if self.metric is not None and self.save_steps is None:
            raise FastpeftError(
                f"metric is {self.metric!r}, by which the best checkpoint is kept, but there are no checkpoints. Say "
                "by save_steps how often to save one."
            )
        if self.patience is not None and self.metric is None:
            raise FastpeftError(
                f"patience is {self.patience}, but there is no metric that could stop getting better. Name one, or "
                "leave patience out."
            )
        if not is_auto(self.prompt):
            object.__setattr__(self, "found_prompt", None)
        found = self.found_prompt
        self._check("found_prompt", found is None or _is_json_object(found), "what run.json holds of a prompt found")
        self.parse_prompt()

    def _check(self, name: str, fits: bool, allowed: str) -> None:
        if not fits:
            raise FastpeftError(f"{name} is {getattr(self, name)!r}; it must be {allowed}.")

    def _check_cache(self, method: Method) -> None:
        from fastpeft.ladder.cache import DTYPES  # heavy

        self._check("cache_dtype", self.cache_dtype in (None, *DTYPES), f"one of {', '.join(DTYPES)}")
        if self.cache_features is not None and not method.frozen_features:
            raise FastpeftError(
                f"cache_features is {self.cache_features!r}, but the method {self.method!r} has no frozen features to "
                "keep: what its layers compute changes as it trains, or is trained through. Leave it out, or choose "
                "k-lst, lst, or mezo over one of them."
            )
        if self.cache_features is not None and SIVA_LAYERS in self.settings:
            raise FastpeftError(
                f"cache_features is {self.cache_features!r}, but {SIVA_LAYERS} trains a part of the backbone, whose "
                "features change at every step. Leave out either."
            )
        if self.cache_dtype is not None and self.cache_features is None:
            raise FastpeftError(
                f"cache_dtype is {self.cache_dtype!r}, but no features are cached. Name a folder by cache_features, or "
                "leave cache_dtype out."
            )

    def _check_objective(self) -> None:
        """Raise `FastpeftError` unless there is such an objective, and nothing that is for labels."""
        if self.objective not in OBJECTIVES:
            raise FastpeftError(
                f"objective is {self.objective!r}; it must be {', '.join(OBJECTIVES)}. Leave it out to learn labels."
            )
        if self.cache_features is not None:
            raise FastpeftError(
                f"cache_features is {self.cache_features!r}, but the objective {self.objective!r} hides other words in "
                "every epoch, whose features would be read once. Leave out either."
            )
        for name in FOR_LABELS:
            if (value := getattr(self, name)) is not None:
                raise FastpeftError(
                    f"{name} is {value!r}, but the objective {self.objective!r} learns from the texts alone. Leave out "
                    "either."
                )

    @property
    def awaits_prompt(self) -> bool:
        """Whether a prompt is to be found and is not found yet."""
        return is_auto(self.prompt) and self.found_prompt is None

    def parse_prompt(self) -> Prompt | None:
        """The prompt, with its words as written; None where there is none, or none yet, see `awaits_prompt`.

        Raises:
            FastpeftError: template, words or head cannot be used.
        """
        if self.prompt is not None:
            written = parse_prompt(self.prompt, self.label_words, self.prompt_head or HEADS[0])
            return written if self.found_prompt is None else Prompt.from_values(self.found_prompt)
        for name in ("label_words", "prompt_head"):
            if (value := getattr(self, name)) is not None:
                raise FastpeftError(f"{name} is {value!r}, but there is no prompt. Give one, or leave {name} out.")
        return None

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> TrainConfig:
        """A configuration from names and values, as a `run.json` holds them."""
        known = [item.name for item in dataclasses.fields(cls)]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise FastpeftError(
                f"unknown name {unknown[0]!r} in a run's configuration; allowed are {', '.join(known)}."
            )
        if "output" not in values:
            raise FastpeftError("a run's configuration needs an output: the folder to write to.")
        return cls(**values)

    @classmethod
    def from_file(cls, file: str | Path) -> TrainConfig:
        """The configuration in a `run.json`."""
        return cls.from_values(read_config(Path(file)))

    def values(self) -> dict[str, Any]:
        """Names and values, as `run.json` holds them: with absolute paths of local files, to be found from anywhere."""
        folders = {
            name: None if (folder := getattr(self, name)) is None else str(Path(folder).expanduser().resolve())
            for name in ("init_from", "cache_features")
        }
        paths = {"model": _anchored(self.model), "data": _anchored(self.data), **folders}
        return dataclasses.asdict(self) | paths


def parse_value(text: str) -> Any:
    """A value as written on a command line: JSON where it can be, else text."""
    try:
        return parse_json(text)
    except ValueError:
        return text


def _anchored(name: str) -> str:
    """The absolute path of a local file or folder; any other name as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if name != DEMO and path.exists() else name


def _is_json_object(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()  # as it is written
    except (TypeError, ValueError):
        return False
    return isinstance(value, dict)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
