"""The tables of the pages, from the measurements in bench/data: `python docs/tables.py` writes them anew.

The README or a page has a table between two marks, `<!-- table: NAME -->` and `<!-- end of table -->`; a test compares
what stands there with what the CSV files say.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev

DOCS = Path(__file__).parent
DATA = DOCS.parent / "bench" / "data"
MARKED = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n)(?s:.*?)(<!-- end of table -->)")

Row = dict[str, str]

NAMES = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "pissa": "PiSSA",
    "qlora": "QLoRA",
    "lokr": "LoKr",
    "ia3": "IA3",
    "prompt-tuning": "prompt tuning",
    "siva": "**SiVA**",
    "k-lst": "**9-LST**",
    "lst": "LST",
    "last-n": "last 3 layers",
    "bitfit": "BitFit",
    "head": "head only",
    "mezo": "**MeZO**",
    "zero-shot": "no training",
}
LAYERS = {"key+value": "key, value", "query+key": "query, key", "all-linear": "all linear"}
OWN_LAYERS = {  # where none are given; of LoRA and its kin PEFT's
    "siva": "query, key",
    "lora": "query, value",
    "pissa": "query, value",
    "lokr": "query, value",
    "qlora": "all linear",
    "ia3": "key, value, outputs",
}


def rows(file: str) -> list[Row]:
    return _read(DATA / file)


def _read(file: Path) -> list[Row]:
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def table(heads: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *body]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def settings(variant: str) -> dict[str, str]:
    """What follows the method in `siva:targets=all-linear:rank=4`."""
    return dict(part.partition("=")[::2] for part in variant.split(":")[1:])


def whole(number: str) -> str:
    return f"{float(number):,.0f}" if number else "-"


def results(file: str, keep: Callable[[Row], bool]) -> list[Row]:
    """Runs of a comparison, least memory first; what was not trained has none."""
    kept = [row for row in rows(file) if keep(row)]
    return sorted(kept, key=lambda row: float(row["peak_memory_mb"] or 0))


def _layers(row: Row) -> str:
    targets = settings(row["variant"]).get("targets")
    return LAYERS[targets] if targets else OWN_LAYERS.get(row["method"], "-")


def demo() -> str:
    """Every method on the demo data, without a prompt."""
    plain = {"targets", "rank", "learning_rate", "optim"}
    found = results("compare_demo.csv", lambda row: set(settings(row["variant"])) <= plain)
    milliseconds = {row["candidate"]: float(row["ms_p50"]) for row in rows("training.csv")}
    body = []
    for row in found:
        layers = _layers(row)
        in_8_bits = "optim" in settings(row["variant"])
        name = NAMES[row["method"]] + (", 8-bit AdamW" if in_8_bits else "")
        work = layers.replace("query, value", "query, key")  # two matrices of one size a block are the same work
        timed = row["method"] + ("" if work == "-" else f"-{work.replace(', ', '-').replace(' ', '-')}")
        speed = f"{16e3 / milliseconds[timed]:.0f}" if timed in milliseconds and not in_8_bits else "-"
        accuracy = f"{float(row['accuracy']):.3f}"
        body.append(
            [
                name,
                layers,
                whole(row["peak_memory_mb"]),
                accuracy,
                speed,
                whole(row["trainable_parameters"]),
            ]
        )
    return table(["method", "layers", "peak memory, MB", "accuracy", "samples/s", "trained parameters"], body)


def sst2() -> str:
    found = results("compare_sst2.csv", lambda row: row["method"] != "zero-shot")
    return table(
        ["method", "peak memory, MB", "accuracy", "F1", "learning rate"],
        (
            [NAMES[row["method"]], whole(row["peak_memory_mb"]), *_scores(row), f"{float(row['learning_rate']):g}"]
            for row in found
        ),
    )


def comparison(folder: str) -> dict[str, list[Row]]:
    """The runs of each variant, one a seed, of a comparison in docs/results; those of its searches are left out."""
    runs: dict[str, list[Row]] = {}
    for run in _read(DOCS / "results" / folder / "results.csv"):
        if run["state"] == "finished" and not run.get("search"):
            runs.setdefault(run["variant"], []).append(run)
    return runs


def _percent(runs: Sequence[Row]) -> str:
    """The mean accuracy of runs, and its standard deviation over seeds."""
    values = [100 * float(run["accuracy"]) for run in runs]
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def targets() -> str:
    """Full fine-tuning, LoRA and SiVA by the layers they adapt, on two data sets."""
    found: dict[tuple[str, str], list[str]] = {}
    for folder in ("targets-demo", "targets-sst2"):
        for runs in comparison(folder).values():
            if runs[0]["method"] in ("full", "lora", "siva"):
                rate = f"{float(runs[0]['learning_rate']):g}"
                cells = found.setdefault((_layers(runs[0]), NAMES[runs[0]["method"]]), [])
                cells += [_percent(runs), rate]
    body = [[name, layers, *cells] for (layers, name), cells in sorted(found.items())]
    return table(["method", "layers", "demo data, %", "rate", "SST-2, %", "rate"], body)


def suite(folder: str) -> str:
    """The report's rows beside what a comparison in docs/results measured."""
    wanted = json.loads((DOCS.parent / "fastpeft" / "comparison" / "suites.json").read_text(encoding="utf-8"))
    runs = comparison(folder)
    body = []
    for row in wanted["rows"].values():
        found = runs.get(row["variant"].replace("PROMPT", wanted["default_prompt"]))
        if found:
            memory, speed = (
                [float(run[column]) for run in found] for column in ("peak_memory_mb", "samples_per_second")
            )
            here = _percent(found)
            told = ["-" if row.get(key) is None else f"{row[key]:,}" for key in ("memory_mb", "samples_per_second")]
            accuracy = " / ".join(f"{value:.2f}" for value in row["accuracy"])
            body.append([row["title"], accuracy, here, told[0], f"{mean(memory):,.0f}", told[1], f"{mean(speed):,.0f}"])
    heads = ("accuracy, %: report", "here", "memory, MB: report", "here", "samples/s: report", "here")
    return table(["", *heads], body)


def _scores(row: Row) -> list[str]:
    return [f"{float(row[name]):.3f}" for name in ("accuracy", "f1")]


def prompts() -> str:
    """What a prompt does on the demo data: label words, or a template for a head."""

    def keep(row: Row) -> bool:
        given = settings(row["variant"])
        return "prompt" in given and "init_from" not in given and "max_steps" not in given

    return table(PROMPTED, map(_prompted, results("compare_demo.csv", keep)))


def after_mezo() -> str:
    """What methods reach from the weights that MeZO left."""
    found = results(
        "compare_demo.csv", lambda row: ":init_from=" in row["variant"] and "max_steps" not in row["variant"]
    )
    return table(PROMPTED, map(_prompted, found))


WAYS = {
    "zero-shot": "no training",
    "calibrated": "no training, calibrated",
    "few-shot": "a few rows",
    "siva": "2,000 rows",
}


def auto_prompt() -> str:
    """Prompts that were found beside the manual one, with no training and after some; of several seeds the mean."""
    found: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in sorted(rows("auto_prompt.csv"), key=lambda row: int(row["seed"])):
        found.setdefault((row["task"], row["way"]), {}).setdefault(row["prompt"], []).append(row)
    body = []
    for (task, way), prompts in sorted(found.items(), key=lambda item: (item[0][0], [*WAYS].index(item[0][1]))):
        manual, auto = (_several(prompts.get(prompt, [])) for prompt in ("manual", "auto"))
        first = prompts.get("auto", [{"template": "-", "label_words": "-"}])[0]
        body.append([task, WAYS[way], manual, auto, f"`{first['template']}`", first["label_words"]])
    return table(["data", "trained on", "manual", "auto", "found", "label words"], body)


def _several(measured: Sequence[Row]) -> str:
    """The accuracy of runs that differ in their seed: the mean, and from where to where."""
    values = [float(row["accuracy"]) for row in measured]
    if not values:
        return "-"
    spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.3f}{spread}"


PROMPTED = ("method", "answer", "peak memory, MB", "accuracy", "F1")


def _prompted(row: Row) -> list[str]:
    given = settings(row["variant"].partition(":init_from=")[0])
    answer = given.get("prompt_head", "label words" if "prompt" in given else "no prompt")
    name = NAMES[row["method"]] + (", calibrated" if "calibrate" in given else "")
    return [name, answer, whole(row["peak_memory_mb"]), *_scores(row)]


# rows of bench/data/memory.csv by what tells them apart: method, targets, adapter and residual dtype, optimizer
LARGE = {
    ("mezo", "", "", "", ""): "**MeZO**",
    ("lst", "", "float32", "", ""): "LST",
    ("k-lst", "", "float32", "", "8-bit AdamW"): "**9-LST**, 8-bit AdamW",
    ("k-lst", "", "float32", "", ""): "**9-LST**",
    ("siva", "all linear", "float32", "nf4", ""): "**SiVA**, all linear, nf4",
    ("siva", "query+key", "float32", "", ""): "**SiVA**, query and key",
    ("lora", "query+key", "float32", "", ""): "LoRA or PiSSA, query and key",
    ("siva", "all linear", "float32", "", ""): "**SiVA**, all linear",
    ("lora", "all linear", "float32", "", ""): "LoRA or PiSSA, all linear",
    ("full", "", "", "", ""): "full fine-tuning, bfloat16 throughout",
}
LENGTHS = ("64", "128", "512")


def memory() -> str:
    """Peaks of a RoBERTa-large, by method and length."""
    peaks: dict[str, dict[str, float]] = {name: {} for name in LARGE.values()}
    for row in rows("memory.csv"):
        case = row["method"], row["targets"], row["adapter_dtype"], row["residual_dtype"], row["optimizer"]
        if case in LARGE:
            peaks[LARGE[case]][row["tokens"]] = float(row["peak_mb"])
    body = ([name, *(f"{found[length]:,.0f}" for length in LENGTHS)] for name, found in peaks.items())
    return table(["peak memory, MB", *(f"{length} tokens" for length in LENGTHS)], body)


def _ratios(found: Iterable[Row], names: dict[str, str]) -> list[list[str]]:
    return [
        [names[row["candidate"]], f"{float(row['ms_p50']):,.0f}", f"{float(row['ratio_p50']):.2f}"]
        for row in found
        if row["candidate"] in names
    ]


ADAPTER_STEPS = {
    "siva": "**SiVA**",
    "lora": "LoRA",
    "lora-compiled": "LoRA under `torch.compile`",
    "lora-dora": "DoRA",
    "pissa": "PiSSA",
    "limit": "frozen layers that pass gradients (the bound)",
}


def _adapters(targets: str) -> str:
    found = (row for row in rows("siva_training.csv") if (row["model"], row["targets"]) == ("demo", targets))
    return table(["one training step", "ms", "time over SiVA's"], _ratios(found, ADAPTER_STEPS))


def siva_speed() -> str:
    return _adapters("query, key")


def siva_speed_all() -> str:
    return _adapters("all linear")


def siva_speed_base() -> str:
    """RoBERTa-base's shapes, on both choices of layers."""
    body = []
    for row in rows("siva_training.csv"):
        if row["model"] == "base":
            body += [[row["targets"], *cells] for cells in _ratios([row], ADAPTER_STEPS)]
    return table(["layers", "one training step", "ms", "time over SiVA's"], body)


def siva_profile(targets: str) -> str:
    """Where a step of the bundled model goes."""
    found = [row for row in rows("siva_profile.csv") if row["targets"] == targets]
    columns = ("siva", "limit", "lora")
    body = []
    for kind in dict.fromkeys(row["kind"] for row in found):
        spent = {row["candidate"]: row["ms"] for row in found if row["kind"] == kind}
        body.append([kind, *(f"{float(spent[column]):.1f}" for column in columns)])
    return table(["milliseconds of a step", "**SiVA**", "the bound", "LoRA"], body)


LADDER_STEPS = {
    "9-lst": "**9-LST**",
    "lst": "LST",
    "lora": "LoRA, query and key",
    "lst direct": "LST, composed of PyTorch's layers",
    "9-lst direct": "9-LST, composed of PyTorch's layers",
    "backbone forward": "the backbone's forward alone (the bound)",
}


def ladder_speed() -> str:
    body = []
    for row in rows("ladder.csv"):
        if row["candidate"] in LADDER_STEPS:
            body += [[SHAPES[row["model"]], *cells] for cells in _ratios([row], LADDER_STEPS)]
    return table(["model", "one training step", "ms", "time over 9-LST's"], body)


SHAPES = {"demo": "bundled model", "base": "RoBERTa-base's shapes", "large": "RoBERTa-large's shapes"}


def feature_cache() -> str:
    """A training step of 9-LST on features from disk."""
    body = [
        [SHAPES[row["model"]], row["candidate"], f"{float(row['ms_p50']):,.0f}", f"{float(row['ratio_p50']):.2f}"]
        for row in rows("feature_cache.csv")
    ]
    return table(["model", "features", "ms", "time over bfloat16's"], body)


def pool() -> str:
    """What many tasks cost, RoBERTa-base's shapes."""
    body = [
        [row["work"], row["candidate"], f"{float(row['ms_p50']):,.0f}", f"{float(row['ratio_p50']):.2f}"]
        for row in rows("pool.csv")
    ]
    return table(["work", "", "ms", "time over the first"], body)


def ladder_options() -> str:
    """Options of the side network, on slices of 2,000 rows."""
    runs: dict[tuple[str, str], list[Row]] = {}
    for row in rows("ladder_options.csv"):
        runs.setdefault((row["data"], row["variant"]), []).append(row)
    body = []
    for (data, variant), found in sorted(runs.items(), key=lambda item: item[0][0]):
        accuracies, losses = ([float(row[column]) for row in found] for column in ("accuracy", "loss"))
        parameters = whole(found[0]["trainable_parameters"])
        body.append(
            [data, f"`{variant}`", f"{len(found)}", f"{mean(accuracies):.3f}", f"{mean(losses):.3f}", parameters]
        )
    return table(["data", "variant", "seeds", "accuracy", "loss", "trained parameters"], body)


def ladder_pretraining() -> str:
    """What masked words, learned first, and SiVA beside it give a side network."""
    found = [row for row in rows("ladder_pretraining.csv") if row["accuracy"]]
    body = [[row["cell"], f"{float(row['accuracy']):.3f}", f"{float(row['loss']):.3f}"] for row in found]
    return table(["trained", "accuracy", "loss"], body)


def quantised() -> str:
    ways = {"plain": "the weight alone", "loftq": "LoftQ's loop", "qpissa": "PiSSA", "siva": "**SiVA**"}
    found = (row for row in rows("siva_quantised.csv") if row["r"] in ("", "16"))
    body = ([row["format"], ways[row["way"]], f"{100 * float(row['logit_error']):.1f} %"] for row in found)
    return table(["format", "factors fitted by", "error of the logits"], body)


OP_WINDOW = {"reference": "its plain formula", "composed": "composed of PyTorch's"}
OP_MIXED = {
    "reference": "its plain formula",
    "gathered": "factors gathered",
    "peft lora": "PEFT's LoRA",
    "one adapter": "one adapter (the bound)",
}
WORKS = {"forward": "forward", "training": "with backward"}


def op_window() -> str:
    """The attention over a window against its formula and what PyTorch has, on a CPU."""

    def case(row: Row) -> list[str]:
        extra = "padding" if row["padded"] == "True" else "dropout" if float(row["dropout"]) else ""
        return [row["tokens"], row["window"], extra]

    return _op("window_attention.csv", ["tokens", "window", ""], case, OP_WINDOW)


def op_mixed() -> str:
    """Rows of several adapters against the formula, gathered factors and PEFT, on a CPU."""

    def case(row: Row) -> list[str]:
        return [f"{row['rows']} x {row['tokens']}", row["order"]]

    return _op("siva_linear_mixed.csv", ["rows x tokens", "their order"], case, OP_MIXED)


def _op(file: str, heads: list[str], case: Callable[[Row], list[str]], names: dict[str, str]) -> str:
    """A line for each case: the op's time, and those of the others over it."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for row in rows(file):
        if row["device"] == "cpu":
            line = lines.setdefault((*case(row), WORKS[row["work"]]), [])
            line.append(row["ratio_p50"] if line else row["ms_p50"])
    body = [
        [*key, f"{float(ms):,.0f}" if float(ms) >= 100 else f"{float(ms):.3g}", *(f"{float(r):.2f}" for r in ratios)]
        for key, (ms, *ratios) in lines.items()
    ]
    return table([*heads, "", "the op, ms", *names.values()], body)


def mezo_pass() -> str:
    """How many times faster than the usual loop a pass of noise is."""
    body = []
    for row in rows("mezo_perturb.csv"):
        known = row["model"] == "base" and row["pass_threads"] == "1" and row["work"] == "one pass"
        noise, _, variant = row["candidate"].partition(" ")
        if known and row["dtype"] == "float32" and noise in ("gaussian", "rademacher"):
            named = {"avx512": "AVX-512", "avx2": "AVX2", "baseline": "SSE2"}[variant]
            body.append([noise, named, whole(row["ms_p50"]), f"{1 / float(row['ratio_p50']):.1f}"])
    return table(["noise", "instructions", "ms", "times as fast as the loop"], body)


def mezo_step() -> str:
    named = {"step": "a step", "step, deferred": "a step, its end left to the next", "reference's loop": "usual loop"}
    body = []
    for row in rows("mezo_step.csv"):
        if row["candidate"] in named:
            kind = f"{row['estimator']}, {row['noise']}, {row['forwards']} forwards"
            body.append([kind, named[row["candidate"]], whole(row["ms_p50"]), f"{float(row['ratio_p50']):.2f}"])
    return table(["estimator", "", "ms", "time over its forwards alone"], body)


def backbone_dtype() -> str:
    body = (
        [row["backbone_dtype"] or "float32", row["weights_mb"], _share(row["feature_error"]), row["accuracy"]]
        for row in rows("backbone_dtype.csv")
    )
    return table(["backbone", "its weights, MB", "change of the last features", "accuracy"], body)


def mezo_drift() -> str:
    found = (row for row in rows("mezo_drift.csv") if row["way"] in ("in place", "exact"))
    body = ([row["dtype"], f'`restore="{row["way"].replace(" ", "_")}"`', _share(row["drift"])] for row in found)
    return table(["weights", "", "moved, of their root mean square"], body)


def _share(number: str) -> str:
    value = float(number)
    return "0" if value == 0 else f"{100 * value:.0f} %" if value >= 0.01 else f"{value:.0e}"


def distributed() -> str:
    """A step of the bundled model by several processes."""
    layers = {"": "", "query,key": ", query and key", "all-linear": ", all linear"}
    engines = {"ddp": "DDP", "fsdp2": "FSDP2", "mezo": "-"}
    body = [
        [
            NAMES[row["method"]] + layers[row["layers"]],
            engines[row["engine"]],
            row["ranks"],
            *(_kilobytes(row[name]) for name in ("sent_bytes", "sent_bytes_predicted")),
            row["memory_mb"],
            whole(row["ms_p50"]),
        ]
        for row in rows("distributed.csv")
    ]
    return table(["method", "engine", "processes", "sent, kB", "predicted, kB", "memory, MB", "ms"], body)


def _kilobytes(number: str) -> str:
    value = float(number) / 1e3
    return f"{value:,.0f}" if value >= 10 or value == 0 else f"{value:.2g}"


# what FSDP2 holds whole of a RoBERTa-large at a time: what is outside of the blocks, and two of these
GATHERED = (355.4 - 302.3 + 2 * 302.3 / 24) / 355.4
GIGABIT = 125.0  # MB a second


def distributed_beyond() -> str:
    """A step of a RoBERTa-large, calculated: sums of what `memory.csv` has, divided and sent."""
    body = []
    for row in rows("memory.csv"):
        case = row["method"], row["targets"], row["adapter_dtype"], row["residual_dtype"], row["optimizer"]
        if case not in LARGE or row["tokens"] != "128" or row["residual_dtype"]:
            continue
        weights, gradients, state, rest, peak = (
            float(row[f"{part}_mb"]) for part in ("weights", "gradients", "optimizer", "activations", "peak")
        )
        is_mezo = row["method"] == "mezo"
        sent = {n: 2 * 8e-6 * (n - 1) if is_mezo else 2 * (n - 1) / n * gradients for n in (2, 8, 64)}
        body.append(
            [
                LARGE[case],
                *map(_megabytes, sent.values()),
                f"{sent[64] / (10 * GIGABIT):.1g}",
                f"{peak + gradients:,.0f}",
                f"{(weights + gradients + state) / 8 + GATHERED * weights + rest:,.0f}",
            ]
        )
    heads = ["method", *(f"{n} processes" for n in (2, 8, 64)), "s at 10 Gbit/s", "MB, DDP", "MB, FSDP2 on 8"]
    return table(heads, body)


def _megabytes(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def growth() -> str:
    """How the time of a step grows with a size, in one process: exponents, measured and of the operations."""
    names = {**NAMES, "pool": "**9-LST**, a pool"}
    found = {
        (names[row["method"]], row["axis"]): (row["exponent"], row["exponent_predicted"]) for row in rows("scaling.csv")
    }
    body = ([*axis, *exponents] for axis, exponents in found.items())
    return table(["method", "size", "exponent of the time", "of the operations"], body)


def compiled() -> str:
    """What compiling the Triton kernels offline gave: the most registers a thread has, by kernel and architecture."""
    found = rows("static.csv")
    architectures = list(dict.fromkeys(row["arch"] for row in found))
    body = []
    for kernel in dict.fromkeys(row["kernel"] for row in found):
        own = [row for row in found if row["kernel"] == kernel]
        registers = [[int(row["registers"]) for row in own if row["arch"] == arch] for arch in architectures]
        spilled = max(int(row["stack_bytes"]) for row in own)
        body.append(
            [f"`{kernel}`", f"{len(own)}", *(f"{max(found, default='-')}" for found in registers), f"{spilled}"]
        )
    return table(["kernel", "tiles", *architectures, "bytes spilled"], body)


KILLED = {
    "siva": "SiVA",
    "k-lst": "k-LST",
    "k-lst, features cached": "k-LST, features cached",
    "full": "full fine-tuning",
    "mezo": "MeZO, by its journal alone",
    "mezo, with checkpoints": "MeZO, with checkpoints",
    "compare": "`compare`, three cells",
}


def kills() -> str:
    """What was found of runs that were killed."""
    numbers = ("kills", "while_writing", "runs", "faults")
    body = ([KILLED[row["run"]], *(row[name] for name in numbers)] for row in rows("kills.csv"))
    return table(["run", "kills", "of these while something was written", "runs", "faults"], body)


def endurance() -> str:
    """What the process of a long run held: early, in the middle and late."""
    runs: dict[str, list[Row]] = {}
    for row in rows("endurance.csv"):
        runs.setdefault(row["method"], []).append(row)
    body = []
    for method, found in runs.items():
        found.sort(key=lambda row: int(row["step"]))
        for row in (found[0], found[len(found) // 2], found[-1]):
            numbers = (row[name] for name in ("resident_mb", "open_files", "live_tensors"))
            body.append([KILLED[method].partition(",")[0], whole(row["step"]), *numbers])
    return table(["run", "step", "resident memory, MB", "open files", "live tensors"], body)


def versions() -> str:
    """The wheel's tests in each environment."""
    body = []
    for row in rows("versions.csv"):
        given = [row[name] or "-" for name in ("python", "torch", "transformers", "peft", "triton")]
        tests = [row[name] or "-" for name in ("passed", "failed", "skipped")]
        body.append([row["environment"], *given, row["fault"] or row["tests"], *tests])
    heads = ["environment", "Python", "torch", "transformers", "PEFT", "Triton", "tests", "passed", "failed", "skipped"]
    return table(heads, body)


TABLES: dict[str, Callable[[], str]] = {
    "demo": demo,
    "sst2": sst2,
    "table2-quick": partial(suite, "table2-quick"),
    "targets": targets,
    "prompts": prompts,
    "after-mezo": after_mezo,
    "auto-prompt": auto_prompt,
    "memory": memory,
    "siva-speed": siva_speed,
    "siva-speed-all": siva_speed_all,
    "siva-speed-base": siva_speed_base,
    "siva-profile": partial(siva_profile, "query, key"),
    "siva-profile-all": partial(siva_profile, "all linear"),
    "ladder-speed": ladder_speed,
    "feature-cache": feature_cache,
    "pool": pool,
    "ladder-options": ladder_options,
    "ladder-pretraining": ladder_pretraining,
    "backbone-dtype": backbone_dtype,
    "quantised": quantised,
    "op-window": op_window,
    "op-mixed": op_mixed,
    "mezo-pass": mezo_pass,
    "mezo-step": mezo_step,
    "mezo-drift": mezo_drift,
    "distributed": distributed,
    "distributed-beyond": distributed_beyond,
    "growth": growth,
    "compiled": compiled,
    "kills": kills,
    "endurance": endurance,
    "versions": versions,
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
