"""One run: what it leaves behind, what it takes, and how it stops."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from samples import Interrupt, eleven_steps, reviews, save_tiny_model, tree, weights_of, write_csv
from transformers import AutoModelForSequenceClassification, TrainerCallback
from transformers.models.roberta.modeling_roberta import RobertaPreTrainedModel

from fastpeft import FastpeftError, TrainConfig, train
from fastpeft.data.examples import load_data
from fastpeft.errors import NotEnoughMemoryError
from fastpeft.training.estimates import plan
from fastpeft.training.evaluation import evaluate
from fastpeft.training.loading import put
from fastpeft.training.optimizer_in_backward import StepsInBackward
from fastpeft.training.prediction import predict
from fastpeft.training.row_order import LengthGroupedOrder
from fastpeft.training.session import tell_of_beginnings
from fastpeft.training.task import data_for


@pytest.fixture
def config(tmp_path: Path, place: Path) -> TrainConfig:
    return eleven_steps(tmp_path, place)


def test_a_run_whose_last_step_destroys_the_weights_does_not_finish(config: TrainConfig) -> None:
    with pytest.raises(FastpeftError, match=r"not finite after step 1.*peak is 1e\+30.*No checkpoint was saved before"):
        train(replace(config, max_steps=1, learning_rate=1e30))
    assert not Path(config.output, "metrics.json").exists()


LACKS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
]


def run_out(error: Exception) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize("error", LACKS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["prediction_step", "training_step"])
def test_a_lack_of_memory_is_one_message(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, error: Exception, where: str
) -> None:
    monkeypatch.setattr(f"transformers.Trainer.{where}", run_out(error))
    with pytest.raises(NotEnoughMemoryError) as found:
        train(replace(config, settings={"per_device_eval_batch_size": 5}))
    message, cause = str(found.value), found.value.__cause__
    assert "not enough for batch_size 8, or for measuring 5 rows at once, with rows of up to " in message
    assert f"({str(error).rstrip('.') or 'MemoryError'}). Give a smaller batch_size" in message
    assert "smaller max_length, or --set per_device_eval_batch_size=N for measuring, or --set grad" in message
    assert "or dtype bfloat16; --dry-run" in message
    assert ("Nothing of the run is saved; start it again with" in message) is (where == "training_step")
    assert error in (cause, cause and cause.__cause__)


@pytest.mark.parametrize(
    ("changes", "left_out"),
    [
        ({"method": "mezo"}, ("checkpointing", "bfloat16")),
        ({"settings": {"gradient_checkpointing": True}}, ("checkpointing",)),
        ({"batch_size": 1, "dtype": "bfloat16"}, ("smaller batch_size", "bfloat16")),
        ({"method": "full", "optimizer_in_backward": True}, ("accumulation", "bfloat16")),
    ],
    ids=str,
)
def test_what_cannot_save_memory_is_not_advised(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], left_out: tuple[str, ...]
) -> None:
    monkeypatch.setattr("transformers.Trainer.prediction_step", run_out(LACKS[0]))
    with pytest.raises(NotEnoughMemoryError, match="smaller max_length") as found:
        train(replace(config, **changes))
    assert [words for words in left_out if words in str(found.value)] == []


def test_a_lack_of_memory_is_not_laid_to_the_checkpoint(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(config, save_steps=2)
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[Interrupt(3)])
    monkeypatch.setattr("transformers.Trainer._load_from_checkpoint", run_out(LACKS[0]))
    with pytest.raises(NotEnoughMemoryError, match=r"The newest checkpoint is .*checkpoint-2; resume with") as found:
        train(config, resume=True)
    assert "Delete" not in str(found.value)


@pytest.mark.parametrize("error", LACKS[:2], ids=lambda error: type(error).__name__)
def test_a_lack_of_memory_is_not_laid_to_what_is_loaded(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    folder = train(replace(config, max_steps=1)).folder
    with monkeypatch.context() as patch:
        patch.setattr("peft.PeftModel.from_pretrained", run_out(error))
        with pytest.raises(type(error)) as found:
            predict(folder, ["a dull plot"])
    assert found.value is error
    with monkeypatch.context() as patch:
        patch.setattr("torch.nn.Module.__call__", run_out(error))
        with pytest.raises(NotEnoughMemoryError, match=r"for one row .* Give shorter texts"):
            predict(folder, ["a dull plot"])
    model: Any = SimpleNamespace(to=run_out(error))
    with pytest.raises(NotEnoughMemoryError, match=r"memory of cuda is not enough for the model .* hide the GPU"):
        put(model, "cuda")
    monkeypatch.setattr("peft.get_peft_model", run_out(error))
    with pytest.raises(type(error)):
        train(replace(config, output="again"))
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", run_out(error))
    with pytest.raises(NotEnoughMemoryError, match=r"to load the model .* choose a smaller model"):
        predict(folder, ["a dull plot"])


def test_rows_are_held_out_as_the_configuration_says(config: TrainConfig) -> None:
    data = data_for(replace(config, split_seed=3))
    assert data == load_data(config.data, split_seed=3)
    assert data.dev != data_for(config).dev


def test_training_learns_and_predictions_name_classes(config: TrainConfig) -> None:
    given = {"epochs": 12, "learning_rate": 1e-2, "head_learning_rate": 1e-2}
    folder = train(replace(config, method="full", **given)).folder
    texts = ["the film is lovely and the plot is a story with a scene", "a dull plot", "the story was funny"]
    guesses = predict(folder, texts)
    assert [label for label, _ in guesses] == ["positive", "negative", "positive"]
    assert all(0.5 <= probability <= 1 for _, probability in guesses)
    alone = [predict(folder, [text])[0][1] for text in texts]
    assert [probability for _, probability in guesses] == pytest.approx(alone, abs=1e-5)
    assert predict(folder, []) == []
    with pytest.raises(FastpeftError, match="texts is one text, 'hello'"):
        predict(folder, "hello")


@pytest.mark.parametrize("strict", [True, False])
def test_a_run_leaves_the_callers_determinism(config: TrainConfig, strict: bool) -> None:
    torch.use_deterministic_algorithms(True, warn_only=not strict)
    try:
        train(replace(config, method="head", max_steps=1))
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled() is not strict
    finally:
        torch.use_deterministic_algorithms(False)


def test_overwrite_replaces_a_run_and_nothing_else(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, max_steps=2, save_steps=1)
    folder = train(config).folder
    assert (folder / "checkpoints").is_dir()
    (folder / "notes.txt").write_text("mine")
    inner = train(replace(config, output=str(folder / "inner"), method="head")).folder
    before = tree(inner)
    train(replace(config, method="full", save_steps=None), overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"
    assert tree(inner) == before
    assert not (folder / "checkpoints").exists()
    assert not (folder / "adapter_config.json").exists()
    foreign = tmp_path / "home"
    foreign.mkdir()
    (foreign / "run.json").write_text('{"mine": 1}')
    for flags in ({"overwrite": True}, {"resume": True}, {}):
        with pytest.raises(FastpeftError, match="is not empty"):
            train(replace(config, output=str(foreign)), **flags)
    assert tree(foreign) == {"run.json": b'{"mine": 1}'}


def test_failed_overwrite_leaves_the_old_run(config: TrainConfig) -> None:
    config = replace(config, max_steps=2)
    folder = train(config).folder
    before = tree(folder)
    for change in ({"rank": 99}, {"data": "nowhere.csv"}, {"model": "./nowhere"}, {"settings": {"warmup_steps": -5}}):
        with pytest.raises(FastpeftError):
            train(replace(config, **change), overwrite=True)
    assert tree(folder) == before


class Draws(TrainerCallback):
    """Draws a random number before the first step."""

    def on_init_end(self, *_: Any, **__: Any) -> None:
        torch.rand(1)


def test_equal_runs_are_equal_to_the_bit(config: TrainConfig, tmp_path: Path) -> None:
    """Dropout starts alike, whatever was computed before."""
    config = replace(config, method="siva", max_steps=6, deterministic=True)
    first = train(config)
    again = train(replace(config, output=str(tmp_path / "again")), callbacks=[Draws()])
    other = train(replace(config, output=str(tmp_path / "other"), seed=1))
    one, same, different = (weights_of(run.folder) for run in (first, again, other))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], different[name]) for name in one)
    assert not torch.are_deterministic_algorithms_enabled()


class Poison(TrainerCallback):
    """Makes the embeddings of a model infinite after `step`, as a step that diverged would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step:
            model.get_input_embeddings().weight.data.fill_(math.inf)


def test_a_step_that_diverges_keeps_the_weights_before_it(config: TrainConfig) -> None:
    config = replace(config, method="full", learning_rate=1e30, save_steps=1)
    with pytest.raises(FastpeftError, match=r"at step (\d+), .*weights before that step are in .*last-good") as error:
        train(config)
    good = Path(config.output) / "last-good"
    model = AutoModelForSequenceClassification.from_pretrained(good)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert "checkpoint-2" in str(error.value)
    assert not (Path(config.output) / "metrics.json").exists()
    with pytest.raises(FastpeftError, match="not finished"):
        evaluate(config.output)


def test_weights_that_are_spoilt_already_are_not_kept(config: TrainConfig) -> None:
    config = replace(config, method="head", save_steps=2)
    with pytest.raises(FastpeftError, match=r"at step 4, .*no longer finite.*checkpoint-2"):
        train(config, callbacks=[Poison(3)])
    assert not (Path(config.output) / "last-good").exists()


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every gradient is stepped with as it comes."""
    monkeypatch.setattr("fastpeft.training.trainer.StepsInBackward", functools.partial(StepsInBackward, bucket=1))


@pytest.mark.usefixtures("small_buckets")
def test_an_optimizer_in_backward_trains_and_resumes_to_the_same_bits(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, method="k-lst", max_steps=6, save_steps=2, settings={"max_grad_norm": 0.0})
    after = train(config)
    within = replace(config, output=str(tmp_path / "within"), optimizer_in_backward=True)
    with pytest.raises(KeyboardInterrupt):
        train(within, callbacks=[Interrupt(3)])
    resumed = train(within, resume=True)
    expected, found = weights_of(after.folder), weights_of(resumed.folder)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.usefixtures("small_buckets")
def test_an_optimizer_in_backward_stops_before_weights_are_spoilt(config: TrainConfig) -> None:
    config = replace(config, method="full", learning_rate=1e30, optimizer_in_backward=True)
    with pytest.raises(FastpeftError, match=r"at step (\d+), .*may have made that step, are in .*last-good"):
        train(config)
    model = AutoModelForSequenceClassification.from_pretrained(Path(config.output) / "last-good")
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"settings": {"max_grad_norm": 1.0}}, r"max_grad_norm=1.0 needs all gradients .* must be 0"),
        ({"settings": {"gradient_accumulation_steps": 2}}, "must be 1"),
        ({"settings": {"optim": "adafactor"}}, "goes with optim=adamw_torch or"),
        ({"method": "mezo"}, "no gradients"),
    ],
)
def test_what_an_optimizer_in_backward_does_not_go_with(
    config: TrainConfig, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(FastpeftError, match=reason):
        train(replace(config, optimizer_in_backward=True, **changes))
    assert not Path(config.output).exists()


def test_what_cannot_be_measured_leaves_no_folder(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("the head has another shape")

    monkeypatch.setattr("fastpeft.training.trainer.RunTrainer.measure", fail)
    with pytest.raises(FastpeftError, match="the head has another shape"):
        train(config)
    assert not Path(config.output).exists()


@pytest.mark.long(but="siva")
@pytest.mark.parametrize("method", ["siva", "full", "k-lst"])
def test_activations_can_be_computed_again(config: TrainConfig, method: str) -> None:
    config = replace(config, method=method, max_steps=2, settings={"gradient_checkpointing": True})
    told = plan(config)
    result = train(config)
    assert result.metrics["steps"] == 2
    assert result.metrics["estimated_memory_mb"] == told.peak_memory_mb
    assert told.peak_memory_mb is not None


def test_side_blocks_are_computed_again_beside_a_model_that_computes_nothing_again(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RobertaPreTrainedModel, "supports_gradient_checkpointing", False)  # as MPNet's
    config = replace(config, max_steps=2, settings={"gradient_checkpointing": True})
    assert train(replace(config, method="lst")).metrics["steps"] == 2
    with pytest.raises(FastpeftError, match="SiVA does not support gradient_checkpointing on this model"):
        train(replace(config, method="siva", output=f"{config.output}-siva"))


def test_bf16_trains_float32_weights(config: TrainConfig) -> None:
    result = train(replace(config, method="full", bf16=True, max_steps=2))
    assert {tensor.dtype for tensor in weights_of(result.folder).values()} == {torch.float32}
    assert math.isfinite(result.metrics["loss"])


@pytest.mark.parametrize("given", [{}, {"model": "demo"}, {"model": "demo", "data": "demo"}], ids=str)
def test_a_model_that_a_beginner_may_not_have_meant_is_said(
    config: TrainConfig, caplog: pytest.LogCaptureFixture, given: Any
) -> None:
    caplog.set_level("INFO")
    tell_of_beginnings(replace(config, **given))
    assert ("the model is 'demo', the bundled one" in caplog.text) is (given == {"model": "demo"})


@pytest.mark.parametrize(("gpus", "processes", "told"), [(1, 1, False), (2, 1, True), (2, 2, False)])
def test_gpus_that_a_process_leaves_out_are_said(
    config: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    gpus: int,
    processes: int,
    told: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    caplog.set_level("INFO")
    tell_of_beginnings(config)
    assert ("torchrun --nproc-per-node=2 takes all" in caplog.text) is told


def test_settings_reach_the_method_and_the_trainer(config: TrainConfig) -> None:
    settings = {"lora_alpha": 5, "gradient_accumulation_steps": 4, "lr_scheduler_type": "constant"}
    result = train(replace(config, epochs=1, settings=settings))
    assert json.loads((result.folder / "adapter_config.json").read_text())["lora_alpha"] == 5
    assert result.metrics["steps"] == math.ceil(math.ceil(81 / 8) / 4)
    assert evaluate(result.folder)["accuracy"] == result.metrics["accuracy"]


def test_settings_take_what_the_type_of_their_field_allows(config: TrainConfig) -> None:
    result = train(replace(config, settings={"init_lora_weights": "pissa"}, max_steps=4))
    assert evaluate(result.folder)["accuracy"] == result.metrics["accuracy"]


def test_settings_reach_the_loader_of_training_rows(config: TrainConfig) -> None:
    class Loader(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.found = kwargs["train_dataloader"]

    settings = {
        "dataloader_num_workers": 1,
        "dataloader_prefetch_factor": 3,
        "dataloader_persistent_workers": True,
    }
    loader = Loader()
    train(replace(config, settings=settings, max_steps=1), callbacks=[loader])
    assert (loader.found.num_workers, loader.found.prefetch_factor, loader.found.persistent_workers) == (1, 3, True)


@pytest.mark.long
def test_a_plan_tells_what_training_does_and_writes_nothing(config: TrainConfig, tmp_path: Path) -> None:
    settings = {"gradient_accumulation_steps": 5}  # of 81 rows 11 batches, and of these 3 steps an epoch
    config = replace(config, method="siva", epochs=1.5, settings=settings)
    before = tree(tmp_path)
    told = plan(config)
    assert tree(tmp_path) == before
    done = train(config).metrics
    assert (told.trainable_parameters, told.parameters) == (done["trainable_parameters"], done["parameters"])
    assert (told.steps, told.train_rows, told.dev_rows) == (5, 81, 9)
    assert (done["steps"], done["train_rows"], done["dev_rows"]) == (5, 81, 9)
    assert told.peak_memory_mb == done["peak_memory_mb"]


def test_each_row_comes_once_an_epoch_among_its_like() -> None:
    lengths = [7 * number % 60 for number in range(333)]
    order = LengthGroupedOrder(lengths, batch_size=8, seed=3)
    first = list(order)
    assert sorted(first) == list(range(333))
    assert list(order) == first
    batches = [first[k : k + 8] for k in range(0, 328, 8)]
    sizes = [[lengths[i] for i in batch] for batch in batches]
    assert sum(max(batch) - min(batch) for batch in sizes) / len(sizes) < 10 < 60
    assert sizes != sorted(sizes, key=min), "short texts come no earlier"
    order.epoch = 1
    others = list(order)
    assert not {*map(frozenset, batches)} <= {frozenset(others[k : k + 8]) for k in range(0, 328, 8)}


def test_accumulated_batches_are_one_of_all_their_rows(tmp_path: Path) -> None:
    """For a model whose loss takes no notice of how many rows the step has, too."""
    model = save_tiny_model(tmp_path / "model", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    (tmp_path / "data").mkdir()
    for name in ("train", "dev"):
        write_csv(tmp_path / "data" / f"{name}.csv", reviews(16))
    found = []
    for batch_size in (16, 8, 4):
        settings = {"optim": "sgd", "warmup_steps": 0, "gradient_accumulation_steps": 16 // batch_size}
        given = {"output": str(tmp_path / f"{batch_size}"), "model": str(model), "data": str(tmp_path / "data")}
        config = TrainConfig(
            **given, max_steps=3, batch_size=batch_size, learning_rate=0.5, bf16=False, settings=settings
        )
        result = train(config)
        found.append(weights_of(result.folder))
    for name, tensor in found[0].items():
        for other in found[1:]:
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6)
