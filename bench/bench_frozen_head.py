"""The loss of a language model whose decoder is frozen, with and without its logits in memory.

`python -m bench.bench_frozen_head` writes the times of the loss alone and of whole steps to
`bench/data/frozen_head.csv`. The model has SmolLM2-135M's shapes, V = 49,152 words and hidden size K = 576, with random
weights. Ratios are those of making the logits: above 1, the frozen head is faster.

Predicted before measuring, for N tokens in float32. Products are the same in both forms, 4 N K V operations with
backward and 2 N K V without. Making logits reads or writes N V numbers 8 times more with backward (log-softmax 3, its
gradient 3, the loss's 2) and 5 times without, from memory; a chunk does so in part from the cache. 4 N K V = 232 GFLOP
at N = 2,048 take 4 s on one core, and 8 N V numbers at 10 GB/s 0.3 s: 1.1 with backward. A step of LST has the
backbone's 0.5 TFLOP beside it: 1.03.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from bench.backbones import SMOLLM2
from bench.harness import Bench, Candidates, Run
from fastpeft import LadderConfig, LadderModel, SivaConfig, fuse_head, unfuse_head
from fastpeft.functional import frozen_head_cross_entropy

FORMS: dict[str, Callable[[Any], Any]] = {"frozen head": fuse_head, "logits": unfuse_head}


@dataclass(frozen=True)
class Case:
    """The step of a method, or the loss alone, on one text."""

    method: str  # "alone", "LST", "SiVA" or "MeZO"
    tokens: int
    work: str  # "forward", or "training" with backward


def cases(device: torch.device) -> Iterator[Case]:
    """On a card the loss alone."""
    methods = ("alone", "LST", "SiVA", "MeZO") if device.type == "cpu" else ("alone",)
    for tokens, method, work in itertools.product((512, 2048), methods, ("training", "forward")):
        if method == "alone" or (work == "forward") == (method == "MeZO"):
            yield Case(method, tokens, work)


def of_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), labels)


def candidates(case: Case, device: torch.device) -> Candidates:
    """Both forms on random tokens."""
    torch.manual_seed(0)
    if case.method == "alone":
        return losses(case, device)
    base = LlamaForCausalLM(SMOLLM2).to(device)
    model, is_training = prepared(base, case.method), case.work == "training"
    ids = torch.randint(SMOLLM2.vocab_size, (1, case.tokens), device=device)

    def step(form: str) -> None:
        FORMS[form](model)
        with torch.set_grad_enabled(is_training):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        if is_training:
            loss.backward()
        model.zero_grad()

    return {form: partial(partial, step, form) for form in FORMS}


def losses(case: Case, device: torch.device) -> Candidates:
    """The loss alone, in bfloat16 on a card, where liger-kernel is beside it if that is installed."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    words, width = SMOLLM2.vocab_size, SMOLLM2.hidden_size
    weight = (torch.randn(words, width) / width**0.5).to(device, dtype)
    hidden = torch.randn(case.tokens, width).to(device, dtype)
    labels = torch.randint(words, (case.tokens,)).to(device)

    def ready(function: Callable[..., Tensor]) -> Run:
        if case.work == "forward":
            return torch.no_grad()(lambda: function(hidden, weight, labels))
        states = hidden.clone().requires_grad_()
        return lambda: torch.autograd.grad(function(states, weight, labels), states)

    found = {"frozen head": partial(ready, frozen_head_cross_entropy), "logits": partial(ready, of_logits)}
    if weight.is_cuda and importlib.util.find_spec("liger_kernel"):
        liger = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
        found["liger-kernel"] = partial(ready, lambda states, *_: liger(weight, states, labels))
    return found


def prepared(base: nn.Module, method: str) -> nn.Module:
    """The model that a step of a method trains; of MeZO, which perturbs all weights, the base."""
    base.requires_grad_(False)
    if method == "LST":
        form = LadderConfig(window_size=1, fusion="gated", layers_per_block=1, normalise_features=False)  # the paper's
        return LadderModel(base, form).eval()  # without dropout: same losses
    if method == "SiVA":
        return get_peft_model(base, SivaConfig(r=4, target_modules=["q_proj", "k_proj"])).eval()
    return base.requires_grad_().eval()


BENCH = Bench(__doc__, "frozen_head.csv", cases, candidates, rounds=5)

if __name__ == "__main__":
    BENCH.main()
