"""Peak memory of one training step of Llama shapes by each method, simulated: `python -m bench.llama_memory`.

The shapes are those of Llama-3.2-1B, Llama-3.2-3B and Llama-3.1-8B: `bench/data/llama_memory.csv`. Weights in bfloat16,
activations by autocast in bfloat16, 8-bit AdamW as bitsandbytes and the Trainer keep it; adapters of rank 16 in all
linear layers; the loss of a frozen head without its logits (`fastpeft.fuse_head`), but in the rows of `logits`. Texts
fill their batch, so attention has no mask. No weight is read, so none has memory. Rows that are there are kept: a run
that is cut off goes on, and after a change of the code the file is deleted first.

- `lora` beside nf4 is QLoRA as bitsandbytes keeps it, with its scales in 8 bits, and without the float32 copies of
  embeddings and head that PEFT's `prepare_model_for_kbit_training` makes. `siva` beside nf4 is QSiVA. Of ours nf4 has
  scales in float32, and nf4-double in 8 bits.
- `lst` and `k-lst` (k = 9) have a side network of the model's width divided by `reduction`, with six blocks, the
  default, or with one for each layer, as the paper has them.
- `mezo` perturbs all weights; beside nf4 it perturbs what QLoRA trains.
- Checkpointing keeps a layer's input and computes the layer again in backward; of a side network it does so with the
  side blocks. The backbone of these keeps nothing in either case.

A row tells apart weights, gradients, optimizer state, and the rest of the peak. The peak need not be where all
gradients are: then the rest is smaller than the activations.

Counted on paper for 8B, 2,048 tokens, batch 1, in MB (2^20 bytes), before it was simulated: weights 15,317 in bfloat16,
5,748 in nf4 and 5,438 with its scales in 8 bits; of LoRA 14,000 in activations, checkpointed 1,000; of LST with six
blocks 6,150 in all beside nf4-double, and 8,700 with one for each layer; of 9-LST with six 7,600.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, get_args
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from bench.backbones import checkpoint_activations
from bench.harness import DATA, Row, option_parser, put_row, read_rows
from fastpeft import LadderConfig, LadderModel, SivaConfig, fuse_head
from fastpeft.methods.side_network import GATED
from fastpeft.ops.frozen_head_cross_entropy import FEWEST_TOKENS
from fastpeft.ops.quantise import Format, QuantisedLinear
from fastpeft.support.environment import versions
from fastpeft.training.memory import (
    MEBIBYTE,
    BlockwiseAdamW,
    embeddings_in_float,
    simulate_training_step,
)

FILE = DATA / "llama_memory.csv"
RANK = 16
SIZES = (1, 2048), (4, 2048), (1, 512), (4, 512)  # rows of a batch, tokens
NARROW, DEFAULT = "16", "8"  # reductions: 256 and 512 wide at 8B
EACH = "1"  # layers for each side block
_LLAMA: dict[str, Any] = {"vocab_size": 128_256, "num_key_value_heads": 8, "max_position_embeddings": 131_072}
_TIED = {"tie_word_embeddings": True}
MODELS = {
    "8B": LlamaConfig(
        hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32, **_LLAMA
    ),
    "3B": LlamaConfig(
        hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, **_LLAMA, **_TIED
    ),
    "1B": LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, **_LLAMA, **_TIED
    ),
}


@dataclass(frozen=True)
class Case:
    """A method, the format of the frozen weights, the form of the loss, of a side network its reduction and the layers
    for each block, and whether activations are computed again."""

    method: str
    backbone: str = "bfloat16"
    head: str = "fused"
    reduction: str = ""
    layers_per_block: str = ""
    checkpointing: str = "no"


_ONCE = [
    Case("lora", "nf4"),
    Case("lora", "nf4", "logits"),
    *(Case("siva", dtype) for dtype in ("nf4", "nf4-double")),
    *(
        Case(method, dtype, reduction=DEFAULT)
        for dtype in ("nf4-double", "nf4", "int8", "bfloat16")
        for method in ("lst", "k-lst")
    ),
    *(
        Case(method, "nf4-double", reduction=r, layers_per_block=EACH)
        for r in (NARROW, DEFAULT)
        for method in ("lst", "k-lst")
    ),
    Case("lora"),
    Case("siva"),
    Case("full", head="logits"),
]
CASES = [
    *(replace(case, checkpointing=checkpointing) for case in _ONCE for checkpointing in ("no", "yes")),
    Case("mezo"),
    Case("mezo", "nf4"),
]
# transformers makes no mask for an attention whose name it does not know; beside sdpa it asks values of the batch for
# padding, which a fake tensor does not have, and so would make one
UNMASKED = "causal_sdpa"
AttentionInterface.register(UNMASKED, sdpa_attention_forward)
KEY = ("model", *asdict(CASES[0]), "batch", "tokens")


def blank(config: LlamaConfig) -> Any:
    """A model in bfloat16 on the meta device."""
    with torch.device("meta"):
        return LlamaForCausalLM._from_config(config, attn_implementation=UNMASKED, dtype=torch.bfloat16)


def prepared(case: Case, model: Any) -> Any:
    """The model that a step of `case` trains, made of a Llama on the meta device."""
    quantised = case.backbone in get_args(Format)
    if case.method in ("lst", "k-lst"):
        if quantised:
            _replace_linears(model, partial(QuantisedLinear, kind=case.backbone))
        config = LadderConfig(
            **(GATED if case.method == "lst" else {}),
            reduction_factor=int(case.reduction),
            layers_per_block=int(case.layers_per_block) if case.layers_per_block else None,
            causal=True,
            pack_weights=False,
        )
        with torch.device("meta"):
            model = LadderModel(model, config)
    elif case.method == "siva":
        common: dict[str, Any] = {"residual_dtype": case.backbone} if quantised else {}
        common |= {"quant_iterations": 0, "pack_weights": False}
        model = _adapted(model, SivaConfig, **common)
    elif case.method == "lora" or quantised:
        if quantised:
            _replace_linears(model, blank_linear4bit)
            model.is_loaded_in_4bit = True
        model = _adapted(model, LoraConfig, lora_alpha=2 * RANK)
    if case.checkpointing == "yes":
        checkpoint_activations(model)
    _give_memory(model)
    return fuse_head(model) if case.head == "fused" else model


def _adapted(model: Any, kind: Any, **given: Any) -> Any:
    return get_peft_model(model, kind(task_type="CAUSAL_LM", r=RANK, target_modules="all-linear", **given))


def _replace_linears(model: Any, made_of: Callable[[nn.Linear], nn.Module]) -> None:
    """Replace each linear layer before the head by what `made_of` makes of it."""
    body = model.base_model
    for name, layer in list(body.named_modules()):
        if type(layer) is nn.Linear:
            body.set_submodule(name, made_of(layer))


def blank_linear4bit(layer: nn.Linear) -> nn.Module:
    """A layer of bitsandbytes in nf4, its scales in 8 bits, with any values: the bytes of `in_4_bits`."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit, Params4bit

    count, blocks = layer.weight.numel(), -(-layer.weight.numel() // 64)
    scales = QuantState(torch.empty(-(-blocks // 256)), code=torch.empty(256), blocksize=256, dtype=torch.float32)
    state = QuantState(
        torch.empty(blocks, dtype=torch.uint8),
        shape=layer.weight.shape,
        code=torch.empty(16),
        blocksize=64,
        quant_type="nf4",
        dtype=layer.weight.dtype,
        offset=torch.empty(()),
        state2=scales,
    )
    made = Linear4bit(layer.in_features, layer.out_features, bias=False, quant_type="nf4", device="meta")
    codes = torch.empty(count // 2, 1, dtype=torch.uint8)
    made.weight = Params4bit(codes, False, state, quant_type="nf4", module=made, bnb_quantized=True)
    made.quant_state = state
    made.support_avx512bf16_for_cpu = False  # as `in_4_bits` does
    return made


def _give_memory(model: nn.Module) -> None:
    """Move what is on the meta device to memory that nobody touches; tied weights stay tied."""
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is not None and tensor.is_meta:
                    empty = made.setdefault(tensor, torch.empty_like(tensor, device="cpu"))
                    own[name] = nn.Parameter(empty, tensor.requires_grad) if own is module._parameters else empty
                    made[tensor] = own[name]


def batch_of(rows: int, tokens: int) -> dict[str, Any]:
    """A batch without padding."""
    ids = torch.randint(1000, (rows, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def simulate(name: str, case: Case, config: LlamaConfig, rows: int, tokens: int) -> Row:
    """A row of a step of such a shape, as on a card."""
    model = prepared(case, blank(config))
    adamw = partial(BlockwiseAdamW, in_float=embeddings_in_float(model))
    batch, optimizer = batch_of(rows, tokens), None if case.method == "mezo" else adamw
    with patch.dict(FEWEST_TOKENS, cpu=FEWEST_TOKENS["cuda"]):  # a card's chunk of the loss
        found = simulate_training_step(model, batch, optimizer, torch.bfloat16)
    parts = {"weights": found.weights, "gradients": found.gradients, "optimizer": found.optimizer}
    parts |= {"rest": found.activations, "peak": found.peak}
    return {
        **{"model": name, **asdict(case), "batch": str(rows), "tokens": str(tokens)},
        "trained": str(sum(p.numel() for p in model.parameters() if p.requires_grad)),
        **{f"{part}_mb": f"{nbytes / MEBIBYTE:.1f}" for part, nbytes in parts.items()},
        "torch": versions()["torch"],
    }


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default all")
    parser.add_argument("--methods", nargs="+", help="default all")
    given = parser.parse_args()
    there = {tuple(row[column] for column in KEY) for row in read_rows(FILE)}
    for size, name, case in itertools.product(SIZES, given.models, CASES):
        own = (name, *asdict(case).values(), *map(str, size))
        if own not in there and case.method in (given.methods or (case.method,)):
            row = simulate(name, case, MODELS[name], *size)
            put_row(FILE, row, KEY)
            print(", ".join(row.values()), flush=True)


if __name__ == "__main__":
    main()
