"""`RecordStore` keeps what was appended through kills, damage, limits and other processes."""

from __future__ import annotations

import logging
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fastpeft.support import record_store as module
from fastpeft.support.record_store import RecordStore

ROOMY = 2**30


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def record(number: int) -> np.ndarray:
    """Bytes that follow from the number, of a length that does too."""
    return np.random.default_rng(number).integers(0, 256, 1 + number * 37 % 3000, dtype=np.uint8)


def records(*numbers: int) -> dict[bytes, np.ndarray]:
    return {key(number): record(number) for number in numbers}


def held(store: RecordStore, count: int = 2000) -> list[int]:
    """Numbers whose records are there; each is whole."""
    found = store.get(map(key, range(count)))
    numbers = [number for number in range(count) if key(number) in found]
    assert all(np.array_equal(found[key(number)], record(number)) for number in numbers)
    return numbers


def test_what_one_appends_all_see(tmp_path: Path) -> None:
    first, second = RecordStore(tmp_path, "a", ROOMY), RecordStore(tmp_path, "a", ROOMY)
    assert first.append(records(1, 2)) == []
    assert held(first) == [1, 2]
    assert held(second) == []
    second.refresh()
    assert held(second) == [1, 2]
    second.append(records(2, 3))
    first.append(records(4))
    assert held(first) == held(RecordStore(tmp_path, "a", ROOMY)) == [1, 2, 3, 4]
    assert (tmp_path / "a" / "index").stat().st_size == 4 * module._LINE_BYTES  # record 2 once
    assert held(RecordStore(tmp_path, "b", ROOMY)) == []


@pytest.mark.parametrize("missing", range(1, module._LINE_BYTES + 1, 3))
def test_a_torn_tail_is_dropped(tmp_path: Path, missing: int) -> None:
    RecordStore(tmp_path, "a", ROOMY).append(records(1, 2))
    index, bytes_ = tmp_path / "a" / "index", tmp_path / "a" / "records"
    index.write_bytes(index.read_bytes()[:-missing])
    with bytes_.open("ab") as file:
        file.write(b"half a record")
    store = RecordStore(tmp_path, "a", ROOMY)
    assert held(store) == [1]
    store.append(records(3, 4))
    assert held(store) == held(RecordStore(tmp_path, "a", ROOMY)) == [1, 3, 4]


@pytest.mark.parametrize("damage", ["a bit", "a cut", "a line"])
def test_a_damaged_record_is_absent_until_it_is_made_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    RecordStore(tmp_path, "a", ROOMY).append(records(1, 2))
    file = tmp_path / "a" / ("index" if damage == "a line" else "records")
    content = file.read_bytes()
    file.write_bytes(content[:-1] if damage == "a cut" else content[:-1] + bytes([content[-1] ^ 1]))
    store = RecordStore(tmp_path, "a", ROOMY)
    with caplog.at_level(logging.WARNING, "fastpeft"):
        assert held(store) == [1]
        assert held(store) == [1]
    assert caplog.text.count("holds damaged records") == (damage != "a line")  # without its line it was never there
    store.append(records(2))
    assert held(store) == held(RecordStore(tmp_path, "a", ROOMY)) == [1, 2]


def test_a_folder_that_was_deleted_takes_nothing_more(tmp_path: Path) -> None:
    """Its files would grow where nobody sees them."""
    store = RecordStore(tmp_path, "store", max_bytes=10**6)
    store.append(records(1))
    shutil.rmtree(tmp_path / "store")
    with pytest.raises(FileNotFoundError, match="the folder was deleted"):
        store.append(records(2))
    assert key(1) in store.get([key(1)])


def test_the_limit_counts_all_stores_of_a_folder(tmp_path: Path) -> None:
    limit = 5_000
    assert RecordStore(tmp_path, "a", limit).append(records(50)) == []  # 1,851 bytes
    store = RecordStore(tmp_path, "b", limit)
    assert store.append(records(70, 80, 10)) == [key(80)]  # 2,591 fit, 2,961 do not, 371 do
    assert held(store) == [10, 70]
    assert module.bytes_below(tmp_path) <= limit
    assert held(RecordStore(tmp_path, "a", limit)) == [50]


WRITER = """
import importlib.util, random, sys
import numpy as np
spec = importlib.util.spec_from_file_location("store", sys.argv[1])
store = importlib.util.module_from_spec(spec)
sys.modules["store"] = store
spec.loader.exec_module(store)
from pathlib import Path
kept = store.RecordStore(Path(sys.argv[2]), "a", 2**30)
numbers = list(range(2000))
random.Random(int(sys.argv[3])).shuffle(numbers)
print("begins", flush=True)
for start in range(0, 2000, 10):
    kept.append({
        number.to_bytes(16, "little"):
            np.random.default_rng(number).integers(0, 256, 1 + number * 37 % 3000, dtype=np.uint8)
        for number in numbers[start : start + 10]
    })
"""


def writer(folder: Path, seed: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", WRITER, module.__file__, str(folder), str(seed)]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


@pytest.mark.long
def test_two_processes_at_once_keep_every_record_once(tmp_path: Path) -> None:
    processes = [writer(tmp_path, seed) for seed in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert held(RecordStore(tmp_path, "a", ROOMY)) == list(range(2000))
    assert (tmp_path / "a" / "index").stat().st_size == 2000 * module._LINE_BYTES


@pytest.mark.kill
@pytest.mark.parametrize("seed", range(5))
def test_a_kill_while_writing_leaves_whole_records(tmp_path: Path, seed: int) -> None:
    generator = random.Random(seed)
    for turn in range(3):
        with writer(tmp_path, turn) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(generator.uniform(0, 0.05))
            process.kill()
    store = RecordStore(tmp_path, "a", ROOMY)
    before = held(store)
    store.append(records(*range(2000)))
    assert held(store) == held(RecordStore(tmp_path, "a", ROOMY)) == list(range(2000))
    assert (tmp_path / "a" / "index").stat().st_size == 2000 * module._LINE_BYTES, before
