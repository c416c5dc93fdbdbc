"""What the roundings of perturbing and restoring do to the weights, when nothing is learned: steps with a rate of 0.

`python -m bench.mezo_drift` writes `bench/data/mezo_drift.csv`, for the attention of the bundled model's first layer,
in each dtype: in place, where every pass over the weights rounds them; also with the end of a step deferred to the
next, which changes no bit; and with `Exact()`, which has to leave every bit as it was.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.harness import DATA, columns_of, machine, option_parser, put_row
from fastpeft import Exact, InPlace, MeZO
from fastpeft.data.problems import CLASSIFICATION
from fastpeft.models import load_classifier

FILE = DATA / "mezo_drift.csv"
EPS = 1e-3
DTYPES = ("float32", "bfloat16", "float16")
WAYS = {"in place": InPlace(), "in place, deferred": InPlace(defer=True), "exact": Exact()}
TOKENS = 2  # that a loss is computed of: it moves nothing, but is what makes exact mode show its scratch


@dataclass(frozen=True)
class Case:
    """How the weights are stored, and how they come back after a perturbation."""

    dtype: str
    way: str
    steps: int = 10_000
    eps: float = EPS


def attention(dtype: torch.dtype) -> nn.Module:
    """That of the first layer of the bundled model, without dropout."""
    model = load_classifier("demo", ["negative", "positive"], CLASSIFICATION).model
    return model.base_model.encoder.layer[0].attention.to(dtype).eval()


def drift(model: nn.Module, hidden: Tensor, case: Case) -> tuple[float, float]:
    """Make the steps.

    Returns:
        The root mean square of the weights' change over that of the weights, and the share of weights that changed.
    """
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = MeZO(model, lr=0.0, eps=case.eps, rule=WAYS[case.way])
    for _ in range(case.steps):
        optimizer.step(lambda: _output(model(hidden)).float().square().mean())
    optimizer.settle()
    pairs = [(old.double(), new.detach().double()) for old, new in zip(before, model.parameters())]
    moved = sum((new - old).square().sum().item() for old, new in pairs)
    changed = sum((new != old).sum().item() for old, new in pairs)
    size = sum(old.square().sum().item() for old, _ in pairs)
    return (moved / size) ** 0.5, changed / sum(old.numel() for old, _ in pairs)


def _output(returned: Tensor | tuple[Tensor, ...]) -> Tensor:
    """What a module makes; an attention returns its probabilities, or None, beside it."""
    return returned if isinstance(returned, Tensor) else returned[0]


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--way", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--steps", type=int, default=Case.steps)
    arguments = parser.parse_args()
    for case in (Case(dtype, way, arguments.steps) for dtype in arguments.dtype for way in arguments.way):
        model = attention(getattr(torch, case.dtype))
        hidden = torch.randn(1, TOKENS, model.output.dense.out_features, generator=torch.Generator().manual_seed(0))
        moved, changed = drift(model, hidden.to(getattr(torch, case.dtype)), case)
        columns = columns_of(case)
        weights = {"model": "demo, first attention", "weights": str(sum(p.numel() for p in model.parameters()))}
        figures = {"drift": f"{moved:.4g}", "changed": f"{changed:.4g}"}
        put_row(FILE, {**weights, **columns, **figures, **machine(torch.device("cpu"))}, key=columns)


if __name__ == "__main__":
    main()
