"""Several processes take the steps of one that has all their rows: every method in every engine.

What is passed to `ranks` runs in each of the processes of `tests/ranks.py`. SiVA's and MeZO's own tests look closer at
two of them.
"""

from __future__ import annotations

import os
import shutil
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import peft
import pytest
import ranks as rank_processes
import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from fastpeft import LadderConfig, LadderModel, MeZO, MeZOConfig, MeZOTrainer, SivaConfig, TrainConfig
from fastpeft.data.examples import load_data
from fastpeft.errors import FastpeftError, LostProcessError
from fastpeft.support import processes
from fastpeft.training import recipe, task

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo"),
]

Run = Callable[..., list[Any]]

METHODS = ("siva", "k-lst", "mezo")
ENGINES = ("ddp", "fsdp2", "accelerate")
ROWS, STEPS = 8, 4
RATES = {"siva": 0.3, "k-lst": 0.3, "mezo": 1e-2}
# MeZO divides the difference of two losses by 2e-3, and with it their rounding
CLOSE = {
    "siva": {"rtol": 1e-4, "atol": 2e-6},
    "k-lst": {"rtol": 1e-4, "atol": 2e-6},
    "mezo": {"rtol": 1e-3, "atol": 1e-4},
}


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with rank_processes.started(tmp_path_factory.mktemp("ranks"), request.param) as run:
        yield run


def made(method: str, layer_drop: float = 0.0) -> Any:
    """A model without dropout, the same at every call, whose weights are larger than a new one's."""
    torch.manual_seed(0)
    model: Any = transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=40,
            pad_token_id=0,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    for weight in model.parameters():
        weight.data *= 5 if weight.dim() == 2 else 1
    if method == "siva":
        model = peft.get_peft_model(model, SivaConfig(r=3, target_modules="all-linear", task_type="SEQ_CLS"))
    if method == "k-lst":
        model = LadderModel(model, LadderConfig(window_size=3, reduction_factor=2, layer_drop=layer_drop))
    return model.train()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def data(step: int) -> dict[str, Tensor]:
    """The rows of a step."""
    generator = torch.Generator().manual_seed(step)
    mask = (torch.arange(9) < torch.arange(ROWS)[:, None] % 3 + 7).long()
    ids = torch.randint(3, 50, (ROWS, 9), generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": ids[:, 1] % 2}


def part(rows: dict[str, Tensor], rank: int, size: int) -> dict[str, Tensor]:
    return {name: tensor[rank::size] for name, tensor in rows.items()}


def whole(model: nn.Module) -> dict[str, Tensor]:
    """What trains, by the names that it has in the model alone."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # or parameters are what the last forward gathered
    found = {name.removeprefix("module."): parameter.detach() for name, parameter in trained(model).items()}
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for name, t in found.items()}


def shard(model: nn.Module) -> None:
    """FSDP2 by blocks: the backbone's and, where there is one, the side network's."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    inner = model.base_model.model if isinstance(model, peft.PeftModel) else model
    base = inner.base if isinstance(inner, LadderModel) else inner
    side = list(inner.side.blocks) if isinstance(inner, LadderModel) else []
    for block in (*base.roberta.encoder.layer, *side):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def train(method: str, engine: str | None, layer_drop: float = 0.0) -> dict[str, Tensor]:
    """Some steps of plain gradient descent, or of MeZO, on this process's part of the rows.

    Each process has random numbers of its own.

    Args:
        engine: None for one process, which has all rows.
        layer_drop: of the side network.
    """
    rank, size = (0, 1) if engine is None else (dist.get_rank(), dist.get_world_size())
    model = made(method, layer_drop)
    if engine == "fsdp2":
        shard(model)
    optimizer: Any = (
        MeZO(model, RATES[method], seed=3)
        if method == "mezo"
        else torch.optim.SGD(trained(model).values(), RATES[method])
    )
    wrapped, accelerator = model, None
    if engine == "ddp":
        wrapped = DistributedDataParallel(model, find_unused_parameters=layer_drop > 0)
    if engine == "accelerate":
        accelerator = Accelerator(
            cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=layer_drop > 0)]
        )
        wrapped, optimizer = accelerator.prepare(model, optimizer)
        assert isinstance(wrapped, DistributedDataParallel)
    torch.manual_seed(rank)
    for step in range(STEPS):
        rows = part(data(step), rank, size)
        if method == "mezo":
            optimizer.step(lambda rows=rows: wrapped(**rows).loss)
            continue
        loss = wrapped(**rows).loss
        loss.backward() if accelerator is None else accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return whole(model)


def train_by_parts(size: int) -> dict[str, Tensor]:
    """MeZO in one process that averages the losses of `size` parts."""
    model = made("mezo")
    optimizer = MeZO(model, RATES["mezo"], seed=3)
    for step in range(STEPS):
        parts = [part(data(step), rank, size) for rank in range(size)]
        optimizer.step(lambda parts=parts: statistics.fmean(model(**rows).loss.item() for rows in parts))
    return whole(model)


def train_by_trainer(method: str, folder: Path) -> dict[str, Tensor]:
    """The same by the Trainer, in however many processes there are; gradients are clipped."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    model = made(method)
    rows = [{name: t[row] for name, t in data(step).items()} for step in range(STEPS) for row in range(ROWS)]
    options: dict[str, Any] = {
        "per_device_train_batch_size": ROWS // size,
        "learning_rate": RATES[method],
        "lr_scheduler_type": "constant",
        "max_steps": STEPS,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    if method == "mezo":
        trainer: Trainer = MeZOTrainer(model, MeZOConfig(str(folder), seed=3, **options), train_dataset=rows)
    else:
        # RoBERTa's loss takes no notice of the number of items, by which the Trainer believes it to be divided
        options |= {"optim": "sgd", "max_grad_norm": 0.5, "average_tokens_across_devices": False}
        trainer = Trainer(model, TrainingArguments(str(folder), **options), train_dataset=rows)
    trainer.train()
    if size > 1:
        assert isinstance(trainer.model_wrapped, DistributedDataParallel) == (method != "mezo")
    return whole(model)


def assert_close(found: list[dict[str, Tensor]], expected: dict[str, Tensor], method: str) -> None:
    start = whole(made(method))
    for of_rank in found:
        assert of_rank.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(
                of_rank[name], tensor, **CLOSE[method], msg=lambda text, name=name: f"{name}: {text}"
            )
    moved = torch.cat([(tensor - start[name]).flatten() for name, tensor in expected.items()]).norm()
    assert moved > 0.02


# -- tests -------------------------------------------------------------------------------------------------------------


@pytest.mark.long(but="2-siva-accelerate")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ["siva", "k-lst"])
def test_processes_are_one_with_all_rows(ranks: Run, method: str, engine: str) -> None:
    assert_close(ranks(train, method, engine), train(method, None), method)


@pytest.mark.parametrize("engine", ENGINES)
def test_by_mezo_they_are_to_the_bit_one_that_averages(ranks: Run, engine: str) -> None:
    found = ranks(train, "mezo", engine)
    expected = train_by_parts(len(found))
    for of_rank in found:
        assert of_rank.keys() == expected.keys()
        assert all(torch.equal(of_rank[name], tensor) for name, tensor in expected.items())
    assert_close(found, train("mezo", None), "mezo")


@pytest.mark.long(but="2-mezo")
@pytest.mark.parametrize("method", METHODS)
def test_in_the_trainer(ranks: Run, tmp_path: Path, method: str) -> None:
    assert_close(ranks(train_by_trainer, method, tmp_path / "several"), train_by_trainer(method, tmp_path), method)


@pytest.mark.long(but="2-ddp")
@pytest.mark.parametrize("engine", ENGINES)
def test_all_leave_out_the_same_blocks(ranks: Run, engine: str) -> None:
    """Those that one process with the first one's random numbers leaves out; the others' are their own."""
    found = ranks(train, "k-lst", engine, 0.5)
    expected = train("k-lst", None, 0.5)
    assert_close(found, expected, "k-lst")
    none_left_out = train("k-lst", None)
    assert any((expected[name] - tensor).abs().max() > 1e-2 for name, tensor in none_left_out.items())


def save_from_fsdp1(folder: Path) -> Tensor:
    """What a side network says that was trained in FSDP1, and is saved."""
    model = made("k-lst")
    blocks = ModuleWrapPolicy({type(model.base.roberta.encoder.layer[0]), type(model.side.blocks[0])})
    cpu = torch.device("cpu")
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=cpu, auto_wrap_policy=blocks)
    optimizer = torch.optim.SGD(trained(wrapped).values(), 0.3)
    wrapped(**part(data(0), dist.get_rank(), dist.get_world_size())).loss.backward()
    optimizer.step()
    whole = FullStateDictConfig(offload_to_cpu=True, rank0_only=True)
    with FullyShardedDataParallel.state_dict_type(wrapped, StateDictType.FULL_STATE_DICT, whole):
        state = wrapped.state_dict()
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=state)
    with torch.no_grad():
        return wrapped.eval()(**data(1)).logits


def test_a_side_network_saved_from_fsdp1_loads(ranks: Run, tmp_path: Path) -> None:
    """Its backbone's weights are pieces there, by which no other backbone would be known."""
    expected, *_ = ranks(save_from_fsdp1, tmp_path)
    model = LadderModel.from_pretrained(tmp_path, base=made("mezo"))
    with torch.no_grad():
        torch.testing.assert_close(model(**data(1)).logits, expected)


def make_beside_shards(at_the_root: bool) -> None:
    base = made("mezo")
    for block in base.roberta.encoder.layer:
        fully_shard(block)
    if at_the_root:
        fully_shard(base)
    LadderModel(base, LadderConfig(window_size=3, reduction_factor=2))


@pytest.mark.parametrize("at_the_root", [False, True])
def test_a_side_network_is_made_before_fsdp_shards_its_backbone(ranks: Run, at_the_root: bool) -> None:
    """Its embeddings would train, its head would not."""
    for refused in ranks(make_beside_shards, at_the_root):
        assert "Make the LadderModel of the whole base first, and shard it then" in str(refused)


def agree(value: int) -> int:
    return processes.agreed(value + dist.get_rank(), torch.device("cpu"))


def test_what_they_agree_on_is_the_first_ones(ranks: Run) -> None:
    found = ranks(agree, 2**62)
    assert found == [2**62] * len(found)
    assert processes.agreed(7, torch.device("cpu")) == 7


def train_apart(config: TrainConfig, folder: Path, parts: dict[str, str]) -> Any:
    """Resume a run, each process on a disk of its own below `folder`, with the files `parts` on that of the last."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    place = folder / f"disk {rank}"
    shutil.copytree(folder / "disk", place)
    for name, text in parts.items() if rank == last else ():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(text)
    before = os.getcwd()
    os.chdir(place)
    try:
        with patch.object(task, "load_data", lambda data, **others: load_data(place / "reviews.csv", **others)):
            return recipe.train(config, resume=True).metrics
    finally:
        os.chdir(before)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("reviews.csv", "text,label\n" + "one more,good\nand more,bad\n" * 20, "the rows of data"),
        ("run/checkpoints/checkpoint-3", "", "what output holds, a folder that all must share"),
        ("run/metrics.json", "{}", "what output holds, a folder that all must share"),
    ],
)
def test_what_lies_on_several_disks_must_be_the_same(
    ranks: Run, tmp_path: Path, place: Path, name: str, text: str, said: str
) -> None:
    (tmp_path / "disk" / "run").mkdir(parents=True)
    shutil.copy(place / "reviews.csv", tmp_path / "disk")
    (tmp_path / "disk" / "run" / "run.json").write_text('{"fastpeft_version": "0"}')
    config = TrainConfig(output="run", model=str(place / "model"), data=str(place / "reviews.csv"), max_steps=2)
    for error in ranks(train_apart, config, tmp_path, {name: text}):
        assert isinstance(error, FastpeftError)
        assert f"differs from rank 0 in {said}, so they would train different models" in str(error)


def test_a_finished_run_stays_as_it_is(ranks: Run, tmp_path: Path, place: Path) -> None:
    (tmp_path / "disk" / "run").mkdir(parents=True)
    shutil.copy(place / "reviews.csv", tmp_path / "disk")
    (tmp_path / "disk" / "run" / "run.json").write_text('{"fastpeft_version": "0"}')
    (tmp_path / "disk" / "run" / "metrics.json").write_text('{"accuracy": 1.0}')
    config = TrainConfig(output="run", model=str(place / "model"), data=str(place / "reviews.csv"), max_steps=2)
    for found in ranks(train_apart, config, tmp_path, {}):
        assert found == {"accuracy": 1.0}


@pytest.mark.parametrize(
    "words",
    [
        "[/src/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:29500",
        "Application timeout caused pair closure",
        "Read error [127.0.0.1]:29500: Connection reset by peer",
    ],
)
def test_a_lost_process_is_known_by_what_gloo_says(words: str) -> None:
    with pytest.raises(LostProcessError, match="has ended, or does not answer"), processes.noticing_lost_processes():
        raise RuntimeError(words)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2") as raised, processes.noticing_lost_processes():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert type(raised.value) is RuntimeError
