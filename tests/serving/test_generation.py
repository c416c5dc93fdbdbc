"""Runs that say words, behind addresses of OpenAI's form."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from causal_models import causal_model
from samples import chats, completions, reviews, save_tiny_decoder, write_csv, write_jsonl
from served import Server
from transformers import AutoTokenizer

from fastpeft import LadderPool, TrainConfig, train
from fastpeft.data.conversations import Conversation
from fastpeft.serving.generation import GenerationRequest, generate_batch
from fastpeft.serving.tasks import RefusedError, Tasks
from fastpeft.training.generation import TextGenerator
from fastpeft.training.loading import load_run

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("openai")

import openai
from fastapi.exceptions import RequestValidationError

from fastpeft.serving.app import Limits, create_app

ASKED = [text for text, _ in reviews(5)]
SHARED = ("chat", "wide", "e2e")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs beside one decoder, one run with a model of its own, one on classes."""
    place = tmp_path_factory.mktemp("words")
    model = str(save_tiny_decoder(place / "model", initializer_range=0.5))
    conversations = str(write_jsonl(place / "chats.jsonl", chats(60)))
    prompts = str(write_jsonl(place / "completions.jsonl", completions(60)))
    for name, method, data, given in (
        ("chat", "lst", conversations, {}),
        ("wide", "k-lst", conversations, {"seed": 1}),
        ("e2e", "lst", prompts, {}),
        ("own", "siva", conversations, {}),
    ):
        values = {"model": model, "max_steps": 4, "learning_rate": 0.1, "max_length": 32, "bf16": False, **given}
        train(TrainConfig(output=str(place / name), method=method, objective="causal", data=data, **values))
    classes = str(write_csv(place / "two.csv", reviews(40)))
    train(
        TrainConfig(output=str(place / "classes"), method="lst", model=model, data=classes, max_steps=2, max_length=32)
    )
    return place


@pytest.fixture(scope="module")
def tasks(place: Path) -> Tasks:
    return Tasks({name: place / name for name in (*SHARED, "own", "classes")})


@pytest.fixture(scope="module")
def server(tasks: Tasks) -> Iterator[Server]:
    with Server(create_app(tasks, limits=Limits(seconds=20))) as server:
        yield server


@pytest.fixture(scope="module")
def expected(place: Path) -> dict[tuple[str, str], str]:
    """What each run by itself says to each text, a turn of the user or a prompt."""
    found = {(name, text): said for name in (*SHARED, "own") for text, said in zip(ASKED, alone(place / name))}
    assert len(set(found.values())) > 3
    return found


def alone(folder: Path, max_tokens: int = 8) -> list[str]:
    """What a run by itself says to what is `ASKED`, as `predict` does."""
    return said_by(TextGenerator(load_run(folder), max_tokens))


def said_by(generator: TextGenerator) -> list[str]:
    return generator.generate([generator.encode(text) for text in ASKED])


def request_to(tasks: Tasks, name: str, text: str, max_tokens: int = 8) -> GenerationRequest:
    """A text for a task, as a turn of the user where the task learned conversations."""
    asked = Conversation((("user", text),)) if tasks[name].run.chats else text
    return tasks.generative(name).request(asked, max_tokens)


def answers(tasks: Tasks, name: str, max_tokens: int = 8) -> list[str]:
    """What a task says to what is `ASKED`."""
    found: list[Any] = tasks.generate([(name, [request_to(tasks, name, text, max_tokens)]) for text in ASKED])
    return [answer.text for answer in found]


def turns(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def request(model: str, text: str, **options: Any) -> tuple[str, dict[str, Any]]:
    """Address and body."""
    body = {"model": model, "temperature": 0, "max_tokens": 8, **options}
    if model == "e2e":
        return "/v1/completions", {"prompt": text, **body}
    return "/v1/chat/completions", {"messages": turns(text), **body}


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Any]:
    """OpenAI's own client."""
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as client:
        yield client


def create(client: Any, path: str, body: dict[str, Any]) -> Any:
    """Ask by OpenAI's client."""
    return (client.chat.completions if "chat" in path else client.completions).create(**body)


# -- tasks -------------------------------------------------------------------------------------------------------


def test_tasks_on_one_backbone_say_their_words_in_one_batch(
    tasks: Tasks, expected: dict[tuple[str, str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tasks.beside(tasks["chat"]) == ["wide", "e2e"]  # not that of classes, whose base has another head
    batches: list[int] = []
    generate = LadderPool.generate
    monkeypatch.setattr(
        LadderPool,
        "generate",
        lambda pool, batch, tasks, **options: (batches.append(len(tasks)), generate(pool, batch, tasks, **options))[1],
    )
    found: list[Any] = tasks.generate([(name, [request_to(tasks, name, text)]) for name, text in expected])
    assert [answer.text.strip() for answer in found] == list(expected.values())
    assert batches == [15]


def test_predict_is_greedy_whatever_the_model_says(place: Path, expected: dict[tuple[str, str], str]) -> None:
    generator = TextGenerator(load_run(place / "own"), 8)
    generator.run.loaded.model.generation_config.num_beams = 4
    assert said_by(generator) == [expected["own", text] for text in ASKED]


def test_a_side_network_beside_a_decoder_that_keeps_no_keys_says_its_words(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "model", tmp_path / "model")
    words = len(AutoTokenizer.from_pretrained(tmp_path / "model"))
    causal_model("mamba", vocab_size=words, initializer_range=0.5).save_pretrained(tmp_path / "model")
    values: dict[str, Any] = {"model": str(tmp_path / "model"), "data": str(place / "completions.jsonl")}
    values |= {"objective": "causal", "method": "lst", "max_steps": 1, "max_length": 32, "bf16": False}
    train(TrainConfig(output=str(tmp_path / "run"), **values))
    expected, tasks = alone(tmp_path / "run"), Tasks({"run": tmp_path / "run"})
    assert [said.strip() for said in answers(tasks, "run")] == expected
    assert len(set(expected)) > 1


def test_a_decoder_that_minds_padding_is_given_each_text_alone(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "model", tmp_path / "model")
    words = len(AutoTokenizer.from_pretrained(tmp_path / "model"))
    causal_model("rwkv", vocab_size=words).save_pretrained(tmp_path / "model")
    values: dict[str, Any] = {"model": str(tmp_path / "model"), "data": str(place / "completions.jsonl")}
    values |= {"objective": "causal", "method": "full", "max_steps": 1, "max_length": 32, "bf16": False}
    train(TrainConfig(output=str(tmp_path / "run"), **values))
    generator, tasks = TextGenerator(load_run(tmp_path / "run"), 8), Tasks({"run": tmp_path / "run"})
    asked = [generator.encode("film " * length) for length in (1, 4, 1, 9)]
    assert generator.generate(asked) == [generator.generate([each])[0] for each in asked]
    requests = [request_to(tasks, "run", "film " * length) for length in (1, 4, 1, 9)]
    assert [len(batch) for batch in tasks._batches(requests)] == [1, 1, 1, 1]


def test_other_sampling_or_too_long_a_sum_is_another_batch(tasks: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    chat, own = tasks["chat"], tasks["own"]
    long = [request_to(tasks, "chat", "film " * length, most) for length, most in ((1, 30), (24, 4))]
    assert [len(batch) for batch in tasks._batches(long)] == [1, 1]
    short = [request_to(tasks, "chat", "film", 4) for _ in range(20)]
    assert [len(batch) for batch in tasks._batches(short)] == [16, 4]
    drawn = tasks.generative("chat").request(Conversation((("user", "film"),)), 4, sampling=(0.7, 0.9))
    together: list[list[Any]] = []
    monkeypatch.setattr(tasks, "_generate", lambda batch: together.append(batch) or {})
    tasks.generate([("chat", [short[0], drawn]), ("chat", short[1:2])])
    assert together == [short[:2], [drawn]]
    assert chat.shared is not None
    assert own.shared is None


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("chat", {"num_beams": 2}),
        ("own", {"num_beams": 2}),
        ("chat", {"num_return_sequences": 2, "do_sample": True}),
        ("own", {"prompt_lookup_num_tokens": 3}),
        ("own", {"assistant_early_exit": 1}),
        ("own", {"max_time": 1e-9}),
    ],
)
def test_each_request_has_its_own_row_whatever_the_model_says(
    tasks: Tasks,
    expected: dict[tuple[str, str], str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    given: dict[str, Any],
) -> None:
    task = tasks[name]
    base = task.run.loaded.model if task.shared is None else task.shared.pool.backbone.core
    for option, value in given.items():
        monkeypatch.setattr(base.generation_config, option, value)
    assert answers(tasks, name) == [expected[name, text] for text in ASKED]


def test_a_run_generates_by_its_own_configuration(place: Path, tmp_path: Path, expected: dict[Any, str]) -> None:
    """As `predict` does; the pool's base has another one."""
    shutil.copytree(place / "chat", tmp_path / "never twice")
    file = next((tmp_path / "never twice").rglob("generation_config.json"))
    file.write_text(json.dumps({**json.loads(file.read_text()), "no_repeat_ngram_size": 1}))
    texts = {"never": alone(tmp_path / "never twice"), "chat": [expected["chat", text] for text in ASKED]}
    assert texts["never"] != texts["chat"]
    for names in (("chat", "never"), ("never", "chat")):
        folders = {"chat": place / "chat", "never": tmp_path / "never twice"}
        tasks = Tasks({name: folders[name] for name in names})
        assert {name: answers(tasks, name) for name in texts} == texts


def test_of_a_batch_that_fails_each_is_answered_alone(tasks: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = LadderPool.generate

    def failing(pool: LadderPool, batch: Any, tasks: list[str], **options: Any) -> Any:
        if len(tasks) > 1 or tasks[0].startswith("wide"):
            raise MemoryError
        return generate(pool, batch, tasks, **options)

    monkeypatch.setattr(LadderPool, "generate", failing)
    first, second = tasks.generate([(name, [request_to(tasks, name, "film", 4)]) for name in ("wide", "chat")])
    assert isinstance(first, RefusedError)
    assert (first.status, "memory is not enough" in str(first)) == (503, True)
    assert isinstance(second, GenerationRequest)
    assert second.finish_reason is not None


def test_what_has_begun_is_not_said_twice(tasks: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(generate: Any, tokenizer: Any, device: Any, requests: list[GenerationRequest]) -> None:
        if len(requests) > 1:
            requests[0].append(tokenizer.convert_tokens_to_ids("film"))
            raise RuntimeError("too little memory")
        generate_batch(generate, tokenizer, device, requests)

    monkeypatch.setattr("fastpeft.serving.tasks.generate_batch", failing)
    begun, other = tasks.generate([("chat", [request_to(tasks, "chat", "film", 4) for _ in range(2)])])
    assert isinstance(begun, RuntimeError)
    assert isinstance(other, GenerationRequest)
    assert other.finish_reason is not None


@pytest.mark.parametrize(("max_length", "reads"), [(12, 12), (99, 38)])
def test_a_server_reads_less_than_a_run_but_never_more(place: Path, max_length: int, reads: int) -> None:
    tasks = Tasks({"chat": place / "chat"}, max_length=max_length)
    with pytest.raises(RefusedError, match=f"reads {reads} tokens"):
        request_to(tasks, "chat", "film " * 40)


def test_a_run_with_examples_answers_from_a_backbone_that_has_read_them(place: Path, tmp_path: Path) -> None:
    config = load_run(place / "e2e").config
    for name, seed in (("one", 3), ("other", 5)):  # other examples
        train(replace(config, output=str(tmp_path / name), seed=seed, settings={"examples": 1}))
    tasks = Tasks(
        {"none": place / "e2e", "one": tmp_path / "one", "again": tmp_path / "one", "other": tmp_path / "other"}
    )
    shared = [tasks[name].shared for name in ("none", "one", "again", "other")]
    assert shared[1] is shared[2]
    assert len({id(each) for each in shared}) == 3
    for name in ("one", "again", "other"):
        texts = [text.strip() for text in answers(tasks, name, 3)]
        assert texts == alone(tmp_path / name.replace("again", "one"), 3)


def test_a_task_that_was_removed_is_gone(place: Path) -> None:
    tasks = Tasks({"chat": place / "chat"})
    generation = tasks.generative("chat").request(Conversation((("user", "film"),)))
    assert generation.max_tokens == 38 - len(generation.tokens)
    tasks.remove("chat")
    (answer,) = tasks.generate([("chat", [generation])])
    assert isinstance(answer, RefusedError)
    assert answer.status == 404


# -- addresses ---------------------------------------------------------------------------------------------------


def test_answers_are_those_of_predict_whole_or_in_parts(client: Any, expected: dict[tuple[str, str], str]) -> None:
    for (name, text), said in expected.items():
        path, body = request(name, text)
        chats = "chat" in path
        whole = create(client, path, body)
        (choice,) = whole.choices
        whole_text = choice.message.content if chats else choice.text
        assert (whole_text if chats else whole_text.strip()) == said  # predict strips both
        assert (whole.model, whole.object) == (name, "chat.completion" if chats else "text_completion")
        assert choice.finish_reason in ("stop", "length")
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
        *parts, last, counted = create(
            client, path, {**body, "stream": True, "stream_options": {"include_usage": True}}
        )
        deltas = [part.choices[0] for part in parts]
        assert "".join(each.delta.content if chats else each.text for each in deltas) == whole_text
        if chats:
            assert [each.delta.role for each in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
        assert (last.choices[0].finish_reason, counted.usage) == (choice.finish_reason, whole.usage)
        assert len({part.id for part in (*parts, last, counted)}) == 1


def test_a_conversation_goes_on_as_openais_client_has_it(client: Any) -> None:
    body: dict[str, Any] = {
        "model": "chat",
        "messages": [
            {"role": "developer", "content": "film"},
            {"role": "user", "content": [{"type": "text", "text": "film"}], "name": "me"},
        ],
        "max_completion_tokens": 3,
        "temperature": None,
        "top_p": 0.9,
        "stop": ["plot", "\n"],
        "n": 1,
        "user": "me",
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "seed": None,
        "logprobs": False,
        "response_format": {"type": "text"},
        "tools": None,
    }
    first = client.chat.completions.create(**body)
    assert first.usage.completion_tokens <= 3
    said = {**first.choices[0].message.model_dump(), "content": "film"}
    told = {"role": "tool", "content": "film", "tool_call_id": "call_1"}
    longer = client.chat.completions.create(**{**body, "messages": [*body["messages"], said, told, *turns("film")]})
    assert longer.usage.prompt_tokens > first.usage.prompt_tokens
    system = [{**body["messages"][0], "role": "system"}, body["messages"][1]]
    again = client.chat.completions.create(**{**body, "messages": system})
    assert again.usage.prompt_tokens == first.usage.prompt_tokens


def test_openais_client_has_its_own_kinds_of_errors(client: Any) -> None:
    for model, options, kind in (
        ("x", {}, openai.NotFoundError),
        ("chat", {"n": 2}, openai.UnprocessableEntityError),
        ("chat", {"max_tokens": 99}, openai.BadRequestError),
    ):
        with pytest.raises(kind) as error:
            create(client, *request(model, "film", **options))
        assert error.value.body["message"]


def test_next_to_no_temperature_says_the_most_likely_words(
    server: Server, expected: dict[tuple[str, str], str]
) -> None:
    path, body = request("own", ASKED[0], temperature=1e-40)
    answer = server.ask("POST", path, body)[1]
    assert answer["choices"][0]["message"]["content"] == expected["own", ASKED[0]]


def test_what_there_is(server: Server, client: Any) -> None:
    listed = list(client.models.list())
    assert [model.id for model in listed] == [*SHARED, "own"]
    assert client.models.retrieve("chat") == listed[0]
    described = {task["name"]: task for task in server.ask("GET", "/tasks")[1]}
    assert (described["chat"]["reads"], described["chat"]["labels"]) == ("messages", [])
    assert (described["chat"]["max_length"], described["classes"]["max_length"]) == (38, 32)
    assert (described["e2e"]["reads"], described["classes"]["reads"]) == ("prompt", "string")


class Refusal(NamedTuple):
    """A request that is refused, and what its answer then has."""

    body: Any
    message: str
    param: str | None = None
    status: int = 400
    code: str | None = None


CHAT = {"model": "chat", "messages": turns("film"), "max_tokens": 2}
REFUSED = {
    "no such task": Refusal(
        {**CHAT, "model": "x"}, "there is no task 'x'", param="model", status=404, code="model_not_found"
    ),
    "a task of classes": Refusal(
        {**CHAT, "model": "classes"}, "generates no text", param="model", status=404, code="model_not_found"
    ),
    "a task of texts": Refusal({**CHAT, "model": "e2e"}, "learned from texts, not from conv", param="messages"),
    "a role": Refusal(
        {**CHAT, "messages": [{"role": "narrator", "content": "a"}]}, "the role 'narrator'", param="messages"
    ),
    "late system": Refusal(
        {**CHAT, "messages": [*turns("film"), {"role": "system", "content": "a"}]},
        "a turn of the system as turn 2",
        param="messages",
    ),
    "assistant last": Refusal(
        {**CHAT, "messages": [*turns("film"), {"role": "assistant", "content": "a"}]},
        "the assistant's turn at its end",
        param="messages",
    ),
    "no messages": Refusal({**CHAT, "messages": []}, "body.messages: List should have at least 1 item"),
    "an empty message": Refusal({**CHAT, "messages": turns(" ")}, "with nothing in it", param="messages"),
    "a number": Refusal({**CHAT, "messages": [{"role": "user", "content": 1}]}, "body.messages.0.content"),
    "surrogate": Refusal(
        {**CHAT, "messages": turns("a\ud800")}, "body.messages.0.content: Input should be a valid string, unable"
    ),
    "an image": Refusal(
        {**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]},
        "body.messages.0.content: only parts of the type text are read.",
    ),
    "too long": Refusal(
        {**CHAT, "messages": turns("film " * 40)},
        "reads 38 tokens; here are 4",
        param="messages",
        code="context_length_exceeded",
    ),
    "too many": Refusal(
        {**CHAT, "max_tokens": 38}, "and 38 more for the answer", param="messages", code="context_length_exceeded"
    ),
    "none": Refusal({**CHAT, "max_tokens": 0}, "body.max_tokens"),
    "a number as text": Refusal({**CHAT, "max_tokens": "2"}, "body.max_tokens: Input should be a valid integer"),
    "true": Refusal({**CHAT, "temperature": True}, "body.temperature: Input should be a valid number"),
    "hot": Refusal({**CHAT, "temperature": 3}, "body.temperature"),
    "five stops": Refusal({**CHAT, "stop": ["a"] * 5}, "body.stop: List should have at most 4 items"),
    "an empty stop": Refusal({**CHAT, "stop": ""}, "body.stop"),
    "a long stop": Refusal({**CHAT, "stop": "a" * 1_001}, "body.stop.0: String should have at most 1000"),
    "two answers": Refusal({**CHAT, "n": 2}, "body.n"),
    "a log probability": Refusal({**CHAT, "logprobs": True}, "body.logprobs"),
    "a penalty": Refusal({**CHAT, "frequency_penalty": 0.5}, "body.frequency_penalty"),
    "another": Refusal({**CHAT, "presence_penalty": -1}, "body.presence_penalty"),
    "a seed": Refusal({**CHAT, "seed": 1}, "body.seed: Extra inputs"),
    "a form": Refusal({**CHAT, "response_format": {"type": "json_object"}}, "body.response_format"),
    "tools": Refusal({**CHAT, "tools": []}, "body.tools: Extra inputs"),
    "half of JSON": Refusal(b'{"model": "chat"', "JSON decode error", status=422),
    "no JSON": Refusal(b"\xff", "parsing the body", status=400),
    "large": Refusal(b" " * (1 << 21), "more than 1,048,576 bytes", status=413),
}


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_refused(server: Server, stream: bool) -> None:
    for name, (body, message, param, status, code) in REFUSED.items():
        body = {**body, "stream": stream} if isinstance(body, dict) else body
        given, answer, _ = server.ask("POST", "/v1/chat/completions", body)
        if message.startswith("body."):
            param, status = message.removeprefix("body.").partition(":")[0].partition(".")[0], 422
        assert given == status, (name, answer)
        error = answer["error"]
        assert message in error["message"], name
        assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code), name
    for method, path in (
        ("GET", "/v1/models/x"),
        ("GET", "/v1/models/classes"),
        ("GET", "/v1/none"),
        ("GET", "/v1/chat/completions"),
    ):
        status, answer, _ = server.ask(method, path)
        assert status in (404, 405)
        assert answer["error"]["message"]
    status, answer, _ = server.ask("POST", "/predict", {"task": "chat", "texts": ["film"]})
    assert (status, "generates text" in answer["error"]["message"]) == (422, True)
    assert server.ask("POST", *request("chat", "film"))[0] == 200


@pytest.mark.parametrize(
    "messages", [[{}] * 9_000, [{"role": "user", "content": [{}] * 9_000}], [{str(key): 1 for key in range(9_000)}]]
)
def test_of_many_faults_a_few_are_counted(messages: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes time of the thread that reads all requests."""
    counted: list[int] = []
    errors = RequestValidationError.errors
    monkeypatch.setattr(
        RequestValidationError, "errors", lambda error: (counted.append(len(errors(error))), errors(error))[1]
    )
    with Server(create_app(Tasks({}))) as server:
        status, answer, _ = server.ask("POST", "/v1/chat/completions", {"model": "chat", "messages": messages})
    assert (status, "body.messages" in answer["error"]["message"]) == (422, True)
    assert max(counted) < 10


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_waits_for_no_other_and_fails_with_none(
    server: Server, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    answered, waited = threading.Event(), []

    def long(*args: Any) -> None:
        generate_batch(*args)
        waited.append(answered.wait(30))  # as for a longer answer of the batch
        raise RuntimeError("secret")

    monkeypatch.setattr("fastpeft.serving.tasks.generate_batch", long)
    status, answer, _ = server.ask("POST", *request("own", "film", stream=stream))
    answered.set()
    assert status == 200, answer
    end = json.loads(answer.split("\n\n")[-3].removeprefix("data: ")) if stream else answer
    assert end["choices"][0]["finish_reason"] in ("stop", "length")
    assert server.ask("POST", *request("own", "film"))[0] == 200
    assert waited[0]


@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_is_no_traceback_to_clients(server: Server, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    def failing(*args: Any, **options: Any) -> Any:
        raise RuntimeError("secret")

    path, body = request("own", "film", stream=stream)
    with monkeypatch.context() as patched:
        patched.setattr("fastpeft.serving.tasks.generate_batch", failing)
        status, answer, _ = server.ask("POST", path, body)
    assert (status, answer["error"]["message"]) == (500, "the server failed; its log says why.")
    assert answer["error"]["type"] == "server_error"
    assert server.ask("POST", path, {**body, "stream": False})[0] == 200


def test_a_fault_within_a_stream_is_its_last_event(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(generate: Any, tokenizer: Any, device: Any, requests: list[GenerationRequest]) -> Any:
        requests[0]._deliver("begun")
        raise RuntimeError("secret")

    path, body = request("own", "film", stream=True)
    monkeypatch.setattr("fastpeft.serving.tasks.generate_batch", failing)
    status, answer, _ = server.ask("POST", path, body)
    assert status == 200
    assert '"content": "begun"' in answer
    assert answer.endswith('"type": "server_error", "param": null, "code": null}}\n\n')
    assert "secret" not in answer


@pytest.mark.parametrize(("stream", "said"), [(True, "begun"), (True, ""), (False, "begun")])
def test_what_nobody_listens_to_is_not_said(
    server: Server, monkeypatch: pytest.MonkeyPatch, stream: bool, said: str
) -> None:
    begun, ended = threading.Event(), threading.Event()
    left: list[bool] = []

    def endless(generate: Any, tokenizer: Any, device: Any, requests: list[GenerationRequest]) -> Any:
        if said:
            requests[0]._deliver(said)
        begun.set()
        for _ in range(600):
            if requests[0].abandoned:
                break
            ended.wait(0.05)
        left.append(requests[0].abandoned)
        ended.set()

    monkeypatch.setattr("fastpeft.serving.tasks.generate_batch", endless)
    path, body = request("own", "film", stream=stream)
    data = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        connection.sendall(head.encode() + data)
        assert begun.wait(30)
    assert ended.wait(40)
    assert left == [True]


@pytest.mark.parametrize(
    ("name", "how"), [("chat", "messages by POST /v1/chat/completions"), ("e2e", "a prompt by POST /v1/completions")]
)
def test_a_task_that_is_asked_for_classes_says_what_it_takes(tasks: Tasks, name: str, how: str) -> None:
    (refused,) = tasks.answer([(name, ["film"])])
    assert isinstance(refused, RefusedError)
    assert f"Send it {how}." in str(refused)
