"""What a training step of several processes sends, holds and takes: `python -m bench.distributed`.

1, 2 and 4 processes of one thread each share the rows of a step of the bundled model: `bench/data/distributed.csv`.
What each hands to TCP is read from its sockets, so it is all that gloo sends, its own messages and what has to be
sent again included, without the headers of packets. Memory is how far a process grew, at its peak in a step, from
before it had a model. More processes than cores share these, so their times say little of machines of their own.

What a process sends a step, predicted before it was measured, for n processes, 4 bytes a value:

    ddp      2 (n - 1) / n * what trains: a ring's all-reduce of the gradients
    fsdp2    (n - 1) / n * (2 * the blocks + what is outside of them) to gather them for forward and backward (by MeZO
             both for each of two forwards); 2 (n - 1) / n * what trains, since gloo reduces in the place of a
             reduce-scatter, which would halve that
    mezo     2 (n - 1) * 8: one double a forward to each of the others; gloo's own messages, not counted, are far more

Not in it is the whole model, which is sent once where processes start. With `broadcast_buffers`, its default,
DistributedDataParallel sends buffers at each forward too: SiVA's first factors, which never change.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import struct
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from bench.backbones import MODELS
from bench.bench_pool import adamw
from bench.harness import DATA, Row, machine, option_parser, percentiles, put_row, resident
from fastpeft import InPlace, MeZO
from fastpeft.methods.preparation import Preparation, parse_targets
from fastpeft.methods.registry import get_method
from fastpeft.training.memory import MEBIBYTE

FILE = DATA / "distributed.csv"
RANKS = (1, 2, 4)
BATCH, TOKENS = 16, 32  # rows of all processes together
WARM_UP, STEPS = 3, 12
RANK = 4
SECONDS = 300  # that a step may take
_BYTES_SENT, _BYTES_SENT_AGAIN = 200, 208  # where Linux has these in tcp_info


@dataclass(frozen=True)
class Case:
    """A method, the layers that it adapts, and the engine that it is trained by."""

    method: str
    layers: str = ""
    engine: str = "ddp"


CASES = [
    Case("full"),
    Case("siva", "query,key"),
    Case("siva", "all-linear"),
    Case("k-lst"),
    Case("mezo", engine="mezo"),
    Case("full", engine="fsdp2"),
    Case("siva", "query,key", "fsdp2"),
    Case("mezo", engine="fsdp2"),
]
_starting = multiprocessing.get_context("forkserver")


# -- what is predicted -------------------------------------------------------------------------------------------------


def sent(engine: str, method: str, ranks: int, trained: float, blocks: float, rest: float) -> float:
    """Bytes that a process sends in a step, as the module's text counts them.

    Args:
        trained, blocks, rest: numbers of values of what trains, of the transformer's blocks, and outside of these.
    """
    share = (ranks - 1) / ranks
    if engine == "ddp":
        return 2 * share * 4 * trained
    if engine == "mezo":
        return 2.0 * 8 * (ranks - 1)
    if method == "mezo":
        return 2 * share * 4 * (blocks + rest) + sent("mezo", method, ranks, trained, blocks, rest)
    return share * 4 * (2 * blocks + rest + 2 * trained)


# -- what is measured --------------------------------------------------------------------------------------------------


def handed_to_tcp() -> int:
    """Bytes that this process's sockets have sent so far, each once."""
    total = 0
    for entry in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{entry}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry))) as each:
                if each.family in (socket.AF_INET, socket.AF_INET6) and each.type == socket.SOCK_STREAM:
                    info = each.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    again = struct.unpack_from("Q", info, _BYTES_SENT_AGAIN)[0]
                    total += struct.unpack_from("Q", info, _BYTES_SENT)[0] - again
        except OSError:  # it was closed meanwhile
            continue
    return total


def step(case: Case, model_name: str) -> tuple[dict[str, float], Callable[[dict[str, Tensor]], None]]:
    """The model's numbers of values, as `sent` takes them, and a step on this process's rows."""
    torch.manual_seed(0)
    base = MODELS[model_name]()
    targets = parse_targets(case.layers) if case.layers else None
    model = get_method(case.method).prepare(base, Preparation(["classifier"], RANK, targets, {})).train()
    layers = base.roberta.encoder.layer
    blocks = sum(p.numel() for p in layers.parameters())
    numbers = {
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "blocks": blocks,
        "rest": sum(p.numel() for p in model.parameters()) - blocks,
    }
    wrapped: Any = model
    if case.engine == "ddp":
        wrapped = DistributedDataParallel(model, broadcast_buffers=False)  # as `fastpeft train` does
    if case.engine == "fsdp2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    if case.method == "mezo":
        mezo = MeZO(model, 1e-6, rule=InPlace(defer=True))
        return numbers, lambda rows: mezo.step(lambda: model(**rows).loss) and None
    optimizer = adamw(model)

    def run(rows: dict[str, Tensor]) -> None:
        optimizer.zero_grad()
        wrapped(**rows).loss.backward()
        optimizer.step()

    return numbers, run


def work(rank: int, size: int, case: Case, model_name: str, store: str, results: Any) -> None:
    """One process: train, and put down what it sent, held and took."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=timedelta(seconds=SECONDS)
    )
    before = resident("VmRSS")
    numbers, run = step(case, model_name)
    ids = torch.randint(5, 1_000, (BATCH // size, TOKENS))
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}
    for _ in range(WARM_UP):
        run(rows)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    dist.barrier()
    sent_before, times = handed_to_tcp(), []
    for _ in range(STEPS):
        began = time.perf_counter()
        run(rows)
        times.append(time.perf_counter() - began)
    found = (handed_to_tcp() - sent_before) / STEPS
    results.put((found, resident("VmHWM") - before, times, numbers))
    dist.barrier()  # a process that ends closes its sockets


def measured(case: Case, size: int, model_name: str) -> Row:
    """The row of a case with so many processes."""
    results = _starting.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes = [
            _starting.Process(target=work, args=(rank, size, case, model_name, store, results)) for rank in range(size)
        ]
        for process in processes:
            process.start()
        try:
            each = [results.get(timeout=SECONDS) for _ in processes]
        finally:
            for process in processes:
                process.join(SECONDS)
    numbers = each[0][3]
    return {
        **asdict(case),
        "ranks": str(size),
        "model": model_name,
        "batch": str(BATCH),
        "tokens": str(TOKENS),
        **{name: str(number) for name, number in numbers.items()},
        "sent_bytes": f"{max(found for found, *_ in each):.0f}",
        "sent_bytes_predicted": f"{sent(case.engine, case.method, size, **numbers):.0f}",
        "memory_mb": f"{max(memory for _, memory, *_ in each) / MEBIBYTE:.0f}",
        **percentiles("ms", [1e3 * seconds for _, _, times, _ in each for seconds in times]),
        "cores": str(os.cpu_count()),
        **machine(torch.device("cpu")),
    }


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("--model", choices=MODELS, default="demo")
    parser.add_argument("--method", help="this one only")
    parser.add_argument("--ranks", type=int, nargs="*", default=RANKS)
    given = parser.parse_args()
    torch.set_num_threads(1)  # as the processes have it
    _starting.set_forkserver_preload(["bench.distributed"])
    for case in CASES:
        for size in given.ranks:
            if given.method in (None, case.method):
                row = measured(case, size, given.model)
                put_row(FILE, row, key=("method", "layers", "engine", "ranks", "model", "card"))
                shown = ("method", "layers", "engine", "ranks", "sent_bytes", "sent_bytes_predicted", "memory_mb")
                print(*(row[name] for name in (*shown, "ms_p50")), flush=True)


if __name__ == "__main__":
    main()
