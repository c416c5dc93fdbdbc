"""A public name that is added, removed or takes other arguments has its line in the CHANGELOG.

`golden/public_names.json` has the names of the last release; a release writes it anew from `public_names()`.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

import fastpeft
import fastpeft.functional

RELEASED: dict[str, list[str]] = json.loads(
    Path(__file__).with_name("golden").joinpath("public_names.json").read_text()
)
CHANGELOG = (Path(__file__).parents[1] / "CHANGELOG.md").read_text(encoding="utf-8")
NEWEST = CHANGELOG.split("\n## ")[1]  # what has changed since the last release


def public_names() -> dict[str, list[str]]:
    """The arguments of each public function and class; those that go to another library, `*args`, are left out."""
    named = {name: getattr(fastpeft, name) for name in fastpeft.__all__ if name != "functional"}
    named |= {name: getattr(fastpeft.functional, name) for name in fastpeft.functional.__all__}
    return {name: arguments(value) if callable(value) else [] for name, value in sorted(named.items())}


def arguments(function: object) -> list[str]:
    if isinstance(function, type) and issubclass(function, Exception):
        return []
    parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    return [each.name for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]


def untold(names: Mapping[str, list[str]], released: Mapping[str, list[str]], changes: str) -> list[str]:
    """What differs from the last release, but for the arguments of new names, and is not in `changes`."""
    differing = [*names.keys() ^ released.keys()]
    for name in names.keys() & released.keys():
        differing += {*names[name]} ^ {*released[name]}
    told = {word for quoted in re.findall(r"`([^`]+)`", changes) for word in re.findall(r"\w+", quoted)}
    return sorted({*differing} - told)


def test_every_public_name_that_changed_is_in_the_changelog() -> None:
    assert untold(public_names(), RELEASED, NEWEST) == []


@pytest.mark.parametrize(
    ("released", "found"),
    [
        ({"train": ["config"]}, []),
        ({}, []),
        ({"train": ["config"], "unpack": []}, ["unpack"]),
        ({"train": ["config", "device"]}, ["device"]),
        ({"train": []}, ["config"]),
        ({"train": ["config", "quiet"]}, []),
    ],
)
def test_a_change_is_seen(released: dict[str, list[str]], found: list[str]) -> None:
    assert (
        untold({"train": ["config"]}, released, "- `train(quiet=True)` says nothing; device, unpack, config.") == found
    )
