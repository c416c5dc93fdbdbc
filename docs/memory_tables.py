"""What memory methods take, from bench/data."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean

from table_rows import LORA, Row, cells_of, rows, table, whole

# rows of bench/data/memory.csv by what identifies a case: method, targets, adapter and residual dtype, optimizer, and
# layers for each side block
LARGE = {
    ("mezo", "", "", "", "", ""): "**MeZO**",
    ("lst", "", "float32", "", "", ""): "LST",
    ("lst", "", "float32", "", "", "1"): "LST, a block for each layer",
    ("k-lst", "", "float32", "", "8-bit AdamW", ""): "**9-LST**, 8-bit AdamW",
    ("k-lst", "", "float32", "", "", ""): "**9-LST**",
    ("k-lst", "", "float32", "", "", "1"): "**9-LST**, a block for each layer",
    ("siva", "all linear", "float32", "nf4", "", ""): "**SiVA**, all linear, nf4",
    ("siva", "query+key", "float32", "", "", ""): "**SiVA**, query and key",
    ("lora", "query+key", "float32", "", "", ""): "LoRA or PiSSA, query and key",
    ("siva", "all linear", "float32", "", "", ""): "**SiVA**, all linear",
    ("lora", "all linear", "float32", "", "", ""): "LoRA or PiSSA, all linear",
    ("full", "", "", "", "", ""): "full fine-tuning",
}
CASE = ("method", "targets", "adapter_dtype", "residual_dtype", "optimizer", "layers_per_block")
LENGTHS = ("64", "128", "512")


def large(checkpointing: str = "", base_dtype: str = "") -> Iterator[tuple[str, Row]]:
    """The named cases of a RoBERTa-large, each with a row for each length, in the order of the file.

    With `checkpointing` "yes" steps checkpoint, and with `base_dtype` "float32" the model's weights are so.
    """
    for row in rows("memory.csv"):
        case = tuple(row[name] for name in CASE)
        if case in LARGE and (row["checkpointing"], row["base_dtype"]) == (checkpointing, base_dtype):
            yield LARGE[case], row


def peaks(**way: str) -> dict[str, dict[str, float]]:
    """Peak memory of a RoBERTa-large, MB, by method and length; `way` as for `large`."""
    found: dict[str, dict[str, float]] = {name: {} for name in LARGE.values()}
    for name, row in large(**way):
        found[name][row["tokens"]] = float(row["peak_mb"])
    return found


def memory() -> str:
    """Peaks of a RoBERTa-large, by method and length."""
    ways = {"": peaks(), ", checkpointed": peaks(checkpointing="yes"), ", float32": peaks(base_dtype="float32")}
    heads = [f"{length} tokens{way}" for way in ways for length in LENGTHS]
    body = (
        [name, *(f"{found[name][n]:,.0f}" if found[name] else "-" for found in ways.values() for n in LENGTHS)]
        for name in LARGE.values()
    )
    return table(["peak memory, MB", *heads], body)


_WIDE = ":rank=8:targets=all-linear"
PROCESSES = {  # by method the variants of the evidence on SST-2, TREC and E2E; "" where there is none
    "**MeZO**": ("mezo:prompt=sst2:learning_rate=6e-6:epochs=5", "", "mezo"),
    "LST": ("lst", "lst", "lst"),
    "**9-LST**": ("k-lst:window=9", "k-lst:window=9", "k-lst:window=9"),
    "QLoRA, all linear": ("", "qlora", f"qlora{_WIDE}"),
    "**SiVA**": ("siva:rank=4:targets=query+key", "siva:rank=4:targets=query+key", f"siva{_WIDE}"),
    "LoRA": (LORA, f"{LORA}:learning_rate=4e-4", f"lora{_WIDE}"),
    "full fine-tuning": ("full", "full", "full"),
}


def processes() -> str:
    """The simulated peak of a step, and the resident peak of the process that ran, each the mean over seeds."""
    body = []
    for name, variants in PROCESSES.items():
        cells: list[str] = []
        for task, variant in zip(("sst2", "trec", "e2e"), variants):
            found = (cells_of(task, variant) or cells_of(f"{task}-mezo", variant)) if variant else []
            for peak in ("peak_memory_mb", "peak_rss_mb"):
                cells.append(f"{mean(cell['metrics'][peak] for cell in found):,.0f}" if found else "-")
        body.append([name, *cells])
    heads = [f"{task}: {what}" for task in ("SST-2", "TREC", "E2E") for what in ("a step", "the process")]
    return table(["MB", *heads], body)


# rows of bench/data/llama_memory.csv by method, format of the frozen weights, form of the loss, reduction, and layers
# for each side block
LLAMA = {
    ("mezo", "nf4", "fused", "", ""): "**MeZO** over QLoRA",
    ("lst", "nf4-double", "fused", "8", ""): "LST, nf4-double",
    ("lst", "nf4-double", "fused", "8", "1"): "LST, nf4-double, a block for each layer",
    ("k-lst", "nf4-double", "fused", "8", ""): "**9-LST**, nf4-double",
    ("k-lst", "nf4-double", "fused", "8", "1"): "**9-LST**, nf4-double, a block for each layer",
    ("siva", "nf4-double", "fused", "", ""): "**SiVA**, nf4-double",
    ("lora", "nf4", "fused", "", ""): "QLoRA",
    ("lora", "nf4", "logits", "", ""): "QLoRA, with logits",
    ("mezo", "bfloat16", "fused", "", ""): "**MeZO**",
    ("lst", "bfloat16", "fused", "8", ""): "LST",
    ("k-lst", "bfloat16", "fused", "8", ""): "**9-LST**",
    ("siva", "bfloat16", "fused", "", ""): "**SiVA**",
    ("lora", "bfloat16", "fused", "", ""): "LoRA",
    ("full", "bfloat16", "logits", "", ""): "full fine-tuning",
}


def _llama() -> Iterator[tuple[str, dict[tuple[str, ...], Row]]]:
    """Each named case with its rows by model, checkpointing, rows of a batch and tokens."""
    found: dict[tuple[str, ...], dict[tuple[str, ...], Row]] = {}
    for row in rows("llama_memory.csv"):
        case = row["method"], row["backbone"], row["head"], row["reduction"], row["layers_per_block"]
        found.setdefault(case, {})[row["model"], row["checkpointing"], row["batch"], row["tokens"]] = row
    for case, name in LLAMA.items():
        if case in found:
            yield name, found[case]


def _peak(found: dict[tuple[str, ...], Row], *key: str) -> str:
    return whole(found[key]["peak_mb"]) if key in found else "-"


def llama_memory() -> str:
    """Peaks of one text of 2,048 tokens, without and with checkpointing, by model."""
    cases = list(_llama())
    there = {key[0] for _, found in cases for key in found if key[2:] == ("1", "2048")}
    both = [(model, again) for model in ("1B", "3B", "8B") if model in there for again in ("no", "yes")]
    heads = [f"{model}, checkpointed" if again == "yes" else model for model, again in both]
    body = ([name, *(_peak(found, *each, "1", "2048") for each in both)] for name, found in cases)
    return table(["peak memory, MB", *heads], body)


def process_parts() -> str:
    """The resident peak of each part of a training process, the mean over runs."""
    parts = ("import", "load", "step", "save", "peak")
    found: dict[str, list[Row]] = {}
    for row in rows("process_memory.csv"):
        found.setdefault(row["case"], []).append(row)
    body = ([name, *(whole(mean(float(row[part]) for row in runs)) for part in parts)] for name, runs in found.items())
    return table(["MB", *parts], body)


def tenants() -> str:
    """What a task takes of a server, and how fast many tasks are answered."""
    body = (
        [row["kind"], row["mb_a_task"], row["tasks_a_gb"], row["ratio"]]
        for row in sorted(rows("tenants.csv"), key=lambda row: float(row["mb_a_task"]))
    )
    return table(["", "MB a task", "tasks a GB", "64 tasks"], body)
