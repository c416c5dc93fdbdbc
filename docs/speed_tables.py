"""What time methods and operations take, what processes send, and what compiled kernels hold, from bench/data."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from table_rows import NAMES, Row, all_cells, rows, table, whole


def _ratios(found: Iterable[Row], names: dict[str, str]) -> list[list[str]]:
    return [
        [names[row["candidate"]], f"{float(row['ms_p50']):,.0f}", f"{float(row['ratio_p50']):.2f}"]
        for row in found
        if row["candidate"] in names
    ]


ADAPTER_STEPS = {
    "siva": "**SiVA**",
    "lora": "LoRA",
    "siva-packed": "**SiVA**, all packed",
    "lora-packed": "LoRA, all packed",
    "lora-compiled": "LoRA under `torch.compile`",
    "lora-dora": "DoRA",
    "pissa": "PiSSA",
    "limit": "frozen layers that pass gradients (the bound)",
}


TRAINING_STEPS = {
    "siva-query-key": "**SiVA**, query and key",
    "siva-key-value": "**SiVA**, key and value",
    "siva-all-linear": "**SiVA**, all linear",
    "lora-query-key": "LoRA, query and key",
    "lora-key-value": "LoRA, key and value",
    "lora-all-linear": "LoRA, all linear",
    "pissa-query-key": "PiSSA, query and key",
    "k-lst": "**9-LST**",
    "lst": "LST",
    "mezo": "**MeZO**",
    "head": "head only",
    "last-n": "last 3 layers",
    "bitfit": "BitFit",
    "full": "full fine-tuning",
}


def siva_speed() -> str:
    """Adapters on both choices of layers, of the bundled model and at RoBERTa-base's shapes."""
    cells: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in rows("siva_training.csv"):
        if row["dtype"] == "float32" and row["tokens"] == "32" and row["candidate"] in ADAPTER_STEPS:
            ratio = [whole(row["ms_p50"]), f"{float(row['ratio_p50']):.2f}"]
            cells.setdefault((row["targets"], row["candidate"]), {})[row["model"]] = ratio
    body = (
        [targets, ADAPTER_STEPS[name], *found.get("demo", ["-", "-"]), *found.get("base", ["-", "-"])]
        for (targets, name), found in sorted(cells.items(), key=lambda cell: cell[0][0] != "query, key")
    )
    times = [f"{SHAPES[model]}: {what}" for model in ("demo", "base") for what in ("ms", "time over SiVA's")]
    return table(["layers", "one training step", *times], body)


def all_steps() -> str:
    """Every method's step of the bundled model, and at RoBERTa-base's shapes."""
    times: dict[str, list[str]] = {}
    for model in ("demo", "base"):
        for row in rows("training.csv"):
            if row["model"] == model:
                ends = f"{float(row['ratio_p20']):.2f} to {float(row['ratio_p80']):.2f}"
                cells = [whole(row["ms_p50"]), f"{float(row['ratio_p50']):.2f} ({ends})"]
                times.setdefault(row["candidate"], []).extend(cells)
    heads = [f"{SHAPES[model]}: {what}" for model in ("demo", "base") for what in ("ms", "time over SiVA's")]
    return table(["one training step", *heads], ([TRAINING_STEPS[name], *cells] for name, cells in times.items()))


GENERATION = {
    "base": "SmolLM2-135M itself",
    "lst": "with LST beside it",
    "9-lst": "with **9-LST** beside it",
    "lora": "with LoRA of rank 8 in all linear layers",
    "siva": "with **SiVA** of rank 8 in all linear layers",
    "siva-implicit": "the same, with the implicit residual",
}


PROCESSORS = {  # by what the CSV calls them
    "AMD EPYC": "AMD EPYC, AVX512-BF16",
    "AMD EPYC, AVX512": "AMD EPYC, AVX512-BF16",
    "AMD EPYC, AVX2": "AMD EPYC, AVX2",
    "Intel(R) Xeon(R) Processor, AVX512": "Intel Xeon, AMX",
}


def siva_init() -> str:
    found = [row for row in rows("siva_init.csv") if row["card"] == "AMD EPYC, AVX512"]
    seconds = {(row["weight"], row["candidate"]): f"{float(row['ms_p50']) / 1e3:.1f}" for row in found}
    models = {
        "large q+k": "RoBERTa-large, query and key",
        "large all": "RoBERTa-large, all linear",
        "block of 1B, all": "one of the 16 blocks of Llama-3.2-1B, all linear",
    }
    falling, flat = ", decay 0.1", ", random"
    columns = {
        "exact": (falling, "fastpeft"),
        "exact, of random weights": (flat, "fastpeft"),
        "`svd_niter=4`": (falling, "svd_niter=4"),
        "rest in nf4-double": (falling, "nf4-double"),
    }
    body = (
        [shown, *(seconds.get((name + kind, way), "-") for kind, way in columns.values())]
        for name, shown in models.items()
    )
    return table(["seconds", *columns], body)


def generation() -> str:
    """The time of a new token; ratios to the base's in the same round."""
    body = [
        [
            PROCESSORS[row["card"]],
            GENERATION[row["candidate"]],
            f"{float(row['ms_p50']) / float(row['said']):.0f}",
            f"{float(row['ratio_p50']):.2f}",
            f"{float(row['ratio_p20']):.2f} to {float(row['ratio_p80']):.2f}",
        ]
        for row in rows("generation.csv")
    ]
    return table(["processor", "", "a token, ms", "over the base", "20th to 80th percentile"], body)


LADDER_STEPS = {
    "9-lst": "**9-LST**",
    "lst": "LST",
    "lora": "LoRA, query and key",
    "lora packed": "LoRA, packed",
    "lora packed without dropout": "LoRA, packed, without dropout",
    "backbone forward": "the backbone's forward alone (the bound)",
}


def ladder_speed() -> str:
    body = []
    for row in rows("ladder.csv"):
        if row["candidate"] in LADDER_STEPS and row["dtype"] == "float32":
            shapes = SHAPES[row["model"]] + (", AVX-512" if "AVX512" in row["card"] else ", AVX2")
            body += [[shapes, *cells] for cells in _ratios([row], LADDER_STEPS)]
    return table(["model", "one training step", "ms", "time over 9-LST's"], body)


SHAPES = {"demo": "bundled model", "base": "RoBERTa-base's shapes", "large": "RoBERTa-large's shapes"}


FROZEN_STEPS = {
    name: shown for name, shown in (ADAPTER_STEPS | LADDER_STEPS).items() if name not in ("limit", "backbone forward")
}


def frozen_steps() -> str:
    """Steps at RoBERTa-base's shapes, 64 tokens, on frozen weights of fewer bits: how many times faster than LoRA."""
    found = [("", row) for row in rows("ladder.csv")] + [(row["targets"], row) for row in rows("siva_training.csv")]
    found = [(targets, row) for targets, row in found if (row["model"], row["tokens"]) == ("base", "64")]
    lora = {(targets, row["dtype"]): row for targets, row in found if row["candidate"] == "lora"}
    body = []
    for targets, row in found:
        if row["candidate"] in FROZEN_STEPS:
            speed = float(lora[targets, row["dtype"]]["ratio_p50"]) / float(row["ratio_p50"])
            name = FROZEN_STEPS[row["candidate"]].removesuffix(", query and key")
            body.append([targets or "query, key", row["dtype"], name, whole(row["ms_p50"]), f"{speed:.2f}"])
    return table(["layers of adapters", "frozen weights", "one training step", "ms", "speed over LoRA's"], body)


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


FROZEN = {
    "packed float32": "packed, float32",
    "F.linear bfloat16": "`F.linear`, bfloat16",
    "packed bfloat16": "packed, bfloat16",
    "int8, bfloat16": "int8, bfloat16",
    "dynamic int8 of PyTorch": "PyTorch's dynamic int8",
}
ENCODERS = {
    "float32": "float32",
    "frozen float32": "float32, frozen",
    "bfloat16": "bfloat16",
    "frozen bfloat16": "bfloat16, frozen",
    "int8, float32": "int8, the rest in float32",
    "int8, bfloat16": "int8, the rest in bfloat16",
}


def frozen_linear() -> str:
    """How many times faster than `F.linear` in float32 one product of 1,024 rows is."""
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows("frozen_linear.csv"):
        if row["rows"] == "1024":
            shape = f"{int(row['in_features']):,} x {int(row['out_features']):,}"
            case = shape, {"forward": "forward", "dx": "with dx"}[row["work"]]
            lines.setdefault(case, {})[row["candidate"]] = f"{1 / float(row['ratio_p50']):.2f}"
    body = [[*case, *(found.get(name, "") for name in FROZEN)] for case, found in lines.items()]
    return table(["times as fast", "", *FROZEN.values()], body)


def frozen_encoder() -> str:
    """How many times faster than in float32 a frozen encoder of RoBERTa-base's shapes runs."""
    found = [row for row in rows("frozen_encoder.csv") if row["model"] == "base"]
    body = [
        [PROCESSORS[r["card"]], ENCODERS[r["candidate"]], whole(r["ms_p50"]), f"{1 / float(r['ratio_p50']):.2f}"]
        for r in found
    ]
    return table(["processor", "linear layers", "ms", "times as fast"], body)


OP_WINDOW = {"reference": "its plain formula", "composed": "composed of PyTorch's"}
WORKS = {"forward": "forward", "training": "with backward"}


def op_window() -> str:
    """The attention over a window against its formula and what PyTorch has, on a CPU."""

    def case(row: Row) -> list[str]:
        extra = "padding" if row["padded"] == "True" else "dropout" if float(row["dropout"]) else ""
        return [row["tokens"], row["window"], extra]

    return _op("window_attention.csv", ["tokens", "window", ""], case, OP_WINDOW)


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
            times = f"{1 / float(row['ratio_p50']):.1f}"
            body.append([PROCESSORS[row["card"]].partition(",")[0], noise, named, whole(row["ms_p50"]), times])
    return table(["processor", "noise", "instructions", "ms", "times as fast as the loop"], body)


def mezo_step() -> str:
    named = {"step": "a step", "step, deferred": "a step, its end left to the next", "reference's loop": "usual loop"}
    body = []
    for row in rows("mezo_step.csv"):
        if row["candidate"] in named:
            kind = f"{row['estimator']}, {row['noise']}, {row['forwards']} forwards"
            body.append([kind, named[row["candidate"]], whole(row["ms_p50"]), f"{float(row['ratio_p50']):.2f}"])
    return table(["estimator", "", "ms", "time over its forwards alone"], body)


def distributed() -> str:
    """A step of the bundled model by several processes."""
    layers = {"": "", "query,key": ", query and key", "all-linear": ", all linear"}
    engines = {"ddp": "DDP", "fsdp2": "FSDP2", "mezo": "-"}
    body = [
        [
            NAMES[row["method"]] + layers[row["layers"]],
            engines[row["engine"]],
            row["ranks"],
            *(_two_digits(float(row[name]) / 1e3) for name in ("sent_bytes", "sent_bytes_predicted")),
            row["memory_mb"],
            whole(row["ms_p50"]),
        ]
        for row in rows("distributed.csv")
        if row["ranks"] != "2"
    ]
    return table(["method", "engine", "processes", "sent, kB", "predicted, kB", "memory, MB", "ms"], body)


def _two_digits(value: float) -> str:
    """A number with the digits before its point, and two at least."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def evidence_hours() -> str:
    """How long the training of the evidence's cells took, all of a task together."""
    tasks = {
        "sst2": "20,000 phrases of SST-2",
        "sst2-mezo": "the same, MeZO and what starts from it",
        "sst2-all": "all phrases of SST-2",
        "trec": "TREC",
        "wnut17": "WNUT17",
        "e2e": "E2E",
    }
    body = []
    for task, name in tasks.items():
        cells = all_cells(task)
        hours = sum(cell["metrics"]["train_seconds"] for cell in cells) / 3600
        body.append([name, f"`{task}`", f"{len(cells)}", f"{hours:.0f}"])
    return table(["rows", "task of `bench.evidence`", "cells", "hours of training on one core"], body)


def compiled() -> str:
    """What compiling the Triton kernels offline gave: the most registers a thread has, by kernel and architecture."""
    found = rows("static.csv")
    architectures = sorted({row["arch"] for row in found}, key=lambda arch: (arch.startswith("gfx"), len(arch), arch))
    body = []
    for kernel in dict.fromkeys(row["kernel"] for row in found):
        own = [row for row in found if row["kernel"] == kernel]
        registers = [[int(row["registers"]) for row in own if row["arch"] == arch] for arch in architectures]
        spilled = max(int(row["stack_bytes"]) for row in own)
        body.append(
            [f"`{kernel}`", f"{len(own)}", *(f"{max(found, default='-')}" for found in registers), f"{spilled}"]
        )
    return table(["kernel", "tiles", *architectures, "bytes spilled"], body)
