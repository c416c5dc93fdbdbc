"""How the reference reads this library's docstrings."""

from __future__ import annotations

from typing import Any

from griffe import Extension, Object


class ExampleSections(Extension):
    """Make code of `Example:`, which the parser knows in the plural alone and would set as running text."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
