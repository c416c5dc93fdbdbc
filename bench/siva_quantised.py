"""What rounding the frozen weights costs, in error and in time: `python -m bench.siva_quantised`.

All 36 linear layers of the bundled model are replaced by an approximation W~ of their weight W, in float32:
`bench/data/siva_quantised.csv`. Beside the format alone there are ways to fit factors of rank r to it:

- loftq: `Q = quant(W - U s V)`, then the top triplets of `W - Q`, five times from factors of zero. PEFT's own form
  needs a card; this is its loop.
- qpissa: the top triplets of W, the rest quantised. The same as SiVA's with no iteration.
- siva: the same and five iterations, the default.

`weight_error` is `|W~ - W| / |W|`, Frobenius; `output_error` is `|x (W~ - W)^T| / |x W^T|` on the layer's inputs in the
unchanged model; both are means over the layers. `logit_error` is `|l~ - l| / |l|` of the masked words' logits, less
their mean over the vocabulary, which no probability depends on. The texts are held-out sentences of the demo data.
`--pretrained models/mpnet` takes the linear layers of the first, the middle and the last block of a model that
`bench.pretrained` fetched, and measures `weight_error` alone. Predicted: all are nearer than the weight alone, and SiVA
the nearest, since a turn of the loop cannot take it further away where rounding is even, and it begins with PiSSA's.

`python -m bench.siva_quantised --steps` writes `bench/data/siva_quantised_steps.csv`, times in float32: products with a
weight of nf4, and training steps of SiVA on nf4 beside QLoRA's, all linear layers of 4 blocks of known shapes with
random weights, which decide no time. Counted for a weight (N, K) and M rows: each product has 2 M N K operations, and
NK numbers are made of 0.56 bytes each, in forward and again backward. bitsandbytes makes 1.9 numbers a nanosecond here
and writes them out, 4 NK bytes; the compiled loop makes 6.5 and leaves them in cache. One thread has 80 operations a
nanosecond in a product. So numbers are to take 16 % of a product by 128 rows and 4 % by 512 of QLoRA, 5 % and 1 % of
SiVA. Beside it QLoRA goes over h seven times (a copy, a product that is scaled, a sum) and SiVA twice. Predicted for a
step: SiVA takes 0.8 of QLoRA's time at 128 rows and 0.93 at 512. Not more than 1.05 is the aim.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

from bench.backbones import BASE
from bench.bench_training import BATCH_SIZE, step_of
from bench.harness import DATA, ROUNDS, Candidates, measure, option_parser, put_row
from fastpeft.data.examples import load_data
from fastpeft.methods.preparation import Preparation
from fastpeft.methods.registry import get_method
from fastpeft.methods.wrapping import in_4_bits
from fastpeft.models import load_language_model
from fastpeft.ops import reference
from fastpeft.ops.quantise import Format, QuantisedWeight
from fastpeft.siva.decompose import Factors, subtract, top_triplets
from fastpeft.siva.quantise import ITERATIONS, decompose_quantised
from fastpeft.support.environment import versions

FILE, STEPS_FILE = DATA / "siva_quantised.csv", DATA / "siva_quantised_steps.csv"
TEXTS = 64
RANKS = (4, 16, 64)
FORMATS: tuple[Format, ...] = ("int8", "nf4")

_FOUR = {"num_hidden_layers": 4}
MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {  # with the module that trains
    "SmolLM2-135M": (
        lambda: LlamaForSequenceClassification(
            LlamaConfig(
                **{"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "pad_token_id": 2},
                **{"num_attention_heads": 9, "num_key_value_heads": 3, **_FOUR},
            )
        ),
        "score",
    ),
    "MPNet-base": (  # as RoBERTa-base
        lambda: RobertaForSequenceClassification(RobertaConfig.from_dict({**BASE.to_dict(), **_FOUR})),
        "classifier",
    ),
}
ERRORS = ("weight_error", "output_error", "logit_error")
_BLOCK = re.compile(r"layers?\.(\d+)\..*weight$")
SHAPES = ((576, 576), (1536, 576), (3072, 768), (768, 3072))  # of their layers, (N, K)
ROWS = (1, 16, 128, 512)
STEP_TOKENS, STEP_RANKS = (8, 32), (4, 16)
CPU = torch.device("cpu")

Approximation = Callable[[Tensor], Tensor]


def whole(rest: QuantisedWeight, factors: Factors) -> Tensor:
    return rest.dequantise(torch.float32) + factors.product()


def plain(weight: Tensor, kind: Format) -> Tensor:
    return QuantisedWeight(weight, kind).dequantise(torch.float32)


def loftq(weight: Tensor, kind: Format, r: int) -> Tensor:
    rest = QuantisedWeight(weight, kind)
    for turn in range(ITERATIONS):
        factors = top_triplets(weight - rest.dequantise(torch.float32), r)
        if turn < ITERATIONS - 1:
            rest = QuantisedWeight(subtract(weight, factors), kind)
    return whole(rest, factors)


def siva(weight: Tensor, kind: Format, r: int, iterations: int) -> Tensor:
    factors, rest = decompose_quantised(weight, r, kind, iterations)
    return whole(rest, factors)


def ways(kind: Format, r: int) -> Iterator[tuple[str, str, Approximation]]:
    """Name, rank and function of each approximation."""
    yield "plain", "", partial(plain, kind=kind)
    yield "loftq", str(r), partial(loftq, kind=kind, r=r)
    for name, iterations in (("qpissa", 0), ("siva", ITERATIONS)):
        yield name, str(r), partial(siva, kind=kind, r=r, iterations=iterations)


class Model:
    """The bundled model and what it makes of the texts."""

    def __init__(self, texts: int = TEXTS) -> None:
        self.model, tokenizer = load_language_model("demo")
        self.model.eval()
        sentences = [f"{text} It was {tokenizer.mask_token}." for text in load_data("demo").dev.texts[:texts]]
        self.batch = tokenizer(sentences, return_tensors="pt", padding=True)
        self.layers = {n: m for n, m in self.model.named_modules() if isinstance(m, nn.Linear) and ".layer." in n}
        self.mask = self.batch["input_ids"] == tokenizer.mask_token_id
        self.inputs: dict[str, Tensor] = {}
        visible = self.batch["attention_mask"].bool()

        def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda _, given: self.inputs.update({name: given[0][visible]})

        hooks = [layer.register_forward_pre_hook(keep(name)) for name, layer in self.layers.items()]
        self.expected = self.logits()
        for hook in hooks:
            hook.remove()

    @torch.no_grad()
    def logits(self) -> Tensor:
        found: Tensor = self.model(**self.batch).logits[self.mask]
        return found - found.mean(-1, keepdim=True)

    @torch.no_grad()
    def errors(self, approximation: Approximation) -> dict[str, float]:
        """Of the layers and of the logits; the model is left as it was."""
        weights = {name: layer.weight.data for name, layer in self.layers.items()}
        of_weight, of_output = [], []
        try:
            for name, layer in self.layers.items():
                layer.weight.data = approximation(weights[name])
                change, x = layer.weight.data - weights[name], self.inputs[name]
                of_weight.append(change.norm() / weights[name].norm())
                of_output.append((x @ change.t()).norm() / (x @ weights[name].t()).norm())
            of_logits = (self.logits() - self.expected).norm() / self.expected.norm()
        finally:
            for name, layer in self.layers.items():
                layer.weight.data = weights[name]
        means = (float(torch.stack(each).mean()) for each in (of_weight, of_output))
        return dict(zip(ERRORS, (*means, float(of_logits))))


class Pretrained:
    """Some linear layers of a model in a folder."""

    def __init__(self, folder: Path) -> None:
        with safe_open(folder / "model.safetensors", "pt") as file:
            names = [name for name in file.keys() if _BLOCK.search(name)]  # noqa: SIM118
            blocks = sorted({int(_BLOCK.findall(name)[0]) for name in names})
            wanted = {blocks[0], blocks[len(blocks) // 2], blocks[-1]}
            found = (file.get_tensor(name) for name in names if int(_BLOCK.findall(name)[0]) in wanted)
            self.weights = [weight.float() for weight in found if weight.dim() == 2]

    def errors(self, approximation: Approximation) -> dict[str, float]:
        """Of the weights."""
        found = [(approximation(weight) - weight).norm() / weight.norm() for weight in self.weights]
        return {"weight_error": float(torch.stack(found).mean())}


def products(shape: tuple[int, int], rows: int, backward: bool) -> Candidates:
    """A product with a weight of nf4 by blocks, by the whole weight as numbers, and with numbers that are there."""
    n, k = shape
    held = QuantisedWeight(torch.randn(n, k), "nf4")
    numbers, x = held.dequantise(torch.float32), torch.randn(rows, n if backward else k)
    if backward:
        given, dense = (x, held.codes, held.scales, k), partial(torch.mm, x, numbers)
    else:
        given, dense = (x, held.codes, held.scales, n, None), partial(torch.mm, x, numbers.t())
    name = "quantised_linear_backward" if backward else "quantised_linear"
    blocks, whole = getattr(torch.ops.fastpeft, name), getattr(reference, name)
    return {"blocks": partial(blocks, *given), "whole": partial(whole, *given), "dense": dense}


def steps(model: str, tokens: int, rank: int) -> Candidates:
    """A training step of QLoRA, of SiVA with a residual of nf4, and of SiVA on QLoRA's own base, by twice the rank."""
    make, head = MODELS[model]
    found = {}
    for name, method, settings in (
        ("qlora", "qlora", {}),
        ("siva", "siva", {"residual_dtype": "nf4", "quant_iterations": 0}),
        ("siva-4-bits", "siva", {}),
    ):
        torch.manual_seed(0)
        base = in_4_bits(make()) if name == "siva-4-bits" else make()
        prepared = get_method(method).prepare(base, Preparation([head], rank, "all-linear", settings))
        found[name] = step_of(prepared.train(), 0.0, CPU, tokens)
    return found


def time_steps(rounds: int) -> None:
    for shape in SHAPES:
        for rows in ROWS:
            for backward, work in enumerate(("h = x W^T", "dx = dh W")):
                case = {"work": work, "of": " x ".join(map(str, shape)), "rows": str(rows), "r": ""}
                with torch.no_grad():
                    measure(STEPS_FILE, case, products(shape, rows, bool(backward)), CPU, rounds)
    for model in MODELS:
        for tokens in STEP_TOKENS:
            for rank in STEP_RANKS:
                case = {"work": "training step", "of": model, "rows": str(BATCH_SIZE * tokens), "r": str(rank)}
                measure(STEPS_FILE, case, steps(model, tokens, rank), CPU, rounds)


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("--format", choices=FORMATS, help="this one only")
    parser.add_argument("--rank", type=int, help="this one only")
    parser.add_argument("--pretrained", type=Path, help="the folder of a model; without it the bundled one")
    parser.add_argument("--steps", action="store_true", help="times instead of errors")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"with --steps, default {ROUNDS}")
    given = parser.parse_args()
    if given.steps:
        time_steps(given.rounds)
        return
    model = Model() if given.pretrained is None else Pretrained(given.pretrained)
    name = "demo" if given.pretrained is None else given.pretrained.name
    for kind in FORMATS if given.format is None else (given.format,):
        for r in RANKS if given.rank is None else (given.rank,):
            for way, rank, approximation in ways(kind, r):
                figures = {error: f"{value:.3g}" for error, value in model.errors(approximation).items()}
                row = {"model": name, "format": kind, "way": way, "r": rank, **dict.fromkeys(ERRORS, ""), **figures}
                put_row(FILE, {**row, "torch": versions()["torch"]}, key=("model", "format", "way", "r"))
                print(", ".join(row.values()), flush=True)


if __name__ == "__main__":
    main()
