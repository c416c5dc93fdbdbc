"""What rounding the frozen weights costs, by format and by what goes with it: `python -m bench.siva_quantised`.

All 36 linear layers of the bundled model are replaced by an approximation W~ of their weight W, in float32:
`bench/data/siva_quantised.csv`. Beside the format alone there are ways to fit factors of rank r to it:

- loftq: `Q = quant(W - U s V)`, then the top triplets of `W - Q`, five times from factors of zero. PEFT's own form
  needs a card; this is its loop.
- qpissa: the top triplets of W, the rest quantised. The same as SiVA's with no iteration.
- siva: the same and five iterations, the default.

`weight_error` is `|W~ - W| / |W|`, Frobenius; `output_error` is `|x (W~ - W)^T| / |x W^T|` on the layer's inputs in the
unchanged model; both are means over the layers. `logit_error` is `|l~ - l| / |l|` of the masked words' logits, less
their mean over the vocabulary, which no probability depends on. The texts are held-out sentences of the demo data.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from bench.harness import DATA, put_row
from fastpeft.data.examples import load_data
from fastpeft.data.models import load_masked_lm
from fastpeft.ops.quantise import Format, QuantisedWeight
from fastpeft.siva.decompose import Factors, subtract, top_triplets
from fastpeft.siva.quantise import ITERATIONS, decompose_quantised
from fastpeft.support.environment import versions

FILE = DATA / "siva_quantised.csv"
TEXTS = 64
RANKS = (4, 16, 64)
FORMATS: tuple[Format, ...] = ("int8", "nf4")

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
        self.model, tokenizer = load_masked_lm("demo")
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
        return dict(zip(("weight_error", "output_error", "logit_error"), (*means, float(of_logits))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=FORMATS, help="this one only")
    parser.add_argument("--rank", type=int, help="this one only")
    given = parser.parse_args()
    model = Model()
    for kind in FORMATS if given.format is None else (given.format,):
        for r in RANKS if given.rank is None else (given.rank,):
            for way, rank, approximation in ways(kind, r):
                figures = {name: f"{value:.3g}" for name, value in model.errors(approximation).items()}
                row = {"format": kind, "way": way, "r": rank, **figures, "torch": versions()["torch"]}
                put_row(FILE, row, key=("format", "way", "r"))
                print(", ".join(row.values()), flush=True)


if __name__ == "__main__":
    main()
