"""What a run began with, a model or an earlier run, which again began with one: whether it is there, and unchanged."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from fastpeft.errors import FastpeftError
from fastpeft.training.run_folder import MODEL_KEY, START_KEY, RunFolder, model_fingerprint


def check_output(
    folder: RunFolder, config: Mapping[str, Any], *, resume: bool, overwrite: bool, moved: Collection[str] = ()
) -> None:
    """Raise `FastpeftError` unless a run with `config` may and can write into `folder`. Changes nothing.

    `moved` are names of paths in `config` that run.json may have otherwise: they moved along with the folder.
    """
    folder.check_files(config, resume=resume, overwrite=overwrite, moved=moved)
    if not folder.started:
        return
    if overwrite:
        _check_outside(folder, config)
    if resume:
        check_start(folder, config["init_from"] if "init_from" in moved else None)
        _check_model(folder, config["model"])


def earlier_run(folder: str) -> RunFolder:
    """The finished run in `folder`, for another to start from."""
    run = RunFolder(folder)
    try:
        run.check_finished()
    except FastpeftError as error:
        raise FastpeftError(f"the run to start from is not there: {error}") from None
    _check_beginning(run)
    return run


def check_places(folder: RunFolder) -> None:
    """Raise `FastpeftError` where what the run in `folder` began with is not at the path that its run.json has.

    As after its folder was moved or renamed. Of a run that started from another, that is the other one.
    """
    name = "model" if folder.config().get("init_from") is None else "init_from"
    path = folder.config().get(name)
    if isinstance(path, str) and os.path.isabs(path) and not os.path.exists(path):
        also = "" if name == "model" else ", and where the model is, as model, if it moved too"
        raise FastpeftError(
            f"the {'model' if name == 'model' else 'run'} that the run in {str(folder.path)!r} began with is not at "
            f"{path!r}. Put it back, or write into {folder.config_file} where it is now, as {name}{also}."
        )


def check_start(folder: RunFolder, start: str | None = None) -> None:
    """Raise `FastpeftError` where the run that the one in `folder` started from has other weights now, or is gone.

    It lies in `start` now, else where run.json says.
    """
    start, notes = start or folder.config().get("init_from"), folder.notes()
    if START_KEY in notes and (start is None or notes[START_KEY] != earlier_run(start).fingerprint()):
        raise FastpeftError(
            f"the run in {str(folder.path)!r} started from that in {start!r}, which holds other weights now. Restore "
            "them, or train anew with --overwrite."
        )


def _check_model(folder: RunFolder, model: str) -> None:
    """Raise `FastpeftError` where the folder of the model that the run began with holds other weights now."""
    noted = folder.notes().get(MODEL_KEY)
    if noted is not None and noted != (now := model_fingerprint(model)) and now is not None:
        raise FastpeftError(
            f"the model in {model!r} has other weights now than when the run in {str(folder.path)!r} was started. "
            "Restore them, or train anew with --overwrite."
        )


def _check_outside(folder: RunFolder, config: Mapping[str, Any]) -> None:
    """Raise `FastpeftError` where a run with `config` needs what it would delete in `folder`."""
    own = folder.path.resolve()
    needed = [(name, config[name]) for name in ("model", "data")]
    needed += [("run to start from", str(run.path)) for run in _earlier_runs(config)]
    for name, path in needed:
        if Path(path).is_relative_to(own):
            raise FastpeftError(
                f"the {name} {path!r} lies in the run that --overwrite would delete. Give another output folder."
            )


def _check_beginning(run: RunFolder) -> None:
    """Raise `FastpeftError` where the runs that one started from, each from the next, have no first."""
    passed: set[Path] = set()
    while run.started and isinstance(start := run.config().get("init_from"), str):
        passed.add(run.path.resolve())
        run = RunFolder(start)
        if run.path.resolve() in passed:
            raise FastpeftError(f"the run in {start!r} says that it started from itself. Restore its run.json.")


def _earlier_runs(config: Mapping[str, Any]) -> Iterator[RunFolder]:
    """The runs that one with `config` starts from, the latest first."""
    while config["init_from"] is not None:
        run = earlier_run(config["init_from"])
        yield run
        config = {"init_from": None, **run.config()}
