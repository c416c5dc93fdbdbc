"""What processes send is counted to the byte, and follows from what they train."""

from __future__ import annotations

import socket
import threading

import pytest
import torch.distributed as dist

from bench import distributed
from bench.distributed import Case, measured, sent

SIZES = {"trained": 100.0, "blocks": 1_000.0, "rest": 500.0}


def test_what_a_socket_sent_is_counted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as here:
        there, _ = server.accept()
        with there:
            before = distributed.handed_to_tcp()
            reading = threading.Thread(target=lambda: [there.recv(1) for _ in range(1_234)])
            reading.start()
            here.sendall(b"x" * 1_234)
            reading.join()
            assert distributed.handed_to_tcp() - before == 1_234


def test_predictions() -> None:
    for engine in ("ddp", "fsdp2", "mezo"):
        assert sent(engine, "full", 1, **SIZES) == 0
    assert sent("ddp", "siva", 4, **SIZES) == 2 * 3 / 4 * 4 * 100
    assert sent("fsdp2", "siva", 2, **SIZES) == 1 / 2 * 4 * (2 * 1_000 + 500 + 2 * 100)
    assert sent("mezo", "mezo", 4, **SIZES) == 48


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("case", [Case("siva", "query,key"), Case("mezo", engine="mezo")])
def test_two_processes_send_what_was_predicted(case: Case) -> None:
    row = measured(case, 2, "demo")
    assert float(row["sent_bytes"]) == pytest.approx(float(row["sent_bytes_predicted"]), rel=0.05, abs=2_000)
    assert float(row["memory_mb"]) > 0
