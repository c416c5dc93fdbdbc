"""A configuration brought to life: its data as tokens, and its model made ready by its method."""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from transformers import set_seed

from fastpeft.data import packed_rows, result_warnings
from fastpeft.data.examples import TextData, load_data
from fastpeft.data.masking import Masker
from fastpeft.data.next_words import end_of_turn
from fastpeft.data.problems import MASKED_WORDS, NEXT_WORDS, OBJECTIVES
from fastpeft.data.splitting import digest
from fastpeft.data.token_rows import TokenRow, TokenRows
from fastpeft.errors import FastpeftError
from fastpeft.methods.method import Method
from fastpeft.models import LoadedModel
from fastpeft.ops.frozen_linear import set_packing
from fastpeft.ops.fused_head import fuse_any_head
from fastpeft.support.stages import report
from fastpeft.training.config import DataConfig, TrainConfig
from fastpeft.training.encoding import DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH_CAUSAL, Encoder
from fastpeft.training.loading import continue_earlier, earlier_context, load_start, new_head
from fastpeft.training.prompt_search import search_prompt
from fastpeft.training.run_folder import RunFolder
from fastpeft.training.setup import RunSetup, check_reporter, resolve, training_device

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """What a run works on.

    Attributes:
        model: the module to train, with what trains requiring gradients.
        new_head: names of the modules of a head that begins at random; a method may have put them into others.
        train_rows, dev_rows: the texts as tokens, not padded; where masked words are learned, they are hidden in the
            dev rows alone; with `packing` those to train on are joined.
        max_length: where texts were cut, in tokens.
        warnings: about these texts; the result has them too.
    """

    setup: RunSetup
    model: Any
    new_head: tuple[str, ...]
    tokenizer: Any
    data: TextData
    train_rows: TokenRows
    dev_rows: TokenRows
    max_length: int
    warnings: list[str]

    @property
    def num_train_texts(self) -> int:
        """How many texts it trains on, of which joined rows have several."""
        return sum(map(packed_rows.texts_of, self.train_rows))

    @cached_property
    def trained_on(self) -> set[str]:
        """Digests of the texts that the run trains on, and of those that what it starts from was trained on."""
        start = self.config.init_from
        earlier = set() if start is None else RunFolder(start).trained_on()
        return earlier.union(map(digest, self.data.train.texts))

    @classmethod
    def load(cls, config: TrainConfig) -> Task:
        """Load all that `config` names."""
        check_reporter(config)
        plan = resolve(config)
        report("reading data")
        data = data_for(config)
        setup = plan.for_data(data)  # refuses before a prompt is searched for, which takes its time
        if config.awaits_prompt:
            found = search_prompt(plan.config, data, config.max_length or DEFAULT_MAX_LENGTH)
            setup = dataclasses.replace(plan, config=found).for_data(data)
        report("loading the model")
        loaded = draw_start(setup)
        of_head = new_head(loaded, setup)  # refuses before a model is prepared, which takes its time
        usual = DEFAULT_MAX_LENGTH_CAUSAL if data.problem is NEXT_WORDS else DEFAULT_MAX_LENGTH
        own_tokens = setup.method.own_tokens(setup.preparation)
        max_length = _max_length(config, usual, loaded.max_length, own_tokens)
        report("encoding texts")
        encoder = Encoder(loaded.tokenizer, max_length, setup.prompt, data.problem)
        (train_rows, dev_rows), warnings = _encode(data, encoder, loaded.max_length - own_tokens)
        context = earlier_context(config)
        if context is None and (count := setup.method.examples(setup.preparation)):
            context, train_rows = _take_examples(train_rows, count, config.seed)
        if context is not None:
            _check_room(context, chain(train_rows, dev_rows), config.model, loaded.max_length)
            max_length = min(max_length, loaded.max_length - len(context))
            setup = setup.after(context)
        if data.problem is MASKED_WORDS:
            dev_rows = Masker(loaded.tokenizer).fixed(dev_rows)
        report("preparing the model")
        model = prepare(loaded, setup)
        if config.packing:
            packed_rows.prepare_for_joined_rows(model, train_rows, str(config.model))
            train_rows = packed_rows.pack(train_rows, max_length)
        if data.problem.of_texts_alone:
            fuse_any_head(model)
        if training_device(setup.arguments) == "cpu" or not config.pack_weights:
            set_packing(model, config.pack_weights)
        return cls(
            setup,
            model,
            of_head,
            loaded.tokenizer,
            data,
            train_rows,
            dev_rows,
            max_length,
            warnings,
        )

    @property
    def config(self) -> TrainConfig:
        """Where it all came from, with the prompt that was found for it."""
        return self.setup.config

    @property
    def method(self) -> Method:
        return self.setup.method

    @property
    def head_learning_rate(self) -> float | None:
        """The peak of a new head's learning rate; None where no head is new, or it trains as all else does."""
        return (self.config.head_learning_rate or self.setup.recipe.head_learning_rate) if self.new_head else None

    @property
    def metric(self) -> str:
        """The metric to look at while training, and to choose by where that is wanted."""
        return self.config.metric or self.data.problem.primary


def _encode(data: TextData, encoder: Encoder, model_reads: int) -> tuple[list[TokenRows], list[str]]:
    """The rows of each part of `data`, and the warnings about its texts, which are told too."""
    rows, counts = zip(*map(encoder.encode_counted, data.parts))
    for part, of_part in zip((data.train, data.dev), rows):
        encoder.warn_of_texts(part, of_part)
    texts = sum(map(len, data.parts))
    warnings = list(dict.fromkeys(warning for part in data.parts for warning in part.warnings))  # of all parts once
    warnings += result_warnings.of_cut_texts(
        sum(counts), texts, texts - sum(map(len, rows)), encoder.max_length, model_reads
    )
    if data.train.are_conversations and not end_of_turn(encoder.tokenizer):
        warnings += result_warnings.of_endless_turns()
    for warning in warnings:  # while there is time to stop
        logger.warning("%s", warning)
    return list(rows), warnings


def _check_room(context: Sequence[int], rows: Iterable[TokenRow], model: str, model_reads: int) -> None:
    """Raise `FastpeftError` where the model cannot read the longest row after `context`."""
    longest = max(len(row["input_ids"]) for row in rows)
    if len(context) + longest > model_reads:
        raise FastpeftError(
            f"the examples have {len(context):,} tokens, and texts up to {longest:,} after them, but the model "
            f"{model!r} reads {model_reads:,}. Give fewer, or a smaller `max_length`."
        )


def _take_examples(rows: TokenRows, count: int, seed: int) -> tuple[list[int], TokenRows]:
    """The tokens of some rows, drawn by `seed`, one row after the other; and the rows that are left."""
    if count >= len(rows):
        raise FastpeftError(f"examples is {count}, but there are {len(rows)} rows to train on. Give fewer.")
    chosen = random.Random(seed).sample(range(len(rows)), count)
    left = set(range(len(rows))).difference(chosen)
    tokens = [token for row in chosen for token in rows[row]["input_ids"]]
    return tokens, TokenRows(rows[row] for row in sorted(left))


def data_for(config: DataConfig) -> TextData:
    """The rows of a run with `config`."""
    return load_data(
        config.data,
        problem_type=config.problem_type if config.objective is None else OBJECTIVES[config.objective].name,
        text_column=config.text_column,
        label_column=config.label_column,
        split_seed=config.split_seed,
    )


def draw_start(setup: RunSetup) -> LoadedModel:
    """What `load_start` loads, with the new head that a run draws."""
    set_seed(setup.config.seed)
    return load_start(setup)


def prepare(start: LoadedModel, setup: RunSetup) -> Any:
    """The module that a run trains, made of what `draw_start` loaded, as it is before the first step."""
    preparation = dataclasses.replace(setup.preparation, head=start.head, trains_head=start.trains_head)
    model = setup.method.prepare(start.model, preparation)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise FastpeftError(
            f"the method {setup.method.name!r} finds nothing to train in the model {setup.config.model!r}, whose head "
            "or biases, if it has some, do not train. Choose another method, as siva or lora."
        )
    if rounded := [
        name for name, each in model.named_parameters() if each.requires_grad and each.dtype is torch.bfloat16
    ]:
        raise FastpeftError(
            f"{rounded[0]} would train in bfloat16, in which small steps are lost. Leave `dtype` out, or change the "
            "setting by which it trains."
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
        raise FastpeftError(
            f"the model {config.model!r} reads {reads} tokens{before}. Choose a smaller num_virtual_tokens."
        )
    max_length = config.max_length or min(usual, limit)
    if max_length > limit:
        raise FastpeftError(
            f"`max_length` {max_length} is above what the model {config.model!r} reads: {reads} tokens{before}. Choose "
            f"{limit} tokens or less."
        )
    return max_length
