"""What trains beside the factors, with LoRA's meaning: biases, the embeddings of single tokens, whole modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import TrainableTokensWrapper
from siva_adapters import CLOSE, move, tiny, token_ids, trained
from torch import Tensor, nn

from fastpeft import FastpeftError, SivaConfig
from fastpeft.siva.export import save_as_lora

TOKENS = [40, 3, 49]
BASE = "__base__"


def decoder(tied: bool = False) -> Any:
    return tiny("Llama", "ForCausalLM", initializer_range=0.3, tie_word_embeddings=tied)


def encoder() -> Any:
    return tiny(initializer_range=0.3)


def ids(rows: int = 3) -> Tensor:
    found = token_ids(rows)
    found[:, 4] = TOKENS[0]
    return found


@torch.no_grad()
def logits(model: nn.Module, inputs: Tensor | None = None, **settings: Any) -> Tensor:
    return model(ids() if inputs is None else inputs, **settings).logits


def adapted(base: Any, **config: Any) -> Any:
    task = "SEQ_CLS" if hasattr(base, "classifier") else "CAUSAL_LM"
    return move(peft.get_peft_model(base, SivaConfig(**({"r": 2, "task_type": task} | config)))).eval()


def beside(model: nn.Module) -> set[str]:
    """What trains and is no factor, by its name in any method's model."""
    return {name for name in trained(model) if "siva_" not in name and "lora_" not in name}


# -- biases ----------------------------------------------------------------------------------------------------------

SAVES_BIASES = pytest.mark.skipif(
    not hasattr(BaseTuner, "_get_learnable_bias_state_dict"), reason="this PEFT saves the biases of LoRA alone"
)


def test_biases_are_refused_where_peft_would_not_save_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(BaseTuner, "_get_learnable_bias_state_dict", raising=False)
    SivaConfig(bias="none")
    with pytest.raises(FastpeftError, match=r"saves the biases of LoRA alone\. Install peft 0\.21"):
        SivaConfig(bias="all")


@SAVES_BIASES
@pytest.mark.parametrize("bias", ["none", "all", "siva_only"])
def test_the_biases_that_train_are_those_of_lora(bias: str) -> None:
    lora = peft.LoraConfig(target_modules=["query", "key"], bias=bias.replace("siva", "lora"), task_type="SEQ_CLS")
    expected = beside(peft.get_peft_model(encoder(), lora))
    siva = SivaConfig(r=2, target_modules=["query", "key"], bias=bias, task_type="SEQ_CLS")
    assert beside(peft.get_peft_model(encoder(), siva)) == expected


@SAVES_BIASES
@pytest.mark.parametrize("residual", [{}, {"residual": "implicit"}, {"residual_dtype": "int8"}])
@pytest.mark.parametrize("bias", ["all", "siva_only"])
def test_biases_get_gradients_are_saved_merged_and_exported(
    tmp_path: Path, bias: str, residual: dict[str, str]
) -> None:
    model = adapted(encoder(), bias=bias, target_modules=["value", "dense"], **residual)
    model(ids()).logits.square().sum().backward()
    biases = {name for name in trained(model) if name.endswith(".base_layer.bias")}
    assert len(biases) == 8
    for name in biases:
        assert model.get_parameter(name).grad.abs().max() > 1e-4, name
    expected = logits(model)
    model.save_pretrained(tmp_path / "siva")
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(encoder(), tmp_path / "siva").eval()), expected)
    save_as_lora(model, tmp_path / "lora")
    lora = logits(peft.PeftModel.from_pretrained(encoder(), str(tmp_path / "lora")).eval())
    if "residual_dtype" not in residual:
        torch.testing.assert_close(lora, expected, **CLOSE)
    # with an int8 residual activations may be rounded to 8 bits too, which a merged weight does not ask for
    close = {"rtol": 0.0, "atol": 0.02} if "residual_dtype" in residual else CLOSE  # measured: 0.005
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, **close)


@SAVES_BIASES
def test_biases_of_two_adapters_and_of_rows() -> None:
    """Biases are the model's own, so that one adapter alone can train them, and all rows have them."""
    model = adapted(encoder(), bias="siva_only")
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        model.add_adapter("second", SivaConfig(r=2, bias="all", task_type="SEQ_CLS"))
    model.add_adapter("third", SivaConfig(r=2, task_type="SEQ_CLS"))
    torch.testing.assert_close(logits(model, adapter_names=["default"] * 3), logits(model), **CLOSE)
    with pytest.raises(FastpeftError, match=r"'default' trains biases \(bias='siva_only'\)"):
        logits(model, adapter_names=["default", "third", BASE])


# -- embeddings of tokens --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("given", [TOKENS, {"embed_tokens": TOKENS}])
@pytest.mark.parametrize("residual", ["frozen", "implicit"])
def test_tokens_train_as_those_of_lora(tmp_path: Path, tied: bool, given: Any, residual: str) -> None:
    settings = {"target_modules": ["q_proj", "v_proj"], "trainable_token_indices": given, "task_type": "CAUSAL_LM"}
    lora = peft.get_peft_model(decoder(tied), peft.LoraConfig(**settings))
    model = adapted(decoder(tied), residual=residual, **settings)
    assert beside(model) == beside(lora) != set()
    model(ids()).logits.square().sum().backward()
    deltas = [p for name, p in model.named_parameters() if "trainable_tokens_delta" in name]
    assert [p.shape for p in deltas] == [(3, 16)]
    assert deltas[0].grad[0].abs().max() > 1e-4
    expected = logits(model)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(decoder(tied)), **CLOSE)
    assert model.get_model_status().devices["default"] == ["cpu"]

    model.save_pretrained(tmp_path / "siva")
    assert not any("embed_tokens.weight" in key for key in peft.get_peft_model_state_dict(model))
    loaded = peft.PeftModel.from_pretrained(decoder(tied), tmp_path / "siva").eval()
    assert logits(loaded).equal(expected)
    save_as_lora(model, tmp_path / "lora")
    as_lora = peft.PeftModel.from_pretrained(decoder(tied), str(tmp_path / "lora")).eval()
    torch.testing.assert_close(logits(as_lora), expected, **CLOSE)
    torch.testing.assert_close(logits(as_lora.merge_and_unload()), expected, **CLOSE)

    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, **CLOSE)
    assert merged.state_dict().keys() == decoder(tied).state_dict().keys()
    torch.testing.assert_close(logits(loaded.unload()), logits(decoder(tied)), **CLOSE)


@pytest.mark.parametrize("tied", [False, True])
def test_each_row_has_the_tokens_of_its_adapter(tied: bool) -> None:
    settings = {"r": 2, "residual": "implicit", "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(decoder(tied), SivaConfig(**settings, trainable_token_indices=TOKENS))
    model.add_adapter("second", SivaConfig(**settings, trainable_token_indices=[TOKENS[0], 7]))
    model.add_adapter("third", SivaConfig(**settings))
    if any(isinstance(getattr(each, "base_layer", None), TrainableTokensWrapper) for each in model.modules()):
        pytest.skip("this PEFT wraps a tied layer once more for each adapter, so that it cannot run")
    model.set_requires_grad(["default", "second", "third"])
    move(model).eval()
    names = ["second", BASE, "default", "third", "second"]
    expected = {}
    for name in ("default", "second", "third"):
        model.set_adapter(name)
        expected[name] = logits(model, ids(5))
    with model.disable_adapter():
        expected[BASE] = logits(model, ids(5))
    found = logits(model, ids(5), adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(found[row], expected[name][row], **CLOSE)
    assert (expected["default"] - expected["second"]).abs().max() > 1e-2
    model.set_requires_grad(["default", "second"])
    model(ids(5), adapter_names=names).logits.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if "trainable_tokens_delta" in name}
    assert len(gradients) == 2
    assert all(gradient is not None and gradient[0].abs().max() > 1e-4 for gradient in gradients.values())


def test_tokens_that_a_chat_template_adds(tmp_path: Path) -> None:
    """What TRL's SFTTrainer does: it gives a configuration the new tokens, and has the output layer saved whole."""

    def base() -> Any:
        grown = decoder()
        torch.manual_seed(0)
        grown.resize_token_embeddings(52, mean_resizing=False)
        return grown

    config = SivaConfig(r=2, task_type="CAUSAL_LM")
    config.trainable_token_indices, config.modules_to_save = {"embed_tokens": [50, 51]}, ["lm_head"]
    model = move(peft.get_peft_model(base(), config)).eval()
    model.save_pretrained(tmp_path)
    new = torch.full((1, 4), 51)
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    assert logits(loaded, new).equal(logits(model, new))
    assert not torch.allclose(logits(model, new), logits(base(), new), atol=1e-2)


def test_tokens_are_refused_where_peft_would_lose_the_bias_of_an_output_layer() -> None:
    """PEFT's layer of tokens multiplies by the weight of a tied head of masked words, and leaves its bias out."""

    def masked_words(tied: bool) -> Any:
        return tiny(head="ForMaskedLM", tie_word_embeddings=tied)

    for tied, tokens in (True, TOKENS), (False, {"lm_head.decoder": TOKENS}):
        with pytest.raises(FastpeftError, match=r"lm_head\.decoder has the weight of these tokens and a bias"):
            peft.get_peft_model(masked_words(tied), SivaConfig(r=2, trainable_token_indices=tokens))
    apart = peft.get_peft_model(masked_words(False), SivaConfig(r=2, trainable_token_indices=TOKENS))
    torch.testing.assert_close(logits(apart), logits(masked_words(False)), **CLOSE)


def test_tokens_are_float32_on_a_half_precision_base() -> None:
    for config in (peft.LoraConfig, SivaConfig):
        settings = {"target_modules": ["q_proj"], "trainable_token_indices": TOKENS, "task_type": "CAUSAL_LM"}
        model = peft.get_peft_model(decoder().bfloat16(), config(**settings))
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@SAVES_BIASES
def test_what_cannot_become_a_lora_of_peft() -> None:
    for config in ({"bias": "all"}, {"trainable_token_indices": TOKENS}):
        with pytest.raises((TypeError, ValueError), match=r"bias=all|TrainableTokensLayer"):
            peft.convert_to_lora(adapted(decoder(), **config), rank=4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"trainable_token_indices": [50]}, r"embed_tokens has 50 rows, so tokens are 0 to 49.*resize_token"),
        ({"trainable_token_indices": {"wte": [1]}}, "no module has a name that ends in 'wte'"),
        ({"trainable_token_indices": {"model": [1]}}, "model is a LlamaModel, which is no embedding"),
        (
            {"trainable_token_indices": {"embed_tokens": [1]}, "modules_to_save": ["embed_tokens"]},
            "embed_tokens is among modules_to_save",
        ),
        ({"trainable_token_indices": [-1]}, "list of different token numbers"),
        ({"trainable_token_indices": [1, 1]}, "list of different token numbers"),
        ({"trainable_token_indices": 5}, "list of different token numbers"),
        ({"bias": "lora_only"}, "bias='lora_only'; allowed are 'none', 'all', 'siva_only'"),
        ({"target_parameters": ["experts.up"]}, "parameter of another module, as of stacked experts"),
        ({"layer_replication": [(0, 2), (1, 2)]}, "replicated layers share their weights"),
    ],
)
def test_what_cannot_train_is_refused_before_the_model_changes(config: dict[str, Any], message: str) -> None:
    base = decoder()
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(FastpeftError, match=message):
        peft.get_peft_model(base, SivaConfig(r=2, **config))
    assert [name for name, _ in base.named_modules()] == names


@SAVES_BIASES
def test_a_saved_configuration_names_them(tmp_path: Path) -> None:
    SivaConfig(trainable_token_indices={"wte": [1]}, bias="all").save_pretrained(str(tmp_path))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["trainable_token_indices"], saved["bias"]) == ({"wte": [1]}, "all")
    assert SivaConfig.from_pretrained(str(tmp_path)).bias == "all"


# -- modules saved whole, by rows ------------------------------------------------------------------------------------


class Tagger(nn.Module):
    """A recurrent layer on a linear one; `call` runs what is saved whole."""

    def __init__(self, last: nn.Module, call: Any) -> None:
        super().__init__()
        self.first, self.last, self.call = nn.Linear(6, 8), last, call

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.call(self.last, self.first(x))
        return found


class Masked(nn.Linear):
    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        found = scale * super().forward(x)
        return found if mask is None else found * mask


class Mean(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(0)


@pytest.mark.parametrize(
    ("last", "call", "message"),
    [
        (nn.GRU(8, 4, batch_first=True), lambda m, x: m(x)[0], "last, a GRU, gives a tuple"),
        (Masked(8, 4), lambda m, x: m(x, mask=torch.ones(4, 1, 1)), "last, a Masked, takes 2"),
        (Mean(8, 4), lambda m, x: m(x), r"last, a Mean, gives \(5, 4\) for \("),
        (Masked(8, 4), lambda m, x: m(x=x, scale=2.0), None),
    ],
    ids=["tuple", "two tensors", "no rows", "keywords"],
)
def test_a_saved_module_that_cannot_run_by_rows_is_named(last: nn.Module, call: Any, message: str | None) -> None:
    torch.manual_seed(0)
    settings = {"r": 2, "target_modules": ["first"], "modules_to_save": ["last"]}
    model = peft.get_peft_model(Tagger(last, call), SivaConfig(**settings))
    model.add_adapter("second", SivaConfig(**settings))
    model.set_requires_grad(["default", "second"])
    move(model).eval()
    x, names = torch.randn(4, 5, 6), ["second", "default", BASE, "default"]
    if message is not None:
        with pytest.raises(FastpeftError, match=message):
            model(x, adapter_names=names)
        assert model(x).shape[-1] == 4
        return
    found = model(x, adapter_names=names)
    for row, name in ((0, "second"), (1, "default"), (3, "default")):
        model.set_adapter(name)
        torch.testing.assert_close(found[row], model(x)[row], **CLOSE)


def test_the_embedding_is_left_as_it_was_when_the_last_adapter_goes() -> None:
    model = adapted(decoder(), trainable_token_indices=TOKENS)
    model.add_adapter("second", SivaConfig(r=2, task_type="CAUSAL_LM"))
    model.delete_adapter("default")
    wrapper = model.get_base_model().get_input_embeddings()
    assert isinstance(wrapper, TrainableTokensWrapper)
    model.set_adapter("second")
    torch.testing.assert_close(logits(model), logits(decoder()), **CLOSE)
