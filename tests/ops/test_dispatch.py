"""The choice between Triton's kernel and ATen's calls on a GPU, with stand-ins for both on a CPU."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastpeft.ops import autotune, dispatch
from fastpeft.ops.autotune import Timings
from fastpeft.ops.backends import IMPLEMENTED
from fastpeft.ops.define import OPS
from fastpeft.ops.dispatch import choosing

BOTH = [op for (op, device), names in IMPLEMENTED.items() if device == "cuda" and {"triton", "aten"} <= set(names)]


class Forms(dict[str, Any]):
    """Two forms of an op, of which one sleeps; `called` has the names in order."""

    def __init__(self, slow: str) -> None:
        self.called: list[str] = []
        self.slow = slow
        super().__init__({name: lambda *_, name=name: self._run(name) for name in ("triton", "aten")})

    def _run(self, name: str) -> str:
        self.called.append(name)
        time.sleep(0.002 if name == self.slow else 0)
        return name


def siva(rows: int = 64, dtype: torch.dtype = torch.bfloat16, rank: int = 4) -> tuple[Tensor | None, ...]:
    u, s, v = torch.ones(24, rank), torch.ones(rank), torch.ones(rank, 40)
    return torch.ones(2, rows // 2, 40, dtype=dtype), torch.ones(24, 40, dtype=dtype), u, s, v, None


def window(tokens: int = 9, **changes: Any) -> tuple[Any, ...]:
    q, c, p = torch.ones(2, 1, tokens, 8), torch.ones(2, 3, tokens, 8), torch.ones(3, 8)
    named = {"mask": None, "slots": [0, 1, 2], "causal": False, "dropout": 0.0, "seed": None, "block": 1, **changes}
    return q, c, p, *named.values()


@pytest.fixture(autouse=True)
def tuned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The folder of the times that the package brings, empty."""
    monkeypatch.setattr(autotune, "TUNED", tmp_path / "tuned")
    (tmp_path / "tuned").mkdir()
    autotune._tuned.cache_clear()
    yield tmp_path / "tuned"
    autotune._tuned.cache_clear()


@pytest.mark.parametrize("slow", ["triton", "aten"])
def test_the_faster_form_computes_and_a_class_of_shapes_is_timed_once(tmp_path: Path, slow: str) -> None:
    forms, timings = Forms(slow), Timings(tmp_path / "times.json")
    call = choosing(OPS["siva_linear"], forms, timings)
    fast = "aten" if slow == "triton" else "triton"
    assert call(*siva(64)) == fast
    timed = len(forms.called)
    assert timed > 3
    assert call(*siva(34)) == fast  # more than 32 and up to 64 rows are one class, ranks up to 16 another
    assert call(*siva(64, rank=9)) == fast
    assert len(forms.called) == timed + 2
    call(*siva(66))
    assert len(forms.called) > timed + 5
    asked = [question.partition(" on ")[0] for question in timings.used]
    assert asked == [f"siva_linear bfloat16 24x40 rank 16 rows {rows}" for rows in (64, 128)]


@pytest.mark.parametrize("operands", [siva(64, torch.float32), siva(14)])
def test_float32_and_few_rows_are_left_to_aten_unless_a_table_says_otherwise(
    tmp_path: Path, tuned: Path, operands: tuple[Any, ...]
) -> None:
    forms, timings = Forms("aten"), Timings(tmp_path / "times.json")
    choosing(OPS["siva_linear"], forms, timings)(*siva(16))  # whatever a full tile took
    forms.called.clear()
    assert choosing(OPS["siva_linear"], forms, timings)(*operands) == "aten"
    assert forms.called == ["aten"]  # and not timed
    assert choosing(OPS["siva_linear"], forms, Timings(tmp_path / "all.json"), times_all=True)(*operands) == "triton"
    (tuned / "cpu.json").write_text((tmp_path / "all.json").read_text())
    autotune._tuned.cache_clear()
    called = len(forms.called)
    assert choosing(OPS["siva_linear"], forms, Timings(tmp_path / "none.json", enabled=False))(*operands) == "triton"
    assert len(forms.called) == called + 1
    assert not (tmp_path / "none.json").exists()


def test_a_form_that_fails_is_not_taken(tmp_path: Path) -> None:
    def out_of_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    forms = Forms("aten")
    call = choosing(OPS["siva_linear"], {**forms, "triton": out_of_memory}, Timings(tmp_path / "times.json"))
    assert call(*siva()) == "aten"
    both = choosing(OPS["siva_linear"], dict.fromkeys(forms, out_of_memory), Timings(tmp_path / "none.json"))
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        both(*siva())


def test_window_attention_is_chosen_by_what_its_time_depends_on(tmp_path: Path) -> None:
    timings = Timings(tmp_path / "times.json")
    call = choosing(OPS["window_attention"], Forms("triton"), timings)
    call(*window())
    call(*window(block=2))
    call(*window(16))
    call(*window(mask=torch.ones(2, 9, dtype=torch.bool), causal=True))
    assert call(*window(dropout=0.1)) == "triton"  # for elsewhere many operations draw it
    of_all = "window_attention float32 batch 2 heads 1 slots 3 tokens 16 width 8"
    asked = [question.partition(" on ")[0] for question in timings.used]
    assert asked == [of_all, f"{of_all} mask causal"]


def test_nothing_is_timed_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(dispatch, "is_captured", lambda: True)
    forms, timings = Forms("triton"), Timings(tmp_path / "times.json")
    with FakeTensorMode():
        on_gpu = [None if operand is None else torch.empty_like(operand, device="cuda") for operand in siva()]
        assert choosing(OPS["siva_linear"], forms, timings)(*on_gpu) == "triton"
        assert forms.called == ["triton"]
        timings.begin({"siva_linear bfloat16 24x40 rank 16 rows 64 on sm_90": {"triton": 2.0, "aten": 1.0}})
        assert choosing(OPS["siva_linear"], forms, timings)(*on_gpu) == "aten"


@pytest.mark.parametrize("op", BOTH)
def test_arguments_have_the_names_of_the_schema(op: str) -> None:
    """By which `choosing` finds rows, weights and ranks."""
    schema = getattr(torch.ops.fastpeft, op).default._schema
    assert dispatch._names(OPS[op]) == [argument.name for argument in schema.arguments]


def test_a_backward_pass_is_chosen_by_the_gradients_that_it_makes(tmp_path: Path) -> None:
    timings = Timings(tmp_path / "times.json")
    x, weight, u, s, v, _ = siva()
    dh, p = torch.ones(2, 32, 24, dtype=torch.bfloat16), torch.ones(4, 64)
    single = choosing(OPS["siva_linear_backward"], Forms("aten"), timings)
    single(dh, x, weight, u, s, v, p, True, False, True, False)
    mixed = choosing(OPS["siva_linear_mixed_backward"], Forms("aten"), timings)
    ofs = [u, u], [s, s], [v, v], [p, p]
    mixed(dh, x, weight, *ofs, [1, 1], None, False, [False, True], [False, False], False)
    layer = "bfloat16 24x40 rank 16 rows 64"
    assert [question.partition(" on ")[0] for question in timings.used] == [
        f"siva_linear_backward {layer} need_dx need_dv",
        f"siva_linear_mixed_backward {layer} adapters 2 need_du",
    ]


def test_times_that_the_package_brings_are_readable() -> None:
    for file in (Path(dispatch.__file__).parent / "tuned").glob("*.json"):
        assert autotune._readable(json.loads(file.read_text()))
