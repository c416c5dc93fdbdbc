"""Next words as what is learned: of texts, of completions after prompts, and of the assistant's turns."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from samples import (
    FIRST,
    chats,
    completions,
    for_one_row,
    reviews,
    save_tiny_decoder,
    save_tiny_model,
    write_csv,
    write_jsonl,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from fastpeft import FastpeftError, TrainConfig, train
from fastpeft.cli import app
from fastpeft.data import scores
from fastpeft.data.conversations import Conversation
from fastpeft.data.examples import load_data, load_rows
from fastpeft.data.names import UNLABELLED
from fastpeft.data.next_words import completion, encode_counted, end_of_turn, end_tokens, opening, prompt_tokens
from fastpeft.data.problems import NEXT_WORDS
from fastpeft.ops.fused_head import LazyLogits
from fastpeft.training import evaluation
from fastpeft.training.evaluation import evaluate, evaluate_causal_lm
from fastpeft.training.generation import TextGenerator, generate, measure_generations
from fastpeft.training.loading import load_run
from fastpeft.training.prediction import Predictor, predict
from fastpeft.training.prediction_files import Predictions


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a decoder, whose tokenizer has a chat template, and rows of each form."""
    place = tmp_path_factory.mktemp("place")
    save_tiny_decoder(place / "model")
    write_jsonl(place / "completions.jsonl", completions(90))
    write_jsonl(place / "chats.jsonl", chats(90))
    (place / "texts.txt").write_text("".join(f"{text}\n" for text, _ in reviews(90)))
    return place


@pytest.fixture(scope="module")
def tokenizer(place: Path) -> Any:
    return AutoTokenizer.from_pretrained(place / "model")


@pytest.fixture
def config(tmp_path: Path, place: Path) -> TrainConfig:
    return TrainConfig(
        output=str(tmp_path / "run"),
        method="full",
        objective="causal",
        model=str(place / "model"),
        data=str(place / "completions.jsonl"),
        batch_size=8,
        max_steps=4,
        learning_rate=1e-2,
    )


def learned(tokenizer: Any, row: dict[str, Any]) -> str:
    """The words with a label, each of which is its own token."""
    pairs = [(token, label) for token, label in zip(row["input_ids"], row["labels"]) if label != UNLABELLED]
    assert all(token == label for token, label in pairs)
    return str(tokenizer.decode([token for token, _ in pairs]))


def test_what_is_learned_of_each_form(tokenizer: Any) -> None:
    good = FIRST["positive"]
    chat = Conversation((("user", "film"), ("assistant", good), ("user", "plot"), ("assistant", "film")))
    (text, pair, turns), _ = encode_counted(tokenizer, [f"film {good}", ("film plot", good), chat], 38)
    assert tokenizer.decode(text["input_ids"]) == f"<s> film {good} </s>"
    assert learned(tokenizer, text) == f"film {good} </s>", "all but the first, which nothing comes before"
    assert tokenizer.decode(pair["input_ids"]) == f"<s> film plot {good} </s>", "one end, after all"
    assert learned(tokenizer, pair) == f"{good} </s>"
    whole = tokenizer.apply_chat_template(chat.messages, tokenize=False)
    assert turns["input_ids"] == tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert learned(tokenizer, turns) == f"{good} </s> film </s>", "the assistant's turns and their ends alone"
    assert completion(chat) == "film"
    asked = tokenizer.apply_chat_template(chat.messages[:3], tokenize=False, add_generation_prompt=True)
    assert prompt_tokens(tokenizer, chat) == tokenizer(asked, add_special_tokens=False)["input_ids"]


def test_a_turn_ends_by_a_special_token_without_a_name(tokenizer: Any, tmp_path: Path) -> None:
    """As by Llama 3's `<|eot_id|>`, which its base's tokenizer holds among the added tokens alone."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([tokenizers.AddedToken("<|turn|>", special=True)], special_tokens=True)
    tokenizer.chat_template = tokenizer.chat_template.replace("</s>", "<|turn|> film")  # ChatML has a line break there
    tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    assert turn not in tokenizer.all_special_ids
    assert end_tokens(tokenizer, chats=True) == {tokenizer.eos_token_id, turn}
    assert end_tokens(tokenizer, chats=False) == {tokenizer.eos_token_id}


def test_a_template_that_ends_no_turn_is_told(place: Path, config: TrainConfig, tokenizer: Any, tmp_path: Path) -> None:
    """Also where special tokens stand before the words."""
    endless = copy.deepcopy(tokenizer)
    endless.chat_template = "{% for m in messages %}<s>{{ m.role }} {{ m.content }} {% endfor %}"
    assert end_of_turn(tokenizer) == {tokenizer.eos_token_id}
    assert end_of_turn(endless) == set()
    assert end_tokens(endless, chats=True) == {tokenizer.eos_token_id}
    model = shutil.copytree(place / "model", tmp_path / "model")
    endless.save_pretrained(model)
    chats_of = replace(config, data=str(place / "chats.jsonl"), max_steps=1)
    warned = "writes no special token after what the assistant says"
    assert not any(warned in each for each in train(chats_of).metrics["warnings"])
    of_endless = replace(chats_of, model=str(model), output=str(tmp_path / "endless"))
    assert any(warned in each for each in train(of_endless).metrics["warnings"])


def test_a_template_that_begins_the_answer_where_it_asks_for_one(config: TrainConfig, tmp_path: Path) -> None:
    """As some do with `<think>`: rows whose answers begin so are learned, saved and answered."""
    model = str(save_tiny_decoder(tmp_path / "base"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant {%", "assistant plot {%")
    tokenizer.save_pretrained(model)
    rows = chats(90)
    for row in rows:
        row["messages"][-1]["content"] = f"plot {row['messages'][-1]['content']}"
    train(replace(config, model=model, data=str(write_jsonl(tmp_path / "chats.jsonl", rows)), max_steps=150))
    assert generate(config.output, [f"film {FIRST['negative']} plot"]) == [FIRST["negative"]]


def test_begin_and_end_that_a_text_has_are_not_doubled(tokenizer: Any) -> None:
    """As of texts that a chat template wrote."""
    for bare, written in (("film plot", "<s> film plot </s>"), (("film", " plot"), ("<s> film", " plot</s>"))):
        rows, _ = encode_counted(tokenizer, [bare, written], 38)
        assert rows[0] == rows[1]
    assert prompt_tokens(tokenizer, "<s> film") == prompt_tokens(tokenizer, "film")


def test_an_end_that_a_prompt_has_is_read(tokenizer: Any) -> None:
    """As DialoGPT's, which stands between two turns; only one that the tokenizer adds is left out."""
    bare = copy.deepcopy(tokenizer)
    bare.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    for made in (bare, tokenizer):
        (row, _), _ = encode_counted(made, [("film </s>", "plot"), "film </s>"], 38)
        assert made.decode(row["input_ids"]) == "<s> film </s> plot </s>"
        assert made.decode(prompt_tokens(made, "film </s>")) == "<s> film </s>"


def test_an_end_that_stands_for_unknown_words_is_not_taken_for_one_that_is_added() -> None:
    """As in vocabularies of molecules or notes that have GPT-2's one special token."""
    words = Tokenizer(WordLevel({"<end>": 0, "C": 1, "O": 2}, "<end>"))
    words.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<end>", eos_token="<end>")
    assert prompt_tokens(made, "C C O") == [1, 1, 2]
    assert encode_counted(made, ["C C O"], 38)[0][0]["input_ids"] == [1, 1, 2, 0]


def test_rows_are_cut_and_those_with_nothing_to_learn_left_out(tokenizer: Any) -> None:
    rows, cut = encode_counted(tokenizer, [("film " * 9, "plot"), ("film", "plot " * 9), ("film", "plot")], 6)
    assert [len(row["input_ids"]) for row in rows] == [6, 4]
    assert cut == 2
    assert encode_counted(tokenizer, [("film", "plot")], 4)[1] == 0, "it has four tokens, and all of them are there"
    with pytest.raises(FastpeftError, match="no row has anything to learn within its first 2 tokens"):
        encode_counted(tokenizer, [("film plot", "plot")], 2)


@pytest.mark.parametrize("form", ["texts.txt", "completions.jsonl", "chats.jsonl"])
def test_a_run_measures_the_mean_loss_of_what_is_said(place: Path, config: TrainConfig, form: str) -> None:
    """By hand: the loss of each learned token by the logits of the token before it."""
    metrics = train(replace(config, data=str(place / form))).metrics
    run = load_run(config.output)
    rows, _ = encode_counted(
        run.loaded.tokenizer, load_data(str(place / form), problem_type="next_words").dev.texts, 38
    )
    losses = []
    for row in rows:
        logits = run.loaded.model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        found = cross_entropy(logits, torch.tensor(row["labels"][1:]), ignore_index=UNLABELLED, reduction="none")
        losses += [float(loss) for loss, label in zip(found, row["labels"][1:]) if label != UNLABELLED]
    assert metrics["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    assert metrics["next_accuracy"] >= metrics["next_accuracy_before"]
    assert evaluate(config.output, max_new_tokens=0)["loss"] == pytest.approx(metrics["loss"], abs=1e-5)


@pytest.mark.parametrize("form", ["completions.jsonl", "chats.jsonl"])
def test_a_run_says_what_it_has_learned(place: Path, config: TrainConfig, form: str) -> None:
    train(replace(config, data=str(place / form), max_steps=150))
    negative, positive = predict(config.output, [f"film {FIRST['negative']} plot", f"film {FIRST['positive']} plot"])
    assert (negative, positive) == (FIRST["negative"], FIRST["positive"])
    for most, cut in ((1, 1), (4, 0)):  # the word, and its end
        generator = TextGenerator(load_run(config.output), most)
        generator.generate([generator.encode(f"film {FIRST['negative']} plot")])
        assert generator.cut == cut
    measured = evaluate(config.output, str(place / form), max_new_tokens=4)
    assert measured["rouge_l"] > 0.9
    assert measured["prompts"] <= measured["dev_rows"]


def test_where_memory_is_not_enough_fewer_prompts_are_continued_at_once(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config)
    generator = TextGenerator(load_run(config.output), 3)
    encoded = [generator.encode(f"film {word}") for word in FIRST.values()]
    expected, cut = generator.generate(encoded), generator.cut
    model = generator.run.loaded.model
    monkeypatch.setattr(model, "generate", for_one_row(model.generate))
    assert (generator.generate(encoded), generator.cut) == (expected, 2 * cut)


@pytest.mark.parametrize("form", ["texts.txt", "completions.jsonl", "chats.jsonl"])
def test_a_decoder_is_measured_with_no_training(place: Path, config: TrainConfig, form: str) -> None:
    """As a run that has not learned anything."""
    untrained = replace(config, method="lora", learning_rate=1e-12, max_steps=1)
    train(replace(untrained, data=str(place / form)))
    found = evaluate_causal_lm(str(config.model), str(place / form), max_new_tokens=4)
    expected = evaluate(config.output, str(place / form), max_new_tokens=4)
    assert any("in the training data" in warning for warning in expected.pop("warnings"))
    assert not any("in the training data" in warning for warning in found.pop("warnings"))
    assert found == pytest.approx(expected)
    command = ["eval", "--model", str(config.model), "--objective", "causal", "--data", str(place / form)]
    said = CliRunner().invoke(app, [*command, "--max-new-tokens", "4"])
    assert said.exit_code == 0, said.output
    assert f"{found['loss']:.3f}" in said.output


def test_nothing_that_is_measured_makes_logits(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(logits: LazyLogits, name: str) -> Any:
        raise AssertionError(f"{name} makes all logits")

    monkeypatch.setattr(LazyLogits, "make", make)
    kinds: list[Any] = []
    digest = scores.digest_next_words
    monkeypatch.setattr(
        scores, "digest_next_words", lambda logits, *others: kinds.append(type(logits)) or digest(logits, *others)
    )
    metrics = train(replace(config, method="lora", learning_rate=1e-3)).metrics
    assert evaluate(config.output)["loss"] == pytest.approx(metrics["loss"], abs=1e-5)
    assert {*kinds} == {LazyLogits}


def test_too_many_new_tokens_are_refused_before_rows_are_measured(
    place: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "outputs_of", lambda *_: pytest.fail("rows were measured"))
    with pytest.raises(FastpeftError, match="max_new_tokens is 100000; it must be from 1 to"):
        evaluate_causal_lm(str(config.model), str(place / "completions.jsonl"), max_new_tokens=100_000)


def test_rows_of_a_file_are_gone_on_from(tmp_path: Path, place: Path, config: TrainConfig) -> None:
    train(config)
    file = write_jsonl(tmp_path / "new.jsonl", [{"id": 1, "prompt": "film plot"}, {"id": 2, "prompt": "film"}])
    found = Predictions(config.output, ["plot"], str(file), max_new_tokens=3)
    ((some, left_out),) = found
    assert not left_out
    assert [[*found.records(each)[0]] for each in some] == [["row", "text", "said", "id"]] * 3
    assert [found.records(each)[0]["id"] for each in some] == [None, 1, 2]
    assert [each.scores for each in some] == generate(config.output, ["plot", "film plot", "film"], 3)
    assert list(found.lines(some[0]))[-1] == ""
    words = write_jsonl(tmp_path / "words.jsonl", [{"tokens": ["film", "plot"]}])
    (([joined], _),) = Predictions(config.output, file=str(words), max_new_tokens=3)
    assert (joined.text, joined.scores) == ("film plot", some[1].scores), "lists of words are texts, as in training"
    train(replace(config, data=str(place / "chats.jsonl"), output=str(tmp_path / "chat")))
    asked = write_jsonl(tmp_path / "asked.jsonl", [{"messages": [{"role": "user", "content": "film"}]}])
    (([said], _),) = Predictions(str(tmp_path / "chat"), file=str(asked), max_new_tokens=3)
    assert [said.scores] == generate(tmp_path / "chat", ["film"], 3), "a text is a turn of the user"
    turns = [{"role": "user", "content": "film"}, {"role": "assistant", "content": "plot"}]
    told = Predictions(str(tmp_path / "chat"), file=str(write_jsonl(asked, [{"messages": turns}])), max_new_tokens=3)
    (([each], _),) = told
    assert (each.scores, told.records(each)[0]["text"]) == (said.scores, "user: film"), "what it was told to answer"
    written = write_csv(tmp_path / "written.csv", [(json.dumps(turns),)], ("messages",))
    (([], (error,)),) = Predictions(str(tmp_path / "chat"), file=str(written))
    assert "in column 'messages'. Write a list of turns" in str(error)


class Told:
    """A generator that answers as it is told to; of the prompt "long" it refuses."""

    cut, max_new_tokens = 1, 4

    def __init__(self, answers: Sequence[str], around: tuple[str, str] = ("", "")) -> None:
        self.answers, self.around = answers, around

    def encode(self, text: Any) -> Any:
        if text[0] == "long":
            raise FastpeftError("it is long")
        return text

    def generate(self, encoded: Sequence[Any]) -> Sequence[str]:
        assert len(encoded) == len(self.answers)
        return self.answers


def test_said_words_are_measured_by_the_completions_of_their_prompt_alone(caplog: pytest.LogCaptureFixture) -> None:
    """By hand: of 4 and 2 words said 5 and 7 were expected, so BLEU's brevity penalty is exp(1 - 12 / 6).

    Of two completions the nearer counts, here the first.
    """
    rows = [("a", "one two three four five"), ("a", "not this one at all"), ("b", "six seven eight nine ten x y")]
    told: Any = Told(["one two three four", "six seven"])
    measured = measure_generations(told, [("long", "z"), *rows, Conversation((("assistant", "z"),))])
    precisions = 6 / 6, 4 / 4, 2 / 2, 1 / 1
    assert measured["bleu"] == pytest.approx(100 * math.exp(1 - 12 / 6) * math.prod(precisions) ** 0.25)
    assert measured["rouge_l"] == pytest.approx((2 * 4 / (4 + 5) + 2 * 2 / (2 + 7)) / 2)
    assert measured["prompts"] == 2
    assert "1 of 3 prompts leave no room for new tokens within the model's maximum length" in caplog.text
    assert "1 of 3 prompts have completions that were cut off after 4 tokens" in caplog.text


def test_that_bleu_knows_no_short_answers_is_told(caplog: pytest.LogCaptureFixture) -> None:
    measured = measure_generations(Told(["yes", "no"]), [("a", "yes"), ("b", "no")])  # type: ignore[arg-type]
    assert (measured["bleu"], measured["rouge_l"]) == (0, 1)
    assert "no answer has 4 tokens, so BLEU, which counts runs of so many, is 0" in caplog.text


def test_what_stands_around_words_is_not_measured(place: Path, config: TrainConfig) -> None:
    """A thought that the template writes before each answer, and an end that a completion has written in it."""
    words = "one two three four five"
    for told, row in (
        (Told([f"<think>\n\n</think>\n\n{words}"], ("<think>\n\n</think>", "</s>")), ("a", words)),
        (Told([words], ("", "</s>")), ("a", f"{words}</s>")),
    ):
        measured = measure_generations(told, [row])  # type: ignore[arg-type]
        assert (measured["bleu"], measured["rouge_l"]) == (pytest.approx(100), 1)
    train(replace(config, data=str(place / "chats.jsonl"), max_steps=1))
    assert TextGenerator(load_run(config.output)).around == ("", "</s>")


def test_what_a_template_writes_before_an_answer_is_known(tokenizer: Any) -> None:
    assert opening(tokenizer) == ""
    thinks = copy.deepcopy(tokenizer)
    thinks.chat_template = (
        "{% for m in messages %}{{ m.role }} {% if m.role == 'assistant' %}plot film {% endif %}{{ m.content }}</s>"
        "{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
    )
    assert opening(thinks) == "plot film"
    opens = copy.deepcopy(tokenizer)
    opens.chat_template = (
        "{% for m in messages %}{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}plot{% endif %}"
    )
    assert opening(opens) == ""  # the data's answers begin so


def test_columns_that_training_found_are_taken_together_or_not_at_all(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    read = load_rows(str(file), [], NEXT_WORDS, found=("prompt,completion", None))
    assert read.texts == [("a", "b"), ("c", "d")]
    answers = write_jsonl(tmp_path / "answers.jsonl", [{"text": "a", "answer": "b"}])
    with pytest.raises(FastpeftError, match="has column 'answer' beside 'text'"):
        load_rows(str(answers), [], NEXT_WORDS, found=("text", None))


def test_what_conversations_have_beside_their_words_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows: list[dict[str, Any]] = [{**row, "system": "be short", "tools": []} for row in chats(4)]
    rows[0]["messages"] = [
        rows[0]["messages"][0],
        {**rows[0]["messages"][1], "tool_calls": [{}], "weight": 0, "name": None},
    ]
    load_data(str(write_jsonl(tmp_path / "rows.jsonl", rows)), problem_type="next_words")
    assert "of conversations only role and content are read, not system, tool_calls, weight" in caplog.text
    caplog.clear()
    load_data(str(write_jsonl(tmp_path / "rows.jsonl", chats(4))), problem_type="next_words")
    assert "are read" not in caplog.text


def test_conversations_in_a_csv_file_are_not_taken_for_texts(tmp_path: Path) -> None:
    for write in (json.dumps, str):
        file = write_csv(tmp_path / "rows.csv", [(write(row["messages"]),) for row in chats(4)], ("messages",))
        with pytest.raises(
            FastpeftError, match=r"row 1 of .* in column 'messages'. Write a list .* as jsonl and parquet"
        ):
            load_data(str(file), problem_type="next_words")


@pytest.mark.parametrize("method", ["full", "siva", "lst"])
def test_accumulated_parts_are_one_batch(tmp_path: Path, config: TrainConfig, method: str) -> None:
    """Completions of one and of eight words: every word counts alike, whatever part of the step it is in."""
    rows = [{"prompt": "film", "completion": " plot" * (1 + 7 * (row % 2))} for row in range(8)]
    for part in ("train", "dev"):
        write_jsonl(tmp_path / f"{part}.jsonl", rows)
    weights = []
    for size, parts in ((8, 1), (2, 4)):
        settings = {"gradient_accumulation_steps": parts, "optim": "sgd", "max_grad_norm": 0.0, "warmup_steps": 0}
        output = str(tmp_path / f"run{parts}")
        changes = {"data": str(tmp_path), "output": output, "method": method, "batch_size": size, "max_steps": 1}
        train(replace(config, settings=settings, learning_rate=0.1, **changes))
        weights.append(load_run(output).loaded.model.state_dict())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=0, atol=1e-6)


def test_prompts_are_on_one_side_of_the_split(tmp_path: Path) -> None:
    """Several completions of a prompt, as of E2E: none of a dev prompt is trained on."""
    rows = [{"prompt": f"film {prompt}", "completion": f"plot {n}"} for prompt in range(20) for n in range(3)]
    data = load_data(str(write_jsonl(tmp_path / "rows.jsonl", rows)), problem_type="next_words")
    trained, measured = ({prompt for prompt, _ in part.texts} for part in (data.train, data.dev))
    assert measured
    assert not trained & measured


def test_a_conversation_is_on_the_side_of_those_that_it_goes_on_from(tmp_path: Path) -> None:
    """Rows for every turn, as many data sets have them: a dev row's answer stands in none that is trained on."""
    greeting = {"role": "assistant", "content": "hello"}
    rows = []
    for n in range(20):
        turns = [{"role": role, "content": f"{role} {n} {turn}"} for turn in range(3) for role in ("user", "assistant")]
        rows += [{"messages": [greeting, *turns[:length]]} for length in (2, 4, 6)]
    rows.append({"messages": [greeting]})
    data = load_data(str(write_jsonl(tmp_path / "rows.jsonl", rows)), problem_type="next_words")
    trained, measured = ({turn for text in part.texts for turn in text.turns[1:]} for part in (data.train, data.dev))
    assert measured
    assert not trained & measured


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("siva", {}),
        ("lora", {}),
        ("last-n", {"settings": {"layers": 1}}),
        ("mezo", {}),
        ("k-lst", {"window": 3}),
        ("lst", {}),
    ],
)
def test_methods_learn_next_words(config: TrainConfig, method: str, changes: dict[str, Any]) -> None:
    rate = 1e-3 if method == "mezo" else 1e-2
    metrics = train(replace(config, method=method, learning_rate=rate, max_steps=6, **changes)).metrics
    assert math.isfinite(metrics["loss"])
    assert evaluate(config.output, max_new_tokens=0)["loss"] == pytest.approx(metrics["loss"], abs=1e-5)


def test_chat_templates_that_cannot_be_used(tokenizer: Any, place: Path) -> None:
    chat = [Conversation((("user", "film"), ("assistant", "plot"), ("user", "film"), ("assistant", "plot")))]
    plain = AutoTokenizer.from_pretrained(place / "model")
    plain.chat_template = None
    with pytest.raises(FastpeftError, match="has no chat template, which conversations need"):
        encode_counted(plain, chat, 38)
    plain.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(FastpeftError, match=r"refuses a conversation: roles must alternate\. Its turns are user\."):
        encode_counted(plain, chat, 38)
    plain.chat_template = "{{ messages | length }} {{ messages[-1].content }}"
    with pytest.raises(FastpeftError, match="writes earlier turns otherwise once others follow"):
        encode_counted(plain, chat, 38)


def test_what_a_run_refuses(tmp_path: Path, place: Path, config: TrainConfig) -> None:
    train(config)
    run = load_run(config.output)
    with pytest.raises(FastpeftError, match="max_new_tokens is 38; it must be from 1 to 37"):
        TextGenerator(run, 38)
    with pytest.raises(FastpeftError, match="has 31 tokens, but 30 are the most that leave room for 8 new ones"):
        TextGenerator(run, 8).encode("film " * 30)
    with pytest.raises(FastpeftError, match=r"got 7\. Give one"):
        TextGenerator(run).encode(7)
    with pytest.raises(FastpeftError, match="is of a causal language model and predicts no classes"):
        Predictor(config.output)
    with pytest.raises(FastpeftError, match=r"learned from pairs of texts, but .* has conversations"):
        evaluate(config.output, str(place / "chats.jsonl"))
    shown = CliRunner().invoke(app, ["predict", config.output, "film", "--all"])
    assert "--all shows the probability of every class, tag or label, but the run has none" in shown.output
    for refused in (
        lambda: TextGenerator(run).encode([{"role": "user", "content": "film"}]),
        lambda: Predictions(config.output, file=str(place / "chats.jsonl")),
    ):
        with pytest.raises(FastpeftError, match="learned from texts, not from conversations"):
            refused()


def test_models_that_say_no_next_words_are_refused(tmp_path: Path, config: TrainConfig) -> None:
    encoder = save_tiny_model(tmp_path / "encoder")
    with pytest.raises(FastpeftError, match=r"\(roberta\) is not a decoder, which the objective causal requires"):
        train(replace(config, model=str(encoder)))
    with pytest.raises(FastpeftError, match="objective 'causal' learns from texts without labels"):
        replace(config, label_column="label")
    with pytest.raises(FastpeftError, match=r"this has no labels\. Give objective causal instead"):
        replace(config, objective=None, problem_type=NEXT_WORDS.name)


def test_a_method_that_finds_nothing_to_train_is_refused(config: TrainConfig) -> None:
    for method in ("head", "bitfit"):  # the head is the embeddings, and this decoder has no biases
        with pytest.raises(FastpeftError, match=f"the method '{method}' finds nothing to train in the model"):
            train(replace(config, method=method))


def test_a_run_on_classes_says_no_words(tmp_path: Path, place: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    data = write_csv(tmp_path / "reviews.csv", reviews(24))
    output = str(tmp_path / "run")
    train(TrainConfig(output=output, method="head", model=str(model), data=str(data), max_steps=1))
    with pytest.raises(FastpeftError, match=r"generates no text\. Leave it out"):
        evaluate(output, max_new_tokens=4)
    with pytest.raises(FastpeftError, match=r"predicts classes or numbers and generates no text\. Remove the option"):
        Predictions(output, ["film"], max_new_tokens=4)


def test_the_card_says_how_to_load(config: TrainConfig) -> None:
    train(replace(config, method="siva"))
    card = (Path(config.output) / "README.md").read_text()
    assert "AutoPeftModelForCausalLM" in card
    assert "| objective | causal |" in card
    assert "tokenizer = AutoTokenizer.from_pretrained" in card
    assert json.loads((Path(config.output) / "metrics.json").read_text())["problem_type"] == "next_words"


def test_of_an_assistant_that_begins_its_own_words_alone_are_learned(tokenizer: Any) -> None:
    """A template may write a system turn before it, which no template of no turns tells."""
    ours = copy.deepcopy(tokenizer)
    ours.chat_template = (
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}plot film {% endif %}{{ m.role }} "
        "{{ m.content }} funny {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
    )
    ((row,), _) = encode_counted(ours, [Conversation((("assistant", "film"), ("user", "plot")))], 64)
    learned = [token for token, label in zip(row["input_ids"], row["labels"]) if label != UNLABELLED]
    assert learned == ours("film funny", add_special_tokens=False)["input_ids"]
    assert len(row["input_ids"]) > len(learned)


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_a_completion_goes_on_where_a_tokenizer_puts_a_space_before_any_text(scheme: str) -> None:
    """As Llama 2's: "the cat" and "s" were "the cat s"."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    made.train_from_iterator(["the cat sat: yes\n"], tokenizers.trainers.BpeTrainer(show_progress=False))
    fast = PreTrainedTokenizerFast(tokenizer_object=made)
    for pair in (("the cat", "s sat"), ("the cat:", " yes"), ("the cat: ", "yes")):
        (row,), _ = encode_counted(fast, [pair], 100)
        said = "".join(fast.convert_ids_to_tokens(row["input_ids"]))
        assert said.replace("\u2581", " ") == f" {pair[0]}{pair[1]}"
        assert row["input_ids"][: len(asked := prompt_tokens(fast, pair))] == asked


def test_turns_go_on_where_a_tokenizer_puts_a_space_after_every_special_token() -> None:
    """As Mistral's and Phi-3's: what is learned is how the whole conversation is read, and so is what is asked."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
    )
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=24, special_tokens=["</s>"], show_progress=False)
    made.train_from_iterator(["the cat", "cat sat", ":", "\n"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    turn = "{{ m.content }}{% if m.role == 'assistant' %}</s>{% else %}:</s>{% endif %}"
    fast.chat_template = f"{{% for m in messages %}}{turn}{{% endfor %}}"
    turns = [("user", "the cat"), ("assistant", "cat sat")] * 12
    ((row,), _) = encode_counted(fast, [Conversation(tuple(turns))], 1000)
    whole = "".join("the cat:</s>" if role == "user" else "cat sat</s>" for role, _ in turns)
    assert row["input_ids"] == fast(whole)["input_ids"]
    said = [token for token, label in zip(row["input_ids"], row["labels"]) if label != UNLABELLED]
    assert said == fast("cat sat</s>")["input_ids"] * 12
    asked = prompt_tokens(fast, Conversation(tuple(turns)))
    assert row["input_ids"][: len(asked)] == asked
