"""MeZO in two processes: what they agree on, shards of parameters, and that they stop together.

Functions that take a rank or are passed to `ranks` run in both processes of `tests/ranks.py`.
"""

from __future__ import annotations

import logging
import math
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks as rank_processes
import torch
import torch.distributed as dist
from accelerate import Accelerator
from mezo_networks import equal
from mezo_trainer import config, language_model, rows
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from fastpeft import FastpeftError, MeZO, MeZOTrainer
from fastpeft.mezo import FZOO, SPSA, Exact, InPlace, Journal
from fastpeft.mezo.sharding import local_part
from fastpeft.support.processes import Ranks

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")

Run = Callable[..., list[Any]]

STEPS = 6
SHARDINGS = {"rows": (2,), "copies": (2, 1), "mixed": (1, 2)}  # meshes; of two dimensions the first is replicated


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with rank_processes.started(tmp_path_factory.mktemp("ranks")) as run:
        yield run


def network(dtype: torch.dtype = torch.float32, sharding: str | None = None) -> nn.Sequential:
    """Rows of 7, 3 and 1: two processes get 4 and 3, 2 and 1, 1 and none.

    All but the first layer belong to the outermost module, which FSDP2 leaves gathered after a forward.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 1)).to(dtype)
    if sharding is not None:
        shape = SHARDINGS[sharding]
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def loss_of(model: nn.Module, step: int, rows: slice) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    dtype = next(model.parameters()).dtype
    x, y = torch.randn(8, 5, generator=generator).to(dtype), torch.randn(8, 1, generator=generator).to(dtype)
    return F.mse_loss(model(x[rows]), y[rows])


def own_rows() -> slice:
    return slice(dist.get_rank(), None, 2)


def weights(model: nn.Module) -> list[Tensor]:
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return [p.detach().clone() for p in whole]


def outcome(model: nn.Module, optimizer: MeZO, losses: list[float]) -> dict[str, Any]:
    optimizer.settle()
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # or the parameters are what the last forward gathered
    return {
        "weights": weights(model),
        "losses": losses,
        "slope": optimizer.projected_grad,
        "steps": optimizer.steps_done,
        "seed": optimizer.seed,
    }


# -- run in both processes ---------------------------------------------------------------------------------------------


def train(dtype: torch.dtype, sharding: str | None, options: dict[str, Any], journal: Path | None = None) -> Any:
    model = network(dtype, sharding)
    optimizer = MeZO(model, seed=3 + dist.get_rank(), **options)
    if journal is not None:
        optimizer.record(journal)
    losses = [optimizer.step(lambda s=s: loss_of(model, s, own_rows())) for s in range(STEPS)]
    return outcome(model, optimizer, losses)


def resume(dtype: torch.dtype, sharding: str | None, options: dict[str, Any], journal: Path, steps: int) -> Any:
    """Go on after `steps` steps, from the weights before the run."""
    model = network(dtype, sharding)
    optimizer = MeZO(model, seed=3, **options)
    optimizer.resume(journal, steps=steps)
    losses = [optimizer.step(lambda s=s: loss_of(model, s, own_rows())) for s in range(steps, STEPS)]
    return outcome(model, optimizer, losses)


def resume_what_one_cannot_read(sharding: str | None, journal: Path) -> Any:
    resume(torch.float32, sharding, {"lr": 0.1}, journal if dist.get_rank() == 0 else journal / "none", 2)


def train_alone() -> Any:
    """Each process in a group of its own."""
    groups = [dist.new_group([rank]) for rank in range(2)]
    model = network()
    optimizer = MeZO(model, lr=0.1, seed=3, process_group=groups[dist.get_rank()])
    losses = [optimizer.step(lambda s=s: loss_of(model, s, own_rows())) for s in range(STEPS)]
    return outcome(model, optimizer, losses)


def train_in_ddp(journal: Path) -> Any:
    """A user's loop that wraps the model before it makes the optimizer."""
    wrapped = DistributedDataParallel(network())
    optimizer = MeZO(wrapped, lr=0.1, seed=3)
    optimizer.record(journal)
    for step in range(STEPS):
        optimizer.step(lambda step=step: loss_of(wrapped, step, own_rows()))
    return weights(wrapped.module), optimizer.state_dict()


def go_on_from_shards(folder: Path) -> list[Any]:
    """What a run comes to, and another that goes on from its checkpoint after two steps."""
    found = []
    for begin in (0, 2):
        model = network(sharding="rows")
        optimizer = MeZO(model, lr=0.1, seed=3)
        for step in range(begin, STEPS):
            if step == 2:
                state = {"model": get_model_state_dict(model), "optimizer": optimizer.state_dict()}
                if begin:
                    checkpoint.load(state, checkpoint_id=folder)
                    set_model_state_dict(model, state["model"])
                    optimizer.load_state_dict(state["optimizer"])
                else:
                    checkpoint.save(state, checkpoint_id=folder)
            optimizer.step(lambda model=model, step=step: loss_of(model, step, own_rows()))
        found.append(outcome(model, optimizer, []))
    return found


def train_by_accelerate() -> Any:
    """A user's loop in which accelerate wraps the model in DistributedDataParallel."""
    model = network()
    optimizer = MeZO(model, lr=0.1, seed=3)
    wrapped, prepared = Accelerator(cpu=True).prepare(model, optimizer)
    assert type(wrapped).__name__ == "DistributedDataParallel"
    for step in range(STEPS):
        prepared.step(lambda step=step: loss_of(wrapped, step, own_rows()))
    return weights(model)


def fail_on_rank_1(value: float, call: int, options: dict[str, Any]) -> Any:
    """The loss of rank 1 is `value` in one call of the closure."""
    model, calls = network(), []
    optimizer = MeZO(model, lr=0.1, **options)

    def closure() -> Tensor:
        calls.append(None)
        loss = loss_of(model, 0, own_rows())
        return loss + value if len(calls) == call and dist.get_rank() == 1 else loss

    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("fastpeft")
    logger.addHandler(handler)
    try:
        losses = [optimizer.step(closure) for _ in range(STEPS)]
    finally:
        logger.removeHandler(handler)
    return {**outcome(model, optimizer, losses), "calls": len(calls), "messages": messages}


def change_on_rank_1(what: str, sharding: str | None) -> None:
    """Take a step, change something on rank 1 alone, and compare."""
    model = network(sharding=sharding)
    optimizer = MeZO(model, lr=0.1)
    optimizer.step(lambda: loss_of(model, 0, own_rows()))
    if dist.get_rank() == 1:
        if what == "weights":
            for module in model.modules():
                if hasattr(module, "reshard"):
                    module.reshard()
            with torch.no_grad():
                local_part(model[2].weight, 0, "")[0].view(-1)[0] += 1e-6
        else:
            optimizer.param_groups[0][what] *= 2
    optimizer.check_same()


def begin_apart() -> None:
    model = network()
    with torch.no_grad():
        model[0].bias[3] += dist.get_rank()
    MeZO(model, lr=0.1).step(lambda: loss_of(model, 0, own_rows()))


def make(placement: str) -> None:
    """An optimizer of parameters that are placed in some other way."""
    mesh = init_device_mesh("cpu", (2,))
    model = nn.Linear(4, 6)
    if placement == "columns":
        fully_shard(model, mesh=mesh, shard_placement_fn=lambda param: Shard(param.ndim - 1))
        MeZO(model, lr=0.1)
    if placement in ("exact", "no model"):
        fully_shard(model, mesh=mesh)
        options = {"model": model, "rule": Exact()} if placement == "exact" else {}
        MeZO(model.parameters(), lr=0.1, **options)
    if placement == "fsdp1":
        MeZO(FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu")), lr=0.1)
    part = torch.ones(2 + dist.get_rank(), 3)
    placed = {
        "strided": lambda: DTensor.from_local(torch.ones(2, 3), mesh, [_StridedShard(0, split_factor=2)]),
        "partial": lambda: DTensor.from_local(torch.ones(4, 3), mesh, [Partial()]),
        "by hand": lambda: DTensor.from_local(part, mesh, [Shard(0)], shape=torch.Size([5, 3]), stride=(3, 1)),
    }
    if placement in placed:
        MeZO([("w", nn.Parameter(placed[placement]()))], lr=0.1, model=model)


def parts_of(size: int, placements: list[Any], mesh: tuple[int, ...]) -> tuple[Tensor, int]:
    """What `local_part` says of the numbers 0, 1, 2 ... in `size` rows of 3, placed by torch."""
    whole = torch.arange(size * 3.0).view(size, 3)
    placed = distribute_tensor(whole, init_device_mesh("cpu", mesh), placements)
    part, offset = local_part(placed, 100, "w")
    return part.clone(), offset


def fail_together() -> list[Any]:
    def work() -> None:
        if dist.get_rank() == 1:
            raise FastpeftError("the disk is full")

    group = Ranks()
    with pytest.raises(FastpeftError) as caught:
        group.together(work)
    return [str(caught.value), group.gather(group.rank)]


def summed(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """A user's loss, which divides by the items of the whole step itself."""
    return F.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten(), reduction="sum") / num_items_in_batch


def train_by_trainer(
    folder: Path, changes: dict[str, Any], own_loss: bool = False, resume: str | bool | None = None, apart: bool = False
) -> dict[str, Any]:
    """A run of four steps in however many processes there are.

    Args:
        apart: whether the model differs between ranks at first, as new heads do.
    """
    model = language_model().double()
    if apart and dist.get_rank() == 1:
        torch.nn.init.zeros_(model.lm_head.dense.weight)
    trainer = MeZOTrainer(
        model,
        config(folder, **{"learning_rate": 1e-2, "seed": 5, **changes}),
        train_dataset=rows(64),
        eval_dataset=rows(16),
        compute_loss_func=summed if own_loss else None,
    )
    trainer.train(resume_from_checkpoint=resume)
    return {
        "weights": weights(model),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "eval_loss": trainer.evaluate()["eval_loss"],
        "model": type(trainer.model_wrapped).__name__,
        "records": trainer.mezo.journal is not None,
    }


def shard_for_the_trainer(folder: Path) -> None:
    model = language_model().double()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    MeZOTrainer(model, config(folder)).create_optimizer()


# -- agreement ---------------------------------------------------------------------------------------------------------

OPTIONS = {
    "plain": {"lr": 0.1},
    "deferred": {"lr": 0.1, "rule": InPlace(defer=True), "weight_decay": 0.1},
    "directions": {"lr": 0.1, "estimator": SPSA(3, "rademacher"), "rule": InPlace(max_projected_grad=0.2)},
    "fzoo": {"lr": 1e-3, "estimator": FZOO(3, "gaussian"), "rule": InPlace(defer=True)},
}


def alone(dtype: torch.dtype, options: dict[str, Any], loss: Callable[[nn.Module, int], Any]) -> dict[str, Any]:
    """The run of one process."""
    model = network(dtype)
    optimizer = MeZO(model, seed=3, **options)
    losses = [optimizer.step(lambda s=s: loss(model, s)) for s in range(STEPS)]
    return outcome(model, optimizer, losses)


def mean_of_halves(model: nn.Module, step: int) -> float:
    return statistics.fmean(loss_of(model, step, slice(rank, None, 2)).item() for rank in range(2))


@pytest.mark.long(only="plain-dtype0")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_two_ranks_take_the_steps_of_one_process_that_averages_their_losses(
    ranks: Run, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """Bit for bit, whatever the second one's seed was."""
    expected = alone(dtype, options, mean_of_halves)
    results = ranks(train, dtype, None, options)
    for result in results:
        assert equal(result.pop("weights"), expected["weights"])
        assert result == {name: value for name, value in expected.items() if name != "weights"}
    assert not equal(expected["weights"], weights(network(dtype)))


def test_two_ranks_are_one_process_with_twice_the_rows(ranks: Run) -> None:
    """To the rounding of a mean: by 1e-16, over 2 eps, times the rate and the number of steps."""
    expected = alone(torch.float64, {"lr": 0.1}, lambda model, step: loss_of(model, step, slice(None)))
    result, _ = ranks(train, torch.float64, None, {"lr": 0.1})
    for ours, theirs in zip(result["weights"], expected["weights"]):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-12)


def test_a_loop_of_accelerate(ranks: Run) -> None:
    expected = alone(torch.float32, {"lr": 0.1}, mean_of_halves)
    for result in ranks(train_by_accelerate):
        assert equal(result, expected["weights"])


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_shards_take_the_steps_of_whole_parameters(ranks: Run, sharding: str, options: dict[str, Any]) -> None:
    expected, _ = ranks(train, torch.float32, None, options)
    for result in ranks(train, torch.float32, sharding, options):
        assert equal(result["weights"], expected["weights"])
        assert (result["losses"], result["slope"]) == (expected["losses"], expected["slope"])


def test_half_precision_shards(ranks: Run) -> None:
    expected, _ = ranks(train, torch.bfloat16, None, OPTIONS["deferred"])
    for result in ranks(train, torch.bfloat16, "rows", OPTIONS["deferred"]):
        assert equal(result["weights"], expected["weights"])


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_local_parts_are_where_they_say(ranks: Run, size: int) -> None:
    for placements, mesh in (([Shard(0)], (2,)), ([Replicate()], (2,)), ([Replicate(), Shard(0)], (1, 2))):
        held = []
        for part, offset in ranks(parts_of, size, placements, mesh):
            assert part.flatten().tolist() == list(range(offset - 100, offset - 100 + part.numel()))
            held += part.flatten().tolist()
        assert sorted(set(held)) == list(range(size * 3))
        assert len(held) == size * 3 * (2 if placements == [Replicate()] else 1)


def test_a_group_of_its_own_keeps_a_process_apart(ranks: Run) -> None:
    for rank, result in enumerate(ranks(train_alone)):
        expected = alone(torch.float32, {"lr": 0.1}, lambda m, s, rank=rank: loss_of(m, s, slice(rank, None, 2)))
        assert equal(result["weights"], expected["weights"])


# -- the journal -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharding", [None, "rows"])
def test_the_journal_of_two_ranks_is_that_of_one(ranks: Run, tmp_path: Path, sharding: str | None) -> None:
    """It repeats the run on a whole model, and both resume from it."""
    options, file = OPTIONS["deferred"], tmp_path / "mezo.journal"
    ended = ranks(train, torch.float32, sharding, options, file)
    assert len(list(Journal.open(file).records())) == STEPS
    model = network()
    Journal.open(file).replay(model)
    assert equal(weights(model), ended[0]["weights"])
    content = file.read_bytes()
    for result, before in zip(ranks(resume, torch.float32, sharding, options, file, 2), ended):
        assert equal(result["weights"], before["weights"])
        assert result["losses"] == before["losses"][2:]
        assert result["steps"] == STEPS
    assert file.read_bytes() == content


@pytest.mark.parametrize("sharding", [None, "rows"])
def test_a_journal_that_one_cannot_read_stops_all(ranks: Run, tmp_path: Path, sharding: str | None) -> None:
    """Before any of them calls the others to gather a shard."""
    ranks(train, torch.float32, sharding, OPTIONS["plain"], tmp_path / "run")
    for result in ranks(resume_what_one_cannot_read, sharding, tmp_path / "run"):
        assert isinstance(result, FastpeftError)
        assert "cannot read the journal" in str(result)


def test_what_ddp_wrapped_goes_on_without_it(ranks: Run, tmp_path: Path) -> None:
    """Its journal and its state name the parameters as the model does."""
    (trained, state), _ = ranks(train_in_ddp, tmp_path / "mezo.journal")
    model = network()
    Journal.open(tmp_path / "mezo.journal").replay(model)
    assert equal(weights(model), trained)
    optimizer = MeZO(model, lr=0.1)
    optimizer.load_state_dict(state)
    assert optimizer.steps_done == STEPS


def test_a_run_goes_on_from_shards_that_torch_saved(ranks: Run, tmp_path: Path) -> None:
    for whole, resumed in ranks(go_on_from_shards, tmp_path):
        assert equal(resumed.pop("weights"), whole.pop("weights"))
        assert resumed == whole


def test_a_journal_that_one_cannot_write_stops_all(ranks: Run, tmp_path: Path) -> None:
    file = tmp_path / "mezo.journal"
    file.write_bytes(b"of another run")
    for result in ranks(train, torch.float32, None, OPTIONS["plain"], file):
        assert isinstance(result, FastpeftError)
        assert "exists" in str(result)


def test_a_fault_of_one_is_raised_on_all(ranks: Run) -> None:
    assert ranks(fail_together) == [["the disk is full", [0, 1]]] * 2


# -- in the Trainer ----------------------------------------------------------------------------------------------------


@pytest.mark.long(but="1-True")
@pytest.mark.parametrize("own_loss", [False, True])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_trainer_in_two_processes_is_one_with_twice_the_rows(
    ranks: Run, tmp_path: Path, own_loss: bool, accumulated: int
) -> None:
    changes = {"gradient_accumulation_steps": accumulated, "weight_decay": 0.1}
    expected = train_by_trainer(tmp_path / "one", {**changes, "per_device_train_batch_size": 8}, own_loss)
    two = {**changes, "per_device_train_batch_size": 4}
    first, second = ranks(train_by_trainer, tmp_path / "two", two, own_loss, None, True)
    assert equal(first["weights"], second["weights"])
    for ours, theirs in zip(first["weights"], expected["weights"]):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    assert first["losses"] == second["losses"] == pytest.approx(expected["losses"], rel=1e-5)  # float32 in the log
    assert first["eval_loss"] == second["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    assert first["model"] == "RobertaForMaskedLM"  # not wrapped


@pytest.mark.long(but="True")
@pytest.mark.parametrize("save_weights", [False, True])
def test_the_trainer_in_two_processes_resumes(ranks: Run, tmp_path: Path, save_weights: bool) -> None:
    changes = {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2, "journal": True}
    changes |= {"save_weights": save_weights, "on_nonfinite": "skip", "lr_scheduler_type": "linear"}
    whole, _ = ranks(train_by_trainer, tmp_path / "whole", changes)
    ranks(train_by_trainer, tmp_path / "cut", changes)
    content = (tmp_path / "cut" / "mezo.journal").read_bytes()
    assert content == (tmp_path / "whole" / "mezo.journal").read_bytes()
    checkpoint = tmp_path / "cut" / "checkpoint-2"
    assert (checkpoint / "model.safetensors").exists() == save_weights
    for resume in (str(checkpoint), True):
        shutil.rmtree(tmp_path / "cut" / "checkpoint-4")  # as if the run had ended before it
        for result in ranks(train_by_trainer, tmp_path / "cut", changes, False, resume):
            assert equal(result["weights"], whole["weights"])
        assert (tmp_path / "cut" / "mezo.journal").read_bytes() == content


def test_the_trainer_refuses_shards(ranks: Run, tmp_path: Path) -> None:
    for result in ranks(shard_for_the_trainer, tmp_path):
        assert isinstance(result, FastpeftError)
        assert re.search(r"got a sharded model \(DTensor\), .*fastpeft.MeZO in a loop", str(result))


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    """The processes as users start them."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}\n"
        "import test_parallel as tests, torch, os\n"
        f"result = tests.train_by_trainer({str(tmp_path / 'run')!r}, {{'per_device_train_batch_size': 4}})\n"
        f"torch.save(result['weights'], {str(tmp_path)!r} + '/' + os.environ['RANK'])\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    expected = train_by_trainer(tmp_path / "one", {"per_device_train_batch_size": 8})
    first, second = (torch.load(tmp_path / rank) for rank in "01")
    assert equal(first, second)
    for ours, theirs in zip(first, expected["weights"]):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


# -- what stops them ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_on_one_rank_stops_both(ranks: Run, value: float) -> None:
    for result in ranks(fail_on_rank_1, value, 6, {}):
        assert isinstance(result, FastpeftError)
        assert re.search(rf"the loss at theta \+ eps z is {value} on rank 1 at step 3 \(noise seed", str(result))


def test_or_is_skipped_by_both(ranks: Run) -> None:
    first, second = ranks(fail_on_rank_1, math.nan, 6, {"rule": InPlace(on_nonfinite="skip")})
    assert equal(first["weights"], second["weights"])
    assert (first["steps"], first["calls"]) == (second["steps"], second["calls"]) == (STEPS, 2 * STEPS)
    assert math.isnan(first["losses"][2])
    assert [math.isfinite(loss) for loss in second["losses"]] == [step != 2 for step in range(STEPS)]
    assert len(first["messages"]) == 1
    assert "on rank 1" in first["messages"][0]
    assert not second["messages"]


def test_a_closure_that_changes_its_mind_on_one_rank_stops_both(ranks: Run) -> None:
    for result in ranks(fail_on_rank_1, 0.5, 2, {}):
        assert isinstance(result, FastpeftError)
        assert "for the same weights on rank 1" in str(result)


@pytest.mark.parametrize(
    ("what", "sharding", "named"),
    [
        ("weights", None, "parameter 2.weight"),
        ("weights", "copies", "parameter 2.weight"),
        ("lr", None, "lr"),
        ("eps", None, "groups"),
    ],
)
def test_ranks_that_part_are_told(ranks: Run, what: str, sharding: str | None, named: str) -> None:
    for result in ranks(change_on_rank_1, what, sharding):
        assert isinstance(result, FastpeftError)
        assert f"rank 1 differs from rank 0 in {named}" in str(result)


def test_the_first_step_compares_them(ranks: Run) -> None:
    for result in ranks(begin_apart):
        assert isinstance(result, FastpeftError)
        assert "rank 1 differs from rank 0 in parameter 0.bias" in str(result)


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        ("columns", r"parameter 'weight' of shape \(6, 4\) is placed S.*1.*fully_shard without shard_placement_fn"),
        ("strided", r"parameter 'w' .* is placed _S"),
        ("partial", r"parameter 'w' .* is placed P"),
        ("by hand", r"'w' of shape \(5, 3\) .* a part of shape \([23], 3\) here; .*cut as torch.chunk"),
        ("exact", "rule Exact does not work with sharded parameters .* Use InPlace"),
        ("no model", "pass model"),
        ("fsdp1", r"FullyShardedDataParallel \(FSDP1\) cuts parameters .* by fully_shard \(FSDP2\)"),
    ],
)
def test_what_cannot_be_perturbed_is_refused(ranks: Run, placement: str, message: str) -> None:
    for result in ranks(make, placement):
        assert isinstance(result, FastpeftError)
        assert re.search(message, str(result))
