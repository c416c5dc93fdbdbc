"""Conversations: turns of a system, a user and an assistant, as chat templates of transformers take them."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastpeft.data.values import RowRef
from fastpeft.errors import FastpeftError

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
ROLES = (SYSTEM, USER, ASSISTANT, "tool")
_FORM = 'Write a list of turns, each {"role": "user", "content": "..."}.'
_WRITTEN = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']""")
_BESIDE = ("system", "tools", "images")  # columns that other libraries read with those of conversations


@dataclass(frozen=True)
class Conversation:
    """The turns of a conversation, each a role and what is said."""

    turns: tuple[tuple[str, str], ...]

    @property
    def messages(self) -> list[dict[str, str]]:
        """The turns as `apply_chat_template` takes them."""
        return [{"role": role, "content": content} for role, content in self.turns]

    @property
    def asked(self) -> Conversation:
        """The conversation without its last turn, if that is the assistant's; else the whole."""
        return Conversation(self.turns[:-1]) if self.turns[-1][0] == ASSISTANT else self

    def __str__(self) -> str:
        return "\n".join(f"{role}: {content}" for role, content in self.turns)


def is_conversation(value: Any) -> bool:
    """Whether a value looks like the messages of a conversation."""
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value)


def is_written(value: Any) -> bool:
    """Whether a value looks like the messages of a conversation that were written as a text, as in a csv file."""
    return isinstance(value, str) and _WRITTEN.match(value) is not None


def unread(rows: Iterable[Mapping[str, Any]], column: str) -> list[str]:
    """Names of what conversations in `column` have that is not read: of what turns hold, and of columns beside them."""
    beside = {name for row in rows for name in _BESIDE if row.get(name)}
    of_turns = {
        name
        for row in rows
        if is_conversation(row.get(column))
        for turn in row[column]
        for name, value in turn.items()
        if name not in ("role", "content") and value is not None and value != []
    }
    return sorted(beside | of_turns)


def as_conversation(value: Any, column: str, at: RowRef, *, answered: bool = True) -> Conversation:
    """The conversation of a cell: a list of `{"role": ..., "content": ...}`.

    Args:
        value: of the cell.
        column, at: where it stands, for messages.
        answered: whether the assistant must have a turn, as to learn from it.

    Raises:
        FastpeftError: it is no such list, a role is unknown, a turn says nothing, the system does not come first, or
            the assistant has no turn.
    """

    def refuse(what: str, remedy: str) -> FastpeftError:
        return FastpeftError(f"{at} has {what} in column {column!r}. {remedy}")

    if not is_conversation(value):
        raise refuse(reprlib.repr(value), f"{_FORM[:-1]}, as jsonl and parquet files can hold.")
    conversation = check_conversation(value, refuse)
    if answered and ASSISTANT not in (role for role, _ in conversation.turns):
        raise refuse("no turn of the assistant", "Its turns are what is learned: add one, or remove the row.")
    return conversation


def check_conversation(value: Sequence[Mapping[str, Any]], refuse: Callable[[str, str], FastpeftError]) -> Conversation:
    """The conversation of turns `{"role": ..., "content": ...}`; `refuse` makes the error of a fault and its remedy."""
    turns: list[tuple[str, str]] = []
    for number, turn in enumerate(value, start=1):
        if "role" not in turn:
            raise refuse(f"turn {number} without a role, but with {' and '.join(map(repr, turn)) or 'nothing'}", _FORM)
        role, content = turn["role"], turn.get("content")
        if role not in ROLES:
            raise refuse(f"turn {number} with the role {role!r}", f"Roles are {', '.join(ROLES)}.")
        if not isinstance(content, str):
            raise refuse(f"turn {number} with the content {content!r}", f"It must be text. {_FORM}")
        if not content.strip():
            raise refuse(f"turn {number}, of the {role}, with nothing in it", "Write what is said, or remove the turn.")
        if role == SYSTEM and number > 1:
            raise refuse(f"a turn of the system as turn {number}", "It comes first, or not at all.")
        turns.append((role, content))
    return Conversation(tuple(turns))
