"""The queue between a server's requests and the one thread that answers them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from fastpeft.serving.tasks import RefusedError


class QueuedRequest(NamedTuple):
    """A request in the queue."""

    task: str
    texts: Sequence[Any]
    answer: asyncio.Future[Any]


class Batcher:
    """Collects what arrives within a few milliseconds, and answers it together.

    Args:
        answer: gives the answers to requests, each the name of a task and its texts, or exceptions that refuse them.
        max_rows: texts of a batch.
        max_wait: seconds that the first request of a batch waits for others.
        max_queue: texts that may wait; a request that comes then is refused, unless none wait.
        seconds: how long a request waits at most.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[tuple[str, Sequence[Any]]]], Sequence[Any]],
        *,
        max_rows: int,
        max_wait: float,
        max_queue: int,
        seconds: float,
    ) -> None:
        self.max_rows, self.max_wait, self.max_queue, self.seconds = max_rows, max_wait, max_queue, seconds
        self.waiting = 0  # texts in the queue
        self._answer = answer
        self._queue: asyncio.Queue[QueuedRequest] = asyncio.Queue()
        self._left_over: QueuedRequest | None = None
        self._worker: asyncio.Task[None] | None = None

    @property
    def failed(self) -> bool:
        """Whether nothing answers any more."""
        return self._worker is not None and self._worker.done()

    async def answer(self, task: str, texts: Sequence[Any]) -> Any:
        """Answer one request.

        Raises:
            RefusedError: by the task, or there are too many texts in the queue, or they took too long.
        """
        if self.waiting and self.waiting + len(texts) > self.max_queue:
            raise RefusedError(f"{self.waiting} texts are waiting, and {self.max_queue} may. Try again later.", 503)
        waiting = QueuedRequest(task, texts, asyncio.get_running_loop().create_future())
        self.waiting += len(texts)
        self._queue.put_nowait(waiting)
        try:
            async with asyncio.timeout(self.seconds):
                return await waiting.answer
        except TimeoutError:  # what still waits is then left out
            raise RefusedError(f"there was no answer within {self.seconds:g} seconds. Try again later.", 503) from None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Answer requests while inside it."""
        # one thread, always the same: each that computes has threads of its own for PyTorch's work
        with ThreadPoolExecutor(1, "fastpeft-serve") as thread:
            self._worker = asyncio.create_task(self._run(thread))
            try:
                yield
            finally:
                self._worker.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await self._worker

    async def _run(self, thread: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [waiting for waiting in await self._collect() if not waiting.answer.done()]
            if not batch:  # nobody waits for it any more
                continue
            asked = [(waiting.task, waiting.texts) for waiting in batch]
            answers: Sequence[Any]
            try:
                answers = await loop.run_in_executor(thread, self._answer, asked)
            except Exception as error:  # it must not end this task, without which nothing is answered any more
                answers = [error] * len(batch)
            for waiting, answer in zip(batch, answers, strict=True):
                if waiting.answer.done():
                    continue
                if isinstance(answer, Exception):
                    waiting.answer.set_exception(answer)
                else:
                    waiting.answer.set_result(answer)

    async def _collect(self) -> list[QueuedRequest]:
        """The next requests, together at most `max_rows` texts; the first comes whole, however many it has."""
        first = self._left_over or await self._queue.get()
        self._left_over = None
        batch, rows = [first], len(first.texts)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.max_wait):
                while rows < self.max_rows:
                    following = await self._queue.get()
                    rows += len(following.texts)
                    if rows > self.max_rows:
                        self._left_over = following
                        break
                    batch.append(following)
        self.waiting -= sum(len(waiting.texts) for waiting in batch)
        return batch
