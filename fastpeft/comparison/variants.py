"""Variants as written: the name of a method and its own options, as `siva:targets=query+value:rank=8`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fastpeft.errors import FastpeftError
from fastpeft.methods.registry import METHODS, unknown
from fastpeft.training.config import parse_value

ZERO_SHOT = "zero-shot"  # the row with no training
CHAIN = ":init_from="  # comes last in a variant, since what follows is a variant itself
DECIDED = {  # fields of `TrainConfig` that a comparison decides, and by what
    "output": "the comparison's output decides it",
    "method": "it is the first word of a variant",
    "seed": "the number of seeds decides it",
    "settings": "name each setting by itself",
    "found_prompt": "a search finds it where the prompt is auto",
}
PROMPTED = ("prompt", "label_words", "prompt_head")  # fields that go with one of `prompts`
_LISTS = ("targets", "label_words", "text_column")  # in whose values + is a comma, as in lists of JSON


def parse_variant(text: str) -> tuple[str, dict[str, Any], str | None]:
    """A variant's method, its own options, and the variant that it starts from.

    Raises:
        FastpeftError: it cannot be read, or there is no such method.

    Example:
        >>> parse_variant("lst:targets=query+value:rank=8:init_from=mezo:prompt=sst2")
        ('lst', {'targets': 'query,value', 'rank': 8}, 'mezo:prompt=sst2')
    """
    own, chain, earlier = partition_chain(text)
    method, *items = _split(own, r":(?=\w+=)")
    if method.endswith(":"):
        raise FastpeftError(
            f"nothing follows the colon of {method!r}. Write a key and its value after it, as siva:rank=8, or none."
        )
    if method not in METHODS and method != ZERO_SHOT:
        raise FastpeftError(
            f"{unknown(method, ZERO_SHOT)} Write a variant as siva or siva:targets=query+value:rank=8, where + is a "
            'comma; put a value that has a comma itself in "".'
        )
    if chain and ZERO_SHOT in (method, earlier.partition(":")[0]):
        raise FastpeftError(f"{ZERO_SHOT} trains nothing, so it cannot start from a run, and no run can start from it.")
    values: dict[str, Any] = {}
    for item in items:
        name, _, value = item.partition("=")
        if not value or name in values:
            raise FastpeftError(f"{name} has {'two values' if name in values else 'no value'}; give it one.")
        values[name] = _value(name, value)
    return method, values, earlier if chain else None


def variant_message(variant: str, error: FastpeftError) -> str:
    """An error's message, where options that the variant does not write itself stay in backticks."""
    own = re.findall(r":(\w+)=", variant)
    return error.message_for(lambda name: name if name in own else f"`{name}`")


def split_items(text: str) -> list[str]:
    """Variants or prompts as written on a command line, joined by commas; a comma in double quotes joins nothing.

    Raises:
        FastpeftError: there is nothing on one side of a comma, or nothing at all.

    Example:
        >>> split_items('none, "{a}? <mask>, {b}":label_words=Yes+No')
        ['none', '"{a}? <mask>, {b}":label_words=Yes+No']
    """
    items = [item.strip() for item in _split(text, ",")]
    if "" in items:
        where = (
            f"there is nothing before, between or after the commas of {text!r}" if len(items) > 1 else "a list is empty"
        )
        raise FastpeftError(f"{where}. Write one comma between two names, as in siva,lora, and none at an end.")
    return items


def with_prompts(variant: str, prompts: Sequence[str]) -> list[str]:
    """A variant with each of some prompts; `none` is no prompt, which `zero-shot` takes only where it is the only one.

    A variant that has a prompt of its own, or an objective, is left as it is.
    """
    if _has_prompt(variant):
        return [variant]
    chosen = [prompt for prompt in prompts if prompt != "none"]
    if not chosen or variant.partition(":")[0] != ZERO_SHOT:
        chosen = list(prompts) or ["none"]
    return [variant if prompt == "none" else _with_prompt(variant, prompt) for prompt in chosen]


def _has_prompt(variant: str) -> bool:
    return any(item.startswith(("prompt=", "objective=")) for item in _split(partition_chain(variant)[0], ":"))


def _with_prompt(variant: str, prompt: str) -> str:
    """A variant with a prompt; the variant that it starts from has the same one, where it has none of its own."""
    own, chain, earlier = partition_chain(variant)
    if chain and not _has_prompt(earlier):
        earlier = _with_prompt(earlier, prompt)
    return f"{own}:prompt={prompt}{chain}{earlier}"


def _value(name: str, text: str) -> Any:
    """The value of a variant's key as written."""
    if not text.startswith('"') and (name in _LISTS or text.startswith("[")):
        text = ",".join(_split(text, r"\+"))
    value = parse_value(text)
    if text.startswith('"') and value == text:
        raise FastpeftError(
            f'{name} is {text}, which is no text of JSON. Close the quotes, and write \\" and \\\\ inside.'
        )
    return value


def partition_chain(text: str) -> tuple[str, str, str]:
    """A variant as written, cut around the first `CHAIN`, as `str.partition` does."""
    own, *earlier = _split(text, CHAIN)
    return own, CHAIN if earlier else "", CHAIN.join(earlier)


def _split(text: str, separator: str) -> list[str]:
    """`text`, cut at the regular expression `separator` where that is not in double quotes, as JSON has them."""
    bare = re.sub(r'"(\\.|[^"\\])*"', lambda quoted: "_" * len(quoted[0]), text)
    cuts = [0, *(place for found in re.finditer(separator, bare) for place in found.span()), len(text)]
    return [text[start:end] for start, end in zip(cuts[::2], cuts[1::2])]
