"""Requests for generated text, token by token: where each ends, and what of it a client may already read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from fastpeft.training.generation import PLAIN

STOP, LENGTH = "stop", "length"  # why a request has ended
_LEAST_TEMPERATURE = 1e-3  # below it decoding is greedy: scores divided by less are not finite
_REPLACEMENT = "\ufffd"  # what tokens of half a character are decoded to


class GenerationRequest:
    """A request for generated text, and what was generated for it so far.

    Args:
        task: that answers.
        tokenizer: of its run.
        tokens: of the prompt.
        eos_token_ids: the tokens after which nothing more is generated.
        max_tokens: the most that are generated.
        stop: texts before the first of which the answer ends.
        sampling: temperature, 0 for greedy decoding, and top-p.
        strip: whether space around the answer is left out, as of a turn.
        deliver: is called with each part of the answer and, at its end, with None, in the thread that generates it.

    What was delivered is the beginning of `text`, whatever follows. `finish_reason` is `"stop"`, `"length"`, or None
    while it goes on. `abandoned` is set where nobody listens any more.
    """

    def __init__(
        self,
        task: Any,
        tokenizer: Any,
        tokens: list[int],
        *,
        eos_token_ids: Collection[int],
        max_tokens: int,
        stop: Sequence[str] = (),
        sampling: tuple[float, float] = (0.0, 1.0),
        strip: bool = True,
        deliver: Callable[[str | None], object] = lambda part: None,
    ) -> None:
        self.task, self.tokens, self.max_tokens, self.sampling = task, tokens, max_tokens, sampling
        self.text = ""
        self.finish_reason: str | None = None
        self.abandoned = False
        self._tokenizer, self._eos_token_ids, self._stop, self._deliver = tokenizer, eos_token_ids, stop, deliver
        self._strip = strip
        self._generated: list[int] = []

    @property
    def count(self) -> int:
        return len(self._generated)

    def append(self, token: int) -> None:
        """Add a new token, unless the answer has ended."""
        if self.finish_reason is not None:
            return
        ended = None
        if token in self._eos_token_ids:
            ended = STOP
        else:
            self._generated.append(token)
        # all of it: the text of a token depends on those before it
        text = self._tokenizer.decode(self._generated, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if places:
            text, ended = text[: min(places)], STOP
        elif ended is None:
            if self.count >= self.max_tokens:
                ended = LENGTH
            else:
                text = self._certain(text)
        if self._strip:
            text = text.strip()
        if new := text[len(self.text) :]:
            self.text = text
            self._deliver(new)
        if ended is not None:
            self.finish_reason = ended
            self._deliver(None)

    def _certain(self, text: str) -> str:
        """The beginning of a text that ends neither within a character nor within what may become a stop."""
        text = text.rstrip(_REPLACEMENT)
        lengths = (length for stop in self._stop for length in range(1, len(stop)) if text.endswith(stop[:length]))
        return text[: len(text) - max(lengths, default=0)]


class RequestCriteria(StoppingCriteria):
    """Adds each new token of a batch to its row's request, and stops the rows whose request has ended."""

    def __init__(self, requests: Sequence[GenerationRequest]) -> None:
        self._requests = requests

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        for request, token in zip(self._requests, input_ids[:, -1].tolist()):
            request.append(token)
        done = [request.finish_reason is not None or request.abandoned for request in self._requests]
        return torch.tensor(done, device=input_ids.device)


def generate_batch(
    generate: Callable[..., Any], tokenizer: Any, device: Any, requests: Sequence[GenerationRequest]
) -> None:
    """Answer requests of equal `sampling` together; each has ended or been abandoned afterwards.

    `generate` is called once, with a batch and options of transformers' `generate`.
    """
    rows = [{"input_ids": request.tokens, "attention_mask": [1] * len(request.tokens)} for request in requests]
    batch = tokenizer.pad(rows, padding_side="left", return_tensors="pt").to(device)
    temperature, top_p = requests[0].sampling
    drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    generate(
        dict(batch),
        max_new_tokens=max(request.max_tokens for request in requests),
        **PLAIN,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=None,  # each row has its own
        stopping_criteria=[RequestCriteria(requests)],
        **(drawn if temperature >= _LEAST_TEMPERATURE else {"do_sample": False}),
    )
