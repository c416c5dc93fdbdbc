"""The time of a new token: a decoder alone, with adapters in its layers, and with a side network beside it.

`python -m bench.bench_generation` writes `bench/data/generation.csv`. A cache holds a prompt of one text; a call goes
on by so many tokens, each a pass over itself as in `generate`, and takes them out of the cache again. Values do not
change the time, so weights are random.

Predicted: a token reads every weight once, so 9-LST takes 1.02 and LST 1.01 times the base's time, if only
memory counted; each of their 6 blocks adds one operation of about 50 microseconds, 0.3 ms in 60.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from bench.backbones import SMOLLM2
from bench.harness import Bench, Candidates, Run
from fastpeft import LadderConfig, LadderModel, SivaConfig

_WIDE: dict[str, Any] = {"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}

MODELS: dict[str, Callable[[Any], Any]] = {
    "base": lambda base: base,
    "lst": lambda base: LadderModel(base, LadderConfig(window_size=1, fusion="gated")),
    "9-lst": lambda base: LadderModel(base, LadderConfig(window_size=9)),
    "lora": lambda base: get_peft_model(base, LoraConfig(**_WIDE)),
    "siva": lambda base: get_peft_model(base, SivaConfig(**_WIDE)),
    "siva-implicit": lambda base: get_peft_model(base, SivaConfig(residual="implicit", **_WIDE)),
}


@dataclass(frozen=True)
class Case:
    """A decoder, the tokens of its prompt, and how many more it reads, one after the other."""

    model: str = "SmolLM2-135M"
    dtype: str = "float32"
    prompt: int = 64
    said: int = 8


def candidates(case: Case, device: torch.device) -> Candidates:
    """The model alone first."""
    ids = torch.randint(10, SMOLLM2.vocab_size, (1, case.prompt), generator=torch.Generator().manual_seed(0)).to(device)

    def ready(adapt: Callable[[Any], Any]) -> Run:
        model = adapt(LlamaForCausalLM(SMOLLM2).to(getattr(torch, case.dtype))).eval().to(device)
        with torch.no_grad():
            cache = model(input_ids=ids, use_cache=True).past_key_values

        @torch.no_grad()
        def go_on() -> None:
            for _ in range(case.said):
                model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
            cache.crop(-case.said)

        return go_on

    return {name: partial(ready, adapt) for name, adapt in MODELS.items()}


BENCH = Bench(__doc__, "generation.csv", lambda _: [Case()], candidates)

if __name__ == "__main__":
    BENCH.main()
