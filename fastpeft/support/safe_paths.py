"""Files that a folder's own JSON names: those in the folder are read, and no others.

The libraries that read models, tokenizers and data sets join such a name to the folder's path as it stands. `../`, a
whole path or a link would lead them to files of the person who loads the folder, whoever wrote it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastpeft.errors import FastpeftError
from fastpeft.support import files

_INDEX = "*.index.json"
# the files that name others, and under which keys
_KEYS = {
    _INDEX: ("weight_map",),
    "config*.json": ("transformers_weights", "configuration_files"),  # config.json may name another, as config.5.0.json
    "tokenizer_config.json": ("fast_tokenizer_files",),
    "state.json": ("_data_files",),  # this and the next of a data set that `datasets` saved
    "dataset_dict.json": ("splits",),
}


def check_named_files(folder: Path) -> None:
    """Raise `FastpeftError` where the JSON in a local folder names a file outside of it.

    Files that cannot be read are left for their readers to tell. Files in the hub's cache are links; what these lead to
    in the cache counts as inside.
    """
    found = [(file, keys) for pattern, keys in _KEYS.items() for file in sorted(folder.glob(pattern))]
    for file, keys in found:
        try:
            values = files.read_json(file)
        except FastpeftError:
            continue
        named = [name for key in keys for name in _strings(values.get(key))]
        if file.name == "tokenizer_config.json":
            named += _left_over(values)
        for name in named:
            if not _is_inside(folder, name):
                raise FastpeftError(
                    f"{file} names {name!r}, which lies outside of its folder, so nothing of the folder is read. "
                    "Put that file beside it and correct the name, or take the folder from whom you trust."
                )
        if "transformers_weights" in keys:  # an index, perhaps in a folder of its own
            found += [(folder / name, _KEYS[_INDEX]) for name in named if name.endswith(_INDEX[1:])]


def _strings(value: Any) -> Iterator[str]:
    """The strings in a value of JSON, but for the keys of its objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)


def _left_over(values: dict[str, Any]) -> list[str]:
    """Files that a tokenizer's configuration may name since early versions of transformers, where they are there."""
    named = [value for key, value in values.items() if key.endswith("_file") and key != "special_tokens_map_file"]
    return [name for name in named if isinstance(name, str) and "\0" not in name and os.path.exists(name)]


def _is_inside(folder: Path, name: str) -> bool:
    """Whether a name, and what it is a link to, stays in the folder."""
    root = Path(os.path.abspath(folder))
    if "\0" in name or not Path(os.path.normpath(root / name)).is_relative_to(root):
        return False
    try:
        place = (root / name).resolve()
    except (OSError, RuntimeError):  # links that go round
        return False
    in_cache = place.parent.name == "blobs" and place.parent.parent.name.startswith(("models--", "datasets--"))
    return in_cache or place.is_relative_to(root.resolve())
