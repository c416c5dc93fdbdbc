"""`LadderModel` on tiny models of many architectures: what trains, the Trainer, and bad input."""

from __future__ import annotations

import copy
import inspect
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from backbones import (
    IDS,
    MASK,
    SPECIAL,
    classifier,
    ladder,
    logits,
    moved,
    tiny,
    train_a_little,
    trainable,
)
from safetensors.torch import load_file
from samples import reviews
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from trainers import quiet

from fastpeft import FastpeftError, LadderModel
from fastpeft.ladder import SideNetwork
from fastpeft.training.memory import simulate_training_step


def trained_head(model: LadderModel) -> list[str]:
    return [name.removeprefix("base.") for name in trainable(model) if "side." not in name]


# -- architectures -----------------------------------------------------------------------------------------------


def test_the_encoder_output_is_the_side_networks() -> None:
    """The head gets the up-projection and nothing else: that of zeros makes all texts alike."""
    model = ladder().eval()
    assert not logits(model)[0].allclose(logits(model)[1])
    model.side.up.weight.data.zero_()
    torch.testing.assert_close(logits(model)[0], logits(model)[1])


def test_layers_named_by_hand() -> None:
    expected = logits(ladder().eval())
    for names in (["roberta.encoder.layer"], "roberta.encoder.layer", [f"roberta.encoder.layer.{i}" for i in range(3)]):
        assert logits(ladder(feature_modules=names).eval()).equal(expected)


# -- the backbone ------------------------------------------------------------------------------------------------


def test_no_graph_below_the_side_network() -> None:
    model, seen, saved = ladder().train(), [], []
    embeddings = model.base.roberta.embeddings.word_embeddings(IDS).detach().requires_grad_()
    for module in model.base.roberta.modules():
        module.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = model(inputs_embeds=embeddings, attention_mask=MASK, labels=torch.tensor([0, 1, 2])).loss
    loss.backward()
    assert embeddings.grad is None
    assert not any(seen[:-3])  # the last layer, the encoder and the model around it return after the side network
    backbone = {p.data_ptr() for p in model.base.roberta.parameters()}
    assert not backbone & {tensor.data_ptr() for tensor in saved}


def test_gradients_are_on_again_after_an_error_inside() -> None:
    model = ladder()
    with pytest.raises(IndexError):
        model(torch.full((1, 3), 99))
    assert torch.is_grad_enabled()
    assert model(IDS, labels=torch.tensor([0, 1, 2])).loss.requires_grad
    assert not any("forward" in vars(layer) for layer in model.base.roberta.encoder.layer)


def test_the_backbone_stays_in_evaluation_mode() -> None:
    model = ladder(tiny("Bert")).train()
    assert not any(module.training for name, module in model.base.bert.named_modules() if "pooler" not in name)
    assert model.base.bert.pooler.training
    assert model.base.dropout.training
    assert model.side.training
    assert not any(module.training for module in model.eval().modules())


@pytest.mark.parametrize("whole", [True, False], ids=["base", "each module"])
def test_a_pass_puts_the_backbone_back_into_evaluation_mode(whole: bool) -> None:
    """Something else may hold the base too, or visit all modules."""
    model = ladder(tiny("Bert")).train()
    expected = [module.training for module in model.modules()]
    for module in [model.base] if whole else model.modules():
        module.train()
    assert [module.training for module in model.modules()] != expected
    model(IDS)
    assert [module.training for module in model.modules()] == expected


def test_a_backbone_that_is_to_train_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    model = ladder()
    model.train()
    assert "require gradients" not in caplog.text
    model.backbone.layers[-1].requires_grad_(True)
    for _ in range(2):
        model.train()
    assert caplog.text.count("parameters of the backbone require gradients") == 1


def test_an_input_that_is_to_train_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """As a soft prompt in front of the embeddings."""
    model = ladder().train()
    embeddings = model.get_input_embeddings()(IDS)
    model(inputs_embeds=embeddings)
    assert not caplog.text
    embeddings.requires_grad_(True)
    with torch.no_grad():
        model(inputs_embeds=embeddings)
    assert not caplog.text
    for _ in range(2):
        model(inputs_embeds=embeddings).logits.sum().backward()
    assert embeddings.grad is None
    assert caplog.text.count("the input of a LadderModel requires a gradient") == 1


def test_inference_makes_no_graph() -> None:
    with torch.no_grad():
        output = ladder()(IDS, labels=torch.tensor([0, 1, 2]), output_hidden_states=True)
    assert not output.loss.requires_grad
    assert not output.hidden_states[-1].requires_grad


def test_outputs_on_request() -> None:
    model = ladder().eval()
    assert model(IDS).hidden_states is None
    states = model(IDS, output_hidden_states=True).hidden_states
    assert [tuple(state.shape) for state in states] == [(3, 9, 8)] * 4
    as_tuple = model(IDS, labels=torch.tensor([0, 1, 2]), return_dict=False)
    assert [tuple(part.shape) for part in as_tuple] == [(), (3, 3)]


def test_token_types_reach_a_base_that_knows_them_and_no_other() -> None:
    types = torch.ones_like(IDS)
    bert, distil = ladder(tiny("Bert")).eval(), ladder(tiny("DistilBert")).eval()
    with torch.no_grad():
        assert not bert(IDS, token_type_ids=types).logits.equal(bert(IDS).logits)
        assert distil(IDS, token_type_ids=types).logits.equal(distil(IDS).logits)


def test_a_head_in_float64_stays_so() -> None:
    base = tiny("Bert").double()
    model = train_a_little(ladder(base))
    assert {name: p.dtype for name, p in trainable(model).items() if p.dtype != torch.float32} == dict.fromkeys(
        (f"base.{name}" for name in trained_head(model)), torch.float64
    )
    assert logits(model).dtype == torch.float64


def test_autocast() -> None:
    model = ladder().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(IDS, labels=torch.tensor([0, 1, 2])).loss
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in trainable(model).values())


def test_over_a_peft_model(tmp_path: Path) -> None:
    def wrapped() -> Any:
        torch.manual_seed(5)
        config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False)
        return peft.get_peft_model(tiny(), config).eval()

    model = ladder(wrapped())
    assert [name.rpartition("default.")[2] for name in trained_head(model)] == [
        f"{part}.{kind}" for part in ("dense", "out_proj") for kind in ("weight", "bias")
    ]
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    train_a_little(model)
    assert all(model.get_parameter(name).equal(p) for name, p in frozen.items())
    model.save_pretrained(tmp_path)
    assert not any("lora" in name for name in load_file(tmp_path / "model.safetensors"))
    assert logits(LadderModel.from_pretrained(tmp_path, base=wrapped())).equal(logits(model))
    with pytest.raises(FastpeftError, match="wrapped as it was there"):
        LadderModel.from_pretrained(tmp_path, base=tiny())


def test_the_side_network_is_made_where_the_base_is() -> None:
    model = ladder(tiny().to("meta"))
    assert model.side.up.weight.is_meta
    assert model(input_ids=IDS.to("meta")).logits.shape == (len(IDS), 3)


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this torch knows no other device")
def test_the_side_network_may_be_on_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SideNetwork, "to", lambda self, device: self)  # it is made on the CPU and stays there
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):  # a GPU that need not be there
            base = tiny(attn_implementation="eager")
            batch = {name: torch.zeros(3, 9, dtype=torch.long) for name in ("input_ids", "attention_mask")}
            batch["labels"] = torch.zeros(3, dtype=torch.long)
        model = ladder(base).train()
        output = model(**batch, output_hidden_states=True)
        assert output.loss.requires_grad
        assert output.logits.device.type == "cuda"
        assert {state.device.type for state in output.hidden_states} == {"cpu"}


@pytest.mark.parametrize("config", [{"feature_dropout": 0.3}, {"layer_drop": 0.5}], ids=str)
def test_passes_in_training_drop_what_torchs_random_state_says(config: dict[str, Any]) -> None:
    model = ladder(**config).train()

    def states() -> set[float]:
        torch.manual_seed(0)
        passes = [model(IDS, attention_mask=MASK, output_hidden_states=True) for _ in range(8)]
        return {each.hidden_states[-1].double().sum().item() for each in passes}

    assert len(states()) > 3
    assert states() == states()


def test_a_training_step_can_be_simulated() -> None:
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": torch.tensor([0, 1, 2])}
    estimate = simulate_training_step(ladder(feature_dropout=0.1).train(), batch)
    assert estimate.peak > sum(p.numel() * p.element_size() for p in tiny().parameters())


# -- Trainer -----------------------------------------------------------------------------------------------------


def test_trainer_loads_the_best_model_and_no_optimizer_holds_the_backbone(
    tmp_path: Path, half_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = ladder(classifier(half_checkpoint, id2label={0: "no", 1: "yes"}))
    tokenizer = transformers.AutoTokenizer.from_pretrained(half_checkpoint)
    rows = [{**tokenizer(text), "labels": int(label == "positive")} for text, label in reviews(32)]
    settings = quiet(
        tmp_path,
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        save_steps=2,
        eval_steps=2,
        eval_strategy="steps",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # an early checkpoint, so that loading it changes something
    )
    best = transformers.Trainer(model, settings, train_dataset=rows, eval_dataset=rows[:8], processing_class=tokenizer)
    best.train()
    assert best.state.best_model_checkpoint
    assert "missing keys" not in caplog.text
    kept = load_file(Path(best.state.best_model_checkpoint) / "model.safetensors")
    assert kept.keys() == trainable(model).keys()
    assert all(tensor.equal(kept[name]) for name, tensor in trainable(model).items())
    assert not best.state.best_model_checkpoint.endswith("checkpoint-8")
    optimized = {id(p) for group in best.optimizer.param_groups for p in group["params"]}
    assert not optimized & {id(p) for p in model.base.roberta.parameters()}
    assert logits(LadderModel.from_pretrained(best.state.best_model_checkpoint)).isfinite().all()


@pytest.mark.parametrize("own", [None, 0])
def test_the_padding_that_a_trainer_tells_reaches_the_head(
    own: int | None, tmp_path: Path, half_checkpoint: Path
) -> None:
    """The head of a decoder looks for the last token that is no padding."""
    base = tiny("GPT2", pad_token_id=own)
    model, expected = ladder(base), ladder(tiny("GPT2")).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(half_checkpoint)
    assert tokenizer.pad_token_id == 1
    rows = [{"input_ids": ids, "labels": 0} for ids in ([5, 6, 7], [8, 9])]
    settings = quiet(tmp_path, max_steps=1, learning_rate=0.0)
    transformers.Trainer(model, settings, train_dataset=rows, processing_class=tokenizer).train()
    padded = torch.tensor([[5, 6, 7], [8, 9, 1]])
    expected.base.config.pad_token_id = 1
    assert model.eval()(padded).logits.equal(expected(padded).logits)


@pytest.mark.parametrize("head", ["LMHeadModel", "ForSequenceClassification"])
def test_smoothed_labels_of_next_words_are_shifted_by_a_trainer(tmp_path: Path, head: str) -> None:
    """Unshifted, they would teach to say the word that was just read."""
    model = moved(tiny("GPT2", head, pad_token_id=0)).eval()
    assert repr(model).startswith("LadderModel(")
    settings = transformers.TrainingArguments(tmp_path, label_smoothing_factor=0.1, report_to="none")
    ids = IDS
    labels = ids if head == "LMHeadModel" else torch.arange(len(ids)) % 2
    found = transformers.Trainer(model, settings).compute_loss(model, {"input_ids": ids, "labels": labels.clone()})
    logits = model(ids).logits
    if head == "LMHeadModel":
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    torch.testing.assert_close(found, nn.functional.cross_entropy(logits, labels, label_smoothing=0.1))


def test_a_trainer_counts_next_words_as_beside_the_base(tmp_path: Path) -> None:
    """Else it divides the sum over T - 1 words by T."""
    base = tiny("Llama", "ForCausalLM")
    settings = quiet(tmp_path, max_steps=1, logging_steps=1, save_strategy="no")
    rows = [{"input_ids": row, "labels": row} for row in IDS.tolist()]
    losses = []
    for model in (copy.deepcopy(base), ladder(base)):  # which starts as its base
        trainer = transformers.Trainer(model, settings, train_dataset=rows)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_a_trainer_that_is_told_the_names_of_answers_measures_their_loss(tmp_path: Path) -> None:
    model = ladder(tiny(head="ForQuestionAnswering", num_labels=2))
    answers = {"start_positions": torch.tensor([1, 2, 3]), "end_positions": torch.tensor([4, 5, 6])}
    settings = quiet(tmp_path, label_names=list(answers))
    rows = [{"input_ids": row, **{name: at[i] for name, at in answers.items()}} for i, row in enumerate(IDS)]
    predictions, _, metrics = transformers.Trainer(model, settings).predict(rows)
    with torch.no_grad():
        found = model(IDS, **answers)
    assert metrics["test_loss"] == pytest.approx(float(found.loss), abs=1e-5)
    for logits_of, expected in zip(predictions, (found.start_logits, found.end_logits), strict=True):
        torch.testing.assert_close(torch.tensor(logits_of), expected)


def test_inputs_that_the_base_alone_names_reach_it_in_a_trainer(tmp_path: Path) -> None:
    base = tiny("LayoutLM", "ForTokenClassification", max_2d_position_embeddings=64)
    model = moved(base)
    boxes = torch.arange(36).reshape(9, 4)
    seen: list[Tensor] = []
    base.layoutlm.embeddings.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["bbox"]), with_kwargs=True
    )
    row = {"input_ids": IDS[0].tolist(), "bbox": boxes.tolist(), "labels": [0] * 9, "speaker": "Ada"}
    settings = quiet(tmp_path, max_steps=1, save_strategy="no")
    for wrapped in (model, peft.get_peft_model(model, peft.LoraConfig(target_modules=["classifier"]))):
        trainer = transformers.Trainer(
            wrapped, settings, train_dataset=[row, row], data_collator=transformers.default_data_collator
        )
        seen.clear()
        trainer.train()
        assert [each.tolist() for each in seen] == [[boxes.tolist()] * 2]
        assert not trainer.model_accepts_loss_kwargs  # a loss divided by what a Trainer counts
    assert not model(IDS, bbox=boxes.expand(3, 9, 4)).logits.allclose(model(IDS).logits)
    with pytest.raises(FastpeftError, match="got langs, which it does not take"):
        model(IDS, langs=IDS)


def test_accelerate_gives_the_forward_back_that_it_wrapped_for_autocast() -> None:
    model = moved(tiny("LayoutLM", "ForTokenClassification", max_2d_position_embeddings=64))
    expected, inputs = model(IDS).logits, inspect.signature(model.forward)
    AcceleratorState._reset_state(reset_partial_state=True)  # that of a Trainer before
    try:
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        wrapped = accelerator.prepare(model)
        assert not wrapped(IDS).logits.equal(expected)
        unwrapped = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert unwrapped(IDS).logits.equal(expected)
    assert inspect.signature(unwrapped.forward) == inputs


# -- bad input ---------------------------------------------------------------------------------------------------


WAVES = {"conv_dim": (16,), "conv_stride": (5,), "conv_kernel": (5,), "num_feat_extract_layers": 1}


@pytest.mark.parametrize(
    ("base", "config", "message"),
    [
        (lambda: nn.Linear(4, 4), {}, "the base is a Linear"),
        (lambda: tiny("Albert"), {}, r"layers of AlbertForSequenceClassification .*says 3 layers"),
        (tiny, {"feature_modules": ["encoder.layer"]}, r"'encoder\.layer', which .* roberta\.encoder\.layer \(3\)"),
        (tiny, {"reduction_factor": 5}, "does not divide the backbone's width, 16"),
        (
            lambda: transformers.XLNetModel(transformers.XLNetConfig(d_model=16, n_layer=1, n_head=2)),
            {},
            r"features of .* a XLNetModel, are \(T, B, d\)",
        ),
        (lambda: tiny("Bert", "ForMultipleChoice"), {}, r"reads several texts a row, .* AutoModelForSequenceClass"),
        (lambda: tiny("Wav2Vec2", **WAVES), {}, r"reads input_values; .* input_ids or pixel_values\. Load a"),
    ],
)
def test_bases_that_do_not_fit_are_refused(base: Any, config: dict[str, Any], message: str) -> None:
    with pytest.raises(FastpeftError, match=message):
        ladder(base(), **config)


T5 = {"num_layers": 3, "num_decoder_layers": 3, "d_model": 16, "d_kv": 8, "decoder_start_token_id": 0, **SPECIAL}
BART = {"d_model": 16, "encoder_layers": 3, "decoder_layers": 3, **SPECIAL}
ENCODER_DECODERS = {
    "T5": (T5, ("Model", "ForConditionalGeneration"), ("Sequence", "Token")),
    "Bart": (BART, ("Model",), ("Sequence",)),
}


@pytest.mark.long(but="Bart")
@pytest.mark.parametrize("kind", ENCODER_DECODERS)
def test_advice_on_models_with_encoder_and_decoder_works(kind: str) -> None:
    shape, headless, problems = ENCODER_DECODERS[kind]
    named = " or ".join(f"{kind}For{problem}Classification" for problem in problems)
    for head in headless:
        with pytest.raises(FastpeftError, match=rf"{kind}{head} has no head .*Load the model with {named}\.$"):
            ladder(tiny(kind, head, **shape))
    with pytest.raises(FastpeftError, match="an encoder and a decoder") as error:
        ladder(tiny(kind, "ForSequenceClassification", **shape))
    stacks = re.findall(r"'(.+?)'", str(error.value))
    assert len(stacks) == 2
    ids = torch.cat([IDS, torch.full((3, 1), SPECIAL["eos_token_id"])], dim=1)  # what these heads read
    for stack in stacks:
        model = ladder(tiny(kind, "ForSequenceClassification", **shape), feature_modules=stack)
        learns(model, ids, torch.tensor([0, 1, 2]))
    if "Token" in problems:
        learns(ladder(tiny(kind, "ForTokenClassification", **shape)), ids, ids % 3)


def learns(model: LadderModel, ids: Tensor, labels: Tensor) -> None:
    """Steps lower the loss."""
    optimizer = torch.optim.Adam(trainable(model.eval()).values(), lr=1e-2)
    losses = []
    for _ in range(20):
        losses.append(model(ids, labels=labels).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]


def test_a_model_without_a_classifier_is_refused() -> None:
    with pytest.raises(FastpeftError, match=r"no classifier of the kind longt5\. Load a model of another"):
        ladder(tiny("LongT5", "Model", **T5, encoder_attention_type="local"))


def test_layers_named_out_of_order_are_refused() -> None:
    model = ladder(feature_modules=["roberta.encoder.layer.1", "roberta.encoder.layer.0"])
    with pytest.raises(FastpeftError, match="in their order"):
        model(IDS)


def test_layers_that_do_not_run_are_refused() -> None:
    shape = {"block_sizes": [2, 2, 2], "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32}
    base = transformers.FunnelForTokenClassification(transformers.FunnelConfig(vocab_size=50, **shape))
    model = ladder(base, feature_modules="funnel.encoder.blocks")  # a list of lists
    with pytest.raises(FastpeftError, match=r"did not run 3 of the 3 layers .*\(funnel\.encoder\.blocks\.0 to"):
        model(IDS)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "got neither input_ids, inputs_embeds nor pixel_values"),
        ({"input_ids": IDS[0]}, r"got a tensor of shape \(9,\); it takes a batch"),
        ({"input_ids": IDS, "attention_mask": MASK[:, None, None]}, r"attention_mask has the shape \(3, 1, 1, 9\)"),
        ({"input_ids": IDS, "attention_mask": MASK[:, 1:]}, r"attention_mask has the shape \(3, 8\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs: dict[str, Tensor], message: str) -> None:
    with pytest.raises(FastpeftError, match=message):
        ladder()(**inputs)


def test_layers_of_another_width_are_refused() -> None:
    model = ladder(feature_modules=["roberta.encoder.layer.0.intermediate"])
    with pytest.raises(FastpeftError, match=r"layer 1 is float32 \(3, 9, 32\); .* here \(3, 9, 16\)"):
        model(IDS)


def test_a_base_that_was_copied_or_replaced_is_refused() -> None:
    model = ladder()
    model.base = copy.deepcopy(model.base)
    with pytest.raises(FastpeftError, match=r"nn\.DataParallel copies it"):
        model(IDS)


def test_virtual_tokens_are_refused() -> None:
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    model = ladder(peft.get_peft_model(tiny(), config))
    with pytest.raises(FastpeftError, match="without virtual tokens"):
        model(IDS, attention_mask=MASK)


def test_rows_that_a_model_pads_itself_are_padded_by_a_collator() -> None:
    base = tiny("Longformer", attention_window=4)
    model = ladder(base).eval()
    with pytest.raises(FastpeftError, match=r"\(3, 12, 16\).* pad_to_multiple_of"):
        model(IDS, attention_mask=MASK)
    padded = [nn.functional.pad(each, (0, more)) for more in (3, 7) for each in (IDS, MASK)]
    once, twice = (model(ids, attention_mask=mask).logits for ids, mask in (padded[:2], padded[2:]))
    torch.testing.assert_close(once, twice)


def test_a_pass_during_another_is_refused_and_leaves_nothing_behind() -> None:
    """As of two threads: the forwards of one pass stayed on the layers, and all later passes were wrong."""
    model = ladder().eval()
    expected = logits(model)
    hook = model.backbone.layers[1].register_forward_pre_hook(lambda *_: logits(model) and None)
    with pytest.raises(FastpeftError, match="another thread runs this model"):
        model(IDS)
    hook.remove()
    assert logits(model).equal(expected)
