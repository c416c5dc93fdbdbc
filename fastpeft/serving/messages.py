"""What clients send and get, as JSON; the OpenAPI description is made of it."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from fastpeft.data.problems import MULTI_LABEL, REGRESSION
from fastpeft.prompts.template import is_text
from fastpeft.serving.tasks import EncodedRequest, Task
from fastpeft.training.prediction import shortest

MAX_TEXTS = 256  # of one request
MAX_CHARACTERS = 20_000  # of one text, a pair, or a list of words
_MAX_FIELDS = 100  # of an object: each unknown one would be an error of its own


def check_encodable(text: str) -> str:
    """The text; `ValueError` where it has what tokenizers have no code for, or cannot be shown."""
    if not is_text(text) or "\0" in text:
        raise ValueError("it has a NUL, or half of a character (a lone surrogate)")
    return text


def _checked(value: Any) -> Any:
    parts = value if isinstance(value, list) else [value]
    if not parts or not all(isinstance(part, str) for part in parts):
        raise ValueError("it is neither a string nor a list of strings")
    if not all(part.strip() for part in parts):
        raise ValueError("it is empty")
    if sum(map(len, parts)) > MAX_CHARACTERS:
        raise ValueError(f"it has more than {MAX_CHARACTERS:,} characters")
    for part in parts:
        check_encodable(part)
    return value


_STRING = {
    "type": "string",
    "minLength": 1,
    "maxLength": MAX_CHARACTERS,
    "pattern": r"^[^\u0000]*[^\s\u0000][^\u0000]*$",
}
Text = Annotated[
    Any,
    BeforeValidator(_checked),
    WithJsonSchema({"anyOf": [_STRING, {"type": "array", "items": _STRING, "minItems": 1}]}),
]


class Sent(BaseModel):
    """What clients send: no other fields, and values of the types that are named, as true is no number."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _check_number(cls, values: Any) -> Any:
        if isinstance(values, dict) and len(values) > _MAX_FIELDS:
            raise ValueError(f"it has {len(values):,} fields, and {_MAX_FIELDS} may be there")
        return values


class Request(Sent):
    """Texts for a task."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"texts": ["A warm, funny film.", "A bore."]}]})

    texts: list[Text] = Field(
        min_length=1,
        max_length=MAX_TEXTS,
        description="Strings; for a run on pairs lists of two; for a run on tags lists of words, or strings in which "
        "spaces separate them.",
    )
    task: str | None = Field(None, description="The task's name. It may be left out where there is one task.")


class Classified(BaseModel):
    """What a run on classes says of a text."""

    label: str
    probability: float
    probabilities: dict[str, float] = Field(description="The probability of every class.")


class Labelled(BaseModel):
    """What a run on several labels says of a text."""

    labels: list[str] = Field(description="The predicted labels; the list may be empty.")
    probabilities: dict[str, float] = Field(description="That of every label.")


class Number(BaseModel):
    """What a run on numbers says of a text."""

    name: str
    value: float


class Word(BaseModel):
    """A word and its most likely tag."""

    word: str
    tag: str
    probability: float


class Tagged(BaseModel):
    """What a run on tags says of a text."""

    words: list[Word]


class Answer(BaseModel):
    """A prediction for each text, in the order of the texts."""

    task: str
    predictions: list[Classified | Labelled | Number | Tagged]
    cut: int = Field(description="How many of the texts were truncated to the task's max_length.")


class TaskInfo(BaseModel):
    """A task that is served."""

    name: str
    method: str
    problem: str
    labels: list[str]
    reads: str = Field(description="What a text is: a string, a pair, words, messages or a prompt.")
    max_length: int = Field(
        description="Tokens at which texts are cut; messages or a prompt that have more with their answer are refused."
    )
    shares_backbone_with: list[str]


class Source(Sent):
    """Where a run lies."""

    path: str = Field(description="Its folder, below the folder of runs.")


class Refusal(BaseModel):
    """Why a request was refused."""

    detail: str


class OpenAIError(BaseModel):
    """What OpenAI says of a refusal."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIRefusal(BaseModel):
    """Why a request was refused, in OpenAI's form."""

    error: OpenAIError


def in_openai_form(path: str) -> bool:
    """Whether what an address gives has OpenAI's form."""
    return path.startswith("/v1/")


def refused_as(path: str, detail: str, status: int, param: str | None = None, code: str | None = None) -> Any:
    """The JSON of a refusal by an address."""
    return error_form(detail, status, param, code) if in_openai_form(path) else {"detail": detail}


def error_form(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI writes it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return OpenAIRefusal(error=OpenAIError(message=message, type=kind, param=param, code=code)).model_dump()


def answer_of(encoded: EncodedRequest, scores: list[np.ndarray]) -> Answer:
    """Scores in the words of their task's problem."""
    predictor, run = encoded.task.predictor, encoded.task.run
    assert predictor is not None  # or there were no scores
    made: list[Classified | Labelled | Number | Tagged] = []
    for each, found in zip(encoded.texts, scores):
        if run.problem.per_token:
            best = [predictor.answer(word) for word in found]
            said = [Word(word=word, tag=tag, probability=shortest(p)) for word, (tag, p) in zip(each.text, best)]
            made.append(Tagged(words=said))
            continue
        every = dict(zip(run.labels, map(shortest, found)))
        if run.problem is REGRESSION:
            ((name, value),) = every.items()
            made.append(Number(name=name, value=value))
        elif run.problem is MULTI_LABEL:
            made.append(Labelled(labels=[name for name, _ in predictor.answer(found)], probabilities=every))
        else:
            label, _ = predictor.answer(found)
            made.append(Classified(label=label, probability=every[label], probabilities=every))
    return Answer(task=encoded.task.name, predictions=made, cut=encoded.cut)


def describe(task: Task, beside: list[str]) -> TaskInfo:
    """The description of a task in the list of tasks."""
    run = task.run
    return TaskInfo(
        name=task.name,
        method=run.config.method,
        problem=run.problem.name,
        labels=[] if task.predictor is None else run.labels,
        reads=_reads(task),
        max_length=run.max_length,
        shares_backbone_with=beside,
    )


def _reads(task: Task) -> str:
    if task.predictor is None:
        return "messages" if task.run.chats else "prompt"
    if task.run.is_pair:
        return "pair"
    return "words" if task.run.problem.per_token else "string"
