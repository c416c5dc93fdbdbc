"""Runs something when another library is imported, delays an import, or hides one. It imports none by itself.

Libraries import one another while they load. So what waits for a module runs when the outermost import has ended: of
this library's own modules, or of any in the libraries that are waited for.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import LazyLoader
from types import ModuleType
from typing import Any

_OWN = __name__.partition(".")[0]


class _Hook(MetaPathFinder):
    """Finds modules as the other finders do, and sees those of this library and of the libraries in `actions` load.

    Attributes:
        actions: what to do, by the name of the module that it waits for.
        depth: how many of those modules are loading now.
        loaded: names of those that have loaded, and wait for the others to end.
    """

    def __init__(self, actions: dict[str, Callable[[], object]]) -> None:
        self.actions = actions
        self.libraries = {_OWN, *(name.partition(".")[0] for name in actions)}
        self.depth = 0
        self.loaded: list[str] = []

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in self.libraries:
            return None
        spec = _found_by_others(self, fullname, path, target)
        if spec is not None and spec.loader is not None:
            self._watch(spec.loader)
        return spec

    def _watch(self, loader: Any) -> None:
        """Let this one loader, which loads one module, tell when it begins and ends."""
        load = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module  # as it was
            name = module.__name__  # a library may put another object in the module's place
            self.depth += 1
            try:
                load(module)
                self.loaded += [name] if name in self.actions else []
            finally:
                self.depth -= 1
            self.act()

        loader.exec_module = exec_module

    def act(self) -> None:
        """Do what waited for modules that have loaded; after the last, look at no import any more."""
        while self.loaded and self.depth == 0:
            name = self.loaded.pop(0)
            try:
                self.actions.pop(name)()
            except Exception as error:  # as of a later version that lacks a name: the import of others goes on
                warnings.warn(f"{_OWN} does not fit the {name} that is installed: {error}", stacklevel=2)
        if not self.actions and self in sys.meta_path:
            sys.meta_path.remove(self)


class _Delay(MetaPathFinder):
    """Finds modules as the other finders do, and lets them load when something of them is used."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.names:
            return None
        spec = _found_by_others(self, fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = LazyLoader(spec.loader)
        return spec


class _Hide(MetaPathFinder):
    """Finds a module as the other finders do, and lets it load as if an optional one were not installed."""

    def __init__(self, name: str, hidden: str) -> None:
        self.name, self.hidden = name, hidden

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name or self.hidden in sys.modules:
            return None
        spec = _found_by_others(self, fullname, path, target)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            load = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                sys.modules[self.hidden] = None  # type: ignore[assignment]  # an import of it raises ImportError
                try:
                    load(module)
                finally:
                    del sys.modules[self.hidden]

            loader.exec_module = exec_module
        return spec


def _found_by_others(
    finder: MetaPathFinder, fullname: str, path: Sequence[str] | None, target: ModuleType | None
) -> ModuleSpec | None:
    others = [other for other in sys.meta_path if other is not finder]
    found = (other.find_spec(fullname, path, target) for other in others)
    return next((spec for spec in found if spec is not None), None)


def when_imported(actions: dict[str, Callable[[], object]]) -> None:
    """Call what `actions` has by the name of a module, once: now if that is imported already, else as soon as it is."""
    hook = _Hook(dict(actions))
    hook.loaded += [name for name in actions if name in sys.modules]
    sys.meta_path.insert(0, hook)
    hook.act()


def import_when_used(*names: str) -> None:
    """Have these modules load when something of them is used, not when another library imports them."""
    sys.meta_path.insert(0, _Delay(names))


def import_without(name: str, hidden: str) -> None:
    """Have a module load as if `hidden`, which it imports where it can, were not installed; others may import that."""
    sys.meta_path.insert(0, _Hide(name, hidden))
