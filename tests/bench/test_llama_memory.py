"""The memory of Llama shapes: what the table is to show, on a Llama of three layers, and a row of the committed one."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from bench.harness import read_rows
from bench.llama_memory import (
    FILE,
    MODELS,
    Case,
    blank_linear4bit,
    simulate,
)
from fastpeft.methods.wrapping import in_4_bits
from fastpeft.training.memory import MEBIBYTE

pytestmark = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")

SHAPE = {
    "vocab_size": 1003,
    "hidden_size": 256,
    "intermediate_size": 896,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOKENS = 512
QLORA, LST = Case("lora", "nf4"), Case("lst", "nf4", reduction="16")


@functools.cache
def figures(case: Case, tokens: int = TOKENS, rows: int = 1, **changes: bool) -> dict[str, float]:
    """What a step of a case takes, by part, in MB."""
    row = simulate("tiny", case, LlamaConfig(**{**SHAPE, **changes}), rows, tokens)
    assert {name: row[name] for name in asdict(case)} == asdict(case)
    found = {name: float(row[name]) for name in row if name.endswith("_mb")}
    assert abs(sum(found.values()) - 2 * found["peak_mb"]) < 0.3, "each is rounded to a tenth"
    return found


def above_weights(case: Case, **changes: int) -> float:
    found = figures(case, **changes)
    return found["peak_mb"] - found["weights_mb"]


def test_a_side_network_takes_less_than_half_of_qlora() -> None:
    assert above_weights(LST) < above_weights(QLORA) / 2
    assert above_weights(replace(LST, checkpointing="yes")) < above_weights(replace(QLORA, checkpointing="yes"))


def test_the_order_of_methods() -> None:
    full, lora, mezo = Case("full", head="logits"), Case("lora"), Case("mezo")
    assert figures(mezo)["gradients_mb"] == figures(mezo)["optimizer_mb"] == 0
    assert above_weights(mezo) < above_weights(LST) < above_weights(QLORA) < above_weights(full)
    assert figures(QLORA)["weights_mb"] < figures(lora)["weights_mb"] == pytest.approx(figures(full)["weights_mb"], 0.2)
    for case in (QLORA, lora):
        assert figures(replace(case, checkpointing="yes"))["peak_mb"] < figures(case)["peak_mb"]
        assert figures(case)["peak_mb"] < figures(replace(case, head="logits"))["peak_mb"]
        assert above_weights(replace(case, method="siva")) < above_weights(case)


def test_fewer_bits_take_less() -> None:
    weights = [figures(replace(LST, backbone=dtype))["weights_mb"] for dtype in ("bfloat16", "int8", "nf4")]
    linear = 3 * (2 * 256**2 + 2 * 256 * 128 + 3 * 256 * 896) / MEBIBYTE
    assert weights[0] - weights[1] == pytest.approx(linear, abs=0.2)
    assert weights[1] - weights[2] == pytest.approx((1 - 0.5625) * linear, abs=0.2)


def test_tied_weights_count_once() -> None:
    apart = figures(LST)["weights_mb"] - figures(LST, tie_word_embeddings=True)["weights_mb"]
    assert apart == pytest.approx(2 * 1003 * 256 / MEBIBYTE, abs=0.11)


@pytest.mark.parametrize("case", [LST, Case("k-lst", "nf4", reduction="16"), QLORA], ids=str)
def test_nothing_grows_with_the_square_of_tokens(case: Case) -> None:
    first, second = (figures(case, n, 4)["rest_mb"] - figures(case, n // 2, 4)["rest_mb"] for n in (512, 1024))
    assert second == pytest.approx(2 * first, rel=0.1)


def test_a_blank_layer_has_the_bytes_of_a_quantised_one() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    layer = model.model.layers[0].mlp.up_proj
    blank = blank_linear4bit(nn.Linear(256, 896, bias=False, device="meta"))
    in_4_bits(model)
    quantised = model.model.layers[0].mlp.up_proj
    assert quantised is not layer
    states = [made.weight.quant_state for made in (quantised, blank)]
    tensors = [[made.weight.data] for made in (quantised, blank)]
    for state, found in zip(states, tensors):
        found += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    assert [(t.shape, t.dtype) for t in tensors[0]] == [(t.shape, t.dtype) for t in tensors[1]]
    assert [state.shape for state in states] == 2 * [torch.Size((896, 256))]


@pytest.mark.long
def test_what_is_committed_is_what_the_code_takes() -> None:
    """Where this fails a method takes more or less: delete the file and run `python -m bench.llama_memory`."""
    now = simulate("1B", LST, MODELS["1B"], 1, 2048)
    same = [row for row in read_rows(FILE) if all(row[name] == now[name] for name in now if not name.endswith("_mb"))]
    if not same:
        pytest.skip("measured with another torch")
    assert same == [now]
