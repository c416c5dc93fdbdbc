"""How a run's model is put together, saved and put together again: every method, head and subset."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from samples import PROMPT, SMALL, Interrupt, prompted, reviews, sampled, save_tiny_model, write_csv
from unprivileged import bound_by_modes

from fastpeft import FastpeftError, LadderModel, PromptCollator, PromptModel, TrainConfig, train
from fastpeft.data.problems import CLASSIFICATION
from fastpeft.methods.registry import METHODS
from fastpeft.methods.wrapping import merge
from fastpeft.ops.frozen_linear import PackedLinear
from fastpeft.training.arguments import recipe_used, shortness, training_arguments
from fastpeft.training.evaluation import evaluate
from fastpeft.training.loading import load_run, load_start
from fastpeft.training.run_folder import RunFolder
from fastpeft.training.setup import Head, resolve
from fastpeft.training.task import Task
from fastpeft.training.trainer import RunTrainer

SUBSETS = [name for name in SMALL if not METHODS[name].zeroth_order]


def logits(model: Any, config: TrainConfig) -> torch.Tensor:
    """Logits of the first dev rows of a run, `(4, 2)`."""
    task = Task.load(config)
    batch = PromptCollator(task.tokenizer)(task.dev_rows[:4])
    batch.pop("labels")
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**batch).logits
    return found


@pytest.mark.parametrize(("over", "head"), sampled(prompted(SUBSETS), but=("k-lst", "classifier")))
def test_mezo_trains_what_another_method_leaves_to_train(config: TrainConfig, over: str, head: str) -> None:
    settings = {"over": over, **({"layers": 1} if over == "last-n" else {})}
    config = replace(config, method="mezo", **PROMPT, prompt_head=head, settings=settings)
    before = Task.load(config).model
    other = Task.load(replace(config, method=over, settings={k: v for k, v in settings.items() if k != "over"})).model
    trained = {name for name, parameter in before.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in other.named_parameters() if parameter.requires_grad}
    result = train(config)
    after = dict(load_run(result.folder).loaded.model.named_parameters())
    assert after.keys() == dict(before.named_parameters()).keys()
    changed = {
        name
        for name, parameter in before.named_parameters()
        # PEFT keeps the original of a head, unused: what was drawn when it was loaded
        if ".original_module." not in name and not torch.equal(parameter, after[name])
    }
    assert changed <= trained
    assert len(changed) > len(trained) / 2, "biases at attention's keys have no effect"
    assert evaluate(result.folder)["accuracy"] == result.metrics["accuracy"]


# -- from one run to the next ------------------------------------------------------------------------------------------

SIVA = {"method": "siva", "rank": 2}
CHAINS = {
    "mezo, lst": ({"method": "mezo"}, {"method": "lst"}),
    "mezo, k-lst by words": ({"method": "mezo", **PROMPT}, {"method": "k-lst", "window": 3, **PROMPT}),
    "siva, k-lst": (SIVA, {"method": "k-lst"}),
    "siva by words, siva": ({**SIVA, **PROMPT}, SIVA),
    "lora, pissa": ({"method": "lora"}, {"method": "pissa"}),
    "pissa, full": ({"method": "pissa"}, {"method": "full"}),
    "ia3, lokr, full": ({"method": "ia3"}, {"method": "lokr"}, {"method": "full"}),
    "siva, full by words": (SIVA, {"method": "full", **PROMPT}),
    "full, lora by words": ({"method": "full"}, {"method": "lora", **PROMPT}),
    "k-lst, mezo over k-lst": ({"method": "k-lst"}, {"method": "mezo", "settings": {"over": "k-lst"}}),
    "k-lst by words, k-lst": ({"method": "k-lst", **PROMPT}, {"method": "k-lst"}),
    "full, siva, lst, lst": ({"method": "full"}, SIVA, {"method": "lst"}, {"method": "lst"}),
}


@pytest.mark.long(but="pissa, full")
@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_a_chain_starts_from_what_was_trained_and_loads_again(config: TrainConfig, chain: Any) -> None:
    start: str | None = None
    for number, values in enumerate(chain):
        output = f"{config.output}-{number}"
        link = replace(config, output=output, init_from=start, **{"prompt": None, "label_words": None, **values})
        if start is not None:
            before = load_run(start)
            head = Head.of(link, before.labels, CLASSIFICATION)
            begun = load_start(resolve(link).with_head(head)).model
            expected = encoder(before.loaded.model)
            assert all(torch.equal(value, expected[name]) for name, value in encoder(begun).items())
        result = train(link)
        assert evaluate(result.folder)["accuracy"] == result.metrics["accuracy"]
        start = output
    loaded: dict[str, Any] = {}
    exec((result.folder / "README.md").read_text().split("```python\n")[1].split("```")[0], loaded)
    assert torch.equal(logits(loaded["model"], link), logits(load_run(result.folder).loaded.model, link))


def encoder(model: Any) -> dict[str, torch.Tensor]:
    """Weights of the encoder inside wrappers, with an adapter merged."""
    if isinstance(model, PeftModel):
        model = merge(model)
    if isinstance(model, PromptModel):
        model = model.masked_lm
    if isinstance(model, LadderModel):
        model = model.base
    weights: dict[str, torch.Tensor] = model.base_model.state_dict()
    return weights


@pytest.mark.long(but="{'method': 'full'}-words")
@pytest.mark.parametrize("prompt", [{}, PROMPT], ids=["head", "words"])
@pytest.mark.parametrize("then", [{"method": "mezo", "settings": {"over": "k-lst"}}, SIVA, {"method": "full"}], ids=str)
def test_the_first_output_is_the_earlier_runs_last(config: TrainConfig, then: Any, prompt: Any) -> None:
    first = {"method": "k-lst"} if then["method"] == "mezo" else {"method": "lora"}
    folder = train(replace(config, **first, **prompt)).folder
    second = replace(config, output="next", init_from=str(folder), **then, **prompt)
    expected, untrained = logits(load_run(folder).loaded.model, second), replace(second, init_from=None)
    torch.testing.assert_close(logits(Task.load(second).model, second), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(Task.load(untrained).model, second), expected, rtol=1e-3, atol=1e-3)


def test_an_adapter_names_the_run_that_it_goes_onto(config: TrainConfig) -> None:
    train(config)
    adapter = Task.load(replace(config, method="lora", output="next", init_from=config.output)).model
    assert adapter.active_peft_config.base_model_name_or_path == str(Path(config.output).resolve())


def test_a_head_for_other_classes_is_new(config: TrainConfig, tmp_path: Path) -> None:
    train(config)
    renamed = [(text, {"negative": "bad", "positive": "good"}[label]) for text, label in reviews(60)]
    other = str(write_csv(tmp_path / "other.csv", renamed))
    second = replace(config, output="next", init_from=config.output)
    kept, fresh = Task.load(second).model, Task.load(replace(second, data=other)).model
    trained = load_run(config.output).loaded.model
    assert torch.equal(kept.classifier.dense.weight, trained.classifier.dense.weight)
    assert not torch.equal(fresh.classifier.dense.weight, trained.classifier.dense.weight)
    assert fresh.config.id2label == {0: "bad", 1: "good"}
    assert torch.equal(fresh.get_input_embeddings().weight, trained.get_input_embeddings().weight)


@pytest.mark.long
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (SIVA, {"method": "k-lst"}),
        (SIVA, {"method": "full"}),
        ({"method": "lst", **PROMPT}, {"method": "lst", **PROMPT}),
    ],
    ids=str,
)
def test_a_resumed_link_equals_an_unbroken_one(config: TrainConfig, first: Any, second: Any) -> None:
    train(replace(config, **first))
    link = replace(config, output=f"{config.output}-next", init_from=config.output, save_steps=2, max_steps=5, **second)
    with pytest.raises(KeyboardInterrupt):
        train(link, callbacks=[Interrupt(3)])
    resumed = train(link, resume=True).folder
    whole = train(replace(link, output=f"{config.output}-whole")).folder
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_an_earlier_run_that_is_gone_or_changed_is_named(config: TrainConfig) -> None:
    train(replace(config, **SIVA))
    link = replace(config, output=f"{config.output}-next", init_from=config.output, method="lora", save_steps=1)
    folder = train(link).folder
    train(replace(config, **SIVA, seed=1), overwrite=True)
    with pytest.raises(FastpeftError, match=rf"started from that in '{config.output}', which holds other weights"):
        load_run(folder)
    (folder / "metrics.json").unlink()
    with pytest.raises(FastpeftError, match="holds other weights"):
        train(link, resume=True)
    shutil.rmtree(config.output)
    with pytest.raises(FastpeftError, match=f"run to start from is not there: '{config.output}'"):
        train(link, resume=True)


@pytest.mark.parametrize("name", ["model", "init_from"])
def test_where_to_say_that_what_a_run_began_with_moved(config: TrainConfig, tmp_path: Path, name: str) -> None:
    shutil.copytree(config.model, tmp_path / "model")
    config = replace(config, model=str(tmp_path / "model"))
    train(replace(config, **SIVA))
    link = replace(config, output=f"{config.output}-next", init_from=config.output, method="lora")
    run = link if name == "init_from" else replace(config, **SIVA)
    folder = train(run, resume=True).folder
    before = Path(getattr(run, name))
    after = before.rename(tmp_path / "moved")
    with pytest.raises(FastpeftError, match=rf"'{folder}' began with is not at '{before}'.*run\.json .* as {name}"):
        load_run(folder)
    with pytest.raises(FastpeftError, match=rf"Where {name} only moved, write the new path into {folder}/run\.json"):
        train(replace(run, **{name: str(after)}), resume=True)
    values = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(values | {name: str(after)}))
    load_run(folder)


def test_a_cpu_packs_weights_by_whatever_name_it_is_given(config: TrainConfig) -> None:
    folder = train(replace(config, method="siva")).folder
    for device in ("cpu", "cpu:0"):
        assert any(type(module) is PackedLinear for module in load_run(folder, device).loaded.model.modules())


@pytest.mark.parametrize("method", ["siva", "lst", "head"])
def test_weights_that_another_user_keeps_to_himself_are_not_called_missing(config: TrainConfig, method: str) -> None:
    folder = train(replace(config, method=method)).folder
    (weights,) = folder.glob("*model.safetensors")
    assert weights.stat().st_mode == (folder / "run.json").stat().st_mode
    weights.chmod(0)
    with bound_by_modes(), pytest.raises(FastpeftError, match=rf"cannot read '{weights}' \(Permission denied\)\. Let"):
        load_run(folder)


def test_the_model_is_that_of_the_earlier_run(config: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    train(replace(config, **PROMPT))
    second = TrainConfig(output="next", init_from=config.output, data=config.data, max_steps=1)
    assert second.model == config.model
    with caplog.at_level("INFO", "fastpeft"):
        Task.load(second)
    assert "had a prompt, this one has none" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO", "fastpeft"):
        Task.load(replace(second, **PROMPT))
    assert "had a prompt" not in caplog.text


# -- recipes -----------------------------------------------------------------------------------------------------------


def test_a_recipe_gives_what_nobody_else_does(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, method="siva", learning_rate=None, max_steps=None)
    task = Task.load(config)
    epochs = 300  # of 4 steps, as 54 rows are in batches of 16: so few are passed over until they come to 1,200
    assert recipe_used(task, training_arguments(task, str(tmp_path))) == {
        "learning_rate": 1e-3,
        "head_learning_rate": 0.021,  # 0.008 at a width of 1,024, of which this has less than 384
        "schedule": "linear",
        "warmup_steps": round(0.06 * 1_200),
        "weight_decay": 0.0,
        "epochs": epochs,
    }
    own = {"lr_scheduler_type": "constant", "weight_decay": 0.5, "warmup_steps": 3}
    given = {"learning_rate": 1e-6, "head_learning_rate": 1e-5, "epochs": 1, "settings": own}
    task = Task.load(replace(config, **given))
    assert recipe_used(task, training_arguments(task, str(tmp_path))) == {
        "learning_rate": 1e-6,
        "head_learning_rate": 1e-5,
        "schedule": "constant",
        "warmup_steps": 3,
        "weight_decay": 0.5,
        "epochs": 1,
    }


@pytest.mark.parametrize("method", SUBSETS)
def test_a_new_head_has_a_rate_of_its_own(config: TrainConfig, method: str, tmp_path: Path) -> None:
    task = Task.load(replace(config, method=method, head_learning_rate=0.25))
    trainer = RunTrainer(task, training_arguments(task, str(tmp_path)), RunFolder(tmp_path), [])
    optimizer = trainer.create_optimizer()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    trained = {name: rates.pop(id(p)) for name, p in task.model.named_parameters() if p.requires_grad}
    assert not rates, "and each parameter is in one group"
    fast = {name for name, rate in trained.items() if rate == 0.25}
    assert fast == {name for name in trained if "classifier" in name} != set()
    assert {rate for name, rate in trained.items() if name not in fast} <= {trainer.args.learning_rate}


def test_a_new_head_decays_and_falls_as_all_else(config: TrainConfig, tmp_path: Path) -> None:
    task = Task.load(replace(config, method="full", learning_rate=0.5, head_learning_rate=0.25))
    arguments = training_arguments(task, str(tmp_path))

    def optimized(task: Task) -> RunTrainer:
        trainer = RunTrainer(task, arguments, RunFolder(tmp_path), [])
        trainer.create_optimizer_and_scheduler(10)
        return trainer

    def decays(trainer: RunTrainer) -> dict[int, float]:
        return {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}

    found = optimized(task)
    assert decays(found) == decays(optimized(replace(task, new_head=())))
    assert {*decays(found).values()} == {0.0, arguments.weight_decay} != {0.0}
    for _ in range(3):
        found.lr_scheduler.step()
        fast, slow = sorted({group["lr"] for group in found.optimizer.param_groups})
        assert 2 * fast == pytest.approx(slow)


def test_a_head_that_is_not_new_has_the_rate_of_all_else(config: TrainConfig) -> None:
    first = train(replace(config, method="lora", max_steps=1)).folder
    assert Task.load(replace(config, method="lora")).head_learning_rate > 1e-2
    later = replace(config, method="lora", init_from=str(first), output="runs/later")
    assert Task.load(later).head_learning_rate is None
    assert Task.load(replace(config, method="siva", **PROMPT)).head_learning_rate is None, "nor have label words"
    given = "head_learning_rate is 0[.]1"
    for old_head in later, replace(config, method="siva", **PROMPT), replace(config, method="siva", objective="mlm"):
        with pytest.raises(FastpeftError, match=rf"{given}, which is for a head that begins at random, but '.*Leave"):
            Task.load(replace(old_head, head_learning_rate=0.1))
    with pytest.raises(FastpeftError, match=rf"{given}, but MeZO has one rate"):
        resolve(replace(config, method="mezo", **PROMPT, head_learning_rate=0.1))


def test_only_what_was_drawn_at_random_has_the_rate_of_a_new_head(config: TrainConfig, tmp_path: Path) -> None:
    trained = train(replace(config, method="full", max_steps=1)).folder
    pretrained = str(trained)  # a classifier of the same classes
    assert Task.load(replace(config, method="lora", model=pretrained)).head_learning_rate is None
    three = str(write_csv(tmp_path / "three.csv", reviews(60, ("negative", "positive", "mixed"))))
    of_others = Task.load(replace(config, method="lora", model=pretrained, data=three))
    assert of_others.new_head == ("classifier",), "whose shape is another"
    modern = str(save_tiny_model(tmp_path / "modern", "ModernBert"))
    assert Task.load(replace(config, method="siva", model=modern)).new_head == ("classifier",), "its `head` is there"


def test_a_run_too_short_to_learn_says_so(config: TrainConfig, tmp_path: Path) -> None:
    def told(**given: Any) -> str:
        task = Task.load(replace(config, **{"max_steps": None, **given}))
        return shortness(task, training_arguments(task, str(tmp_path)))

    assert told() == told(max_steps=600) == told(method="mezo", **PROMPT, max_steps=9) == ""
    assert re.search(
        "the run has 599 steps, in which full fine-tuning .* at least 1,200, which are 300 epochs", told(max_steps=599)
    )


def test_a_decoder_has_its_own_recipes() -> None:
    for method in METHODS.values():
        plain, causal_lm = method.recipe, method.recipe.for_model(causal_lm=True)
        assert causal_lm.epochs == plain.epochs == (12 if method.zeroth_order else 3)
        assert causal_lm.least_steps == 0
        assert causal_lm.learning_rate >= plain.learning_rate
    config, recipe = TrainConfig(output="out", method="lst", objective="causal"), METHODS["lst"].recipe
    assert resolve(config).recipe == recipe.for_model(causal_lm=True)
    assert resolve(replace(config, objective="mlm")).recipe == recipe.for_model(hidden_size=384)
