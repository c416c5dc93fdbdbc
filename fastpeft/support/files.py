"""Files that are whole or absent: written under a temporary name, flushed to the disk, then renamed.

Whoever reads a file at its final name, even after a power cut, finds all of it or none of it.
"""

from __future__ import annotations

import csv
import io
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from fastpeft.errors import FastpeftError, first_line, is_out_of_memory

try:
    import fcntl
except ImportError:  # Windows: nobody is kept out there
    fcntl = None  # type: ignore[assignment]

_SHOWN = 80  # letters of a name in a message

LOCK = ".lock"  # the file in a folder that whoever may write there holds

# the names of files whose writing was cut off, by a kill or a power cut: not worth keeping
UNFINISHED = ".*.part"


def path_of(name: str | os.PathLike[str]) -> Path:
    """The path that a person's `name` means, with a home directory in place of `~`.

    Raises:
        FastpeftError: it can be none, as one of a user who is not there, or a name of more letters than there may be.
    """
    try:
        path = Path(name).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError, ValueError):  # who opens it says more
            os.stat(path)
    except (RuntimeError, OSError) as error:
        shown = str(name) if len(str(name)) <= _SHOWN else f"{str(name)[:_SHOWN]}..."
        reason = getattr(error, "strerror", None) or first_line(error).rstrip(".")
        raise FastpeftError(f"{shown!r} cannot be a path ({reason}). Give another.") from None
    return path


def sync_directory(folder: Path) -> None:
    """Make renames inside `folder` durable. Windows cannot open a directory and needs no such call."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def saving(what: str, remedy: Callable[[], str]) -> Iterator[None]:
    """Let a full disk or a folder that cannot be written be one message, whichever library comes upon it.

    Args:
        what: is being written inside it, with its place.
        remedy: makes the sentences on what is kept and what to do.

    Raises:
        FastpeftError: it cannot be written.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # the third from torch.save; and tokenizers raise what has no type of its own
        if not isinstance(error, (OSError, SafetensorError, RuntimeError)) and type(error) is not Exception:
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        if "iostream" in reason or "inline_container" in reason:  # all that torch.save has to say
            reason = "writing broke off, as on a full disk"
        raise FastpeftError(f"cannot write {what} ({reason}). {remedy()}") from error


def saving_into(folder: Path) -> AbstractContextManager[None]:
    """`saving` of anything to an output folder."""
    return saving(f"to the output folder {str(folder)!r}", lambda: "Give one that can be written.")


def _sync_tree(path: Path) -> None:
    """Flush a file, or every file and folder below `path`, to the disk."""
    for each in (path, *path.rglob("*")):
        if each.is_dir():
            sync_directory(each)
        else:
            with open(each, "rb+") as file:
                os.fsync(file.fileno())


def unfinished(path: Path) -> Path:
    """A name beside `path` for what is on its way there, one of `UNFINISHED`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` in one atomic step."""
    temporary = unfinished(path)
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def lock(path: Path, busy: str | None = None) -> BinaryIO:
    """Hold a file, which is made if need be, until what is returned is closed in all processes that have it.

    Where the system or the disk knows no such locks, as on Windows, the file is opened and nothing more.

    Args:
        path: of the file. Whoever holds it may remove it.
        busy: the message of the error where somebody else holds it; None: wait for its end.

    Raises:
        FastpeftError: somebody else holds it, in this process or another.
        OSError: it cannot be opened.
    """
    while True:
        file = path.open("ab")
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX if busy is None else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise FastpeftError(busy) from None
        except OSError:  # a disk without locks
            return file
        if os.fstat(file.fileno()).st_nlink > 0:
            return file
        file.close()  # removed by the one who held it: it keeps nobody out


def is_empty(folder: Path, *begun: str) -> bool:
    """Whether a folder holds nothing but names in `begun`, and what a process that ended at once leaves."""
    return all(child.name in (LOCK, *begun) or child.match(UNFINISHED) for child in folder.iterdir())


def clear_unfinished(folder: Path) -> None:
    """Remove what writes that were cut off left in `folder`."""
    for file in folder.glob(UNFINISHED):
        file.unlink()


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8 to `path` in one atomic step."""
    write_bytes(path, text.encode())


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write `values` to `path` as readable JSON in one atomic step."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def checkpoints_in(folder: Path) -> list[Path]:
    """The Trainer's checkpoints in a folder, in the order of their steps.

    What else lies there, as a copy of one, is a person's.
    """
    found = {checkpoint.name.removeprefix("checkpoint-"): checkpoint for checkpoint in folder.glob("checkpoint-*")}
    return [found[step] for step in sorted(filter(str.isdecimal, found), key=int)]


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Iterable[str]) -> None:
    """Write a table to `path` in one atomic step."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, whose every failure here is a ValueError, that of a text nested beyond Python's stack too."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        FastpeftError: there is no such file, or it holds something else.
    """
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FastpeftError(f"cannot read {path} ({error.strerror}). Give the path of an existing file.") from None
    except ValueError as error:  # JSON and UTF-8 errors alike
        raise FastpeftError(f"{path} is not a JSON file ({error}). Restore it or write it anew.") from None
    if not isinstance(values, dict):
        raise FastpeftError(f"{path} holds a JSON {type(values).__name__}, not an object of names and values.")
    return values


def _open_up(path: Path) -> None:
    """Let whoever may read new files here read a file too, or all below a folder: safetensors lets only the owner."""
    made = unfinished(path)
    made.touch()
    usual = stat.S_IMODE(made.stat().st_mode)  # by the umask
    made.unlink()
    for file in filter(Path.is_file, (path, *path.rglob("*"))):
        file.chmod(stat.S_IMODE(file.stat().st_mode) | usual)


def publish(staged: Path, target: Path) -> None:
    """Move a finished file or folder from a staging place on the same disk to `target`.

    A file replaces what is there; a folder needs a free name, since no folder can be replaced in one step.
    """
    _open_up(staged)
    _sync_tree(staged)
    os.replace(staged, target)
    sync_directory(target.parent)


def discard(folder: Path, trash: Path) -> None:
    """Delete `folder`, if it is there, never to be seen half deleted: it moves to `trash`, on its disk, first."""
    if folder.exists():
        doomed = Path(tempfile.mkdtemp(dir=trash))
        os.replace(folder, doomed / folder.name)
        shutil.rmtree(doomed)
