"""The application: what is answered at which address."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import fastapi
from fastapi import FastAPI
from fastapi import Path as Part
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from fastpeft.errors import FastpeftError
from fastpeft.serving.batcher import Batcher
from fastpeft.serving.chat import add_openai_routes
from fastpeft.serving.guard import Guard, Metrics
from fastpeft.serving.messages import (
    Answer,
    Refusal,
    Request,
    Source,
    TaskInfo,
    answer_of,
    describe,
    in_openai_form,
    refused_as,
)
from fastpeft.serving.page import page
from fastpeft.serving.tasks import NAME, RefusedError, Tasks
from fastpeft.version import __version__

_MOST_SHOWN = 300  # letters at each end of a message

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
    metrics = Metrics(lambda: batcher.waiting + generation.waiting)
    alike: dict[str, Any] = {"max_rows": tasks.max_rows, "max_wait": max_wait, "observe": metrics.batches.observe}
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
        description="Finished runs of fastpeft. A refused request gets a JSON object whose detail says why; below /v1 "
        "it has OpenAI's form, an error with a message.",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load scripts from another host
        redoc_url=None,
    )
    app.add_middleware(Guard, metrics=metrics, max_bytes=limits.body, seconds=limits.seconds)
    _add_exception_handlers(app)
    _add_health_routes(app, tasks, batcher, generation)
    _add_description_routes(app, tasks, metrics)
    _add_prediction_route(app, tasks, batcher, metrics)
    add_openai_routes(app, tasks, generation, lambda name: metrics.texts.labels(name).inc())
    if runs is not None:
        _add_loading_routes(app, tasks, runs.resolve(), loading)
    return app


def _add_health_routes(app: FastAPI, tasks: Tasks, batcher: Batcher, generation: Batcher) -> None:
    """Let whoever starts servers ask how this one is."""

    def check_worker() -> None:
        if batcher.failed or generation.failed:
            raise RefusedError("the server failed; its log says why. Start it again.", 503)

    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses=_refusals(503))
    async def health() -> dict[str, str]:
        """Whether requests are taken: 503 where the queues of all tasks are full, or nothing is answered any more."""
        check_worker()
        used = {generation if task.predictor is None else batcher for task in tasks}
        is_open = batcher.is_open and generation.is_open
        if not is_open or (used and all(each.full for each in used)):
            raise RefusedError("the queue is full. Try again later.", 503)
        return {"status": "ready"}

    @app.head("/health/live", include_in_schema=False)
    @app.get("/health/live", responses=_refusals(503))
    async def alive() -> dict[str, str]:
        """Whether the server works: 503 where it must be started again."""
        check_worker()
        return {"status": "alive"}


def _add_description_routes(app: FastAPI, tasks: Tasks, metrics: Metrics) -> None:
    """Let whoever asks see the server's metrics, its addresses and its tasks."""

    @app.get("/metrics", response_class=PlainTextResponse)
    def measured() -> PlainTextResponse:
        """What Prometheus reads."""
        return PlainTextResponse(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def docs() -> str:
        return page(app.openapi())

    @app.get("/tasks")
    async def listed() -> list[TaskInfo]:
        """The tasks that are served."""
        return [describe(task, tasks.beside(task)) for task in tasks]


def _add_prediction_route(app: FastAPI, tasks: Tasks, batcher: Batcher, metrics: Metrics) -> None:
    """Let clients ask what runs say of texts."""

    @app.post("/predict", responses=_refusals(400, 404, 408, 413, 415, 422, 503))
    async def predict(asked: Request, request: fastapi.Request) -> Answer:
        """Answer texts by a task."""
        name = asked.task
        if name is None:
            served = [task.name for task in tasks]
            if len(served) != 1:
                raise RefusedError(f"task is missing; there are {', '.join(served) or 'none'}. Name one.", 422)
            (name,) = served
        request.state.task = tasks[name].name  # one that is there: clients must not make up labels of metrics
        encoded, scores = await batcher.answer(name, asked.texts)
        metrics.texts.labels(name).inc(len(scores))
        return answer_of(encoded, scores)


def _add_loading_routes(app: FastAPI, tasks: Tasks, runs: Path, loading: ThreadPoolExecutor) -> None:
    """Let clients add and remove tasks."""

    @app.put("/tasks/{name}", status_code=201, responses=_refusals(400, 404, 408, 409, 413, 415, 422))
    async def add(name: Name, source: Source) -> TaskInfo:
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
        return describe(task, tasks.beside(task))

    @app.delete("/tasks/{name}", status_code=204, responses=_refusals(404, 422))
    async def remove(name: Name) -> None:
        """Forget a task; its folder stays."""
        await asyncio.to_thread(tasks.remove, name)


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The description of refusals in OpenAPI."""
    return {status: {"model": Refusal} for status in statuses}


def _add_exception_handlers(app: FastAPI) -> None:
    """Make each refusal one short message in UTF-8, in the form of its address, whatever it repeats of a request."""

    def refusal(request: fastapi.Request, status: int, detail: str, *named: str | None) -> JSONResponse:
        if len(detail) > 2 * _MOST_SHOWN:
            detail = f"{detail[:_MOST_SHOWN]} ... {detail[-_MOST_SHOWN:]}"
        detail = detail.encode(errors="backslashreplace").decode()
        return JSONResponse(
            refused_as(request.url.path, detail, status, *named),
            status,
            {"Retry-After": "1"} if status == 503 else None,
        )

    @app.exception_handler(RefusedError)
    async def refused(request: fastapi.Request, error: RefusedError) -> JSONResponse:
        return refusal(request, error.status, str(error), error.param, error.code)

    @app.exception_handler(HTTPException)
    async def no_such(request: fastapi.Request, error: HTTPException) -> JSONResponse:
        wrong = {404: "there is no such address", 405: "this address does not take this method"}.get(error.status_code)
        said = f"{wrong}. GET /docs shows the addresses of this server." if wrong else str(error.detail)
        if error.status_code == 400:  # it is no text, or nested too deep
            said += ". Send JSON in UTF-8, not compressed."
        answer = refusal(request, error.status_code, said)
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(Exception)
    async def failed(request: fastapi.Request, error: Exception) -> JSONResponse:
        return refusal(request, 500, "the server failed; its log says why.")

    @app.exception_handler(RequestValidationError)
    async def unreadable(request: fastapi.Request, error: RequestValidationError) -> JSONResponse:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if request.method in ("POST", "PUT") and kind != "application/json":
            said = "the body must be JSON. Send it with the header Content-Type: application/json."
            return refusal(request, 415, said)
        wrong: dict[str, list[str]] = {}  # of each field, what is wrong by each of the kinds that it may be of
        for each in error.errors():
            parts = takewhile(lambda part: "[" not in part, map(str, each["loc"]))  # then pydantic names a kind
            wrong.setdefault(".".join(parts), []).append(each["msg"].removeprefix("Value error, "))
        said = "; ".join(f"{field}: {', or: '.join(faults)}" for field, faults in [*wrong.items()][:3])
        status = 400 if in_openai_form(request.url.path) else 422
        place = error.errors()[0]["loc"][1:2]  # the field, or the number of the character where JSON breaks off
        param = next((part for part in place if isinstance(part, str)), None)
        return refusal(request, status, f"the request cannot be read. {said}.", param)
