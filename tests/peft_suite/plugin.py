"""Loaded into pytest beside PEFT's own tests: puts SiVA into their tables, and marks the exceptions."""

from __future__ import annotations

import fnmatch
import importlib
import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from fastpeft import SivaConfig

from .cases import EXCEPTIONS, TABLES
from .stand_ins import STAND_INS

if importlib.util.find_spec("diffusers") is None:  # the shared tests only ask whether a model is such a pipeline
    diffusers = ModuleType("diffusers")
    diffusers.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
    sys.modules["diffusers"] = diffusers


def _file(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Before pytest reads a test's tables: let those of methods hold SiVA's rows alone.

    The lists are changed in place, since the test's marks hold them.
    """
    tables = {id(values): name for name, values in vars(metafunc.module).items() if isinstance(values, list)}
    for mark in metafunc.definition.iter_markers("parametrize"):
        values = mark.args[1]
        rows = TABLES.get((_file(metafunc.module), tables.get(id(values), metafunc.function.__name__)))
        if rows is not None and "config" in str(mark.args[0]):
            values[:] = rows


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that have a row of SiVA; expect those of `EXCEPTIONS` to fail."""
    kept = [item for item in items if _is_siva(item)]
    config.hook.pytest_deselected(items=[item for item in items if not _is_siva(item)])
    items[:] = kept
    names = {item: f"{_file(item.module)}::{item.name}" for item in kept}  # type: ignore[attr-defined]
    files = {_file(item.module) for item in kept}  # type: ignore[attr-defined]
    for exception in EXCEPTIONS:
        meant = [item for item, name in names.items() if fnmatch.fnmatchcase(name, exception.tests)]
        if not meant and fnmatch.filter(files, exception.tests.partition("::")[0]):
            items.append(_NoSuchTest.from_parent(kept[0].session, name=exception.tests))
        for item in meant:
            item.add_marker(pytest.mark.xfail(reason=exception.reason, raises=exception.raises, strict=True))


class _NoSuchTest(pytest.Item):
    """Fails for an entry of `EXCEPTIONS` that matches nothing. An error while tests are collected hangs xdist."""

    def runtest(self) -> None:
        pytest.fail(f"EXCEPTIONS: no test is called {self.name}", pytrace=False)


def _is_siva(item: pytest.Item) -> bool:
    callspec: Any = getattr(item, "callspec", SimpleNamespace(params={}))
    return any(value is SivaConfig or isinstance(value, SivaConfig) for value in callspec.params.values())


@pytest.fixture(autouse=True)
def _fit_for_siva(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where PEFT's tests name the methods that can do a thing, SiVA stands beside them; no test asks the hub."""
    common = importlib.import_module(".testing_common", request.module.__package__)
    monkeypatch.setattr(common, "LoHaConfig", SivaConfig)  # of those that adapt a Conv1D
    if "mixed_adapter_batches" in request.function.__name__:
        for module in (common, request.module):
            monkeypatch.setattr(module, "LoraConfig", SivaConfig)
    # meant for one method, it skips models and changes targets for all
    monkeypatch.setattr(request.module, "check_beft_config", lambda *_: None, raising=False)
    # the decoders' inputs repeat one token, of which all queries and keys find the same
    if "decoder" in request.module.__name__:
        monkeypatch.setattr(request.cls, "prepare_inputs_for_testing", _other_tokens(request.cls))
    utils = importlib.import_module(".testing_utils", request.module.__package__)
    utils._HUB_MODEL_ACCESSES.update(dict.fromkeys(STAND_INS, 1))  # what was asked before is read from the cache


def _other_tokens(tests: Any) -> Any:
    """`tests.prepare_inputs_for_testing`, with another token at each place."""
    prepare = tests.prepare_inputs_for_testing

    def prepare_inputs_for_testing(self: Any) -> dict[str, torch.Tensor]:
        inputs = prepare(self)
        ids = inputs["input_ids"]
        return {**inputs, "input_ids": torch.arange(3, 3 + ids.numel(), device=ids.device).view(ids.shape)}

    return prepare_inputs_for_testing
