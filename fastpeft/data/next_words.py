"""Next words: texts, completions and conversations as tokens, with labels on those that a decoder learns to say.

What is learned is a text as a whole, the completion of a prompt, or every turn of the assistant in a conversation, each
with the end that the model then says too.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from fastpeft.data.conversations import ASSISTANT, USER, Conversation
from fastpeft.data.names import UNLABELLED
from fastpeft.data.token_rows import TokenRows
from fastpeft.errors import FastpeftError, first_line
from fastpeft.support.stages import report

logger = logging.getLogger(__name__)

Piece = tuple[list[int], bool]  # tokens, and whether they are learned
_REPORT_EVERY = 1_000  # texts
_CONTEXT = 100  # characters: more than any special token has
_ANSWERED = Conversation(((USER, "?"), (ASSISTANT, "!")))  # shows what a template writes around "!"


def encode_counted(tokenizer: Any, texts: Sequence[Any], max_length: int) -> tuple[TokenRows, int]:
    """Texts as rows of `input_ids`, `attention_mask` and `labels`, and how many were cut at `max_length` tokens.

    They are not padded. A row with nothing to learn is left out.

    A label is its token's own id where that is learned, else -100: models shift labels themselves. The first token has
    none, as nothing comes before it.

    Args:
        tokenizer: of a decoder.
        texts: strings; pairs of a prompt and its completion, written one after the other as they are; conversations.
        max_length: in tokens.

    Raises:
        FastpeftError: the tokenizer has no chat template for conversations, or one that does not fit them; or no row
            has a token to learn.
    """
    rows, cut = TokenRows(), 0
    for number, text in enumerate(texts):
        if number and number % _REPORT_EVERY == 0:
            report("encoding texts", number, len(texts))
        pieces = _pieces(tokenizer, text)
        tokens = [token for piece, _ in pieces for token in piece]
        labels = [token if learned else UNLABELLED for piece, learned in pieces for token in piece]
        labels[:1] = [UNLABELLED] * len(labels[:1])
        cut += len(tokens) > max_length
        tokens, labels = tokens[:max_length], labels[:max_length]
        if any(label != UNLABELLED for label in labels):
            rows.append({"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels})
    if not rows:
        raise FastpeftError(
            f"no row has anything to learn within its first {max_length} tokens. Give a larger `max_length`, or "
            "shorter prompts."
        )
    return rows, cut


def prompt_tokens(tokenizer: Any, text: Any) -> list[int]:
    """The tokens after which the model goes on: of a string all, of a pair its prompt, of a conversation what comes
    before the assistant's last turn."""
    if isinstance(text, Conversation):
        return _tokens(tokenizer, _templated(tokenizer, text.asked, ask=True), special=False)
    return _begun(tokenizer, text[0] if isinstance(text, tuple) else text)


def completion(text: Any) -> str | None:
    """The text that is learned after `prompt_tokens`; None where a row has none."""
    if isinstance(text, Conversation):
        role, content = text.turns[-1]
        return content if role == ASSISTANT and len(text.turns) > 1 else None
    return text[1] if isinstance(text, tuple) else None


def end_tokens(tokenizer: Any, *, chats: bool) -> set[int]:
    """The tokens after which nothing more is said: the end of a text, and of conversations that of a turn."""
    found = {tokenizer.eos_token_id} - {None}
    return found | end_of_turn(tokenizer) if chats else found


def end_of_turn(tokenizer: Any) -> set[int]:
    """The last special token that the chat template writes after what the assistant says; empty where it has none."""
    _, _, after = _templated(tokenizer, _ANSWERED, ask=False).rpartition("!")
    # not all are among `all_special_ids`: Llama 3's <|eot_id|> is not beside its base
    special = [
        token
        for token in _tokens(tokenizer, after, special=False)
        if tokenizer.decode([token]) != tokenizer.decode([token], skip_special_tokens=True)
    ]
    return {*special[-1:]}


def opening(tokenizer: Any) -> str:
    """What the chat template has the assistant say before its words, as Qwen3's an empty thought; mostly nothing."""
    asked, whole = _templated(tokenizer, _ANSWERED.asked, ask=True), _templated(tokenizer, _ANSWERED, ask=False)
    if not whole.startswith(asked):  # it opens the answer itself, so the data's answers begin so
        return ""
    before, _, _ = whole.removeprefix(asked).partition("!")
    said: str = tokenizer.decode(_tokens(tokenizer, before, special=False), skip_special_tokens=True)
    return said.strip()


def _pieces(tokenizer: Any, text: Any) -> list[Piece]:
    """A row in parts, in their order."""
    if isinstance(text, Conversation):
        return _turns(tokenizer, text)
    if isinstance(text, tuple):
        return [(_begun(tokenizer, text[0]), False), (_ended(tokenizer, _after(tokenizer, *text)), True)]
    return [(_ended(tokenizer, _begun(tokenizer, text)), True)]


def _turns(tokenizer: Any, conversation: Conversation) -> list[Piece]:
    """The assistant's turns, each after all that its template writes before it.

    Raises:
        FastpeftError: what the template writes for the first turns is not how it begins for more of them, so it does
            not tell where a turn begins.
    """
    pieces: list[Piece] = []
    written = ""
    for number, (role, said) in enumerate(conversation.turns):
        if role != ASSISTANT:
            continue
        before = _templated(tokenizer, Conversation(conversation.turns[:number]), ask=True) if number else ""
        after = _templated(tokenizer, Conversation(conversation.turns[: number + 1]), ask=False)
        if not number:  # a template may write a system turn of its own before it, which no turns at all do not show
            before = after[: max(0, after.rfind(said.strip()))]
        if not (before.startswith(written) and after.startswith(before)):
            raise FastpeftError(
                "the tokenizer's chat template writes earlier turns otherwise once others follow, so where the "
                "assistant's turns begin cannot be told. Give columns named prompt and completion, or a tokenizer "
                "with another chat template."
            )
        pieces.append((_after(tokenizer, written, before[len(written) :]), False))
        pieces.append((_after(tokenizer, before, after[len(before) :]), True))
        written = after
    return pieces


def _templated(tokenizer: Any, conversation: Conversation, *, ask: bool) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise FastpeftError(
            f"the tokenizer ({type(tokenizer).__name__}) has no chat template, which conversations need. Give a model "
            "that was trained to chat, or columns named prompt and completion."
        )
    try:
        text: str = tokenizer.apply_chat_template(conversation.messages, tokenize=False, add_generation_prompt=ask)
    except Exception as error:  # a template raises what it likes
        raise FastpeftError(
            f"the chat template refuses a conversation: {first_line(error).rstrip('.')}. Its turns are "
            f"{', '.join(role for role, _ in conversation.turns)}. Write them as the template wants them."
        ) from error
    return text


def _begun(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text at the beginning, with the special tokens before it and not those after it."""
    tokens = _tokens(tokenizer, text, special=True)
    if tokens[:2] == [tokenizer.bos_token_id] * 2:  # the text has its own, as one that a chat template wrote
        tokens = tokens[1:]
    return tokens[:-1] if len(tokens) > 1 and _puts_an_end_last(tokenizer) else tokens


def _ended(tokenizer: Any, tokens: list[int]) -> list[int]:
    """Tokens with the end of a text, which some texts have already."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return tokens if tokens[-1:] == end else tokens + end


def _after(tokenizer: Any, before: str, text: str) -> list[int]:
    """The tokens of a text that goes on from `before`, as it stands: some tokenizers, as Llama 2's, put a space before
    any text that is alone, and some of these, as Mistral's, also before what follows a special token."""
    if not (before and _puts_a_space_first(tokenizer)):
        return _tokens(tokenizer, text, special=False)
    near = before[-_CONTEXT:]
    begun, both = (_tokens(tokenizer, each, special=False) for each in (near, near + text))
    if both[: len(begun)] == begun:
        return both[len(begun) :]
    in_line = _in_line(tokenizer, text)
    return _tokens(tokenizer, text, special=False) if in_line is None else in_line


@lru_cache(maxsize=1)  # these are asked for every piece of every row
def _puts_an_end_last(tokenizer: Any) -> bool:
    plain, whole = (_tokens(tokenizer, "a", special=special)[-1:] for special in (False, True))
    return whole == [tokenizer.eos_token_id] != plain  # in some the end is an unknown "a" too


@lru_cache(maxsize=1)
def _puts_a_space_first(tokenizer: Any) -> bool:
    return _tokens(tokenizer, "a", special=False) != _in_line(tokenizer, "a")


def _in_line(tokenizer: Any, text: str) -> list[int] | None:
    """The tokens of a text after a line break; None where they cannot be told from it."""
    ended = _tokens(tokenizer, "\n", special=False)
    both = _tokens(tokenizer, f"\n{text}", special=False)
    return both[len(ended) :] if both[: len(ended)] == ended else None


def _tokens(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    tokens: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    return tokens
