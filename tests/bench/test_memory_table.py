"""The memory table: every method on a model of two layers, and a row of the committed one."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import asdict

import pytest
from transformers import RobertaConfig

from bench.backbones import LARGE
from bench.harness import read_rows
from bench.memory_table import CASES, FILE, Case, rows

TINY = RobertaConfig(
    vocab_size=999,
    hidden_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=512,
    type_vocab_size=1,
)

RUNNABLE = [case for case in CASES if case.residual_dtype != "nf4" or importlib.util.find_spec("bitsandbytes")]


@functools.cache
def figures(case: Case) -> dict[str, float]:
    """What a step of a case takes, by part, in MB."""
    (row,) = rows([case], TINY, (16,))
    assert {name: row[name] for name in asdict(case)} == asdict(case)
    return {name: float(row[name]) for name in row if name.endswith("_mb")}


@pytest.mark.long
def test_parts_sum_to_the_peak_which_mezo_has_least_of() -> None:
    for case in RUNNABLE:
        parts = sum(value for name, value in figures(case).items() if name != "peak_mb")
        assert abs(parts - figures(case)["peak_mb"]) < 0.3, "each is rounded to a tenth"
        assert figures(Case("mezo"))["peak_mb"] <= figures(case)["peak_mb"]


def test_the_order_of_methods() -> None:
    full, mezo = figures(Case("full")), figures(Case("mezo"))
    assert mezo["gradients_mb"] == mezo["optimizer_mb"] == 0
    assert full["optimizer_mb"] == pytest.approx(2 * full["gradients_mb"], abs=0.2)
    assert full["gradients_mb"] > 1
    for targets in ("query+key", "all linear"):
        lora, siva = (figures(Case(method, targets, "float32")) for method in ("lora", "siva"))
        assert mezo["peak_mb"] < siva["peak_mb"] < full["peak_mb"]
        assert siva["activations_mb"] <= lora["activations_mb"]


def test_stepping_in_backward_keeps_no_gradients() -> None:
    for method, dtype in ("full", ""), ("k-lst", "float32"):
        after, within = (figures(Case(method, "", dtype, "", o)) for o in ("", "AdamW in backward"))
        assert within["gradients_mb"] == 0
        assert within["optimizer_mb"] == after["optimizer_mb"]
        assert within["peak_mb"] <= after["peak_mb"]
    full, quantised = (figures(Case("k-lst", "", "float32", "", o))["optimizer_mb"] for o in ("", "8-bit AdamW"))
    assert full / 4 < quantised < full / 3


def test_fewer_bits_take_less() -> None:
    for given in ("siva", "all linear", "float32"), ("siva", "all linear", "bfloat16"), ("k-lst", "", "float32"):
        cases = [Case(*given, kind) for kind in ("", "int8", "nf4")]
        weights = [figures(case)["weights_mb"] for case in cases if case in RUNNABLE]
        assert weights == sorted(weights, reverse=True)
        assert weights[0] - weights[1] == pytest.approx(2 * (4 * 256**2 + 2 * 256 * 512) / 2**20, rel=0.1)


@pytest.mark.long
@pytest.mark.parametrize("case", [Case("k-lst", "", "float32"), Case("siva", "query+key", "float32")], ids=str)
def test_what_is_committed_is_what_the_code_takes(case: Case) -> None:
    """Where this fails a method takes another amount of memory: `python -m bench.memory_table` writes it anew."""
    (now,) = rows([case], LARGE, (64,))
    same = [row for row in read_rows(FILE) if all(row[name] == now[name] for name in (*asdict(case), "tokens"))]
    if same[0]["torch"].rpartition(".")[0] != now["torch"].rpartition(".")[0]:
        pytest.skip("measured with another torch")
    assert same == [now]
