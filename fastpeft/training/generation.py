"""Text that a finished run generates from prompts, and how near it is to that of the data."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpeft.data.batches import compute_by_length
from fastpeft.data.conversations import USER, Conversation, as_conversation, is_conversation
from fastpeft.data.next_words import completion, end_tokens, opening, prompt_tokens
from fastpeft.data.problems import NEXT_WORDS
from fastpeft.data.splitting import prompt_key
from fastpeft.data.values import RowRef, refuse_empty
from fastpeft.errors import FastpeftError, install
from fastpeft.ladder import LadderModel
from fastpeft.ladder.probe import probe
from fastpeft.prompts.template import is_text, refuse_one_text
from fastpeft.support.stages import report
from fastpeft.training.loading import EncodedText, FinishedRun, load_run
from fastpeft.training.run_folder import RunFolder

logger = logging.getLogger(__name__)

_MAX_NEW_TOKENS = 64
_BATCH_SIZE = 16
# one row for each text, one token a step, and no end but its own, whatever the model's generation_config.json says
PLAIN = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "max_time": None,
}
_ROUNDING = 0.1  # the most that padding may change, beside tokens that are read


def generates_text(folder: str | Path) -> bool:
    """Whether the run in a folder learned next words, so that a `TextGenerator` uses it."""
    return RunFolder(folder).metrics().get("problem_type") == NEXT_WORDS.name


def eos_token_ids(model: Any, tokenizer: Any, *, chats: bool) -> set[int]:
    """The tokens after which a decoder generates nothing more, to a conversation or another text."""
    own = getattr(model.generation_config, "eos_token_id", None)
    return end_tokens(tokenizer, chats=chats).union([own] if isinstance(own, int) else own or ())


def tell_ends(model: Any, tokenizer: Any, *, chats: bool) -> None:
    """Name those tokens in the model's generation configuration, so that whoever loads what is saved stops there."""
    ends = sorted(eos_token_ids(model, tokenizer, chats=chats))
    model.generation_config.eos_token_id = ends if len(ends) > 1 else next(iter(ends), None)


def keeps_tokens(model: Any) -> bool:
    """Whether what a model has read of a text is kept; where not, as of LST beside Mamba, give `use_cache=False`."""
    return not isinstance(model, LadderModel) or probe(model.backbone).keeps_keys


@torch.inference_mode()
def depends_on_padding(model: Any) -> bool:
    """Whether padding before a text changes how a decoder goes on: RWKV reads it, those of BART's kind count it.

    Three passes tell: over a text alone, after padding, and after the same tokens as a part of it. Each has two rows:
    in transformers 5.0 Mamba-2, LFM2 and others heed the mask only where there are several.
    """
    padding, text = [1] * 3, [2, 3, 4]

    def logits(before: list[int], *, read: bool) -> Tensor:
        tokens = torch.tensor([[*before, *text]] * 2, device=model.device)
        mask = torch.tensor([[int(read)] * len(before) + [1] * len(text)] * 2, device=model.device)
        one = {**PLAIN, "max_new_tokens": 1, "do_sample": False, "use_cache": False, "pad_token_id": 1}
        found = model.generate(tokens, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **one)
        return found.logits[0].float()

    alone = logits([], read=True)
    by_padding, by_text = (float((logits(padding, read=read) - alone).abs().max()) for read in (False, True))
    return not by_padding <= _ROUNDING * by_text  # XLM's are no numbers


class TextGenerator:
    """A finished run that learned next words, in use: it continues texts by greedy decoding.

    Args:
        run: the run, with its model.
        max_new_tokens: the most tokens that it generates from one text. None: 64, or half of what the model reads
            where that is less.

    Raises:
        FastpeftError: the model reads no more than `max_new_tokens`.
    """

    def __init__(self, run: FinishedRun, max_new_tokens: int | None = None) -> None:
        limit = run.loaded.max_length
        self.run = run
        self.cut = 0  # answers so far that were not at their end
        self.max_new_tokens = min(_MAX_NEW_TOKENS, limit // 2) if max_new_tokens is None else max_new_tokens
        self._reads = limit - self.max_new_tokens
        if not 0 < self.max_new_tokens < limit:
            raise FastpeftError(
                f"`max_new_tokens` is {max_new_tokens}; it must be from 1 to {limit - 1}, as the model reads {limit} "
                "tokens, those of the prompt among them."
            )

    @property
    def around(self) -> tuple[str, str]:
        """What a chat template writes before an answer, and the end of a text, which may follow one in the data.

        Neither is measured.
        """
        tokenizer = self.run.loaded.tokenizer
        return opening(tokenizer) if self.run.chats else "", tokenizer.eos_token or ""

    def encode(self, text: Any) -> EncodedText:
        """A text as tokens: a string, or a conversation as a list of turns, of which a string is one of the user."""
        given = self._as_prompt(text)
        tokens = prompt_tokens(self.run.loaded.tokenizer, given)
        if not tokens:
            raise FastpeftError(f"{text!r} has no tokens to continue from. Give a text.")
        if len(tokens) > self._reads:
            raise FastpeftError(
                f"the text that begins with {str(given)[:40]!r} has {len(tokens)} tokens, but {self._reads} are the "
                f"most that leave room for {self.max_new_tokens} new ones. Give a shorter one, or fewer new tokens."
            )
        return EncodedText(given, {"input_ids": tokens, "attention_mask": [1] * len(tokens)})

    def _as_prompt(self, text: Any) -> Any:
        if isinstance(text, Conversation) or (isinstance(text, tuple) and len(text) == 2):
            return text
        if is_conversation(text):
            self.run.check_conversations()
            return as_conversation(text, "messages", RowRef("the given texts", 1), answered=False)
        if is_text(text):
            refuse_empty(text)
            return Conversation(((USER, text),)) if self.run.chats else text
        raise FastpeftError(f"the run continues a text or a conversation; got {text!r}. Give one, in UTF-8.")

    @cached_property
    def _depends_on_padding(self) -> bool:
        return depends_on_padding(self.run.loaded.model)

    @torch.inference_mode()
    def generate(self, encoded: Sequence[EncodedText]) -> list[str]:
        """What the run generates from each text, greedily."""
        tokenizer, model = self.run.loaded.tokenizer, self.run.loaded.model
        ends = eos_token_ids(model, tokenizer, chats=self.run.chats)
        uncached = {} if keeps_tokens(model) else {"use_cache": False}
        rows = [each.row for each in encoded]
        said: dict[int, str] = {}

        def compute(chosen: list[int]) -> None:
            report("answering", len(said), len(rows))
            given = [rows[index] for index in chosen]
            batch = tokenizer.pad(given, padding_side="left", return_tensors="pt").to(model.device)
            with self.run.autocast():
                tokens = model.generate(
                    **batch,
                    **uncached,
                    max_new_tokens=self.max_new_tokens,
                    do_sample=False,
                    **PLAIN,
                    pad_token_id=tokenizer.pad_token_id,
                    eos_token_id=sorted(ends) or None,
                )
            new = tokens[:, batch["input_ids"].shape[1] :]
            ended = torch.isin(new, new.new_tensor(sorted(ends))).any(1)
            self.cut += int((~ended).sum())
            texts = tokenizer.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            said.update((index, text.strip()) for index, text in zip(chosen, texts))

        apart = len(rows) > 1 and self._depends_on_padding
        compute_by_length(compute, rows, 1 if apart else _BATCH_SIZE)
        return [said[index] for index in range(len(rows))]


def generate(folder: str | Path, texts: Sequence[Any], max_new_tokens: int | None = None) -> list[str]:
    """What a finished run on next words generates from each text; see `TextGenerator`."""
    refuse_one_text(texts)
    generator = TextGenerator(load_run(folder), max_new_tokens)
    return generator.generate([generator.encode(text) for text in texts])


def measure_generations(generator: TextGenerator, texts: Sequence[Any]) -> dict[str, float]:
    """BLEU and ROUGE-L of what a run generates from the prompts of rows, against all completions that they have there.

    BLEU is sacrebleu's, over all prompts, from 0 to 100. ROUGE-L is rouge-score's F1 with stems, from 0 to 1: of each
    prompt that of the nearest completion, the mean over prompts.

    Returns:
        `bleu`, `rouge_l` and `prompts`, their number; nothing where rows have no prompts, or a library is missing,
        which is logged.
    """
    references: dict[Any, list[str]] = {}
    prompts: dict[Any, Any] = {}
    for text in texts:
        if (expected := completion(text)) is not None:
            references.setdefault(prompt_key(text), []).append(expected)
            prompts.setdefault(prompt_key(text), text)
    missing = [name for name in ("sacrebleu", "rouge_score") if importlib.util.find_spec(name) is None]
    if missing and prompts:
        logger.info("BLEU and ROUGE are left out: they need sacrebleu and rouge-score. Run %s", install("generation"))
    if missing or not prompts:
        return {}
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    before, after = generator.around
    encoded, limit = {}, generator.max_new_tokens
    for key, prompt in prompts.items():
        with suppress(FastpeftError):  # too long, or nothing was asked
            encoded[key] = generator.encode(prompt)
    if not encoded:
        logger.warning("no prompt leaves room for %d new tokens, so nothing is generated", limit)
        return {}
    said = [words.removeprefix(before).strip() for words in generator.generate(list(encoded.values()))]
    told = {
        "leave no room for new tokens within the model's maximum length, and are skipped": len(prompts) - len(encoded),
        f"have completions that were cut off after {limit} tokens; raise `max_new_tokens`": generator.cut,
    }
    for what, count in told.items():
        if count:
            logger.warning("%d of %d prompts %s", count, len(prompts), what)
    expected_of = [[words.removesuffix(after) for words in references[key]] for key in encoded]
    most = max(map(len, expected_of))
    # None where a prompt has fewer: an empty text would be a completion of no length
    streams: Any = [[each[place] if place < len(each) else None for each in expected_of] for place in range(most)]
    bleu = sacrebleu.corpus_bleu(said, streams)
    if not bleu.totals[-1]:
        logger.warning("no answer has %d tokens, so BLEU, which counts runs of so many, is 0", len(bleu.totals))
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    nearest = [scorer.score_multi(each, words)["rougeL"].fmeasure for each, words in zip(expected_of, said)]
    return {
        "bleu": bleu.score,
        "rouge_l": sum(nearest) / len(nearest),
        "prompts": len(encoded),
    }
