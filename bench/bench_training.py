"""A whole training step of the bundled model by each method of the README's table, side by side.

`python -m bench.bench_training` writes `bench/data/training.csv`; `pytest bench --benchmark-enable --benchmark-only`
shows each step through pytest-benchmark. Text is random: only the shape of the batch matters. On a CPU the frozen
weights of every method are packed, as `fastpeft train` packs them.

`python -m bench.bench_training --adapters` writes `bench/data/siva_training.csv`: SiVA against other adapters of the
same layers, and against the limit of them all, the same layers frozen but passing gradients. SiVA and the limit pack
these layers, PEFT's adapters do not; where a candidate is called packed, all frozen layers are. Predicted for SiVA
before measuring, for blocks of width d = 384 and M = 512 rows: query and key need 6 products of M, d and 8 more (p, h,
dp, dx, dU, dV), 19 million operations beside the 604 million of their 4 products with W, 3 % of these and 0.5 % of the
step; 16 kB of p are stored a block, and one addition of two dx (2.4 MB moved) is saved. All linears: 2 to 3 % of
products. As six small products by BLAS these cost more than their operations, 0.1 ms a product within the step; on a
CPU the compiled module makes them one pass over rows forward and one backward, 0.04 ms forward for one thread by the
profiler.

`--model base` and `--model large` take RoBERTa's shapes, `--rounds` fewer rounds. With `--adapters` `--tokens` takes
other lengths and `--candidates` some of the rows; `--dtype bfloat16` casts the base before adapters are made of it,
which keep the dtype that their library gives them, and `--dtype autocast` keeps float32 weights, computing in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.backbones import HEADS, MODELS
from bench.harness import DATA, Candidates, measure, timing_parser
from fastpeft import InPlace, MeZO
from fastpeft.methods.preparation import Preparation, parse_targets
from fastpeft.methods.registry import get_method
from fastpeft.ops.frozen_linear import pack_layer, set_packing

FILE = DATA / "training.csv"
BATCH_SIZE, TOKENS = 16, 32  # what the demo data has on average
CASE = {"model": "demo", "work": "training step", "batch": str(BATCH_SIZE), "tokens": str(TOKENS), "dtype": "float32"}
RANK = 4
ADAPTERS_FILE = DATA / "siva_training.csv"
DTYPES = ("float32", "bfloat16", "autocast")
TARGETS = {"query, key": "query,key", "key, value": "key,value", "all linear": "all-linear"}  # RoBERTa's names


@dataclass(frozen=True)
class Cell:
    """One row of a table: a method, with the layers it adapts.

    `variant` is DoRA, or its step compiled, or all frozen layers packed.
    """

    method: str
    targets: str = ""
    variant: str = ""

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.method, self.targets.replace(", ", "-").replace(" ", "-"), self.variant)))


CELLS = [
    Cell("full"),
    *(Cell("lora", targets) for targets in TARGETS),
    *(Cell("siva", targets) for targets in TARGETS),
    Cell("pissa", "query, key"),
    *(Cell(method) for method in ("k-lst", "lst", "last-n", "bitfit", "head", "mezo")),
]
LIMIT = "limit"  # not a method: the targeted layers are frozen, and the gradient passes through all of them
ADAPTERS = {  # of any layers
    cell.name: cell
    for cell in (
        Cell("siva"),
        Cell(LIMIT),
        Cell("lora"),
        Cell("siva", variant="packed"),
        Cell("lora", variant="packed"),
        Cell("lora", variant="compiled"),
        Cell("pissa"),
        Cell("lora", variant="dora"),
    )
}


def training_step(
    cell: Cell, device: torch.device, model_name: str = "demo", tokens: int = TOKENS, dtype: str = "float32"
) -> Callable[[], object]:
    """Forward, backward and AdamW of one batch, ready to run; `dtype` is one of `DTYPES`."""
    torch.manual_seed(0)
    targets = parse_targets(names_in(TARGETS[cell.targets], model_name)) if cell.targets else None
    settings = {"use_dora": True} if cell.variant == "dora" else {}
    preparation = Preparation([HEADS.get(model_name, "classifier")], RANK if cell.targets else None, targets, settings)
    method = get_method("head" if cell.method == LIMIT else cell.method)
    base = MODELS[model_name]()
    if dtype == "bfloat16":
        base = base.to(torch.bfloat16)
    model = method.prepare(base, preparation).to(device).train()
    if cell.method == LIMIT:
        pass_gradients(model, targets)
    if cell.variant == "packed":
        set_packing(model)
    if cell.method == "mezo":
        return mezo_step_of(model, device, tokens)
    ready = torch.compile(model) if cell.variant == "compiled" else model
    return step_of(ready, method.recipe.weight_decay, device, tokens, autocast=dtype == "autocast")


def names_in(targets: str, model_name: str) -> str:
    """The layers that a model of another family has in the place of RoBERTa's."""
    if model_name not in HEADS or targets == "all-linear":
        return targets
    return ",".join({"query": "q_proj", "key": "k_proj", "value": "v_proj"}[name] for name in targets.split(","))


def step_of(
    model: nn.Module, weight_decay: float, device: torch.device, tokens: int = TOKENS, autocast: bool = False
) -> Callable[[], object]:
    """A step of `model`, whose output has a loss, on random text, if need be in bfloat16 by autocast."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=1e-5, weight_decay=weight_decay, fused=True, capturable=device.type == "cuda"
    )
    batch = random_batch(device, tokens)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()  # a step's peak is measured from what it finds

    return step


def mezo_step_of(model: nn.Module, device: torch.device, tokens: int) -> Callable[[], object]:
    """A step by MeZO, which draws no dropout and leaves its last addition to the next step, as a run does.

    The classes come from the model's own head: a prompt computes as much but for the words at one place of each row.
    """
    batch = random_batch(device, tokens)
    optimizer = MeZO(model.eval(), lr=1e-6, eps=1e-3, rule=InPlace(defer=True))
    return lambda: optimizer.step(lambda: float(model(**batch).loss))


def random_batch(device: torch.device, tokens: int) -> dict[str, Tensor]:
    """Rows of one length, without padding, in two classes."""
    ids = torch.randint(5, 8_000, (BATCH_SIZE, tokens), device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}


def pass_gradients(model: nn.Module, targets: Any) -> None:
    """Let the outputs of the targeted layers need gradients, as if something in the layers was trained.

    On a CPU their weights are packed, as SiVA's are.
    """

    def require(_module: nn.Module, _args: Any, output: Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_()

    for name, module in model.base_model.named_modules():
        if isinstance(module, nn.Linear) and (targets == "all-linear" or name.rpartition(".")[2] in targets):
            module.register_forward_hook(require)
            if module.weight.is_cpu:
                pack_layer(module)


def candidates(device: torch.device, model: str = "demo") -> Candidates:
    """Every row of the table; SiVA on query and key first."""
    ordered = sorted(CELLS, key=lambda cell: (cell.method, cell.targets) != ("siva", "query, key"))
    return {cell.name: training_step(as_trained(cell, device), device, model) for cell in ordered}


def as_trained(cell: Cell, device: torch.device) -> Cell:
    """The cell as `fastpeft train` has it, which packs on a CPU."""
    return replace(cell, variant="packed") if device.type == "cpu" else cell


def adapters(
    targets: str,
    device: torch.device,
    model: str = "demo",
    names: Sequence[str] = tuple(ADAPTERS),
    tokens: int = TOKENS,
    dtype: str = "float32",
) -> Candidates:
    """SiVA, the limit and other adapters on the same layers, in one of `DTYPES`: those of `names`."""
    cells = {name: replace(ADAPTERS[name], targets=targets) for name in names}
    return {name: training_step(cell, device, model, tokens, dtype) for name, cell in cells.items()}


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_training_step(benchmark: Any, cell: Cell) -> None:
    cpu = torch.device("cpu")
    benchmark(training_step(as_trained(cell, cpu), cpu))


def main() -> None:
    parser = timing_parser(__doc__)
    parser.add_argument("--adapters", action="store_true", help="SiVA, its limit and other adapters of the same layers")
    parser.add_argument("--model", choices=MODELS, default="demo")
    parser.add_argument("--targets", default="query, key;all linear", help="with --adapters")
    parser.add_argument("--candidates", default=",".join(ADAPTERS), help="with --adapters; siva comes first")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="with --adapters")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="with --adapters")
    given = parser.parse_args()
    device = given.device
    if not given.adapters:
        measure(FILE, {**CASE, "model": given.model}, candidates(device, given.model), device, given.rounds)
        return
    for targets in given.targets.split(";"):
        case = {**CASE, "model": given.model, "tokens": str(given.tokens), "dtype": given.dtype, "targets": targets}
        steps = adapters(targets, device, given.model, given.candidates.split(","), given.tokens, given.dtype)
        measure(ADAPTERS_FILE, case, steps, device, given.rounds)


if __name__ == "__main__":
    main()
