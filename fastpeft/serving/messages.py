"""What clients send and get, as JSON."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fastpeft.data.problems import MULTI_LABEL, REGRESSION
from fastpeft.serving.tasks import EncodedRequest
from fastpeft.training.prediction import shortest

_MAX_FIELDS = 100  # of an object: each unknown one would be an error of its own
_MOST_SHOWN = 300  # letters at each end of a message

# pydantic refuses half of a character (a lone surrogate), for which tokenizers have no code, in bounded strings alone
Text = Annotated[str, Field(min_length=1, max_length=20_000)]


class Sent(BaseModel):
    """What clients send: no other fields, values of the types that are named, and null for what is not said."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _leave_nulls_out(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if len(values) > _MAX_FIELDS:
            raise ValueError(f"it has {len(values):,} fields, and {_MAX_FIELDS} may be there")
        return {name: value for name, value in values.items() if value is not None}


class Request(Sent):
    """Texts for a task."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"texts": ["A warm, funny film.", "A bore."]}]})

    texts: list[Text | list[Text]] = Field(
        min_length=1,
        max_length=256,
        description="Strings; for a run on pairs lists of two; for a run on tags lists of words, or strings in which "
        "spaces separate them.",
    )
    task: str | None = Field(None, description="The task's name. It may be left out where there is one task.")


class Source(Sent):
    """Where a run lies."""

    path: str = Field(description="Its folder, below the folder of runs.")


def refusal(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The JSON of a refusal in OpenAI's form: a short message in UTF-8, whatever it repeats of a request."""
    if len(message) > 2 * _MOST_SHOWN:
        message = f"{message[:_MOST_SHOWN]} ... {message[-_MOST_SHOWN:]}"
    message = message.encode(errors="backslashreplace").decode()
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def answer_of(encoded: EncodedRequest, scores: list[np.ndarray]) -> dict[str, Any]:
    """Scores in the words of their task's problem."""
    predictor, run = encoded.task.predictor, encoded.task.run
    assert predictor is not None  # or there were no scores

    def said(text: Any, found: np.ndarray) -> dict[str, Any]:
        if run.problem.per_token:
            best = zip(text, (predictor.answer(word) for word in found))
            return {"words": [{"word": word, "tag": tag, "probability": shortest(p)} for word, (tag, p) in best]}
        every = dict(zip(run.labels, map(shortest, found)))
        if run.problem is REGRESSION:
            ((name, value),) = every.items()
            return {"name": name, "value": value}
        if run.problem is MULTI_LABEL:
            return {"labels": [name for name, _ in predictor.answer(found)], "probabilities": every}
        label, _ = predictor.answer(found)
        return {"label": label, "probability": every[label], "probabilities": every}

    predictions = [said(each.text, found) for each, found in zip(encoded.texts, scores)]
    return {"task": encoded.task.name, "predictions": predictions, "cut": encoded.cut}
