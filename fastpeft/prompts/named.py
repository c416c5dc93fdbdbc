"""The manual prompts of LM-BFF by the names of their tasks, and prompts as written on a command line.

Source: Gao, Fisch & Chen 2021, "Making pre-trained language models better few-shot learners", Table 1; MPQA from the
same authors' settings. Their code also drops the last character of a pair's first text and lower-cases the first
letter of its second; here texts stay as they are.

Classes carry the names, and stand in the order, of the usual copies on the hub: GLUE, `stanfordnlp/snli`,
`CogComp/trec`, `cornell-movie-review-data/rotten_tomatoes` (MR), and SetFit's SST-5, CR, MPQA and
Subj. Data that only numbers its classes must number them in this order; LM-BFF's own files of Subj and TREC do not.
"""

from __future__ import annotations

from collections.abc import Mapping

from fastpeft.errors import FastpeftError, did_you_mean
from fastpeft.prompts.template import HEADS, MASK, Prompt, plain

AUTO = "auto"  # in place of a prompt: one is to be found, see `fastpeft.training.prompt_search`

_SENTIMENT = Prompt("{text} It was <mask>.", {"negative": "terrible", "positive": "great"})
_INFERENCE = Prompt("{a}? <mask>, {b}", {"entailment": "Yes", "neutral": "Maybe", "contradiction": "No"})
_ANSWERS = Prompt("{a}? <mask>, {b}", {"entailment": "Yes", "not_entailment": "No"})

NAMED_PROMPTS: Mapping[str, Prompt] = {
    "SST-2": _SENTIMENT,
    "SST-5": Prompt(
        "{text} It was <mask>.",
        {
            "very negative": "terrible",
            "negative": "bad",
            "neutral": "okay",
            "positive": "good",
            "very positive": "great",
        },
    ),
    "MR": _SENTIMENT,
    "CR": _SENTIMENT,
    "MPQA": _SENTIMENT,
    "Subj": Prompt("{text} This is <mask>.", {"objective": "objective", "subjective": "subjective"}),
    "TREC": Prompt(
        "<mask>: {text}",
        {
            "ABBR": "Expression",
            "ENTY": "Entity",
            "DESC": "Description",
            "HUM": "Human",
            "LOC": "Location",
            "NUM": "Number",
        },
    ),
    "CoLA": Prompt("{text} This is <mask>.", {"unacceptable": "incorrect", "acceptable": "correct"}),
    "MNLI": _INFERENCE,
    "SNLI": _INFERENCE,
    "QNLI": _ANSWERS,
    "RTE": _ANSWERS,
    "MRPC": Prompt("{a} <mask>, {b}", {"not_equivalent": "No", "equivalent": "Yes"}),
    "QQP": Prompt("{a} <mask>, {b}", {"not_duplicate": "No", "duplicate": "Yes"}),
}


def is_auto(prompt: str | None) -> bool:
    """Whether what is written asks for a prompt to be found."""
    return prompt is not None and prompt.casefold() == AUTO


def get_prompt(name: str) -> Prompt:
    """The prompt of a task, whatever the case and signs of its name: `SST-2` and `sst2` are one.

    Raises:
        FastpeftError: there is none.
    """
    by_name = {plain(known): prompt for known, prompt in NAMED_PROMPTS.items()}
    if plain(name) not in by_name:
        raise FastpeftError(
            f"no prompt is named {name!r}; there are {', '.join(NAMED_PROMPTS)}. Choose one, or write a template such "
            f"as '{_SENTIMENT.template}' with label words.{did_you_mean(plain(name), by_name)}"
        )
    return by_name[plain(name)]


def parse_prompt(prompt: str, label_words: str | None = None, head: str = HEADS[0]) -> Prompt | None:
    """A prompt as written on a command line.

    Args:
        prompt: a template, a name of `NAMED_PROMPTS`, `auto` or `none`.
        label_words: `terrible,great` in the order of the classes, or `negative=terrible,positive=great`. None: those
            of the named prompt.
        head: `label_words` or `classifier`.

    Returns:
        The prompt, or None for `none` and for `auto`, which is yet to be found; with a classifier, its template alone.

    Raises:
        FastpeftError: the name, the template or the words cannot be used, or come with `auto`.

    Example:
        >>> parse_prompt("sst2").label_words
        {'negative': 'terrible', 'positive': 'great'}
        >>> parse_prompt("{text} It was <mask>.", "bad,good").label_words
        {'0': 'bad', '1': 'good'}
    """
    if prompt.casefold() == "none":
        return None
    if is_auto(prompt):
        if label_words is not None:
            raise FastpeftError(
                f"the prompt {AUTO!r} finds a template and label words together, but label words are given too. Leave "
                "these out, or write the template."
            )
        if head not in HEADS:
            raise FastpeftError(f"the head {head!r} is not one of {', '.join(HEADS)}. Choose one of these.")
        return None
    is_template = "{" in prompt or MASK in prompt
    named = None if is_template else get_prompt(prompt)
    template = prompt if named is None else named.template
    if label_words is None:
        return Prompt(template, None if named is None else named.label_words, head)
    items = [item.strip() for item in label_words.split(",")]
    if not any("=" in item for item in items):
        return Prompt(template, items, head)
    pairs = [[side.strip() for side in item.split("=")] for item in items]
    if any(len(pair) != 2 for pair in pairs) or len(dict(pairs)) < len(pairs):
        raise FastpeftError(
            f"the label words {label_words!r} are neither words nor class=word pairs joined by commas, one for each "
            "class. Write terrible,great or negative=terrible,positive=great."
        )
    return Prompt(template, dict(pairs), head)
