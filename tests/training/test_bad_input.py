"""Whatever is wrong in what a person gives: one message, exit code 2, no traceback, nothing written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from samples import pairs, reviews, save_finished_run, save_tiny_model, snapshot, tagged, write_csv, write_jsonl
from transformers import AutoModelForMaskedLM, TrainerCallback
from typer.testing import CliRunner
from unprivileged import bound_by_modes

from fastpeft import FastpeftError, TrainConfig, compare, train
from fastpeft.cli import app
from fastpeft.training.estimates import plan


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, good data, a finished run, and one file for everything that can be broken."""
    place = tmp_path_factory.mktemp("place")
    model, data = save_finished_run(place)
    (place / "unfinished").mkdir()
    (place / "unfinished" / "run.json").write_bytes((place / "run" / "run.json").read_bytes())
    (place / "foreign").mkdir()
    (place / "foreign" / "letter.txt").write_text("dear friend")
    write_csv(place / "one-class.csv", [("a", "yes"), ("b", "yes")])
    write_csv(place / "one-number.csv", [("a", "2.5"), ("b", "2.5")])
    write_csv(place / "one-row.csv", [("a", "yes")])
    write_csv(place / "no-class.csv", [("a", "yes"), ("b", "")])
    write_csv(place / "measures.csv", [("a", "0.25"), ("b", "0.5")])
    write_csv(place / "identities.csv", [(f"text {i}", f"id{i}") for i in range(50)])
    write_csv(place / "twice.csv", [("a", "b", "yes"), ("c", "d", "no")], ("text", "text", "label"))
    write_csv(place / "new-class.csv", [("a", "negative"), ("b", "neutral")])
    (place / "no-text.json").write_text('{"output": "new", "data": 5}')
    (place / "no-settings.json").write_text('{"settings": null}')
    (place / "ragged.csv").write_text("text,label\na,yes\nb,no,perhaps\n")
    (place / "quote.csv").write_text('text,label\n"a,yes\nb,no\n')
    (place / "nul.csv").write_bytes(b"text,label\na\0b,yes\nc,no\n")
    (place / "latin.csv").write_bytes("text,label\nna\xefve,yes\nc,no\n".encode("latin-1"))
    (place / "utf16.csv").write_text("text,label\na,yes\nb,no\n", encoding="utf-16")
    (place / "utf16-unmarked.csv").write_text("text,label\na,yes\nb,no\n", encoding="utf-16-le")
    (place / "half.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "\\ud800", "label": 0}\n')
    (place / "deep.jsonl").write_text("[" * 100_000)
    write_csv(place / "vast-number.csv", [("a", "1" * 400), ("b", "2")])
    (place / "array.jsonl").write_text('[\n {"text": "a", "label": 1}\n]\n')
    write_csv(place / "texts.csv", [("a",), ("b",)], ("text",))
    (place / "list.jsonl").write_text("[1, 2]\n")
    (place / "number.jsonl").write_text('{"text": 5, "label": 1}\n{"text": "b", "label": 0}\n')
    (place / "nan.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b", "label": NaN}\n')
    (place / "broken.parquet").write_bytes(b"PAR1 but not really")
    (place / "data.xlsx").write_bytes(b"")
    write_jsonl(place / "pairs.jsonl", pairs(40))
    write_jsonl(place / "tagged.jsonl", tagged(40))
    write_csv(place / "alike.csv", [("a", "same"), ("b", "different")])
    for run, rows in (("pair-run", "pairs.jsonl"), ("tag-run", "tagged.jsonl")):
        train(TrainConfig(output=str(place / run), method="lora", model=model, data=str(place / rows), max_steps=1))
    good = {"tokens": ["a", "b"], "ner_tags": ["O", "X"]}
    write_jsonl(place / "short-tags.jsonl", [good, {"tokens": ["a", "b"], "ner_tags": ["O"]}])
    write_jsonl(place / "no-word.jsonl", [{"tokens": ["a", " "], "ner_tags": ["O", "X"]}])
    write_jsonl(place / "spans.jsonl", [{"text": "a b", "label": [[0, 1, "X"]]}])
    write_jsonl(place / "no-tag.jsonl", [{"tokens": ["a", "b"], "ner_tags": ["O", None]}])
    (place / "broken-set").mkdir()
    (place / "broken-set" / "dataset_dict.json").write_text("{")
    (place / "pairs-and-texts").mkdir()
    write_jsonl(place / "pairs-and-texts" / "train.jsonl", pairs(8))
    write_jsonl(place / "pairs-and-texts" / "dev.jsonl", [{"text": "a", "label": "same"}])
    (place / "no-train").mkdir()
    (place / "two-trains").mkdir()
    for name in ("train.csv", "train.tsv"):
        write_csv(place / "two-trains" / name, reviews(4))
    (place / "dev-class").mkdir()
    write_csv(place / "dev-class" / "train.csv", reviews(8))
    write_csv(place / "dev-class" / "dev.csv", [("a", "neutral")])
    (place / "not-a-model").mkdir()
    (place / "cut-model").mkdir()
    for file in (place / "model").iterdir():
        content = file.read_bytes()
        (place / "cut-model" / file.name).write_bytes(content[:1000] if file.suffix == ".safetensors" else content)
    (place / "cut-run").mkdir()
    for file in (place / "run").iterdir():
        content = file.read_bytes()
        (place / "cut-run" / file.name).write_bytes(content[:500] if file.suffix == ".safetensors" else content)
    (place / "broken.json").write_text("{")
    (place / "wrong-type.json").write_text(json.dumps({"output": "out", "batch_size": "many"}))
    (place / "blank.txt").write_text("\n \n")
    (place / "good.xlsx").write_text("x")
    (place / "two-columns.csv").write_text("this,that\na film,a plot\n")
    (place / "taken.csv").write_text("class\na film\n")
    (place / "train-only").mkdir()
    write_csv(place / "train-only" / "train.csv", reviews(8))
    (place / "empty-metrics").mkdir()
    (place / "empty-metrics" / "run.json").write_bytes((place / "run" / "run.json").read_bytes())
    (place / "empty-metrics" / "metrics.json").write_text("{}")
    save_tiny_model(place / "other-shape")
    config = json.loads((place / "other-shape" / "config.json").read_text())
    (place / "other-shape" / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 3}))
    save_tiny_model(place / "too-few-layers")
    (place / "too-few-layers" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    save_tiny_model(place / "causal", "GPT2", "LMHeadModel")
    save_tiny_model(place / "classifier", head="ForSequenceClassification")
    save_tiny_model(place / "seq2seq", "Bart", "ForSequenceClassification")
    save_tiny_model(place / "changing")
    runs: dict[str, dict[str, Any]] = {
        "whole": {"method": "full"},
        "side": {"method": "k-lst", "window": 3},
        "link": {"method": "lora", "init_from": str(place / "whole")},
        "siva-of-another": {"method": "siva", "model": str(place / "changing")},
        "side-of-another": {"method": "k-lst", "model": str(place / "changing")},
        "lossy": {"method": "siva", "settings": {"d": 9}},
        "mezo": {"method": "mezo"},
        "mezo-of-another": {"method": "mezo", "model": str(place / "changing")},
    }
    for name, values in runs.items():
        train(TrainConfig(output=str(place / name), **{"model": model, "data": data, "max_steps": 1, **values}))
    for name in ("no-journal", "bad-journal"):
        shutil.copytree(place / "mezo", place / name)
        (place / name / "mezo.journal").unlink()
    (place / "bad-journal" / "mezo.journal").write_bytes(b"dear diary")
    shutil.copytree(place / "bad-journal", place / "bad-resume")
    (place / "bad-resume" / "metrics.json").unlink()
    other = AutoModelForMaskedLM.from_pretrained(place / "changing")
    for parameter in other.parameters():
        parameter.data += 0.1
    other.save_pretrained(place / "changing")
    return place


TRAIN = ("train", "--method", "lora", "--model", "model", "--data", "good.csv", "--output", "new")
WORDS = ("--label-words", "awful,lovely")
PROMPT = ("--prompt", "{text} the film is <mask>", *WORDS)

# arguments (after TRAIN where they begin with an option), and parts of the message
CASES = [
    # methods and models
    (["--method", "sivva"], ["'sivva'", "siva, k-lst, lst, full"]),
    (["--method", "k-lst", "--window", "17"], ["window_size=17", "at most 15"]),
    (["--method", "k-lst", "--reduction", "3"], ["reduction_factor=3 does not divide", "1, 2, 4, 8, 16"]),
    (["--method", "k-lst", "--set", "window_size=3"], ["window_size cannot be set", "use --window"]),
    (["--method", "k-lst", "--set", "fusion=gated"], ["fusion='gated'", "window_size=1"]),
    (["--method", "k-lst", "--rank", "2"], ["--rank is of SiVA", "siva_layers says in how many", "leave --rank out"]),
    (["--method", "lst", "--targets", "all-linear"], ["--targets is of SiVA", "leave --targets out"]),
    (
        ["--method", "lst", "--set", "siva_layers=1", "--targets", ".*query"],
        ["--targets is '.*query' beside siva_layers", "names joined by commas, or all-linear"],
    ),
    (
        ["--method", "lst", "--set", "siva_layers=1", "--targets", "bread"],
        ["target_modules=['bread'] matches no linear layer", "dense, key, query, value"],
    ),
    (["--method", "k-lst", "--model", "seq2seq"], ["feature_modules"]),
    ([*PROMPT, "--set", "trainable_token_indices=[5]"], ["the weight of these tokens and a bias", "PEFT would leave"]),
    (["--method", "lst", "--window", "3"], ["'lst' takes no --window", "reduction"]),
    (["--window", "3"], ["'lora' takes no --window", "targets, rank"]),
    (["--method", "lst", "--cache-features", "good.csv"], ["cannot keep features in", "good.csv"]),
    (["--method", "lst", "--cache-features", "kept", "--objective", "mlm"], ["other words in every epoch"]),
    (
        ["--method", "lst", "--cache-features", "kept", "--set", "siva_layers=1"],
        ["siva_layers", "change at every step"],
    ),
    (["--method", "lst", "--set", "siva_layers=1", "--set", "feature_modules=x"], ["siva_layers counts", "Leave out"]),
    (["--method", "last-n", "--set", "layers=99"], ["layers is 99"]),
    (["--method", "last-n", "--set", "layers=two"], ["layers is 'two'"]),
    (["--model", "./nowhere"], ["'./nowhere'", "demo"]),
    (["--model", "no-such-model"], ["'no-such-model'", "hub id"]),
    (["--model", "good.csv"], ["'good.csv'", "config.json"]),
    (["--model", "not-a-model"], ["'not-a-model'"]),
    (["--model", "cut-model"], ["'cut-model'"]),
    (["--model", "run"], ["'run' holds an adapter", "merge_and_unload"]),
    (["--model", "side"], ["'side' holds a side network", "--init-from"]),
    (["--model", "side", *PROMPT], ["'side' holds a side network", "--init-from"]),
    (["--model", "other-shape"], ["word_embeddings.weight has another shape than config.json"]),
    (["--model", "too-few-layers"], ["roberta.encoder.layer.2.", "is missing"]),
    # data
    (["--data", "data.xlsx"], ["data.xlsx", "csv, tsv, jsonl, parquet"]),
    (["--data", "no-train"], ["'no-train'", "train.*"]),
    (["--data", "two-trains"], ["train.csv, train.tsv"]),
    (["--data", "ragged.csv"], ["row 2 of ragged.csv", "3 fields"]),
    (["--data", "quote.csv"], ["quote.csv is broken at line"]),
    (["--data", "nul.csv"], ["nul.csv is broken", "NUL"]),
    (["--data", "utf16.csv"], ["utf16.csv is not UTF-8"]),
    (["--data", "utf16-unmarked.csv"], ["utf16-unmarked.csv is broken", "NUL"]),
    (["--data", "half.jsonl"], ["line 2 of half.jsonl", "surrogates"]),
    (["--data", "deep.jsonl"], ["line 1 of deep.jsonl", "nested too deeply"]),
    (["--data", "vast-number.csv"], ["row 1 of vast-number.csv"]),
    (["--data", "vast-number.csv", "--problem-type", "regression"], ["must be a number for regression"]),
    (["--data", "latin.csv"], ["latin.csv is not UTF-8"]),
    (["--data", "twice.csv"], ["names a column twice"]),
    (["--data", "array.jsonl"], ["line 1 of array.jsonl is not JSON", "Write one object a line."]),
    (["--data", "texts.csv"], ["texts.csv has no column beside 'text'", "--objective causal"]),
    (["--data", "list.jsonl"], ["line 1 of list.jsonl"]),
    (["--data", "number.jsonl"], ["row 1 of number.jsonl", "must be text"]),
    (["--data", "broken.parquet"], ["broken.parquet is not a readable parquet file"]),
    (["--data", "one-class.csv"], ["one class only ('yes')"]),
    (["--data", "one-number.csv", "--problem-type", "regression"], ["one number only (2.5)"]),
    (["--data", "missing/reviews.txt"], ["no data at 'missing/reviews.txt'", "csv, tsv, jsonl, parquet"]),
    (["--data", "one-row.csv"], ["1 row is too few"]),
    (["--data", "no-class.csv"], ["row 2 of no-class.csv has no class", "Give it one, remove the row"]),
    (["--data", "nan.jsonl"], ["row 2 of nan.jsonl has no class"]),
    (
        ["--data", "measures.csv", "--problem-type", "classification"],
        ["'0.25'", "whole numbers", "--problem-type regression"],
    ),
    (["--data", "some/where"], ["cannot load the data set 'some/where'", "nyu-mll/glue:sst2"]),
    (["--data", "broken-set"], ["cannot load the data set 'broken-set'"]),
    (["--text-column", "text,stars"], ["no column 'stars'", "text, label"]),
    (["--data", "pairs-and-texts"], ["pairs of texts to train on and one text a row to measure on"]),
    # problems
    (["--problem-type", "regression"], ["row 1 of good.csv has 'negative'", "must be a number"]),
    (["--problem-type", "tags"], ["row 1 of good.csv", "must be a list of words", "jsonl and parquet"]),
    (["--data", "short-tags.jsonl"], ["row 2 of short-tags.jsonl has a list of 1", "each of the 2 words"]),
    (["--data", "no-word.jsonl"], ["row 1 of no-word.jsonl has ' ' as word 2", "none of them empty"]),
    (["--data", "spans.jsonl"], ["row 1 of spans.jsonl has [[0, 1, 'X']] in column 'label'", "a list of its words"]),
    (["--data", "no-tag.jsonl"], ["row 1 of no-tag.jsonl has None as the tag of word 2 in column 'ner_tags'"]),
    # the best checkpoint
    (["--metric", "loss", "--save-steps", "2", "--patience", "0"], ["--patience is 0"]),
    (["--metric", "pearson", "--save-steps", "1"], ["'pearson' is not measured", "accuracy, f1, matthews, loss"]),
    (["--metric", "f1", "--save-steps", "1", "--data", "measures.csv"], ["'f1' is not measured in regression"]),
    (["--data", "identities.csv"], ["50 different classes in 50 rows"]),
    (["--data", "dev-class"], ["'neutral'", "negative, positive"]),
    (["--text-column", "label", "--label-column", "label"], ["cannot be both"]),
    # adapters
    (["--rank", "17"], ["rank 17", "from 1 to 16"]),
    (["--method", "siva", "--set", "d=17"], ["17", "16"]),
    (["--method", "siva", "--set", "residual=odd"], ["'odd'", "'frozen'", "'implicit'"]),
    (["--method", "siva", "--set", "residual_dtype=int3"], ["'int3'", "'int8'", "'nf4'"]),
    (["--method", "siva", "--set", "quant_iterations=-1"], ["-1", "from 0"]),
    (["--targets", "nothing"], ["nothing", "query"]),
    (["--method", "siva", "--targets", "nothing"], ["nothing", "query"]),
    (["--targets", "(query"], ["'(query'", "regular expression"]),
    (["--method", "head", "--targets", "query"], ["'head'", "no --targets"]),
    # runs to start from
    (["--init-from", "nowhere"], ["run to start from", "'nowhere' is not the folder of a run"]),
    (["--init-from", "unfinished"], ["run to start from", "'unfinished' is not finished"]),
    (["--init-from", "whole", "--model", "demo"], ["the model is 'demo'", "'whole' trained", "Leave the model out"]),
    (["--init-from", "side"], ["'side' trained a side network", "'lora' has nothing to start from", "k-lst"]),
    (["--init-from", "side", "--method", "mezo"], ["'mezo' has nothing to start from", "--set over=k-lst"]),
    (["--init-from", "side", "--method", "k-lst"], ["another shape", "window_size is 3, here 9"]),
    (["--init-from", "side", "--method", "lst"], ["another shape", "fusion"]),
    (["--init-from", "whole", *PROMPT, "--label-words", "a,b,c"], ["no word for negative"]),
    (["--output", "a\udcff"], ["--output is 'a\\udcff'", "UTF-8"]),
    (["--set", 'x="\udcff"'], ["settings is", "JSON can hold"]),
    (["--init-from", "whole", "--output", "whole"], ["'whole' is not empty"]),
    (["--init-from", "whole", "--output", "whole", "--overwrite"], ["run to start from", "would delete"]),
    (["--init-from", "whole", "--output", "unfinished", "--resume"], ["init_from None -> "]),
    (["--init-from", "link", "--output", "whole", "--overwrite"], ["run to start from", "would delete"]),
    # prompts
    (["--prompt", "{text} is <mask> <mask>", *WORDS], ["has 2 <mask>", "must have one"]),
    (["--prompt", "{text} is", *WORDS], ["has no <mask>", "must have one"]),
    (["--prompt", "the film is <mask>", *WORDS], ["no place for a text"]),
    (["--prompt", "{a} is {b} <mask>", *WORDS], ["takes a pair of texts", "the data has one text a row"]),
    ([*PROMPT, "--data", "pairs.jsonl"], ["takes one text a row", "the data has pairs of texts", "{a} and {b}"]),
    ([*PROMPT, "--data", "measures.csv"], ["stand for classes, but this is regression", "--prompt-head classifier"]),
    (
        [*PROMPT, "--data", "tagged.jsonl", "--prompt-head", "classifier"],
        ["is for texts, but the data has a tag for every word"],
    ),
    (["--prompt", "sst9"], ["no prompt is named 'sst9'", "SST-2"]),
    (["--prompt", "{text} is <mask>"], ["has no label words"]),
    ([*PROMPT[:3], "negative=awful,mixed=odd"], ["no word for positive", "negative, positive"]),
    ([*PROMPT[:3], "awful,lovely,odd"], ["no word for negative, positive", "by --label-words"]),
    ([*PROMPT[:3], "awful,"], ["class '1' has no label word"]),
    ([*PROMPT[:3], "0=awful,999999999999=lovely"], ["has no word for negative, positive"]),
    ([*PROMPT[:3], "very dull,lovely"], ["'very dull' of class 'negative' is 2 tokens (very dull)", "Near it are"]),
    ([*PROMPT[:3], "lovly,dull"], ["'lovly' of class 'negative' is unknown", "lovely"]),
    ([*PROMPT, "--prompt-head", "words"], ["--prompt-head is 'words'", "label_words or classifier"]),
    ([*PROMPT, "--max-length", "5"], ["--max-length 5 leaves no room"]),
    ([*PROMPT, "--model", "classifier"], ["'classifier' has no masked-word head", "--prompt-head classifier"]),
    (["--prompt", "<mask>: {text}", *WORDS, "--model", "causal"], ["{text} after <mask>", "Put the texts before it"]),
    ([*PROMPT, "--model", "cut-model"], ["cannot load the model 'cut-model'"]),
    (["--prompt-head", "classifier"], ["--prompt-head is 'classifier', but there is no prompt"]),
    # MeZO
    (["--method", "mezo", "--set", "over=mezo"], ["over is 'mezo'", "siva, k-lst, lst, full"]),
    (["--method", "mezo", "--set", "over=3"], ["over is 3", "siva, k-lst, lst, full"]),
    (["--method", "mezo", "--set", "over=siva", "--targets", "query", "--rank", "17"], ["17", "16"]),
    (["--method", "full", "--set", "over=siva"], ["unknown setting 'over'"]),
    (["--method", "mezo", "--rank", "4"], ["'mezo'", "no --rank"]),
    (["--method", "mezo", "--set", "eps=0"], ["eps is 0", "above 0"]),
    (["--method", "mezo", "--set", "eps=small"], ["eps is 'small'", "float"]),
    (["--method", "mezo", "--set", "epz=1"], ["'epz'", "eps", "fields of MeZOConfig"]),
    (["--method", "mezo", "--set", "fp16=true"], ["fp16=True", "MeZO makes none"]),
    (["--method", "mezo", "--set", "journal=false"], ["unknown setting 'journal'"]),
    (["--method", "mezo", "--set", "estimator=adam"], ["estimator is 'adam'", "spsa, fzoo"]),
    (
        ["--method", "mezo", "--learning-rate", "1e-6", "--set", "estimator=fzoo"],
        ["num_estimates is 1", "2 to 255"],
    ),
    (
        ["--method", "mezo", "--set", "estimator=fzoo", "--set", "num_estimates=8"],
        ["no learning rate of its own", "1e-6"],
    ),
    (["--method", "mezo", "--set", "noise=pink"], ["noise is 'pink'", "gaussian, rademacher"]),
    # what would have no effect
    (["--set", "fp16=true"], ["fp16 is for GPUs", "use --bf16 there"]),
    (["--set", "optim_args=lr=3"], ["optim_args has no effect on adamw_torch_fused", "adam_beta1"]),
    (["--set", 'optim_target_modules=["query"]'], ["optim_target_modules has no effect on adamw_torch_fused"]),
    # numbers
    (["--learning-rate", "inf"], ["--learning-rate is inf"]),
    (["--max-length", "1"], ["--max-length is 1", "from 2"]),
    # settings
    (["--set", "seed=3"], ["seed cannot be set", "use --seed"]),
    (["--set", "target_modules=query"], ["target_modules cannot be set", "use --targets"]),
    (["--set", "rank_pattern=3"], ["rank_pattern is 3", "dict"]),
    (["--set", "exclude_modules=["], ["exclude_modules", "'['"]),
    (["--set", "init_lora_weights=magic"], ["init_lora_weights", "magic"]),
    (["--method", "siva", "--set", "d=abc"], ["d is 'abc'", "int"]),
    (["--set", "gradient_accumulation_steps=0"], ["gradient_accumulation_steps must be at least 1"]),
    (["--set", "dataloader_num_workers=-1"], ["'dataloader_num_workers': -1"]),
    (["--set", "per_device_eval_batch_size=0"], ["'per_device_eval_batch_size': 0"]),
    (["--set", "report_to=wandb"], ["report_to cannot be set", "use --report-to"]),
    (["--set", 'label_names=["foo"]'], ["unknown setting 'label_names'"]),
    (["--set", "label_smoothing_factor=0.1", "--data", "measures.csv"], ["is for classes", "the data has numbers"]),
    (["--set", "push_to_hub=true"], ["unknown setting 'push_to_hub'"]),
    (["--set", "adam_beta1=3"], ["'adam_beta1': 3"]),
    (["--set", "bias=odd"], ["bias", "odd"]),
    (["--set", "warmup_steps=few"], ["warmup_steps", "'few'"]),
    (["--set", "lr_scheduler_type=zigzag"], ["zigzag"]),
    (["--set", 'lr_scheduler_kwargs={"power": 2}'], ["lr_scheduler_kwargs", "power"]),
    (["--set", "use_liger_kernel=true"], ["needs the package liger-kernel"]),
    (["--set", "rank_pattern=" + "[" * 9999], ["rank_pattern", "dict"]),
    # folders and configurations
    (["--output", "foreign", "--overwrite"], ["'foreign' is not empty", "left alone"]),
    (["--output", "foreign", "--resume"], ["'foreign' is not empty", "left alone"]),
    (["--output", "run", "--overwrite", "--resume"], ["exclude each other"]),
    (["--output", "whole", "--overwrite", "--model", "whole"], ["the model", "--overwrite would delete"]),
    (["--output", "empty-metrics", "--resume"], ["does not hold"]),
    (["--output", "unfinished", "--resume", "--batch-size", "5"], ["batch_size 16 -> 5"]),
    (["--output", "good.csv"], ["'good.csv' is a file"]),
    (["--output", "good.csv/run"], ["good.csv/run"]),
    (["--config", "broken.json"], ["broken.json is not a JSON file"]),
    (["--config", "wrong-type.json", "--method", "lora"], ["--batch-size is 'many'"]),
    # the other commands
    (["eval", "unfinished"], ["'unfinished' is not finished", "--resume"]),
    (["eval", "cut-run"], ["adapter in 'cut-run'"]),
    (["eval", "siva-of-another"], ["another"]),
    (["eval", "side-of-another"], ["side network was trained on another backbone", "differ"]),
    (["eval", "empty-metrics"], ["does not hold 'labels'", "--overwrite"]),
    (["eval", "run", "--data", "train-only"], ["'train-only' has no dev.*", "train.csv"]),
    (["eval", "run", "--data", "new-class.csv"], ["'neutral'", "negative, positive"]),
    (["eval", "run", "--data", "nowhere.csv"], ["'nowhere.csv'"]),
    (["eval", "run", *PROMPT], ["DIR", "--model"]),
    (["eval", "--model", "model", "--data", "good.csv"], ["--prompt is missing", "sst2", "auto"]),
    (["eval", "--model", "model", "--data", "good.csv", "--objective", "mlm"], ["'mlm'", "eval allows only causal"]),
    (["eval", "--model", "model", "--objective", "causal"], ["--model and --data"]),
    (["eval", "run", "--data", "good.csv", "--objective", "causal"], ["--model and --data"]),
    (["eval", "--model", "model", "--data", "good.csv", "--objective", "causal", *PROMPT], ["--model and --data"]),
    (
        ["eval", "--model", "model", "--data", "good.csv", "--objective", "causal"],
        ["is not a decoder, which the objective causal requires"],
    ),
    (["eval", "--model", "model", "--data", "good.csv", "--prompt", "none"], ["--prompt is missing", "sst2", "auto"]),
    (["eval", "--model", "model", "--data", "good.csv", *PROMPT[:3], "a,b,c"], ["no word for negative, positive"]),
    (["eval", "pair-run", "--data", "alike.csv"], ["learned from pairs of texts, but 'alike.csv' has one text a row"]),
    (["eval", "--model", "model", "--data", "pairs.jsonl", *PROMPT], ["the data has pairs of texts"]),
    (["eval", "--model", "model", "--data", "measures.csv", *PROMPT], ["'0.25'", "whole numbers"]),
    (["predict", "pair-run", "a text"], ["two texts, as a pair or separated by a tab; got 'a text'"]),
    (["predict", "tag-run", "the " * 50], ["of the 50 words that begin with 'the the the', only 36 fit into the 38"]),
    (["predict", "run", "a \udcff film"], ["one text; got 'a \\udcff film'", "UTF-8"]),  # as a byte that is none comes
    (["predict", "run", "--file", "blank.txt"], ["blank.txt holds no text"]),
    (["predict", "run", "--file", "train-only"], ["train-only is a folder. Give a file", "parquet"]),
    (["predict", "run", "--file", "good.xlsx"], ["good.xlsx is of the kind 'xlsx'", "csv, tsv, jsonl, parquet, txt"]),
    (["predict", "run", "--file", "-", "--format", "parquet"], ["standard input is of the kind 'parquet'"]),
    (["predict", "run", "a text", "--text-column", "text"], ["--text-column is 'text', but there is no file"]),
    (["predict", "run", "--file", "good.csv", "--text-column", "body"], ["good.csv has no column 'body'"]),
    (["predict", "run", "--file", "two-columns.csv"], ["cannot tell which column of two-columns.csv", "--text-column"]),
    (["predict", "run", "--file", "pairs.jsonl"], ["learned from one text a row, but pairs.jsonl has pairs of texts"]),
    (["predict", "pair-run", "--file", "alike.csv"], ["learned from pairs of texts, but alike.csv has one text a row"]),
    (
        ["predict", "run", "--file", "taken.csv", "--text-column", "class", "--output", "x.csv"],
        ["texts 'class' of taken.csv has the name of a"],
    ),
    (["predict", "run", "a text", "--output", "good.csv"], ["'good.csv' exists", "--overwrite"]),
    (["predict", "run", "a text", "--output", "nowhere/new.csv"], ["'nowhere/new.csv'", "Make it first"]),
    (["export"], ["RUN"]),
    (["export", "run"], ["OUT"]),
    (["export", "cut-run", "new"], ["adapter in 'cut-run'"]),
    (["export", "run", "whole"], ["'whole' exists", "new folder"]),
    (["export", "run", "good.csv"], ["'good.csv' exists"]),
    (["export", "run", "good.csv/new"], ["cannot write to 'good.csv/new'"]),
    (["export", "side", "new"], ["'side' trained a side network (k-LST)", "own folder"]),
    (["export", "--to", "lora", "side", "new"], ["'side' trained a side network"]),
    (["export", "--to", "lora", "whole", "new"], ["'whole' trained a whole model", "to merged"]),
    (["export", "--to", "lora", "run", "deep/new"], ["only SiVA's is exported as a LoRA"]),
    (["export", "--to", "lora", "lossy", "deep/new"], ["d=9", "Merge it"]),
    (["export", "siva-of-another", "new"], ["another"]),
    (["export", "--step", "1", "run", "new"], ["step is 1", "only the journal of the method 'mezo'"]),
    (["export", "--step", "2", "mezo", "new"], ["step is 2", "made 1"]),
    (["export", "--step", "-1", "mezo", "new"], ["step is -1", "made 1"]),
    (["export", "--step", "1", "no-journal", "new"], ["cannot read the journal"]),
    (["export", "--step", "1", "bad-journal", "new"], ["not a journal"]),
    (["export", "--step", "1", "mezo-of-another", "new"], ["does not have the weights", "base model"]),
    (["--method", "mezo", "--output", "bad-resume", "--resume", "--max-steps", "1"], ["not a journal"]),
    (["--data", "~nobody-of-this-name/x.csv"], ["'~nobody-of-this-name/x.csv' cannot be a path"]),
    (["--output", "~nobody-of-this-name/x"], ["'~nobody-of-this-name/x' cannot be a path"]),
    (["--model", "m" * 300], [f"{'m' * 80}...", "cannot be a path (File name too long)"]),
    (["train", "--config", "no-text.json"], ["data is 5"]),
    (
        ["train", "--config", "no-settings.json", "--set", "eval_delay=2"],
        ["unknown setting 'eval_delay'"],
    ),
    (["--set", "eval_steps=2", "--metric", "loss", "--save-steps", "2"], ["measured at each checkpoint: use"]),
    (["eval", "~nobody-of-this-name"], ["cannot be a path"]),
    (["predict", "run", "a", "--output", f"{'o' * 300}.csv"], ["cannot be a path (File name too long)"]),
]


@pytest.mark.long(only="--method sivva")
@pytest.mark.parametrize(("arguments", "parts"), CASES, ids=[" ".join(arguments) for arguments, _ in CASES])
def test_bad_input(place: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], parts: list[str]) -> None:
    monkeypatch.chdir(place)
    before = snapshot(place)
    result = CliRunner().invoke(app, [*TRAIN, *arguments] if arguments[0].startswith("-") else arguments)
    message = re.sub(r"[\s│]+", " ", result.stderr)  # usage errors come in a box
    assert result.exit_code == 2, result.output
    assert [part for part in parts if part not in message] == [], message
    assert "Traceback" not in result.output
    assert len(re.findall("Error:|─ Error ─", message)) == 1
    assert snapshot(place) == before


def test_one_callback_is_no_list(tmp_path: Path) -> None:
    with pytest.raises(FastpeftError, match="Give a list"):
        train(TrainConfig(output=str(tmp_path / "run")), callbacks=TrainerCallback())  # type: ignore[arg-type]


def test_a_dictionary_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(
        FastpeftError, match=r"config is a dict; it must be a TrainConfig\. .* TrainConfig\.from_values"
    ):
        train({"output": str(tmp_path / "run")})  # type: ignore[arg-type]
    with pytest.raises(FastpeftError, match="config is a dict; it must be a TrainConfig"):
        plan({"output": str(tmp_path / "run")})  # type: ignore[arg-type]
    with pytest.raises(FastpeftError, match="config is a TrainConfig; it must be a CompareConfig"):
        compare(TrainConfig(output=str(tmp_path / "run")))  # type: ignore[arg-type]


@pytest.mark.parametrize("output", ["good.csv/run", "bound", "bound/deep/run", "/proc/run"])
def test_an_output_that_cannot_be_written_is_refused_before_all_else(
    place: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    """Nothing is read first: neither data nor model is there."""
    monkeypatch.chdir(place)
    if output.startswith("/proc") and not Path("/proc/self").exists():
        pytest.skip("needs Linux's /proc")
    (place / "bound").mkdir(mode=0o555, exist_ok=True)
    config = TrainConfig(output=output, method="head", model="no-model", data="no-data.csv")
    with bound_by_modes(), pytest.raises(FastpeftError, match=f"cannot write to the output folder '{output}'"):
        train(config)


def test_the_demo_data_that_is_not_installed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    result = CliRunner().invoke(app, [*TRAIN, "--data", "demo"])
    assert result.exit_code == 2
    assert "pip install fastpeft-demo" in result.stderr
