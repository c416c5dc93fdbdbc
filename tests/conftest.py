"""What every test runs under: no network, one thread, a sample of the long tests; and a model and data for many.

    python -m pytest            the short suite (`make test`); what it finds: bench/data/mutations.csv
    python -m pytest --all      long tests too (`make test-all`); `--rest` runs those alone
    python -m pytest --full     every case of every test (`make test-full`)

Tests marked slow, interp_full, kill or docs run in full under `--full`. Without it a tenth of each marker's tests runs,
at least one, drawn by FASTPEFT_TEST_SEED (default 0) so that a failure can be drawn again. Long are tests marked long,
slow, kill or docs. Of a test marked `long(but=...)` the named cases are in the short suite, of one marked
`long(only=...)` all others.
"""

from __future__ import annotations

import functools
import gc
import logging
import math
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from fastpeft import TrainConfig

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that a test starts
# most tests compare bits or small errors; what a run computes in by default is in training/test_bfloat16.py
os.environ["FASTPEFT_BF16"] = "0"

import torch

LONG_MARKERS = ("slow", "interp_full", "kill", "docs")
SAMPLED_SHARE = 0.1
SEED = os.environ.get("FASTPEFT_TEST_SEED", "0")

torch.set_num_threads(1)
os.fsync = lambda descriptor: None  # which waits for a disk: no test cuts the power
if not torch.cuda.is_available():
    # kernels then run in Triton's interpreter; Triton reads this once, and transformers imports Triton
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run long tests too")
    parser.addoption("--rest", action="store_true", help="run long tests alone")
    parser.addoption("--full", action="store_true", help="run every case of every test")


def pytest_report_header(config: pytest.Config) -> str:
    return "every case" if config.getoption("--full") else f"a sample of many cases, FASTPEFT_TEST_SEED={SEED}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    named = config.getoption("-m") or any("::" in argument for argument in config.args)
    if config.getoption("--full") or named:
        return
    dropped: set[pytest.Item] = set()
    for marker in LONG_MARKERS:
        marked = [item for item in items if item.get_closest_marker(marker)]
        count = math.ceil(SAMPLED_SHARE * len(marked))
        dropped |= set(marked) - set(random.Random(f"{SEED}:{marker}").sample(marked, count))
    if not config.getoption("--all"):
        wanted = config.getoption("--rest")
        dropped |= {item for item in items if _is_long(item) is not wanted}
    config.hook.pytest_deselected(items=list(dropped))
    items[:] = [item for item in items if item not in dropped]


def pytest_collection_finish() -> None:
    """What was imported stays: a collection of garbage, which every run asks for, need not go through it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


def _is_long(item: pytest.Item) -> bool:
    marker = item.get_closest_marker("long")
    if marker is None:
        return any(item.get_closest_marker(name) for name in ("slow", "kill", "docs"))
    case = item.name.partition("[")[2].removesuffix("]")
    if "only" in marker.kwargs:
        return case in _cases(marker.kwargs["only"])
    return case not in _cases(marker.kwargs.get("but", ()))


def _cases(given: str | tuple[str, ...]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else given


@pytest.fixture(scope="session")
def device() -> str:
    """Where Triton's kernels run: on a GPU where there is one, else in its interpreter on CPU tensors."""
    if torch.cuda.is_available():
        return "cuda"
    import numpy
    import triton

    versions = [tuple(map(int, package.__version__.split(".")[:2])) for package in (triton, numpy)]
    if versions[0] < (3, 7) and versions[1] >= (2, 4):
        pytest.skip("the interpreter of Triton before 3.7 cannot run loops with NumPy 2.4 or newer")
    return "cpu"


@pytest.fixture(scope="session")
def bfloat16_products(device: str) -> Iterator[None]:
    """The interpreter keeps bfloat16 as raw 16-bit integers and would multiply those; widen them for `tl.dot`."""
    if device == "cuda":
        yield
        return
    import triton.language as tl
    from triton.runtime.interpreter import interpreter_builder as builder

    multiply = builder.create_dot

    def create_dot(a: Any, b: Any, *rest: Any) -> Any:
        return multiply(
            *(builder.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)), *rest
        )

    builder.create_dot = create_dot
    yield
    del builder.create_dot


@pytest.fixture
def interpreter(device: str) -> None:
    """For what runs Triton's kernels on CPU tensors."""
    if device == "cuda":
        pytest.skip("where there is a GPU, kernels are compiled for it and take no CPU tensors")


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> Iterator[None]:
    """Calls of one function by another patch no language again: the launch did. It took a third of the time."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None or not hasattr(interpreter, "_patch_lang"):
        yield
        return
    language = interpreter.tl

    @functools.cache
    def read_by(function: Any) -> list[Any]:
        return [value for value in function.__globals__.values() if value is language or value is language.core]

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if any(language.core.is_builtin(module.load) for module in read_by(self.fn)):
            interpreter._patch_lang(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    before = interpreter.InterpretedFunction.__call__
    interpreter.InterpretedFunction.__call__ = call
    yield
    interpreter.InterpretedFunction.__call__ = before


@pytest.fixture(autouse=True)
def plain_logging() -> None:
    """The library's logger as it is without a command, which sets it up for its process: here that of all tests."""
    for name in ("fastpeft", "fastpeft.data.result_warnings"):
        logging.getLogger(name).setLevel(logging.NOTSET)
    logging.getLogger("fastpeft").handlers = []


@pytest.fixture(autouse=True)
def curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs leave an empty file for their curves, which are slow to draw: that is in training/test_curves.py."""
    if outcome := sys.modules.get("fastpeft.training.outcome"):
        monkeypatch.setattr(outcome, "draw_curves", lambda file, *curves: file.touch())


@pytest.fixture
def fresh_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes where no test before has set anything: it keeps that by addresses, which later parameters reuse."""
    optim = pytest.importorskip("bitsandbytes.optim")
    monkeypatch.setattr(optim.GlobalOptimManager, "_instance", None)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT as a person's Ctrl-C has it: what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def one_thread_after() -> Iterator[None]:
    """For what sets how many there are. Tests have one: workers run side by side, and what they train is tiny."""
    yield
    torch.set_num_threads(1)


@pytest.fixture
def two_threads(one_thread_after: None) -> None:
    """For what divides its threads."""
    torch.set_num_threads(2)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and reviews that it can learn."""
    from samples import reviews, save_tiny_model, write_csv  # and with it transformers, after what is set above

    folder = tmp_path_factory.mktemp("place")
    save_tiny_model(folder / "model")
    write_csv(folder / "reviews.csv", reviews(60))
    return folder


@pytest.fixture
def config(tmp_path: Path, place: Path) -> TrainConfig:
    """A short run on what is in `place`."""
    from fastpeft import TrainConfig

    return TrainConfig(
        output=str(tmp_path / "run"),
        method="full",
        model=str(place / "model"),
        data=str(place / "reviews.csv"),
        max_steps=3,
        learning_rate=1e-2,
    )
