"""Tasks in a gigabyte: `python -m bench.tenants MODEL DATA`.

MODEL is a folder of an encoder, such as MPNet-base, and DATA a table of labelled texts, such as SST-2's. One run is
trained for a few steps, and copied with other values in what it trained. A server's `Tasks` holds all the copies, and
each of them answers. Beside them stands PEFT's LoRA on query and value, by `load_adapter` and `adapter_names`.

What a task takes is the growth of the process's anonymous memory, as Linux counts it (RssAnon), over the last two
thirds of the tasks: so without the base, the libraries, and what loading them left free. Then 64 texts are answered for
one task and for 64 tasks, in turns. Of LoRA that is the forward pass, in the same batches of 16, with the last layer of
the head for each task alone: PEFT's `adapter_names` refuses MPNet's whole head.

`bench/data/tenants.csv`. Counted before it was measured, of MPNet-base, MB a task: SiVA 6.2 of weights and 0.5 of
objects; a side network of 9-LST 19.9 of weights, which its pool keeps in a file, and 0.3 of objects; LoRA 1.2 of
weights and 0.5 of objects. 64 tasks over one, in time: 1.1, 1.15 and 2.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

ROWS, TOKENS, BATCH, ROUNDS = 64, 64, 16, 7
KINDS = {"siva": "SiVA", "k-lst": "9-LST", "lora": "PEFT's LoRA"}


def anonymous_mb() -> float:
    """The process's resident memory that no file holds."""
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) / 1024


def trained(method: str, model: str, data: str, folder: Path) -> Path:
    """A run of three steps."""
    from fastpeft.training.config import TrainConfig
    from fastpeft.training.recipe import train

    train(
        TrainConfig(
            output=str(folder), model=model, data=data, method=method, max_steps=3, batch_size=BATCH, max_length=TOKENS
        )
    )
    return folder


def other_run(run: Path, folder: Path, seed: int) -> Path:
    """A copy of a run that trained to other values."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(run, folder)
    file = next(file for file in folder.glob("*model.safetensors"))
    weights, generator = load_file(file), torch.Generator().manual_seed(seed)
    for name, weight in weights.items():
        # what a SiVA adapter starts from is the base's
        if weight.is_floating_point() and not name.endswith(("siva_u0", "siva_s", "siva_v0", "scale")):
            weight += 1e-3 * torch.randn(weight.shape, generator=generator)
    save_file(weights, file, {"format": "pt"})
    return folder


def texts_of(data: str) -> list[str]:
    """As long as a batch is cut, so that all batches are alike."""
    lines = Path(data).read_text(encoding="utf-8").splitlines()[1:]
    words = " ".join(line.split("\t")[0] for line in lines).split()
    return [" ".join(words[64 * row : 64 * (row + 1)]) for row in range(ROWS)]


def in_turns(candidates: Sequence[Callable[[], object]]) -> list[float]:
    """The median seconds of each."""
    found: list[list[float]] = [[] for _ in candidates]
    for turn in range(ROUNDS + 1):
        for seconds, run in zip(found, candidates):
            begin = time.perf_counter()
            run()
            if turn:
                seconds.append(time.perf_counter() - begin)
    return [median(seconds) for seconds in found]


def serve(folders: Sequence[Path], texts: Sequence[str]) -> dict[str, float]:
    """What `Tasks` holds and how fast it answers."""
    from fastpeft.serving.tasks import Tasks

    tasks, before = Tasks({}, device="cpu"), 0.0
    for number, folder in enumerate(folders):
        if number == len(folders) // 3:
            before = anonymous_mb()
        tasks.add(str(number), folder)
    answers = tasks.answer([(str(number), texts[:1]) for number in range(len(folders))])
    if failed := [each for each in answers if isinstance(each, Exception)]:
        raise failed[0]
    grown = anonymous_mb() - before
    spread = [(str(row % len(folders)), [text]) for row, text in enumerate(texts)]
    one, many = in_turns([lambda: tasks.answer([("0", texts)]), lambda: tasks.answer(spread)])
    return {"grown_mb": grown, "one_s": one, "many_s": many}


def serve_lora(model: str, count: int, texts: Sequence[str]) -> dict[str, float]:
    """The same of PEFT's own: adapters with a head each on one base."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(model)
    targets = ["q", "v"] if base.config.model_type == "mpnet" else None
    config = LoraConfig(target_modules=targets, modules_to_save=["out_proj"], init_lora_weights=False)
    served = get_peft_model(base, config, "0").eval()

    @torch.inference_mode()
    def answer(rows: Sequence[str], names: Sequence[str]) -> None:
        for start in range(0, len(rows), BATCH):
            batch = tokenizer(
                rows[start : start + BATCH], truncation=True, max_length=TOKENS, padding=True, return_tensors="pt"
            )
            with torch.autocast("cpu", torch.bfloat16):  # as ours, on a processor that is fast at it
                served(**batch, adapter_names=names[start : start + BATCH])

    before = 0.0
    for number in range(1, count):
        if number == count // 3:
            before = anonymous_mb()
        served.add_adapter(str(number), config)
    served.eval()
    grown = anonymous_mb() - before
    spread = [str(row % count) for row in range(len(texts))]
    one, many = in_turns([lambda: answer(texts, ["0"] * len(texts)), lambda: answer(texts, spread)])
    return {"grown_mb": grown, "one_s": one, "many_s": many}


def measured(kind: str, model: str, data: str, count: int) -> dict[str, float]:
    """Of one kind, in a process of its own: what training leaves free would hide what tasks take."""
    with tempfile.TemporaryDirectory() as place:
        if kind != "lora":
            run = trained(kind, model, data, Path(place, "run"))
            for number in range(count):
                other_run(run, Path(place, str(number)), number)
        command = [sys.executable, "-m", "bench.tenants", model, data, "--tasks", str(count), "--only", kind]
        done = subprocess.run([*command, "--place", place], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{kind}: {done.stderr[-2000:]}")
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--tasks", type=int, default=150)
    parser.add_argument("--only", choices=KINDS, action="append", help="these kinds")
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)  # of a process that measures itself
    given = parser.parse_args()
    if given.place:
        texts, folders = texts_of(given.data), [given.place / str(number) for number in range(given.tasks)]
        lora = given.only == ["lora"]
        print(json.dumps(serve_lora(given.model, given.tasks, texts) if lora else serve(folders, texts)))
        return
    from bench.harness import DATA, put_row
    from fastpeft.support.environment import versions

    for kind in given.only or KINDS:
        found = measured(kind, given.model, given.data, given.tasks)
        each = found["grown_mb"] / (given.tasks - given.tasks // 3)
        about = {"model": Path(given.model).resolve().name, "kind": KINDS[kind], "tasks": str(given.tasks)}
        row = {
            **about,
            "mb_a_task": f"{each:.2f}",
            "tasks_a_gb": f"{1024 / each:.0f}",
            "one_task_s": f"{found['one_s']:.3f}",
            "many_tasks_s": f"{found['many_s']:.3f}",
            "ratio": f"{found['many_s'] / found['one_s']:.2f}",
        }
        put_row(DATA / "tenants.csv", {**row, **versions()}, about)
        print(*row.values(), sep="\t", flush=True)


if __name__ == "__main__":
    main()
