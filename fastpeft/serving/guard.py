"""What stands before the application: it bounds what a client may send, and counts what it got."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from starlette.responses import JSONResponse

from fastpeft.serving.messages import refused_as

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 100, 300)
_COUNTED = ("/predict", "/v1/chat/completions", "/v1/completions")
_CLIENT_LEFT = 499  # of no standard, as nginx counts it
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """What Prometheus reads of one server; `waiting` gives the number of texts in its queue."""

    def __init__(self, waiting: Callable[[], float]) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "fastpeft_requests",
            "Requests for answers; the task is empty where none was found.",
            ["task", "status"],
            registry=self.registry,
        )
        self.texts = Counter("fastpeft_texts", "Texts that were answered.", ["task"], registry=self.registry)
        self.seconds = Histogram(
            "fastpeft_request_seconds",
            "Time from a request to the end of its answer.",
            ["task"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.batches = Histogram(
            "fastpeft_batch_texts", "Texts that were answered together.", buckets=_ROWS, registry=self.registry
        )
        queue = Gauge("fastpeft_queue_texts", "Texts that wait.", registry=self.registry)
        queue.set_function(waiting)


class Guard:
    """Reads a request whole before the application gets it, so that a slow or a large body neither delays it nor
    fills the memory: a body has at most `max_bytes`, and comes within `seconds`. A connection on which no request
    begins is not bounded here. `metrics` count the requests for answers.
    """

    def __init__(self, app: Any, metrics: Metrics, max_bytes: int, seconds: float) -> None:
        self._app, self._metrics, self._max_bytes, self._seconds = app, metrics, max_bytes, seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, status, left = time.perf_counter(), 0, False

        async def noting(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        state = scope.setdefault("state", {})

        async def hearing() -> Any:
            nonlocal left
            message = await receive()
            left = left or message["type"] == "http.disconnect"
            return message

        try:
            await self._guarded(scope, hearing, noting)
        except asyncio.CancelledError:  # the server ends
            status = status or 503
            raise
        finally:
            status = status or (_CLIENT_LEFT if left else 500)  # the application failed
            if scope["path"] in _COUNTED:
                task = state.get("task", "")
                self._metrics.requests.labels(task, str(status)).inc()
                self._metrics.seconds.labels(task).observe(time.perf_counter() - begin)

    async def _guarded(self, scope: Any, receive: Any, send: Any) -> None:
        body = bytearray()
        more = True
        try:
            async with asyncio.timeout(self._seconds):
                while more and len(body) <= self._max_bytes:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
        except TimeoutError:
            await self._refuse(scope, receive, send, 408, f"the body did not come within {self._seconds:g} seconds.")
            return
        if len(body) > self._max_bytes:
            said = f"the body has more than {self._max_bytes:,} bytes. Send fewer or shorter texts."
            await self._refuse(scope, receive, send, 413, said)
            return
        given = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Any:
            return given.pop() if given else await receive()

        await self._app(scope, replay, send)

    @staticmethod
    async def _refuse(scope: Any, receive: Any, send: Any, status: int, detail: str) -> None:
        answer = JSONResponse(refused_as(scope["path"], detail, status), status, {"Connection": "close"})
        await answer(scope, receive, send)
