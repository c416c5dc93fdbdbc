"""The evidence: every method on pretrained models, three seeds each.

An encoder of RoBERTa-base's size on SST-2, TREC and WNUT17, and a decoder on E2E:

    python -m bench.pretrained mpnet models/mpnet
    python -m bench.pretrained smollm2 models/smollm2
    python -m bench.evidence sst2 models/mpnet path/to/sst2 runs/evidence
    python -m bench.evidence sst2-all models/mpnet path/to/sst2 runs/evidence --seeds 1
    python -m bench.evidence sst2-mezo models/mpnet path/to/sst2 runs/evidence --seeds 1
    python -m bench.evidence trec models/mpnet path/to/trec runs/evidence
    python -m bench.evidence wnut17 models/mpnet path/to/wnut17 runs/evidence
    python -m bench.evidence e2e models/smollm2 path/to/e2e runs/evidence

Each is a comparison in `runs/evidence/TASK` and runs a whole seed before the next. What has finished is kept in
`bench/data/evidence/TASK`, one file a cell without weights. So the same command goes on where it was, also on another
machine. The report is copied to `docs/results/base-TASK`. Cells compute by autocast in bfloat16, the default of a
processor with instructions for it, but those of SST-2 in float32. The rows to measure on are the dev and the test part
together (SST-2: 872 and 1,821 sentences) or the test part. These sentences of SST-2 chose LoRA's recipe among the three
rates that are here, and SiVA's by earlier runs on dev (`bench/data/siva_rates.csv`); they choose nothing else. SST-2
trains on 20,000 of its phrases, or on all. Learning rates are those of the recipes, but where a variant names one
(docs/results/paper.md): LoRA's 0.0004, which was its recipe for models of every width, MeZO's, which is its recipe
beside narrow ones now, and those of WNUT17, which 1,000 of the training rows and 800 others chose. MeZO starts from
MPNet with a masked-word head, which MPNet has not: `sst2-mezo` first trains one, in `runs/evidence/sst2-mezo/words`.
Kept cells were trained by the recipes of their time, in which a new head had the rate of all else; each file's
`recipe` has them.

E2E trains on nine tenths of its validation part and measures on the last one, of other meanings. Then each cell answers
all meanings of the test part, by its most likely words, and reads general text: the cross-entropy of that, before and
after, is how much was forgotten. Both go into the cell's `test.json`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.harness import DATA, option_parser
from fastpeft import CompareConfig, TrainConfig, train
from fastpeft.comparison.cells import CELLS, Cell
from fastpeft.comparison.executors import ProcessExit
from fastpeft.comparison.learning_rates import take_slice, write_rows
from fastpeft.comparison.run import Comparison
from fastpeft.data.examples import Examples, TextData, load_data, load_rows
from fastpeft.data.problems import CLASSIFICATION, NEXT_WORDS
from fastpeft.support.files import read_json, write_json, write_text
from fastpeft.training.generation import TextGenerator, measure_generations
from fastpeft.training.loading import load_run
from fastpeft.training.run_folder import MODEL_KEY, START_KEY, model_fingerprint

KEPT = DATA / "evidence"
PAGES = DATA.parents[1] / "docs" / "results"
SEEDS = 3
ROWS = 20_000  # of SST-2's phrases
_PHRASES = 40_000  # of four words or more, for a masked-word head
_PARTS = ("run", "curves", "predictions", "row_scores", "test", "metrics")  # of a cell; the last marks it as finished
_MEASURED = "test.json"
_GENERAL = 32, 128  # stretches of general text, and tokens of each
_NO_CURVE = 1_000_000  # steps between two points of the dev curve: it would take as long as the training


def sst2(source: Path, folder: Path, rows: int | None = ROWS) -> None:
    """Some of the phrases to train on, or all; the dev and the test sentences to measure on."""
    whole = load_data(str(source))
    test = load_rows(str(source / "test.tsv"), whole.labels, whole.problem)
    dev = Examples([*whole.dev.texts, *test.texts], [*whole.dev.labels, *test.labels])
    write_rows(replace(take_slice(whole, rows or len(whole.train)), dev=dev), folder)


def masked_words(model: str, source: Path, folder: Path) -> Path:
    """A model with a masked-word head, trained on phrases without their classes while the encoder stays as it is."""
    output = folder / "words"
    if not (output / "metrics.json").is_file():
        texts = [text for text in load_data(str(source)).train.texts if len(text.split()) >= 4]
        write_text(folder / "words.txt", "".join(f"{text}\n" for text in texts[:_PHRASES]))
        given = {"model": model, "data": str(folder / "words.txt"), "output": str(output)}
        train(TrainConfig(**given, method="head", objective="mlm", epochs=1, batch_size=32, bf16=True))
    return output


def trec(source: Path, folder: Path) -> None:
    """All questions; the test part to measure on."""
    labels = [str(kind) for kind in range(6)]
    train, test = (load_rows(str(source / f"{part}.tsv"), labels, CLASSIFICATION) for part in ("train", "test"))
    write_rows(TextData(train, test, labels, str(source), CLASSIFICATION), folder)


def wnut17(source: Path, folder: Path) -> None:
    """All sentences with their tags, read from CoNLL's form; the test part to measure on."""
    for part, name in (("train", "train"), ("test", "dev")):
        write_lines(folder / f"{name}.jsonl", tagged_sentences(source / f"{part}.conll"))


def tagged_sentences(file: Path) -> list[dict[str, list[str]]]:
    """The rows of a file in CoNLL's form: a word and its tag a line, and an empty line after each sentence."""
    blocks = file.read_text(encoding="utf-8").split("\n\n")
    sentences = ([line.split("\t") for line in block.splitlines()] for block in blocks if block.strip())
    return [{"tokens": [word for word, _ in pairs], "tags": [tag for _, tag in pairs]} for pairs in sentences]


def e2e(source: Path, folder: Path) -> None:
    """Meanings as prompts and what people wrote of them; rows of a meaning follow each other, and stay together."""
    parts = {}
    for name in ("valid", "test"):
        lines = (source / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        pairs = (line.split("||") for line in lines if line.strip())
        parts[name] = [{"prompt": f"{meaning.strip()}\n", "completion": said.strip()} for meaning, said in pairs]
    rows = parts.pop("valid")
    cut = 9 * len(rows) // 10
    while rows[cut]["prompt"] == rows[cut - 1]["prompt"]:
        cut += 1
    for name, part in (("train", rows[:cut]), ("dev", rows[cut:]), *parts.items()):
        write_lines(folder / f"{name}.jsonl", part)


def write_lines(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines."""
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def said(cell: Path, rows: Path) -> dict[str, float]:
    """BLEU and ROUGE-L of a finished cell on the test part; the cross-entropy of general text before it and after."""
    run = load_run(cell)
    test = load_rows(str(rows / "test.jsonl"), [], NEXT_WORDS)
    return {
        **measure_generations(TextGenerator(run), test.texts),
        "general_loss_before": _loss_of_base(run.config.model),
        "general_loss": _general_loss(run.loaded.model, run.loaded.tokenizer),
    }


@cache
def _loss_of_base(model: str) -> float:
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)  # as cells compute
    return _general_loss(base, AutoTokenizer.from_pretrained(model))


@torch.inference_mode()
def _general_loss(model: Any, tokenizer: Any) -> float:
    """The cross-entropy, in nats a token, of stretches of Python's own reference, spread evenly over it."""
    stretches, length = _GENERAL
    tokens = torch.tensor(tokenizer("\n".join(topics.values()))["input_ids"])
    starts = torch.linspace(0, len(tokens) - length, stretches).long()
    rows = tokens[starts[:, None] + torch.arange(length)]
    rows = rows.to(model.device)
    model.eval()
    losses = [cross_entropy(model(row[None]).logits[0, :-1].float(), row[1:]) for row in rows]
    return float(torch.stack(losses).mean())


@dataclass(frozen=True)
class Evidence:
    """A task: what writes its rows, what `CompareConfig` is given, what is measured of a finished cell, and what makes
    of a model the one that its cells start from."""

    rows: Callable[[Path, Path], None]
    given: dict[str, Any]
    common: dict[str, Any] = field(default_factory=dict)
    test: Callable[[Path, Path], dict[str, float]] | None = None
    start: Callable[[str, Path, Path], Path] = lambda model, source, folder: Path(model)


_ADAPTED = "rank=4:targets=query+key"
_FOR_LARGE = ":learning_rate=4e-4"  # the rate of LoRA's recipe beside RoBERTa-large
_METHODS = (  # what the goal compares comes first, what takes longest last
    f"lora:{_ADAPTED}{_FOR_LARGE}",
    "k-lst:window=9",
    "lst",
    "siva:rank=4:targets=query+key",
    "last-n",
    *(f"{method}:layers_per_block=1" for method in ("k-lst:window=9", "lst", "k-lst:window=5")),  # the paper's form
    "head",
    "bitfit",
    f"pissa:{_ADAPTED}",
    "siva:rank=4:targets=query+key:residual_dtype=nf4",
    "qlora",
    "full",
    f"lora:{_ADAPTED}:learning_rate=1.2e-3:bf16=false",
    "siva:rank=4:targets=key+value:bf16=false",
)
_SIDE_RATE = ":learning_rate=6e-4"
_MEZO = "mezo:prompt=sst2:learning_rate=6e-6:epochs=5"
_PROMPTED = ":prompt=sst2:prompt_head=classifier"
_AFTER_MEZO = tuple(
    f"{method}{prompt}:init_from={_MEZO}"
    for method in ("lst:layers_per_block=1", "k-lst:window=9:layers_per_block=1", "last-n")
    for prompt in ("", _PROMPTED)
)
_OTHER_RATES = (  # than the recipe's
    f"lora:{_ADAPTED}{_FOR_LARGE}",
    f"lora:{_ADAPTED}:learning_rate=3.6e-3",
    f"lora:rank=4:targets=key+value{_FOR_LARGE}",
    "siva:rank=4:targets=query+key:learning_rate=3e-3",
    "last-n:learning_rate=1.8e-4",
)
_OTHER_LAYERS = ("lora:rank=4:targets=key+value", "siva:rank=4:targets=all-linear")  # than the paper's
_SST2 = {"epochs": 1, "bf16": False, "pack_weights": False}  # packs would make memory differ between processors
_TAGGING = (  # by the recipes' rates adapters answer one tag throughout
    f"lora:{_ADAPTED}:learning_rate=4e-3",
    f"k-lst:window=9{_SIDE_RATE}",
    f"lst{_SIDE_RATE}",
    "siva:rank=4:targets=query+key:learning_rate=3e-3",
    *(f"{method}:layers_per_block=1{_SIDE_RATE}" for method in ("k-lst:window=9", "lst", "k-lst:window=5")),
    f"pissa:{_ADAPTED}:learning_rate=4e-3",
    "siva:rank=4:targets=query+key:residual_dtype=nf4:learning_rate=3e-3",
    "bitfit:learning_rate=4e-3",
    "head:learning_rate=5e-3",
    "last-n:learning_rate=1e-4",
    "qlora:learning_rate=1e-3",
    "full:learning_rate=5e-5",
    *(f"siva:rank=4:targets=key+value:learning_rate={rate}:bf16=false" for rate in ("3e-3", "1.5e-3")),
)
_WIDE = ":rank=8:targets=all-linear"
_LAST_16 = ":siva_layers=16:rank=4:targets=q_proj+k_proj"  # of SiVA beside a side network
_LINEAR = "q_proj+k_proj+v_proj+o_proj+gate_proj+up_proj+down_proj"
_SPEAKING = (
    "lst",
    "k-lst:window=9",
    "lst:examples=8",
    "k-lst:window=9:residual=state",
    "lst:reduction=4:learning_rate=0.002",
    "lst:siva_layers=4:rank=4:targets=q_proj+k_proj",
    *(f"{method}{_LAST_16}" for method in ("k-lst:window=9", "lst")),
    *(f"{method}{_LAST_16}:learning_rate=0.001" for method in ("k-lst:window=9", "lst")),
    f"lst{_LAST_16}:learning_rate=0.001:epochs=3",
    f"k-lst:window=9{_LAST_16}:learning_rate=0.001:layer_drop=0.3:feature_dropout=0.3",
    f"k-lst:window=9:siva_layers=10{_WIDE}:learning_rate=0.001",
    f"siva:rank=8:targets={_LINEAR}:layers_to_transform={[*range(14, 30)]}".replace(" ", ""),
    f"siva:rank=4:targets=q_proj+k_proj:layers_to_transform={[*range(14, 30)]}".replace(" ", ""),
    f"lora{_WIDE}",
    "lst:layers_per_block=1:normalise_features=false",
    "k-lst:window=9:layers_per_block=1",
    f"siva{_WIDE}",
    "last-n",
    "full",
    f"pissa{_WIDE}",
    f"siva{_WIDE}:residual_dtype=nf4",
    f"siva{_WIDE}:svd_niter=4",
    f"qlora{_WIDE}",
    f"lora{_WIDE}:learning_rate=1.2e-3:bf16=false",
    "mezo",
)
TASKS = {
    "sst2": Evidence(
        sst2,
        {"suite": "table1", "methods": ("k-lst:window=9", "lst", *_OTHER_RATES, *_OTHER_LAYERS, "head")},
        _SST2,
    ),
    "sst2-all": Evidence(
        partial(sst2, rows=None),
        {
            "methods": (
                *(f"lora:{_ADAPTED}{rate}" for rate in ("", _FOR_LARGE)),
                "siva:rank=4:targets=query+key",
                *(f"{method}:targets=key+value" for method in ("lora:rank=4", "siva")),
                "full",
                "k-lst:window=9",
                "lst",
            )
        },
        {"epochs": 1},
    ),
    "sst2-mezo": Evidence(sst2, {"methods": (_MEZO, *_AFTER_MEZO)}, {**_SST2, "eval_steps": 2_000}, start=masked_words),
    "trec": Evidence(trec, {"methods": _METHODS}, {"epochs": 3}),
    "wnut17": Evidence(wnut17, {"methods": _TAGGING}, {"epochs": 3}),
    "e2e": Evidence(e2e, {"methods": _SPEAKING}, {"objective": "causal", "epochs": 1}, said),
}


def restore(kept: Path, folder: Path, places: dict[str, str]) -> None:
    """Put finished cells back into the folder of a comparison, where they are not.

    Those of a model with other weights stay away, as a masked-word head that was trained anew has: they run again.

    Args:
        kept: the folder that `keep` wrote.
        folder: of the comparison.
        places: what `model` and `data` are here.
    """
    weights = model_fingerprint(places["model"])
    for file in sorted(kept.glob("*.json")):
        cell = folder / CELLS / file.stem
        parts = read_json(file)
        if (cell / "metrics.json").is_file() or parts["run"].get(MODEL_KEY, weights) != weights:
            continue
        shutil.rmtree(cell, ignore_errors=True)  # a part of the same cell, begun here before it was kept elsewhere
        cell.mkdir(parents=True)
        parts["run"] |= {**places, "output": str(cell.resolve())}
        parts["metrics"] |= {**places, "command": f"fastpeft train --config {cell.name}.json"}
        for part, values in parts.items():
            write_json(cell / f"{part}.json", values)


def keep(folder: Path, kept: Path) -> None:
    """Write a file for each finished cell of a comparison that has none yet, with neither weights nor local paths."""
    for cell in sorted(folder.glob(f"{CELLS}/*/")):
        file = kept / f"{cell.name}.json"
        if file.is_file() or not (cell / "metrics.json").is_file():
            continue
        parts = {part: read_json(cell / f"{part}.json") for part in _PARTS if (cell / f"{part}.json").is_file()}
        for part, name in product(("run", "metrics"), ("model", "data", "output", "command")):
            parts[part].pop(name, None)
        parts["run"].pop(START_KEY, None)  # of weights that are not kept
        if start := parts["run"].get("init_from"):  # another cell, which lies beside it in any folder
            parts["run"]["init_from"] = Path(start).name
        lines = (f"{json.dumps(part)}: {json.dumps(values, separators=(',', ':'))}" for part, values in parts.items())
        kept.mkdir(parents=True, exist_ok=True)
        write_text(file, "{" + ",\n".join(lines) + "}\n")


def publish(folder: Path, page: Path, places: dict[str, str]) -> None:
    """Copy the report of a comparison, with the names of its model and data in place of where they are here."""
    if not (folder / "figures").is_dir():  # they are drawn last: a comparison that could not start has none
        return
    shutil.rmtree(page, ignore_errors=True)
    shutil.copytree(folder / "figures", page / "figures")
    for name in ("report.md", "results.csv"):
        text = (folder / name).read_text(encoding="utf-8")
        for place in (*places.values(), str(folder)):
            text = text.replace(place, Path(place).name)
        write_text(page / name, text)


def gather(
    task: str,
    model: str,
    source: Path,
    folder: Path,
    seeds: int,
    kept: Path = KEPT,
    pages: Path = PAGES,
    **common: Any,
) -> None:
    """Run what is not kept yet of a task, seed by seed, and write the report of all."""
    evidence, folder = TASKS[task], folder / task
    data = folder / f"{task}-rows"
    if not (data / "dev.jsonl").is_file():
        data.mkdir(parents=True, exist_ok=True)
        evidence.rows(source, data)
    places = {"model": str(evidence.start(model, source, folder).resolve()), "data": str(data.resolve())}
    restore(kept / task, folder / "comparison", places)
    fixed = {**places, "bf16": True, "eval_steps": _NO_CURVE, **evidence.common, **common}

    def finish(cells: Path) -> None:
        for cell in cells.glob("*/metrics.json"):
            if evidence.test and not (cell.parent / _MEASURED).is_file():
                write_json(cell.parent / _MEASURED, evidence.test(cell.parent, data))
        keep(cells.parent, kept / task)

    for count in range(1, seeds + 1):
        config = CompareConfig(output=str(folder / "comparison"), seeds=count, common=fixed, **evidence.given)
        try:
            finish(folder / "comparison" / CELLS)
            Keeping(config, finish).run()
        finally:
            publish(folder / "comparison", pages / f"base-{task}", places)


class Keeping(Comparison):
    """A comparison that lets a function look at the cells' folder after each of them."""

    def __init__(self, config: CompareConfig, finish: Callable[[Path], None]) -> None:
        super().__init__(config, f"fastpeft.compare({config})")
        self._finish = finish

    def _end(self, cell: Cell, ended: ProcessExit) -> None:
        super()._end(cell, ended)
        self._finish(cell.folder.path.parent)


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("model", help="as for fastpeft train --model")
    parser.add_argument("source", type=Path, help="folder of the task's files, as they are distributed")
    parser.add_argument("folder", type=Path, help="of the comparisons")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    given = parser.parse_args()
    gather(given.task, given.model, given.source, given.folder, given.seeds)


if __name__ == "__main__":
    main()
