"""Finding a prompt: label words from the model's own predictions, templates from a small grammar (`--prompt auto`).

On a few labelled training rows, each template is filled in, and the model tells which words it expects at the mask. Of
the words that it finds most likely for a class, one is chosen for each class so that the rows come out right; the best
templates with their words are then ranked by other training rows. Nothing is trained, and dev rows are never looked at.

Source of the idea: Gao, Fisch & Chen 2021, "Making pre-trained language models better few-shot learners" (LM-BFF). Its
templates come from T5 and its last ranking from fine-tuned models; here templates come from a grammar, and both
rankings are by answers with no training.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fastpeft.data.examples import Examples, TextData
from fastpeft.data.problems import CLASSIFICATION
from fastpeft.errors import FastpeftError
from fastpeft.models import load_language_model, longest_input
from fastpeft.prompts.model import PromptModel
from fastpeft.prompts.named import AUTO
from fastpeft.prompts.template import MASK, Prompt, is_of_decoder
from fastpeft.support.environment import best_device
from fastpeft.training.config import TrainConfig

logger = logging.getLogger(__name__)

CHOOSE_ROWS = 16  # a class: to choose words by
RANK_ROWS = 64  # a class: others, to rank the best templates and words by
LEAST_ROWS = 8  # a class, of which half choose and half rank
_WORDS = 200  # likely words that are tried, divided among the classes
_LEAST_WORDS = 10  # a class
_KEPT_WORDS = 10  # choices of words that a template brings to the ranking
_FINALISTS = 6  # templates in the ranking
_RUNNERS_UP = 4
_SHORTEST_WORD = 2  # letters

_CLAUSES = ("It was", "It is", "This is", "All in all, it was", "So", "It is about", "This is about", "The topic is")
_ENDS = (".", "!", "")
_LEADS = (".", ":")
_PAIR_ENDS = ("?", ".", ",", "")
_PAIR_LINKS = ("", "I think ", "That means ", "So ")
_PAIR_STOPS = (",", ".", ":", "")


def templates(is_pair: bool, *, decoder: bool = False) -> list[str]:
    """Every template of the grammar, for one text or for pairs; for a decoder those that end with words and the mask.

    Example:
        >>> templates(is_pair=False)[0], len(templates(is_pair=False)), len(templates(is_pair=True))
        ('{text} <mask>.', 45, 91)
    """
    clauses = (MASK, *(f"{clause} {MASK}" for clause in _CLAUSES))
    texts = "{a} {b}" if is_pair else "{text}"
    if decoder:
        return [f"{texts} {clause}" for clause in clauses[1:]]
    after = [f"{texts} {clause}{end}" for clause, end in product(clauses, _ENDS)]
    if is_pair:
        links = product(_PAIR_ENDS, _PAIR_LINKS, _PAIR_STOPS)
        return [f"{{a}}{end} {link}{MASK}{stop} {{b}}" for end, link, stop in links] + after
    return after + [f"{clause}{lead} {texts}" for clause, lead in product(clauses, _LEADS)]


@dataclass(frozen=True)
class FoundPrompt:
    """A prompt that was searched for, and how it fared.

    Attributes:
        prompt: template and label words, by the names of the classes.
        accuracy: its share of right answers on the rows that it was ranked by, with no training: 0 to 1.
        rows: training rows that the words were chosen by.
        ranked_rows: other training rows that the finalists were ranked by.
        templates: how many were tried.
        calibrated: whether answers were calibrated, see `PromptModel.calibrate`.
        runners_up: the next best on the ranking's rows, each with its `template`, `label_words` and `accuracy`.
    """

    prompt: Prompt
    accuracy: float
    rows: int
    ranked_rows: int
    templates: int
    calibrated: bool
    runners_up: list[dict[str, Any]]

    def values(self) -> dict[str, Any]:
        """Its values as JSON holds them: the fields of `Prompt.values()` and its own."""
        own = {name: getattr(self, name) for name in ("rows", "ranked_rows", "templates", "calibrated", "runners_up")}
        return {**self.prompt.values(), "accuracy": round(self.accuracy, 4), **own}


def search_prompt(config: TrainConfig, data: TextData, max_length: int) -> TrainConfig:
    """`config`, with the prompt that was found for it on the training rows of `data`."""
    found = find_prompt(config.model, data, seed=config.seed, max_length=max_length).values()
    if config.prompt_head == "classifier":  # then the template alone serves
        found |= {"label_words": None, "head": config.prompt_head}
    return dataclasses.replace(config, found_prompt=found)


def find_prompt(
    model: str, data: TextData, *, seed: int = 0, calibrate: bool = False, max_length: int | None = None
) -> FoundPrompt:
    """The template and label words by which a language model best tells classes apart, with no training.

    Args:
        model: `"demo"`, a folder or a hub id.
        data: its training rows are searched on, a few of every class.
        seed: decides which.
        calibrate: rank by calibrated answers, for a prompt that will be used so.
        max_length: where texts are cut, in tokens. None: what the model reads.

    Raises:
        FastpeftError: the model cannot be loaded or has no head for words, labels are no classes, or a class has too
            few rows.

    Notes:
        Deterministic: the same model, rows and seed give the same prompt on the same machine and threads.

    Example:
        >>> found = find_prompt("demo", load_data("demo"))  # doctest: +SKIP
        >>> found.prompt.template, found.prompt.label_words  # doctest: +SKIP
    """
    check_searchable(data)
    chosen, ranked = draw_rows(data, seed)
    masked_lm, tokenizer = load_language_model(model)
    limit = longest_input(masked_lm, tokenizer)
    search = _Search(
        masked_lm.eval().to(best_device()), tokenizer, data.labels, calibrate, min(max_length or limit, limit)
    )
    start = time.perf_counter()
    found = search.run(templates(data.train.is_pair, decoder=is_of_decoder(tokenizer)), chosen, ranked)
    logger.info(
        "the prompt found is %r with %s: accuracy %.3f on %d training rows (%d templates, %.0f s)",
        found.prompt.template,
        ", ".join(f"{label}={word}" for label, word in found.prompt.label_words.items()),
        found.accuracy,
        found.ranked_rows,
        found.templates,
        time.perf_counter() - start,
    )
    return found


def check_searchable(data: TextData) -> None:
    """Raise `FastpeftError` unless label words can be found for `data`: it has classes, and enough rows of each."""
    if data.problem is not CLASSIFICATION:
        raise FastpeftError(
            f"the prompt {AUTO!r} finds label words, which stand for classes, but this is {data.problem.short}. Write "
            "a template and add --prompt-head classifier, or leave the prompt out."
        )
    counts = [data.train.labels.count(index) for index in range(len(data.labels))]
    if min(counts) < LEAST_ROWS:
        label = data.labels[counts.index(min(counts))]
        raise FastpeftError(
            f"the class {label!r} has {min(counts)} training rows; the prompt {AUTO!r} is found on some rows of every "
            f"class, at least {LEAST_ROWS}. Add rows, or write a prompt."
        )


def draw_rows(data: TextData, seed: int) -> tuple[Examples, Examples]:
    """The rows to choose words by and the others to rank by, class after class, in an order that `seed` decides."""
    of_class: list[list[int]] = [[] for _ in data.labels]
    for row, label in enumerate(data.train.labels):
        of_class[label].append(row)
    chosen, ranked = [], []
    for rows in of_class:
        random.Random(seed).shuffle(rows)
        cut = min(CHOOSE_ROWS, len(rows) // 2)
        chosen += rows[:cut]
        ranked += rows[cut : cut + RANK_ROWS]
    return data.train.take(chosen), data.train.take(ranked)


@dataclass(frozen=True)
class _Choice:
    """A template and a token for each class, with its score on some rows."""

    template: str
    tokens: tuple[int, ...]
    score: float


class _Search:
    """Asks a model for the logits of words in templates, and chooses by them."""

    def __init__(self, masked_lm: Any, tokenizer: Any, labels: Sequence[str], calibrate: bool, max_length: int) -> None:
        self.masked_lm = masked_lm
        self.tokenizer = tokenizer
        self.labels = labels
        self.calibrate = calibrate
        self.max_length = max_length
        self.words = {at_start: whole_words(tokenizer, at_start) for at_start in (False, True)}  # by token
        if (fewest := min(map(len, self.words.values()))) < len(labels):
            raise FastpeftError(f"the tokenizer has {fewest} whole words for {len(labels)} classes. Write a prompt.")

    def run(self, grammar: Sequence[str], chosen: Examples, ranked: Examples) -> FoundPrompt:
        """The best prompt of `grammar`, words chosen by some rows and finalists ranked by others."""
        choices = {template: self._choose(template, chosen) for template in grammar}
        finalists = sorted(choices.values(), key=lambda of_template: -of_template[0].score)[:_FINALISTS]
        ranking = [choice for of_template in finalists for choice in self._rank(of_template, ranked)]
        ranking.sort(key=lambda choice: -choice.score)  # a stable sort: of equals, the one that came first
        best, *others = [self._described(choice, len(ranked)) for choice in ranking[: 1 + _RUNNERS_UP]]
        return FoundPrompt(
            Prompt(best["template"], best["label_words"]),
            best["accuracy"],
            len(chosen),
            len(ranked),
            len(grammar),
            self.calibrate,
            others,
        )

    def _choose(self, template: str, rows: Examples) -> list[_Choice]:
        """The best choices of words for a template, the best first."""
        tokens = list(self._words(template))
        logits, favour = self._logits(template, tokens, rows)
        labels = torch.tensor(rows.labels)
        width = max(_LEAST_WORDS, _WORDS // len(self.labels))
        candidates = [
            logits[labels == index].mean(0).argsort(descending=True, stable=True)[:width]
            for index in range(len(self.labels))
        ]
        best = best_words(logits - favour, labels, candidates, width)[:_KEPT_WORDS]
        return [_Choice(template, tuple(tokens[column] for column in columns), score) for columns, score in best]

    def _rank(self, choices: Sequence[_Choice], rows: Examples) -> list[_Choice]:
        """Choices for one template, with their scores on other rows."""
        template = choices[0].template
        tokens = sorted({token for choice in choices for token in choice.tokens})
        logits, favour = self._logits(template, tokens, rows)
        answers, labels = logits - favour, torch.tensor(rows.labels)
        return [
            _Choice(template, choice.tokens, float(score(answers[:, [*map(tokens.index, choice.tokens)]], labels)))
            for choice in choices
        ]

    def _logits(self, template: str, tokens: Sequence[int], rows: Examples) -> tuple[Tensor, Tensor]:
        """What the model gives `tokens` at the mask `(rows, tokens)`, and what calibration takes off `(tokens,)`, or 0.

        Both in float64 on the CPU.
        """
        any_words = list(self._words(template).values())[:2]
        reader = PromptModel(self.masked_lm, self.tokenizer, Prompt(template, any_words)).read_tokens(tokens)
        logits = reader.predict_logits(rows.texts, max_length=self.max_length)
        if self.calibrate:
            reader.calibrate()
        return logits.cpu().double(), reader.calibration.cpu().double()

    def _words(self, template: str) -> dict[int, str]:
        return self.words[template.startswith(MASK)]

    def _described(self, choice: _Choice, rows: int) -> dict[str, Any]:
        words = [self._words(choice.template)[token] for token in choice.tokens]
        accuracy = round(math.ceil(choice.score) / rows, 4)
        return {"template": choice.template, "label_words": dict(zip(self.labels, words)), "accuracy": accuracy}


def whole_words(tokenizer: Any, at_start: bool) -> dict[int, str]:
    """The words of letters that are one token, by that token: at the start of a line, or after a space in it."""
    texts = [text.strip() for text in tokenizer.batch_decode([[token] for token in range(len(tokenizer))])]
    words = [text for text in dict.fromkeys(texts) if text.isalpha() and len(text) >= _SHORTEST_WORD]
    before = "" if at_start else "it "
    length = len(tokenizer(before.strip(), add_special_tokens=False)["input_ids"]) if before else 0
    encoded = tokenizer([before + word for word in words], add_special_tokens=False)["input_ids"]
    one = {ids[-1]: word for ids, word in zip(encoded, words) if len(ids) == length + 1}
    return {token: word for token, word in one.items() if token not in tokenizer.all_special_ids}


def best_words(
    logits: Tensor, labels: Tensor, candidates: Sequence[Tensor], width: int
) -> list[tuple[tuple[int, ...], float]]:
    """Words for the classes by which rows come out right, by a beam search over the classes.

    For two classes every pair of candidates is tried if `width` is no less than their number; for more, the best
    `width` choices for the first classes are carried on, by the rows of these.

    Args:
        logits: of each word for each row `(rows, words)`, float64.
        labels: each row's class `(rows,)`.
        candidates: of each class, indices of words.
        width: choices to carry on.

    Returns:
        Choices, as one word's index for each class, and their `score`, the best first.
    """
    chosen, scores = torch.empty(1, 0, dtype=torch.long), torch.zeros(1)
    for index, words in enumerate(candidates):
        longer = torch.cat([chosen.repeat_interleave(len(words), 0), words.repeat(len(chosen)).unsqueeze(1)], 1)
        longer = longer[(longer[:, :-1] != longer[:, -1:]).all(1)]  # each class has a word of its own
        seen = labels <= index
        scores = score(logits[seen][:, longer].transpose(0, 1), labels[seen])
        order = scores.argsort(descending=True, stable=True)[:width]
        chosen, scores = longer[order], scores[order]
    return [(tuple(choice), value) for choice, value in zip(chosen.tolist(), scores.tolist())]


def score(logits: Tensor, labels: Tensor) -> Tensor:
    """How well the logits of chosen words `(..., rows, classes)` answer, `(...)`.

    It is the number of right rows, less a part of 1 that the cross entropy decides. So more right rows are always
    better, and among equals the lower loss is.
    """
    index = labels.unsqueeze(-1).expand(*logits.shape[:-1], 1)
    own, rival = logits.gather(-1, index).squeeze(-1), logits.scatter(-1, index, -torch.inf).amax(-1)
    loss = (logits.logsumexp(-1) - own).mean(-1)
    return (own > rival).sum(-1) - loss / (1 + loss)
