"""PEFT's adapter_names: an adapter for each row of a batch, in training as in inference."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import peft
import pytest
import torch
import transformers
from siva_adapters import RESIDUALS, tiny, token_ids, without_dropout
from torch import Tensor, nn

from fastpeft import FastpeftError, SivaConfig
from fastpeft.functional import siva_linear, siva_linear_mixed
from fastpeft.ops import aten, reference

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
BASE = "__base__"

# -- the op --------------------------------------------------------------------------------------------------------

RANKS = (3, 0, 2, 1)
SIZES = [[2, 1, 0, 2], [0, 5, 0, 0], [1, 1, 1, 2]]


def operands(tokens: Sequence[int] = (3,), dtype: torch.dtype = torch.float64, bias: bool = True) -> list[Any]:
    """x of five rows, weight, the factors of four adapters, and a bias."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    us, ss, vs = ([draw(*shape(r)) for r in RANKS] for shape in (lambda r: (6, r), lambda r: (r,), lambda r: (r, 7)))
    return [draw(5, *tokens, 7), draw(6, 7), us, ss, vs, draw(6) if bias else None]


def orders() -> list[Tensor | None]:
    return [None, torch.tensor([3, 0, 4, 1, 2])]


def by_rows(
    x: Tensor, weight: Tensor, us: Any, ss: Any, vs: Any, bias: Tensor | None, sizes: list[int], order: Tensor | None
) -> Tensor:
    """Each row by itself."""
    adapter = [i for i, size in enumerate(sizes) for _ in range(size)]
    places = range(5) if order is None else order.tolist()
    found = {b: siva_linear(x[b], weight, us[i], ss[i], vs[i], bias) for b, i in zip(places, adapter)}
    return torch.stack([found[b] for b in range(5)])


@pytest.mark.parametrize("tokens", [(), (3,), (0,), (2, 2)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("implementation", [aten, reference], ids=["aten", "reference"])
def test_rows_give_what_they_give_by_themselves(implementation: Any, tokens: tuple[int, ...], bias: bool) -> None:
    x, weight, us, ss, vs, b = operands(tokens, bias=bias)
    dh = torch.randn(5, *tokens, 6, dtype=torch.float64)
    for sizes, order in itertools.product(SIZES, orders()):
        layer = [weight], [None], us, ss, vs
        (h,), p = implementation.siva_linear(x, *layer, [b], sizes, order)
        leaves = [
            t.clone().requires_grad_() for t in (x, *us, *vs, torch.zeros(6, dtype=torch.float64) if b is None else b)
        ]
        expected = by_rows(leaves[0], weight, leaves[1:5], ss, leaves[5:9], leaves[9], sizes, order)
        torch.testing.assert_close(h, expected.detach())
        of_x, *of_factors, of_bias = torch.autograd.grad(expected, leaves, dh, materialize_grads=True)
        dx, dus, dv, (dbias,) = implementation.siva_linear_backward(
            [dh], x, *layer, p, True, [True] * 4, True, [True], sizes, order
        )
        dvs = dv.split(list(RANKS))
        torch.testing.assert_close([dx, *dus, *dvs, dbias], [of_x, *of_factors, of_bias])


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("order", orders())
def test_gradcheck(sizes: list[int], order: Tensor | None) -> None:
    x, weight, us, ss, vs, bias = operands()
    leaves = [t.requires_grad_() for t in (x, bias, *us, *vs)]

    def run(x: Tensor, bias: Tensor, *factors: Tensor) -> Tensor:
        return siva_linear_mixed(x, weight, factors[:4], ss, factors[4:], sizes, order, bias)

    assert torch.autograd.gradcheck(run, leaves)


def test_saves_x_and_the_projections_of_what_trains() -> None:
    x, weight, us, ss, vs, _ = operands()
    us[0].requires_grad_()
    vs[0].requires_grad_()
    known = {t.data_ptr() for t in (weight, *us, *ss, *vs)}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        siva_linear_mixed(x, weight, us, ss, vs, SIZES[0], orders()[1])
    shapes = [tuple(t.shape) for t in kept if t.data_ptr() not in known and t.dtype != torch.int64]
    assert shapes == [(5, 3, 7), (24,)]  # x as it is, and p^T: rank 3 for two rows of three tokens, rank 1 for two more


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("order", orders())
def test_a_gpu_gives_the_gradients_of_the_cpu(order: Tensor | None) -> None:
    found = []
    for device in ("cpu", "cuda"):
        x, weight, *factors, bias = operands(dtype=torch.float32)
        us, ss, vs = ([t.to(device) for t in each] for each in factors)
        leaves = [t.requires_grad_() for t in (x.to(device), bias.to(device), *us, *vs)]
        placed = None if order is None else order.to(device)
        h = siva_linear_mixed(leaves[0], weight.to(device), us, ss, vs, SIZES[0], placed, leaves[1])
        found.append([gradient.cpu() for gradient in torch.autograd.grad(h.square().sum(), leaves)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_rows_that_do_not_fit_are_refused() -> None:
    x, weight, us, ss, vs, _ = operands()
    for refused, message in (
        ((x, weight, us, ss, vs[:3], SIZES[0]), "4 u, 4 s, 3 v"),
        ((x, weight, us, ss, vs, [2, 2, 2, 2]), r"whose sum is B.*sizes \[2, 2, 2, 2\]"),
        ((x, weight, us, ss, vs, [6, -1, 0, 0]), r"sizes \[6, -1, 0, 0\]"),
        ((x, weight, [], [], [], []), "at least one"),
        ((x[0, 0], weight, us, ss, vs, SIZES[0]), r"x \(B, \*, K\)"),
        ((x, weight, us, ss, vs, SIZES[0], torch.zeros(4, dtype=torch.int64)), r"int64, \(4,\)"),
        ((x, weight, us, ss, vs, SIZES[0], torch.zeros(5)), r"float32, \(5,\)"),
        ((x, weight, us[::-1], ss, vs, SIZES[0]), r"siva_linear takes x .* got x"),
    ):
        with pytest.raises(FastpeftError, match=message):
            siva_linear_mixed(*refused)


# -- models ----------------------------------------------------------------------------------------------------------

NAMES = ["second", BASE, "default", "second", "default", BASE, "third"]


def train_a_little(model: nn.Module) -> None:
    """Move whatever an adapter could train, so that no two adapters agree."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "siva_" in name or "modules_to_save" in name:
            parameter.data += 0.03 * max(parameter.shape) ** -0.5 * torch.randn(parameter.shape, generator=generator)


def classifier(residual: str = "frozen") -> peft.PeftModel:
    """Three adapters on a RoBERTa, each with its head; the second and the third have other layers than the first."""
    base = tiny()
    for weight in base.parameters():  # else attention is uniform, and queries and keys matter little
        weight.data *= 10 if weight.dim() == 2 else 1
    settings: dict[str, Any] = {"r": 3, "residual": residual, "task_type": "SEQ_CLS"}
    model = peft.get_peft_model(base, SivaConfig(target_modules=["query", "key"], **settings))
    model.add_adapter("second", SivaConfig(target_modules=["query", "dense"], **settings))
    if residual == "implicit":
        settings["r"] = 2
    model.add_adapter("third", SivaConfig(target_modules=["key"], **settings))
    train_a_little(model)
    return model.eval()


def of_adapter(model: peft.PeftModel, name: str, inputs: Tensor) -> Tensor:
    """The logits of a batch that belongs to one adapter."""
    if name == BASE:
        with model.disable_adapter():
            return model(inputs).logits
    before = model.active_adapter
    model.set_adapter(name)
    logits = model(inputs).logits
    model.set_adapter(before)
    return logits


def one_by_one(model: peft.PeftModel, names: Sequence[str], inputs: Tensor) -> Tensor:
    """The logits of a mixed batch, by a run for each adapter over its rows alone."""
    found: dict[int, Tensor] = {}
    for name in set(names):
        rows = [row for row, own in enumerate(names) if own == name]
        found |= dict(zip(rows, of_adapter(model, name, inputs[rows])))
    return torch.stack([found[row] for row in range(len(names))])


@RESIDUALS
@pytest.mark.parametrize("names", [NAMES, sorted(NAMES), NAMES[::-1], ["second"] * 7, [BASE] * 7])
def test_a_mixed_batch_equals_a_batch_for_each_adapter(residual: str, names: list[str]) -> None:
    model = classifier(residual)
    with torch.no_grad():
        expected = one_by_one(model, names, token_ids(7))
        torch.testing.assert_close(model(token_ids(7), adapter_names=names).logits, expected, **CLOSE)
        assert len(set(names)) == 1 or not torch.allclose(model(token_ids(7)).logits, expected, atol=0.01)
    assert all(layer.rows is None for layer in model.base_model._siva_layers())


def test_heads_of_other_numbers_of_classes_end_in_what_no_class_has() -> None:
    model = classifier("frozen")
    head = model.base_model.model.classifier.modules_to_save["second"].out_proj
    more = len(head.weight) + 2
    model.base_model.model.classifier.modules_to_save["second"].out_proj = nn.Linear(head.in_features, more)
    with torch.no_grad():
        found = model(token_ids(7), adapter_names=NAMES).logits
        for name in sorted(set(NAMES)):
            rows = [row for row, own in enumerate(NAMES) if own == name]
            alone = model(token_ids(7)[rows], adapter_names=[name] * len(rows)).logits
            assert alone.shape[1] == (more if name == "second" else more - 2)
            torch.testing.assert_close(found[rows][:, : alone.shape[1]], alone, **CLOSE)
            assert (found[rows][:, alone.shape[1] :] == -torch.inf).all()


def gradients(model: peft.PeftModel, logits: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    logits.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train_all(model: peft.PeftModel) -> None:
    model.set_requires_grad(["default", "second", "third"])


@RESIDUALS
def test_gradients_are_those_of_a_batch_for_each_adapter(residual: str) -> None:
    model = without_dropout(classifier(residual))
    total: dict[str, Tensor] = {}
    for name in set(NAMES) - {BASE}:
        model.set_adapter(name)
        train_all(model)
        rows = [row for row, own in enumerate(NAMES) if own == name]
        for key, gradient in gradients(model, model(token_ids(7)[rows]).logits).items():
            total[key] = total.get(key, 0) + gradient
    model.set_adapter("default")
    train_all(model)
    found = gradients(model, model(token_ids(7), adapter_names=NAMES).logits)
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for key, gradient in found.items():
        assert gradient.abs().max() > 1e-3, key
        torch.testing.assert_close(gradient, total[key], rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


def test_rows_of_a_quantised_residual() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    settings: dict[str, Any] = {"r": 3, "target_modules": ["0", "2"], "residual_dtype": "int8"}
    model = peft.get_peft_model(base, SivaConfig(**settings))
    model.add_adapter("second", SivaConfig(**settings))
    train_a_little(model)
    x, names = torch.randn(4, 64), ["second", "default", BASE, "second"]
    model.set_requires_grad(["default", "second"])
    found = gradients(model, model(x, adapter_names=names))
    assert len(found) == 8
    with torch.no_grad():
        out = model(x, adapter_names=names)
        for row, name in ((0, "second"), (1, "default"), (3, "second")):
            model.set_adapter(name)
            torch.testing.assert_close(out[row], model(x)[row], **CLOSE)


def test_only_what_requires_a_gradient_gets_one() -> None:
    model = classifier()
    model.set_adapter("second")
    found = gradients(model, model(token_ids(7), adapter_names=NAMES).logits)
    assert found
    assert all(".second" in name for name in found)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_remembers_the_rows_of_each_run(use_reentrant: bool) -> None:
    """Two runs with different names before one backward, in which the blocks run again."""
    model = without_dropout(classifier("implicit"))
    train_all(model)
    model.enable_input_require_grads()

    def both() -> Tensor:
        return torch.cat([model(token_ids(7), adapter_names=names).logits for names in (NAMES, NAMES[::-1])])

    expected = gradients(model, both())
    calls: list[object] = []
    query = model.base_model.model.roberta.encoder.layer[0].attention.self.query
    query.register_forward_hook(lambda layer, *_: calls.append(layer.rows))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    kept = dict(query.__dict__)
    found = gradients(model, both())
    assert len(calls) == 4  # twice forward, twice in backward
    assert None not in calls
    assert query.__dict__ == kept
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=0, atol=0)


def test_an_exception_leaves_no_rows_behind() -> None:
    model = classifier()
    with torch.no_grad():
        expected = model(token_ids(7)).logits
        handle = model.base_model.model.roberta.encoder.layer[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(token_ids(7), adapter_names=NAMES)
        handle.remove()
        assert model(token_ids(7)).logits.equal(expected)


def test_a_mixed_batch_during_another_is_refused_and_leaves_nothing_behind() -> None:
    """As of two threads: the rows of one stayed in the layers, and all later batches were wrong."""
    model, inputs = classifier(), token_ids(7)
    layer = model.base_model.model.roberta.encoder.layer[1]
    with torch.no_grad():
        expected = model(inputs).logits
        handle = layer.register_forward_pre_hook(lambda *_: model(inputs, adapter_names=NAMES[::-1]) and None)
        with pytest.raises(FastpeftError, match="another thread runs this model with adapter_names"):
            model(inputs, adapter_names=NAMES)
        handle.remove()
        assert model(inputs).logits.equal(expected)


def test_disabled_adapters_disable_those_of_rows() -> None:
    model = classifier()
    with torch.no_grad(), model.disable_adapter():
        assert model(token_ids(7), adapter_names=NAMES).logits.equal(model(token_ids(7)).logits)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["default", "fourth", *NAMES[2:]], "'default', 'second', 'third', '__base__'"),
        ("default", "give a list with a name for each row"),
        ([], "give a list"),
        ([["default"]] * 7, "give a list"),
        (NAMES[:3], r"Length of adapter_names .* got 3 names, and .*query reads an input of shape \(7, 9, 16\)"),
    ],
)
def test_wrong_names_are_refused(names: Any, message: str) -> None:
    model = classifier()
    with pytest.raises(FastpeftError, match=message):
        model(token_ids(7), adapter_names=names)
    assert all(layer.rows is None for layer in model.base_model._siva_layers())


def test_a_model_that_reads_tokens_first_is_refused() -> None:
    """With as many tokens as rows its layers would take tokens for rows, and no shape would tell."""
    sizes = {"vocab_size": 50, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32}
    base = transformers.XLNetForSequenceClassification(transformers.XLNetConfig(**sizes))
    config = SivaConfig(r=2, target_modules=["layer_1", "layer_2"], residual="implicit", task_type="SEQ_CLS")
    model = peft.get_peft_model(base, config).eval()
    with pytest.raises(FastpeftError, match=r"'xlnet', whose layers read tokens first"):
        model(token_ids(9), adapter_names=["default", BASE, *["default"] * 7])
    model(token_ids(9))


@pytest.mark.parametrize("training", [False, True])
def test_merged_adapters_are_refused(training: bool) -> None:
    model = classifier().train(training)
    model.merge_adapter()
    with pytest.raises(FastpeftError, match=r"call unmerge_adapter first\. Now 'default' would act"):
        model(token_ids(7), adapter_names=NAMES)
    model.unmerge_adapter()
    model(token_ids(7), adapter_names=NAMES)


def test_a_weight_that_is_read_cannot_differ_by_row() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    model = peft.get_peft_model(Attention().eval(), SivaConfig(r=2, target_modules=["out_proj"]))
    x = torch.randn(2, 5, 16)
    model(x)
    with pytest.raises(FastpeftError, match=r"out_proj: adapter_names needs layers that are called"):
        model(x, adapter_names=["default", BASE])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conv1d_and_half_precision(dtype: torch.dtype) -> None:
    model = peft.get_peft_model(tiny("GPT2", "Model").to(dtype), SivaConfig(r=2, target_modules=["c_attn"]))
    model.add_adapter("second", SivaConfig(r=2, target_modules=["c_attn"]))
    train_a_little(model)
    model.eval()
    with torch.no_grad():
        found = model(token_ids(3), adapter_names=["second", "default", "second"]).last_hidden_state
        expected = []
        for row, name in enumerate(["second", "default", "second"]):
            model.set_adapter(name)
            expected.append(model(token_ids(3)[row : row + 1]).last_hidden_state)
    assert found.dtype is dtype
    tolerance = CLOSE if dtype is torch.float32 else {"rtol": 0.02, "atol": 0.05}
    torch.testing.assert_close(found, torch.cat(expected), **tolerance)


def causal() -> peft.PeftModel:
    settings = {"r": 4, "residual": "implicit", "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(tiny("Llama", "ForCausalLM", initializer_range=0.3), SivaConfig(**settings))
    model.add_adapter("second", SivaConfig(**settings))
    train_a_little(model)
    return model.eval()


@pytest.mark.parametrize("beams", [1, 3])
def test_generates_by_row(beams: int) -> None:
    model = causal()
    prompt, settings = (
        token_ids(4)[:, :5],
        {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0},
    )
    names = ["second", "default", BASE, "second"]
    mask = torch.ones_like(prompt)
    found = model.generate(input_ids=prompt, attention_mask=mask, adapter_names=names, **settings)
    for row, name in enumerate(names):
        one, of_one = prompt[row : row + 1], mask[:1]
        if name == BASE:
            with model.disable_adapter():
                alone = model.generate(input_ids=one, attention_mask=of_one, **settings)
        else:
            model.set_adapter(name)
            alone = model.generate(input_ids=one, attention_mask=of_one, **settings)
        width = alone.shape[1]
        assert found[row, :width].equal(alone[0])
    assert not found[0].equal(found[3])


@pytest.mark.parametrize("asked", [{"num_beams": 2}, {"num_beams": 1, "num_return_sequences": 2, "do_sample": True}])
def test_beams_that_the_models_own_configuration_asks_for(asked: dict[str, Any]) -> None:
    """That of bart-large-cnn has four."""
    model = causal()
    call = {"adapter_names": ["second", "default"], "max_new_tokens": 6, "pad_token_id": 0}
    prompt = {"input_ids": token_ids(2)[:, :5], "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    torch.manual_seed(0)
    expected = model.generate(**prompt, **call, **asked)
    model.get_base_model().generation_config.update(**asked)
    torch.manual_seed(0)
    assert model.generate(**prompt, **call).equal(expected)


def test_an_encoder_reads_each_row_once_and_a_decoder_every_beam() -> None:
    base = tiny("T5", "ForConditionalGeneration", d_kv=8, d_ff=32, num_layers=2, decoder_start_token_id=0)
    model = peft.get_peft_model(base, SivaConfig(r=2, task_type="SEQ_2_SEQ_LM"))
    model.add_adapter("second", SivaConfig(r=2, task_type="SEQ_2_SEQ_LM"))
    train_a_little(model)
    model.eval()
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 3, "do_sample": False}
    names = ["second", "default", "second"]
    found = model.generate(input_ids=token_ids(3), attention_mask=torch.ones(3, 9), adapter_names=names, **settings)
    for row, name in enumerate(names):
        model.set_adapter(name)
        alone = model.generate(input_ids=token_ids(3)[row : row + 1], attention_mask=torch.ones(1, 9), **settings)
        assert found[row].equal(alone[0])


def test_a_copy_and_a_reload_know_no_rows(tmp_path: Any) -> None:
    model = classifier("implicit")
    with torch.no_grad():
        expected = model(token_ids(7), adapter_names=NAMES).logits
        assert copy.deepcopy(model)(token_ids(7), adapter_names=NAMES).logits.equal(expected)
        model.save_pretrained(tmp_path)
        base = tiny()
        for weight in base.parameters():
            weight.data *= 10 if weight.dim() == 2 else 1
        loaded = peft.PeftModel.from_pretrained(base, tmp_path)
        for name in ("second", "third"):
            loaded.load_adapter(tmp_path / name, name)
        assert loaded.eval()(token_ids(7), adapter_names=NAMES).logits.equal(expected)


@pytest.mark.long
def test_compiles() -> None:
    """Into one graph where PyTorch traces a context that takes an attribute off a module, as 2.10 does not."""
    model = classifier("implicit")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=torch.__version__ >= (2, 11), backend="aot_eager")
    with torch.no_grad():
        for names in (NAMES, NAMES[::-1]):
            found = compiled(token_ids(7), adapter_names=names).logits
            torch.testing.assert_close(found, model(token_ids(7), adapter_names=names).logits, **CLOSE)
    torch._dynamo.reset()
