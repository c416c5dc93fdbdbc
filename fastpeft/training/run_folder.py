"""The folder of one training run: what lies where, when it is finished, and who may write into it.

run.json          how the run was started; written first, so it marks a folder as a run's
checkpoints/      checkpoint-N, each whole from the moment it has its name
last-good/        the weights before a step that failed
mezo.journal      what each step of a run by MeZO found: with the model it began from, a checkpoint of every step
adapter_* or model* and config.json, the tokenizer's files, prompt.json, README.md      the result
adapter/          a part of the result: the adapter that trained beside a side network
curves.json       what was logged while it trained, as pairs of step and value by name; curves.png shows it
predictions.json  of classes: that of each dev row, by its label and by the result
row_scores.json   of anything else: what each dev row adds to the metric that paired tests compare
choices.json      which ways of computing a GPU was the fastest by; a resumed run takes the same
logs/             what TensorBoard shows, where the run was to report to it
trained_on.txt    a digest of each text that its weights were trained on, by the runs that it started from too
metrics.json      what was measured; written last, so it marks a run as finished
.staging/         files on their way to one of the above
.lock             held, while it is there, by the process that writes into the folder

Anything else in the folder is a person's, and stays.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastpeft.errors import FastpeftError, refuse
from fastpeft.support import files
from fastpeft.version import __version__

JOURNAL = "mezo.journal"  # of `fastpeft.mezo.journal`, which imports PyTorch
CURVES = "curves.json"
CHOICES = "choices.json"
PREDICTIONS, ROW_SCORES = "predictions.json", "row_scores.json"
LOGS = "logs"
TRAINED_ON = "trained_on.txt"
_VERSION_KEY = "fastpeft_version"
_RECIPE_KEY = "recipe"
START_KEY = "init_from_weights"
ROWS_KEY = "rows"
MODEL_KEY = "model_weights"
_FOUND = ("found_prompt", "bf16")  # what a run decides where nobody did; a resumed run keeps it
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")  # of a model; the first kind that is there
_SAMPLES, _SAMPLE = 64, 1 << 20  # of each file, and the bytes of one
_NOTES = (_VERSION_KEY, _RECIPE_KEY, START_KEY, ROWS_KEY, MODEL_KEY)  # what run.json says beside the configuration
_KEPT_CHECKPOINTS = 2
_STATE = ("optimizer.pt", "scheduler.pt", "rng_state*.pth")  # of a checkpoint, beside weights and the Trainer's own

# What a run writes, in the order of its deletion: a half-deleted run is no finished one, and still looks like a run.
_WRITTEN = """
    metrics.json .staging checkpoints last-good mezo.journal
    adapter_config.json adapter_model*.safetensors* config.json generation_config.json model*.safetensors* adapter logs
    tokenizer* special_tokens_map.json added_tokens.json chat_template.jinja vocab.* merges.txt s*piece*.model
    prompt.json README.md curves.png curves.json predictions.json row_scores.json choices.json trained_on.txt
    run.json
"""


_MAY_BE: dict[str, Callable[[Any], bool]] = {  # values of `metrics.json`
    "labels": lambda labels: isinstance(labels, list) and all(isinstance(label, str) for label in labels),
    "problem_type": lambda name: isinstance(name, str),
    "pairs": lambda pairs: isinstance(pairs, bool),
    "columns": lambda names: (
        names is None or (isinstance(names, list) and [*map(type, names)] in ([str, str], [str, type(None)]))
    ),
    "max_length": lambda length: type(length) is int and length > 0,
    "most_frequent_class": lambda found: isinstance(found, dict) and isinstance(found.get("class"), str),
}


class _Metrics(dict[str, Any]):
    """What `metrics.json` holds, where a value that it lacks, or that no run writes, is an error with a message."""

    def __init__(self, file: Path) -> None:
        super().__init__(files.read_json(file))
        self.file = file
        for name, fits in _MAY_BE.items():
            if name in self and not fits(self[name]):
                raise self._damaged(f"is damaged: {name} is {self[name]!r}, which no run writes")

    def _damaged(self, how: str) -> FastpeftError:
        return FastpeftError(f"{self.file} {how}. Restore the file, or train anew with --overwrite.")

    def __missing__(self, name: str) -> Any:
        raise self._damaged(f"does not hold {name!r}, which every finished run has")


class RunFolder:
    """The files of one run below `path`."""

    def __init__(self, path: str | Path) -> None:
        self.path = files.path_of(path)
        self.config_file = self.path / "run.json"
        self.metrics_file = self.path / "metrics.json"
        self.checkpoints = self.path / "checkpoints"
        self.journal = self.path / JOURNAL
        self.staging = self.path / ".staging"
        self._opened: tuple[os.stat_result, bytes] | None = None  # which folder, and what its run.json held

    @property
    def finished(self) -> bool:
        return self.metrics_file.is_file()

    @property
    def started(self) -> bool:
        """Whether a run of this library was started here."""
        try:
            return _VERSION_KEY in files.read_json(self.config_file)
        except FastpeftError:
            return False

    def config(self) -> dict[str, Any]:
        """What `run.json` holds."""
        return read_config(self.config_file)

    def notes(self) -> dict[str, Any]:
        """What `run.json` says beside the configuration."""
        values = files.read_json(self.config_file)
        return {name: values[name] for name in _NOTES if name in values}

    def found(self) -> dict[str, Any]:
        """What the run that was started here found out, as `run.json` holds it."""
        config = self.config()
        return {name: config[name] for name in _FOUND if config.get(name) is not None}

    def choices(self) -> dict[str, Any]:
        """What `choices.json` holds, of `fastpeft.ops.dispatch`; nothing where nothing was timed."""
        if not (self.path / CHOICES).is_file():
            return {}
        try:
            return files.read_json(self.path / CHOICES)
        except FastpeftError as error:
            raise FastpeftError(
                f"{error} Or delete it: implementations are then timed again, and results may differ in the last bits."
            ) from None

    def keep_choices(self, choices: Mapping[str, Any]) -> None:
        """Write `choices.json`."""
        with self.saving("which ways of computing are the fastest"):
            files.write_json(self.path / CHOICES, dict(choices))

    def metrics(self) -> dict[str, Any]:
        """What `metrics.json` holds; refuses a folder without a finished run."""
        if not self.started:
            raise FastpeftError(
                f"{str(self.path)!r} is not the folder of a run. Give the --output of a `fastpeft train`."
            )
        if not self.finished:
            raise FastpeftError(
                f"the run in {str(self.path)!r} is not finished. Finish it with `fastpeft train --output "
                f"{shlex.quote(str(self.path))} --resume`."
            )
        return _Metrics(self.metrics_file)

    def check_finished(self) -> None:
        """Raise `FastpeftError` unless the folder holds a finished run."""
        self.metrics()

    def trained_on(self) -> set[str]:
        """Digests of the texts that the result was trained on; none where the file is missing."""
        file = self.path / TRAINED_ON
        if not file.is_file():
            return set()
        found = set(file.read_text(encoding="utf-8", errors="replace").split())
        if not all(map(re.compile("[0-9a-f]{12}").fullmatch, found)):
            raise FastpeftError(
                f"{file} is damaged: a line is not a digest of a text. Restore the file; without it eval cannot warn "
                "of rows that are in the training data."
            )
        return found

    def check_files(
        self, config: Mapping[str, Any], *, resume: bool, overwrite: bool, moved: Collection[str] = ()
    ) -> None:
        """The part of `lineage.check_output` that looks at this folder alone."""
        if resume and overwrite:
            raise FastpeftError("resume and overwrite exclude each other: the one keeps what the other deletes.")
        if not (resume and self.finished):
            self._check_place()
        is_file, holds = (
            self.path.exists() and not self.path.is_dir(),
            self.path.is_dir() and not files.is_empty(self.path),
        )
        refuse(
            {
                f"the output {str(self.path)!r} is a file. Give the name of a new or empty folder.": is_file,
                f"the output folder {str(self.path)!r} is not empty. Give another one, or --resume to go on with the "
                "run in it, or --overwrite to replace that run.": holds and not (resume or overwrite),
                f"the output folder {str(self.path)!r} is not empty and not of a run of fastpeft, so it is left alone. "
                "Give another one.": holds and not self.started,
            }
        )
        if not holds:
            return
        if resume:
            self._check_unchanged(config, moved)
            if self.journal.exists():
                from fastpeft.mezo.journal import Journal

                Journal.open(self.journal)  # refuses one that cannot be read

    def _check_unchanged(self, config: Mapping[str, Any], moved: Collection[str]) -> None:
        """Raise `FastpeftError` where the run in the folder was started with other values; paths may have moved."""
        before = self.config()
        free = {"output", *moved, *(name for name in _FOUND if config.get(name) is None)}
        changed = [name for name in config if name not in free and config[name] != before.get(name, config[name])]
        if changed:
            differences = ", ".join(f"{name} {before[name]!r} -> {config[name]!r}" for name in changed)
            gone = [name for name in changed if os.path.isabs(str(before[name])) and not os.path.exists(before[name])]
            advice = f" Where {' and '.join(gone)} only moved, write the new path into {self.config_file}."
            raise FastpeftError(
                f"the run in {str(self.path)!r} was started with other values: {differences}. Resume it with its own, "
                f"or give another output folder.{advice if gone else ''}"
            )

    def _check_place(self) -> None:
        """Raise `FastpeftError` where the folder, if it is not there, cannot be made, or can hold no files."""
        with files.saving_into(self.path):
            if not os.path.exists(self.path):
                # permissions alone do not tell, as of /proc; a folder of another name is in nobody's way
                above = next(folder for folder in self.path.parents if os.path.exists(folder))
                tempfile.TemporaryDirectory(prefix=".fastpeft-", dir=above).cleanup()
            elif self.path.is_dir() and not os.access(
                self.path, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids
            ):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    def note_moved(self, paths: Mapping[str, str]) -> None:
        """Write into run.json where `paths`, which moved along with the folder, lie now."""
        values = files.read_json(self.config_file)
        if any(values.get(name) != path for name, path in paths.items()):
            files.write_json(self.config_file, {**values, **paths})

    def has_rows(self, fingerprint: str) -> bool:
        """Whether the run that was started here has rows of this `TextData.fingerprint`, or noted none."""
        return bool(self.notes().get(ROWS_KEY, fingerprint) == fingerprint)

    def check_rows(self, fingerprint: str) -> None:
        """Raise `FastpeftError` where the run that was started here has other rows than those of this fingerprint."""
        if not self.has_rows(fingerprint):
            raise FastpeftError(
                f"the data {self.config()['data']!r} holds other rows now, or in another order, than when the run in "
                f"{str(self.path)!r} was started. Restore them, or train anew with --overwrite."
            )

    def fingerprint(self) -> str:
        """Identifies the weights that the run left: the first 16 hex digits of their files' SHA-256."""
        digest = hashlib.sha256()
        for file in self._weights():
            with file.open("rb") as stream:
                hashlib.file_digest(stream, lambda: digest)
        return digest.hexdigest()[:16]

    def _weights(self) -> list[Path]:
        kinds = ("model*.safetensors", "adapter_model*.safetensors", "adapter/adapter_model*.safetensors")
        return sorted(file for kind in kinds for file in self.path.glob(kind))

    def check_readable(self) -> None:
        """Raise `FastpeftError` where this user may not read weights that are there: safetensors calls them missing."""
        for file in self._weights():
            try:
                file.open("rb").close()
            except OSError as error:
                raise FastpeftError(
                    f"cannot read {str(file)!r} ({error.strerror}). Let its owner allow it, as by chmod a+r."
                ) from None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep every other run out of the folder, which is made if need be, while inside it."""
        with files.saving_into(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = files.lock(
                self.path / files.LOCK,
                f"another run writes into the output folder {str(self.path)!r}. Wait for its end, or end it and go on "
                "with --resume; or give another output folder.",
            )
        with lock:
            try:
                yield
            finally:
                with suppress(OSError):  # what is left of a lock does no harm
                    (self.path / files.LOCK).unlink()

    def clear_lock(self) -> None:
        """Remove the lock of a run that was killed after its end; where a run holds it, it stays."""
        if (self.path / files.LOCK).exists():
            with suppress(FastpeftError), self.held():
                pass

    def open(
        self, config: Mapping[str, Any], rows: str, *, overwrite: bool, recipe: Mapping[str, Any] | None = None
    ) -> None:
        """Make the folder, while it is held, ready for writing: without `overwrite` what a resumed run needs stays.

        `rows` is the `TextData.fingerprint` of its rows, and `recipe` rates and schedule as used, for people to read.
        """
        notes: dict[str, Any] = {_VERSION_KEY: __version__, ROWS_KEY: rows}
        if (weights := model_fingerprint(config["model"])) is not None:
            notes[MODEL_KEY] = weights
        if recipe is not None:
            notes[_RECIPE_KEY] = dict(recipe)
        if config.get("init_from") is not None:
            notes[START_KEY] = RunFolder(config["init_from"]).fingerprint()
        with files.saving_into(self.path):
            files.clear_unfinished(self.path)
            if overwrite:
                for pattern in _WRITTEN.split():
                    for child in self.path.glob(pattern):
                        _delete(child)
            files.write_json(self.config_file, {**notes, **config})
            _delete(self.staging)
            self.staging.mkdir()
            self._opened = self.path.stat(), self.config_file.read_bytes()

    def _keep_place(self) -> None:
        """Mark the folder as this run's again where it was moved or deleted, unless another run has its name now."""
        if self._opened is None:
            return
        folder, config = self._opened
        if not self.config_file.is_file():
            self.path.mkdir(parents=True, exist_ok=True)
            files.write_bytes(self.config_file, config)
        elif not os.path.samestat(folder, self.path.stat()) and self.config_file.read_bytes() != config:
            raise FastpeftError(
                f"the output folder {str(self.path)!r} was moved or deleted while the run was under way, and holds "
                "another run now, so nothing is written there. Resume the run where its folder is, or start it again."
            )

    @contextmanager
    def saving(self, what: str) -> Iterator[None]:
        """Write `what` inside it. Where that fails, nothing half written stays, and the error says how to go on."""

        def clear() -> str:
            shutil.rmtree(self.staging, ignore_errors=True)
            return f"Free disk space, or make the folder writable. {self.going_on()}"

        with files.saving(f"{what} to the output folder {str(self.path)!r}", clear):
            self._keep_place()
            yield

    def going_on(self) -> str:
        """What is kept of a run that is not finished, and the command that goes on with it."""
        checkpoint = self.newest_checkpoint()
        kept = "Nothing of the run is saved; start it again with"
        if self.journal.exists():
            kept = f"Every step is in {self.journal}; go on with"
        elif checkpoint is not None:
            kept = f"The newest checkpoint is {checkpoint}; resume with"
        return f"{kept} `fastpeft train --output {shlex.quote(str(self.path))} --resume`."

    def all_checkpoints(self) -> list[Path]:
        """The checkpoints in the order of their steps."""
        return files.checkpoints_in(self.checkpoints)

    def newest_checkpoint(self, up_to: int | None = None) -> Path | None:
        """The checkpoint of the latest step, or of the latest that is not after step `up_to`."""
        saved = reversed(self.all_checkpoints())
        return next((each for each in saved if up_to is None or _step(each) <= up_to), None)

    def newest_in_words(self) -> str:
        """A sentence that names the newest checkpoint, to which one can go back."""
        newest = self.newest_checkpoint()
        return "No checkpoint was saved before." if newest is None else f"The newest checkpoint is {newest}."

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.checkpoints / f"checkpoint-{step}"

    def keep_checkpoint(self, staged: Path, *, best_step: int | None) -> None:
        """Give a finished checkpoint its final name, and delete the oldest, except the best."""
        with self.saving("a checkpoint"):
            self.checkpoints.mkdir(exist_ok=True)
            target = self.checkpoints / staged.name
            files.discard(target, self.staging)
            files.publish(staged, target)
            for old in self.all_checkpoints()[:-_KEPT_CHECKPOINTS]:
                if _step(old) != best_step:
                    files.discard(old, self.staging)

    def close(self, metrics: Mapping[str, Any], staged: Path) -> None:
        """Move the result's files to their places, then mark the run as finished."""
        for file in sorted(staged.iterdir()):
            if file.is_dir():  # takes no other's place, as that of a run that was cut off here
                files.discard(self.path / file.name, self.staging)
            files.publish(file, self.path / file.name)
        _delete(self.staging)
        files.write_json(self.metrics_file, dict(metrics))


def check_whole(checkpoint: Path) -> None:
    """Raise `FastpeftError` where a checkpoint has no file of a kind that the Trainer would silently do without."""
    missing = [each for each in _STATE if not any(checkpoint.glob(each))]
    if missing:
        raise FastpeftError(
            f"cannot go on from {checkpoint}: it has no {' and no '.join(missing)}. Restore the file, or delete that "
            "folder to go on from what is before it, or train anew with --overwrite."
        )


def read_config(file: Path) -> dict[str, Any]:
    """The values of a `run.json`; what a person wrote, which has no notes, may lack any."""
    values = files.read_json(file)
    return {name: value for name, value in values.items() if name not in _NOTES}


def model_fingerprint(model: str) -> str | None:
    """Identifies the weights in a model's folder: 16 hex digits of small files whole, and of samples of large ones.

    None for what is no folder, such as a name on the hub.
    """
    folder = files.path_of(model)
    found = (sorted(file for file in folder.glob(kind) if file.is_file()) for kind in _WEIGHTS)
    weights = next(filter(None, found), [])
    digest = hashlib.sha256()
    for file in weights:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            if size <= _SAMPLES * _SAMPLE:
                digest.update(stream.read())
                continue
            for place in range(_SAMPLES):
                stream.seek(place * (size - _SAMPLE) // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()[:16] if weights else None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
