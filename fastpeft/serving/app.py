"""The application: what is answered at which address."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import fastapi
from fastapi import FastAPI
from fastapi import Path as Part
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from fastpeft.errors import FastpeftError
from fastpeft.serving.batcher import Batcher
from fastpeft.serving.chat import add_openai_routes
from fastpeft.serving.guard import Guard
from fastpeft.serving.messages import Request, Source, answer_of, refusal
from fastpeft.serving.tasks import NAME, RefusedError, Tasks
from fastpeft.version import __version__

Name = Annotated[str, Part(pattern=f"^{NAME}$")]


@dataclass(frozen=True)
class Limits:
    """What a server takes on.

    Attributes:
        body: bytes of a request.
        queue: texts that may wait.
        chats: requests for generated text that may wait.
        seconds: to send a request, and again to answer it.
        generation: seconds to generate an answer.
    """

    body: int = 1 << 20
    queue: int = 4_096
    chats: int = 256
    seconds: float = 30.0
    generation: float = 300.0


def create_app(
    tasks: Tasks, *, runs: Path | None = None, max_wait: float = 0.004, limits: Limits | None = None
) -> FastAPI:
    """The application for `tasks`.

    Args:
        tasks: what it answers for.
        runs: a folder; clients may add runs that lie in it, and remove tasks. None: they may not.
        max_wait: seconds that the first request of a batch waits for others.
        limits: None: the default ones.
    """
    limits = limits or Limits()
    alike: dict[str, Any] = {"max_rows": tasks.max_rows, "max_wait": max_wait}
    batcher = Batcher(tasks.answer, max_queue=limits.queue, seconds=limits.seconds, **alike)
    # a queue and a thread of their own: generated text takes seconds, for which no other should wait
    generation = Batcher(tasks.generate, max_queue=limits.chats, seconds=limits.generation, **alike)
    loading = ThreadPoolExecutor(4, "fastpeft-load")  # its own: loads must not take the threads that read requests

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with batcher.running(), generation.running():
            yield  # at its end the server has answered all requests
        loading.shutdown(cancel_futures=True)

    app = FastAPI(
        title="fastpeft serve",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load scripts from another host
        redoc_url=None,
        responses={"4XX": {"description": "An error in OpenAI's form."}, 503: {"description": "Try again later."}},
    )
    app.add_middleware(Guard, max_bytes=limits.body, seconds=limits.seconds)
    _add_exception_handlers(app)

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether requests are answered: 503 where the server must be started again."""
        if batcher.failed or generation.failed:
            raise RefusedError("the server failed; its log says why. Start it again.", 503)
        return {"status": "ready"}

    @app.get("/tasks")
    async def listed() -> list[dict[str, Any]]:
        """The tasks that are served."""
        return [{**task.describe(), "shares_backbone_with": tasks.beside(task)} for task in tasks]

    @app.post("/predict")
    async def predict(asked: Request) -> dict[str, Any]:
        """Answer texts by a task: a prediction for each, and how many were cut to what the run reads."""
        name = asked.task
        if name is None:
            served = [task.name for task in tasks]
            if len(served) != 1:
                raise RefusedError(f"task is missing; there are {', '.join(served) or 'none'}. Name one.", 422)
            (name,) = served
        return answer_of(*await batcher.answer(name, asked.texts))

    add_openai_routes(app, tasks, generation)
    if runs is not None:
        _add_loading_routes(app, tasks, runs.resolve(), loading)
    return app


def _add_loading_routes(app: FastAPI, tasks: Tasks, runs: Path, loading: ThreadPoolExecutor) -> None:
    """Let clients add and remove tasks."""

    @app.put("/tasks/{name}", status_code=201)
    async def add(name: Name, source: Source) -> dict[str, Any]:
        """Load a run from the folder of runs."""
        try:
            folder = (runs / source.path).resolve()
            inside = folder != runs and folder.is_relative_to(runs) and folder.is_dir()
        except (OSError, ValueError):  # as of a NUL in the name
            inside = False
        if not inside:
            raise RefusedError(f"there is no folder {source.path!r} below the folder of runs. Name one there.", 404)
        try:
            task = await asyncio.get_running_loop().run_in_executor(loading, tasks.add, name, folder)
        except RefusedError:
            raise
        except FastpeftError as error:
            raise RefusedError(str(error), 400) from error
        return {**task.describe(), "shares_backbone_with": tasks.beside(task)}

    @app.delete("/tasks/{name}", status_code=204)
    async def remove(name: Name) -> None:
        """Forget a task; its folder stays."""
        await asyncio.to_thread(tasks.remove, name)


def _add_exception_handlers(app: FastAPI) -> None:
    """Make each refusal a status and one message."""

    @app.exception_handler(RefusedError)
    async def refused(_: fastapi.Request, error: RefusedError) -> JSONResponse:
        headers = {"Retry-After": "1"} if error.status == 503 else None
        return JSONResponse(refusal(str(error), error.status, error.param, error.code), error.status, headers)

    @app.exception_handler(HTTPException)
    async def not_served(_: fastapi.Request, error: HTTPException) -> JSONResponse:
        message = f"{error.detail}. GET /openapi.json describes what this server takes."
        return JSONResponse(refusal(message, error.status_code), error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def unreadable(_: fastapi.Request, error: RequestValidationError) -> JSONResponse:
        wrong = max(error.errors(), key=lambda each: len(each["loc"]))  # of kinds that were tried, the nearest
        message = f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg'].removeprefix('Value error, ')}."
        param = wrong["loc"][1] if len(wrong["loc"]) > 1 and isinstance(wrong["loc"][1], str) else None
        return JSONResponse(refusal(f"the request cannot be read. {message}", 422, param), 422)

    @app.exception_handler(Exception)
    async def failed(_: fastapi.Request, error: Exception) -> JSONResponse:
        return JSONResponse(refusal("the server failed; its log says why.", 500), 500)
