"""How the model of a run is found and put together: its base, and on it an adapter, a side network or a prompt."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastpeft.data.models import Classifier, load_classifier, load_for_masked_words
from fastpeft.data.problems import CLASSIFICATION, MASKED_WORDS, Problem, get_problem
from fastpeft.errors import FastpeftError
from fastpeft.ladder import LadderModel
from fastpeft.ladder.direct_run import DirectRun
from fastpeft.ladder.saving import with_adapter
from fastpeft.methods.adapters import merge
from fastpeft.methods.registry import SIVA_LAYERS, get_method
from fastpeft.methods.saved_adapters import check_weights
from fastpeft.prompts.model import PromptModel, load_prompted
from fastpeft.prompts.template import Prompt
from fastpeft.support.adapter_files import check_file
from fastpeft.training.config import TrainConfig
from fastpeft.training.run_folder import RunFolder, earlier_run

logger = logging.getLogger(__name__)


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
        """Whether it is the head of a masked language model: its words, or label words among them, are the outputs."""
        return self.problem is MASKED_WORDS or (self.prompt is not None and self.prompt.head == "label_words")

    def can_take_over(self, earlier: Head) -> bool:
        """Whether the weights of an earlier head can stay: one for words whatever the classes, else for the same."""
        if self.by_words or earlier.by_words:
            return self.by_words and earlier.by_words
        return self.labels == earlier.labels and self.problem is earlier.problem

    @classmethod
    def of(cls, config: TrainConfig, labels: Sequence[str], problem: Problem) -> Head:
        """The head of a run with `config` on data with `labels`.

        Raises:
            FastpeftError: `problem` does not go with the prompt, or a class has no word.
        """
        prompt = config.parse_prompt()
        if prompt is not None and problem.per_token:
            raise FastpeftError(
                f"the prompt {prompt.template!r} is for texts, but the data has a tag for every word. Leave it out."
            )
        if prompt is not None and problem is not CLASSIFICATION and prompt.head == "label_words":
            raise FastpeftError(
                f"the prompt {prompt.template!r} answers by label words, which stand for classes, but this is "
                f"{problem.name}. Add --prompt-head classifier, or leave it out."
            )
        return cls(list(labels), None if prompt is None else prompt.for_labels(labels), problem)


@dataclass(frozen=True)
class FinishedRun:
    """A run's model, on the best device there is, with what the run's folder says of it.

    Attributes:
        classifier: model and tokenizer.
        config: how the run was started.
        problem: what it learned.
        labels: names of the model's outputs: its classes or tags, or what its number is.
        is_pair: whether it reads two texts a row.
        prompt: what texts are put into; None for the texts alone.
        max_length: where texts are cut, in tokens.
    """

    classifier: Classifier
    config: TrainConfig
    problem: Problem
    labels: list[str]
    is_pair: bool
    prompt: Prompt | None
    max_length: int


def load_run(folder: str | Path) -> FinishedRun:
    """Load the classifier of a finished run.

    Raises:
        FastpeftError: the folder holds no finished run, or its files, its base model or the run that it started from
            cannot be loaded.
    """
    run = assemble(RunFolder(folder))
    run.classifier.model.to(best_device())
    return run


def assemble(folder: RunFolder) -> FinishedRun:
    """The run in `folder`, on the CPU: an adapter that is merged next has the bits there that it had in training."""
    config, head = outline(folder)
    method = get_method(config.method, config.settings)
    if method.adapts or method.ladder:
        folder.check_start()
        base = load_start(config, head)
        model = base.model if method.base is None else method.base(base.model)
        load = _load_adapter if method.adapts else partial(_load_ladder, direct=method.direct)
        classifier = Classifier(load(folder.path, model), base.tokenizer, base.head)
    else:
        classifier = load_model(str(folder.path), head)
    classifier.model.eval()
    metrics = folder.metrics()
    return FinishedRun(
        classifier, config, head.problem, head.labels, metrics["pairs"], head.prompt, metrics["max_length"]
    )


def outline(folder: RunFolder) -> tuple[TrainConfig, Head]:
    """Configuration and head of a finished run."""
    metrics = folder.metrics()
    config = TrainConfig.from_values(folder.config())
    return config, Head.of(config, metrics["labels"], get_problem(metrics["problem_type"]))


def load_start(config: TrainConfig, head: Head) -> Classifier:
    """Load the model that a run with `config` goes on from, before its method has prepared it.

    That is its `model`, with the weights of the run that it starts from: whole ones, or those of a base with its
    adapter merged. A side network left its backbone as it was; `begin_from_earlier` puts it back. An adapter that
    trained beside it is merged, unless it is to train on. The head is that run's where it is of the same kind and for
    the same classes.

    Raises:
        FastpeftError: the model or the earlier run cannot be loaded, or the two do not go together.
    """
    if config.init_from is None:
        return load_model(config.model, head)
    folder = earlier_run(config.init_from)
    earlier, earlier_head = outline(folder)
    if config.values()["model"] != earlier.values()["model"]:
        raise FastpeftError(
            f"the model is {config.model!r}, but the run in {config.init_from!r} trained {earlier.model!r}. Leave the "
            "model out."
        )
    method = get_method(earlier.method, earlier.settings)
    if method.ladder:
        if not get_method(config.method, config.settings).ladder:
            same = earlier.settings.get("over", earlier.method)
            raise FastpeftError(
                f"the run in {config.init_from!r} trained a side network and left its backbone as it was, so "
                f"{config.method!r} has nothing to start from. Choose a method with the same side network, {same} or "
                f"mezo with --set over={same}, or leave init_from out."
            )
        start = load_start(earlier, head)
        adapted, wanted = (run.settings.get(SIVA_LAYERS) for run in (earlier, config))
        if adapted is None or adapted == wanted:
            return start
        if wanted is not None:
            raise FastpeftError(
                f"{SIVA_LAYERS} is {wanted}, but the run in {config.init_from!r} had {adapted}. Give that, or leave it "
                "out to merge what was trained into the backbone."
            )
        return _merge_adapter(start, folder.path)
    method.check_merges(f"the run in {config.init_from!r}")
    start = load_model(config.model, head)
    trained = assemble(folder).classifier.model
    if method.adapts:
        trained = merge(trained)
    if head.can_take_over(earlier_head):
        inside_prompt(start.model).load_state_dict(inside_prompt(trained).state_dict())
    else:  # of two kinds of head one may lack a pooler
        weights = inside_prompt(trained).base_model.state_dict()
        inside_prompt(start.model).base_model.load_state_dict(weights, strict=False)
    _name_after(start.model, folder.path)
    return start


def _merge_adapter(start: Classifier, folder: Path) -> Classifier:
    """`start` with the adapter that was trained beside a side network in `folder` merged into it."""

    def merged(base: Any) -> Any:
        return merge(with_adapter(base, str(folder)))

    model = start.model.around(merged) if isinstance(start.model, PromptModel) else merged(start.model)
    _name_after(model, folder)
    return dataclasses.replace(start, model=model)


def _name_after(start: Any, folder: Path) -> None:
    """Name a model after the run whose weights it has: what goes onto it names what it goes onto."""
    for model in (start, inside_prompt(start)):
        model.name_or_path = model.config.name_or_path = str(folder.resolve())


def begin_from_earlier(model: Any, config: TrainConfig, head: Head) -> None:
    """Give a prepared model the side network of the run that `config` starts from, if that trained one.

    Raises:
        FastpeftError: the side networks differ in shape.
    """
    if config.init_from is None:
        return
    folder = earlier_run(config.init_from)
    earlier, earlier_head = outline(folder)
    if earlier_head.problem is head.problem and (earlier_head.prompt is None) != (head.prompt is None):
        given = "a prompt, this one has none" if head.prompt is None else "no prompt, this one has"
        logger.info("the run in %s had %s", config.init_from, given)
    if get_method(earlier.method, earlier.settings).ladder:
        inside_prompt(model).take_over(folder.path, head=head.can_take_over(earlier_head))


def inside_prompt(model: Any) -> Any:
    """What a prompt was put around, or the model itself where there is none."""
    return model.masked_lm if isinstance(model, PromptModel) else model


def load_model(model: str, head: Head) -> Classifier:
    """Load `model` with `head`: one of its own, that of masked words, or the label words of its prompt."""
    if head.problem is MASKED_WORDS:
        return load_for_masked_words(model)
    if head.prompt is not None and head.by_words:
        return load_prompted(model, head.prompt)
    return load_classifier(model, head.labels, head.problem)


def best_device() -> torch.device | str:
    """The accelerator, or the CPU where there is none."""
    return torch.accelerator.current_accelerator(check_available=True) or "cpu"


def _load_adapter(folder: Path, base: Any) -> Any:
    from peft import PeftModel

    check_file(folder)
    try:
        model = PeftModel.from_pretrained(base, str(folder))
    except FastpeftError as error:
        raise FastpeftError(f"cannot load the adapter in {str(folder)!r}: {error}") from error
    except Exception as error:  # a broken file surfaces as almost any type
        raise FastpeftError(f"cannot load the adapter in {str(folder)!r}: {error} Train it anew.") from error
    check_weights(model, folder)
    return model


def _load_ladder(folder: Path, base: Any, direct: bool) -> Any:
    def beside(model: Any) -> LadderModel:
        ladder = LadderModel.from_pretrained(folder, base=model)
        if direct:
            ladder.side_run = DirectRun
        return ladder

    return base.around(beside) if isinstance(base, PromptModel) else beside(base)
