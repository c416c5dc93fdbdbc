"""Templates, label words, texts to tokens and named prompts, in three families of tokenizers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from tokenizers_for_prompts import FAMILIES, WORDS, make_tokenizer

import fastpeft
from fastpeft import FastpeftError, Prompt, PromptCollator
from fastpeft.prompts.named import NAMED_PROMPTS, get_prompt, parse_prompt

SINGLE = Prompt("{text} it was <mask>.", {0: "terrible", 1: "great"})
PAIR = Prompt("{a}? <mask>, {b}", {"entailment": "yes", "neutral": "maybe", "contradiction": "no"})
FIRST = Prompt("<mask>: {text}", ["bad", "good"])


@pytest.fixture(scope="module", params=FAMILIES)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return make_tokenizer(request.param)


@pytest.fixture(scope="module")
def word_piece() -> Any:
    return make_tokenizer("word-piece")


def tokens(tokenizer: Any, row: dict[str, Any]) -> list[str]:
    """A row's tokens in one spelling for all families: no special marks, no signs of spaces."""
    names = {tokenizer.cls_token: "<", tokenizer.sep_token: ">", tokenizer.mask_token: "M"}
    raw = (names.get(token, token.strip("Ġ▁")) for token in tokenizer.convert_ids_to_tokens(row["input_ids"]))
    return [token for token in raw if token]


# -- texts to tokens ---------------------------------------------------------------------------------------------------


def test_cases_by_hand(tokenizer: Any) -> None:
    cases = [
        (SINGLE, "a lovely film", "< a lovely film it was M . >"),
        (SINGLE, "  a film ", "< a film it was M . >"),
        (SINGLE, "", "< it was M . >"),
        (FIRST, "a film", "< M : a film >"),
        (PAIR, ("this is good", "the plot is dull"), "< this is good ? M , the plot is dull >"),
        (PAIR, ("", ""), "< ? M , >"),
        (Prompt("{b} <mask> {a}", ["yes", "no"]), ("good", "bad"), "< bad M good >"),
    ]
    for prompt, text, expected in cases:
        (row,) = prompt.encode(tokenizer, [text])
        assert tokens(tokenizer, row) == expected.split()
        assert row["input_ids"][row["mask_positions"]] == tokenizer.mask_token_id
        assert set(row) == {*tokenizer.model_input_names, "mask_positions"}
        assert {len(row[name]) for name in tokenizer.model_input_names} == {len(row["input_ids"])}


def test_tokens_are_those_of_the_whole_line(tokenizer: Any) -> None:
    (row,) = SINGLE.encode(tokenizer, ["this is a film, and it is long."])
    line = f"this is a film, and it is long. it was {tokenizer.mask_token}."
    assert row["input_ids"] == tokenizer(line)["input_ids"]


def test_a_mask_in_the_text_is_not_taken_for_the_templates(tokenizer: Any) -> None:
    (row,) = SINGLE.encode(tokenizer, [f"a {tokenizer.mask_token} film"])
    assert row["input_ids"].count(tokenizer.mask_token_id) == 2
    (plain,) = SINGLE.encode(tokenizer, ["a film"])
    from_the_end = [len(r["input_ids"]) - r["mask_positions"] for r in (row, plain)]
    assert from_the_end[0] == from_the_end[1]


def test_a_classification_head_gets_the_same_line(tokenizer: Any) -> None:
    (words,) = SINGLE.encode(tokenizer, ["a film"])
    (line,) = Prompt(SINGLE.template, head="classifier").encode(tokenizer, ["a film"])
    assert line == {name: value for name, value in words.items() if name != "mask_positions"}


def test_labels_stay_with_their_texts(word_piece: Any) -> None:
    rows = SINGLE.encode(word_piece, ["good", "bad", "dull"], labels=[1, 0, 0])
    assert [row["labels"] for row in rows] == [1, 0, 0]
    assert SINGLE.encode(word_piece, []) == []


@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        (["good", "bad"], [0], "2 texts and 1 labels"),
        (["good"], [0, 1], "1 texts and 2 labels"),
        (["good", "bad"], [0, 2], "a label is 2; .* from 0 to 1"),
        (["good"], ["great"], "a label is 'great'"),
        (["good"], [-1], "a label is -1"),
        ("good", None, "texts is one text, 'good'"),
    ],
)
def test_labels_that_are_none_are_refused(word_piece: Any, texts: Any, labels: Any, message: str) -> None:
    with pytest.raises(FastpeftError, match=message):
        SINGLE.encode(word_piece, texts, labels)


def test_a_head_of_its_own_takes_any_label(word_piece: Any) -> None:
    (row,) = Prompt("{text} it was", head="classifier").encode(word_piece, ["good"], [0.5])
    assert row["labels"] == 0.5


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (13, "< the plot is very long ? M , this is bad >"),
        (12, "< the plot is very ? M , this is bad >"),
        (10, "< the plot ? M , this is bad >"),
        (5, "< ? M , >"),
    ],
)
def test_the_longer_text_is_cut_first(word_piece: Any, limit: int, expected: str) -> None:
    (row,) = PAIR.encode(word_piece, [("the plot is very long", "this is bad")], max_length=limit)
    assert tokens(word_piece, row) == expected.split()


@pytest.mark.parametrize("line", ["it was.  ", "a      b     c\n", "    x = 1\n", "good ☕ "])
def test_spaces_of_a_text_are_cut_with_it(tokenizer: Any, line: str) -> None:
    """Some tokenizers make tokens of a space alone, which have no width."""
    (whole,) = SINGLE.encode(tokenizer, [line * 20])
    (row,) = SINGLE.encode(tokenizer, [line * 20], max_length=16)
    rest = len(SINGLE.encode(tokenizer, [""])[0]["input_ids"]) - 1  # without the token at the start
    assert row["input_ids"] == whole["input_ids"][: 16 - rest] + whole["input_ids"][-rest:]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_cutting_keeps_template_mask_and_starts_of_texts(data: st.DataObject) -> None:
    tokenizer = make_tokenizer(data.draw(st.sampled_from(FAMILIES)))
    text = st.lists(st.sampled_from([*WORDS, "naïve", "ok.", "☕", "zzz"]), max_size=12).map(" ".join)
    prompt = data.draw(st.sampled_from([SINGLE, PAIR, FIRST]))
    given_text = (data.draw(text), data.draw(text)) if prompt.is_pair else data.draw(text)
    (whole,) = prompt.encode(tokenizer, [given_text])
    (empty,) = prompt.encode(tokenizer, [("", "")] if prompt.is_pair else [""])
    # what cannot be cut beside the template is the first letter of a text, of up to 4 bytes, each a token to some
    limit = data.draw(st.integers(len(empty["input_ids"]) + (8 if "☕" in "".join(given_text) else 2), 40))
    (row,) = prompt.encode(tokenizer, [given_text], max_length=limit)
    assert len(row["input_ids"]) == min(limit, len(whole["input_ids"]))
    assert row["input_ids"][row["mask_positions"]] == tokenizer.mask_token_id
    kept, rest = tokens(tokenizer, row), iter(tokens(tokenizer, whole))
    assert all(token in rest for token in kept), "tokens are left out, none is changed or moved"
    assert set(tokens(tokenizer, empty)) <= set(kept)


PIECES = (
    *("<mask>", "[MASK]", "<s>", "</s>", "[SEP]", "[CLS]", "<pad>", "{text}", "▁", "##a", "\u200d", "\u0301", "\u3000"),
    *("\ufeff", "\0", "\x85", "\r\n", "\t", "\ud83d", "\udcff", "ﬃ", "İ", "👩‍👩‍👧", "great", " "),
)
ANY_TEXT = st.text(max_size=12) | st.lists(st.sampled_from(PIECES), max_size=6).map("".join)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_text_is_encoded_whole_or_cut_or_refused(data: st.DataObject) -> None:
    tokenizer = make_tokenizer(data.draw(st.sampled_from(FAMILIES)))
    prompt = data.draw(st.sampled_from([SINGLE, PAIR, FIRST]))
    texts = data.draw(st.lists(st.tuples(ANY_TEXT, ANY_TEXT) if prompt.is_pair else ANY_TEXT, max_size=3))
    limit = data.draw(st.none() | st.integers(-3, 30))
    half, fault = any("\ud800" <= letter <= "\udfff" for text in texts for letter in "".join(text)), ""
    try:
        rows = prompt.encode(tokenizer, texts, max_length=limit)
    except FastpeftError as error:
        fault = str(error)
    assert ("holds half a character" in fault) == half
    if fault:
        assert half or "leaves no room" in fault
        return
    assert len(rows) == len(texts)
    for row in rows:
        assert len(row["input_ids"]) <= (limit or tokenizer.model_max_length)
        assert row["input_ids"][row["mask_positions"]] == tokenizer.mask_token_id
        assert all(0 <= token < len(tokenizer) for token in row["input_ids"])
        assert row["attention_mask"] == [1] * len(row["input_ids"])


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([*PIECES, "{a}", "{b}", "{}", "<mask>", " it was "]), max_size=6).map("".join),
    st.none()
    | st.lists(ANY_TEXT, max_size=3)
    | ANY_TEXT
    | st.dictionaries(st.integers(-1, 3) | ANY_TEXT, ANY_TEXT, max_size=3),
    st.sampled_from(["label_words", "classifier", "tail"]),
)
def test_any_prompt_is_one_or_refused(template: str, words: Any, head: str) -> None:
    try:
        prompt = Prompt(template, words, head)
    except FastpeftError:
        return
    assert Prompt.from_values(json.loads(json.dumps(prompt.values()))) == prompt
    assert prompt.is_pair or "{text}" in template
    tokenizer = make_tokenizer("byte-level")
    (row,) = prompt.encode(tokenizer, [("a film", "dull") if prompt.is_pair else "a film"])
    if head == "label_words":
        assert row["input_ids"][row["mask_positions"]] == tokenizer.mask_token_id


def test_collator_pads_masks_on_the_right_whatever_side_a_tokenizer_prefers(word_piece: Any) -> None:
    rows = SINGLE.encode(word_piece, ["good", "a very long story", ""], labels=[1, 0, 1])
    for side in ("right", "left"):
        tokenizer = copy.deepcopy(word_piece)
        tokenizer.padding_side = side
        batch = PromptCollator(tokenizer, pad_to_multiple_of=8)(rows)
        arrays = PromptCollator(tokenizer, pad_to_multiple_of=8, return_tensors="np")(rows)
        assert all((array == batch[name].numpy()).all() for name, array in arrays.items())
        assert tokenizer.padding_side == side
        assert batch["input_ids"].shape == (3, 16 if len(rows[1]["input_ids"]) > 8 else 8)
        at_mask = batch["input_ids"].gather(1, batch["mask_positions"][:, None])
        assert (at_mask == word_piece.mask_token_id).all()
        assert batch["attention_mask"].sum(1).tolist() == [len(row["input_ids"]) for row in rows]
        assert batch["labels"].tolist() == [1, 0, 1]
        for row, ids, mask in zip(rows, batch["input_ids"], batch["attention_mask"]):
            assert ids[: len(row["input_ids"])].tolist() == row["input_ids"]
            assert mask.tolist() == sorted(mask.tolist(), reverse=True)


def test_labels_are_read_by_position(word_piece: Any) -> None:
    """Those of a shuffled pandas Series have numbers of their own."""
    pandas = pytest.importorskip("pandas")
    labels = pandas.Series([1, 0], index=[1, 0])
    texts = pandas.Series(["good", "bad"], index=[1, 0])
    assert [row["labels"] for row in SINGLE.encode(word_piece, texts, labels)] == [1, 0]
    for kind in (bool, float):
        assert [row["labels"] for row in SINGLE.encode(word_piece, texts, labels.astype(kind))] == [1, 0]
    for table in (pandas.DataFrame({"text": texts}), {"text": [*texts]}):
        with pytest.raises(FastpeftError, match=r"texts is a table, a .* Give a column"):
            SINGLE.encode(word_piece, table)


# -- label words -------------------------------------------------------------------------------------------------------


def test_label_words_are_the_tokens_of_a_filled_line(tokenizer: Any) -> None:
    for prompt in (SINGLE, PAIR):
        for word, token in zip(prompt.label_words.values(), prompt.label_ids(tokenizer)):
            line = prompt.template.replace("<mask>", word)
            line = line.format(text="this is", a="this is", b="a film")
            assert tokenizer(line)["input_ids"].count(token) == 1
            assert tokenizer.decode([token]).strip() == word


def test_leading_space_follows_the_template() -> None:
    """As of the published RoBERTa, whose tokenizer puts no space before a line."""
    tokenizer = copy.deepcopy(make_tokenizer("byte-level"))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spaced, bare = ["Ġin", "Ġre"], ["in", "re"]
    for template, words, expected in (
        ("{text} <mask>", ["in", "re"], spaced),
        ("{text} <mask>", [" in", " re"], spaced),
        ("<mask> {text}", ["in", "re"], bare),
        ("<mask> {text}", [" in", " re"], bare),
        ("{text} It:<mask>", ["in", "re"], bare),
        ("{text} It:<mask>", [" in", " re"], spaced),
    ):
        ids = Prompt(template, words).label_ids(tokenizer)
        assert tokenizer.convert_ids_to_tokens(ids) == expected


def test_classes_that_are_numbers_of_numpy_are_in_their_order() -> None:
    prompt = Prompt("{text} <mask>", {np.int64(1): "great", np.int64(0): "terrible"})
    assert [*(prompt.label_words or {}).items()] == [("0", "terrible"), ("1", "great")]


@pytest.mark.parametrize(
    ("template", "end"), [("{text}\n<mask>", "Ċ"), ("{text}:\t <mask>", "ĉ"), ("{text}: <mask>", ":")]
)
def test_a_decoder_reads_the_line_break_that_its_words_follow(template: str, end: str) -> None:
    tokenizer = copy.deepcopy(make_tokenizer("byte-level"))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.mask_token = None
    prompt = Prompt(template, ["in", "re"])
    (row,) = prompt.encode(tokenizer, ["a film"])
    words = [row["input_ids"] + [word] for word in prompt.label_ids(tokenizer)]
    assert tokenizer.convert_ids_to_tokens(row["input_ids"])[-1] == end
    assert [tokenizer.decode(line, skip_special_tokens=True) for line in words] == [
        template.replace("{text}", "a film").replace("<mask>", word) for word in ("in", "re")
    ]


@pytest.mark.parametrize("word", ["terribleness", "very good", "zz", "☕"])
def test_a_word_of_several_tokens_is_told_with_neighbours(tokenizer: Any, word: str) -> None:
    with pytest.raises(FastpeftError, match="each label word must be one token") as caught:
        Prompt(SINGLE.template, [word, "great"]).label_ids(tokenizer)
    if word == "terribleness":
        assert "Near it are terrible" in str(caught.value)


def test_words_that_the_tokenizer_does_not_tell_apart(word_piece: Any) -> None:
    with pytest.raises(FastpeftError, match=r"'Great' and 'great' are the same token"):
        Prompt(SINGLE.template, ["Great", "great"]).label_ids(word_piece)


def test_words_follow_the_classes_of_the_data() -> None:
    prompt = Prompt(SINGLE.template, {"negative": "bad", "positive": "good"})
    assert prompt.for_labels(["positive", "negative"]).label_words == {"positive": "good", "negative": "bad"}
    assert prompt.for_labels(["positive", "negative"]).labels == ["positive", "negative"], "the order of the logits"
    assert prompt.for_labels(["Positive ", "NEGATIVE"]).label_words == {"Positive ": "good", "NEGATIVE": "bad"}
    assert prompt.for_labels(["0", "1"]).label_words == {"0": "bad", "1": "good"}
    assert SINGLE.for_labels(["no", "yes"]).label_words == {"no": "terrible", "yes": "great"}
    assert SINGLE.for_labels(["yes", "no"]).labels == ["yes", "no"]
    assert Prompt(SINGLE.template, {1: "good", 0: "bad"}) == Prompt(SINGLE.template, ["bad", "good"])
    template = Prompt(SINGLE.template, {"negative": "bad", "positive": "good"}, head="classifier")
    assert template.for_labels(["mixed", "0", "1"]) == template
    assert template.for_labels(["0", "1"]).label_words == {"0": "bad", "1": "good"}
    assert template.for_labels(["Negative", "Positive"]).label_words == {"Negative": "bad", "Positive": "good"}
    for names in (["-1", "1"], ["C", "C++"], ["-", "+"]):  # which differ in signs alone
        signed = Prompt(SINGLE.template, dict(zip(names, ["bad", "good"])))
        assert signed.for_labels(names) == signed
        assert signed.for_labels(names[::-1]).label_words == {names[1]: "good", names[0]: "bad"}
        assert signed.for_labels(["0", "1"]).label_words == {"0": "bad", "1": "good"}
        with pytest.raises(FastpeftError, match=f"no word for {names[0]}x"):
            signed.for_labels([f"{names[0]}x", names[1]])
    numbered = Prompt(SINGLE.template, {"1": "great", "0": "terrible"})
    assert numbered.for_labels(["1", "0"]).label_words == {"1": "great", "0": "terrible"}
    stars = Prompt(SINGLE.template, {2: "good", 1: "bad"})
    assert stars.for_labels(["1", "2"]).label_words == {"1": "bad", "2": "good"}
    with pytest.raises(FastpeftError, match="no word for mixed"):
        prompt.for_labels(["negative", "positive", "mixed"])
    with pytest.raises(FastpeftError, match="words for unknown negative"):
        prompt.for_labels(["positive"])
    with pytest.raises(FastpeftError, match="no word for 0, 1, 2"):
        prompt.for_labels(["0", "1", "2"])


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{text} It was good.", ["a", "b"]), "has no <mask>"),
        (("{text} <mask> or <mask>", ["a", "b"]), "has 2 <mask>"),
        (("It was <mask>.", ["a", "b"]), "has no place for a text"),
        (("{text} {text} <mask>", ["a", "b"]), "once"),
        (("{a} <mask>", ["a", "b"]), "{a} and {b} once each"),
        (("{text} {b} <mask>", ["a", "b"]), "has {text}, {b}"),
        (("{sentence} <mask>", ["a", "b"]), "has {sentence}"),
        (("{text} <mask>",), "has no label words"),
        (("{text} <mask>", {"no": "bad", "yes": " "}), "class 'yes' has no label word"),
        (("{text} <mask>", ["bad", "bad"]), "'bad' for several classes"),
        (("{text} <mask>", {"bad", "good"}), "are a set"),
        (("{text} <mask>", ["bad"]), "1 of them"),
        (("{text} <mask>", "bad"), "1 of them"),
        (("{text} <mask>", []), "0 of them"),
        (("{text} <mask>", ["bad", "good"], "words"), "allowed are label_words and classifier"),
        (("{text} <mask> <mask>", None, "classifier"), "has 2 <mask>"),
    ],
)
def test_bad_prompts(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(FastpeftError) as caught:
        Prompt(*arguments)
    assert message in str(caught.value)


def test_bad_texts(word_piece: Any) -> None:
    for prompt, text in ((SINGLE, ("a", "b")), (PAIR, "a"), (PAIR, ("a", None)), (SINGLE, None)):
        with pytest.raises(FastpeftError, match=r"takes (one text|a pair of texts) a row"):
            prompt.encode(word_piece, [text])
    for limit in (5, 0):
        with pytest.raises(FastpeftError, match="which alone takes 6 tokens"):
            SINGLE.encode(word_piece, ["good"], max_length=limit)
    with pytest.raises(FastpeftError, match=r"no room for the template 'very very .{1,9}\.\.\..{1,12}<mask>\.', which"):
        Prompt(f"{'very ' * 99}{{text}} it was <mask>.", SINGLE.label_words).encode(word_piece, ["good"], max_length=9)


def test_tokenizers_that_cannot_fill_a_template() -> None:
    tokenizer = copy.deepcopy(make_tokenizer("word-piece"))
    tokenizer.mask_token = None
    with pytest.raises(FastpeftError, match="has no mask token"):
        Prompt(SINGLE.template, head="classifier").encode(tokenizer, ["good"])
    with pytest.raises(FastpeftError, match=r"has \{b\} after <mask>.*Put the texts before it"):
        Prompt("{a}? <mask>, {b}", {0: "no", 1: "yes"}).encode(tokenizer, [("good", "bad")])
    (row,) = Prompt("Review: {text}", head="classifier").encode(tokenizer, ["good"])
    assert tokens(tokenizer, row) == ["<", *"r", "##e", "##v", "##i", "##e", "##w", ":", "good", ">"]


# -- files and names ---------------------------------------------------------------------------------------------------


def test_saved_and_loaded(tmp_path: Path) -> None:
    for prompt in (SINGLE, PAIR, Prompt("{text}", head="classifier")):
        prompt.save(tmp_path / "new" / "folder")
        assert Prompt.load(tmp_path / "new" / "folder") == prompt
    (tmp_path / "prompt.json").write_text('{"template": "{text}"}')
    with pytest.raises(FastpeftError, match="is no prompt"):
        Prompt.load(tmp_path)


def test_every_task_has_its_prompt() -> None:
    names = ["SST-2", "SST-5", "MR", "CR", "MPQA", "Subj", "TREC", "CoLA", "MNLI", "SNLI", "QNLI", "RTE", "MRPC", "QQP"]
    assert list(NAMED_PROMPTS) == names
    assert {name for name in names if get_prompt(name).is_pair} == {"MNLI", "SNLI", "QNLI", "RTE", "MRPC", "QQP"}
    classes = {name: len(get_prompt(name).labels) for name in names}
    assert classes == dict.fromkeys(names, 2) | {"SST-5": 5, "TREC": 6, "MNLI": 3, "SNLI": 3}
    assert get_prompt("sst2") is get_prompt("SST-2")
    with pytest.raises(FastpeftError, match=r"'sst3'.*Did you mean sst5 or sst2\?"):
        get_prompt("sst3")
    with pytest.raises(FastpeftError, match=r"'MN'.*Did you mean mnli\?"):
        get_prompt("MN")


def test_prompts_as_written_on_a_command_line() -> None:
    assert parse_prompt("none") is None
    assert parse_prompt("trec") == get_prompt("TREC")
    assert parse_prompt("sst-2", "bad, good").label_words == {"0": "bad", "1": "good"}
    written = parse_prompt(SINGLE.template, "no=bad,yes=good", "classifier")
    assert written == Prompt(SINGLE.template, {"no": "bad", "yes": "good"}, "classifier")
    for text in ("no=bad,good", "no=bad,no=good", "no=bad=worse,yes=good"):
        with pytest.raises(FastpeftError, match="neither words nor class=word pairs"):
            parse_prompt("sst-2", text)
    with pytest.raises(FastpeftError, match="has no place for a text"):
        parse_prompt("It was <mask>.", "bad,good")


def test_public_names() -> None:
    assert {"Prompt", "PromptModel", "PromptCollator"} <= set(dir(fastpeft))
