"""The serving example under concurrent clients, while tasks come and go."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import random
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from samples import reviews, save_tiny_model

from fastpeft import LadderConfig, LadderModel, LadderPool

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")
pytestmark = pytest.mark.usefixtures("one_thread")

CLIENTS, REQUESTS = 16, 6
CLASSES = {"a": 2, "b": 3, "c": 2, "guest": 4}  # of the tasks; windows differ too
TEXTS = [text for text, _ in reviews(12)]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    file = Path(__file__).parents[2] / "examples" / "serve_pool.py"
    spec = importlib.util.spec_from_file_location("serve_pool", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["serve_pool"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, and below `runs` a side network for every task."""
    folder = tmp_path_factory.mktemp("serve")
    save_tiny_model(folder / "base", head="ForSequenceClassification")
    for number, (task, classes) in enumerate(CLASSES.items()):
        model = LadderModel(base(folder, classes), LadderConfig(window_size=1 if task == "c" else 3))
        generator = torch.Generator().manual_seed(number)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder / "runs" / task)
    return folder


def base(folder: Path, classes: int) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        folder / "base", num_labels=classes, ignore_mismatched_sizes=True
    )


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[tuple[str, str], list[float]]:
    """Scores of every task and text, each by its model alone."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
    scores = {}
    for task, classes in CLASSES.items():
        model = LadderModel.from_pretrained(folder / "runs" / task, base=base(folder, classes))
        for text in TEXTS:
            with torch.no_grad():
                scores[task, text] = model(**tokenizer([text], return_tensors="pt")).logits[0].softmax(-1).tolist()
    return scores


class Server:
    """The example on a free port, in a thread."""

    def __init__(self, app: Any) -> None:
        self._server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=10))
        self._started = threading.Event()
        startup = self._server.startup

        async def announce(*args: Any, **kwargs: Any) -> None:
            await startup(*args, **kwargs)
            self._started.set()

        self._server.startup = announce
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        assert self._started.wait(30)
        self._port = self._server.servers[0].sockets[0].getsockname()[1]

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and answer."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}{path}", data, {"Content-Type": "application/json"}, method=method
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=60) as response:
                return response.status, json.loads(response.read() or b"null")
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()


@pytest.fixture
def pool(folder: Path) -> LadderPool:
    pool = LadderPool(base(folder, 2).eval())
    for task in ("a", "b", "c"):
        pool.add(task, folder / "runs" / task)
    return pool


@pytest.fixture
def server(example: ModuleType, pool: LadderPool, folder: Path) -> Iterator[Server]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
    server = Server(example.create_app(pool, tokenizer, folder / "runs", max_rows=16))
    yield server
    server.stop()


def assert_right(answer: Any, task: str, texts: list[str], expected: dict[tuple[str, str], list[float]]) -> None:
    assert len(answer) == len(texts)
    for text, row in zip(texts, answer):
        assert row["scores"] == pytest.approx(expected[task, text], rel=1e-3, abs=1e-5)
        assert row["label"] == f"LABEL_{max(range(CLASSES[task]), key=row['scores'].__getitem__)}"


def test_concurrent_clients_get_their_own_answers(
    server: Server, pool: LadderPool, expected: dict[tuple[str, str], list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared: list[int] = []  # number of tasks in every batch
    call = LadderPool.__call__

    def counting(self: LadderPool, batch: Any, tasks: Any) -> Any:
        shared.append(len(set(tasks)))
        return call(self, batch, tasks)

    monkeypatch.setattr(LadderPool, "__call__", counting)

    def client(number: int) -> int:
        """Asks for tasks in turn; of the guest, which comes and goes, it may be told that it is not there."""
        draw, refused = random.Random(number), 0
        for _ in range(REQUESTS):
            task, texts = draw.choice(list(CLASSES)), draw.choices(TEXTS, k=draw.randint(1, 4))
            status, answer = server.ask("POST", "/predict", {"task": task, "texts": texts})
            if status == 200:
                assert_right(answer, task, texts, expected)
            else:
                assert task == "guest"
                assert status in (400, 404)
                assert "no task 'guest'" in answer["detail"]
                refused += 1
        return refused

    def come_and_go() -> None:
        for _ in range(4):
            assert server.ask("PUT", "/tasks/guest", {"path": "guest"}) == (201, {"task": "guest"})
            assert server.ask("DELETE", "/tasks/guest")[0] == 204

    with ThreadPoolExecutor(CLIENTS + 1) as threads:
        changing = threads.submit(come_and_go)
        refused = sum(threads.map(client, range(CLIENTS)))
        changing.result()
    assert refused < CLIENTS * REQUESTS
    assert max(shared) > 1
    assert len(shared) < CLIENTS * REQUESTS
    assert pool.tasks == ("a", "b", "c")


def test_tasks_are_listed_with_their_labels(server: Server) -> None:
    status, tasks = server.ask("GET", "/tasks")
    assert status == 200
    assert {name: len(labels) for name, labels in tasks.items()} == {"a": 2, "b": 3, "c": 2}


def test_what_a_client_is_refused(server: Server, pool: LadderPool, folder: Path) -> None:
    outside = {"path": "../base"}
    (folder / "runs" / "prompted").mkdir(exist_ok=True)
    (folder / "runs" / "prompted" / "prompt.json").touch()
    for method, path, body, status, message in (
        ("POST", "/predict", {"task": "x", "texts": ["a"]}, 404, "no task 'x'"),
        ("POST", "/predict", {"task": "a", "texts": []}, 422, ""),
        ("PUT", "/tasks/new", outside, 400, "below the folder of runs"),
        ("PUT", "/tasks/new", {"path": str(folder / "base")}, 400, "below the folder of runs"),
        ("PUT", "/tasks/new", {"path": "nowhere"}, 400, "no folder 'nowhere'"),
        ("PUT", "/tasks/new", {"path": "."}, 400, "not a side network"),
        ("PUT", "/tasks/new", {"path": "prompted"}, 400, "in 'prompted' was trained with a prompt"),
        ("PUT", "/tasks/a", {"path": "b"}, 409, "there is a task 'a'"),
        ("DELETE", "/tasks/x", None, 404, "no task 'x'"),
    ):
        given, answer = server.ask(method, path, body)
        assert given == status, answer
        assert message in str(answer["detail"])
    assert pool.tasks == ("a", "b", "c")


def test_a_task_deleted_while_its_request_waits_is_not_there(
    example: ModuleType, pool: LadderPool, folder: Path, expected: dict[tuple[str, str], list[float]]
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")

    def deleting(*args: Any, **kwargs: Any) -> Any:
        if "c" in pool.tasks:
            pool.remove("c")
        return tokenizer(*args, **kwargs)

    server = Server(example.create_app(pool, deleting, folder / "runs"))
    try:
        status, answer = server.ask("POST", "/predict", {"task": "c", "texts": TEXTS[:1]})
        assert status == 404
        assert "no task 'c'" in answer["detail"]
        status, answer = server.ask("POST", "/predict", {"task": "a", "texts": TEXTS[:1]})
        assert status == 200
        assert_right(answer, "a", TEXTS[:1], expected)
    finally:
        server.stop()


def test_a_request_that_fails_leaves_the_others_of_its_batch(
    example: ModuleType, pool: LadderPool, folder: Path, expected: dict[tuple[str, str], list[float]]
) -> None:
    tokenizer, batches = transformers.AutoTokenizer.from_pretrained(folder / "base"), []

    def failing(texts: list[str], **kwargs: Any) -> Any:
        batches.append(len(texts))
        if "bad" in texts:
            raise ValueError("a bad text")
        return tokenizer(texts, **kwargs)

    async def ask() -> list[Any]:
        batcher = example.Batcher(pool, failing, max_rows=3, max_wait=30)
        worker = asyncio.create_task(batcher.run())
        asked = [("a", TEXTS[:1]), ("b", ["bad"]), ("c", TEXTS[1:2])]
        answers = await asyncio.gather(*(batcher.classify(*each) for each in asked), return_exceptions=True)
        worker.cancel()
        return answers

    first, failed, last = asyncio.run(ask())
    assert batches == [3, 1, 1, 1]
    assert isinstance(failed, ValueError)
    assert first[0].softmax(-1).tolist() == pytest.approx(expected["a", TEXTS[0]], rel=1e-3, abs=1e-5)
    assert last[0].softmax(-1).tolist() == pytest.approx(expected["c", TEXTS[1]], rel=1e-3, abs=1e-5)


def test_of_two_puts_of_one_name_one_loses(server: Server, pool: LadderPool, monkeypatch: pytest.MonkeyPatch) -> None:
    add, begun, may_go_on = pool.add, threading.Event(), threading.Event()

    def slow(*args: Any) -> Any:
        begun.set()
        assert may_go_on.wait(30)
        return add(*args)

    monkeypatch.setattr(pool, "add", slow)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(server.ask, "PUT", "/tasks/guest", {"path": "guest"})
        assert begun.wait(30)
        try:
            status, answer = server.ask("PUT", "/tasks/guest", {"path": "guest"})
        finally:
            may_go_on.set()
        assert status == 409, answer
        assert first.result() == (201, {"task": "guest"})
    assert "guest" in pool.tasks


def test_a_task_deleted_while_tasks_are_listed_is_left_out(
    server: Server, pool: LadderPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = pool.tasks
    pool.remove("b")
    with monkeypatch.context() as patch:
        patch.setattr(LadderPool, "tasks", names)  # as they were a moment ago
        status, tasks = server.ask("GET", "/tasks")
    assert status == 200
    assert list(tasks) == ["a", "c"]


def test_a_stop_lets_the_last_requests_be_answered(
    example: ModuleType, pool: LadderPool, folder: Path, expected: dict[tuple[str, str], list[float]]
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
    begun, may_go_on = threading.Event(), threading.Event()

    def slow(*args: Any, **kwargs: Any) -> Any:
        begun.set()
        assert may_go_on.wait(30)
        return tokenizer(*args, **kwargs)

    server = Server(example.create_app(pool, slow, folder / "runs"))
    with ThreadPoolExecutor(2) as threads:
        asked = threads.submit(server.ask, "POST", "/predict", {"task": "b", "texts": TEXTS[:2]})
        assert begun.wait(30)
        stopped = threads.submit(server.stop)
        may_go_on.set()
        status, answer = asked.result()
        stopped.result()
    assert status == 200
    assert_right(answer, "b", TEXTS[:2], expected)
