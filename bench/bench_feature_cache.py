"""A training step of k-LST whose backbone's features are read from a cache, beside one that computes them.

`python -m bench.bench_feature_cache` writes `bench/data/feature_cache.csv`. The steps go through the same batches of
random text, one after another; before measuring all of them were read once, as in any epoch after the second.

Predicted before measuring: 2.5 times the speed for the bundled model, and about 4 times at RoBERTa-base shapes.
"""

from __future__ import annotations

import itertools
import tempfile
from functools import partial

import torch

from bench.backbones import MODELS
from bench.bench_training import Step
from bench.harness import Bench, Candidates, Run
from fastpeft import LadderConfig, LadderModel

BATCHES = 32  # so many that no feature is still in the processor's caches when its turn comes again


def training_step(case: Step, is_cached: bool, device: torch.device) -> Run:
    """Forward, backward and AdamW of the next batch, with features cached in a folder that ends with the step."""
    torch.manual_seed(0)
    folder = tempfile.TemporaryDirectory() if is_cached else None
    ladder = LadderModel(MODELS[case.model](), LadderConfig(window_size=9)).to(device).train()
    trained = [p for p in ladder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=True)
    batches = torch.randint(5, 8_000, (BATCHES, case.batch, case.tokens), device=device)
    if folder is not None:
        ladder.cache_features(folder.name)
        with torch.no_grad():
            for ids in (*batches, *batches):
                ladder(ids, attention_mask=torch.ones_like(ids))
    turns = itertools.cycle(batches)

    def step() -> None:
        ids = next(turns)
        ladder(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids[:, 0] % 2).loss.backward()
        optimizer.step()
        optimizer.zero_grad()  # a step's peak is measured from what it finds
        _ = folder  # which is there as long as this function is

    return step


def candidates(case: Step, device: torch.device) -> Candidates:
    """A step that reads features, and one that computes them."""
    ways = {"cached in bfloat16": True, "uncached": False}
    return {name: partial(training_step, case, is_cached, device) for name, is_cached in ways.items()}


BENCH = Bench(__doc__, "feature_cache.csv", lambda _: [Step()], candidates)

if __name__ == "__main__":
    BENCH.main()
