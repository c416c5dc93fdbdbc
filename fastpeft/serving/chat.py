"""Generated text over HTTP, in the form of OpenAI's endpoints for chats and completions."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any, Literal

import fastapi
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BeforeValidator, Field

from fastpeft.data.conversations import ASSISTANT, SYSTEM, Conversation, check_conversation
from fastpeft.errors import FastpeftError
from fastpeft.serving.batcher import Batcher
from fastpeft.serving.generation import GenerationRequest
from fastpeft.serving.messages import Sent, refusal
from fastpeft.serving.tasks import RefusedError, Task, Tasks

logger = logging.getLogger(__name__)


def _join_parts(content: Any) -> Any:
    """OpenAI's list of the parts of a text as that text."""
    if not isinstance(content, list):
        return content
    if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        raise ValueError("only parts of the type text are read")
    return "".join(str(part.get("text", "")) for part in content)


Text = Annotated[str, Field(max_length=1 << 20)]  # bounded for the reason at `fastpeft.serving.messages.Text`
# each token is compared with all beginnings of a stop, which takes time as its length times itself
Stop = Annotated[str, Field(min_length=1, max_length=1_000)]


class Message(Sent):
    """A turn of a conversation."""

    role: str = Field(description="system or developer, which comes first or not at all, user, assistant or tool.")
    content: Annotated[Text, BeforeValidator(_join_parts)]
    name: str | None = Field(None, description="Ignored.")
    tool_call_id: str | None = Field(None, description="Ignored; OpenAI's client sends it with the role tool.")

    @property
    def turn(self) -> dict[str, str]:
        return {"role": SYSTEM if self.role == "developer" else self.role, "content": self.content}


class OpenAIRequest(Sent):
    """What chats and completions are asked for. What is not listed, or has one value alone, is not supported."""

    model: str = Field(description="The task's name.")
    max_tokens: int | None = Field(None, ge=1, description="Maximum number of generated tokens (default: 256).")
    temperature: float = Field(1, ge=0, le=2, description="Sampling temperature; 0 is greedy decoding, as in predict.")
    top_p: float = Field(1, gt=0, le=1, description="Tokens are drawn from the most likely of this total probability.")
    stop: Annotated[
        list[Stop], Field(max_length=4), BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop)
    ] = Field([], description="Generation stops before the first of these texts.")
    stream: bool = Field(False, description="Whether the answer comes as events while it is generated.")
    stream_options: dict[Literal["include_usage"], bool] = Field({}, description="Whether a last event counts tokens.")
    n: Literal[1] = 1
    frequency_penalty: float = Field(0, ge=0, le=0)
    presence_penalty: float = Field(0, ge=0, le=0)
    user: str | None = Field(None, description="Ignored.")


class ChatRequest(OpenAIRequest):
    """A conversation to go on with."""

    # the first fault alone: as many as a body can hold would take seconds of the thread that reads all requests
    messages: list[Message] = Field(min_length=1, fail_fast=True)
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    logprobs: Literal[False] = False
    max_completion_tokens: int | None = Field(None, ge=1, description="In place of max_tokens.")


class CompletionRequest(OpenAIRequest):
    """A text to go on from, as it is."""

    prompt: Annotated[Text, Field(min_length=1)]


def _conversation(asked: ChatRequest) -> Conversation:
    """The messages, which end with what the assistant is asked."""

    def refuse(what: str, remedy: str) -> RefusedError:
        return RefusedError(f"messages has {what}. {remedy}", 400, "messages")

    conversation = check_conversation([message.turn for message in asked.messages], refuse)
    if conversation.turns[-1][0] == ASSISTANT:
        raise refuse("the assistant's turn at its end", "What is said next is the assistant's: ask first.")
    return conversation


def add_openai_routes(app: FastAPI, tasks: Tasks, batcher: Batcher) -> None:
    """Give an application the addresses of OpenAI's form, which `batcher`, of `tasks.generate`, answers."""
    began = int(time.time())

    def model(task: Task) -> dict[str, Any]:
        return {"id": task.name, "object": "model", "created": began, "owned_by": "fastpeft"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The tasks that generate text, as OpenAI lists models."""
        return {"object": "list", "data": [model(task) for task in tasks if task.predictor is None]}

    @app.get("/v1/models/{name}")
    async def one_model(name: str) -> dict[str, Any]:
        """One of the tasks, as OpenAI describes a model."""
        return model(tasks.generative(name))

    async def answer(
        asked: OpenAIRequest, request: fastapi.Request, what: Conversation | str, most: int | None
    ) -> Response:
        """The answer in one piece or, where a stream is asked for, as events while it is generated."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Any] = asyncio.Queue()
        generation = await asyncio.to_thread(
            tasks.generative(asked.model).request,
            what,
            most,
            stop=asked.stop,
            sampling=(asked.temperature, asked.top_p),
            deliver=lambda part: loop.call_soon_threadsafe(queue.put_nowait, part),
        )
        form = _Form(asked)
        parts = _parts(generation, queue, request, batcher)
        first = await anext(parts, "")  # until then a refusal has a status of its own
        if asked.stream:
            events = _events(form, generation, first, parts)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        async for _ in parts:
            pass
        return JSONResponse(form.whole(generation))

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(asked: ChatRequest, request: fastapi.Request) -> Response:
        """Say the assistant's next turn of a conversation, as OpenAI's chat completions."""
        tasks.generative(asked.model)
        return await answer(asked, request, _conversation(asked), asked.max_completion_tokens or asked.max_tokens)

    @app.post("/v1/completions", response_model=None)
    async def complete(asked: CompletionRequest, request: fastapi.Request) -> Response:
        """Go on from a prompt, as it is and without a chat template, as OpenAI's completions."""
        return await answer(asked, request, asked.prompt, asked.max_tokens)


async def _parts(
    generation: GenerationRequest, queue: asyncio.Queue[Any], request: fastapi.Request, batcher: Batcher
) -> AsyncIterator[str]:
    """The parts of an answer, as they come into `queue`; where nobody listens any more, its generation ends.

    Its end comes before that of others in its batch. Where it failed, or the client left, a future comes.
    """
    awaited = batcher.answer(generation.task.name, [generation]), _disconnected(request)
    futures = [asyncio.ensure_future(each) for each in awaited]
    for future in futures:
        future.add_done_callback(queue.put_nowait)
    try:
        while isinstance(part := await queue.get(), str):
            yield part
        if part is not None:
            await part
    finally:
        generation.abandoned = True
        for future in futures:
            future.cancel()


async def _disconnected(request: fastapi.Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(
    form: _Form, generation: GenerationRequest, first: str, parts: AsyncIterator[str]
) -> AsyncIterator[str]:
    def event(values: dict[str, Any]) -> str:
        return f"data: {json.dumps(values)}\n\n"

    async with aclosing(parts):  # type: ignore[type-var]
        try:
            yield event(form.part(first, begins=True))
            async for part in parts:
                yield event(form.part(part))
            yield event(form.part("", generation.finish_reason))
            if form.counts:
                yield event(form.usage(generation))
            yield "data: [DONE]\n\n"
        except FastpeftError as error:
            yield event(refusal(str(error), getattr(error, "status", 500)))
        except Exception:
            logger.exception("an answer failed after its first words")
            yield event(refusal("the server failed; its log says why.", 500))


class _Form:
    """The JSON of one answer to a chat or a completion."""

    def __init__(self, asked: OpenAIRequest) -> None:
        self._chats = isinstance(asked, ChatRequest)
        kind = "chatcmpl" if self._chats else "cmpl"
        self._known = {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.model}
        self._part_object = "chat.completion.chunk" if self._chats else "text_completion"
        self.counts = asked.stream_options.get("include_usage", False)

    def whole(self, generation: GenerationRequest) -> dict[str, Any]:
        """An answer in one piece."""
        text = generation.text
        content = {"message": {"role": ASSISTANT, "content": text}} if self._chats else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": generation.finish_reason}
        kind = "chat.completion" if self._chats else self._part_object
        return {**self.usage(generation), "object": kind, "choices": [choice]}

    def part(self, text: str, ended: str | None = None, begins: bool = False) -> dict[str, Any]:
        """A part of it; the first of a chat has the role, and the last says why the answer ended."""
        delta = {**({"role": ASSISTANT} if begins else {}), "content": text}
        content = {"delta": delta} if self._chats else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": ended}
        return {**self._known, "object": self._part_object, "choices": [choice]}

    def usage(self, generation: GenerationRequest) -> dict[str, Any]:
        """The part that counts its tokens."""
        prompt, completion = len(generation.tokens), generation.count
        counted = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        return {**self._known, "object": self._part_object, "choices": [], "usage": counted}
