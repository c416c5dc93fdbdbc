"""`fastpeft serve`: what it refuses before it serves, and a whole life of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from samples import reviews
from typer.testing import CliRunner

from fastpeft.cli import app
from fastpeft.training.prediction import predict

TEXTS = [text for text, _ in reviews(4)]


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    return result.stderr


@pytest.fixture
def served() -> None:
    for name in ("fastapi", "uvicorn"):
        pytest.importorskip(name)


@pytest.mark.usefixtures("served")
def test_what_is_refused_before_a_server_starts(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs / "a", "unfinished")
    Path("unfinished", "metrics.json").unlink()
    run = str(runs / "a")
    for arguments, message in (
        (["nowhere"], "'nowhere' is not the folder of a run"),
        ([run, "unfinished"], "the run in 'unfinished' is not finished"),
        (["a/b=" + run], "does not name a task"),
        ([run, run], "would both be the task 'a'"),
        ([run, "--device", "abacus"], "the device 'abacus' cannot be used"),
        ([run, "--runs", "nowhere"], "the folder of runs 'nowhere' is not there"),
        ([run, "--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid:8000"),
        ([run, "--port", "70000"], "65535"),
        ([run, "--max-rows", "0"], "--max-rows"),
        ([run, "--max-length", "1"], "--max-length"),
        ([run, "--max-length", "2", "--port", "0"], "--max-length is 2, but the run in"),
        ([], "RUN"),
    ):
        error = refused(*arguments)
        assert message in error
        assert "Traceback" not in error
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1:{port}" in refused(run, "--port", str(port))


def test_without_the_extra_it_says_what_to_install(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "Run pip install fastapi uvicorn" in refused(str(runs / "a"))


@pytest.mark.usefixtures("served")
def test_headers_have_an_end_whatever_else_is_installed(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """uvicorn would prefer httptools, which bounds none."""
    import uvicorn

    started = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: started.append(server.config))
    result = CliRunner().invoke(app, ["serve", str(runs / "a"), "--port", "0"])
    assert result.exit_code == 0, result.output
    assert [config.http for config in started] == ["h11"]


@pytest.mark.long
@pytest.mark.usefixtures("served")
def test_a_served_run_answers_what_came_before_the_signal(runs: Path) -> None:
    command = [sys.executable, "-m", "fastpeft", "serve", str(runs / "a"), f"three={runs / 'b'}", "--port", "0"]
    body = json.dumps({"task": "three", "texts": TEXTS}).encode()
    head = (
        "POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "a, three: one backbone for all\n"
            address = process.stdout.readline().split()[2]
            port = int(address.rstrip(",").rpartition(":")[2])
            with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
                connection.sendall(head.encode())
                assert connection.recv(100).startswith(b"HTTP/1.1 100")  # the request is under way
                process.send_signal(signal.SIGTERM)
                while not _is_closed(port):
                    pass
                connection.sendall(body)
                answer = b""
                while got := connection.recv(65_536):
                    answer += got
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    start, _, found = answer.partition(b"\r\n\r\n")
    assert start.startswith(b"HTTP/1.1 200")
    said = [(each["label"], each["probability"]) for each in json.loads(found)["predictions"]]
    expected = predict(runs / "b", TEXTS)
    assert [label for label, _ in said] == [label for label, _ in expected]
    assert [p for _, p in said] == pytest.approx([p for _, p in expected], abs=1e-6)
    assert process.returncode == os.EX_OK
    assert "Traceback" not in errors


def _is_closed(port: int) -> bool:
    """Whether nobody listens any more."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=60).close()
    except ConnectionError:
        return True
    return False
