"""How well recipes transfer: the suite of `python -m bench.transfer`."""

from __future__ import annotations

from collections.abc import Container
from statistics import mean

from table_rows import over_seeds, rows, table

LORA_VALUES = "lora:targets=query+value"  # as PEFT has it
TRANSFERRED = {  # variants of `bench.transfer` that are compared on every task
    "siva": "**SiVA**",
    LORA_VALUES: "LoRA, query and value",
    "lora:targets=query+key": "LoRA, query and key",
    "k-lst": "**9-LST**",
    "lst": "LST",
    "head": "head only",
    "full": "full fine-tuning",
}
ALL_ROWS = "banking77-all"  # which no mean has
TASKS = {  # in the order of the table
    "sst2": "SST-2",
    "trec": "TREC",
    "banking77": "Banking77, 26 a class",
    "sms": "SMS spam",
    "wnut17": "WNUT17, F1 of entities",
    "sick": "SICK, two sentences",
    "sts": "STS, Spearman",
    ALL_ROWS: "Banking77, all rows",
}
LORA_RATES = {
    f"{LORA_VALUES}:learning_rate=4e-4": "LoRA, query and value, 4e-4",
    LORA_VALUES: "1.2e-3, its recipe",
    f"{LORA_VALUES}:learning_rate=3.6e-3": "3.6e-3",
    "lora:targets=query+key": "query and key, 1.2e-3",
}


def _transferred(
    model: str, column: str = "score", seeds: Container[str] | None = None
) -> dict[str, dict[str, list[float]]]:
    """A value of each run of a model in the suite of transfer: task -> variant -> one a seed, of `seeds` or of all."""
    found: dict[str, dict[str, list[float]]] = {task: {} for task in TASKS}
    for row in rows("transfer.csv"):
        if row["model"] == model and (seeds is None or row["seed"] in seeds):
            found[row["task"]].setdefault(row["variant"], []).append(float(row[column]))
    return {task: values for task, values in found.items() if values}


def transfer(model: str) -> str:
    """The score, and the loss, of each method with no option given, and its mean where it has run on all tasks."""
    scores, losses = _transferred(model), _transferred(model, "loss")
    shown = [variant for variant in TRANSFERRED if any(variant in values for values in scores.values())]
    body = [
        [TASKS[task], *(_with_loss(values.get(variant), losses[task].get(variant)) for variant in shown)]
        for task, values in scores.items()
    ]
    means = []
    for variant in shown:
        found = [mean(values[variant]) for task, values in scores.items() if task != ALL_ROWS and variant in values]
        means.append(f"**{mean(found):.1f}**" if len(found) == len(scores.keys() - {ALL_ROWS}) else "-")
    return table(["", *(TRANSFERRED[variant] for variant in shown)], [*body, ["**mean**", *means]])


def _with_loss(scores: list[float] | None, losses: list[float] | None) -> str:
    return f"{over_seeds(scores)} ({mean(losses):.2f})" if scores and losses else "-"


def rates() -> str:
    """SiVA by default beside LoRA at three rates on two sets of layers, and how far it is above the best of them.

    One seed, which all have.
    """
    body = []
    for task, values in _transferred("minilm", seeds=("0",)).items():
        found = [values.get(variant) for variant in LORA_RATES]
        if "siva" in values and all(found[:3]):
            best = max(mean(each) for each in found if each)
            own = mean(values["siva"])
            cells = (over_seeds(each) if each else "-" for each in found)
            body.append([TASKS[task], over_seeds(values["siva"]), *cells, f"{own - best:+.1f}"])
    return table(["", "**SiVA**", *LORA_RATES.values(), "SiVA above the best"], body)
