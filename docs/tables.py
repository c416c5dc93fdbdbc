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
import memory_tables
import reliability_tables
import speed_tables
import transfer_tables
from table_rows import DOCS

MARKED = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n)(?s:.*?)(<!-- end of table -->)")

TABLES: dict[str, Callable[[], str]] = {
    "recipes": commands.recipes,
    "summary": accuracy_tables.summary,
    "table2-full": accuracy_tables.table2,
    "base-sst2": partial(accuracy_tables.evidence, "sst2"),
    "base-sst2-all": partial(accuracy_tables.evidence, "sst2-all"),
    "base-rates": accuracy_tables.base_rates,
    "base-trec": partial(accuracy_tables.evidence, "trec", is_papers=False),
    "transfer": partial(transfer_tables.transfer, "minilm"),
    "transfer-mpnet": partial(transfer_tables.transfer, "mpnet"),
    "transfer-bundled": partial(transfer_tables.transfer, "bundled"),
    "transfer-rates": transfer_tables.rates,
    "base-wnut17": accuracy_tables.tagging,
    "e2e": accuracy_tables.speaking,
    "memory": memory_tables.memory,
    "processes": memory_tables.processes,
    "process-parts": memory_tables.process_parts,
    "tenants": memory_tables.tenants,
    "llama-memory": memory_tables.llama_memory,
    "siva-speed": speed_tables.siva_speed,
    "ladder-speed": speed_tables.ladder_speed,
    "feature-cache": speed_tables.feature_cache,
    "pool": speed_tables.pool,
    "siva-rates": accuracy_tables.siva_rates,
    "siva-init": speed_tables.siva_init,
    "quantised": accuracy_tables.quantised,
    "op-window": speed_tables.op_window,
    "generation": speed_tables.generation,
    "frozen-steps": speed_tables.frozen_steps,
    "frozen-linear": speed_tables.frozen_linear,
    "frozen-encoder": speed_tables.frozen_encoder,
    "mezo-pass": speed_tables.mezo_pass,
    "all-steps": speed_tables.all_steps,
    "mezo-step": speed_tables.mezo_step,
    "mezo-drift": accuracy_tables.mezo_drift,
    "distributed": speed_tables.distributed,
    "evidence-hours": speed_tables.evidence_hours,
    "compiled": speed_tables.compiled,
    "kills": reliability_tables.kills,
    "endurance": reliability_tables.endurance,
    "versions": reliability_tables.versions,
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
