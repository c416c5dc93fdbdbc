"""Every bench runs and records all its candidates, which compute what they are compared on; on tiny models."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import tiny
from torch import nn
from transformers import LlamaConfig

from bench import backbones, bench_frozen_head, bench_generation, bench_ladder, bench_mezo, bench_mezo_perturb
from bench import bench_siva_linear as siva_linear
from bench import bench_window_attention as window_attention
from bench.bench_training import BENCH as TRAINING
from bench.bench_training import LIMIT, Cell, Step, training_step
from bench.benches import BENCHES
from bench.harness import read_rows
from bench.oracles.direct_run import DirectRun
from fastpeft.ops.frozen_linear import Packed
from fastpeft.siva.layer import SivaLinear

CPU = torch.device("cpu")
SHAPE = {"vocab_size": 8_000, "hidden_size": 64, "intermediate_size": 128}
DECODER = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
SMALL = {  # options that make the first case, or the cases, small
    "adapters": ["--tokens", "8", "--candidates", "siva,limit,lora,siva-packed,pissa,lora-dora"],
    "feature_cache": ["--tokens", "8"],
    "frozen_encoder": ["--model", "base", "--tokens", "8"],
    "frozen_head": ["--tokens", "20"],
    "frozen_linear": ["--rows", "8", "--in-features", "64", "--out-features", "64"],
    "generation": ["--prompt", "5", "--said", "2"],
    "ladder": ["--tokens", "8", "--dtype", "float32", "int8"],
    "mezo": ["--batch", "2", "--tokens", "4"],
    "mezo_perturb": ["--model", "tiny", "--dtype", "float32", "bfloat16"],
    "pool": ["--rows", "16", "--tokens", "4", "--window", "3"],
    "siva_linear": ["--model", "tiny", "--rows", "8"],
    "training": ["--tokens", "8"],
    "window_attention": ["--width", "8", "--batch", "2", "--tokens", "8", "--window", "3"],
}


class Counted(nn.Module):
    """Stands in for the prompted model, and counts its passes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 1)
        self.calls = 0

    def forward(self, **batch: Any) -> Any:
        self.calls += 1
        return type("Output", (), {"loss": self.inner(batch["input_ids"].float()).square().mean()})


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> list[Counted]:
    """Tiny models stand in for those that are measured; of MeZO's step those that were made."""
    made: list[Counted] = []
    for name in ("demo", "base"):
        monkeypatch.setitem(backbones.MODELS, name, partial(tiny, **SHAPE))
    for module in (bench_generation, bench_frozen_head):
        monkeypatch.setattr(module, "SMOLLM2", LlamaConfig(**DECODER, num_attention_heads=2))
    monkeypatch.setitem(siva_linear.FEATURES, "tiny", 16)
    monkeypatch.setitem(bench_mezo_perturb.MODELS, "tiny", (1, 16))
    monkeypatch.setattr(bench_mezo_perturb, "VOCABULARY", 50)
    monkeypatch.setattr(bench_mezo, "prompted", lambda _: made.append(Counted()) or made[-1])
    monkeypatch.setattr("bench.bench_feature_cache.BATCHES", 2)
    return made


@pytest.mark.parametrize("name", BENCHES)
def test_every_candidate_is_recorded(name: str, tmp_path: Path) -> None:
    BENCHES[name].main([*SMALL[name], "--rounds", "1"], tmp_path)
    rows = read_rows(tmp_path / BENCHES[name].file)
    columns = list(rows[0])[: list(rows[0]).index("candidate")]
    cases = {tuple(row[column] for column in columns) for row in rows}
    first = [row for row in rows if row["ratio_p50"] == "1"]
    assert len(first) >= len(cases)
    assert len({row["candidate"] for row in rows}) > 1
    with pytest.raises(SystemExit):
        BENCHES[name].main(["--nothing", "1"], tmp_path)


def close(found: dict[str, Any], first: str, tolerance: float) -> None:
    for output in found.values():
        torch.testing.assert_close(output, found[first], rtol=10 * tolerance, atol=tolerance)


def test_forms_of_siva_start_from_the_same_layers_and_give_every_gradient() -> None:
    case = siva_linear.Case("tiny", 8, "float32", "forward", siva_linear.ATTENTION)
    close({name: run() for name, run in siva_linear.BENCH.ready(case, CPU).items()}, "siva", 1e-5)
    runs = siva_linear.BENCH.ready(replace(case, work="training", layers=siva_linear.QUERY), CPU)
    gradients = {name: len(run()) for name, run in runs.items()}
    assert "siva layer by layer" not in gradients, "a single layer is no group"
    assert gradients.pop("frozen linear") == 1  # that of x
    assert gradients.pop("dora") == 4
    assert set(gradients.values()) == {3}


def test_no_form_of_siva_packs_its_weight() -> None:
    """The others' layers have no packs, so SiVA's would be faster by what is not its own."""
    linears = siva_linear.Layers({name: nn.Linear(16, 16) for name in siva_linear.ATTENTION.split(", ")})
    for make in siva_linear.LAYERS.values():
        made = make(copy.deepcopy(linears)).modules()
        assert not any(packs.enabled for module in made if (packs := getattr(module, "packs", None)))


@pytest.mark.parametrize("work", ["forward", "training"])
@pytest.mark.parametrize("padded", [False, True])
def test_forms_of_window_attention_compute_the_same(work: str, padded: bool) -> None:
    case = window_attention.Case("tiny", 8, 4, 8, 3, "float32", work, padded)
    found = {name: run() for name, run in window_attention.BENCH.ready(case, CPU).items()}
    close(found, "op", 1e-5)
    if work == "training" and padded:
        assert found["op"][1][1::2, :, -2:].eq(0).all()  # a quarter, which no query of these texts sees


def test_dropout_is_drawn_by_all() -> None:
    """The op and the reference draw the same; PyTorch's generator others, of the same share."""
    case = window_attention.Case("tiny", 8, 4, 8, 3, "float32", "training", dropout=0.5)
    found = {name: run() for name, run in window_attention.BENCH.ready(case, CPU).items()}
    torch.testing.assert_close(found["reference"], found["op"], rtol=1e-4, atol=1e-5)
    for _, dc, _ in found.values():
        assert 0.4 < dc.eq(0).double().mean() < 0.6


@pytest.mark.parametrize("case", bench_mezo.CASES, ids=lambda case: f"{case.estimator}-{case.noise}")
def test_a_step_of_mezo_makes_its_forwards(small: list[Counted], case: bench_mezo.Case) -> None:
    made = bench_mezo.BENCH.ready(replace(case, batch=2, tokens=4), CPU)
    for model, (name, run) in zip(small, made.items()):
        before, model.calls = model.inner.weight.clone(), 0
        run()
        assert model.calls == case.forwards
        assert model.inner.weight.equal(before) == (name == "forwards")


def test_shapes_are_those_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_mezo_perturb, "VOCABULARY", 50265)
    params = bench_mezo_perturb.Case("large", "float32", 1).params(torch.device("meta"))
    assert sum(param.numel() for param in params) == 354_310_144  # RoBERTa-large without pooler and head


def test_the_direct_forms_of_side_networks() -> None:
    for name in ("9-lst direct", "lst direct", bench_ladder.DIRECT_AS_TRAINED):
        model = bench_ladder.prepared("demo", name)
        assert (model.side_run, model.side.config.window_size) == (DirectRun, 1 if name == "lst direct" else 9)
        as_trained = name == bench_ladder.DIRECT_AS_TRAINED
        assert {module.training for module in model.backbone.frozen} == {as_trained}
    assert bench_ladder.prepared("demo", "9-lst").side_run is not DirectRun


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_the_base_is_in_the_dtype_and_what_trains_is_not(dtype: str) -> None:
    side = bench_ladder.prepared("demo", "9-lst", dtype)
    assert side.config.backbone_dtype == dtype
    assert {p.dtype for p in side.parameters() if p.requires_grad} == {torch.float32}
    lora = bench_ladder.prepared("demo", "lora", dtype)
    dtypes = {name.partition("lora_")[1]: p.dtype for name, p in lora.named_parameters()}
    assert dtypes == {"lora_": torch.float32, "": torch.bfloat16}


def model_of(step: Any) -> nn.Module:
    cells = (cell.cell_contents for cell in step.__closure__)
    return next(value for value in cells if isinstance(value, nn.Module))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("method", ["siva", LIMIT, "lora"])
def test_a_dtype_is_that_of_the_base(dtype: str, method: str) -> None:
    step = training_step(Cell(method, "query, key"), CPU, tokens=8, dtype=dtype)
    model = model_of(step)
    expected = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {expected}
    seen = []
    model.register_forward_hook(lambda _module, _inputs, output: seen.append(output.logits.dtype))
    step()
    assert seen == [torch.float32 if dtype == "float32" else torch.bfloat16]
    adapted = {p.dtype for n, p in model.named_parameters() if p.requires_grad and "classifier" not in n}
    assert adapted == (set() if method == LIMIT else {torch.float32})


def test_every_method_packs_what_is_frozen() -> None:
    """As its run does: packs in some alone would make those faster."""
    for step in TRAINING.ready(Step(), CPU, ["siva-query-key", "lora-query-key", "bitfit", "lst"]).values():
        layers = [module for module in model_of(step).modules() if isinstance(module, nn.Linear)]
        plain = [layer for layer in layers if not isinstance(layer, (Packed, SivaLinear))]
        assert len(plain) < len(layers)
        assert all(layer.weight.requires_grad for layer in plain)


@pytest.mark.parametrize(("targets", "count"), [("query, key", 6), ("all linear", 18)])
def test_the_limit_packs_the_layers_that_siva_packs(targets: str, count: int) -> None:
    """And no other; without these packs SiVA could be faster than its limit."""
    siva, limit = (model_of(training_step(Cell(method, targets), CPU)) for method in ("siva", LIMIT))
    assert sum(isinstance(module, SivaLinear) and module.packs.enabled for module in siva.modules()) == count
    assert sum(isinstance(module, Packed) for module in limit.modules()) == count


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINING.candidates(Step(), CPU))
def test_a_step_moves_the_trained_parameters(name: str) -> None:
    step = TRAINING.ready(Step(tokens=8), CPU, [name])[name]
    model = model_of(step)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step()
    moved = [name for name, p in model.named_parameters() if not p.equal(before[name])]
    assert not [name for name, p in model.named_parameters() if name in moved and not p.requires_grad]
    assert all(parameter.grad is None for parameter in model.parameters()), "or they would not count as its memory"
    beside_head = [name for name in moved if "classifier" not in name]
    assert bool(beside_head) is (name != "head")
    assert len(moved) > len(beside_head)
