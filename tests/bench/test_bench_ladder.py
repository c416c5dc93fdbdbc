"""Every candidate of k-LST's bench is what its name says, and runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import RobertaConfig, RobertaForSequenceClassification

from bench import bench_ladder as bench
from bench import harness
from bench.oracles.direct_run import DirectRun

CPU = torch.device("cpu")


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=8_000, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
        )
    )


def test_the_direct_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.MODELS, "demo", tiny)
    for name in ("9-lst direct", "lst direct", bench.DIRECT_AS_TRAINED):
        model = bench.prepared("demo", name)
        assert (model.side_run, model.side.config.window_size) == (DirectRun, 1 if name == "lst direct" else 9)
        as_trained = name == bench.DIRECT_AS_TRAINED
        assert {module.training for module in model.backbone.frozen} == {as_trained}
        features = [model.base.base_model.encoder.layer[0](torch.ones(1, 2, 16)) for _ in range(2)]
        assert torch.equal(*features) != as_trained
    assert bench.prepared("demo", "9-lst").side_run is not DirectRun


def test_every_candidate_is_recorded(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.MODELS, "demo", tiny)
    file = tmp_path / "ladder.csv"
    harness.measure(file, bench.CASE, bench.candidates("demo", CPU), CPU, rounds=2)
    assert [row["candidate"] for row in harness.read_rows(file)] == [*bench.METHODS, bench.FORWARD]
    assert next(row["ratio_p50"] for row in harness.read_rows(file)) == "1"


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_the_base_is_in_the_dtype_and_what_trains_is_not(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.MODELS, "demo", tiny)
    side = bench.prepared("demo", "9-lst", dtype)
    assert side.config.backbone_dtype == dtype
    assert {p.dtype for p in side.parameters() if p.requires_grad} == {torch.float32}
    lora = bench.prepared("demo", "lora", dtype)
    dtypes = {name.partition("lora_")[1]: p.dtype for name, p in lora.named_parameters()}
    assert dtypes == {"lora_": torch.float32, "": torch.bfloat16}
    for run in bench.candidates("demo", CPU, ("9-lst", "lora"), dtype, tokens=8).values():
        run()
