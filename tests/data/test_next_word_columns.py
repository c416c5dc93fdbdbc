"""Which columns hold next words, and which rows are refused before anything is learned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from samples import chats, completions, write_jsonl

from fastpeft import FastpeftError
from fastpeft.data.examples import load_data, load_rows
from fastpeft.data.problems import NEXT_WORDS


def test_what_an_answer_depends_on_is_not_lost(tmp_path: Path) -> None:
    rows = [{"instruction": "add", "input": f"{row}", "output": "a"} for row in range(4)]
    file = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    with pytest.raises(FastpeftError, match=r"cannot tell which column .* instruction, input, output"):
        load_data(file, problem_type="next_words")
    assert load_data(file, problem_type="next_words", text_column="input,output").train.is_pair
    rows = [{"system": "be short", "prompt": "film", "completion": f"{row}"} for row in range(4)]
    with pytest.raises(FastpeftError, match=r"cannot tell which column .* system, prompt, completion"):
        load_data(str(write_jsonl(tmp_path / "rows.jsonl", rows)), problem_type="next_words")


@pytest.mark.parametrize(
    ("left_out", "message"),
    [("input", "cannot tell which column .* instruction, output, input"), ("output", "row 1 of .* has None in column")],
)
def test_columns_that_the_first_row_leaves_out_are_not_lost(tmp_path: Path, left_out: str, message: str) -> None:
    """As where rows of instructions have an `input` only if it says something."""
    names = ("instruction", "input", "output") if left_out == "input" else ("instruction", "output")
    rows = [{name: f"{name} {row}" for name in names} for row in range(4)]
    del rows[0][left_out]
    with pytest.raises(FastpeftError, match=message):
        load_data(str(write_jsonl(tmp_path / "rows.jsonl", rows)), problem_type="next_words")


def test_an_answer_beside_a_text_is_not_lost(tmp_path: Path) -> None:
    rows = [{"text": f"film {row}", "completion": "plot"} for row in range(4)]
    file = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    for load in (lambda: load_data(file, problem_type="next_words"), lambda: load_rows(file, [], NEXT_WORDS)):
        with pytest.raises(
            FastpeftError, match=r"has column 'completion' beside 'text'. Give --text-column text,compl"
        ):
            load()
    assert load_data(file, problem_type="next_words", text_column="text,completion").train.is_pair
    assert not load_data(file, problem_type="next_words", text_column="text").train.is_pair
    whole = [{"instruction": "add", "input": f"{row}", "output": "a", "text": f"add {row}: a"} for row in range(4)]
    data = load_data(str(write_jsonl(tmp_path / "whole.jsonl", whole)), problem_type="next_words", split=False)
    assert data.train.texts[0] == "add 0: a"


def test_a_target_beside_a_source_is_not_lost(tmp_path: Path) -> None:
    file = str(write_jsonl(tmp_path / "rows.jsonl", [{"source": "film", "target": text} for text in "abcd"]))
    with pytest.raises(FastpeftError, match=r"has column 'target' beside 'source'. Give --text-column source,target"):
        load_data(file, problem_type="next_words")


def test_a_summary_beside_a_text_is_not_lost(tmp_path: Path) -> None:
    file = str(write_jsonl(tmp_path / "rows.jsonl", [{"document": "film", "summary": "plot", "id": n} for n in "abcd"]))
    with pytest.raises(FastpeftError, match=r"has column 'summary' beside 'document'. Give --text-column document,su"):
        load_data(file, problem_type="next_words")


def test_an_answer_in_turns_of_its_own_is_told_of(tmp_path: Path) -> None:
    asked, said = ([{"role": role, "content": "film"}] for role in ("user", "assistant"))
    file = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": asked, "completion": said}] * 4)
    with pytest.raises(FastpeftError, match="has turns in column 'prompt', and what answers them in"):
        load_data(str(file), problem_type="next_words")


def test_rows_to_say_are_told_from_rows_with_classes(tmp_path: Path) -> None:
    pairs = {"prompt": "film", "completion": "plot"}, {"instruction": "Tell.", "input": "film", "output": "plot"}
    for rows in (*([pair] * 4 for pair in pairs), chats(4)):
        with pytest.raises(FastpeftError, match="train a language model on these texts, give --objective causal"):
            load_data(str(write_jsonl(tmp_path / "rows.jsonl", rows)))


def test_what_an_answer_depends_on_too_is_named(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [{"Instruction": "Tell.", "Input": "film", "Output": "plot"}] * 4)
    with pytest.raises(FastpeftError, match=r"depends on 'Input' too, write that into 'Instruction' first"):
        load_data(str(file), problem_type="next_words")


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([{"role": "user", "content": "film"}], "no turn of the assistant"),
        ([{"role": "user", "content": " "}], "turn 1, of the user, with nothing in it"),
        ([{"role": "human", "content": "film"}], "turn 1 with the role 'human'.*Roles are system, user, assistant"),
        (
            [{"from": "human", "value": "film"}],
            "turn 1 without a role, but with 'from' and 'value'.*Write a list",
        ),
        ([{"role": "user", "content": None}], "turn 1 with the content None"),
        (
            [{"role": "user", "content": "film"}, {"role": "system", "content": "plot"}],
            "a turn of the system as turn 2.*It comes first",
        ),
        (["film"], r"\['film'\] in column 'messages'"),
    ],
)
def test_conversations_that_cannot_be_learned(tmp_path: Path, turns: Sequence[Any], message: str) -> None:
    file = write_jsonl(tmp_path / "chats.jsonl", [*chats(4), {"messages": turns}])
    with pytest.raises(FastpeftError, match=f"row 5 of .*{message}"):
        load_data(str(file), problem_type="next_words")


def test_an_empty_completion_is_refused(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [*completions(4), {"prompt": "film", "completion": " "}])
    with pytest.raises(FastpeftError, match=r"row 5 of .* is empty in column 'completion'"):
        load_data(str(file), problem_type="next_words")
