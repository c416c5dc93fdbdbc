"""Files of a run that were cut, edited or swapped: one message, exit code 2, no traceback, nothing written."""

from __future__ import annotations

import json
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import reviews, save_tiny_model, snapshot, write_csv
from torch import Tensor
from typer.testing import CliRunner

from fastpeft import TrainConfig, train
from fastpeft.cli import app

Damage = Callable[[Path], None]
ADAPTER, SIDE = "adapter_model.safetensors", "model.safetensors"


# -- ways to damage a file -------------------------------------------------------------------------------------------


def cut(size: int) -> Damage:
    """Keep the first `size` bytes, all but so many where it is negative."""
    return lambda file: file.write_bytes(file.read_bytes()[:size]) and None


def hold(content: bytes) -> Damage:
    return lambda file: file.write_bytes(content) and None


def drop(file: Path) -> None:
    file.unlink()


def edit(**changes: Any) -> Damage:
    """Change values of a JSON file."""
    return lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | changes)) and None


def tensors(change: Callable[[str, Tensor], Tensor | None], **more: Tensor) -> Damage:
    """Change every tensor of a safetensors file, leave out those that become None, and add `more`."""

    def damage(file: Path) -> None:
        changed = {name: change(name, tensor) for name, tensor in load_file(file).items()}
        kept = {name: tensor.contiguous() for name, tensor in changed.items() if tensor is not None}
        save_file(kept | more, file, metadata={"format": "pt"})

    return damage


def only(part: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[str, Tensor], Tensor | None]:
    """A change of the tensors whose names hold `part`."""
    return lambda name, tensor: change(tensor) if part in name else tensor


def same(name: str, tensor: Tensor) -> Tensor:
    return tensor


def header(**changes: Any) -> Damage:
    """Change values of a journal's header, under a right checksum; None takes one away."""

    def damage(file: Path) -> None:
        content = file.read_bytes()
        (length,) = struct.unpack_from("<I", content, 8)
        values = json.loads(content[12 : 12 + length]) | changes
        text = json.dumps({name: value for name, value in values.items() if value is not None}).encode()
        size, checksum = struct.pack("<I", len(text)), struct.pack("<I", zlib.crc32(text))
        file.write_bytes(content[:8] + size + text + checksum + content[16 + length :])

    return damage


def record(at: int, value: bytes) -> Damage:
    """Change bytes of a journal's first record, under a right checksum."""

    def damage(file: Path) -> None:
        content = bytearray(file.read_bytes())
        start = 16 + struct.unpack_from("<I", content, 8)[0]
        content[start + at : start + at + len(value)] = value
        content[start + 32 : start + 36] = struct.pack("<I", zlib.crc32(content[start : start + 32]))
        file.write_bytes(content)

    return damage


def swap(other: str) -> Damage:
    """Put the file of the same name in the run `other` in its place."""
    return lambda file: shutil.copy(file.parents[1] / other / file.name, file) and None


def pickled(file: Path) -> None:
    """The same tensors in the format that runs code when it is read."""
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()


# -- the runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data and a finished run of every kind."""
    place = tmp_path_factory.mktemp("place")
    save_tiny_model(place / "model")
    write_csv(place / "good.csv", reviews(24))
    common = {"model": str(place / "model"), "data": str(place / "good.csv"), "max_steps": 2, "batch_size": 4}
    prompt = {"prompt": "{text} the film is <mask>", "label_words": "awful,lovely"}
    runs: dict[str, dict[str, Any]] = {
        "siva": {"method": "siva", "save_steps": 1},
        "other-rank": {"method": "siva", "rank": 2},
        "lora": {"method": "lora"},
        "side": {"method": "k-lst", "window": 3},
        "other-side": {"method": "k-lst", "window": 5},
        "whole": {"method": "full"},
        "prompted": {"method": "siva", **prompt},
        "mezo": {"method": "mezo", "save_steps": 2},
        "other-seed": {"method": "mezo", "seed": 1},
    }
    for name, values in runs.items():
        train(TrainConfig(output=str(place / name), **common, **values))
    return place


EVAL, EXPORT = ["eval", "bad"], ["export", "--step", "1", "bad", "new"]
RESUME = ["train", "--output", "bad", "--resume"]
NAN = torch.tensor(float("nan"))

# run, file in it, its damage, command, parts of the message
CASES: list[tuple[str, str, Damage, list[str], list[str]]] = [
    # adapters
    ("siva", ADAPTER, cut(0), EVAL, ["adapter in 'bad'"]),
    ("siva", ADAPTER, cut(7), EVAL, ["adapter in 'bad'"]),
    ("siva", ADAPTER, cut(500), EVAL, ["adapter in 'bad'"]),
    ("siva", ADAPTER, cut(-1), EVAL, ["adapter in 'bad'"]),
    ("siva", ADAPTER, hold(b"\xff" * 64), EVAL, ["adapter in 'bad'"]),
    ("siva", ADAPTER, hold(b"\0" * 64), EVAL, ["adapter in 'bad'"]),
    ("siva", ADAPTER, drop, EVAL, ["adapter in 'bad'", ADAPTER]),
    ("siva", ADAPTER, pickled, EVAL, ["adapter in 'bad'", ADAPTER]),
    ("siva", ADAPTER, tensors(only("siva_du", lambda t: t[:-1])), EVAL, ["adapter in 'bad'"]),
    ("siva", ADAPTER, tensors(only("siva_s", lambda t: t[:1])), EVAL, ["adapter in 'bad'"]),
    ("siva", ADAPTER, tensors(only("siva_du", lambda t: t.t())), EVAL, ["adapter in 'bad'"]),
    ("siva", ADAPTER, tensors(only("siva_v0", lambda t: None)), EVAL, ["adapter in 'bad'", "siva_v0"]),
    ("siva", ADAPTER, tensors(only("siva_du", lambda t: None)), EVAL, ["adapter in 'bad'", "siva_du"]),
    ("siva", ADAPTER, tensors(only("classifier", lambda t: None)), EVAL, ["adapter in 'bad'", "classifier"]),
    ("siva", ADAPTER, tensors(same, stray=torch.zeros(2)), EVAL, ["adapter in 'bad'", "stray"]),
    ("siva", ADAPTER, tensors(only("siva_du", lambda t: t.long())), EVAL, ["adapter in 'bad'", "floating"]),
    ("siva", ADAPTER, tensors(only("siva_dv", lambda t: t * NAN)), EVAL, ["adapter in 'bad'", "not finite"]),
    ("siva", ADAPTER, tensors(only("siva_s", lambda t: t / 0)), EVAL, ["adapter in 'bad'", "not finite"]),
    ("siva", ADAPTER, tensors(only("classifier", lambda t: t * NAN)), EVAL, ["adapter in 'bad'", "not finite"]),
    ("siva", ADAPTER, swap("lora"), EVAL, ["adapter in 'bad'"]),
    ("siva", ADAPTER, swap("other-rank"), EVAL, ["adapter in 'bad'"]),
    ("lora", ADAPTER, swap("siva"), EVAL, ["adapter in 'bad'"]),
    ("lora", ADAPTER, drop, EVAL, ["adapter in 'bad'", ADAPTER]),
    ("lora", ADAPTER, pickled, EVAL, ["adapter in 'bad'", ADAPTER]),
    ("lora", ADAPTER, tensors(only("lora_A", lambda t: t * NAN)), EVAL, ["adapter in 'bad'", "not finite"]),
    ("lora", ADAPTER, tensors(only("lora_A", lambda t: None)), EVAL, ["adapter in 'bad'", "lora_A"]),
    ("siva", "adapter_config.json", cut(40), EVAL, ["adapter in 'bad'"]),
    ("siva", "adapter_config.json", drop, EVAL, ["adapter in 'bad'"]),
    ("siva", "adapter_config.json", hold(b"[]"), EVAL, ["adapter in 'bad'"]),
    ("siva", "adapter_config.json", hold(b"[" * 100_000), EVAL, ["adapter in 'bad'"]),
    ("siva", "adapter_config.json", edit(peft_type="SIVVA"), EVAL, ["adapter in 'bad'", "SIVVA"]),
    ("siva", "adapter_config.json", edit(r=3), EVAL, ["adapter in 'bad'"]),
    ("siva", "adapter_config.json", edit(r="four"), EVAL, ["r='four'"]),
    ("siva", "adapter_config.json", edit(r=10**9), EVAL, ["1000000000"]),
    ("siva", "adapter_config.json", edit(residual="odd"), EVAL, ["'odd'"]),
    ("siva", "adapter_config.json", edit(target_modules=["nothing"]), EVAL, ["nothing"]),
    ("siva", "adapter_config.json", edit(target_modules=5), EVAL, ["adapter in 'bad'"]),
    ("siva", "adapter_config.json", edit(base_fingerprints=5), EVAL, ["adapter in 'bad'"]),
    ("siva", "adapter_config.json", edit(rank_pattern=[1]), EVAL, ["rank_pattern=[1]"]),
    # side networks
    ("side", SIDE, cut(0), EVAL, ["side network in", "bad"]),
    ("side", SIDE, cut(500), EVAL, ["side network in"]),
    ("side", SIDE, cut(-1), EVAL, ["side network in"]),
    ("side", SIDE, drop, EVAL, ["side network in", SIDE]),
    ("side", SIDE, pickled, EVAL, ["side network in", SIDE]),
    ("side", SIDE, tensors(only("side.", lambda t: t[:1])), EVAL, ["has the shape"]),
    ("side", SIDE, tensors(only("classifier", lambda t: None)), EVAL, ["missing base.classifier"]),
    ("side", SIDE, tensors(same, stray=torch.zeros(2)), EVAL, ["unknown stray"]),
    ("side", SIDE, tensors(only("side.", lambda t: t * NAN)), EVAL, ["damaged", "not finite"]),
    ("side", SIDE, tensors(only("side.", lambda t: t.long())), EVAL, ["damaged", "int64"]),
    ("side", SIDE, swap("other-side"), EVAL, ["bad"]),
    ("side", SIDE, swap("whole"), EVAL, ["does not hold the weights of this model"]),
    ("side", "config.json", cut(40), EVAL, ["side network from", "bad"]),
    ("side", "config.json", drop, EVAL, ["not a side network"]),
    ("side", "config.json", hold(b"[]"), EVAL, ["side network"]),
    ("side", "config.json", swap("whole"), EVAL, ["holds 'roberta', not a side network"]),
    ("side", "config.json", edit(window_size=4), EVAL, ["window_size=4"]),
    ("side", "config.json", edit(window_size="three"), EVAL, ["window_size='three'"]),
    ("side", "config.json", edit(reduction_factor=0), EVAL, ["reduction_factor=0"]),
    ("side", "config.json", edit(base_fingerprints=5), EVAL, ["bad"]),
    ("side", "config.json", edit(base_fingerprints={"a": "b"}), EVAL, ["another backbone"]),
    # whole models
    ("whole", "model.safetensors", cut(1000), EVAL, ["cannot load the model", "bad"]),
    ("whole", "model.safetensors", drop, EVAL, ["cannot load the model", "bad"]),
    ("whole", "model.safetensors", pickled, EVAL, ["cannot load the model", "bad"]),
    ("whole", "model.safetensors", tensors(only("layer.1", lambda t: None)), EVAL, ["layer.1", "is missing"]),
    ("whole", "model.safetensors", tensors(only("query", lambda t: t * NAN)), EVAL, ["the run in", "not finite"]),
    ("whole", "config.json", hold(b"{}"), EVAL, ["cannot load the model", "bad"]),
    ("whole", "config.json", edit(hidden_size=-1), EVAL, ["cannot load the model", "bad"]),
    ("whole", "config.json", edit(num_hidden_layers="two"), EVAL, ["cannot load the model", "bad"]),
    ("whole", "config.json", edit(auto_map={"AutoConfig": "x.Y"}, model_type="mine"), EVAL, ["cannot load the model"]),
    ("whole", "tokenizer.json", cut(100), EVAL, ["cannot load the model", "bad"]),
    ("whole", "tokenizer.json", hold(b"{}"), EVAL, ["cannot load the model", "bad"]),
    # what a run says of itself
    ("siva", "run.json", cut(40), EVAL, ["'bad' is not the folder of a run"]),
    ("siva", "run.json", hold(b"[1]"), EVAL, ["'bad' is not the folder of a run"]),
    ("siva", "run.json", edit(batch_size="many"), EVAL, ["--batch-size is 'many'"]),
    ("siva", "run.json", edit(method="sivva"), EVAL, ["'sivva'"]),
    ("siva", "run.json", edit(method=["siva"]), EVAL, ["method is ['siva']"]),
    ("siva", "run.json", edit(model=7), EVAL, ["model is 7"]),
    ("siva", "run.json", edit(model="./nowhere"), EVAL, ["no model at './nowhere'"]),
    ("siva", "run.json", edit(data="./nowhere.csv"), EVAL, ["no data at 'nowhere.csv'"]),
    ("siva", "run.json", edit(settings=[1]), EVAL, ["settings is [1]"]),
    ("siva", "run.json", edit(init_from="bad"), EVAL, ["bad"]),
    ("siva", "run.json", edit(of_a_later_version=1), EVAL, ["unknown name 'of_a_later_version'"]),
    ("siva", "run.json", edit(init_from_weights="0" * 16), EVAL, ["bad"]),
    ("siva", "metrics.json", cut(40), EVAL, ["metrics.json is not a JSON file"]),
    ("siva", "metrics.json", hold(b"[" * 100_000), EVAL, ["metrics.json is not a JSON file"]),
    ("siva", "metrics.json", edit(labels=5), EVAL, ["metrics.json", "labels is 5"]),
    ("siva", "metrics.json", edit(labels=["a", 1]), EVAL, ["metrics.json", "labels is ['a', 1]"]),
    ("siva", "metrics.json", edit(labels=["a", "b"]), EVAL, ["learned the classes a, b"]),
    ("siva", "metrics.json", edit(labels=["a", "b", "c"]), EVAL, ["bad"]),
    ("siva", "metrics.json", edit(problem_type="ranking"), EVAL, ["--problem-type is 'ranking'"]),
    ("siva", "metrics.json", edit(problem_type=[1]), EVAL, ["problem_type is [1]"]),
    ("siva", "metrics.json", edit(max_length="long"), EVAL, ["metrics.json", "max_length is 'long'"]),
    ("siva", "metrics.json", edit(max_length=-5), EVAL, ["metrics.json", "max_length is -5"]),
    ("siva", "metrics.json", edit(pairs="no"), EVAL, ["metrics.json", "pairs is 'no'"]),
    # journals
    ("mezo", "mezo.journal", cut(0), EXPORT, ["not a journal"]),
    ("mezo", "mezo.journal", cut(10), EXPORT, ["not a journal"]),
    ("mezo", "mezo.journal", cut(200), EXPORT, ["not a journal"]),
    ("mezo", "mezo.journal", cut(-80), EXPORT, ["bad"]),
    ("mezo", "mezo.journal", swap("other-seed"), EXPORT, ["does not have the weights"]),
    ("mezo", "mezo.journal", hold(b"MeZOjrn\x01" + b"\xff" * 40), EXPORT, ["not a journal"]),
    ("mezo", "mezo.journal", record(4, b"\x07"), EXPORT, ["record 1", "damaged"]),
    ("mezo", "mezo.journal", record(0, b"\x09"), EXPORT, ["record 1 of 2", "damaged"]),
    ("mezo", "mezo.journal", record(6, b"\xff\xff"), EXPORT, ["record 1", "damaged"]),
    ("mezo", "mezo.journal", record(8, b"\xff"), EXPORT, ["record 1 of 2", "damaged"]),
    ("mezo", "mezo.journal", record(16, struct.pack("<d", float("nan"))), EXPORT, ["is nan"]),
    ("mezo", "mezo.journal", record(16, struct.pack("<d", 1e300)), EXPORT, ["allowed are finite"]),
    ("mezo", "mezo.journal", header(seed=None), EXPORT, ["not a journal"]),
    ("mezo", "mezo.journal", header(groups=None), EXPORT, ["not a journal"]),
    ("mezo", "mezo.journal", header(groups=5), EXPORT, ["not a journal"]),
    ("mezo", "mezo.journal", header(groups=[]), EXPORT, ["journal"]),
    ("mezo", "mezo.journal", header(groups=[{}]), EXPORT, ["not a journal"]),
    ("mezo", "mezo.journal", header(num_estimates=10**12), EXPORT, ["not a journal"]),
    ("mezo", "mezo.journal", header(num_estimates=-1), EXPORT, ["not a journal"]),
    ("mezo", "mezo.journal", header(num_estimates="one"), EXPORT, ["not a journal"]),
    ("mezo", "mezo.journal", header(first_step=-1), EXPORT, ["journal"]),
    ("mezo", "mezo.journal", header(first_step="0"), EXPORT, ["not a journal"]),
    ("mezo", "mezo.journal", header(seed=-1), EXPORT, ["journal"]),
    ("mezo", "mezo.journal", header(seed=2**80), EXPORT, ["journal"]),
    ("mezo", "mezo.journal", header(estimator="adam"), EXPORT, ["not a journal"]),
    ("mezo", "mezo.journal", header(noise="pink"), EXPORT, ["not a journal"]),
    ("mezo", "mezo.journal", header(drawn_by=None), EXPORT, ["not a journal"]),
    ("mezo", "mezo.journal", header(dropped=None), EXPORT, ["not a journal"]),
    ("mezo", "mezo.journal", header(drawn_by=5), EXPORT, ["drawn by 5"]),
    ("mezo", "mezo.journal", header(rounding="up"), EXPORT, ["not a journal"]),
    ("mezo", "mezo.journal", header(restore="maybe"), EXPORT, ["not a journal"]),
    ("mezo", "mezo.journal", header(weights="0" * 16), EXPORT, ["does not have the weights"]),
    # checkpoints: of the run before it was finished
    ("siva", f"checkpoints/checkpoint-2/{ADAPTER}", cut(100), RESUME, ["checkpoint-2"]),
    ("siva", "checkpoints/checkpoint-2/trainer_state.json", cut(20), RESUME, ["checkpoint-2"]),
    ("siva", "checkpoints/checkpoint-2/optimizer.pt", cut(20), RESUME, ["checkpoint-2"]),
    ("siva", "checkpoints/checkpoint-2/optimizer.pt", hold(b"cos\nsystem\n(S'true'\ntR."), RESUME, ["checkpoint-2"]),
    ("siva", "checkpoints/checkpoint-2/scheduler.pt", hold(b"cos\nsystem\n(S'true'\ntR."), RESUME, ["checkpoint-2"]),
    ("siva", "checkpoints/checkpoint-2/rng_state.pth", hold(b"cos\nsystem\n(S'true'\ntR."), RESUME, ["checkpoint-2"]),
    ("mezo", "checkpoints/checkpoint-2/trainer_state.json", cut(20), RESUME, ["checkpoint-2"]),
    ("mezo", "checkpoints/checkpoint-2/trainer_state.json", drop, RESUME, ["checkpoint-2"]),
]


def state(place: Path) -> tuple[dict[Path, bytes], dict[str, tuple[int, ...]]]:
    """The content of the damaged run, of which a resumed one writes a file anew, and the stamps of all else."""
    files = [path for path in (place / "bad").rglob("*") if path.is_file() and ".staging" not in path.parts]
    return {path: path.read_bytes() for path in files}, snapshot(place, but=("bad", ".staging"))


@pytest.mark.parametrize(
    ("run", "name", "damage", "arguments", "parts"),
    CASES,
    ids=[f"{number}-{run}-{name}" for number, (run, name, *_) in enumerate(CASES)],
)
def test_bad_file(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: str,
    name: str,
    damage: Damage,
    arguments: list[str],
    parts: list[str],
) -> None:
    monkeypatch.chdir(place)
    bad = place / "bad"
    for left in (bad, place / "new"):
        shutil.rmtree(left, ignore_errors=True)
    shutil.copytree(place / run, bad)
    damage(bad / name)
    if "--resume" in arguments:
        (bad / "metrics.json").unlink()
        values = (bad / "run.json").read_text()
        (bad / "run.json").write_text(values.replace(str(place / run), "bad"))
    before = state(place)
    result = CliRunner().invoke(app, arguments)
    message = re.sub(r"\s+", " ", result.stderr)
    assert result.exit_code == 2, (result.output, repr(result.exception))
    assert [part for part in parts if part not in message] == [], message
    assert message.count("Error:") == 1, message
    assert state(place) == before
