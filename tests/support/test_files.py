"""Files are whole or absent, whatever goes wrong while they are written."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from fastpeft import FastpeftError
from fastpeft.support import files


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "values.json"
    files.write_json(file, {"word": "naïve", "number": 1})
    assert json.loads(file.read_text(encoding="utf-8")) == {"word": "naïve", "number": 1}

    def disk_full(descriptor: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="no space left"):
        files.write_text(file, "new")
    assert files.read_json(file)["number"] == 1
    assert list(tmp_path.iterdir()) == [file]


def test_what_a_killed_write_left_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: None)  # as killed before it
        files.write_text(tmp_path / "values.json", "{}")
    (left,) = tmp_path.iterdir()
    assert left.match(files.UNFINISHED)
    (tmp_path / ".hidden").touch()
    files.clear_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".hidden"]


def test_a_lock_keeps_others_out_until_it_is_closed(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    with files.lock(file, "it is busy"), pytest.raises(FastpeftError, match="it is busy"):
        files.lock(file, "it is busy")
    files.lock(file, "it is busy").close()


def test_a_lock_that_its_holder_removed_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waited for it would otherwise hold a file that nobody else finds."""
    file = tmp_path / "lock"
    fcntl = pytest.importorskip("fcntl")
    flock, calls = fcntl.flock, []

    def removed_meanwhile(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            file.unlink()
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", removed_meanwhile)
    with files.lock(file), pytest.raises(FastpeftError, match="busy"):
        files.lock(file, "busy")
    assert len(calls) == 3


def test_a_disk_without_locks_is_used_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", refuse)
    with files.lock(tmp_path / "lock", "busy"), files.lock(tmp_path / "lock", "busy"):
        pass


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (SafetensorError("I/O error: No space left"), "I/O error: No space left"),
        (RuntimeError("file write failed\nat line 3"), "file write failed"),
        (Exception("No space left on device (os error 28)"), "No space left on device (os error 28)"),
        (
            RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 8176 vs 8146"),
            "writing broke off, as on a full disk",
        ),
    ],
)
def test_what_cannot_be_written_is_one_message(error: Exception, reason: str) -> None:
    with pytest.raises(FastpeftError) as raised, files.saving("it", lambda: "Make room."):
        raise error
    assert str(raised.value) == f"cannot write it ({reason}). Make room."


@pytest.mark.parametrize(
    "error",
    [FastpeftError("no rank"), KeyError("name"), KeyboardInterrupt(), RuntimeError("CUDA out of memory.")],
    ids=repr,
)
def test_what_is_wrong_otherwise_passes(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, files.saving("it", lambda: "Make room."):
        raise error
    assert raised.value is error


def test_written_files_have_the_usual_permissions(tmp_path: Path) -> None:
    file, plain = tmp_path / "ours", tmp_path / "plain"
    files.write_text(file, "")
    plain.write_text("")
    assert file.stat().st_mode == plain.stat().st_mode


def test_what_is_published_has_the_usual_permissions(tmp_path: Path) -> None:
    """safetensors leaves its files to their owner alone; a run is often trained by one user and served by another."""
    staged, plain = tmp_path / "staged", tmp_path / "plain"
    (staged / "inner").mkdir(parents=True)
    plain.write_text("")
    save_file({"weight": torch.zeros(2)}, staged / "inner" / "weights.safetensors")
    save_file({"weight": torch.zeros(2)}, staged / "weights.safetensors")
    files.publish(staged / "weights.safetensors", tmp_path / "alone")
    files.publish(staged, tmp_path / "folder")
    for file in (tmp_path / "alone", tmp_path / "folder" / "inner" / "weights.safetensors"):
        assert file.stat().st_mode == plain.stat().st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "folder", "plain"]


def test_publish_is_flushed_before_it_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staged, target = tmp_path / "staged", tmp_path / "target"
    (staged / "inner").mkdir(parents=True)
    (staged / "inner" / "file").write_text("content")
    events: list[str] = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("flush"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), rename(a, b)))
    files.publish(staged, target)
    assert (target / "inner" / "file").read_text() == "content"
    assert events == ["flush", "flush", "flush", "rename", "flush"]  # two folders and a file, then the parent


def test_discard_removes_from_sight_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, trash = tmp_path / "folder", tmp_path / "trash"
    folder.mkdir()
    (folder / "file").write_text("content")
    trash.mkdir()

    def interrupted(path: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            files.discard(folder, trash)
    assert not folder.exists()
    files.discard(folder, trash)  # nothing there, nothing to do


@pytest.mark.parametrize("content", ["{", "[1]", b"\xff"], ids=["cut off", "a list", "no text"])
def test_json_that_is_no_object_is_refused_by_name(tmp_path: Path, content: str | bytes) -> None:
    file = tmp_path / "values.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FastpeftError, match=r"values\.json"):
        files.read_json(file)
