"""Prompts: a template and label words that turn a classification task into filling in a masked word, or the next one.

A text becomes `It was good fun. It was <mask>.`; the class whose label word ("great" or "terrible") the model finds
most likely at the mask is the answer, with no training at all (Schick & Schütze 2021; Gao, Fisch & Chen 2021,
"Making pre-trained language models better few-shot learners"). A decoder, whose tokenizer has no mask token, reads the
line up to the mask, `It was good fun. It was`, and the label word would come next. Nothing new has to be learned before
the first useful gradient, which is what MeZO needs.
"""

from __future__ import annotations

import difflib
import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fastpeft.data.token_rows import TokenRow
from fastpeft.errors import FastpeftError
from fastpeft.support import files

MASK = "<mask>"
HEADS = ("label_words", "classifier")
PROMPT_FILE = "prompt.json"

_SLOTS = (["{text}"], ["{a}", "{b}"])  # of one text, of a pair
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character of UTF-16
_EXAMPLE = "'{text} It was <mask>.' or '{a}? <mask>, {b}'"

Text = str | tuple[str, str]  # one text, or a pair for {a} and {b}


@dataclass(frozen=True)
class Prompt:
    """A template, and the word that stands for each class.

    Attributes:
        template: has `{text}`, or `{a}` and `{b}`, once each, and `<mask>` once, which stands for any model's own mask
            token. A template for a classification head may leave the mask out. A decoder is given what stands before
            the mask, so its texts stand there.
        label_words: the word of each class, in the order of the classes: `{0: "terrible", 1: "great"}`, or by the
            classes' names. The words alone, in order, will do too. A classification head needs none.
        head: `"label_words"` compares the mask's logits of the label words; `"classifier"` only feeds the filled
            template to a model with a classification head.

    Raises:
        FastpeftError: the template lacks a part or has one too many, or a class has no word or another's word.

    Example:
        >>> Prompt("{text} It was <mask>.", {0: "terrible", 1: "great"}).labels
        ['0', '1']
    """

    template: str
    label_words: Any = None  # what may be given is wider than what is kept: dict[str, str] or None
    head: str = "label_words"

    def __post_init__(self) -> None:
        if self.head not in HEADS:
            raise FastpeftError(f"the prompt's head is {self.head!r}; allowed are {' and '.join(HEADS)}.")
        self._check_template()
        if self.label_words is not None:
            before = self.template.partition(MASK)[0]
            has_space = not before or before[-1].isspace()
            object.__setattr__(self, "label_words", _by_class(self.label_words, has_space))
        elif self.head == "label_words":
            raise FastpeftError(
                f"the prompt {self.template!r} has no label words. Give one word for each class, as "
                '{"negative": "terrible", "positive": "great"} (--label-words negative=terrible,positive=great), or '
                'train with head="classifier" (--prompt-head classifier).'
            )

    def _check_template(self) -> None:
        if not is_text(self.template):
            raise FastpeftError(f"the template {self.template!r} is not a text of whole characters. Write it in UTF-8.")
        given = re.findall(r"\{.*?\}", self.template)
        if sorted(given) not in _SLOTS:
            raise FastpeftError(
                f"the template {self.template!r} has {', '.join(given) or 'no place for a text'}; it must have "
                f"{{text}} once, or {{a}} and {{b}} once each. Write it like {_EXAMPLE}."
            )
        masks = self.template.count(MASK)
        if masks > 1 or (masks == 0 and self.head == "label_words"):
            raise FastpeftError(
                f"the template {self.template!r} has {masks or 'no'} {MASK}; it must have one, where the label word "
                f"would stand. Write it like {_EXAMPLE}."
            )

    @property
    def labels(self) -> list[str]:
        """The classes, in the order of the logits."""
        return list(self.label_words or ())

    @property
    def is_pair(self) -> bool:
        """Whether the template takes two texts."""
        return "{a}" in self.template

    @cached_property
    def _parts(self) -> list[str]:
        """The template, cut before and after each text and the mask."""
        return [part for part in re.split(rf"(\{{\w+\}}|{MASK})", self.template) if part]

    def for_labels(self, labels: Sequence[str]) -> Prompt:
        """This prompt with its words in the order of a data set's classes.

        Classes are matched by name, whatever their case, spaces and signs, unless that makes two of them one, as of
        -1 and 1. Where one side only numbers them from 0 and the other has other names, they are matched by position.
        With head="classifier" no word is read, and words of other classes stay as they are.

        Raises:
            FastpeftError: a class has no word, or a word no class, and the head reads them.
        """
        if self.label_words is None:
            return self
        one_to_one = all(len(set(map(plain, names))) == len(names) for names in (labels, self.labels))
        key = plain if one_to_one else str
        own = {key(label): word for label, word in self.label_words.items()}
        numbered = [str(index) for index in range(len(own))]
        others = own.keys() != set(map(key, labels))
        if others and len(labels) == len(own) and numbered in (list(labels), self.labels):
            return replace(self, label_words=dict(zip(labels, own.values())))
        missing = [label for label in labels if key(label) not in own]
        strange = [label for label in self.labels if key(label) not in map(key, labels)]
        if (missing or strange) and self.head == "classifier":
            return self
        if missing or strange:
            problem = f"no word for {', '.join(missing)}" if missing else f"words for unknown {', '.join(strange)}"
            raise FastpeftError(
                f"the prompt {self.template!r} has {problem}; the classes are {', '.join(labels)}. Give one label word "
                "for each of them, in their order, by --label-words (label_words in Python)."
            )
        return replace(self, label_words={label: own[key(label)] for label in labels})

    def label_ids(self, tokenizer: Any) -> list[int]:
        """The token of each label word, as the model would predict it at the mask.

        A word is read in its place after the template's start, so it gets a leading space where the tokenizer tells
        `great` from ` great` and the template has one, as in `It was <mask>.`, or the word itself, as ` great` after
        `Answer:<mask>`.

        Raises:
            FastpeftError: a word is several tokens, unknown, or the same token as another's; the message names the
                nearest words that are one token.
        """
        self._check_tokenizer(tokenizer)
        words: dict[int, str] = {}
        for label, word in (self.label_words or {}).items():
            tokens = self._word_tokens(tokenizer, word)
            if len(tokens) != 1:
                pieces = " ".join(tokenizer.convert_ids_to_tokens(tokens))
                raise FastpeftError(
                    f"the label word {word!r} of class {label!r} is "
                    f"{f'{len(tokens)} tokens ({pieces})' if tokens else 'unknown'} to this tokenizer; each label word "
                    f"must be one token. Near it are {', '.join(self._near_words(tokenizer, word)) or 'no words'}; "
                    "choose one of these or another common word."
                )
            if tokens[0] in words:
                raise FastpeftError(
                    f"the label words {words[tokens[0]]!r} and {word!r} are the same token to this tokenizer; each "
                    "class needs a word of its own. Choose another for one of them."
                )
            words[tokens[0]] = word
        return list(words)

    def _word_tokens(self, tokenizer: Any, word: str) -> list[int]:
        """The tokens that `word` is in its place; none where the tokenizer cannot tell it from others."""
        before = re.sub(r"\{\w+\}", "", self.template.partition(MASK)[0])  # the template up to the mask
        line, start = before + word, len(before)
        encoded = tokenizer(line, add_special_tokens=False, return_offsets_mapping=True)
        pairs = zip(encoded["input_ids"], encoded["offset_mapping"])
        covering = [(token, left) for token, (left, right) in pairs if right > max(start, left)]
        merged = any(line[left:start].strip() for _, left in covering)  # with the end of the template
        tokens = [token for token, _ in covering]
        return [] if merged or tokenizer.unk_token_id in tokens else tokens

    def _near_words(self, tokenizer: Any, word: str) -> list[str]:
        """Words that are one token and are spelled most like `word`."""
        texts = (text.strip() for text in tokenizer.batch_decode([[token] for token in range(len(tokenizer))]))
        known = {text.casefold(): text for text in texts if text.isalpha()}
        near = difflib.get_close_matches(word.casefold(), known, n=50, cutoff=0.4)
        return [known[text] for text in near if len(self._word_tokens(tokenizer, known[text])) == 1][:4]

    def _check_tokenizer(self, tokenizer: Any) -> None:
        if not tokenizer.is_fast:
            raise FastpeftError(
                f"{type(tokenizer).__name__} does not tell where in a text its tokens stand; a prompt needs a fast "
                "tokenizer. Load it by AutoTokenizer, or give a model that has one."
            )
        if MASK not in self.template or not is_of_decoder(tokenizer):
            return
        if self.head == "classifier":
            raise FastpeftError(
                f"{type(tokenizer).__name__} has no mask token, so the template {self.template!r} cannot be filled. "
                "Give a model that predicts masked words, or leave <mask> out of the template."
            )
        unread = re.findall(r"\{\w+\}", self.template.partition(MASK)[2])
        if unread:
            raise FastpeftError(
                f"the template {self.template!r} has {' and '.join(unread)} after {MASK}. {type(tokenizer).__name__} "
                f"has no mask token: its model reads from left to right, up to {MASK}. Put the texts before it."
            )

    def encode(
        self,
        tokenizer: Any,
        texts: Sequence[Text],
        labels: Sequence[Any] | None = None,
        max_length: int | None = None,
    ) -> list[TokenRow]:
        """Texts, or pairs of texts, in the template, as rows of token ids.

        The tokens are those of the whole filled line as one segment. Of a line that is too long, only the texts are
        cut, at their ends, of two texts the longer first; the template and its mask stay whole.

        Args:
            tokenizer: a fast tokenizer.
            texts: strings for `{text}`, pairs of strings for `{a}` and `{b}`.
            labels: kept beside the tokens as `labels`; with label words numbers of classes, from 0 in their order.
            max_length: the longest row in tokens, special tokens included. None: the tokenizer's limit.

        Returns:
            Rows of `input_ids`, `attention_mask`, `token_type_ids` where the model has them, `mask_positions` (the
            index of the mask token, of a decoder's last one; not for a classification head, which reads no mask) and
            `labels`. Not padded.

        Raises:
            FastpeftError: `max_length` leaves no room for the template, a text is not what the template takes, or a
                label no number of a class; or there are other labels than texts.
        """
        self._check_tokenizer(tokenizer)
        refuse_one_text(texts)
        labels = None if labels is None else list(labels)  # by position, also those of a pandas Series
        if labels is not None and len(labels) != len(texts):
            raise FastpeftError(f"there are {len(texts)} texts and {len(labels)} labels. Give a label for each text.")
        if labels is not None and self.head == "label_words":
            odd = [label for label in labels if label not in range(len(self.labels))]  # -100 would train nothing
            if odd:
                raise FastpeftError(
                    f"a label is {odd[0]!r}; give numbers of classes, from 0 to {len(self.labels) - 1}."
                )
            labels = list(map(int, labels))  # whatever kind of number
        limit = tokenizer.model_max_length if max_length is None else max_length
        filled = [self._fill(tokenizer, text) for text in texts]
        if not filled:
            return []
        encoded = tokenizer([line for line, _ in filled], return_offsets_mapping=True, verbose=False)
        offsets = encoded.pop("offset_mapping")
        rows = []
        for index, (_, spans) in enumerate(filled):
            kept = self._kept_tokens(offsets[index], spans, limit)
            answered_at = None
            if self.head == "label_words":
                answered_at = self._answered_at(tokenizer, spans[MASK], [offsets[index][i] for i in kept])
                if is_of_decoder(tokenizer):  # some tokenizers add a token at the end
                    kept = kept[: answered_at + 1]
            row: TokenRow = {name: [column[index][i] for i in kept] for name, column in encoded.items()}
            if answered_at is not None:
                row["mask_positions"] = answered_at
            if labels is not None:
                row["labels"] = labels[index]
            rows.append(row)
        return rows

    def _fill(self, tokenizer: Any, text: Text) -> tuple[str, dict[str, tuple[int, int]]]:
        """The template with its texts in place, and where in it every part stands."""
        given = tuple(text) if isinstance(text, (tuple, list)) else (text,)
        names = _SLOTS[self.is_pair]
        if len(given) != len(names) or not all(isinstance(item, str) for item in given):
            raise FastpeftError(
                f"the template {self.template!r} takes {'a pair of texts' if self.is_pair else 'one text'} a row; got "
                f"{text!r}. Use {'{text}' if self.is_pair else '{a} and {b}'} in the template, or change the data."
            )
        if not all(map(is_text, given)):
            raise FastpeftError(f"{text!r} holds half a character, which has no code. Correct it or leave it out.")
        values = dict(zip(names, given))
        line, spans = "", {}
        for part in self._parts:
            if part == MASK:
                line = line.rstrip(" ")  # the label word brings its own space; a space alone would be a token to some
                piece = tokenizer.mask_token or ""
            else:
                piece = values[part].strip() if part in values else part
            spans[part] = (len(line), len(line) + len(piece))
            line += piece
            if part == MASK and not piece:  # a decoder's answer cannot depend on what follows
                break
        return line, spans

    def _answered_at(self, tokenizer: Any, mask: tuple[int, int], offsets: Sequence[tuple[int, int]]) -> int:
        """The index of the token at which the model gives the label word: the mask, or the last one of a decoder."""
        if not is_of_decoder(tokenizer):
            return next(index for index, (left, right) in enumerate(offsets) if left <= mask[0] < right)
        if not offsets:
            raise FastpeftError(
                f"the template {self.template!r} leaves nothing to read of an empty text. Write words before {MASK}."
            )
        return max((i for i, (left, right) in enumerate(offsets) if left < right), default=len(offsets) - 1)

    def _kept_tokens(self, offsets: list[tuple[int, int]], spans: dict[str, tuple[int, int]], limit: int) -> list[int]:
        """Indices of the tokens of a line that stay within `limit`."""
        excess = len(offsets) - limit
        if excess <= 0:
            return list(range(len(offsets)))
        texts = []
        for start, end in map(spans.__getitem__, _SLOTS[self.is_pair]):
            inside = [i for i, (left, right) in enumerate(offsets) if start <= left < right <= end]
            # to the last one: some tokenizers say of a space between words that it has no width
            texts.append(list(range(inside[0], inside[-1] + 1)) if inside else [])
        if excess > sum(map(len, texts)):
            raise FastpeftError(
                f"`max_length` {limit} leaves no room for the template {reprlib.repr(self.template)}, which alone "
                f"takes {len(offsets) - sum(map(len, texts))} tokens. Allow more tokens or shorten the template."
            )
        dropped = set()
        for _ in range(excess):
            dropped.add(max(texts, key=len).pop())
        return [i for i in range(len(offsets)) if i not in dropped]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the prompt to `prompt.json` in `folder`, which is made if need be."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        files.write_json(Path(folder) / PROMPT_FILE, self.values())

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Prompt:
        """The prompt that was saved to `folder`.

        Raises:
            FastpeftError: there is none, or it is not a prompt.
        """
        return cls.from_values(files.read_json(Path(folder) / PROMPT_FILE))

    def values(self) -> dict[str, Any]:
        """The prompt as JSON holds it."""
        return {"template": self.template, "label_words": self.label_words, "head": self.head}

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Prompt:
        """The prompt of `values()`, whatever else is beside them."""
        try:
            return cls(values["template"], values["label_words"], values["head"])
        except (KeyError, TypeError) as error:
            raise FastpeftError(f"{dict(values)} is no prompt ({error}). Save it anew.") from None


def is_of_decoder(tokenizer: Any) -> bool:
    """Whether label words are the next word, after what stands before the mask: the tokenizer has no mask token."""
    return tokenizer.mask_token is None


def _by_class(words: Any, has_space: bool) -> dict[str, str]:
    """Label words by the names of their classes, in order; `has_space`: the template has the space before them."""
    if isinstance(words, (set, frozenset)):
        raise FastpeftError(f"the label words are a set, {words!r}, which has no order. Give a list or a dict.")
    if not isinstance(words, Mapping):
        words = dict(enumerate([words] if isinstance(words, str) else words))
    if all(str(label).isdecimal() for label in words):
        words = {label: words[label] for label in sorted(words, key=int)}
    by_class = {}
    for label, word in words.items():
        if not is_text(word) or not word.strip():
            raise FastpeftError(f"class '{label}' has no label word (it is {word!r}). Give one word for each class.")
        by_class[str(label)] = word.strip() if has_space else word.rstrip()
    repeated = {word for word in by_class.values() if list(by_class.values()).count(word) > 1}
    if repeated or len(by_class) < 2:
        problem = f"{sorted(repeated)[0]!r} for several classes" if repeated else f"{len(by_class)} of them"
        raise FastpeftError(
            f"the label words are {problem}; there must be two or more, all different. Give one word for each class."
        )
    return by_class


def refuse_one_text(texts: Any) -> None:
    """Raise `FastpeftError` where one text is given in place of several, or a table in place of a column.

    Its characters, or the names of its columns, would be taken for the texts.
    """
    if isinstance(texts, (str, bytes)):
        raise FastpeftError(f"texts is one text, {texts!r}; it must be a sequence of texts. Give [{texts!r}].")
    if isinstance(texts, Mapping) or hasattr(texts, "columns"):
        raise FastpeftError(
            f"texts is a table, a {type(texts).__name__}; it must be a sequence of texts. Give a column."
        )


def is_text(value: Any) -> bool:
    """Whether it is a string without surrogates, for which tokenizers have no code.

    Python makes one of each byte of a command line that is not UTF-8.
    """
    return isinstance(value, str) and not _SURROGATE.search(value)


def plain(label: str) -> str:
    """A name without case, spaces and signs."""
    return re.sub(r"[\W_]+", "", label.casefold())
