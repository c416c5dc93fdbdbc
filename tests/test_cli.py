"""The command line from end to end."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import ENVIRONMENT, TRAIN, go_to_work, run
from peft import AutoPeftModelForSequenceClassification
from samples import SMALL, pairs, prompted, reviews, sampled, scores, tagged, write_csv, write_jsonl
from typer.testing import CliRunner

import fastpeft
from fastpeft import FastpeftError, Prompt, PromptCollator, TrainConfig, console
from fastpeft.cli import app
from fastpeft.comparison.variants import DECIDED, PROMPTED
from fastpeft.data.examples import load_data
from fastpeft.methods.registry import METHODS
from fastpeft.mezo import Journal
from fastpeft.ops import backends
from fastpeft.prompts.model import load_prompted
from fastpeft.training.config import options


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return go_to_work(tmp_path, monkeypatch)


@pytest.mark.long(but="mezo")
@pytest.mark.parametrize("method", SMALL)
def test_train_eval_predict(place: Path, method: str) -> None:
    trained = run(*TRAIN, "--method", method, "--output", "out")
    metrics = json.loads((place / "out" / "metrics.json").read_text())
    for shown in (f"{metrics['accuracy']:.3f}", f"{metrics['f1']:.3f}", f"{metrics['trainable_parameters']:,}"):
        assert shown in trained.stdout
    for name in ("accuracy before", "accuracy after", "F1", "samples/s", "trainable parameters"):
        assert name in trained.stdout
    peaks = {
        "peak memory of a step": f"{metrics['peak_memory_mb']:,.0f} MB (simulated: tensors only)",
        "peak resident memory": f"{metrics['peak_rss_mb']:,.0f} MB (the whole process)",
    }
    card = (place / "out" / "README.md").read_text()
    for name, peak in peaks.items():
        assert re.search(rf"{name} +│ {re.escape(peak)}", trained.stdout)
        assert f"| {name} | {peak} |" in card
    assert "texts from column 'review'" in trained.stderr
    assert "4/4" in trained.stderr
    assert f"{metrics['accuracy']:.3f}" in run("eval", "out").stdout
    (place / "texts.txt").write_text("a dull plot\nwhat a lovely film\n\n")
    lines = run("predict", "out", "it is funny", "--file", "texts.txt").stdout.splitlines()
    assert [line.split("\t")[2] for line in lines] == ["it is funny", "a dull plot", "what a lovely film"]
    assert {line.split("\t")[0] for line in lines} <= {"negative", "positive"}


PROMPT = ("--prompt", "{text} the film is <mask>", "--label-words", "negative=awful,positive=lovely")


@pytest.mark.parametrize(("method", "head"), sampled(prompted(SMALL), but=("mezo", "classifier")))
def test_a_prompted_run(place: Path, method: str, head: str) -> None:
    arguments = (*TRAIN, *PROMPT, "--prompt-head", head, "--method", method, "--learning-rate", "1e-2")
    run(*arguments, "--output", "out", "--save-steps", "3", "--quiet")
    metrics = json.loads((place / "out" / "metrics.json").read_text())
    assert metrics["peak_memory_mb"] > 0
    assert f"{metrics['accuracy']:.3f}" in run("eval", "out").stdout
    classified = run("predict", "out", "a dull plot").stdout
    # the model card's code loads what was trained
    card = (place / "out" / "README.md").read_text()
    loaded: dict[str, Any] = {}
    exec(card.partition("```python\n")[2].partition("```")[0], loaded)
    rows = loaded["prompt"].encode(loaded["tokenizer"], ["a dull plot"])
    with torch.no_grad():
        likely = loaded["model"].eval()(**PromptCollator(loaded["tokenizer"])(rows)).logits.softmax(-1)
    assert classified.split("\t")[1] == f"{likely.max():.3f}"
    # a run that ended between its last checkpoint and its end comes to the same weights
    (place / "out" / "metrics.json").unlink()
    weights = place / "out" / ("adapter_model" if METHODS[method].library == "peft" else "model")
    before = weights.with_suffix(".safetensors").read_bytes()
    weights.with_suffix(".safetensors").unlink()
    run("train", "--output", "out", "--resume", "--quiet")
    assert weights.with_suffix(".safetensors").read_bytes() == before


def test_every_field_of_a_run_is_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given on the command line, it comes into the configuration as it is."""
    seen = []

    def plan(config: TrainConfig, **_: Any) -> None:
        seen.append(config)
        raise FastpeftError("seen")

    monkeypatch.setattr("fastpeft.console.plan", plan)
    fixed = {
        "method": "lst",
        "output": "out",
        "window": 5,
        "metric": "loss",
        "save_steps": 6,
        "prompt": "{text} <mask>",
    }
    fixed |= {"cache_features": "kept", "label_words": "a,b", "max_length": 9, "init_from": "earlier"}
    fixed |= {"model": "m", "data": "owner/rows"}
    of_kind = {str: "text", int: 3, float: 0.5, bool: True}
    given = {
        known.name: next(iter(known.choices), of_kind[known.kind]) for known in options() if known.kind is not dict
    }
    # with a problem or a prompt, these are refused
    alone = {"output": "out", "objective": "causal", "packing": given.pop("packing")}
    del given["objective"]
    refused = {known.name: False for known in options() if known.kind is bool and known.default is not False}
    for values in (given | fixed, alone, {"output": "out", **refused}):
        arguments = []
        for name, value in values.items():
            typed = name.replace("_", "-")
            shown = [] if isinstance(value, bool) else [str(value)]
            arguments += [f"--no-{typed}" if value is False else f"--{typed}", *shown]
        CliRunner().invoke(app, ["train", "--dry-run", "--set", "x=3", *arguments])
        assert seen.pop() == TrainConfig.from_values({**values, "settings": {"x": 3}})


@pytest.mark.parametrize("command", ["train", "compare"])
def test_help_has_the_fields_of_a_run(command: str) -> None:
    shown = " ".join(run(command, "--help-all").stdout.replace("│", " ").split())
    left_out = set() if command == "train" else {*DECIDED, *PROMPTED} - {"output"}  # it has one of its own
    for known in options():
        if known.kind is not dict:
            assert (f" --{known.name.replace('_', '-')} " in shown) == (known.name not in left_out), known.name
    assert all(f"--{name} " in shown for name in ("set", "quiet", "dry-run", "memory-budget"))
    assert all(name in shown for name in METHODS)


def test_help_has_what_most_people_need_in_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = run("train", "-h").stdout
    names = re.findall(r"^│ (--[a-z-]+) ", shown, re.MULTILINE)
    assert len(names) == 13, "eleven, and the two of help itself"
    assert {"--data", "--model", "--method", "--output", "--text-column", "--label-column", "--help-all"} <= set(names)
    assert max(map(len, shown.splitlines())) <= 80
    assert "bool" not in shown
    every = run("train", "--help-all").stdout
    headings = re.findall(r"^╭─ (\w+) ─", every, re.MULTILINE)
    assert headings == ["Data", "Model", "Method", "Training", "Output", "Advanced", "Help"]
    assert max(map(len, every.splitlines())) <= 80
    assert "…" not in every


def test_short_names_and_the_version(place: Path) -> None:
    assert run("--version").stdout == run("-V").stdout == f"fastpeft {fastpeft.__version__}\n"
    run("train", "-m", "model", "-d", "reviews.csv", "-o", "out", "--max-steps", "1", "--method", "head", "-q")
    assert run("predict", "out", "a film", "-o", "found.csv").stdout
    assert "accuracy" in run("eval", "out", "-d", "reviews.csv").stdout


def test_values_are_completed() -> None:
    environment = {"_FASTPEFT_COMPLETE": "complete_bash", "COMP_WORDS": "fastpeft train --method k-", "COMP_CWORD": "3"}
    shown = CliRunner().invoke(app, [], prog_name="fastpeft", env=environment)
    assert shown.stdout.split() == ["k-lst"]


def test_progress_in_a_file_has_each_stage(place: Path) -> None:
    shown = run(*TRAIN, "--method", "siva", "--output", "out").stderr
    stages = ("loading libraries", "reading data", "encoding texts", "adapting layers", "measuring before", "saving")
    places = [shown.index(f"{stage}") for stage in stages]
    assert places == sorted(places)
    assert "training 4/4" in shown


def test_a_run_reports_to_tensorboard(place: Path) -> None:
    pytest.importorskip("tensorboard")
    run(*TRAIN, "--method", "head", "--output", "out", "--report-to", "tensorboard", "--quiet")
    events = list((place / "out" / "logs").glob("events.out.tfevents.*"))
    assert any(b"train/loss" in path.read_bytes() for path in events)
    assert sorted(path.name for path in place.iterdir()) == ["model", "out", "reviews.csv"]
    run(*TRAIN, "--method", "head", "--output", "out", "--quiet", "--overwrite")
    assert not (place / "out" / "logs").exists()


def test_a_reporter_that_is_not_installed_is_one_message(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastpeft.training.setup.find_spec", lambda name: None)
    refused = CliRunner().invoke(app, [*TRAIN, "--report-to", "wandb"])
    assert refused.exit_code == 2
    assert refused.stderr.splitlines()[-1].startswith(
        "Error: --report-to is 'wandb', but that package is not installed."
    )


def test_what_trains_with_label_words(place: Path) -> None:
    counts = {}
    for method in ("siva", "head", "full"):
        counts[method] = run(*TRAIN, *PROMPT, "--method", method, "--dry-run").stdout.split("trainable parameters")[1]
    dense_and_norm = 16 * 16 + 16 + 2 * 16
    factors = 2 * 6 * 8 * (16 + 16)  # of all linear layers in two blocks, none of which is wider
    assert counts["head"].split()[1] == str(dense_and_norm)
    assert counts["siva"].split()[1] == f"{factors:,}"
    assert counts["full"].split()[1] == counts["full"].split()[3]


def test_mezo_warns_without_a_prompt(place: Path) -> None:
    plain = run(*TRAIN, "--method", "mezo", "--output", "plain").stderr
    assert "with a newly initialised head MeZO learns little" in " ".join(plain.split())
    assert "newly" not in run(*TRAIN, *PROMPT, "--method", "mezo", "--output", "prompted").stderr


def test_mezo_needs_the_memory_of_a_forward_pass(place: Path) -> None:
    peaks = {}
    for method in ("mezo", "full"):
        run(*TRAIN, *PROMPT, "--method", method, "--output", method, "--quiet")
        peaks[method] = json.loads((place / method / "metrics.json").read_text())["peak_memory_mb"]
    assert peaks["mezo"] < peaks["full"] / 2


def test_zero_shot(place: Path) -> None:
    """All rows of a file are measured, as of a finished run."""
    zero_shot = ("eval", "--model", "model", "--data", "reviews.csv", "--label-column", "stars", *PROMPT)
    texts = load_data("reviews.csv", label_column="stars", split=False)
    model = load_prompted("model", Prompt(PROMPT[1], ["awful", "lovely"]).for_labels(texts.labels)).model
    for added, title in (((), "no training on"), (("--calibrate",), "no training, calibrated on")):
        if added:
            model.calibrate()
        guesses = model.predict_logits(texts.dev.texts).argmax(-1)
        shown = run(*zero_shot, *added).stdout
        assert title in shown
        assert ["rows", "60"] in [re.findall(r"\w+", line) for line in shown.splitlines()]
        assert f"{(guesses == torch.tensor(texts.dev.labels)).float().mean():.3f}" in shown


def test_zero_shot_tells_of_texts_that_it_cuts(place: Path) -> None:
    write_csv(place / "long.csv", [(text * 40, label) for text, label in reviews(3)] + reviews(3))
    shown = run("eval", "--model", "model", "--data", "long.csv", *PROMPT).stdout
    assert re.search(r"Warning: 3 of 6 texts \(50 %\) are longer than \d+ tokens and were truncated", shown)


@pytest.mark.parametrize("prompt", [(), ("--prompt", "none"), ("--calibrate",)])
def test_a_model_without_its_prompt_is_told_to_have_one(prompt: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(app, ["eval", "--model", "demo", *prompt])
    assert shown.exit_code == 2
    assert shown.stderr.startswith("Error: --prompt is missing: ")
    for example in (
        "--prompt sst2;",
        "--prompt '{text} It was <mask>.' --label-words terrible,great;",
        "--prompt auto,",
    ):
        assert example in shown.stderr


PAIR_PROMPT = ("--prompt", "{a} <mask> {b}", "--label-words", "different=odd,same=lovely")


@pytest.mark.long
def test_pairs_are_separated_by_a_tab(place: Path) -> None:
    write_jsonl(place / "pairs.jsonl", pairs(40))
    options = ("--model", "model", "--data", "pairs.jsonl")
    run("train", *options, "--method", "lora", "--max-steps", "2", "--output", "plain", "--quiet")
    run("train", *options, *PAIR_PROMPT, "--method", "full", "--max-steps", "2", "--output", "prompted", "--quiet")
    (place / "texts.txt").write_text("a dull plot\tis awful\n")
    for output in ("plain", "prompted"):
        lines = run("predict", output, "it is funny\tand lovely", "--file", "texts.txt").stdout.splitlines()
        assert [line.split("\t")[2:] for line in lines] == [["it is funny", "and lovely"], ["a dull plot", "is awful"]]
        assert {line.split("\t")[0] for line in lines} <= {"same", "different"}
    # with no training
    texts = load_data("pairs.jsonl", split=False)
    model = load_prompted("model", Prompt(PAIR_PROMPT[1], ["odd", "lovely"]).for_labels(texts.labels)).model
    guesses = model.calibrate().predict_logits(texts.dev.texts).argmax(-1)
    calibrated = run("eval", *options, *PAIR_PROMPT, "--calibrate").stdout
    assert f"{(guesses == torch.tensor(texts.dev.labels)).float().mean():.3f}" in calibrated


def test_numbers_and_tags_are_shown(place: Path) -> None:
    write_jsonl(place / "scores.jsonl", scores(40))
    write_jsonl(place / "tagged.jsonl", tagged(40))
    options = ("train", "--model", "model", "--method", "lora", "--max-steps", "4", "--save-steps", "2")
    shown = run(*options, "--data", "scores.jsonl", "--output", "scores", "--metric", "spearman")
    for part in (
        "Pearson correlation before",
        "Pearson correlation after",
        "Spearman correlation",
        "mean squared error",
    ):
        assert part in shown.stdout
    assert "Pearson correlation" in shown.stderr, "the progress bar has the first metric"
    assert "accuracy" not in shown.output
    measured = run("eval", "scores").stdout
    assert "Spearman correlation" in measured
    assert "loss" in measured
    name, value, text = run("predict", "scores", "a lovely film").stdout.rstrip("\n").split("\t")
    assert (name, text) == ("score", "a lovely film")
    float(value)
    shown = run(*options, "--data", "tagged.jsonl", "--output", "tagged")
    assert "word F1 before" in shown.stdout
    assert "dev word F1 0." in shown.stderr
    lines = run("predict", "tagged", "a lovely film", "the end").stdout.splitlines()
    assert [line.split("\t")[2] for line in lines if line] == ["a", "lovely", "film", "the", "end"]
    assert [bool(line) for line in lines] == [True, True, True, False, True, True, False]
    assert {line.split("\t")[0] for line in lines if line} <= {"O", "B-negative", "B-positive", "B-mixed"}


def test_prompts_by_name_and_none(place: Path) -> None:
    run(*TRAIN, *PROMPT, "--method", "head", "--output", "first", "--quiet")
    run("train", "--config", "first/run.json", "--prompt", "none", "--output", "second", "--quiet")
    assert not (place / "second" / "prompt.json").exists()
    named = ("--prompt", "sst2", "--label-words", "awful,lovely", "--prompt-head", "classifier")
    run(*TRAIN, *named, "--method", "head", "--output", "third", "--quiet")
    assert json.loads((place / "third" / "prompt.json").read_text())["label_words"]["positive"] == "lovely"


def test_a_run_is_repeated_from_its_file(place: Path) -> None:
    run(*TRAIN, "--method", "siva", "--output", "first", "--targets", "query,value", "--rank", "2", "--set", "d=15")
    run("train", "--config", "first/run.json", "--output", "second")
    adapters = [(place / name / "adapter_model.safetensors").read_bytes() for name in ("first", "second")]
    assert adapters[0] == adapters[1]
    run("train", "--config", "first/run.json", "--output", "third", "--set", "residual=frozen", "--seed", "1")
    config = json.loads((place / "third" / "run.json").read_text())
    assert config["settings"] == {"d": 15, "residual": "frozen"}
    assert (config["seed"], config["targets"]) == (1, "query,value")


def test_paths_with_brackets_and_colons_are_shown_as_they_are(place: Path) -> None:
    output = "a[/b] :smile:"
    assert output in run(*TRAIN, "--method", "head", "--output", output).stdout
    assert output in run("eval", output).stdout


def test_a_run_works_from_another_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(*TRAIN, "--method", "siva", "--output", "out")
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    assert "accuracy" in run("eval", "../out").stdout
    assert run("predict", "../out", "a dull plot").stdout.count("\t") == 2
    AutoPeftModelForSequenceClassification.from_pretrained("../out")
    run("train", "--config", "../out/run.json", "--output", "again", "--quiet")


def test_a_dry_run_writes_nothing(place: Path) -> None:
    before = sorted(place.rglob("*"))
    result = run(*TRAIN, "--method", "lora", "--dry-run")
    shown = result.stdout
    assert "trial steps 7/7" in result.stderr
    assert "trial steps 0/0" not in result.stderr, "which a measurement before the first step reported"
    assert "training" not in result.stderr, "what a dry run says that it does not do"
    assert "texts from column" in result.stderr
    assert re.search(r"steps of the run +│ 4 ", shown)
    assert "trainable parameters" in shown
    assert re.search(r"estimated peak memory of a step │ \d+ MB \(simulated: tensors only\)", shown)
    assert re.search(r"peak resident memory +│ [\d,]+ MB \(the whole process\)", shown)
    assert re.search(r"estimated time +│ \d+ s", shown)
    assert "fits" not in shown
    assert [line.split()[-2] for line in shown.splitlines() if "learning rate" in line or "schedule" in line] == [
        "0.0012",
        "0.021",
        "linear",
    ]
    shown = run(*TRAIN, "--method", "lst", "--cache-features", "kept", "--dry-run", "--memory-budget", "0.01").stdout
    assert re.search(r"tensors of a step fit into 0 MB +│ no", shown)
    assert "resident" not in shown
    assert re.search(r"estimated time +│ not timed: does not fit", shown), "no step is run of what does not fit"
    run(*TRAIN, "--method", "lst", "--cache-features", "kept", "--dry-run", "--memory-budget", "500")
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("form", [(), ("--quiet",)])
def test_a_dry_run_is_shown_by_the_first_process_alone(
    place: Path, monkeypatch: pytest.MonkeyPatch, form: tuple[str, ...]
) -> None:
    command = (*TRAIN, "--method", "head", "--dry-run", *form)
    assert "steps" in run(*command).stdout, "with --quiet too"
    monkeypatch.setenv("RANK", "1")
    assert run(*command).output == ""


def test_a_message_names_options_as_they_are_typed(capsys: pytest.CaptureFixture[str]) -> None:
    console.show_messages(quiet=False)
    logging.getLogger("fastpeft.training").warning("answers were cut; give more `max_new_tokens`, or set `d`")
    assert capsys.readouterr().err.rstrip() == "answers were cut; give more --max-new-tokens, or set d"


def test_quiet_says_nothing(place: Path) -> None:
    assert run(*TRAIN, "--method", "head", "--quiet").output == ""
    assert (place / "runs" / "head-reviews" / "metrics.json").is_file(), "the default output"


@pytest.mark.long(but="extra0")
@pytest.mark.parametrize("extra", [(), ("--prompt", "{text} is <mask>", "--label-words", "awful,lovely")])
def test_runs_share_cached_features(place: Path, extra: tuple[str, ...]) -> None:
    """The second reads all of them, and has the bits of the first all the same."""
    arguments = (*TRAIN, "--method", "lst", "--max-steps", "8", "--cache-features", "kept", "--quiet", *extra)
    run(*arguments, "--output", "first")
    run(*arguments, "--output", "second")
    run("train", "--config", "first/run.json", "--seed", "1", "--output", "third", "--quiet")
    first, *others = (json.loads((place / name / "metrics.json").read_text()) for name in ("first", "second", "third"))
    assert first["feature_cache"]["misses"] > 0
    assert [metrics["feature_cache"]["misses"] for metrics in others] == [0, 0]
    assert all(metrics["peak_memory_mb"] for metrics in (first, *others))
    one, two = ((place / name / "model.safetensors").read_bytes() for name in ("first", "second"))
    assert one == two
    assert json.loads((place / "first" / "run.json").read_text())["cache_features"] == str(place / "kept")


def test_a_loss_that_is_not_finite_is_told(place: Path) -> None:
    result = CliRunner().invoke(app, [*TRAIN, "--method", "full", "--output", "out", "--learning-rate", "1e30"])
    assert result.exit_code == 2
    assert "not finite after step 1" in result.stderr
    assert "No checkpoint was saved before" in " ".join(result.stderr.split())
    assert "Traceback" not in result.output


def test_info_names_every_op_and_version() -> None:
    shown = run("info").stdout
    assert fastpeft.__version__ in shown
    for choice in backends.choices():
        assert choice.op in shown
        assert choice.backend in shown


@pytest.mark.long
def test_as_a_module_in_its_own_process(place: Path) -> None:
    """What a terminal shows: nothing but our own words, and an exit code."""
    command = [sys.executable, "-m", "fastpeft", *TRAIN, "--method", "siva", "--output", "out"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    for noise in ("UserWarning", "FutureWarning", "DeprecationWarning", "LOAD REPORT", "it/s", "Traceback"):
        assert noise not in done.stderr + done.stdout
    metrics = json.loads((place / "out" / "metrics.json").read_text())
    assert metrics["command"] == shlex.join(["fastpeft", *command[3:]])
    refused = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("Error: the output folder 'out' is not empty.")
    assert refused.stdout == ""


def test_what_standard_output_cannot_encode_is_escaped() -> None:
    """As a text that `predict` answers, where the locale has an older encoding: the texts after it are answered too."""
    script = 'from fastpeft import cli; cli.app = lambda **_: print("a \u2603, caf\u00e9"); cli.main()'
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    shown = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment, check=True)
    assert shown.stdout.rstrip() == b"a \\u2603, caf\xe9"


@pytest.mark.long
def test_a_backend_that_cannot_be_had_is_one_message() -> None:
    environment = {**ENVIRONMENT, "FASTPEFT_BACKEND": "siva_linear=fast"}
    command = [sys.executable, "-m", "fastpeft", "info"]
    refused = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert refused.returncode == 2
    said = [line for line in refused.stderr.splitlines() if not re.match(r"W\d{4} ", line)]  # torch misses Triton
    assert len(said) == 1
    assert said[0].startswith("Error: FASTPEFT_BACKEND has 'siva_linear=fast'")


def test_one_thing_that_bitsandbytes_says_is_hidden(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    for message in ("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "Another thing: %s."):
        logger.warning(message, "reason")
    assert caplog.messages == ["Another thing: reason."]


def test_export(place: Path) -> None:
    run(*TRAIN, *PROMPT, "--method", "mezo", "--learning-rate", "1e-2", "--output", "out", "--quiet")
    assert "saved in whole" in run("export", "out", "whole").stdout
    assert "saved in step" in run("export", "out", "step", "--step", "4").stdout
    files = [(place / name / "model.safetensors").read_bytes() for name in ("out", "whole", "step")]
    assert files[0] == files[1] == files[2]
    run(*TRAIN, "--method", "siva", "--output", "siva", "--quiet")
    run("export", "--to", "lora", "siva", "lora")
    assert json.loads((place / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert "accuracy after" in run(*TRAIN, "--method", "head", "--model", "whole", "--output", "next").stdout


def test_a_run_by_mezo_shows_its_slope(place: Path) -> None:
    """Of steps, also where each has two micro-batches, which share one noise."""
    arguments = ("--method", "mezo", "--batch-size", "4", "--set", "gradient_accumulation_steps=2", "--output", "out")
    shown = run(*TRAIN, *PROMPT, *arguments).stderr
    assert " g " in shown
    assert "steps/s" in shown
    assert "samples/s" not in shown
    assert Journal.open(place / "out" / "mezo.journal").steps == 4
