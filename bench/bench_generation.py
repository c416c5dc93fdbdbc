"""The time of a new token: a decoder alone, with adapters in its layers, and with a side network beside it.

    python -m bench.pretrained smollm2 models/smollm2
    python -m bench.bench_generation models/smollm2

writes `bench/data/generation.csv`. A cache holds a prompt of one text; a call goes on by so many tokens, each a pass
over itself as in `generate`, and takes them out of the cache again. Values do not change the time.

Predicted: a token reads every weight once, SmolLM2-135M's 538 MB in float32. The side network of 9-LST has 11 MB more
and LST's 3, that is 1.02 and 1.01 times the base's time, if nothing but memory counted; each of their 6 blocks adds
one operation, and Python around it: about 50 microseconds, 0.3 ms in 60.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from bench.harness import DATA, ROUNDS, measure, option_parser
from fastpeft import LadderConfig, LadderModel, SivaConfig

FILE = DATA / "generation.csv"
PROMPT, SAID = 64, 8  # tokens
_WIDE: dict[str, Any] = {"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}

MODELS: dict[str, Callable[[Any], Any]] = {
    "base": lambda base: base,
    "lst": lambda base: LadderModel(base, LadderConfig(window_size=1, fusion="gated")),
    "9-lst": lambda base: LadderModel(base, LadderConfig(window_size=9)),
    "lora": lambda base: get_peft_model(base, LoraConfig(**_WIDE)),
    "siva": lambda base: get_peft_model(base, SivaConfig(**_WIDE)),
    "siva-implicit": lambda base: get_peft_model(base, SivaConfig(residual="implicit", **_WIDE)),
}


@torch.no_grad()
def read(model: Any, ids: torch.Tensor) -> Any:
    """The cache of a prompt."""
    return model(input_ids=ids, use_cache=True).past_key_values


@torch.no_grad()
def go_on(model: Any, cache: Any, token: torch.Tensor) -> None:
    """Read `SAID` tokens more."""
    for _ in range(SAID):
        model(input_ids=token, past_key_values=cache, use_cache=True)
    cache.crop(-SAID)


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("model", help="folder of SmolLM2")
    parser.add_argument(
        "--candidates", default=",".join(MODELS), help="names with commas, the one to compare with first"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    candidates = {}
    for name in given.candidates.split(","):
        base = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
        candidates[name] = MODELS[name](base).eval().to(device)
    ids = torch.randint(10, 40_000, (1, PROMPT), generator=torch.Generator().manual_seed(0)).to(device)
    case = {"model": "SmolLM2-135M", "dtype": "float32", "prompt": str(PROMPT), "said": str(SAID)}
    runs = {name: partial(go_on, model, read(model, ids), ids[:, :1]) for name, model in candidates.items()}
    measure(FILE, case, runs, device, given.rounds)


if __name__ == "__main__":
    main()
