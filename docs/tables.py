"""The tables of the pages, from the measurements in bench/data: `python docs/tables.py` writes them anew.

The README or a page has a table between two marks, `<!-- table: NAME -->` and `<!-- end of table -->`; a test compares
what stands there with what the CSV files say.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import accuracy_tables
import commands
import cost_tables
from table_rows import DOCS

MARKED = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n)(?s:.*?)(<!-- end of table -->)")

TABLES: dict[str, Callable[[], str]] = {
    "recipes": commands.recipes,
    "summary": accuracy_tables.summary,
    "demo": accuracy_tables.demo,
    "sst2": accuracy_tables.sst2,
    "table2-quick": partial(accuracy_tables.suite, "table2-quick"),
    "table2-full": partial(accuracy_tables.suite, "table2-full", speeds=False),
    "base-sst2": partial(accuracy_tables.evidence, "sst2"),
    "base-sst2-all": partial(accuracy_tables.evidence, "sst2-all"),
    "base-rates": accuracy_tables.base_rates,
    "base-trec": partial(accuracy_tables.evidence, "trec", is_papers=False),
    "base-wnut17": accuracy_tables.tagging,
    "e2e": accuracy_tables.speaking,
    "targets": accuracy_tables.targets,
    "prompts": accuracy_tables.prompts,
    "after-mezo": accuracy_tables.after_mezo,
    "auto-prompt": accuracy_tables.auto_prompt,
    "memory": cost_tables.memory,
    "llama-memory": cost_tables.llama_memory,
    "llama-parts": cost_tables.llama_parts,
    "llama-sizes": cost_tables.llama_sizes,
    "llama-measured": cost_tables.llama_measured,
    "siva-speed": cost_tables.siva_speed,
    "siva-speed-all": cost_tables.siva_speed_all,
    "siva-speed-base": cost_tables.siva_speed_base,
    "siva-profile": partial(cost_tables.siva_profile, "query, key"),
    "siva-profile-all": partial(cost_tables.siva_profile, "all linear"),
    "ladder-speed": cost_tables.ladder_speed,
    "feature-cache": cost_tables.feature_cache,
    "pool": cost_tables.pool,
    "serve": cost_tables.serve,
    "ladder-options": accuracy_tables.ladder_options,
    "ladder-pretraining": accuracy_tables.ladder_pretraining,
    "frozen-accuracy": accuracy_tables.frozen_accuracy,
    "backbone-dtype": accuracy_tables.backbone_dtype,
    "siva-rates": accuracy_tables.siva_rates,
    "quantised": accuracy_tables.quantised,
    "quantised-weights": accuracy_tables.quantised_weights,
    "quantised-steps": cost_tables.quantised_steps,
    "op-window": cost_tables.op_window,
    "generation": cost_tables.generation,
    "op-mixed": cost_tables.op_mixed,
    "frozen-steps": cost_tables.frozen_steps,
    "frozen-linear": cost_tables.frozen_linear,
    "frozen-encoder": cost_tables.frozen_encoder,
    "frozen-head": cost_tables.frozen_head,
    "frozen-head-memory": cost_tables.frozen_head_memory,
    "mezo-pass": cost_tables.mezo_pass,
    "mezo-step": cost_tables.mezo_step,
    "mezo-drift": accuracy_tables.mezo_drift,
    "distributed": cost_tables.distributed,
    "distributed-beyond": cost_tables.distributed_beyond,
    "growth": cost_tables.growth,
    "compiled": cost_tables.compiled,
    "kills": cost_tables.kills,
    "endurance": cost_tables.endurance,
    "versions": cost_tables.versions,
}


def fill(page: str) -> str:
    """The text of a page with its tables as the measurements have them."""
    return MARKED.sub(lambda found: f"{found[1]}\n{TABLES[found['name']]()}\n{found[3]}", page)


def main() -> None:
    for path in (DOCS.parent / "README.md", *sorted(DOCS.rglob("*.md"))):
        text = path.read_text(encoding="utf-8")
        path.write_text(fill(text), encoding="utf-8")


if __name__ == "__main__":
    main()
