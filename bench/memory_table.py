"""Peak memory of one training step of a RoBERTa-large by each method, simulated: `python -m bench.memory_table`.

Batch 16, weights in bfloat16, activations by autocast in bfloat16, fused AdamW where nothing else is said, rank 4:
`bench/data/memory.csv`. With weights in float32, as `fastpeft train` and the files of most models have them, MeZO
computes without autocast. 8-bit AdamW is counted as bitsandbytes keeps it; an optimizer "in backward" steps there. No
weight is read, so they are zeros. What a step holds at its peak is told apart: weights, gradients, optimizer state, and
the rest, which are activations and temporaries.

What to expect: 355.4 M weights are 678 MB. A layer that an adapter trains keeps its input for backward, which query and
key share; a side network keeps nothing of its backbone but the features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import RobertaConfig, RobertaForSequenceClassification

from bench.backbones import LARGE, checkpoint_activations
from bench.harness import DATA, option_parser, put_row
from fastpeft import LadderConfig, LadderModel, SivaConfig
from fastpeft.methods.side_network import GATED
from fastpeft.support.environment import versions
from fastpeft.training.memory import MEBIBYTE, BlockwiseAdamW, MemoryEstimate, fused_adamw, simulate_training_step

FILE = DATA / "memory.csv"
RANK, BATCH = 4, 16
LENGTHS = (64, 128, 512)
TARGETS: dict[str, Any] = {
    "query+key": ["query", "key"],
    "key+value": ["key", "value"],
    "all linear": "all-linear",
}


@dataclass(frozen=True)
class Case:
    """A method, what it adapts, dtypes of what it trains beside the model and of the frozen rest, and the optimizer.

    The rest is SiVA's residual or a side network's backbone; none is given where it is in bfloat16 as the model. A side
    network has six blocks where no `layers_per_block` is given, as it is by default; the paper's form is 1. With
    `checkpointing` "yes" the activations of layers, or of a side network's blocks, are computed again in backward. The
    model is loaded in `base_dtype`, bfloat16 where none is given.
    """

    method: str
    targets: str = ""
    adapter_dtype: str = ""
    residual_dtype: str = ""
    optimizer: str = ""
    layers_per_block: str = ""
    checkpointing: str = ""
    base_dtype: str = ""


CASES = [
    Case("full"),
    *(Case(m, t, d) for t in TARGETS for d in ("float32", "bfloat16") for m in ("lora", "pissa", "siva")),
    *(Case("siva", t, d, q) for t in TARGETS for d in ("float32", "bfloat16") for q in ("int8", "nf4")),
    Case("k-lst", adapter_dtype="float32"),
    *(Case("k-lst", adapter_dtype="float32", residual_dtype=q) for q in ("int8", "nf4")),
    Case("lst", adapter_dtype="float32"),
    *(Case(method, adapter_dtype="float32", layers_per_block="1") for method in ("k-lst", "lst")),
    Case("mezo"),
    Case("full", optimizer="AdamW in backward"),
    *(
        Case("k-lst", adapter_dtype="float32", optimizer=o)
        for o in ("AdamW in backward", "8-bit AdamW", "8-bit AdamW in backward")
    ),
    Case("full", checkpointing="yes"),
    *(Case(m, t, "float32", checkpointing="yes") for t in ("query+key", "all linear") for m in ("lora", "siva")),
    *(Case(m, adapter_dtype="float32", checkpointing="yes") for m in ("k-lst", "lst")),
    *(Case(m, base_dtype="float32") for m in ("full", "mezo")),
    *(Case(m, t, "float32", base_dtype="float32") for t in ("query+key", "all linear") for m in ("lora", "siva")),
    *(Case(m, adapter_dtype="float32", base_dtype="float32") for m in ("k-lst", "lst")),
]


def large(config: RobertaConfig, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A classifier, all zeros, made without drawing weights first."""
    with torch.device("meta"):
        model = RobertaForSequenceClassification(config).to(dtype)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.zero_()
    return model


def prepared(case: Case, config: RobertaConfig) -> nn.Module:
    """The model that a step of `case` trains."""
    model = large(config, torch.float32 if case.base_dtype else torch.bfloat16)
    if case.method in ("full", "mezo"):
        return model
    if case.method in ("k-lst", "lst"):
        config = LadderConfig(
            **(GATED if case.method == "lst" else {}),
            layers_per_block=int(case.layers_per_block) if case.layers_per_block else None,
            backbone_dtype=case.residual_dtype or None,
            pack_weights=False,
        )
        return LadderModel(model, config)
    common: dict[str, Any] = {"task_type": "SEQ_CLS", "r": RANK, "target_modules": TARGETS[case.targets]}
    wrap = partial(get_peft_model, autocast_adapter_dtype=case.adapter_dtype == "float32")
    if case.method == "siva":
        adapted = wrap(
            model,
            SivaConfig(**common, init_weights="saved", residual_dtype=case.residual_dtype or None, pack_weights=False),
        )  # not decomposed, but filled in:
        blank = {name: torch.zeros_like(tensor) for name, tensor in get_peft_model_state_dict(adapted).items()}
        set_peft_model_state_dict(adapted, blank)
        return adapted
    start = "pissa_niter_1" if case.method == "pissa" else True
    return wrap(model, LoraConfig(**common, lora_alpha=RANK, init_lora_weights=start))


def estimate(case: Case, model: nn.Module, tokens: int) -> MemoryEstimate:
    """Memory of a step on a batch of `tokens` tokens a row."""
    ids = torch.zeros(BATCH, tokens, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0]}
    adamw: Callable[[list[torch.Tensor]], torch.optim.Optimizer]
    adamw = BlockwiseAdamW if case.optimizer.startswith("8-bit") else fused_adamw
    in_backward = case.optimizer.endswith("in backward")
    if case.method == "mezo":
        return simulate_training_step(model, batch, None, None if case.base_dtype else torch.bfloat16)
    return simulate_training_step(model, batch, adamw, torch.bfloat16, in_backward)


def rows(cases: list[Case], config: RobertaConfig, lengths: tuple[int, ...]) -> Iterator[dict[str, str]]:
    """One row for each case and length."""
    for case in cases:
        model = prepared(case, config)
        if case.checkpointing:
            checkpoint_activations(model)
        for tokens in lengths:
            found = estimate(case, model, tokens)
            parts = ("weights", "gradients", "optimizer", "activations", "peak")
            megabytes = {f"{part}_mb": f"{getattr(found, part) / MEBIBYTE:.1f}" for part in parts}
            trained = str(sum(p.numel() for p in model.parameters() if p.requires_grad))
            torch_version = versions()["torch"]
            yield {**asdict(case), "tokens": str(tokens), "trained": trained, **megabytes, "torch": torch_version}


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("--only", metavar="TEXT", help="cases with this method, targets, dtype or optimizer only")
    only = parser.parse_args().only
    cases = [case for case in CASES if only in (None, *asdict(case).values())]
    for row in rows(cases, LARGE, LENGTHS):
        put_row(FILE, row, key=(*Case.__dataclass_fields__, "tokens"))
        print(", ".join(row.values()), flush=True)


if __name__ == "__main__":
    main()
