"""How the model of a run is found and put together: its base, and on it an adapter, a side network or a prompt."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastpeft.data.problems import MASKED_WORDS, NEXT_WORDS, Problem
from fastpeft.data.token_rows import TokenRow
from fastpeft.errors import FastpeftError, NotEnoughMemoryError, first_line, is_out_of_memory
from fastpeft.methods.method import OVER, EarlierRun
from fastpeft.models import LoadedModel, load_classifier, load_for_masked_words, load_for_next_words
from fastpeft.ops.frozen_linear import set_packing
from fastpeft.prompts.model import load_prompted
from fastpeft.prompts.template import Prompt
from fastpeft.support.environment import best_device
from fastpeft.support.files import read_json
from fastpeft.support.stages import report
from fastpeft.training.config import TrainConfig
from fastpeft.training.encoding import Encoder
from fastpeft.training.lineage import check_places, check_start, earlier_run
from fastpeft.training.run_folder import RunFolder
from fastpeft.training.setup import RunSetup, setup_of_run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinishedRun:
    """A run's model, with what the run's folder says of it.

    Attributes:
        labels: names of the model's outputs: its classes or tags, or what its number is.
        is_pair, chats: whether it reads two texts a row, and whether it learned conversations.
        prompt: what texts are put into; None for the texts alone.
        columns: those of texts and of labels that it learned from; None where that is not known.
    """

    loaded: LoadedModel
    config: TrainConfig
    problem: Problem
    labels: list[str]
    is_pair: bool
    chats: bool
    max_length: int
    prompt: Prompt | None = None
    columns: tuple[str | None, str | None] = (None, None)

    @classmethod
    def of(cls, setup: RunSetup, metrics: Mapping[str, Any], loaded: LoadedModel) -> FinishedRun:
        """The run of a configuration, with what its `metrics.json` says and the model that it left."""
        head = setup.head
        return cls(
            loaded,
            setup.config,
            head.problem,
            head.labels,
            is_pair=metrics["pairs"],
            chats=metrics.get("conversations", False),
            max_length=metrics["max_length"],
            prompt=head.prompt,
            columns=tuple(metrics.get("columns") or (None, None)),
        )

    @property
    def encoder(self) -> Encoder:
        """What makes texts the rows that its model reads."""
        return Encoder(self.loaded.tokenizer, self.max_length, self.prompt, self.problem)

    def autocast(self) -> torch.autocast:
        """The context in which its model computes, in bfloat16 where the run did."""
        return torch.autocast(self.loaded.model.device.type, torch.bfloat16, enabled=bool(self.config.bf16))

    def check_conversations(self) -> None:
        """Raise `FastpeftError` where the run learned from texts, to which a chat template was never put."""
        if not self.chats:
            raise FastpeftError(
                f"the run in {self.config.output!r} learned from texts, not from conversations, whose turns it never "
                "saw. Give texts, or train it on messages."
            )


class EncodedText(NamedTuple):
    """A text as a finished run is given it, and its tokens."""

    text: Any
    row: TokenRow


def load_run(folder: str | Path, device: str | None = None) -> FinishedRun:
    """Load a finished run with its model.

    Args:
        folder: folder of the run.
        device: where to put its model. None: the best there is.

    Raises:
        FastpeftError: the folder holds no finished run, or its files, its base model or the run that it started from
            cannot be loaded.
    """
    report("loading the model")
    run = assemble(RunFolder(folder))
    where = torch.device(device or best_device())
    put(run.loaded.model, where)
    if where.type == "cpu" or not run.config.pack_weights:
        set_packing(run.loaded.model, run.config.pack_weights)
    return run


def put(model: torch.nn.Module, device: str | torch.device) -> None:
    """Put a model on a device."""
    try:
        model.to(device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise NotEnoughMemoryError(
            f"memory of {device} is not enough for the model ({first_line(error).rstrip('.')}). Free some, or hide the "
            "GPU by CUDA_VISIBLE_DEVICES= to compute on the CPU."
        ) from error


def assemble(folder: RunFolder) -> FinishedRun:
    """The run in `folder`, on the CPU: an adapter that is merged next has the bits there that it had in training."""
    setup, metrics = setup_of_run(folder), folder.metrics()
    folder.check_readable()

    def start() -> LoadedModel:
        check_places(folder)
        check_start(folder)
        return load_start(setup)

    loaded: LoadedModel = setup.method.load(folder.path, start, lambda: _load_model(str(folder.path), setup))
    loaded.model.eval()
    return FinishedRun.of(setup, metrics, loaded)


def assemble_in_float32(folder: RunFolder) -> FinishedRun:
    """The run in `folder` as `assemble` has it, its frozen weights in float32: a merge into bfloat16 would round it."""
    run = assemble(folder)
    if run.config.in_bfloat16:
        run.loaded.model.float()
    return run


def load_start(setup: RunSetup) -> LoadedModel:
    """Load a run's model before its method has prepared it: `model`, with the weights of the run that it starts from.

    The head is that run's where it is of the same kind and for the same classes.
    """
    config = setup.config
    if config.init_from is None:
        return _load_model(config.model, setup)
    earlier, run = _earlier(setup)
    if config.values()["model"] != earlier.config.values()["model"]:
        raise FastpeftError(
            f"the model is {config.model!r}, but the run in {config.init_from!r} trained {earlier.config.model!r}. "
            "Leave the model out."
        )
    earlier.method.check_successor(setup.method, run)
    start: LoadedModel = earlier.method.start_later(run, setup.preparation)
    return start


def new_head(start: LoadedModel, setup: RunSetup) -> tuple[str, ...]:
    """The modules of a head that a run draws at random for its labels; none where it goes on with one."""
    goes_on = setup.config.init_from is not None and _earlier(setup)[1].same_head
    found = () if goes_on else start.new_head
    if setup.config.head_learning_rate is not None and not found:
        place = setup.config.init_from if goes_on else setup.config.model
        raise FastpeftError(
            f"`head_learning_rate` is {setup.config.head_learning_rate:g}, which is for a head that begins at random, "
            f"but {place!r} has the head of this run already. Leave it out; `learning_rate` is for the head too."
        )
    return found


def continue_earlier(model: Any, setup: RunSetup) -> None:
    """Give a prepared model what the run that it starts from trained beside its backbone, as a side network."""
    if setup.config.init_from is None:
        return
    earlier, run = _earlier(setup)
    if earlier.problem is setup.problem and (earlier.prompt is None) != (setup.prompt is None):
        given = "a prompt, this one has none" if setup.prompt is None else "no prompt, this one has"
        logger.info("the run in %s had %s", setup.config.init_from, given)
    earlier.method.continue_later(model, run)


def earlier_context(config: TrainConfig) -> list[int] | None:
    """The context of the side network that a run starts from, which it keeps; None where there is none."""
    if config.init_from is None or not (file := earlier_run(config.init_from).path / "config.json").is_file():
        return None
    context: list[int] | None = read_json(file).get("context")
    return context


def _earlier(setup: RunSetup) -> tuple[RunSetup, EarlierRun]:
    """The run that a run starts from: what its configuration came to, and what its method is told of it."""
    name = setup.config.init_from
    assert name is not None
    folder = earlier_run(name)
    earlier = setup_of_run(folder)
    in_float32 = dataclasses.replace(earlier.config, dtype=None)
    return earlier, EarlierRun(
        name=name,
        folder=folder.path,
        method=earlier.config.settings.get(OVER, earlier.config.method),
        preparation=earlier.preparation,
        same_head=setup.head.can_take_over(earlier.head),
        start=lambda: load_start(dataclasses.replace(earlier, config=in_float32, head=setup.head)),
        result=lambda: assemble_in_float32(folder).loaded.model,
        pretrained=lambda: _load_model(setup.config.model, setup),
    )


def _load_model(model: str, setup: RunSetup) -> LoadedModel:
    """Load `model` in the dtype of a run, and in float32 its head, which trains."""
    head, dtype = setup.head, torch.bfloat16 if setup.config.in_bfloat16 else torch.float32
    if head.problem is MASKED_WORDS:
        loaded = load_for_masked_words(model, dtype)
    elif head.problem is NEXT_WORDS:
        loaded = load_for_next_words(model, dtype)
    elif head.prompt is not None and head.by_words:
        loaded = load_prompted(model, head.prompt, dtype)
    else:
        loaded = load_classifier(model, head.labels, head.problem, dtype)
    for name in loaded.head:
        loaded.model.get_submodule(name).float()
    return loaded
