"""Graphs without this library's ops compute what the models do, in `torch.export` and in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import ladder, tiny, trainable
from peft import get_peft_model
from torch import Tensor

from bench.oracles.direct_run import DirectRun
from fastpeft import FastpeftError, SivaConfig
from fastpeft.training import onnx_model
from fastpeft.training.onnx_model import trace, write_onnx

SHAPES = [(3, 9), (1, 1), (1, 12), (5, 2), (2, 30)]  # the first is traced


def batch(rows: int, tokens: int) -> dict[str, Tensor]:
    """Tokens with padding at the end of all rows but the first."""
    generator = torch.Generator().manual_seed(rows * tokens)
    ids = torch.randint(3, 30, (rows, tokens), generator=generator)
    lengths = torch.randint(1, tokens + 1, (rows, 1), generator=generator)
    lengths[0] = tokens
    mask = (torch.arange(tokens) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def moved(model: Any) -> Any:
    """A model whose trained weights are all far from their start."""
    generator = torch.Generator().manual_seed(0)
    for parameter in trainable(model).values():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def small(head: str = "ForSequenceClassification") -> Any:
    return tiny("Bert", head, num_hidden_layers=1)


def side_network(head: str = "ForSequenceClassification") -> Any:
    return moved(ladder(small(head)))


def direct() -> Any:
    model = side_network("Model")
    model.side_run = DirectRun
    return model


def siva(**config: Any) -> Any:
    return moved(get_peft_model(small(), SivaConfig(r=2, task_type="SEQ_CLS", target_modules="all-linear", **config)))


def ops(program: torch.export.ExportedProgram) -> set[str]:
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    return {str(node.target) for graph in graphs for node in graph.nodes if "fastpeft" in str(node.target)}


@pytest.mark.long(but="siva")
@pytest.mark.parametrize("make", [side_network, siva])
def test_a_traced_model_computes_what_the_model_does(make: Callable[[], Any], tmp_path: Path) -> None:
    model = make()
    program = trace(model, batch(*SHAPES[0]))
    assert not ops(program)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for shape in SHAPES:
        with torch.no_grad():
            expected = model(**batch(*shape)).logits
        found = loaded(batch(*shape))
        assert found.keys() == {"logits"}
        torch.testing.assert_close(found["logits"], expected, rtol=1e-5, atol=1e-6)


def test_without_decompositions_a_graph_has_the_ops() -> None:
    inputs = batch(*SHAPES[0])
    for make, op in ((side_network, "window_attention"), (siva, "siva_linear")):
        with torch.no_grad():
            model = make()
            program = torch.export.export(model, (), inputs, strict=False)
            assert ops(program) == {f"fastpeft.{op}.default"}
            found = program.module()(**inputs)
            torch.testing.assert_close(found.logits, model(**inputs).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("make", [side_network, direct, siva])
def test_onnx_runtime_computes_what_the_model_does(make: Callable[[], Any], tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    file = tmp_path / "model.onnx"
    # the measured difference is up to 2.4e-6, where PyTorch's float32 is 1.1e-6 from its float64
    assert write_onnx(make(), [batch(*shape) for shape in SHAPES], file) < 5e-6
    graph = onnx.load(file).graph
    assert {node.domain for node in graph.node} == {""}  # nothing that ONNX itself does not have
    shapes = {each.name: [size.dim_param for size in each.type.tensor_type.shape.dim] for each in graph.input}
    assert shapes == {"input_ids": ["batch", "sequence"], "attention_mask": ["batch", "sequence"]}


def test_an_answer_that_differs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = small(), batch(2, 3)
    monkeypatch.setattr(onnx_model, "check_onnx", lambda: None)
    monkeypatch.setattr(onnx_model, "trace", lambda *_: None)
    monkeypatch.setattr(onnx_model, "_written", lambda *_: None)
    for error, raises in ((1e-6, False), (1e-2, True), (torch.nan, True)):
        with torch.no_grad():
            wrong = [{"logits": (model(**given).logits * (1 + error)).numpy()}]
        monkeypatch.setattr(onnx_model, "_run_onnx", lambda *_, wrong=wrong: wrong)
        if raises:
            with pytest.raises(FastpeftError, match=r"ONNX Runtime's outputs of the BertForSeq.* differ"):
                write_onnx(model, [given], tmp_path / "model.onnx")
        else:
            assert 0 < write_onnx(model, [given], tmp_path / "model.onnx") < 1e-5


def test_what_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Asks(torch.nn.Module):
        def forward(self, input_ids: Tensor, return_dict: bool) -> dict[str, Tensor]:
            return {"logits": input_ids if input_ids.sum() > 3 else -input_ids}

    with pytest.raises(
        FastpeftError, match=r"the Asks cannot be traced by torch\.export: .* If it has an adapter, merge it"
    ):
        trace(Asks(), {"input_ids": torch.ones(2, 3, dtype=torch.long)})
    with pytest.raises(FastpeftError, match=r"the LadderModel holds weights in int8, .* without backbone_dtype"):
        trace(ladder(small(), backbone_dtype="int8"), batch(2, 3))
    monkeypatch.setattr(onnx_model, "_LIBRARIES", ("torch", "onnx_of_nobody"))
    with pytest.raises(FastpeftError, match=r"needs onnx_of_nobody, .* pip install onnx "):
        write_onnx(small(), [], tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
