"""A finished run as what other libraries load."""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file
from samples import PROMPT, Interrupt, chats, pairs, sampled, save_tiny_decoder, scores, tagged, write_jsonl
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)

from fastpeft import FastpeftError, Prompt, PromptModel, TrainConfig, train
from fastpeft.methods.registry import METHODS
from fastpeft.mezo import Journal
from fastpeft.prompts.template import HEADS
from fastpeft.siva.export import save_as_lora
from fastpeft.training.export import export
from fastpeft.training.loading import load_run

UNMERGED = ("k-lst", "lst", "qlora", "prompt-tuning")
MERGED = [name for name in METHODS if name not in UNMERGED]


def logits(model: Any, folder: Path) -> torch.Tensor:
    """What a model says of two texts, read by the tokenizer, and through the prompt, in an exported folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["a lovely film", "the plot was very dull and tedious"]
    if (folder / "prompt.json").exists():
        batch = tokenizer.pad(Prompt.load(folder).encode(tokenizer, texts), return_tensors="pt")
    else:
        batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**batch).logits
    return found


def agree(exported: Any, run: str | Path, folder: Path) -> None:
    """An exported model says what the run's own does, to the rounding of a weight that is put together anew."""
    own = logits(load_run(run).loaded.model.cpu(), folder)
    torch.testing.assert_close(logits(exported, folder), own, rtol=1e-5, atol=1e-5)


def by_the_card(folder: Path, **names: Any) -> Any:
    """The model that the code in an exported folder's card loads."""
    card = (folder / "README.md").read_text()
    exec(card.split("```python\n")[1].split("```")[0], names)
    return names["model"]


@pytest.mark.parametrize(
    ("method", "head"), sampled(itertools.product(MERGED, [None, *HEADS]), but=("mezo", "classifier"))
)
def test_merged(config: TrainConfig, tmp_path: Path, method: str, head: str | None) -> None:
    prompt = {} if head is None else {**PROMPT, "prompt_head": head}
    train(replace(config, method=method, **prompt))
    folder = export(config.output, tmp_path / "deep" / "model")
    assert not (folder / "adapter_config.json").exists()
    loads = PromptModel if head == "label_words" else AutoModelForSequenceClassification
    model = loads.from_pretrained(folder)
    agree(model, config.output, folder)
    assert model.config.id2label == {0: "negative", 1: "positive"}
    agree(by_the_card(folder), config.output, folder)
    card = (folder / "README.md").read_text()
    assert f"# {METHODS[method].title} of {config.model}" in card
    assert "| accuracy | " in card
    assert "| steps | 3 |" in card
    assert "| max_length | " in card
    assert f"- Data: {Path(config.data).name}\n" in card, "the rest of the path is this machine's"
    assert "| accuracy of always answering " in card
    assert [path.name for path in folder.parent.iterdir()] == ["model"], "nothing else is left there"
    if head == "label_words":  # and the plain masked model that is in it
        plain = AutoModelForMaskedLM.from_pretrained(folder).state_dict()
        assert all(torch.equal(value, plain[name]) for name, value in model.masked_lm.state_dict().items())


def test_a_whole_model_keeps_its_bits(config: TrainConfig, tmp_path: Path) -> None:
    run = train(replace(config, method="mezo", **PROMPT)).folder
    folder = export(run, tmp_path / "model")
    assert (folder / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()


@pytest.mark.parametrize("method", ["full", "siva", "lst"])
def test_a_saved_chat_ends_where_its_turns_do(config: TrainConfig, tmp_path: Path, method: str) -> None:
    """Its base ends texts by another token, as those do that never chatted, and has what greedy decoding never reads,
    with which transformers saves no changed configuration."""
    model = str(save_tiny_decoder(tmp_path / "base"))
    (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.9, "top_p": 0.6}')
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = tokenizer.chat_template.replace("</s>", "<mask>")
    tokenizer.save_pretrained(model)
    data = str(write_jsonl(tmp_path / "chats.jsonl", chats(20)))
    train(replace(config, method=method, objective="causal", model=model, data=data))
    ends = [tokenizer.eos_token_id, tokenizer.mask_token_id]
    folders = [Path(config.output)] if method != "siva" else []
    folders += [export(config.output, tmp_path / "plain")] if method != "lst" else []
    for folder in folders:
        assert AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id == ends


def test_merged_through_a_chain(config: TrainConfig, tmp_path: Path) -> None:
    start: str | None = None
    for method in ("siva", "lora", "siva"):
        output = str(tmp_path / f"{method}-{start is None}")
        train(replace(config, method=method, output=output, init_from=start))
        start = output
    assert start is not None
    agree(AutoModelForSequenceClassification.from_pretrained(export(start, tmp_path / "m")), start, tmp_path / "m")


class Weights(TrainerCallback):
    """Keeps the weights after each step."""

    def __init__(self) -> None:
        self.after: dict[int, dict[str, torch.Tensor]] = {}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.on_step_end(*args, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.after[state.global_step] = {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.long(but="head")
@pytest.mark.parametrize("prompt", [{}, PROMPT], ids=["head", "words"])
def test_every_step_of_mezo_is_made_again_from_the_journal(config: TrainConfig, tmp_path: Path, prompt: Any) -> None:
    seen = Weights()
    run = train(replace(config, method="mezo", **prompt), callbacks=[seen]).folder
    assert Journal.open(run / "mezo.journal").steps == 3
    (run / "model.safetensors").unlink()  # which a replay does not need
    loads = PromptModel if prompt else AutoModelForSequenceClassification
    for step in range(4):
        folder = export(run, tmp_path / f"{step}", step=step)
        card = (folder / "README.md").read_text()
        assert f"| steps | {step} of 3 |" in card
        assert "accuracy" not in card, "no results of other weights"
        made = loads.from_pretrained(folder).state_dict()
        assert all(torch.equal(value, made[name]) for name, value in seen.after[step].items()), step
    assert not all(torch.equal(value, seen.after[2][name]) for name, value in seen.after[3].items())


def test_a_step_of_mezo_over_siva(config: TrainConfig, tmp_path: Path) -> None:
    run = train(replace(config, method="mezo", settings={"over": "siva"}, **PROMPT)).folder
    for to in ("merged", "lora"):
        for step in (None, 3, 1):
            export(run, tmp_path / f"{to}-{step}", to, step)
        kind = "adapter_model.safetensors" if to == "lora" else "model.safetensors"
        left, last, first = ((tmp_path / f"{to}-{step}" / kind).read_bytes() for step in (None, 3, 1))
        assert left == last != first


@pytest.mark.long(but="head")
@pytest.mark.parametrize("prompt", [{}, PROMPT], ids=["head", "words"])
def test_siva_to_lora(config: TrainConfig, tmp_path: Path, place: Path, prompt: Any) -> None:
    run = train(replace(config, method="siva", rank=2, **prompt)).folder
    folder = export(run, tmp_path / "lora", "lora")
    if prompt:
        masked_lm = AutoModelForMaskedLM.from_pretrained(place / "model")
        base: Any = PromptModel(masked_lm, AutoTokenizer.from_pretrained(folder), Prompt.load(folder))
    else:
        base = AutoModelForSequenceClassification.from_pretrained(place / "model")
    model = PeftModel.from_pretrained(base, folder)
    assert model.active_peft_config.peft_type == "LORA"
    assert model.active_peft_config.r == model.active_peft_config.lora_alpha == 4
    agree(model, run, folder)
    agree(by_the_card(folder), run, folder)
    assert "registers" not in (folder / "README.md").read_text(), "it needs PEFT alone"


def test_a_lora_leaves_the_base_in_bfloat16(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(replace(config, method="siva", rank=2, dtype="bfloat16")).folder
    monkeypatch.setattr(PeftModel, "float", lambda _: pytest.fail("the base was converted whole"), raising=False)
    export(run, tmp_path / "lora", "lora")
    monkeypatch.undo()
    model = load_run(run).loaded.model
    save_as_lora(model.float(), tmp_path / "float32")
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "float32"))
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in found)


def test_a_lora_of_a_chain_says_what_it_goes_onto(
    config: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(replace(config, method="lora"))
    second = train(replace(config, method="siva", init_from=config.output, output=str(tmp_path / "second"))).folder
    with caplog.at_level(logging.INFO, "fastpeft"):
        folder = export(second, tmp_path / "lora", "lora")
    assert f"onto the model of the run in {config.output}" in caplog.text
    base = AutoModelForSequenceClassification.from_pretrained(export(config.output, tmp_path / "base"))
    agree(PeftModel.from_pretrained(base, folder), second, folder)
    agree(by_the_card(folder, base=base), second, folder)
    assert f"base: 'the model of the run in {config.output}, exported" in (folder / "README.md").read_text()
    with pytest.raises((OSError, ValueError), match="the model of the run in"):  # not onto what the chain began with
        AutoPeftModelForSequenceClassification.from_pretrained(folder)


def onnx_logits(folder: Path) -> torch.Tensor:
    """What the code in an exported folder's card computes."""
    names: dict[str, Any] = {}
    exec((folder / "README.md").read_text().split("```python\n")[1].split("```")[0], names)
    return torch.from_numpy(names["logits"])


@pytest.mark.long(but="full on numbers")
@pytest.mark.parametrize(
    ("method", "data"),
    [("full", scores), ("siva", pairs), ("k-lst", tagged)],
    ids=["full on numbers", "SiVA on pairs", "k-LST on tags"],
)
def test_onnx(config: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, method: str, data: Any) -> None:
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    train(replace(config, method=method, data=str(write_jsonl(tmp_path / "rows.jsonl", data(40)))))
    with caplog.at_level(logging.INFO, "fastpeft"):
        folder = export(config.output, tmp_path / "deep" / "onnx", "onnx")
    assert "ONNX Runtime agrees with PyTorch on 3 texts" in caplog.text
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.onnx",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    run = load_run(config.output)
    assert AutoConfig.from_pretrained(folder).id2label == dict(enumerate(run.labels))
    text: Any = [["A", "warm", "film"]] if run.problem.per_token else ["A warm film."]
    given = (text, ["Two friends meet."]) if run.is_pair else (text,)
    batch = run.loaded.tokenizer(*given, is_split_into_words=run.problem.per_token, return_tensors="pt")
    with torch.no_grad():
        expected = run.loaded.model.cpu()(**batch).logits
    torch.testing.assert_close(onnx_logits(folder), expected, rtol=1e-5, atol=1e-5)


def test_what_has_no_onnx_form(config: TrainConfig, tmp_path: Path) -> None:
    runs = {
        "has a prompt; exported to onnx are runs that learned labels": {"method": "lora", **PROMPT},
        "learned masked tokens; exported to onnx are runs": {"objective": "mlm"},
    }
    for number, (message, changes) in enumerate(runs.items()):
        run = train(replace(config, output=str(tmp_path / f"{number}"), **changes)).folder
        with pytest.raises(FastpeftError, match=message):
            export(run, tmp_path / "onnx", "onnx")
    load_run(tmp_path / "0").loaded.model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(FastpeftError, match="holds an adapter alone, and only a run is exported to onnx"):
        export(tmp_path / "adapter", tmp_path / "onnx", "onnx")
    assert not (tmp_path / "onnx").exists()


def test_a_failed_write_leaves_nothing(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(replace(config, method="lora"))
    before = sorted(tmp_path.rglob("*"))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastpeft.support.files.publish", full)
    with pytest.raises(FastpeftError, match="No space left on device"):
        export(config.output, tmp_path / "model")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_journal_that_begins_late_is_told(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, method="mezo", save_steps=1)
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[Interrupt(2)])
    (Path(config.output) / "mezo.journal").unlink()
    train(config, resume=True)
    with pytest.raises(FastpeftError, match="begins after step 1, and the weights it began with"):
        export(config.output, tmp_path / "model", step=2)
