"""Serve many text classifiers on one backbone: requests for different tasks share a batch.

    pip install --no-build-isolation ".[serve]"  # from the root of a clone
    python examples/serve_pool.py --base FacebookAI/roberta-base --runs runs --tasks sentiment=sst2 topic=news

`runs` holds folders that `LadderModel.save_pretrained` wrote; clients may add tasks from there and nowhere else.

    curl localhost:8000/predict --json '{"task": "sentiment", "texts": ["Good fun.", "A bore."]}'
    curl localhost:8000/tasks
    curl -X PUT localhost:8000/tasks/irony --json '{"path": "irony-9-lst"}'
    curl -X DELETE localhost:8000/tasks/irony

There is no authentication here: let a proxy keep strangers away from PUT and DELETE.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.requests import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastpeft import FastpeftError, LadderPool

MAX_TEXTS = 256  # of one request


class Texts(BaseModel):
    """What is asked of one task."""

    task: str
    texts: list[str] = Field(min_length=1, max_length=MAX_TEXTS)


class Source(BaseModel):
    """Where a task's side network lies, below the folder of runs."""

    path: str


@dataclass
class Waiting:
    """A request in the queue."""

    task: str
    texts: list[str]
    answer: asyncio.Future[list[torch.Tensor]]


class Batcher:
    """Collects what arrives within a few milliseconds, and answers it by one call of the pool.

    Args:
        pool: of sequence classifiers.
        tokenizer: of its backbone.
        max_rows: of a batch; a request that would go beyond waits for the next, unless it is the first.
        max_wait: seconds that the first request of a batch waits for others.
        max_length: where texts are cut, in tokens.
    """

    def __init__(
        self, pool: LadderPool, tokenizer: Any, *, max_rows: int = 64, max_wait: float = 0.004, max_length: int = 128
    ) -> None:
        self.pool, self.tokenizer = pool, tokenizer
        self.max_rows, self.max_wait, self.max_length = max_rows, max_wait, max_length
        self._queue: asyncio.Queue[Waiting] = asyncio.Queue()
        self._left_over: Waiting | None = None

    async def classify(self, task: str, texts: list[str]) -> list[torch.Tensor]:
        """Logits of every text, `(classes,)`."""
        waiting = Waiting(task, texts, asyncio.get_running_loop().create_future())
        self._queue.put_nowait(waiting)
        return await waiting.answer

    async def run(self) -> None:
        """Answer requests until cancelled."""
        while True:
            await self._settle(await self._collect())

    async def _settle(self, batch: Sequence[Waiting]) -> None:
        """Answer requests together, or each alone where that fails, so that one fails by itself."""
        try:
            answers = await asyncio.to_thread(self._answer, batch)
        except Exception as error:  # such as a task that was removed while its request waited
            if len(batch) > 1:
                for waiting in batch:
                    await self._settle([waiting])
            elif not batch[0].answer.done():  # its client may have left
                batch[0].answer.set_exception(error)
            return
        for waiting, answer in zip(batch, answers, strict=True):
            if not waiting.answer.done():
                waiting.answer.set_result(answer)

    async def _collect(self) -> list[Waiting]:
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
        return batch

    def _answer(self, batch: Sequence[Waiting]) -> list[list[torch.Tensor]]:
        texts = [text for waiting in batch for text in waiting.texts]
        tasks = [waiting.task for waiting in batch for _ in waiting.texts]
        encoded = self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
        rows = iter(self.pool(encoded, tasks))
        return [[next(rows).logits.float().cpu() for _ in waiting.texts] for waiting in batch]


def add_task(pool: LadderPool, name: str, folder: Path) -> None:
    """Take in a side network; not one whose texts were put into a prompt, which nobody does here."""
    if (folder / "prompt.json").is_file():
        raise FastpeftError(
            f"the side network in {folder.name!r} was trained with a prompt, and this server gives texts as they are. "
            "Name one that was trained without."
        )
    pool.add(name, folder)


def create_app(pool: LadderPool, tokenizer: Any, runs: Path, **options: Any) -> FastAPI:
    """The server's application; `options` are those of a `Batcher`."""
    runs = runs.resolve()
    batcher = Batcher(pool, tokenizer, **options)
    adding: set[str] = set()  # names of tasks that are being loaded

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker = asyncio.create_task(batcher.run())
        yield  # at the end the server has answered all requests
        worker.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await worker

    app = FastAPI(title="LadderPool", lifespan=lifespan)

    @app.exception_handler(FastpeftError)
    async def refuse(_: Request, error: FastpeftError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, status_code=400)

    def find(name: str) -> Any:
        """The labels of a task."""
        try:
            return pool[name].config.id2label
        except FastpeftError as error:
            raise HTTPException(404, str(error)) from error

    @app.get("/tasks")
    async def tasks() -> dict[str, list[str]]:
        listed = {}
        for name in pool.tasks:
            with contextlib.suppress(FastpeftError):  # it may be deleted meanwhile
                listed[name] = [str(label) for label in pool[name].config.id2label.values()]
        return listed

    @app.post("/predict")
    async def predict(request: Texts) -> list[dict[str, Any]]:
        labels = find(request.task)
        try:
            rows = await batcher.classify(request.task, request.texts)
        except FastpeftError:
            find(request.task)  # 404 where it was deleted while the request waited
            raise
        answers = []
        for logits in rows:
            scores = logits.softmax(-1)
            answers.append({"label": str(labels[int(scores.argmax())]), "scores": scores.tolist()})
        return answers

    @app.put("/tasks/{name}", status_code=201)
    async def add(name: str, source: Source) -> dict[str, str]:
        folder = (runs / source.path).resolve()
        if not folder.is_relative_to(runs) or not folder.is_dir():
            raise HTTPException(400, f"there is no folder {source.path!r} below the folder of runs. Name one there.")
        if name in pool.tasks or name in adding:
            raise HTTPException(409, f"there is a task {name!r}. Delete it first, or give another name.")
        adding.add(name)
        try:
            await asyncio.to_thread(add_task, pool, name, folder)
        finally:
            adding.discard(name)
        return {"task": name}

    @app.delete("/tasks/{name}", status_code=204)
    async def remove(name: str) -> None:
        try:
            await asyncio.to_thread(pool.remove, name)
        except FastpeftError as error:
            raise HTTPException(404, str(error)) from error

    return app


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="name on the hub, or folder, of the backbone")
    parser.add_argument("--runs", type=Path, required=True, help="folder below which side networks lie")
    parser.add_argument("--tasks", nargs="*", default=[], metavar="NAME=PATH", help="tasks to start with")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max-rows", type=int, default=64, help="texts in a batch")
    parser.add_argument("--max-wait", type=float, default=0.004, help="seconds to wait for others to share a batch")
    parser.add_argument("--max-length", type=int, default=128, help="tokens at which texts are cut")
    options = parser.parse_args(arguments)
    base = AutoModelForSequenceClassification.from_pretrained(options.base).to(options.device)
    pool = LadderPool(base)
    for task in options.tasks:
        name, _, path = task.partition("=")
        add_task(pool, name, options.runs / path)
    app = create_app(
        pool,
        AutoTokenizer.from_pretrained(options.base),
        options.runs,
        max_rows=options.max_rows,
        max_wait=options.max_wait,
        max_length=options.max_length,
    )
    uvicorn.run(app, host=options.host, port=options.port)


if __name__ == "__main__":
    main()
