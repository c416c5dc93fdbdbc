"""An adapter that trains beside the side network: SiVA in the backbone's last layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from backbones import IDS, MASK, classifier, ladder, logits, tiny, train_a_little, trainable
from safetensors.torch import load_file
from samples import Interrupt, pickle_adapter, reviews, write_csv
from torch import Tensor, nn

from fastpeft import FastpeftError, LadderConfig, LadderModel, LadderPool, SivaConfig, TrainConfig, train
from fastpeft.training.estimates import plan
from fastpeft.training.evaluation import evaluate
from fastpeft.training.loading import load_run
from fastpeft.training.memory import simulate_training_step
from fastpeft.training.task import Task

LABELS = torch.tensor([0, 1, 2])


def with_siva(layers: list[int], base: Any = None, **changes: Any) -> Any:
    """A tiny model with SiVA in some layers."""
    return peft.get_peft_model(base or tiny(), SivaConfig(r=2, layers_to_transform=layers, **changes))


def beside(layers: list[int], **changes: Any) -> LadderModel:
    return ladder(with_siva(layers, **changes).eval(), train_adapters=True)


@pytest.mark.parametrize("config", [SivaConfig(r=2), peft.LoraConfig(r=2, target_modules=["query", "value"])], ids=type)
@pytest.mark.parametrize("put", [peft.get_peft_model, lambda model, config: model.add_adapter(config)])
def test_an_adapter_around_a_side_network_is_refused(put: Callable[[Any, Any], Any], config: Any) -> None:
    with pytest.raises(
        FastpeftError, match=r"into base\.\S+query of a LadderModel, where it would learn nothing.*into the base first"
    ):
        put(ladder(), config)


# -- what trains -----------------------------------------------------------------------------------------------------


def test_the_adapter_trains_and_the_backbone_does_not() -> None:
    model = beside([2], target_modules=["query", "key"])
    assert len(model.adapters) == 4
    assert all(".layer.2." in name for name in model.adapters)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train_a_little(model)
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert model.adapters.keys() <= changed
    assert changed <= trainable(model).keys()


def test_the_adapter_drops_while_it_trains_and_the_backbone_does_not() -> None:
    lora = peft.LoraConfig(target_modules=["query"], lora_dropout=0.5)
    model = ladder(peft.get_peft_model(tiny(), lora), train_adapters=True).train()
    drops = {name: module for name, module in model.base.named_modules() if isinstance(module, nn.Dropout)}
    dropping = {name for name, module in drops.items() if module.training}
    assert {name.rpartition(".lora_dropout")[0][-5:] for name in dropping if "lora_dropout" in name} == {"query"}
    assert all("lora_dropout" in name or "classifier" in name for name in dropping)
    train_a_little(model)
    assert not any(module.training for module in model.modules())
    assert logits(model).equal(logits(model))
    without = ladder(peft.get_peft_model(tiny(), lora)).train()
    assert not any(module.training for name, module in without.base.named_modules() if "lora_dropout" in name)


def test_features_that_change_as_it_trains_are_not_cached(tmp_path: Path) -> None:
    with pytest.raises(FastpeftError, match="train_adapters"):
        beside([2]).cache_features(tmp_path / "features")
    assert not (tmp_path / "features").exists()


def test_an_adapter_of_another_name_is_refused() -> None:
    """PEFT saves it in a folder of its name, where loading would not look."""
    base = peft.get_peft_model(tiny(), SivaConfig(r=2, layers_to_transform=[2]), adapter_name="film")
    with pytest.raises(FastpeftError, match=r"the adapter 'film'.* saved as 'default'"):
        ladder(base, train_adapters=True)


def test_at_the_start_it_computes_what_the_side_network_alone_does() -> None:
    torch.testing.assert_close(logits(beside([1])), logits(ladder()), rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_a_backbone_that_runs_with_gradients_throughout() -> None:
    model = beside([1])
    train_a_little(model)  # so that no factor is where its gradient vanishes
    model.zero_grad()
    model(IDS, attention_mask=MASK, labels=LABELS).loss.backward()
    found = {name: p.grad.clone() for name, p in trainable(model).items()}
    model.zero_grad()
    model.gradients_from = 0
    model(IDS, attention_mask=MASK, labels=LABELS).loss.backward()
    assert found.keys() > model.adapters.keys()
    for name, gradient in found.items():
        assert gradient.abs().sum() > 0 or "fusion" in name, name
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, msg=name)


@pytest.mark.parametrize(("layers", "first"), [([0, 2], 1), ([1], 2), ([2], 3)])
def test_layers_below_the_first_adapted_one_make_no_graph(layers: list[int], first: int) -> None:
    model = beside(layers).train()
    seen: list[bool] = []
    for layer in model.backbone.layers:
        layer.register_forward_hook(
            lambda module, args, output: seen.append(
                (output if isinstance(output, Tensor) else output[0]).requires_grad
            )
        )
    model(IDS, attention_mask=MASK, labels=LABELS)
    assert seen == [number >= first for number in (1, 2, 3)]
    assert torch.is_grad_enabled()
    with torch.no_grad():
        assert not model(IDS, labels=LABELS).loss.requires_grad


def test_an_adapter_before_the_layers_trains_too() -> None:
    config = peft.LoraConfig(target_modules=["word_embeddings"], init_lora_weights=False)
    model = ladder(peft.get_peft_model(tiny(), config), train_adapters=True).train()
    model(IDS, attention_mask=MASK, labels=LABELS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.adapters.values())


def test_without_an_adapter_it_is_refused() -> None:
    with pytest.raises(FastpeftError, match="has no adapter in its layers"):
        ladder(tiny(), train_adapters=True)


def test_memory_grows_by_the_adapted_layers_alone() -> None:
    batch = {name: torch.zeros(8, 32, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    batch["labels"] = torch.zeros(8, dtype=torch.long)
    shape = {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 64}

    def activations(layers: list[int]) -> int:
        base = with_siva(layers, tiny(**shape)) if layers else tiny(**shape)
        config = LadderConfig(window_size=3, reduction_factor=4, train_adapters=bool(layers))
        return simulate_training_step(LadderModel(base, config).train(), batch).activations

    none, one, two, four = (activations(list(range(4 - count, 4))) for count in (0, 1, 2, 4))
    assert 0 < one - none < two - one + 0.2 * (two - none)
    assert two - one == pytest.approx((four - two) / 2, rel=0.25)


def test_a_pool_refuses_it_and_keeps_its_backbone(tmp_path: Path) -> None:
    model = beside([2])
    model.save_pretrained(tmp_path)
    pool = LadderPool(tiny())
    before = {name: value.clone() for name, value in pool.base.state_dict().items()}
    for side in (model, tmp_path):
        with pytest.raises(FastpeftError, match="trained together with an adapter inside the backbone"):
            pool.add("one", side)
    assert all(value.equal(before[name]) for name, value in pool.base.state_dict().items())


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", ["frozen", "implicit"])
@pytest.mark.parametrize("given", ["nothing", "base", "wrapped"])
def test_save_and_load_to_the_bit(tmp_path: Path, checkpoint: Path, residual: str, given: str) -> None:
    def wrapped() -> Any:
        return with_siva([1], classifier(checkpoint), residual=residual)

    model = train_a_little(ladder(wrapped(), train_adapters=True))
    model.save_pretrained(tmp_path)
    bases = {"nothing": None, "base": classifier(checkpoint), "wrapped": wrapped()}
    loaded = LadderModel.from_pretrained(tmp_path, base=bases[given])
    assert logits(loaded).equal(logits(model))
    assert all(parameter.requires_grad for parameter in loaded.adapters.values())
    assert model.adapters.keys() < load_file(tmp_path / "model.safetensors").keys()


def test_peft_reads_the_adapter_alone(tmp_path: Path, checkpoint: Path) -> None:
    base = classifier(checkpoint)
    train_a_little(ladder(with_siva([1], base), train_adapters=True)).save_pretrained(tmp_path)
    alone = peft.PeftModel.from_pretrained(classifier(checkpoint), str(tmp_path / "adapter"))
    states = [m(IDS, attention_mask=MASK).last_hidden_state for m in (alone.roberta.eval(), base.roberta.eval())]
    assert states[0].equal(states[1])
    pickle_adapter(tmp_path / "adapter")
    with pytest.raises(FastpeftError, match="no other format is read"):
        LadderModel.from_pretrained(tmp_path, base=classifier(checkpoint))


# -- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path, checkpoint: Path) -> TrainConfig:
    write_csv(tmp_path / "reviews.csv", reviews(60))
    return TrainConfig(
        output=str(tmp_path / "run"),
        method="k-lst",
        window=3,
        model=str(checkpoint),
        data=str(tmp_path / "reviews.csv"),
        max_steps=4,
        learning_rate=1e-2,
        settings={"siva_layers": 1},
    )


PROMPT = {"prompt": "{text} it is <mask>", "label_words": "awful,lovely"}


@pytest.mark.long(but="changes2")
@pytest.mark.parametrize("changes", [{}, PROMPT, {"method": "mezo", "settings": {"over": "lst", "siva_layers": 1}}])
def test_a_run_is_measured_as_it_was_trained(config: TrainConfig, changes: dict[str, Any]) -> None:
    config = replace(config, **changes, **({"window": None} if "method" in changes else {}))
    result = train(config)
    again = evaluate(result.folder)
    assert (again["accuracy"], again["loss"]) == pytest.approx((result.metrics["accuracy"], result.metrics["loss"]))
    more = {**config.settings, "siva_layers": 2}
    if "method" not in changes:
        assert plan(config).peak_memory_mb < plan(replace(config, settings=more)).peak_memory_mb


@pytest.mark.long
def test_a_run_resumes_and_takes_its_best_checkpoint_with_the_adapter(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, save_steps=1, metric="loss", settings={**config.settings, "lr_scheduler_type": "constant"})
    whole = train(config)
    config = replace(config, output=str(tmp_path / "resumed"))
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[Interrupt(2)])
    resumed = train(config, resume=True)
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (whole.folder / file).read_bytes() == (resumed.folder / file).read_bytes(), file
    assert evaluate(whole.folder)["loss"] == pytest.approx(whole.metrics["loss"])
    train(replace(config, settings={}), overwrite=True)
    assert not (resumed.folder / "adapter").exists()


@pytest.mark.long(but="None-prompt")
@pytest.mark.parametrize("changes", [{}, PROMPT], ids=["classifier", "prompt"])
@pytest.mark.parametrize("layers", [None, 1])
def test_a_side_network_and_its_adapter_go_on(
    config: TrainConfig, tmp_path: Path, changes: dict[str, Any], layers: int | None
) -> None:
    words = train(replace(config, objective="mlm"))
    settings = {} if layers is None else {"siva_layers": layers}
    then = replace(config, **changes, init_from=str(words.folder), output=str(tmp_path / "then"), settings=settings)
    task = Task.load(then)
    begun, trained = task.model.masked_lm if changes else task.model, load_run(words.folder).loaded.model
    rows = {"input_ids": torch.tensor([[0, 5, 6, 7, 2]])}
    with torch.no_grad():
        states = [m.eval()(**rows, output_hidden_states=True).hidden_states for m in (begun, trained)]
    for one, two in zip(*states):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert bool(begun.adapters) == (layers is not None)
    result = train(then)
    assert evaluate(result.folder)["loss"] == pytest.approx(result.metrics["loss"])


def test_siva_beside_a_side_network_takes_other_layers_and_another_rank(
    config: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wide = replace(config, targets="all-linear", rank=2)
    inside = {name.partition(".layer.")[2].partition(".siva_")[0] for name in Task.load(wide).model.adapters}
    of_attention = (f"attention.{name}" for name in ("self.query", "self.key", "self.value", "output.dense"))
    assert inside == {f"1.{name}" for name in (*of_attention, "intermediate.dense", "output.dense")}
    assert "do not train" not in caplog.text
    result = train(wide)
    assert evaluate(result.folder)["loss"] == pytest.approx(result.metrics["loss"])
    went_on = train(replace(wide, init_from=str(result.folder), output=str(tmp_path / "then")))
    assert evaluate(went_on.folder)["loss"] == pytest.approx(went_on.metrics["loss"])
    for other, said in (
        ({"rank": 3}, "rank is 3, but the run in .* had 2. Give that, or leave siva_layers out"),
        ({"targets": None}, "targets is its own, but the run in .* had all-linear"),
    ):
        with pytest.raises(FastpeftError, match=said):
            Task.load(replace(wide, init_from=str(result.folder), **other))


def test_a_side_network_without_an_adapter_gets_one(config: TrainConfig, tmp_path: Path) -> None:
    words = train(replace(config, objective="mlm", settings={}))
    result = train(replace(config, init_from=str(words.folder), output=str(tmp_path / "then")))
    assert evaluate(result.folder)["loss"] == pytest.approx(result.metrics["loss"])


def test_other_numbers_of_layers_are_refused(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(FastpeftError, match=r"siva_layers is 3; the model has 2 layers. Give a number from 1"):
        Task.load(replace(config, settings={"siva_layers": 3}))
    words = train(replace(config, objective="mlm"))
    then = replace(config, init_from=str(words.folder), settings={"siva_layers": 2})
    with pytest.raises(
        FastpeftError, match=r"siva_layers is 2, but the run in .* had 1. Give that, or leave siva_layers out"
    ):
        Task.load(then)
