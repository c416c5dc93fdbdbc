"""The choice by measurement: timed once, kept on disk, fixed where bits matter most."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from samples import Interrupt, reviews, save_tiny_model, write_csv
from torch.nn import functional as F

from fastpeft import TrainConfig, train
from fastpeft.ops import packing
from fastpeft.ops.autotune import Candidates, Timings, in_words
from fastpeft.support import files

QUESTION = ("a product", torch.float32, 8, "x", 9)


def candidates(made: list[str], slow: str) -> Callable[[], Candidates]:
    """Two of them, of which one sleeps; notes that they were asked for."""

    def make() -> Candidates:
        made.append(slow)
        return {way: partial(time.sleep, 0.004 if way == slow else 0) for way in ("packed", "plain")}

    return make


def test_the_fastest_is_taken_and_timed_once(tmp_path: Path) -> None:
    made: list[str] = []
    timings = Timings(tmp_path / "folder" / "times.json")
    for _ in range(2):
        assert timings.answer(QUESTION, "packed", candidates(made, "packed")) == "plain"
    assert timings.answer((*QUESTION, "of another class"), "packed", candidates(made, "plain")) == "packed"
    assert made == ["packed", "plain"]
    assert list(timings.used) == list(timings.known())


def test_processes_share_what_was_timed_first(tmp_path: Path) -> None:
    made: list[str] = []
    file = tmp_path / "times.json"
    first, second = Timings(file), Timings(file)
    assert second.known() == {}  # read before the first has timed anything
    assert first.answer(QUESTION, "packed", candidates(made, "packed")) == "plain"
    assert second.answer(QUESTION, "packed", candidates(made, "plain")) == "plain"
    assert Timings(file).answer(QUESTION, "packed", candidates(made, "plain")) == "plain"
    assert made == ["packed"]  # the others read it


def test_of_processes_that_begin_together_one_times(tmp_path: Path) -> None:
    program = (
        "import sys, time, pathlib, functools; from fastpeft.ops.autotune import Timings\n"
        "candidates = lambda: {w: functools.partial(time.sleep, 0.01 if w == sys.argv[2] else 0) for w in ('a', 'b')}\n"
        "print(Timings(pathlib.Path(sys.argv[1])).answer(('q',), 'a', candidates))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "times.json")]
    processes = [subprocess.Popen([*command, slow], stdout=subprocess.PIPE, text=True) for slow in ("a", "b")]
    answers = {process.communicate()[0] for process in processes}
    assert len(answers) == 1
    assert answers < {"a\n", "b\n"}


def test_a_run_that_goes_on_takes_its_own(tmp_path: Path) -> None:
    made: list[str] = []
    timings = Timings(tmp_path / "times.json")
    assert timings.answer(QUESTION, "packed", candidates(made, "packed")) == "plain"
    (question,) = timings.used
    kept = {question: {"packed": 1.0, "plain": 2.0}, "another": {"a": 1.0}}
    timings.begin({**kept, "damaged": "by hand", "empty": {}})
    assert timings.answer(QUESTION, "packed", candidates(made, "packed")) == "packed"
    assert timings.used == kept  # and loses none
    timings.begin()
    assert timings.answer(QUESTION, "packed", candidates(made, "packed")) == "plain"


def test_what_cannot_be_timed_is_fixed_unless_it_is_known(tmp_path: Path) -> None:
    timings = Timings(tmp_path / "times.json")
    assert timings.answer(QUESTION, "packed", None) == "packed"
    assert timings.answer(QUESTION, "packed", candidates([], "packed")) == "plain"
    assert timings.answer(QUESTION, "packed", None) == "plain"


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a product": 3}'])
def test_a_damaged_file_is_written_anew(tmp_path: Path, content: str) -> None:
    file = tmp_path / "times.json"
    file.write_text(content)
    assert Timings(file).answer(QUESTION, "packed", candidates([], "packed")) == "plain"
    assert len(json.loads(file.read_text())) == 1


def test_a_place_that_cannot_be_written_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    timings = Timings(tmp_path / "taken" / "times.json")
    assert timings.answer(QUESTION, "packed", candidates([], "packed")) == "plain"


def test_a_disk_that_is_full_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_json", full)
    made: list[str] = []
    timings = Timings(tmp_path / "times.json")
    for _ in range(2):
        assert timings.answer(QUESTION, "packed", candidates(made, "packed")) == "plain"
    assert made == ["packed"]


class CompilationError(Exception):
    """No RuntimeError, as Triton's."""


def fail() -> None:
    raise CompilationError


def test_a_candidate_that_fails_is_left_out(tmp_path: Path) -> None:
    timings = Timings(tmp_path / "times.json")
    assert timings.answer(QUESTION, "packed", lambda: {"packed": fail, "plain": int}) == "plain"
    with pytest.raises(CompilationError):
        timings.answer((*QUESTION, "of another class"), "packed", lambda: {"packed": fail, "plain": fail})


def test_a_small_difference_changes_nothing(tmp_path: Path) -> None:
    timings = Timings(tmp_path / "times.json")
    timings.begin({"a product float32 8 x 9, threads " + str(torch.get_num_threads()): {"packed": 1.0, "plain": 0.99}})
    assert timings.answer(QUESTION, "packed", candidates([], "packed")) == "packed"


def test_answers_are_fixed_where_bits_matter(tmp_path: Path) -> None:
    made: list[str] = []
    file = tmp_path / "times.json"
    assert Timings(file, enabled=False).answer(QUESTION, "packed", candidates(made, "packed")) == "packed"
    torch.use_deterministic_algorithms(True)
    try:
        assert Timings(file).answer(QUESTION, "packed", candidates(made, "packed")) == "packed"
    finally:
        torch.use_deterministic_algorithms(False)
    assert made == []
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("fastest", ["packed", "plain"])
def test_a_weight_is_packed_where_that_is_fastest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fastest: str, transposed: bool
) -> None:
    timings = Timings(tmp_path / "times.json")
    monkeypatch.setattr(packing, "timings", timings)
    weight, x = torch.randn(40, 24), torch.randn(3, 50, 40 if transposed else 24)
    packs = packing.Packs()
    packing.operand(weight, packs, x, transposed)
    (question,) = timings.used
    assert set(timings.used[question]) == {"packed", "plain"}  # both were timed
    timings.begin({question: {way: 1.0 if way == fastest else 2.0 for way in ("packed", "plain")}})
    operand = packing.operand(weight, packs, x, transposed)
    assert operand.is_mkldnn == (fastest == "packed")
    found = (
        packing.packed_linear(x, operand, None)
        if operand.is_mkldnn
        else F.linear(x, weight.t() if transposed else weight)
    )
    torch.testing.assert_close(found, x @ (weight if transposed else weight.t()))


@pytest.mark.parametrize(("rows", "timed"), [(1, 1), (9, 16), (16, 16), (100, 128), (129, 512), (4000, 512)])
def test_products_are_timed_by_their_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rows: int, timed: int
) -> None:
    """A pack that is fast with 128 rows may be slow with more."""
    monkeypatch.setattr(packing, "timings", Timings(tmp_path / "times.json"))
    packing.operand(torch.randn(40, 24), packing.Packs(), torch.randn(rows, 24))
    (question,) = packing.timings.used
    assert f"rows {timed}," in question
    monkeypatch.setattr(packing, "_MOST_TIMED", 40 * 24)
    packing.operand(torch.randn(40, 24), packing.Packs(), torch.randn(rows, 24))
    assert f"rows {min(timed, 128)}," in [*packing.timings.used][-1]  # of a large weight more would take seconds


@pytest.mark.parametrize(("packed", "is_taken"), [(0.88, True), (0.92, False)])
def test_a_pack_must_be_worth_its_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, packed: float, is_taken: bool
) -> None:
    monkeypatch.setattr(packing, "timings", Timings(tmp_path / "times.json"))
    weight, x, packs = torch.randn(40, 24), torch.randn(600, 24), packing.Packs()
    packing.operand(weight, packs, x)
    (question,) = packing.timings.used
    packing.timings.begin({question: {"packed": packed, "plain": 1.0}})
    packs.drop()
    assert packing.operand(weight, packs, x).is_mkldnn is is_taken
    assert bool(packs.nbytes) is is_taken


def test_times_are_told_fastest_first() -> None:
    assert in_words({"packed": 2.04, "plain": 1.0}) == "plain 1 ms, packed 2.04 ms"


@pytest.mark.parametrize("method", ["siva", "mezo"])
def test_a_run_keeps_its_choices_for_the_one_that_resumes_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str
) -> None:
    for name, value in (("_enabled", True), ("_file", tmp_path / "times.json"), ("_known", None)):
        monkeypatch.setattr(packing.timings, name, value)
    model = save_tiny_model(tmp_path / "model")
    data = write_csv(tmp_path / "reviews.csv", reviews(40))
    given = {"output": tmp_path / "run", "model": model, "data": data}
    paths = {name: str(path) for name, path in given.items()}
    config = TrainConfig(
        **paths, method=method, batch_size=8, max_steps=4, settings={"over": "siva"} if method == "mezo" else {}
    )
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[Interrupt(2)])
    kept = json.loads((tmp_path / "run" / "timings.json").read_text())
    assert kept
    assert kept == packing.timings.used
    told = {question: dict.fromkeys(times, 1.0) for question, times in kept.items()}  # nothing is clearly faster
    (tmp_path / "run" / "timings.json").write_text(json.dumps(told))
    train(config, resume=True)
    assert packing.timings.used.items() >= told.items()
    assert json.loads((tmp_path / "run" / "timings.json").read_text()) == packing.timings.used
    packing.timings.begin()
