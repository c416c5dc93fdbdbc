"""A whole training step of k-LST, and what it is to be compared with, side by side.

`python -m bench.bench_ladder` writes `bench/data/ladder.csv`. Text is random: only the shape of the batch matters.

The forward pass of the backbone alone, without gradients, is the bound: no side network makes a step cheaper. The
direct formulation is there with the backbone in evaluation mode, as the library keeps it, and with all of the model in
training mode, as `transformers.Trainer` puts it. LoRA is there in three forms: as PEFT has it; with its frozen weights
packed, as `fastpeft train` packs them; and packed without dropout, which a side network's backbone does not draw.

`--dtype bfloat16` brings the base to bfloat16: for a side network by `backbone_dtype`, for LoRA all of it, as a
base that was loaded so: PEFT's factors are float32. With `--dtype int8` the linear layers of side networks' backbones
are int8 and the rest of them bfloat16, as LoRA's base.

Predicted for the bundled model before measuring: 54 ms for the backbone's forward, 23 for LST's side network, 6 for the
projections and 8 for window attention, together 1.75 times LoRA's speed. A direct form could be beaten 1.8 times.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from bench.backbones import HEADS, MODELS
from bench.bench_training import BATCH_SIZE, TOKENS, Step, names_in, step_of
from bench.harness import Bench, Candidates, Run
from bench.oracles.direct_run import DirectRun
from fastpeft.methods.preparation import Preparation
from fastpeft.methods.registry import get_method
from fastpeft.ops.frozen_linear import set_packing

RANK = 4
FORWARD = "backbone forward"
DIRECT_AS_TRAINED = "9-lst direct with backbone dropout"
LORA_PACKED, LORA_WITHOUT_DROPOUT = "lora packed", "lora packed without dropout"
ENTRIES = {  # of the registry, where a name here is none
    "9-lst": "k-lst",
    "9-lst direct": "k-lst",
    DIRECT_AS_TRAINED: "k-lst",
    "lst direct": "lst",
    LORA_PACKED: "lora",
    LORA_WITHOUT_DROPOUT: "lora",
}


def prepared(model: str, method: str, dtype: str = "float32") -> nn.Module:
    """`model` in `dtype` with what `method` trains, in training mode."""
    torch.manual_seed(0)
    base, is_lora = MODELS[model](), method.startswith("lora")
    if dtype == "int8" or (is_lora and dtype != "float32"):
        base = base.bfloat16()
    settings = {} if is_lora or dtype == "float32" else {"backbone_dtype": dtype}
    preparation = Preparation(
        [HEADS.get(model, "classifier")], RANK, names_in("query,key", model).split(",") if is_lora else None, settings
    )
    ready = get_method(ENTRIES.get(method, method)).prepare(base, preparation).train()
    if "direct" in method:
        ready.side_run = DirectRun
    if method == DIRECT_AS_TRAINED:
        nn.Module.train(ready)  # the backbone too, which a LadderModel keeps in evaluation mode
    elif method in (LORA_PACKED, LORA_WITHOUT_DROPOUT):
        set_packing(ready)
    if method == LORA_WITHOUT_DROPOUT:
        for module in ready.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    return ready


def training_step(model: str, method: str, device: torch.device, dtype: str = "float32", tokens: int = TOKENS) -> Run:
    """Forward, backward and AdamW of one batch, ready to run."""
    return step_of(prepared(model, method, dtype).to(device), weight_decay=0.0, device=device, tokens=tokens)


def backbone_forward(model: str, device: torch.device, dtype: str = "float32", tokens: int = TOKENS) -> Run:
    """The backbone's pass beside a side network, without gradients."""
    base = prepared(model, "lst", dtype).to(device).eval().backbone.body
    ids = torch.randint(5, 8_000, (BATCH_SIZE, tokens), device=device)

    @torch.no_grad()
    def run() -> None:
        base(input_ids=ids, attention_mask=torch.ones_like(ids))

    return run


METHODS = ("9-lst", "lora", LORA_PACKED, LORA_WITHOUT_DROPOUT, "lst", "lst direct", "9-lst direct", DIRECT_AS_TRAINED)


def candidates(case: Step, device: torch.device) -> Candidates:
    """The steps of all methods, k-LST first, and the bound."""
    given = {"device": device, "dtype": case.dtype, "tokens": case.tokens}
    steps = {method: partial(training_step, case.model, method, **given) for method in METHODS}
    return {**steps, FORWARD: partial(backbone_forward, case.model, **given)}


BENCH = Bench(__doc__, "ladder.csv", lambda _: [Step()], candidates)

if __name__ == "__main__":
    BENCH.main()
