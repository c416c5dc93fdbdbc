"""The server under many clients, hostile ones among them, while tasks come and go."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from samples import reviews
from served import Server

from fastpeft.serving.tasks import RefusedError, Tasks
from fastpeft.training.prediction import Predictor

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from fastpeft.serving.app import Limits, create_app
from fastpeft.serving.batcher import Batcher

CLIENTS, REQUESTS = 16, 6
NAMES = ("a", "b", "pairs", "guest")
TEXTS = [text for text, _ in reviews(8)]


@pytest.fixture(scope="module")
def expected(runs: Path) -> dict[tuple[str, int], list[float]]:
    """Scores of every task and text, each run by itself."""
    scores = {}
    for name in NAMES:
        predictor = Predictor(runs / ("mood" if name == "guest" else name))
        found = predictor.scores([predictor.encode(text_for(name, number)) for number in range(len(TEXTS))])
        scores |= {(name, number): each.tolist() for number, each in enumerate(found)}
    return scores


def text_for(task: str, number: int) -> Any:
    return [TEXTS[number], "the end"] if task == "pairs" else TEXTS[number]


@pytest.fixture
def tasks(runs: Path) -> Tasks:
    return Tasks({name: runs / name for name in NAMES[:3]}, max_rows=16)


@pytest.fixture
def server(tasks: Tasks, runs: Path) -> Iterator[Server]:
    with Server(create_app(tasks, runs=runs, limits=Limits(body=65_536, queue=100, seconds=20))) as server:
        yield server


def assert_right(answer: Any, task: str, numbers: list[int], expected: dict[tuple[str, int], list[float]]) -> None:
    assert answer["task"] == task
    assert len(answer["predictions"]) == len(numbers)
    for number, said in zip(numbers, answer["predictions"]):
        probabilities = said["probabilities"]
        assert list(probabilities.values()) == pytest.approx(expected[task, number], abs=1e-6)
        assert said["label"] == max(probabilities, key=probabilities.__getitem__)
        assert said["probability"] == probabilities[said["label"]]


def test_concurrent_clients_get_their_own_answers(
    server: Server, tasks: Tasks, expected: dict[tuple[str, int], list[float]]
) -> None:
    def client(number: int) -> int:
        """Asks for tasks in turn; of the guest, which comes and goes, it may be told that it is not there."""
        draw, refused = random.Random(number), 0
        for _ in range(REQUESTS):
            task, numbers = draw.choice(NAMES), draw.choices(range(len(TEXTS)), k=draw.randint(1, 4))
            body = {"task": task, "texts": [text_for(task, each) for each in numbers]}
            status, answer, _ = server.ask("POST", "/predict", body)
            if status == 200:
                assert_right(answer, task, numbers, expected)
            else:
                assert (task, status) == ("guest", 404)
                assert "no task 'guest'" in answer["error"]["message"]
                refused += 1
        return refused

    def come_and_go() -> None:
        for _ in range(4):
            status, answer, _ = server.ask("PUT", "/tasks/guest", {"path": "mood"})
            assert (status, answer["shares_backbone_with"]) == (201, ["a", "b"])
            assert server.ask("DELETE", "/tasks/guest")[0] == 204

    with ThreadPoolExecutor(CLIENTS + 1) as threads:
        changing = threads.submit(come_and_go)
        refused = sum(threads.map(client, range(CLIENTS)))
        changing.result()
    assert refused < CLIENTS * REQUESTS
    assert [task.name for task in tasks] == ["a", "b", "pairs"]


def test_what_is_told_of_the_server(server: Server) -> None:
    assert server.ask("GET", "/health")[:2] == (200, {"status": "ready"})
    assert server.ask("HEAD", "/health")[0] == 200
    listed = server.ask("GET", "/tasks")[1]
    assert [(task["name"], task["reads"], len(task["labels"])) for task in listed] == [
        ("a", "string", 2),
        ("b", "string", 3),
        ("pairs", "pair", 2),
    ]
    assert set(server.ask("GET", "/openapi.json")[1]["paths"]) == {
        "/predict", "/tasks", "/tasks/{name}", "/health",
        "/v1/models", "/v1/models/{name}", "/v1/chat/completions", "/v1/completions",
    }  # fmt: skip


def test_an_answer_tells_how_many_texts_were_cut(server: Server) -> None:
    texts = [TEXTS[0], f"{TEXTS[0]} " * 20]
    assert server.ask("POST", "/predict", {"task": "a", "texts": texts})[1]["cut"] == 1
    assert server.ask("POST", "/predict", {"task": "a", "texts": texts[:1]})[1]["cut"] == 0


def test_runs_on_words_and_numbers(runs: Path) -> None:
    with Server(create_app(Tasks({"words": runs / "words", "number": runs / "number"}))) as server:
        for texts in ([TEXTS[0]], [TEXTS[0].split()]):
            (said,) = server.ask("POST", "/predict", {"task": "words", "texts": texts})[1]["predictions"]
            assert [each["word"] for each in said["words"]] == TEXTS[0].split()
        (said,) = server.ask("POST", "/predict", {"task": "number", "texts": TEXTS[:1]})[1]["predictions"]
        assert (said["name"], type(said["value"])) == ("score", float)


def test_one_task_need_not_be_named(runs: Path) -> None:
    with Server(create_app(Tasks({"a": runs / "a"}))) as server:
        assert server.ask("POST", "/predict", {"texts": TEXTS[:1]})[1]["task"] == "a"
        assert server.ask("PUT", "/tasks/b", {"path": "b"})[0] == 404  # without a folder of runs nobody changes them
        assert server.ask("DELETE", "/tasks/a")[0] == 404


GOOD = {"task": "a", "texts": ["a film"]}
HOSTILE: dict[str, tuple[str, str, Any, int, str]] = {
    "no task": ("POST", "/predict", {**GOOD, "task": "x"}, 404, "no task 'x'"),
    "task missing": ("POST", "/predict", {"texts": ["a"]}, 422, "task is missing; there are a, b, pairs"),
    "long name": ("POST", "/predict", {**GOOD, "task": "x" * 9_000}, 404, "no task 'xx"),
    "task a number": ("POST", "/predict", {**GOOD, "task": 1}, 422, "body.task"),
    "no texts": ("POST", "/predict", {"task": "a", "texts": []}, 422, "at least 1 item"),
    "texts missing": ("POST", "/predict", {"task": "a"}, 422, "body.texts: Field required"),
    "texts a string": ("POST", "/predict", {**GOOD, "texts": "a"}, 422, "valid list"),
    "texts null": ("POST", "/predict", {**GOOD, "texts": None}, 422, "body.texts: Field required"),
    "many texts": ("POST", "/predict", {**GOOD, "texts": ["a"] * 257}, 422, "at most 256 items"),
    "empty": (
        "POST",
        "/predict",
        {**GOOD, "texts": ["a", ""]},
        422,
        "body.texts.1.constrained-str: String should have at least 1 character",
    ),
    "blank": ("POST", "/predict", {**GOOD, "texts": [" \n\t"]}, 422, "text 1: "),
    "a number": ("POST", "/predict", {**GOOD, "texts": [1]}, 422, "valid string"),
    "an object": ("POST", "/predict", {**GOOD, "texts": [{"text": "a"}]}, 422, "valid string"),
    "null": ("POST", "/predict", {**GOOD, "texts": [None]}, 422, "valid string"),
    "nested": ("POST", "/predict", {**GOOD, "texts": [[["a"]]]}, 422, "valid string"),
    "an empty list": ("POST", "/predict", {**GOOD, "texts": [[]]}, 422, "text 1: the run reads one text"),
    "a pair for one": ("POST", "/predict", {**GOOD, "texts": [["a", "b"]]}, 422, "text 1: the run reads one text"),
    "one for a pair": ("POST", "/predict", {"task": "pairs", "texts": ["a"]}, 422, "the run reads two texts"),
    "three for a pair": ("POST", "/predict", {"task": "pairs", "texts": [["a"] * 3]}, 422, "the run reads two texts"),
    "a long text": ("POST", "/predict", {**GOOD, "texts": ["a" * 20_001]}, 422, "at most 20000 characters"),
    "surrogate": ("POST", "/predict", {**GOOD, "texts": ["a\ud800"]}, 422, "unicode"),
    "surrogate as task": ("POST", "/predict", {**GOOD, "task": "\udcff"}, 404, "no task"),
    "surrogate as key": ("POST", "/predict", {**GOOD, "\udcff": 1}, 422, "unicode"),
    "unknown key": ("POST", "/predict", {**GOOD, "text": "a"}, 422, "body.text: Extra inputs"),
    "NaN": ("POST", "/predict", b'{"task": "a", "texts": [NaN]}', 422, "valid string"),
    "many keys": ("POST", "/predict", {**GOOD, **{str(key): 0 for key in range(99)}}, 422, "body: it has 101 fields"),
    "a list": ("POST", "/predict", ["a"], 422, "the request cannot be read"),
    "no body": ("POST", "/predict", b"", 422, "Field required"),
    "half of JSON": ("POST", "/predict", b'{"task": "a", "texts": ["a"', 422, "JSON decode error"),
    "no UTF-8": ("POST", "/predict", b'{"task": "a", "texts": ["\xff"]}', 400, "parsing the body. GET /openapi.json"),
    "a digit too many": ("POST", "/predict", b'{"task": ' + b"9" * 9_000 + b"}", 400, "parsing the body"),
    "deep": ("POST", "/predict", b'{"texts": ' + b"[" * 60_000, 400, "parsing the body"),
    "deep and whole": ("POST", "/predict", b'{"texts": ' + b"[" * 30_000 + b"]" * 30_000 + b"}", 400, "parsing"),
    "large": ("POST", "/predict", b" " * 65_537, 413, "more than 65,536 bytes"),
    "wrong method": ("PUT", "/predict", GOOD, 405, "Method Not Allowed. GET /openapi.json"),
    "wrong address": ("GET", "/predict/a", None, 404, "Not Found. GET /openapi.json"),
    "addresses of files": ("GET", "/../../etc/passwd", None, 404, "Not Found. GET /openapi.json"),
    "outside": ("PUT", "/tasks/new", {"path": "../model"}, 404, "below the folder of runs"),
    "the folder of runs": ("PUT", "/tasks/new", {"path": "."}, 404, "below the folder of runs"),
    "a whole path": ("PUT", "/tasks/new", {"path": "/etc"}, 404, "below the folder of runs"),
    "NUL in a path": ("PUT", "/tasks/new", {"path": "a\0"}, 404, "no folder"),
    "a long path": ("PUT", "/tasks/new", {"path": "a" * 9_000}, 404, "no folder"),
    "no run": ("PUT", "/tasks/new", {"path": "a/.."}, 404, "below the folder of runs"),
    "a name that is taken": ("PUT", "/tasks/a", {"path": "b"}, 409, "there is a task 'a'"),
    "a name that is none": ("PUT", "/tasks/a%20b", {"path": "b"}, 422, "path.name"),
    "no such task": ("DELETE", "/tasks/x", None, 404, "no task 'x'"),
}


def test_what_is_refused(server: Server, tasks: Tasks) -> None:
    for name, (method, path, body, status, message) in HOSTILE.items():
        given, answer, _ = server.ask(method, path, body)
        assert given == status, (name, answer)
        assert message in answer["error"]["message"], name
        assert len(answer["error"]["message"]) < 700, name
    for kind in ("text/plain", "application/x-www-form-urlencoded", "", "\u00e4"):
        assert server.ask("POST", "/predict", GOOD, kind)[0] == 422, kind
    assert server.ask("POST", "/predict", GOOD)[0] == 200
    assert [task.name for task in tasks] == ["a", "b", "pairs"]


@pytest.mark.parametrize(
    "sent",
    [
        b"\0\xff\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused(server: Server, sent: bytes) -> None:
    try:
        assert server.send(sent).startswith(b"HTTP/1.1 4")
    except ConnectionError:  # the server closed before it had all
        assert len(sent) > 100_000
    assert server.ask("GET", "/health")[0] == 200


def test_a_body_that_does_not_come_is_not_waited_for(runs: Path) -> None:
    with Server(create_app(Tasks({"a": runs / "a"}), limits=Limits(seconds=0.05))) as server:
        sent = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        assert server.send(sent).startswith(b"HTTP/1.1 408")


def test_of_two_puts_of_one_name_one_loses(server: Server, tasks: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, may_go_on = threading.Event(), threading.Event()

    def slow(*args: Any) -> Predictor:
        begun.set()
        assert may_go_on.wait(30)
        return Predictor(*args)

    monkeypatch.setattr("fastpeft.serving.tasks.Predictor", slow)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(server.ask, "PUT", "/tasks/guest", {"path": "mood"})
        assert begun.wait(30)
        try:
            status, answer, _ = server.ask("PUT", "/tasks/guest", {"path": "mood"})
        finally:
            may_go_on.set()
        assert (status, "there is a task 'guest'" in answer["error"]["message"]) == (409, True)
        assert first.result()[0] == 201
    assert "guest" in [task.name for task in tasks]


class Slow:
    """Tasks that answer once they may."""

    max_rows = 4

    def __init__(self) -> None:
        self.begun, self.may_go_on = threading.Event(), threading.Event()
        self.batches: list[list[str]] = []

    def answer(self, asked: list[tuple[str, list[str]]]) -> list[Any]:
        self.batches.append([name for name, _ in asked])
        self.begun.set()
        assert self.may_go_on.wait(30)
        return [(name, texts) for name, texts in asked]


def batcher(tasks: Any, **options: Any) -> Batcher:
    options = {"max_wait": 0, "max_queue": 4, "seconds": 30, **options}
    return Batcher(tasks.answer, max_rows=tasks.max_rows, **options)


def test_a_queue_that_is_full_takes_no_more() -> None:
    tasks = Slow()

    async def ask() -> list[Any]:
        queue = batcher(tasks)
        async with queue.running():
            first = asyncio.create_task(queue.answer("first", ["a"]))
            await asyncio.to_thread(tasks.begun.wait, 30)
            large = asyncio.create_task(queue.answer("large", ["a"] * 9))  # of none that wait it is the first
            await asyncio.sleep(0)
            assert queue.waiting == 9
            with pytest.raises(RefusedError, match="9 texts are waiting, and 4 may") as error:
                await queue.answer("late", ["a"])
            assert error.value.status == 503
            tasks.may_go_on.set()
            return await asyncio.gather(first, large)

    assert asyncio.run(ask()) == [("first", ["a"]), ("large", ["a"] * 9)]


def test_who_waited_too_long_is_told_and_left_out() -> None:
    tasks = Slow()

    async def ask() -> Any:
        queue = batcher(tasks, max_queue=9)
        async with queue.running():
            first = asyncio.create_task(queue.answer("first", ["a"]))
            await asyncio.to_thread(tasks.begun.wait, 30)
            queue.seconds = 0.01
            with pytest.raises(RefusedError, match=r"no answer within 0\.01 seconds"):
                await queue.answer("impatient", ["a"])
            queue.seconds = 30
            tasks.may_go_on.set()
            await first
            await queue.answer("last", ["a"])

    asyncio.run(ask())
    assert tasks.batches == [["first"], ["last"]]


def test_batches_have_no_more_rows_than_they_may() -> None:
    tasks = Slow()
    tasks.may_go_on.set()

    async def ask() -> None:
        queue = batcher(tasks, max_wait=1, max_queue=99)
        asked = [queue.answer(name, ["a"] * rows) for name, rows in (("a", 3), ("b", 2), ("c", 2), ("d", 9))]
        async with queue.running():
            await asyncio.gather(*asked)

    asyncio.run(ask())
    assert tasks.batches == [["a"], ["b", "c"], ["d"]]


def test_a_stop_lets_the_last_requests_be_answered(
    tasks: Tasks, expected: dict[tuple[str, int], list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_go_on = threading.Event(), threading.Event()
    answer = Tasks.answer

    def slow(*args: Any) -> Any:
        begun.set()
        assert may_go_on.wait(30)
        return answer(*args)

    monkeypatch.setattr(Tasks, "answer", slow)
    server = Server(create_app(tasks))
    with ThreadPoolExecutor(2) as threads:
        asked = threads.submit(server.ask, "POST", "/predict", {"task": "b", "texts": TEXTS[:2]})
        assert begun.wait(30)
        stopped = threads.submit(server.stop)
        may_go_on.set()
        status, found, _ = asked.result()
        stopped.result()
    assert status == 200
    assert_right(found, "b", [0, 1], expected)


def test_a_fault_leaves_the_next_requests_answered(
    server: Server, tasks: Tasks, expected: dict[tuple[str, int], list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: Any) -> Any:
        raise RuntimeError("secret")

    with monkeypatch.context() as patched:
        patched.setattr(Tasks, "_encode", failing)
        status, answer, _ = server.ask("POST", "/predict", GOOD)
        assert (status, answer["error"]["message"]) == (500, "the server failed; its log says why.")
    status, answer, _ = server.ask("POST", "/predict", {"task": "b", "texts": TEXTS[:1]})
    assert status == 200
    assert_right(answer, "b", [0], expected)
    assert server.ask("GET", "/health")[0] == 200


def test_health_tells_that_nothing_is_answered_any_more(
    server: Server, tasks: Tasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Batcher, "failed", True)
    status, answer, _ = server.ask("GET", "/health")
    assert (status, "Start it again" in answer["error"]["message"]) == (503, True)


def test_a_worker_that_ended_is_known() -> None:
    async def end() -> None:
        queue = batcher(Slow())
        assert not queue.failed
        async with queue.running():
            assert not queue.failed
            assert queue._worker is not None
            queue._worker.cancel()
            await asyncio.wait([queue._worker])
            assert queue.failed

    asyncio.run(end())
