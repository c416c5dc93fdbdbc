"""The side networks of a pool, and which of them are computed together."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastpeft.errors import FastpeftError
from fastpeft.ladder.side import SideNetwork
from fastpeft.ladder.side_stack import SideStack, shape_of
from fastpeft.prompts.model import inside_prompt


@dataclass(frozen=True)
class Members:
    """The side networks of a pool at one time. A change makes a new one, so that running calls keep theirs.

    Attributes:
        models: by task, each a `LadderModel` or a `PromptModel` around one.
        stacks: side networks of one shape, with their tasks in the stack's order.
    """

    models: Mapping[str, Any]
    stacks: Sequence[tuple[tuple[str, ...], SideStack]]

    def __getitem__(self, name: str) -> Any:
        if name not in self.models:
            there = ", ".join(map(repr, self.models)) or "none"
            raise FastpeftError(f"the pool has no task {name!r}; its tasks are {there}. Add it first.")
        return self.models[name]

    def changed(self, models: Mapping[str, Any], member: Any) -> Members:
        """Members with `models`; `member` was added or removed, so only the stack of its shape is made again."""
        own = inside_prompt(member).side
        shape = shape_of(own)
        stacks = []
        for names, stack in self.stacks:
            # its own may have another shape by now
            stack.retired = shape_of(stack.sides[0]) == shape or any(side is own for side in stack.sides)
            if not stack.retired:
                stacks.append((names, stack))
        there = {name for names, _ in stacks for name in names}
        left: dict[Hashable, dict[str, SideNetwork]] = {}
        for name, model in models.items():
            if name not in there:
                side = inside_prompt(model).side
                left.setdefault(shape_of(side), {})[name] = side
        stacks += [(tuple(alike), SideStack(list(alike.values()))) for alike in left.values()]
        return Members(models, stacks)

    def batches(self, rows: Mapping[str, Sequence[int]]) -> Iterator[tuple[list[str], SideStack, list[int]]]:
        """Groups of tasks to compute together, each with its stack and the places of its tasks in it.

        All tasks of a group are padded to the most rows of any, so tasks with fewer than half of that are in another.
        """
        for names, stack in self.stacks:
            waiting = sorted((name for name in names if name in rows), key=lambda name: -len(rows[name]))
            while waiting:
                chosen = {name for name in waiting if 2 * len(rows[name]) >= len(rows[waiting[0]])}
                waiting = [name for name in waiting if name not in chosen]
                places = [place for place, name in enumerate(names) if name in chosen]
                yield [names[place] for place in places], stack, places
