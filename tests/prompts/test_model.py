"""A masked model as a classifier: its logits, its training, its files, alone and with adapters."""

from __future__ import annotations

import copy
import csv
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from samples import for_one_row, pickle_adapter
from tokenizers_for_prompts import make_tokenizer
from torch import Tensor, nn
from trainers import quiet
from transformers import AutoModelForMaskedLM, Trainer

from fastpeft import FastpeftError, Prompt, PromptCollator, PromptModel, SivaConfig
from fastpeft.models import resolve_model
from fastpeft.prompts.named import get_prompt
from fastpeft.training.memory import simulate_training_step

SST2 = Path(__file__).parents[3] / "shared" / "data" / "sst2"
PROMPT = Prompt("{text} it was <mask>.", {"negative": "terrible", "positive": "great"})
TEXTS = ["a dull film", "the plot is very long and lovely", "", "this is a good story, and long"]
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
SHAPES: dict[str, dict[str, Any]] = {
    "Roberta": {"type_vocab_size": 1},
    "Bert": {},
    "DistilBert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    "Electra": {"embedding_size": 16},
    "Albert": {"embedding_size": 16},
    "DebertaV2": {"legacy": False},
    "ModernBert": {"global_attn_every_n_layers": 2},
}


def tokenizer_of(kind: str) -> Any:
    return make_tokenizer("unigram" if kind == "Roberta" else "word-piece")


def masked_lm(kind: str = "Roberta") -> Any:
    """A randomly initialised model of two layers, the same at every call."""
    tokenizer = tokenizer_of(kind)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=66,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep")},
        **SHAPES[kind],
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForMaskedLM")(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # initial weights are too small to tell texts apart
    return model.eval()


def prompted(kind: str = "Roberta", **settings: Any) -> PromptModel:
    return PromptModel(masked_lm(kind), tokenizer_of(kind), PROMPT, **settings).eval()


def adapter_inside(model: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False))


def batch(kind: str = "Roberta", labels: bool = True) -> Any:
    rows = PROMPT.encode(tokenizer_of(kind), TEXTS, labels=[0, 1, 0, 1] if labels else None)
    return PromptCollator(tokenizer_of(kind))(rows)


def logits(model: nn.Module, **changes: Any) -> Tensor:
    with torch.no_grad():
        return model(**{**batch(), **changes}).logits


# -- what it computes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHAPES)
def test_logits_are_the_words_at_the_mask(kind: str) -> None:
    model, inputs = prompted(kind), batch(kind)
    output = model(**inputs)
    plain = {name: inputs[name] for name in inputs if name not in ("labels", "mask_positions")}
    full = model.masked_lm(**plain).logits
    words = tokenizer_of(kind).convert_tokens_to_ids(
        ["▁terrible", "▁great"] if kind == "Roberta" else ["terrible", "great"]
    )
    expected = torch.stack([full[row, inputs["mask_positions"][row], words] for row in range(len(TEXTS))])
    torch.testing.assert_close(output.logits, expected, **CLOSE)
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(expected, inputs["labels"]), **CLOSE)


def test_only_the_masks_reach_the_head() -> None:
    model = prompted()
    shapes = []
    model.masked_lm.lm_head.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    logits(model)
    with torch.no_grad():
        model.masked_lm(batch()["input_ids"])
    vocabulary = len(tokenizer_of("Roberta"))
    assert shapes == [(4, 1, vocabulary), (*batch()["input_ids"].shape, vocabulary)]


@pytest.mark.parametrize("kind", SHAPES)
def test_the_head_is_one_dense_layer_and_one_norm(kind: str) -> None:
    model = prompted(kind)
    layers = [model.get_submodule(name) for name in model.head_modules]
    assert {type(layer) for layer in layers} == {nn.Linear, nn.LayerNorm}
    assert [layer.weight.shape[0] for layer in layers] == [16, 16]


def test_a_model_that_hides_its_encoder_is_read_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prompted()
    expected = logits(model)
    monkeypatch.setattr(type(model.masked_lm), "base_model_prefix", "")
    torch.testing.assert_close(logits(model), expected, **CLOSE)


def test_vectors_before_the_words_move_the_masks() -> None:
    config = peft.PromptTuningConfig(num_virtual_tokens=5, task_type="FEATURE_EXTRACTION")
    model = PromptModel(peft.get_peft_model(masked_lm(), config), tokenizer_of("Roberta"), PROMPT).eval()
    inputs = batch(labels=False)
    masks = inputs.pop("mask_positions") + 5
    full = model.masked_lm(**inputs).logits[range(len(TEXTS)), masks][:, model.label_ids]
    torch.testing.assert_close(logits(model), full, **CLOSE)


def test_masks_are_found_where_their_positions_are_not_given() -> None:
    model = prompted()
    torch.testing.assert_close(logits(model, mask_positions=None), logits(model), rtol=0, atol=0)
    without = batch()["input_ids"].masked_fill(batch()["input_ids"] == model.tokenizer.mask_token_id, 0)
    with pytest.raises(FastpeftError, match="no mask token or several"):
        logits(model, input_ids=without, mask_positions=None)
    embeddings = model.get_input_embeddings()(batch()["input_ids"])
    with pytest.raises(FastpeftError, match="give mask_positions too"):
        logits(model, input_ids=None, inputs_embeds=embeddings, mask_positions=None)


def test_outputs_that_transformers_models_have() -> None:
    model = prompted()
    loss, found = model(**batch(), return_dict=False)
    assert (loss.shape, found.shape) == ((), (4, 2))
    states = model(**batch(), output_hidden_states=True).hidden_states
    assert [state.shape for state in states] == [(*batch()["input_ids"].shape, 16)] * 3
    assert model.config.id2label == {0: "negative", 1: "positive"}
    assert model.masked_lm.config.id2label != model.config.id2label, "the model given is left as it was"
    assert model.half()(**batch()).logits.dtype is torch.float32


def test_gradients_are_those_of_the_full_logits() -> None:
    model, inputs = prompted(), batch()
    model(**inputs).loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.masked_lm.named_parameters()}
    model.zero_grad()
    full = model.masked_lm(inputs["input_ids"], inputs["attention_mask"]).logits
    picked = full[torch.arange(4), inputs["mask_positions"]][:, model.label_ids]
    nn.functional.cross_entropy(picked, inputs["labels"]).backward()
    for name, parameter in model.masked_lm.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, **CLOSE)


@pytest.mark.parametrize("kind", ["Roberta", "Bert"])
@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: Beside(model), adapter_inside])
def test_the_vocabulary_grows(kind: str, wrap: Any) -> None:
    model = PromptModel(wrap(masked_lm(kind)), tokenizer_of(kind), PROMPT).eval()
    words, trains = model.config.vocab_size, model.get_input_embeddings().weight.requires_grad
    with torch.no_grad():
        before = model(**batch(kind)).logits
        resized = model.resize_token_embeddings(words + 5, mean_resizing=False)
        assert resized is model.get_input_embeddings()
        assert model.config.vocab_size == model.core.config.vocab_size == words + 5
        assert len(model.get_output_embeddings().weight) == words + 5
        torch.testing.assert_close(model(**batch(kind)).logits, before, **CLOSE)
    assert resized.weight.requires_grad is trains


def test_predicted_logits_keep_the_order_of_texts() -> None:
    model = prompted().train()
    found = model.predict_logits(TEXTS, batch_size=3)
    with pytest.raises(FastpeftError, match="batch_size is -1"):
        model.predict_logits(TEXTS, batch_size=-1)
    assert model.training
    torch.testing.assert_close(found, logits(model.eval()), **CLOSE)
    pair = Prompt("{a}? <mask>, {b}", ["no", "yes"])
    assert PromptModel(masked_lm(), model.tokenizer, pair).predict_logits([("a", "film"), ("", "")]).shape == (2, 2)


def test_where_memory_is_not_enough_fewer_texts_are_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prompted()
    expected = model.predict_logits(TEXTS)
    monkeypatch.setattr(model, "forward", for_one_row(model.forward))
    torch.testing.assert_close(model.predict_logits(TEXTS), expected, **CLOSE)


def test_calibration_makes_an_empty_text_undecided() -> None:
    model = prompted()
    before, empty = model.predict_logits(TEXTS), model.predict_logits([""]).log_softmax(-1)
    model.calibrate()
    torch.testing.assert_close(model.predict_logits(TEXTS), before - empty, **CLOSE)
    torch.testing.assert_close(model.predict_logits([""]).softmax(-1), torch.full((1, 2), 0.5), **CLOSE)
    torch.testing.assert_close(model.calibrate().predict_logits(TEXTS), prompted(calibrate=True).predict_logits(TEXTS))
    kept = model.calibration.clone()
    assert model.bfloat16().calibration.equal(kept)


def test_memory_of_a_step_can_be_simulated() -> None:
    inputs = batch()
    assert simulate_training_step(prompted(), dict(inputs)).peak > 0


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [False, True])
def test_asking_for_logits_leaves_each_module_in_its_mode(mode: bool) -> None:
    model = masked_lm().train(mode)
    model.roberta.embeddings.eval()
    before = {module: module.training for module in model.modules()}
    prompted = PromptModel(model, tokenizer_of("Roberta"), PROMPT, calibrate=True)
    prompted.predict_logits(TEXTS)
    assert prompted.training is mode
    assert {module: module.training for module in model.modules()} == before


@pytest.mark.parametrize("calibrate", [False, True])
def test_round_trip(tmp_path: Path, calibrate: bool) -> None:
    model = prompted(calibrate=calibrate)
    model.save_pretrained(tmp_path)
    loaded = PromptModel.from_pretrained(tmp_path)
    assert loaded.prompt == PROMPT
    assert torch.equal(logits(loaded), logits(model))
    plain = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(plain(batch()["input_ids"]).logits, model.masked_lm(batch()["input_ids"]).logits)


def test_a_state_dict_keeps_the_calibration(tmp_path: Path) -> None:
    """Loaded without it, a model would answer otherwise; and files of the plain model do not get it."""
    model = prompted(calibrate=True)
    loaded = prompted()
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(logits(loaded), logits(model))
    loaded.load_state_dict(loaded.masked_lm.state_dict())
    assert torch.equal(logits(loaded), logits(model)), "one without it, as a plain model's, leaves it"
    loaded.read_tokens([5, 6, 7]).load_state_dict(model.state_dict())
    assert not loaded.calibration.any(), "that of two words is not of three"
    around = nn.Sequential(prompted())
    around.load_state_dict(nn.Sequential(model).state_dict())
    assert torch.equal(logits(around[0]), logits(model))
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "calibration" not in " ".join(file.keys())
    assert torch.equal(logits(PromptModel.from_pretrained(tmp_path)), logits(model))


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    masked_lm().save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"prompt\.json"):
        PromptModel.from_pretrained(tmp_path)
    prompted().save_pretrained(tmp_path)
    with pytest.raises(FastpeftError, match="got a masked_lm and dtype, nonsense, which are for loading one"):
        PromptModel.from_pretrained(tmp_path, masked_lm=masked_lm(), dtype=torch.bfloat16, nonsense=3)
    (tmp_path / "prompt.json").write_text('{"template": "{text}"}')
    with pytest.raises(FastpeftError, match="is no prompt"):
        PromptModel.from_pretrained(tmp_path, masked_lm=masked_lm())


@pytest.mark.parametrize("subfolder", ["", "inside"])
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapter"])
def test_all_files_are_of_the_revision(tmp_path: Path, adapted: bool, subfolder: str) -> None:
    """In a cache of the hub, whose later revision has other weights and the label words exchanged."""
    masked_lm().save_pretrained(tmp_path / "base")
    repository = tmp_path / "models--someone--something"
    (repository / "refs").mkdir(parents=True)
    names = {"a" * 40: "v1", "b" * 40: "main"}
    prompts = (PROMPT, Prompt(PROMPT.template, {"negative": "great", "positive": "terrible"}))
    for (commit, name), prompt in zip(names.items(), prompts):
        (repository / "refs" / name).write_text(commit)
        base = AutoModelForMaskedLM.from_pretrained(tmp_path / "base")
        if adapted:
            base = peft.get_peft_model(base, peft.LoraConfig(r=2, init_lora_weights=False))
        elif name == "main":
            base.lm_head.bias.data += torch.arange(len(base.lm_head.bias))
        model = PromptModel(base, tokenizer_of("Roberta"), prompt).eval()
        model.save_pretrained(repository / "snapshots" / commit / subfolder)
        if adapted:  # the hub has said that there is none
            (repository / ".no_exist" / commit / subfolder).mkdir(parents=True)
            (repository / ".no_exist" / commit / subfolder / "config.json").touch()
    for commit, name in names.items():
        there = {"cache_dir": tmp_path, "revision": name, "subfolder": subfolder, "local_files_only": True}
        loaded = PromptModel.from_pretrained("someone/something", **there, dtype="float32")
        expected = PromptModel.from_pretrained(repository / "snapshots" / commit / subfolder)
        assert loaded.prompt == expected.prompt
        assert loaded.tokenizer.get_vocab() == expected.tokenizer.get_vocab()
        assert torch.equal(logits(loaded), logits(expected))
    local = PromptModel.from_pretrained(repository / "snapshots" / commit, subfolder=subfolder)
    assert torch.equal(logits(local), logits(expected))


def test_models_that_cannot_be_prompted() -> None:
    tokenizer = tokenizer_of("Roberta")
    classifier = transformers.RobertaForSequenceClassification(masked_lm().config)
    encoder = transformers.RobertaForCausalLM(masked_lm().config)  # which reads both ways
    for model in (classifier, encoder):
        with pytest.raises(FastpeftError, match=f"{type(model).__name__} has no LM head"):
            PromptModel(model, tokenizer, PROMPT)
    shape = {"vocab_size": 50, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    bart = transformers.BartForConditionalGeneration(transformers.BartConfig(**shape))
    with pytest.raises(FastpeftError, match="BartForConditionalGeneration has an encoder and a decoder"):
        PromptModel(bart, tokenizer, PROMPT)
    with pytest.raises(FastpeftError, match="needs no PromptModel"):
        PromptModel(masked_lm(), tokenizer, Prompt("{text}", head="classifier"))
    with pytest.raises(FastpeftError, match=r"Give a fastpeft\.Prompt"):
        PromptModel(masked_lm(), tokenizer, "{text} It was <mask>.")  # type: ignore[arg-type]
    with pytest.raises(FastpeftError, match="Compile what is around it"):
        PromptModel(torch.compile(masked_lm()), tokenizer, PROMPT)  # type: ignore[arg-type]
    unmasked = copy.deepcopy(tokenizer)  # which others share
    unmasked.mask_token = None
    with pytest.raises(
        FastpeftError, match="RobertaForMaskedLM fills masks, and its tokenizer has the mask token None"
    ):
        PromptModel(masked_lm(), unmasked, PROMPT)


# -- training ----------------------------------------------------------------------------------------------------------


def trainer(model: Any, folder: Path, **arguments: Any) -> Trainer:
    texts = ["a lovely film", "a dull story"] * 8
    rows = PROMPT.encode(tokenizer_of("Roberta"), texts, labels=[1, 0] * 8)
    usual = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_steps": 80, "save_steps": 40, "seed": 3}
    return Trainer(
        model,
        quiet(folder, **{**usual, **arguments}),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=PromptCollator(tokenizer_of("Roberta")),
        compute_metrics=lambda guess: {"accuracy": float((guess.predictions.argmax(-1) == guess.label_ids).mean())},
    )


def adapted(**settings: Any) -> Any:
    return peft.get_peft_model(prompted(), SivaConfig(r=4, target_modules="all-linear", scaling="plain", **settings))


def test_a_label_word_that_the_model_does_not_have_is_refused() -> None:
    tokenizer = copy.deepcopy(tokenizer_of("Roberta"))
    model = masked_lm()
    words = [f"word{number}" for number in range(model.config.vocab_size)]
    tokenizer.add_tokens(words)
    with pytest.raises(FastpeftError, match=r"a label word is a token .* resize_token_embeddings"):
        PromptModel(model, tokenizer, Prompt("{text} <mask>", [words[-1], "film"]))


@pytest.mark.parametrize("config", [SivaConfig(r=2), peft.LoraConfig(r=2, init_lora_weights=False)], ids=type)
def test_an_adapter_around_a_prompted_model_is_not_loaded_as_one_inside(tmp_path: Path, config: Any) -> None:
    """PEFT would find none of its weights there, and the untrained model would answer."""
    trained = peft.get_peft_model(prompted(), config).eval()
    trained.save_pretrained(tmp_path)
    PROMPT.save(tmp_path)
    trained.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(FastpeftError, match=r"around a PromptModel, not inside it. Load it by PeftModel"):
        PromptModel.from_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(PromptModel(masked_lm(), trained.tokenizer, Prompt.load(tmp_path)), tmp_path)
    assert again.eval().predict_logits(TEXTS).equal(trained.predict_logits(TEXTS))


@pytest.mark.long(but="prompted")
@pytest.mark.parametrize("make", [prompted, adapted])
def test_trains_resumes_and_keeps_the_best(tmp_path: Path, make: Any) -> None:
    whole = trainer(make(), tmp_path / "whole")
    before = whole.evaluate()["eval_loss"]
    whole.train()
    assert whole.evaluate()["eval_loss"] < before / 2
    resumed = trainer(make(), tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-40"))
    assert torch.equal(logits(resumed.model.eval()), logits(whole.model.eval()))
    choice = {"eval_strategy": "steps", "eval_steps": 40, "load_best_model_at_end": True}
    # the greatest loss as the best makes the first checkpoint win
    best = trainer(make(), tmp_path / "best", **choice, metric_for_best_model="eval_loss", greater_is_better=True)
    best.train()
    losses = [entry["eval_loss"] for entry in best.state.log_history if "eval_loss" in entry]
    assert losses[0] > losses[1]
    assert best.evaluate()["eval_loss"] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.long(but="SEQ_CLS")
@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_an_adapter_around_it_is_saved_and_loaded(tmp_path: Path, task_type: str | None) -> None:
    run = trainer(adapted(task_type=task_type), tmp_path / "run")
    run.train()
    run.model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(prompted(), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded), logits(run.model.eval()), **CLOSE)
    assert not torch.allclose(logits(loaded), logits(prompted()), **CLOSE)


@pytest.mark.long(but="lora")
@pytest.mark.parametrize(
    "config", [SivaConfig(r=2), peft.LoraConfig(r=2, init_lora_weights=False)], ids=["siva", "lora"]
)
def test_an_adapter_inside_it_is_saved_and_loaded(tmp_path: Path, config: Any) -> None:
    masked_lm().save_pretrained(tmp_path / "base")
    base = AutoModelForMaskedLM.from_pretrained(tmp_path / "base")
    model = PromptModel(peft.get_peft_model(base, config), tokenizer_of("Roberta"), PROMPT)
    shapes = []
    base.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape[1]))
    trainer(model, tmp_path / "run", save_strategy="no").train()
    assert set(shapes) == {1}, "only the masks reach the head"
    model.eval().save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    loaded = PromptModel.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(model), **CLOSE)
    assert not torch.allclose(logits(loaded), logits(prompted()), **CLOSE)
    plain = peft.PeftModel.from_pretrained(
        AutoModelForMaskedLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    again = PromptModel(plain, tokenizer_of("Roberta"), PROMPT)
    torch.testing.assert_close(logits(again.eval()), logits(model), **CLOSE)
    pickle_adapter(tmp_path / "adapter")
    with pytest.raises(FastpeftError, match="no other format is read"):
        PromptModel.from_pretrained(tmp_path / "adapter")


class Beside(nn.Module):
    """A wrapper as a side network's is: it runs the model in it, and saves itself."""

    _keys_to_ignore_on_save = ("frozen",)

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base_model, self.config = base, base.config

    def forward(self, **inputs: Any) -> Any:
        return self.base_model(**inputs)

    def save_pretrained(self, folder: Path) -> None:
        torch.save(self.state_dict(), folder / "beside.pt")


def test_a_wrapped_model_is_prompted_saved_and_put_back(tmp_path: Path) -> None:
    model = PromptModel(Beside(masked_lm()), tokenizer_of("Roberta"), PROMPT, calibrate=True).eval()
    assert model._keys_to_ignore_on_save == {"masked_lm.frozen"}, "the Trainer misses no others"
    assert torch.equal(logits(model), logits(prompted(calibrate=True)))
    model.save_pretrained(tmp_path)
    again = PromptModel.from_pretrained(tmp_path, masked_lm=Beside(masked_lm()))
    assert torch.equal(logits(again), logits(model))
    model.load_state_dict(torch.load(tmp_path / "beside.pt"), strict=True)


def test_gradient_checkpointing_changes_nothing() -> None:
    plain, saving = prompted().train(), prompted().train()
    saving.gradient_checkpointing_enable()
    for model in (plain, saving):
        torch.manual_seed(0)
        model(**batch()).loss.backward()
    for one, other in zip(plain.parameters(), saving.parameters()):
        torch.testing.assert_close(one.grad, other.grad, **CLOSE)


# -- the bundled model -------------------------------------------------------------------------------------------------


def demo() -> tuple[Any, Any]:
    source = resolve_model("demo")
    return AutoModelForMaskedLM.from_pretrained(source, dtype=torch.float32), make_tokenizer("byte-level")


def test_the_bundled_model_knows_good_from_bad() -> None:
    prompt = Prompt("{text} It was <mask>.", {0: "terrible", 1: "great"})
    model = PromptModel(*demo(), prompt, calibrate=True)
    found = model.predict_logits(["A warm, funny and beautifully acted film.", "Dull, clumsy and far too long."])
    assert found.argmax(-1).tolist() == [1, 0]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(not SST2.is_dir(), reason="the SST-2 folder is not beside this repository")
def test_zero_shot_figures_of_the_bundled_model() -> None:
    """What demo/README.md states; a few of 872 sentences may fall the other way on other machines."""
    from sklearn.metrics import roc_auc_score

    with open(SST2 / "dev.tsv", encoding="utf-8", newline="") as file:
        texts, labels = zip(*list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:])
    truth = torch.tensor([int(label) for label in labels])
    model = PromptModel(*demo(), get_prompt("SST-2"))
    plain = model.predict_logits(texts)
    assert roc_auc_score(truth, plain[:, 1] - plain[:, 0]) == pytest.approx(0.824, abs=0.001)
    for found, accuracy in ((plain, 0.526), (plain - model.calibrate().calibration, 0.690)):
        assert (found.argmax(-1) == truth).float().mean().item() == pytest.approx(accuracy, abs=0.003)
