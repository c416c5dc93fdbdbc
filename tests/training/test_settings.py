"""Settings of a run that go to the Trainer: what they may be, and one message where they cannot be used."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from samples import reviews, save_tiny_model, write_csv
from transformers import TrainingArguments

from fastpeft import CompareConfig, FastpeftError, TrainConfig, train
from fastpeft.errors import LostProcessError, NotFiniteError
from fastpeft.methods.registry import get_method
from fastpeft.mezo.trainer import MeZOConfig
from fastpeft.training.arguments import training_arguments
from fastpeft.training.evaluation import evaluate
from fastpeft.training.setup import resolve, sort_settings
from fastpeft.training.task import Task


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    place = tmp_path_factory.mktemp("place")
    save_tiny_model(place / "model")
    write_csv(place / "reviews.csv", reviews(40))
    model, data = str(place / "model"), str(place / "reviews.csv")
    return Task.load(
        TrainConfig(output=str(place / "run"), method="lora", model=model, data=data, max_steps=1, save_steps=1)
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("per_device_train_batch_size", "use batch_size"),
        ("pack_weights", "use pack_weights"),
        ("auto_find_batch_size", None),
        ("save_only_model", None),
        ("ignore_data_skip", None),
        ("bf16_full_eval", None),
        ("fp16_full_eval", None),
        ("eval_do_concat_batches", None),
        ("batch_eval_metrics", None),
        ("enable_jit_checkpoint", None),
        ("dataloader_in_order", None),
    ],
)
@pytest.mark.parametrize("method", ["lora", "siva", "k-lst", "mezo"])
def test_what_would_break_a_promise_is_refused(method: str, name: str, reason: str | None) -> None:
    message = f"{name} cannot be set as a setting; .*{reason}" if reason else f"unknown setting '{name}'; allowed for"
    with pytest.raises(FastpeftError, match=message):
        sort_settings(get_method(method), {name: True})


@pytest.mark.parametrize("name", ["target_parameters", "layer_replication"])
def test_what_siva_always_refuses_is_not_offered(name: str) -> None:
    offered = get_method("siva").settings()
    assert name not in offered
    assert name in get_method("lora").settings()
    with pytest.raises(FastpeftError, match=rf"unknown setting '{name}'; .* The name is one of lora"):
        sort_settings(get_method("siva"), {name: [[0, 1]]})
    with pytest.raises(FastpeftError) as refused:
        resolve(TrainConfig(output="run", method="siva", window=5))
    assert str(refused.value).endswith(f"targets, rank, {', '.join(offered)}.")


def test_a_setting_of_another_method_is_said_to_be_of_that(task: Task) -> None:
    with pytest.raises(FastpeftError) as refused:
        sort_settings(get_method("siva"), {"lora_alpha": 5})
    told = str(refused.value)
    assert "The name is one of lora and " in told
    assert len(told) < 600, "no list of all fields"
    with pytest.raises(FastpeftError, match=r"Did you mean weight_decay\?$"):
        sort_settings(get_method("siva"), {"weigth_decay": 5})


@pytest.mark.parametrize("method", ["k-lst", "mezo"])
def test_noise_on_embeddings_is_refused_where_it_would_do_nothing(task: Task, method: str) -> None:
    given = {"method": method, "settings": {"neftune_noise_alpha": 5.0}}
    prompt = {"prompt": "{text} It was <mask>.", "label_words": "and,a"} if method == "mezo" else {}
    with pytest.raises(FastpeftError, match="neftune_noise_alpha is for embeddings in training mode"):
        training_arguments(Task.load(replace(task.config, **given, **prompt)), "nowhere")


def test_the_loss_that_is_reported_is_not_smoothed(task: Task, tmp_path: Path) -> None:
    config = replace(task.config, output=str(tmp_path / "run"), settings={"label_smoothing_factor": 0.3})
    metrics = train(config).metrics
    assert metrics["loss"] == pytest.approx(evaluate(config.output)["loss"], rel=1e-5)


def test_what_a_later_release_adds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass
    class Later(TrainingArguments):
        learning_wave: float = 0.0

    monkeypatch.setattr("fastpeft.training.setup.arguments_of", lambda method: Later)
    assert sort_settings(get_method("lora"), {"optim": "sgd"}) == ({}, {"optim": "sgd"})
    with pytest.raises(
        FastpeftError, match=r"unknown setting 'learning_wave'; .* fields of Later, as lr_scheduler_type"
    ):
        sort_settings(get_method("lora"), {"learning_wave": 0.5})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"log_level": "x"}, "log_level is 'x'; it must be one of .*debug.*passive"),
        ({"log_level_replica": "INFO"}, "log_level_replica is 'INFO'; it must be one of"),
        ({"neftune_noise_alpha": -1}, "neftune_noise_alpha must be at least 0"),
        ({"label_smoothing_factor": -0.5}, "label_smoothing_factor must be at least 0"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"eval_steps": -2}, "eval_steps must be at least 0"),
        ({"lr_scheduler_kwargs": ""}, "lr_scheduler_kwargs"),
        ({"eval_accumulation_steps": 0}, "'eval_accumulation_steps': 0}: ZeroDivisionError: "),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"x": 1}}, "'x'"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True, "x": 1}}, "x"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": "x"}, "gradient_checkpointing_kwargs': 'x'"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"every_n_layers": 0}}, "a whole number"),
    ],
    ids=str,
)
def test_a_bad_setting_is_one_message_before_anything_is_written(
    task: Task, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(FastpeftError, match=message):
        train(replace(task.config, settings=settings))
    assert not Path(task.config.output).exists()


@pytest.mark.parametrize("error", [FastpeftError, LostProcessError, NotFiniteError])
@pytest.mark.parametrize("place", ["fastpeft.training.trainer.RunTrainer.measure", "fastpeft.support.processes.meet"])
def test_what_is_said_already_is_not_laid_to_the_settings(
    task: Task, monkeypatch: pytest.MonkeyPatch, error: type[FastpeftError], place: str
) -> None:
    def fail(*_: Any) -> None:
        raise error("in plain words")

    monkeypatch.setattr(place, fail)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)  # where there is one, no others are met
    with pytest.raises(error) as found:
        train(task.config)
    assert str(found.value) == "in plain words"


def test_a_process_computes_on_one_of_several_gpus(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Trainer takes all, by nn.DataParallel with a batch for each, and a side network refuses that."""
    begin = TrainingArguments.__post_init__

    def begin_on_two(arguments: TrainingArguments) -> None:
        begin(arguments)
        arguments._n_gpu = 2

    monkeypatch.setattr(TrainingArguments, "__post_init__", begin_on_two)
    arguments = training_arguments(task, "nowhere")
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, task.config.batch_size)


ODD = (True, 0, -1, 0.5, 1e300, "x", "", [], ["x"], {}, {"x": 1}, None)


def refusal(task: Task, method: str, settings: dict[str, Any]) -> str | None:
    """What is said of settings; None where they are taken."""
    config = replace(task.config, method=method, settings=settings)
    try:
        _, arguments = sort_settings(get_method(method), settings)
        setup = replace(task.setup, method=get_method(method), config=config, arguments=arguments)
        training_arguments(replace(task, setup=setup), "nowhere")
    except FastpeftError as error:
        return str(error)
    return None


@pytest.mark.long(but="mezo")
@pytest.mark.parametrize("method", ["lora", "mezo"])
def test_whatever_a_setting_is_it_is_taken_or_refused_in_words(task: Task, method: str) -> None:
    kind = MeZOConfig if method == "mezo" else TrainingArguments
    said = [(item.name, refusal(task, method, {item.name: odd})) for item in dataclasses.fields(kind) for odd in ODD]
    assert [(name, message) for name, message in said if message is not None and name not in message] == []
    assert sum(message is None for _, message in said) > 100
    assert not Path("nowhere").exists()


def test_a_configuration_keeps_what_it_was_given() -> None:
    settings: dict[str, Any] = {"weight_decay": 0.0}
    run = TrainConfig(output="run", settings=settings)
    comparison = CompareConfig(output="compared", methods=["lora"], common=settings)
    settings["weight_decay"] = 0.5
    assert run.settings == comparison.common == {"weight_decay": 0.0}


def test_a_path_that_run_json_cannot_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a folder whose name is in an older encoding."""
    folder = tmp_path / "Fran\udce7ois"
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this disk has no names but those in UTF-8")
    monkeypatch.chdir(folder)
    write_csv(Path("reviews.csv"), reviews(8))
    with pytest.raises(FastpeftError, match=r"the path '.*ois/reviews\.csv' is not in UTF-8\. Rename its folders"):
        TrainConfig(output="run", data="reviews.csv").values()


@pytest.mark.parametrize(
    ("name", "value", "shown", "advice"),
    [
        ("data", [{"text": "A joy.", "label": 1}] * 1000, "[{", "file and give its path"),
        ("data", Dataset.from_dict({"text": ["A joy."], "label": [1]}), "a Dataset", "file and give its path"),
        ("model", torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(99))), "a Sequential", "give the folder"),
        ("label_column", ["comedy", "drama"], "['comedy', 'drama']", "a text"),
        ("targets", ["query", "value"], "['query', 'value']", "Join them by commas: 'query,value'"),
        ("seed", np.int64(3), "np.int64(3)", "a whole number .* Give its item"),
    ],
)
def test_what_is_in_memory_is_refused_in_short(name: str, value: Any, shown: str, advice: str) -> None:
    with pytest.raises(FastpeftError, match=rf"^{name} is {re.escape(shown)}.*{advice}") as caught:
        TrainConfig(output="run", **{name: value})
    assert len(str(caught.value)) < 400
