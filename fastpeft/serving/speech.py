"""What is said to one request, token by token: where it ends, and what of it a client may already read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

STOP, LENGTH = "stop", "length"  # why nothing more is said
_COLDEST = 1e-3  # a temperature below it says the most likely words: divided by less, scores are not finite
_HALF = "\ufffd"  # what tokens of half a character are decoded to


class Saying:
    """A request for words, and what has been said to it so far.

    Args:
        task: that answers.
        tokenizer: of its run.
        tokens: of the prompt.
        ends: the tokens after which nothing more is said.
        max_tokens: the most that are said.
        stop: texts before the first of which the answer ends.
        sampling: temperature, 0 for the most likely words, and the share of likely words that are drawn from.
        strip: whether space around the answer is left out, as of a turn.
        deliver: is called with each part of the answer and, at its end, with None, in the thread that says it.

    Attributes:
        text: the answer so far. What was delivered is its beginning, whatever follows.
        count: the number of its tokens.
        ended: `"stop"`, `"length"`, or None while it goes on.
        abandoned: True where nobody listens any more.
    """

    def __init__(
        self,
        task: Any,
        tokenizer: Any,
        tokens: list[int],
        *,
        ends: Collection[int],
        max_tokens: int,
        stop: Sequence[str] = (),
        sampling: tuple[float, float] = (0.0, 1.0),
        strip: bool = True,
        deliver: Callable[[str | None], object] = lambda part: None,
    ) -> None:
        self.task, self.tokens, self.max_tokens, self.sampling = task, tokens, max_tokens, sampling
        self.text = ""
        self.ended: str | None = None
        self.abandoned = False
        self._tokenizer, self._ends, self._stop, self._deliver = tokenizer, ends, stop, deliver
        self._strip = strip
        self._said: list[int] = []

    @property
    def count(self) -> int:
        return len(self._said)

    def hear(self, token: int) -> None:
        """Go on by a token, unless the answer has ended."""
        if self.ended is not None:
            return
        ended = None
        if token in self._ends:
            ended = STOP
        else:
            self._said.append(token)
        # all of it: the text of a token depends on those before it
        text = self._tokenizer.decode(self._said, skip_special_tokens=True, clean_up_tokenization_spaces=False)
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
            self.ended = ended
            self._deliver(None)

    def _certain(self, text: str) -> str:
        """The beginning of a text that ends neither within a character nor within what may become a stop."""
        text = text.rstrip(_HALF)
        lengths = (length for stop in self._stop for length in range(1, len(stop)) if text.endswith(stop[:length]))
        return text[: len(text) - max(lengths, default=0)]


class Hearing(StoppingCriteria):
    """Hands each new token of a batch to its row's `Saying`, and ends rows that have ended.

    Args:
        sayings: of the rows.
    """

    def __init__(self, sayings: Sequence[Saying]) -> None:
        self._sayings = sayings

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        for saying, token in zip(self._sayings, input_ids[:, -1].tolist()):
            saying.hear(token)
        done = [saying.ended is not None or saying.abandoned for saying in self._sayings]
        return torch.tensor(done, device=input_ids.device)


def say(generate: Callable[..., Any], tokenizer: Any, device: Any, sayings: Sequence[Saying]) -> None:
    """Answer requests of equal `sampling` together.

    Args:
        generate: called with a batch and options of transformers' `generate`.
        tokenizer: pads the batch.
        device: of the model.
        sayings: the requests; each of them has ended or been abandoned afterwards.
    """
    rows = [{"input_ids": saying.tokens, "attention_mask": [1] * len(saying.tokens)} for saying in sayings]
    batch = tokenizer.pad(rows, padding_side="left", return_tensors="pt").to(device)
    temperature, top_p = sayings[0].sampling
    drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    generate(
        dict(batch),
        max_new_tokens=max(saying.max_tokens for saying in sayings),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=None,  # each row has its own ends
        stopping_criteria=[Hearing(sayings)],
        **(drawn if temperature >= _COLDEST else {"do_sample": False}),
    )
