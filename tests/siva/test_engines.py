"""SiVA inside PyTorch's engines: compilation, export, autocast, checkpointing, and several processes.

Functions passed to `ranks` run in both processes of `tests/ranks.py`.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import peft
import pytest
import ranks as rank_processes
import torch
import torch.distributed as dist
from siva_adapters import RESIDUALS, move, tiny, without_dropout
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import BertForSequenceClassification

from fastpeft import FastpeftError, SivaConfig, SivaLinear

CLOSE = {"rtol": 1e-5, "atol": 1e-6}

Run = Callable[..., list[Any]]
Gradients = dict[str, Tensor]


def adapted(residual: str = "frozen", **config: Any) -> peft.PeftModel:
    """A classifier whose adapter and head have trained a little, the same at every call.

    At the scale of a new model's weights attention is uniform, and queries and keys get no gradient to speak of.
    """
    base = tiny()
    for weight in base.parameters():
        weight.data *= 10 if weight.dim() == 2 else 1
    settings: dict[str, Any] = {"r": 3, "target_modules": ["query", "key", "dense"], "task_type": "SEQ_CLS"} | config
    model = peft.get_peft_model(base, SivaConfig(residual=residual, **settings)).eval()
    return move(model, size=0.01)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def batch(rows: int = 4, tokens: int = 9) -> dict[str, Tensor]:
    """Texts of different lengths, with labels."""
    generator = torch.Generator().manual_seed(10 * rows + tokens)
    mask = (torch.arange(tokens) < torch.arange(rows)[:, None] % 3 + tokens - 2).long()
    ids = torch.randint(3, 50, (rows, tokens), generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(rows) % 2}


def step(model: nn.Module, rows: dict[str, Tensor]) -> tuple[Tensor, Gradients]:
    """The loss and the gradients of what trains."""
    model.zero_grad()
    loss = model(**rows).loss
    loss.backward()
    gradients = {name.removeprefix("_orig_mod."): parameter.grad for name, parameter in trained(model).items()}
    return loss.detach(), {name: gradient.clone() for name, gradient in gradients.items()}


def assert_close(found: tuple[Tensor, Gradients], expected: tuple[Tensor, Gradients], **tolerance: float) -> None:
    tolerance = tolerance or CLOSE
    torch.testing.assert_close(found[0], expected[0], **tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert gradient.abs().max() > 1e-4, name
        torch.testing.assert_close(found[1][name], gradient, **tolerance)


@RESIDUALS
def test_a_model_without_values_gives_shapes(residual: str) -> None:
    model, rows = adapted(residual).to("meta"), batch()
    loss, gradients = step(model, {name: rows[name].to("meta") for name in ("input_ids", "labels")})
    assert loss.is_meta
    assert {name: gradient.shape for name, gradient in gradients.items()} == {
        name: parameter.shape for name, parameter in trained(model).items()
    }


# -- compilation -------------------------------------------------------------------------------------------------


@pytest.fixture
def counter() -> Iterator[CompileCounterWithBackend]:
    """A backend that counts the graphs and traces their backward too."""
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


@RESIDUALS
def test_a_layer_compiles_once_for_all_shapes(residual: str, counter: CompileCounterWithBackend) -> None:
    torch.manual_seed(0)
    layer = SivaLinear.from_linear(nn.Linear(20, 12), 4, residual=residual)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for shape in ((3, 9, 20), (4, 7, 20), (2, 11, 20)):
        x = torch.randn(shape)
        found, expected = (
            torch.autograd.grad(f(x).square().sum(), list(trained(layer).values())) for f in (compiled, layer)
        )
        torch.testing.assert_close(found, expected, **CLOSE)
    assert counter.frame_count == 1


@pytest.mark.long
@RESIDUALS
def test_a_model_compiles_whole(residual: str, counter: CompileCounterWithBackend) -> None:
    model = adapted(residual)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for rows, tokens in ((4, 9), (3, 7), (5, 12)):
        assert_close(step(compiled, batch(rows, tokens)), step(model, batch(rows, tokens)))
    graphs = counter.frame_count
    step(compiled, batch(6, 10))
    assert counter.frame_count == graphs  # the sizes are symbols by now


@pytest.mark.long
def test_a_compiled_model_follows_its_adapters(counter: CompileCounterWithBackend) -> None:
    """What is compiled is compiled again where the layers act in another way, never used as it was."""
    model = adapted("implicit")
    compiled = torch.compile(model, fullgraph=True, backend=counter)

    def assert_followed() -> Tensor:
        with torch.no_grad():
            expected = model(**batch()).logits
            torch.testing.assert_close(compiled(**batch()).logits, expected, **CLOSE)
        return expected

    first = assert_followed()
    with model.disable_adapter():
        assert not torch.allclose(assert_followed(), first)
    model.add_adapter("other", SivaConfig(r=2, target_modules=["query"], residual="implicit", task_type="SEQ_CLS"))
    model.set_adapter("other")
    assert not torch.allclose(assert_followed(), first)
    model.set_adapter("default")
    model.merge_adapter()
    torch.testing.assert_close(assert_followed(), first, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_inductor_compiles_a_training_step() -> None:
    model = adapted()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, dynamic=True)
    assert_close(step(compiled, batch()), step(model, batch()), rtol=1e-4, atol=1e-5)


@pytest.mark.long(but="implicit-False")
@pytest.mark.parametrize("strict", [False, True])
@RESIDUALS
def test_exports_with_a_free_batch_size(residual: str, strict: bool) -> None:
    model = adapted(residual)
    size = torch.export.Dim("batch", min=2, max=64)
    example = batch(3)
    program = torch.export.export(
        model.base_model.model,
        (example["input_ids"], example["attention_mask"]),
        dynamic_shapes=({0: size}, {0: size}),
        strict=strict,
    )
    assert torch.ops.fastpeft.siva_linear.default in {node.target for node in program.graph.nodes}
    rows = batch(7)
    found = program.module()(rows["input_ids"], rows["attention_mask"]).logits
    torch.testing.assert_close(found, model(**rows).logits, **CLOSE)


# -- autocast and checkpointing ----------------------------------------------------------------------------------


@RESIDUALS
def test_autocast_computes_in_its_dtype_and_trains_in_float32(residual: str) -> None:
    layer = adapted(residual).base_model.model.roberta.encoder.layer[0].attention.self.query
    x = torch.randn(5, 7, 16, requires_grad=True)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        plain = F.linear(x, layer.weight, layer.base_layer.bias)
    assert out.dtype == torch.bfloat16
    assert not out.float().equal(exact)
    allowed = 2 * (plain - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert (out - exact).abs().max() <= allowed
    out.float().square().sum().backward()
    assert {t.grad.dtype for t in (x, *trained(layer).values())} == {torch.float32}


def test_a_model_trains_under_autocast() -> None:
    model = adapted()
    loss, gradients = step(model, batch())
    with torch.autocast("cpu", torch.bfloat16):
        found, of_autocast = step(model, batch())
    torch.testing.assert_close(found.float(), loss, rtol=0.02, atol=0.02)
    for name, gradient in gradients.items():
        torch.testing.assert_close(of_autocast[name], gradient, rtol=0.1, atol=0.1 * gradient.abs().max().item())


SELECTIVE = partial(create_selective_checkpoint_contexts, [torch.ops.fastpeft.siva_linear.default])


@pytest.mark.parametrize(
    "options", [{"use_reentrant": True}, {"use_reentrant": False}, {"use_reentrant": False, "context_fn": SELECTIVE}]
)
@RESIDUALS
def test_checkpointing_changes_no_gradient(residual: str, options: dict[str, Any]) -> None:
    model = without_dropout(adapted(residual, target_modules=["query", "key", "value", "dense"]))
    expected = step(copy.deepcopy(model), batch())  # which leaves the first packs to the step that is compared
    calls = []
    model.base_model.model.roberta.encoder.layer[0].attention.self.query.register_forward_hook(
        lambda *_: calls.append(torch.is_grad_enabled())
    )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    model.enable_input_require_grads()  # the reentrant kind needs an input with a gradient
    found = step(model, batch())
    assert len(calls) == 2  # it did run again
    assert_close(found, expected, rtol=0.0, atol=0.0)


# -- several processes -------------------------------------------------------------------------------------------

needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with rank_processes.started(tmp_path_factory.mktemp("ranks")) as run:
        yield run


def own_rows(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.chunk(2)[dist.get_rank()] for name, tensor in rows.items()}


def sgd_step(model: nn.Module, rows: dict[str, Tensor], passes: int = 1) -> dict[str, Tensor]:
    """Train one step, `passes` forwards before the backward, and return what trained, whole."""
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.5)
    torch.stack([model(**rows).loss for _ in range(passes)]).sum().backward()
    optimizer.step()
    whole = {name.removeprefix("module."): parameter.detach() for name, parameter in trained(model).items()}
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in whole.items()}


def ddp_step(residual: str, passes: int) -> dict[str, Tensor]:
    return sgd_step(DistributedDataParallel(adapted(residual)), own_rows(batch()), passes)


def sharded(model: nn.Module, half: bool = False) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if half else None)
    for block in model.base_model.model.roberta.encoder.layer:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return model


def fsdp_step(residual: str, half: bool) -> dict[str, Tensor]:
    return sgd_step(sharded(adapted(residual), half), own_rows(batch()))


def load_shards(residual_dtype: str | None) -> tuple[Tensor, Tensor]:
    """What a model says after a step, and what another says that is given its shards."""
    model = sharded(adapted(residual_dtype=residual_dtype))
    sgd_step(model, own_rows(batch()))
    other = sharded(adapted(residual_dtype=residual_dtype))
    set_model_state_dict(other, get_model_state_dict(model))
    with torch.no_grad():
        return model(**batch()).logits, other(**batch()).logits


def fsdp1_step(residual: str, passes: int) -> dict[str, Tensor]:
    """In FSDP1 a frozen weight is a view of a flat parameter, which requires a gradient as soon as one part does."""
    model = adapted(residual)
    kept = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    blocks = ModuleWrapPolicy({type(model.base_model.model.roberta.encoder.layer[0])})
    cpu = torch.device("cpu")
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=cpu, auto_wrap_policy=blocks)
    optimizer = torch.optim.SGD(trained(wrapped).values(), lr=0.5)
    torch.stack([wrapped(**own_rows(batch())).loss for _ in range(passes)]).sum().backward()
    optimizer.step()
    with FullyShardedDataParallel.summon_full_params(wrapped):
        whole = {
            name.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for name, p in wrapped.named_parameters()
        }
    assert all(whole.pop(name).equal(weight) for name, weight in kept.items())
    return whole


def in_one_process(residual: str = "frozen", passes: int = 1) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What trains, before and after a step."""
    model = adapted(residual)
    start = {name: parameter.detach().clone() for name, parameter in trained(model).items()}
    return start, sgd_step(model, batch(), passes)


def assert_same(found: list[dict[str, Tensor]], start: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for of_rank in found:
        assert of_rank.keys() == expected.keys()
        for name, tensor in expected.items():
            assert (tensor - start[name]).abs().max() > 1e-4, name
            torch.testing.assert_close(of_rank[name], tensor, **CLOSE)


@needs_gloo
@pytest.mark.parametrize("passes", [1, 2])
@RESIDUALS
def test_ddp_equals_one_process(ranks: Run, residual: str, passes: int) -> None:
    assert_same(ranks(ddp_step, residual, passes), *in_one_process(residual, passes))


@needs_gloo
@RESIDUALS
def test_fsdp2_equals_one_process(ranks: Run, residual: str) -> None:
    assert_same(ranks(fsdp_step, residual, False), *in_one_process(residual))


@needs_gloo
@pytest.mark.parametrize("residual_dtype", [None, "int8"])
def test_fsdp2_loads_its_shards(ranks: Run, residual_dtype: str | None) -> None:
    for expected, found in ranks(load_shards, residual_dtype):
        assert found.equal(expected)


@needs_gloo
@pytest.mark.parametrize("passes", [1, 2])
@RESIDUALS
def test_fsdp1_equals_one_process(ranks: Run, residual: str, passes: int) -> None:
    assert_same(ranks(fsdp1_step, residual, passes), *in_one_process(residual, passes))


def change_shards(engine: str) -> tuple[Tensor, Tensor]:
    """What a sharded model says before and after what would change its weights is refused."""
    model = adapted()
    if engine == "fsdp1":
        wrapped: nn.Module = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    elif engine == "fsdp2":
        wrapped = sharded(model)
    else:
        wrapped = fully_shard(model, mesh=init_device_mesh("cpu", (2,)))  # its weights stay whole after a forward
    with torch.no_grad():
        before = wrapped(**batch()).logits
        for change in (model.merge_adapter, model.unload, lambda: model.delete_adapter("default")):
            gathered = FullyShardedDataParallel.summon_full_params(wrapped) if engine == "fsdp1" else nullcontext()
            with gathered, pytest.raises(FastpeftError, match="its weight is sharded among processes"):
                change()
        return before, wrapped(**batch()).logits


def adapt_shards() -> None:
    base = tiny()
    fully_shard(base.roberta.encoder.layer[0], mesh=init_device_mesh("cpu", (2,)))
    peft.get_peft_model(base, SivaConfig(r=2, target_modules=["query"]))


def saved_modules_of_low_memory(folder: str) -> list[str]:
    """What trains beside the factors, where one process of a machine reads the weights, as accelerate asks for."""
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    with patch.dict(os.environ, asked):
        base = BertForSequenceClassification.from_pretrained(folder)
        model = peft.get_peft_model(base, SivaConfig(r=2, task_type="SEQ_CLS"))
    return sorted(name for name in trained(model) if ".siva_" not in name)


@needs_gloo
@pytest.mark.parametrize("engine", ["fsdp1", "fsdp2", "fsdp2 at the root"])
def test_weights_in_shards_are_not_changed(ranks: Run, engine: str) -> None:
    """The next gathering would bring the old ones back, while the layers count as merged."""
    for before, after in ranks(change_shards, engine):
        assert after.equal(before)


@needs_gloo
def test_weights_in_shards_get_no_adapter(ranks: Run) -> None:
    for refused in ranks(adapt_shards):
        assert "Put the adapter on the model first and shard it then" in str(refused)


@needs_gloo
def test_fsdp_that_loads_with_little_memory_trains_the_same_everywhere(ranks: Run, tmp_path: Path) -> None:
    tiny("Bert", "ForMaskedLM").save_pretrained(tmp_path)
    first, second = ranks(saved_modules_of_low_memory, str(tmp_path))
    assert first == second
    assert any(".pooler." in name for name in first)


@needs_gloo
def test_fsdp2_gathers_in_half_precision(ranks: Run) -> None:
    found = ranks(fsdp_step, "frozen", True)
    start, expected = in_one_process()
    change, error = (
        torch.cat([(after[name] - before[name]).flatten() for name in expected]).norm()
        for before, after in ((start, expected), (expected, found[0]))
    )
    assert 1e-4 * change < error < 0.1 * change  # bfloat16 was there, and did no more than it must
