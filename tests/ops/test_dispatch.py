"""The choice between Triton's kernel and ATen's calls on a GPU, with stand-ins for both on a CPU."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from fastpeft.errors import FastpeftError
from fastpeft.ops import dispatch
from fastpeft.ops.backends import IMPLEMENTED
from fastpeft.ops.define import OPS
from fastpeft.ops.dispatch import choosing
from fastpeft.training.run_folder import RunFolder

BOTH = [op for (op, device), names in IMPLEMENTED.items() if device == "cuda" and {"triton", "aten"} <= set(names)]


class Forms(dict[str, Any]):
    """Two forms of an op; `timed` has how often each was timed."""

    def __init__(self) -> None:
        super().__init__({name: lambda *_, name=name: name for name in ("triton", "aten")})
        self.timed: list[str] = []


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> Forms:
    """ATen's is the faster."""
    found = Forms()

    def milliseconds(call: Any) -> float:
        found.timed.append(call())
        return 1.0 if found.timed[-1] == "aten" else 2.0

    monkeypatch.setattr(dispatch, "milliseconds", milliseconds)
    monkeypatch.setattr(dispatch, "_answers", {})
    monkeypatch.setattr(dispatch, "_kept", {})
    monkeypatch.setattr(dispatch, "tuners", {})
    return found


def siva(rows: int = 64, dtype: torch.dtype = torch.bfloat16, rank: int = 4) -> tuple[Any, ...]:
    u, s, v = torch.ones(24, rank), torch.ones(rank), torch.ones(rank, 40)
    return torch.ones(2, rows // 2, 40, dtype=dtype), [torch.ones(24, 40, dtype=dtype)], [None], [u], [s], [v], [None]


def window(tokens: int = 9, **changes: Any) -> tuple[Any, ...]:
    q, c, p = torch.ones(2, 1, tokens, 8), torch.ones(2, 3, tokens, 8), torch.ones(3, 8)
    named = {"mask": None, "slots": [0, 1, 2], "causal": False, "dropout": 0.0, "seed": None, "block": 1, **changes}
    return q, c, p, *named.values()


def asked() -> list[str]:
    """The questions that were answered by a time."""
    return [question.partition(" on ")[0] for question in dispatch.chosen().get("forms", {})]


def test_the_faster_form_computes_and_a_class_of_shapes_is_timed_once(forms):
    call = choosing(OPS["siva_linear"], forms)
    for operands in (siva(64), siva(34), siva(64, rank=9), siva(66)):
        assert call(*operands) == "aten"
    assert forms.timed == ["triton", "aten"] * 2
    assert asked() == [f"siva_linear bfloat16 24x40 rank 16 rows {rows}" for rows in (64, 128)]


def test_a_form_that_is_hardly_faster_does_not_replace_the_kernel(forms, monkeypatch):
    monkeypatch.setattr(dispatch, "milliseconds", lambda call: 0.98 if call() == "aten" else 1.0)
    assert choosing(OPS["siva_linear"], forms)(*siva()) == "triton"


@pytest.mark.parametrize("operands", [siva(64, torch.float32), siva(14)])
def test_float32_and_few_rows_are_left_to_aten(forms, operands):
    choosing(OPS["siva_linear"], forms)(*siva(16))  # whatever a full tile took
    timed = len(forms.timed)
    assert choosing(OPS["siva_linear"], forms)(*operands) == "aten"
    assert len(forms.timed) == timed


def test_nothing_is_timed_where_a_run_is_deterministic(forms):
    torch.use_deterministic_algorithms(True)
    try:
        assert choosing(OPS["siva_linear"], forms)(*siva()) == "triton"
    finally:
        torch.use_deterministic_algorithms(False)
    assert forms.timed == []


def test_a_form_that_fails_is_not_taken(forms):
    def out_of_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    for failing, other in (("triton", "aten"), ("aten", "triton")):
        dispatch._answers.clear()
        assert choosing(OPS["siva_linear"], {**forms, failing: out_of_memory})(*siva()) == other
    dispatch._answers.clear()
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        choosing(OPS["siva_linear"], dict.fromkeys(forms, out_of_memory))(*siva())


def test_window_attention_is_chosen_by_what_its_time_depends_on(forms):
    call = choosing(OPS["window_attention"], forms)
    call(*window())
    call(*window(block=2))
    call(*window(16))
    call(*window(mask=torch.ones(2, 9, dtype=torch.bool), causal=True))
    assert call(*window(dropout=0.1)) == "triton"  # for elsewhere many operations draw it
    of_all = "window_attention float32 batch 2 heads 1 slots 3 tokens 16 width 8"
    assert asked() == [of_all, f"{of_all} mask causal"]


def test_while_a_graph_is_captured_what_was_timed_before_runs_and_else_aten(forms, monkeypatch):
    monkeypatch.setattr(dispatch, "is_captured", lambda: True)
    call = choosing(OPS["siva_linear"], forms)
    assert call(*siva()) == "aten"
    assert forms.timed == []
    dispatch.take_over({"forms": {"siva_linear bfloat16 24x40 rank 16 rows 64 on cpu": "triton"}})
    assert call(*siva()) == "triton"


def test_a_run_keeps_what_was_chosen_and_a_resumed_one_takes_it(forms, tmp_path):
    call = choosing(OPS["siva_linear"], forms)
    call(*siva())
    folder = RunFolder(tmp_path)
    assert folder.choices() == {}
    folder.keep_choices({"forms": dict.fromkeys(dispatch.chosen()["forms"], "triton")})
    dispatch.take_over(folder.choices())
    assert call(*siva()) == "triton"
    assert len(forms.timed) == 2
    assert dispatch.chosen() == folder.choices() == json.loads((tmp_path / "choices.json").read_text())
    (tmp_path / "choices.json").write_text("{")
    with pytest.raises(FastpeftError, match="implementations are then timed again"):
        folder.choices()


@pytest.mark.parametrize("op", BOTH)
def test_arguments_have_the_names_of_the_schema(op: str) -> None:
    """By which `choosing` finds rows, weights and ranks."""
    schema = getattr(torch.ops.fastpeft, op).default._schema
    assert dispatch._names(OPS[op]) == [argument.name for argument in schema.arguments]


def test_a_backward_pass_is_chosen_by_the_gradients_that_it_makes(forms):
    x, weights, scales, us, ss, vs, _ = siva()
    dh, p = torch.ones(2, 32, 24, dtype=torch.bfloat16), torch.ones(4, 64)
    call = choosing(OPS["siva_linear_backward"], forms)
    call([dh], x, weights, scales, us, ss, vs, p, True, [False], True, [False])
    adapters = us * 2, ss * 2, vs * 2, p.flatten()
    call([dh], x, weights, scales, *adapters, False, [False, True], False, [False], [1, 1], None)
    layer = "bfloat16 24x40 rank 16 rows 64"
    assert asked() == [
        f"siva_linear_backward {layer} need_dx need_dv",
        f"siva_linear_backward {layer} adapters 2 need_du",
    ]
