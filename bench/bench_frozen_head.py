"""The loss of a language model whose decoder is frozen, with and without its logits in memory.

`python -m bench.bench_frozen_head --model models/smollm2` writes the times of the loss alone and of whole steps to
`bench/data/frozen_head.csv`, and with `--memory` peaks of live tensors and how far both losses and gradients are apart
to `bench/data/frozen_head_memory.csv`. The model is SmolLM2-135M (`python -m bench.pretrained smollm2 models/smollm2`):
V = 49,152 words, hidden size K = 576. Ratios are those of making the logits: above 1, the frozen head is faster.

Predicted before measuring, for N tokens in float32. Products are the same in both forms, 4 N K V operations with
backward and 2 N K V without. Making logits reads or writes N V numbers 8 times more with backward (log-softmax 3, its
gradient 3, the loss's 2) and 5 times without, from memory; a chunk does so in part from the cache. 4 N K V = 232 GFLOP
at N = 2,048 take 4 s on one core, and 8 N V numbers at 10 GB/s 0.3 s: 1.1 with backward. A step of LST has the
backbone's 0.5 TFLOP beside it: 1.03.
Memory: 4 N V bytes are 96 MB at 512 tokens and 384 MB at 2,048, of which making logits has three with backward and two
without; the frozen head has 24 MB, a chunk of 128 tokens, and N K for the gradient, 1 and 5 MB.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from bench.harness import DATA, Candidates, Row, machine, measure, option_parser, put_row
from fastpeft import LadderConfig, LadderModel, SivaConfig, fuse_head, unfuse_head
from fastpeft.functional import frozen_head_cross_entropy
from fastpeft.ops import aten
from fastpeft.ops.frozen_head_cross_entropy import tokens_of_chunk
from fastpeft.training.memory import MEBIBYTE, MemoryTracker, simulate_training_step

FILE, MEMORY_FILE = DATA / "frozen_head.csv", DATA / "frozen_head_memory.csv"
CPU = torch.device("cpu")
TOKENS = 512, 2048
ROUNDS = 5
HEADS = (576, 49152), (2048, 128256), (4096, 128256)  # SmolLM2, Llama-3.2-1B, Llama-3.1-8B: width, words
FORMS: dict[str, Callable[[Any], Any]] = {"frozen head": fuse_head, "logits": unfuse_head}


def of_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), labels)


def losses(weight: Tensor, tokens: int, training: bool) -> Candidates:
    """The loss alone, on random states; on a card beside the form of ATen and, where it is installed, liger-kernel."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, weight.shape[1], generator=generator).to(weight)
    labels = torch.randint(weight.shape[0], (tokens,), generator=generator).to(weight.device)

    def ready(function: Callable[..., Tensor]) -> Callable[[], object]:
        if not training:
            return torch.no_grad()(lambda: function(hidden, weight, labels))
        states = hidden.clone().requires_grad_()
        return lambda: torch.autograd.grad(function(states, weight, labels), states)

    found = {"frozen head": ready(frozen_head_cross_entropy), "logits": ready(of_logits)}
    if weight.is_cuda:
        found["aten"] = torch.no_grad()(
            lambda: aten.frozen_head_cross_entropy(hidden, weight, labels, None, -100, training)
        )
        if importlib.util.find_spec("liger_kernel"):
            liger = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
            found["liger-kernel"] = ready(lambda states, *_: liger(weight, states, labels))
    return found


def record_on_card(device: torch.device, rounds: int) -> None:
    """The loss alone at the shapes of several heads, in bfloat16, on random weights."""
    for (width, words), tokens, work in itertools.product(HEADS, TOKENS, ("training", "forward")):
        weight = torch.randn(words, width, device=device, dtype=torch.bfloat16) / width**0.5
        case = {"head": f"{words}x{width}", "tokens": str(tokens), "work": work}
        measure(FILE, case, losses(weight, tokens, work == "training"), device, rounds)


def prepared(base: nn.Module, method: str) -> nn.Module:
    """The model that a step of a method trains; of MeZO, which perturbs all weights, the base."""
    base.requires_grad_(False)
    if method == "LST":
        torch.manual_seed(0)
        form = LadderConfig(window_size=1, fusion="gated", layers_per_block=1, normalise_features=False)  # the paper's
        return LadderModel(base, form).eval()  # without dropout: same losses
    if method == "SiVA":
        return get_peft_model(base, SivaConfig(r=4, target_modules=["q_proj", "k_proj"])).eval()
    return base.requires_grad_().eval()


def batch_of(base: Any, tokens: int) -> dict[str, Tensor]:
    """One text of random tokens."""
    ids = torch.randint(base.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def step(model: Any, form: str, batch: dict[str, Tensor], backward: bool) -> Tensor:
    """Forward, and backward but for MeZO."""
    FORMS[form](model)
    model.zero_grad()
    with torch.set_grad_enabled(backward):
        loss: Tensor = model(**batch, use_cache=False).loss
    if backward:
        loss.backward()
    return loss.detach()


def record_times(load: Callable[[], Any], method: str, tokens: int, rounds: int, file: Any = FILE) -> None:
    """Rows of a method's step, or of the loss "alone"."""
    base = load()
    if method == "alone":
        for work in ("training", "forward"):
            weight = base.get_output_embeddings().weight.detach()
            found = losses(weight, tokens, work == "training")
            measure(file, {"method": method, "tokens": str(tokens), "work": work}, found, CPU, rounds)
        return
    model, batch = prepared(base, method), batch_of(base, tokens)
    backward = method != "MeZO"
    found = {form: partial(step, model, form, batch, backward) for form in FORMS}
    work = "training" if backward else "forward"
    measure(file, {"method": method, "tokens": str(tokens), "work": work}, found, CPU, rounds)


def chunk_bytes(base: Any, tokens: int, training: bool) -> int:
    """What the op allocates inside itself, which a tracker of a whole step does not see."""
    weight = base.get_output_embeddings().weight.detach()
    hidden, labels = torch.zeros(tokens, weight.shape[1], dtype=weight.dtype), torch.zeros(tokens, dtype=torch.long)
    with MemoryTracker() as tracker:
        tracker.add([hidden, weight, labels])
        before = tracker.current
        results = aten.frozen_head_cross_entropy(hidden, weight, labels, None, -100, training)
    return tracker.peak - before - sum(result.numel() * result.element_size() for result in results)


def record_memory(load: Callable[[], Any], method: str, tokens: int, file: Any = MEMORY_FILE) -> None:
    """Peaks of a step in float32 that ran, and of one in bfloat16 as on a card that was simulated, with AdamW.

    The chunk is added to the peak of the frozen head, as if both were there at one time.
    """
    base = load()
    backward = method != "MeZO"
    chunk = chunk_bytes(base, tokens, backward)
    model, batch = prepared(base, method), batch_of(base, tokens)
    reached: dict[str, tuple[Tensor, Tensor]] = {}
    key = ("method", "tokens", "dtype", "candidate")
    case: Row = {"method": method, "tokens": str(tokens)}
    where = {name: machine(CPU)[name] for name in ("torch", "fastpeft")}
    for form in FORMS:
        with MemoryTracker() as tracker:
            tracker.add([*model.parameters(), *model.buffers()])
            loss = step(model, form, batch, backward)
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        reached[form] = loss, torch.cat(gradients) if gradients else loss.new_zeros(1)
        inside = chunk if form == "frozen head" else 0
        figures = {"peak_mb": f"{(tracker.peak + inside) / MEBIBYTE:.1f}", "chunk_mb": f"{inside / MEBIBYTE:.1f}"}
        apart = {"loss_apart": "", "gradients_apart": ""}
        if form == "logits":
            ours, theirs = reached.values()
            apart["loss_apart"] = f"{(ours[0] - theirs[0]).abs().item():.2g}"
            apart["gradients_apart"] = (
                f"{((ours[1] - theirs[1]).norm() / theirs[1].norm()).item():.2g}" if backward else ""
            )
        put_row(file, {**case, "dtype": "float32", "candidate": form, **figures, **apart, **where}, key)
    model = prepared(load().bfloat16(), method)
    words = base.config.vocab_size
    for form, change in FORMS.items():
        change(model)
        adamw = partial(torch.optim.AdamW, fused=True)
        optimizer = adamw if backward else None
        found = simulate_training_step(model, batch, optimizer, torch.bfloat16, estimate_inside=False)
        inside = 2 * tokens_of_chunk(words, torch.device("cuda")) * words if form == "frozen head" else 0
        figures = {"peak_mb": f"{(found.peak + inside) / MEBIBYTE:.1f}", "chunk_mb": f"{inside / MEBIBYTE:.1f}"}
        row = {**case, "dtype": "bfloat16", "candidate": form, **figures, "loss_apart": "", "gradients_apart": ""}
        put_row(file, {**row, **where}, key)


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("--model", default="models/smollm2", help="a folder, default models/smollm2")
    parser.add_argument("--memory", action="store_true", help="peaks and differences instead of times")
    parser.add_argument("--methods", nargs="+", default=["alone", "LST", "SiVA", "MeZO"])
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default {ROUNDS}")
    parser.add_argument("--device", default="cpu", help="cpu (default), or cuda: the loss alone, without a model")
    given = parser.parse_args()
    if given.device != "cpu":
        record_on_card(torch.device(given.device), given.rounds)
        return
    load = partial(AutoModelForCausalLM.from_pretrained, given.model, dtype=torch.float32)
    for tokens in given.tokens:
        for method in given.methods:
            if not given.memory:
                record_times(load, method, tokens, given.rounds)
            elif method != "alone":
                record_memory(load, method, tokens)


if __name__ == "__main__":
    main()
