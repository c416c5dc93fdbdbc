"""Pages of mapped checkpoints leave memory, and their values stay."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fastpeft.support.resident import files_paged_out, give_back, keep_in_file

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the pages of other systems are left alone")
MB = 2**20


def file_pages() -> int:
    """Bytes of files in the memory of this process."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.split("RssFile:")[1].split()[0])


@pytest.fixture
def mapped(tmp_path: Path) -> torch.Tensor:
    """32 MB of a file, read once."""
    kind = subprocess.run(["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True).stdout
    if kind.strip() == "tmpfs":
        pytest.skip("temporary files are in memory here")
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.arange(8 * MB, dtype=torch.float32)}, path)
    weight = safe_open(path, framework="pt").get_tensor("weight")
    assert weight[-1] == weight.max()
    return weight


def _expect_gone(before: int, weight: torch.Tensor) -> None:
    assert file_pages() < before - 24 * MB
    assert torch.equal(weight, torch.arange(8 * MB, dtype=torch.float32))


def test_pages_of_a_file_are_given_back(mapped: torch.Tensor) -> None:
    before = file_pages()
    give_back(mapped)
    _expect_gone(before, mapped)


def test_what_was_changed_stays(mapped: torch.Tensor) -> None:
    mapped.add_(1)
    give_back(mapped)
    give_back(torch.arange(5.0)[1:3])  # less than a page
    assert torch.equal(mapped, torch.arange(1, 8 * MB + 1, dtype=torch.float32))


def test_pages_are_given_back_while_a_model_is_read(mapped: torch.Tensor) -> None:
    before = file_pages()
    with files_paged_out():
        deadline = time.monotonic() + 30
        while file_pages() > before - 24 * MB and time.monotonic() < deadline:
            time.sleep(0.01)
    _expect_gone(before, mapped)


def test_tensors_in_a_file_have_their_values_and_take_no_memory_of_the_process() -> None:
    def anonymous() -> int:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * int(status.split("RssAnon:")[1].split()[0])

    layer = torch.nn.Linear(2048, 4096).requires_grad_(False)
    odd, empty, turned = torch.arange(7, dtype=torch.int16), torch.empty(0), torch.arange(6.0).view(2, 3).t()
    expected = [each.clone() for each in (layer.weight, layer.bias, odd, turned)]
    layer(torch.zeros(1, 2048))
    before = anonymous()
    keep_in_file([layer.weight, layer.bias, layer.weight, odd, empty, turned])
    assert anonymous() < before - 24 * MB
    assert all(map(torch.equal, (layer.weight, layer.bias, odd, turned), expected))
    assert isinstance(layer.weight, torch.nn.Parameter)
    keep_in_file([])


def test_tensors_stay_where_there_is_no_room_for_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    tensor = torch.arange(4.0)
    place = tensor.data_ptr()
    keep_in_file([tensor])
    assert tensor.data_ptr() == place
    assert torch.equal(tensor, torch.arange(4.0))
