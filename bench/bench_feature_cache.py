"""A training step of k-LST whose backbone's features are read from a cache, beside one that computes them.

`python -m bench.bench_feature_cache` writes `bench/data/feature_cache.csv`. The steps go through the same batches of
random text, one after another; before measuring all of them were read once, as in any epoch after the second.

Predicted before measuring, for the bundled model (7 features of 384 a token, batch 16 x 32): a batch is 2.75 MB in
bfloat16, which are copied and widened to 5.5 MB of float32 in about 2 ms; of a step of 85 ms the backbone's layers are
53, so 34 ms and 2.5 times the speed are left. At RoBERTa-base shapes (13 features of 768) a batch is 10.2 MB, 7 ms, and
the layers, 8 times the work, are a larger share of the step: about 4 times.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from bench.backbones import MODELS
from bench.bench_training import BATCH_SIZE, CASE, TOKENS
from bench.harness import DATA, Candidates, measure, timing_parser
from fastpeft import LadderConfig, LadderModel

FILE = DATA / "feature_cache.csv"
BATCHES = 32  # so many that no feature is still in the processor's caches when its turn comes again
CACHED, UNCACHED = "cached in bfloat16", "uncached"


def training_step(model: str, folder: Path | None, device: torch.device) -> Callable[[], object]:
    """Forward, backward and AdamW of the next batch, with features cached in `folder`; None computes them."""
    torch.manual_seed(0)
    ladder = LadderModel(MODELS[model](), LadderConfig(window_size=9)).to(device).train()
    trained = [p for p in ladder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=True)
    batches = torch.randint(5, 8_000, (BATCHES, BATCH_SIZE, TOKENS), device=device)
    if folder is not None:
        ladder.cache_features(folder)
        with torch.no_grad():
            for ids in (*batches, *batches):
                ladder(ids, attention_mask=torch.ones_like(ids))
    turns = itertools.cycle(batches)

    def step() -> None:
        ids = next(turns)
        ladder(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids[:, 0] % 2).loss.backward()
        optimizer.step()
        optimizer.zero_grad()  # a step's peak is measured from what it finds

    return step


def candidates(model: str, folder: Path, device: torch.device) -> Candidates:
    """A step that reads features, and one that computes them."""
    return {CACHED: training_step(model, folder, device), UNCACHED: training_step(model, None, device)}


def main() -> None:
    parser = timing_parser(__doc__)
    parser.add_argument("--model", choices=MODELS, default="demo")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        steps = candidates(given.model, Path(folder), given.device)
        measure(FILE, {**CASE, "model": given.model}, steps, given.device, given.rounds)


if __name__ == "__main__":
    main()
