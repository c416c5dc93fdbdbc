"""What methods reach: accuracies and errors, from bench/data and docs/results."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

import memory_tables
import numpy as np
from table_rows import LORA, NAMES, Row, cells_of, over_seeds, rows, table, whole

from fastpeft.comparison.significance import compare_pair, row_scores
from fastpeft.comparison.suites import PaperRow, get_suite

PAPER = get_suite("table2").rows  # which has all of the paper's, with the prompt for film reviews

LAYERS = {"key+value": "key, value", "query+key": "query, key", "all-linear": "all linear"}


def _milliseconds() -> dict[str, float]:
    """Of a training step of the bundled model, by candidate."""
    return {row["candidate"]: float(row["ms_p50"]) for row in rows("training.csv") if row["model"] == "demo"}


def _percent(runs: Sequence[Row], metric: str = "accuracy") -> str:
    return over_seeds([100 * float(run[metric]) for run in runs])


SUMMARY = {  # of the README: the paper's variant -> (case of memory.csv, candidate of training.csv, what trains)
    "full": ("full fine-tuning", "full", "all weights"),
    LORA: ("LoRA or PiSSA, query and key", "lora-query-key", "factors beside query and key"),
    "siva:rank=4:targets=query+key": ("**SiVA**, query and key", "siva-query-key", "singular vectors of query and key"),
    "k-lst:window=9": ("**9-LST**", "k-lst", "a side network, windows of 9 features"),
    "lst": ("LST", "lst", "a side network, single features"),
    "mezo:prompt=sst2": ("**MeZO**", "mezo", "all weights, by forward passes"),
}


def summary() -> str:
    """The methods in six rows: memory of a RoBERTa-large, speed of the bundled model, and accuracy of MPNet."""
    peaks = memory_tables.peaks(base_dtype="float32")  # as `fastpeft train` loads it
    milliseconds = _milliseconds()
    body = []
    for variant, (case, step, trained) in SUMMARY.items():
        found = _metrics(_papers_cells("sst2", variant))
        speed = f"{16e3 / milliseconds[step]:.0f}"
        accuracy = _percent(found) + (", five epochs" if variant.startswith("mezo") else "")
        body.append([NAMES[found[0]["method"]], trained, f"{peaks[case]['128']:,.0f}", speed, accuracy])
    heads = ["peak memory of RoBERTa-large, MB", "samples/s of the bundled model", "accuracy of MPNet-base, %"]
    return table(["method", "what trains", *heads], body)


def _given(row: PaperRow) -> str:
    """The paper's accuracy; both where its tables have two."""
    return " / ".join(f"{value:.2f}" for value in row.accuracy)


def table2() -> str:
    """The paper's rows beside what the bundled model has; runs of searches are left out."""
    runs: dict[str, list[Row]] = {}
    for run in rows("table2_full.csv"):
        if run["state"] == "finished" and not run["search"]:
            runs.setdefault(run["variant"], []).append(run)
    body = []
    for row in PAPER:
        found = runs.get(row.variant.replace(":layers_per_block=1", ""))  # of the bundled model's six layers
        if found:
            given = "-" if row.memory_mb is None else f"{row.memory_mb:,}"
            memory = f"{mean(float(run['peak_memory_mb']) for run in found):,.0f}"
            body.append([row.title, _given(row), _percent(found), given, memory])
    return table(["", "accuracy, %: paper", "here", "memory, MB: paper", "here"], body)


def _papers_cells(task: str, variant: str) -> list[dict[str, Any]]:
    """The cells of a variant as the paper's tables have it, where MeZO has no rate and length of its own."""
    return cells_of(task, variant) or cells_of(f"{task}-mezo", variant.replace("mezo:prompt=sst2", MEZO))


def _metrics(cells: Sequence[dict[str, Any]]) -> list[Row]:
    return [{name: str(value) for name, value in cell["metrics"].items()} for cell in cells]


MEZO = "mezo:prompt=sst2:learning_rate=6e-6:epochs=5"  # in the evidence
SLOW_LORA = "LoRA, a third of its rate"  # RoBERTa-large's, which was LoRA's for every model before
OTHERS = {  # that the paper does not have
    "lora:rank=4:targets=key+value": "LoRA key + value",
    "siva:rank=4:targets=all-linear": "SiVA, all linear",
    f"{LORA}:learning_rate=4e-4": SLOW_LORA,
    "lora:rank=4:targets=key+value:learning_rate=4e-4": "LoRA key + value, a third of its rate",
    f"{LORA}:learning_rate=3.6e-3": "LoRA, three times its rate",
    f"{LORA}:learning_rate=1.2e-3:bf16=false": "LoRA, in float32",
    "siva:rank=4:targets=key+value:bf16=false": "SiVA, key and value, in float32",
    "siva:rank=4:targets=query+key:learning_rate=3e-3": "SiVA, three times its rate",
    "last-n:learning_rate=1.8e-4": "last 3 layers, nine times the rate",
    "head": "head only",
    "bitfit": "BitFit",
    "pissa:rank=4:targets=query+key": "PiSSA",
    "siva:rank=4:targets=query+key:residual_dtype=nf4": "SiVA in nf4",
    "qlora": "QLoRA, all linear",
    "lst": "LST, six blocks",
    "k-lst:window=9": "9-LST, six blocks",
}


def evidence(task: str, *, is_papers: bool = True) -> str:
    """Methods on a pretrained model of base size, of those cells that have finished, each beside LoRA.

    Args:
        task: of `bench.evidence`.
        is_papers: whether the paper has it too: then its rows, with what it reached.
    """
    titles = {row.variant: row.title for row in PAPER} | OTHERS
    given = {row.variant: _given(row) for row in PAPER}
    found = {title: (variant, cells) for variant, title in titles.items() if (cells := _papers_cells(task, variant))}
    base = "LoRA" if "LoRA" in found else SLOW_LORA
    lora = found[base][1] if base in found else []
    body = []
    for title, (variant, cells) in found.items():
        metrics = _metrics(cells)
        beside = "-" if title == base else _above(cells, lora, _answers)
        body.append(
            [
                title,
                *([given.get(variant, "-")] if is_papers else []),
                _percent(metrics),
                beside,
                whole(metrics[0]["peak_memory_mb"]),
                f"{float(metrics[0]['learning_rate']):g}",
                f"{len(cells)}",
            ]
        )
    accuracy = ["accuracy, %: paper", "here"] if is_papers else ["accuracy, %"]
    return table(["", *accuracy, "above LoRA, 95 % interval", "memory, MB", "learning rate", "seeds"], body)


TAGGING = {  # variants of WNUT17's evidence
    "full:learning_rate=5e-5": "full fine-tuning",
    "lora:rank=4:targets=query+key:learning_rate=4e-3": "LoRA",
    "pissa:rank=4:targets=query+key:learning_rate=4e-3": "PiSSA",
    "qlora:learning_rate=1e-3": "QLoRA, all linear",
    "siva:rank=4:targets=query+key:learning_rate=3e-3": "**SiVA**",
    "siva:rank=4:targets=query+key:residual_dtype=nf4:learning_rate=3e-3": "**SiVA** in nf4",
    "siva:rank=4:targets=key+value:learning_rate=3e-3:bf16=false": "**SiVA**, key and value, in float32",
    "siva:rank=4:targets=key+value:learning_rate=1.5e-3:bf16=false": "**SiVA**, key and value, half that rate",
    "bitfit:learning_rate=4e-3": "BitFit",
    "last-n:learning_rate=1e-4": "last 3 layers",
    "head:learning_rate=5e-3": "head only",
    "lst:layers_per_block=1:learning_rate=6e-4": "LST",
    "k-lst:window=5:layers_per_block=1:learning_rate=6e-4": "5-LST",
    "k-lst:window=9:layers_per_block=1:learning_rate=6e-4": "**9-LST**",
    "lst:learning_rate=6e-4": "LST, six blocks",
    "k-lst:window=9:learning_rate=6e-4": "**9-LST**, six blocks",
}


def tagging() -> str:
    """F1 of entities and of words, of those cells that have finished, each beside LoRA."""
    found = {title: cells for variant, title in TAGGING.items() if (cells := cells_of("wnut17", variant))}
    body = []
    for title, cells in found.items():
        metrics = _metrics(cells)
        scores = [_percent(metrics, name) for name in ("entity_f1", "word_f1")]
        beside = "-" if title == "LoRA" else _above(cells, found.get("LoRA", []), _entities)
        first = metrics[0]
        cost = [whole(first["peak_memory_mb"]), f"{float(first['learning_rate']):g}", f"{len(cells)}"]
        body.append([title, *scores, beside, *cost])
    titles = ["F1 of entities, %", "of words", "entities above LoRA, 95 % interval"]
    return table(["", *titles, "memory, MB", "learning rate", "seeds"], body)


LAST_16 = "layers_to_transform=[14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29]"
BESIDE_16 = ":siva_layers=16:rank=4:targets=q_proj+k_proj"
LINEAR = "q_proj+k_proj+v_proj+o_proj+gate_proj+up_proj+down_proj"
SPEAKING = {  # variants of E2E's evidence
    "lst": "LST",
    "lst:examples=8": "LST after 8 examples",
    f"lst{BESIDE_16}": "LST with SiVA in the last 16 layers",
    f"lst{BESIDE_16}:learning_rate=0.001": "the same at SiVA's rate",
    "k-lst:window=9:layers_per_block=1": "9-LST, a block for each layer",
    "k-lst:window=9": "**9-LST**",
    f"k-lst:window=9{BESIDE_16}": "9-LST with SiVA in the last 16 layers",
    f"k-lst:window=9{BESIDE_16}:learning_rate=0.001": "the same at SiVA's rate",
    f"siva:rank=4:targets=q_proj+k_proj:{LAST_16}": "SiVA, query and key of the last 16 layers",
    f"siva:rank=8:targets={LINEAR}:{LAST_16}": "SiVA, all linear of the last 16 layers",
    "siva:rank=8:targets=all-linear": "**SiVA**, all linear",
    "lora:rank=8:targets=all-linear": "LoRA, all linear",
    "lora:rank=8:targets=all-linear:learning_rate=1.2e-3:bf16=false": "LoRA at three times the rate, in float32",
    "last-n": "last 3 layers",
    "full": "full fine-tuning",
    "pissa:rank=8:targets=all-linear": "PiSSA, all linear",
    "siva:rank=8:targets=all-linear:residual_dtype=nf4": "SiVA in nf4, all linear",
    "qlora:rank=8:targets=all-linear": "QLoRA, all linear",
    "mezo": "**MeZO**",
}


def speaking() -> str:
    """What a decoder says after training, and what it still knows of other text, of those cells that have finished."""
    body = []
    for variant, title in SPEAKING.items():
        cells = cells_of("e2e", variant)
        if not cells:
            continue
        said, metrics = [cell["test"] for cell in cells], [cell["metrics"] for cell in cells]
        bleu = over_seeds([each["bleu"] for each in said])
        values = [[each["perplexity"] for each in metrics]]
        values += [[each[name] for each in said] for name in ("general_loss_before", "general_loss")]
        shown = [f"{mean(each):.2f}" for each in values]
        rouge = f"{mean(each['rouge_l'] for each in said):.3f}"
        first = metrics[0]
        cost = [whole(str(first["peak_memory_mb"])), f"{first['learning_rate']:g}", f"{len(cells)}"]
        body.append([title, bleu, rouge, shown[0], f"{shown[1]} to {shown[2]}", *cost])
    heads = ["", "BLEU", "ROUGE-L", "perplexity", "other text, nats a token", "memory, MB", "learning rate", "seeds"]
    return table(heads, body)


def base_rates() -> str:
    """What each rate reached on a slice, by its ratio to the recipe's for a wide model, which the file has first."""
    heads = {  # powers of three
        -1: "a third",
        0: "wide models' recipe",
        1: "three times",
        2: "nine times",
        3: "27 times",
    }
    found: dict[str, dict[int, str]] = {}
    recipes: dict[str, float] = {}
    for row in rows("base_rates.csv"):
        variant, rate = row["variant"], float(row["learning_rate"])
        power = round(math.log(rate / recipes.setdefault(variant, rate), 3))
        found.setdefault(variant, {})[power] = f"{float(row['accuracy']):.3f} ({rate:g})"
    body = (
        [NAMES[variant.partition(":")[0]], *(tried.get(power, "-") for power in heads)]
        for variant, tried in found.items()
    )
    return table(["accuracy (rate)", *heads.values()], body)


def _above(
    cells: Sequence[dict[str, Any]],
    others: Sequence[dict[str, Any]],
    scores: Callable[[Sequence[dict[str, Any]]], np.ndarray],
) -> str:
    """How far cells are above those of another variant, paired by seed, in points with the interval."""
    by_seed = {cell["run"]["seed"]: cell for cell in others}
    both = [(cell, by_seed[seed]) for cell in cells if (seed := cell["run"]["seed"]) in by_seed]
    if not both:
        return "-"
    difference = compare_pair(*(scores(each) for each in zip(*both)))
    return f"{100 * difference.mean:+.1f} ({100 * difference.low:+.1f} to {100 * difference.high:+.1f})"


def _entities(cells: Sequence[dict[str, Any]]) -> np.ndarray:
    """`(seeds, rows)`, what each row stands for in the F1 of entities."""
    return np.stack([row_scores(cell["row_scores"]["above"], cell["row_scores"]["below"]) for cell in cells])


def _answers(cells: Sequence[dict[str, Any]]) -> np.ndarray:
    """`(seeds, rows)`, 1 where a row was answered rightly."""
    return np.stack([np.equal(cell["predictions"]["labels"], cell["predictions"]["predictions"]) for cell in cells])


def siva_rates() -> str:
    """What each rate makes of each model and set of layers."""
    found: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
    for row in rows("siva_rates.csv"):
        cell = row["scaling"], row["learning_rate"]
        found.setdefault((row["model"], LAYERS[row["targets"]]), {})[cell] = f"{float(row['accuracy']):.3f}"
    columns = sorted(
        {cell for cells in found.values() for cell in cells}, key=lambda cell: (-len(cell[0]), float(cell[1]))
    )
    body = [[*key, *(cells.get(column, "-") for column in columns)] for key, cells in sorted(found.items())]
    return table(["model", "layers", *(f"{scaling}, {rate}" for scaling, rate in columns)], body)


def quantised() -> str:
    ways = {"plain": "the weight alone", "loftq": "LoftQ's loop", "qpissa": "PiSSA", "siva": "**SiVA**"}
    found = (row for row in rows("siva_quantised.csv") if row["model"] == "demo" and row["r"] in ("", "16"))
    errors = "weight_error", "logit_error"
    body = ([row["format"], ways[row["way"]], *(f"{100 * float(row[each]):.1f} %" for each in errors)] for row in found)
    return table(["format", "factors fitted by", "error of the weights", "of the logits"], body)


def mezo_drift() -> str:
    found = (row for row in rows("mezo_drift.csv") if row["way"] in ("in place", "exact"))
    body = ([row["dtype"], f'`restore="{row["way"].replace(" ", "_")}"`', _share(row["drift"])] for row in found)
    return table(["weights", "", "moved, of their root mean square"], body)


def _share(number: str) -> str:
    value = float(number)
    return "0" if value == 0 else f"{100 * value:.0f} %" if value >= 0.01 else f"{value:.0e}"
