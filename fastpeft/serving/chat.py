"""Generated text over HTTP, in the form of OpenAI's endpoints for chats and completions."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, Literal, Self

import fastapi
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from fastpeft.data.conversations import ASSISTANT, SYSTEM, Conversation, check_conversation
from fastpeft.errors import FastpeftError
from fastpeft.serving.batcher import Batcher
from fastpeft.serving.generation import GenerationRequest
from fastpeft.serving.messages import OpenAIRefusal, Sent, check_encodable, error_form
from fastpeft.serving.tasks import RefusedError, Task, Tasks

logger = logging.getLogger(__name__)


def _unwanted(wanted: bool) -> bool:
    if wanted:
        raise ValueError("this is not supported. Remove it")
    return wanted


Text = Annotated[str, AfterValidator(check_encodable)]
Unwanted = Annotated[bool, AfterValidator(_unwanted)]
Neutral = Annotated[float, Field(ge=0, le=0, description="Not supported: must be 0.")]
# each token is compared with all beginnings of a stop, which takes time as its length times itself
Stop = Annotated[str, Field(min_length=1, max_length=1_000), AfterValidator(check_encodable)]


class OpenAISent(Sent):
    """What clients of OpenAI's send: null where they say nothing, which some write for all that they know."""

    @model_validator(mode="before")
    @classmethod
    def _leave_nulls_out(cls, values: Any) -> Any:
        return {name: value for name, value in values.items() if value is not None} if type(values) is dict else values


class Part(OpenAISent):
    """A part of what is said."""

    type: Literal["text"]
    text: Text


def _check_parts(content: Any) -> Any:
    for part in content if isinstance(content, list) else ():
        if isinstance(part, dict) and part.get("type", "text") != "text":
            raise ValueError(f"it has a part of the type {part['type']!r}, and only text is read")
    return content


class Message(OpenAISent):
    """A turn of a conversation."""

    role: str = Field(description="system or developer, which comes first or not at all, user, assistant or tool.")
    content: Annotated[Text | Annotated[list[Part], Field(fail_fast=True)], BeforeValidator(_check_parts)]
    name: str | None = Field(None, description="Ignored.")
    tool_call_id: str | None = Field(None, description="Ignored; OpenAI's client sends it with the role tool.")

    @property
    def turn(self) -> dict[str, str]:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": SYSTEM if self.role == "developer" else self.role, "content": content}


class ResponseFormat(OpenAISent):
    """The form of what is said."""

    type: Literal["text"]


class StreamOptions(OpenAISent):
    """What a stream has beside its text."""

    include_usage: bool = Field(False, description="Whether a last event has the token counts.")


class OpenAIRequest(OpenAISent):
    """What chats and completions are asked for."""

    model: str = Field(description="The task's name.")
    max_tokens: int | None = Field(None, ge=1, description="Maximum number of generated tokens (default: 256).")
    temperature: float | None = Field(
        1, ge=0, le=2, description="Sampling temperature; 0 is greedy decoding, as in predict."
    )
    top_p: float | None = Field(
        1,
        gt=0,
        le=1,
        description="Nucleus sampling: tokens are drawn from the most likely ones with this total probability.",
    )
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = Field(
        None, description="Generation stops before the first of these texts."
    )
    stream: bool | None = Field(False, description="Whether the answer comes as events while it is generated.")
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = Field(1, description="The number of answers.")
    frequency_penalty: Neutral | None = 0
    presence_penalty: Neutral | None = 0
    seed: None = None
    user: str | None = Field(None, description="Is not read.")

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are of a stream. Remove them, or set stream")
        return self


class ChatRequest(OpenAIRequest):
    """A conversation to go on with."""

    # the first fault alone: as many as a body can hold would take seconds of the thread that reads all requests
    messages: list[Message] = Field(min_length=1, fail_fast=True)
    response_format: ResponseFormat | None = None
    logprobs: Unwanted | None = None
    max_completion_tokens: int | None = Field(None, ge=1, description="As max_tokens.")

    @model_validator(mode="after")
    def _check_max_tokens(self) -> Self:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ. Remove one")
        return self


class CompletionRequest(OpenAIRequest):
    """A text to go on from, as it is."""

    prompt: Text = Field(min_length=1)


def add_openai_routes(app: FastAPI, tasks: Tasks, batcher: Batcher, count: Callable[[str], object]) -> None:
    """Give an application the addresses of OpenAI's form, which `batcher`, of `tasks.generate`, answers.

    `count` is told the task of each answer.
    """
    began = int(time.time())
    refusals: dict[int | str, dict[str, Any]] = {status: {"model": OpenAIRefusal} for status in ("4XX", 503)}

    def model(task: Task) -> dict[str, Any]:
        return {"id": task.name, "object": "model", "created": began, "owned_by": "fastpeft"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The tasks that generate text, as OpenAI lists models."""
        return {"object": "list", "data": [model(task) for task in tasks if task.predictor is None]}

    @app.get("/v1/models/{name}", responses=refusals)
    async def one_model(name: str) -> dict[str, Any]:
        """One of the tasks, as OpenAI describes a model."""
        return model(tasks.generative(name))

    async def answer(
        asked: OpenAIRequest, request: fastapi.Request, what: Conversation | str, most: int | None, shape: _Completion
    ) -> Response:
        request.state.task = tasks.generative(asked.model).name  # one that is there: see /predict
        answer = _Answer(asked, shape, count)
        await answer.begin(tasks, batcher, request, what, most)
        return await answer.response()

    @app.post("/v1/chat/completions", response_model=None, responses=refusals)
    async def chat(asked: ChatRequest, request: fastapi.Request) -> Response:
        """Say the assistant's next turn of a conversation, as OpenAI's chat completions."""
        tasks.generative(asked.model)
        most = asked.max_completion_tokens if asked.max_tokens is None else asked.max_tokens
        return await answer(asked, request, _conversation(asked), most, _Chat(asked.model))

    @app.post("/v1/completions", response_model=None, responses=refusals)
    async def complete(asked: CompletionRequest, request: fastapi.Request) -> Response:
        """Go on from a prompt, as it is and without a chat template, as OpenAI's completions."""
        return await answer(asked, request, asked.prompt, asked.max_tokens, _Completion(asked.model))


class _Answer:
    """One answer to `asked`, while it is generated; `shape` makes its JSON, and `count` is told of a whole one."""

    def __init__(self, asked: OpenAIRequest, shape: _Completion, count: Callable[[str], object]) -> None:
        self._asked, self._shape, self._count = asked, shape, count
        # its text; None at its end, which comes before that of others in its batch; `_answered` where it failed, and
        # `_gone` where the client left
        self._parts: asyncio.Queue[str | asyncio.Future[Any] | None] = asyncio.Queue()

    async def begin(
        self, tasks: Tasks, batcher: Batcher, request: fastapi.Request, what: Conversation | str, most: int | None
    ) -> None:
        """Encode what is asked, and have it answered."""
        asked, loop = self._asked, asyncio.get_running_loop()
        self._generation = await asyncio.to_thread(
            tasks.generation_request,
            asked.model,
            what,
            most,
            stop=[asked.stop] if isinstance(asked.stop, str) else asked.stop or [],
            sampling=(
                1.0 if asked.temperature is None else asked.temperature,
                1.0 if asked.top_p is None else asked.top_p,
            ),
            deliver=lambda part: loop.call_soon_threadsafe(self._parts.put_nowait, part),
        )
        self._answered = asyncio.ensure_future(batcher.answer(asked.model, [self._generation]))
        self._gone = asyncio.ensure_future(_disconnected(request))
        for each in self._answered, self._gone:
            each.add_done_callback(self._parts.put_nowait)

    async def response(self) -> Response:
        """The answer in one piece or, where a stream is asked for, as events while it is generated."""
        try:
            first = part = await self._next()  # until then a refusal has a status of its own
            while part is not None and not self._asked.stream:
                part = await self._next()
        except BaseException:
            self._leave()
            raise
        if self._asked.stream:
            headers = {"Cache-Control": "no-cache"}
            return StreamingResponse(self._events(first), media_type="text/event-stream", headers=headers)
        self._leave()
        self._count(self._asked.model)
        return JSONResponse(self._shape.whole(self._generation))

    async def _next(self) -> str | None:
        """The next part, None at the end."""
        part = await self._parts.get()
        if part is self._gone:
            raise RefusedError("the client has gone.", 499)
        if isinstance(part, asyncio.Future):
            await part
            return None
        return part

    def _leave(self) -> None:
        self._generation.abandoned = True
        self._answered.cancel()
        self._gone.cancel()

    async def _events(self, first: str | None) -> AsyncIterator[str]:
        asked, part = self._asked, first
        try:
            for beginning in self._shape.beginning:
                yield _event(beginning)
            while part is not None:
                yield _event(self._shape.part(part))
                part = await self._next()
            self._count(asked.model)
            yield _event(self._shape.end(self._generation))
            if asked.stream_options is not None and asked.stream_options.include_usage:
                yield _event(self._shape.counted(self._generation))
            yield "data: [DONE]\n\n"
        except FastpeftError as error:
            yield _event(error_form(str(error), getattr(error, "status", 500)))
        except Exception:
            logger.exception("an answer failed after its first words")
            yield _event(error_form("the server failed; its log says why.", 500))
        finally:  # also where the client has gone
            self._leave()


async def _disconnected(request: fastapi.Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _conversation(asked: ChatRequest) -> Conversation:
    """The messages, which end with what the assistant is asked."""
    conversation = check_conversation([message.turn for message in asked.messages], _refuse_messages)
    if conversation.turns[-1][0] == ASSISTANT:
        raise _refuse_messages("the assistant's turn at its end", "What is said next is the assistant's: ask first.")
    return conversation


def _refuse_messages(what: str, remedy: str) -> RefusedError:
    return RefusedError(f"messages has {what}. {remedy}", 400, "messages")


def _event(values: dict[str, Any]) -> str:
    return f"data: {json.dumps(values)}\n\n"


class _Completion:
    """The JSON of one completion."""

    prefix, whole_object, part_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str) -> None:
        self._id, self._created, self._model = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time()), model

    def _with(self, kind: str, choices: list[dict[str, Any]], **others: Any) -> dict[str, Any]:
        known = {"id": self._id, "object": kind, "created": self._created, "model": self._model}
        return {**known, "choices": choices, **others}

    def _chunk(self, content: dict[str, Any], ended: str | None = None) -> dict[str, Any]:
        return self._with(self.part_object, [_choice(content, ended)])

    @property
    def beginning(self) -> list[dict[str, Any]]:
        """The events before the first part."""
        return []

    def whole(self, generation: GenerationRequest) -> dict[str, Any]:
        """An answer in one piece."""
        choice = _choice(self._whole(generation.text), generation.finish_reason)
        return self._with(self.whole_object, [choice], usage=_usage(generation))

    def part(self, text: str) -> dict[str, Any]:
        """A part of it."""
        return self._chunk(self._part(text))

    def end(self, generation: GenerationRequest) -> dict[str, Any]:
        """The part that says why it ended."""
        return self._chunk(self._part(""), generation.finish_reason)

    def counted(self, generation: GenerationRequest) -> dict[str, Any]:
        """The part that counts its tokens."""
        return self._with(self.part_object, [], usage=_usage(generation))

    def _whole(self, text: str) -> dict[str, Any]:
        return {"text": text}

    _part = _whole


class _Chat(_Completion):
    """The JSON of one chat."""

    prefix, whole_object, part_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    @property
    def beginning(self) -> list[dict[str, Any]]:
        return [self._chunk({"delta": {"role": ASSISTANT, "content": ""}})]

    def _whole(self, text: str) -> dict[str, Any]:
        return {"message": {"role": ASSISTANT, "content": text}}

    def _part(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}


def _choice(content: dict[str, Any], ended: str | None) -> dict[str, Any]:
    return {"index": 0, **content, "logprobs": None, "finish_reason": ended}


def _usage(generation: GenerationRequest) -> dict[str, int]:
    prompt, completion = len(generation.tokens), generation.count
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
