"""A whole training step of the bundled model by each method of the README's table, side by side.

`python -m bench.bench_training` writes `bench/data/training.csv`, and with `--model base` rows of RoBERTa-base's
shapes. Text is random: only the shape of the batch matters. On a CPU the frozen weights of every method are packed, as
`fastpeft train` packs them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.backbones import HEADS, MODELS
from bench.harness import Bench, Candidates, Run
from fastpeft import InPlace, MeZO
from fastpeft.methods.preparation import Preparation, parse_targets
from fastpeft.methods.registry import get_method
from fastpeft.ops.frozen_linear import pack_layer, set_packing

BATCH_SIZE, TOKENS = 16, 32  # what the demo data has on average
RANK = 4
DTYPES = ("float32", "bfloat16", "autocast")
TARGETS = {"query, key": "query,key", "key, value": "key,value", "all linear": "all-linear"}  # RoBERTa's names


@dataclass(frozen=True)
class Step:
    """The model and the batch of a training step."""

    model: str = "demo"
    work: str = "training step"
    batch: int = BATCH_SIZE
    tokens: int = TOKENS
    dtype: str = "float32"


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


def training_step(
    cell: Cell, device: torch.device, model_name: str = "demo", tokens: int = TOKENS, dtype: str = "float32"
) -> Run:
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
) -> Run:
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


def mezo_step_of(model: nn.Module, device: torch.device, tokens: int) -> Run:
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


def candidates(case: Step, device: torch.device) -> Candidates:
    """Every row of the table; SiVA on query and key first."""
    ordered = sorted(CELLS, key=lambda cell: (cell.method, cell.targets) != ("siva", "query, key"))
    return {
        cell.name: partial(training_step, as_trained(cell, device), device, case.model, case.tokens, case.dtype)
        for cell in ordered
    }


def as_trained(cell: Cell, device: torch.device) -> Cell:
    """The cell as `fastpeft train` has it, which packs on a CPU."""
    return replace(cell, variant="packed") if device.type == "cpu" else cell


BENCH = Bench(__doc__, "training.csv", lambda _: [Step()], candidates)

if __name__ == "__main__":
    BENCH.main()
