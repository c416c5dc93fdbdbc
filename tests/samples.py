"""Tiny models and data that the tests share."""

from __future__ import annotations

import csv
import json
import os
import random
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import TrainerCallback
from transformers.integrations.peft import MIN_PEFT_VERSION

from fastpeft import TrainConfig, train
from fastpeft.methods.registry import METHODS
from fastpeft.prompts.template import HEADS

WORDS = {
    "negative": ("awful", "dull", "clumsy", "tedious"),
    "positive": ("lovely", "brilliant", "touching", "funny"),
    "mixed": ("uneven", "odd", "passable", "slight"),
}
PROMPT = {"prompt": "{text} the film is <mask>", "label_words": "negative=awful,positive=lovely"}  # for `TrainConfig`
_FILLERS = ("the", "a", "film", "plot", "scene", "actor", "is", "was", "very", "rather", "and", "with", "story", "end")
_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")

# what trains a model of `save_tiny_model`: 4 bits need rows of 64 weights
SMALL = [name for name in METHODS if name != "qlora"]


# what calls transformers' own `add_adapter`: its 5.24 asks for a PEFT that was not there when it came
add_adapter = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"transformers adds adapters with PEFT {MIN_PEFT_VERSION} and later",
)
_mapping = getattr(transformers.integrations.peft, "_build_peft_weight_mapping", None)
# what calls its `load_adapter`: 5.0 reads no file, LoRA's neither, into a model whose own names it does not convert
load_adapter = pytest.mark.skipif(
    _mapping is not None and not _mapping([], "default"), reason="this transformers does not load what it saved"
)


class Interrupt(TrainerCallback):
    """Ends a run as a signal would, at `step`, when `event` comes."""

    def __init__(self, step: int, event: str = "on_step_end") -> None:
        self.step = step
        setattr(self, event, self._interrupt)

    def _interrupt(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def for_one_row(call: Callable[..., Any]) -> Callable[..., Any]:
    """A model's `call` where memory is enough for one row."""

    def called(**batch: Any) -> Any:
        if len(batch["input_ids"]) > 1:
            raise MemoryError
        return call(**batch)

    return called


def sampled(cases: Iterable[Any], but: Any) -> list[Any]:
    """Parameters of a test, each marked slow `but` one: of a product of methods a sample is run."""
    return [case if case == but else pytest.param(*case, marks=pytest.mark.slow) for case in cases]


def pickle_adapter(folder: Path) -> None:
    """Keep the weights of a saved adapter in the format that runs code when it is read."""
    file = folder / "adapter_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()


def prompted(methods: Sequence[str]) -> list[tuple[str, str]]:
    """Each method with each head of a prompt that it goes with."""
    return [(name, head) for name in methods for head in HEADS if (name, head) != ("prompt-tuning", HEADS[0])]


def reviews(rows: int, labels: Sequence[str] = ("negative", "positive"), seed: int = 0) -> list[tuple[str, str]]:
    """Made-up (text, label) rows that a tiny model can learn: each text has one word that tells its label."""
    generator = random.Random(seed)
    made = []
    for row in range(rows):
        label = labels[row % len(labels)]
        words = generator.choices(_FILLERS, k=generator.randint(3, 14))
        words.insert(generator.randint(0, len(words)), generator.choice(WORDS[label]))
        made.append((" ".join(words), label))
    return made


def write_jsonl(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write one object a line."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def pairs(rows: int) -> list[dict[str, Any]]:
    """Made-up rows of two texts: whether both have the same opinion."""
    firsts, seconds = reviews(rows, seed=1), reviews(rows, ("negative", "negative", "positive"), seed=2)
    return [
        {"sentence1": first, "sentence2": second, "label": "same" if one == other else "different"}
        for (first, one), (second, other) in zip(firsts, seconds)
    ]


def scores(rows: int) -> list[dict[str, Any]]:
    """Made-up texts with a number that their opinion decides."""
    values = {"negative": 0.25, "mixed": 1.0, "positive": 2.5}
    return [{"text": text, "score": values[label]} for text, label in reviews(rows, tuple(values))]


def labelled(rows: int) -> list[dict[str, Any]]:
    """Made-up texts with the list of opinions in them: none, one or several."""
    generator = random.Random(0)
    made = []
    for row in range(rows):
        labels = [label for index, label in enumerate(WORDS) if row % 8 & 1 << index]
        words = [*generator.choices(_FILLERS, k=6), *(generator.choice(WORDS[label]) for label in labels)]
        generator.shuffle(words)
        made.append({"text": " ".join(words), "labels": labels})
    return made


def tagged(rows: int) -> list[dict[str, Any]]:
    """Made-up lists of words with a tag for each: that of the opinion, or O."""
    tags = {word: f"B-{label}" for label, words in WORDS.items() for word in words}
    texts = [text.split() for text, _ in reviews(rows, tuple(WORDS))]
    return [{"tokens": words, "ner_tags": [tags.get(word, "O") for word in words]} for words in texts]


def snapshot(folder: Path, but: Collection[str] = ()) -> dict[str, tuple[int, ...]]:
    """Folders and files below `folder`, with what shows that a file was written, but for folders of these names."""
    found: dict[str, tuple[int, ...]] = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in but]
        found[parent] = ()
        for path in (os.path.join(parent, name) for name in names):
            status = os.stat(path)
            found[path] = status.st_ino, status.st_size, status.st_mtime_ns
    return found


def write_csv(file: Path, rows: Sequence[Sequence[Any]], header: Sequence[str] = ("text", "label")) -> Path:
    """Write a csv file with a header."""
    with open(file, "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])
    return file


def save_tiny_model(folder: Path, kind: str = "Roberta", head: str = "ForMaskedLM", **changes: Any) -> Path:
    """Save a randomly initialised model of two layers, and its tokenizer, as a pretrained checkpoint."""
    vocabulary = [*_SPECIAL, *_FILLERS, *(word for words in WORDS.values() for word in words)]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token="<mask>",
        model_max_length=38,
    )
    shape = {
        "vocab_size": len(vocabulary),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 40,
        "type_vocab_size": 1,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
    }
    config = getattr(transformers, f"{kind}Config")(**{**shape, **changes})
    torch.manual_seed(0)
    getattr(transformers, f"{kind}{head}")(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


CHAT_TEMPLATE = (
    "{% for turn in messages %}<s> {{ turn.role }} {{ turn.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


def save_finished_run(place: Path) -> tuple[str, str]:
    """In a folder a tiny `model`, rows of two classes in `good.csv`, and `run`, trained on them; the first two."""
    model, data = str(save_tiny_model(place / "model")), str(write_csv(place / "good.csv", reviews(40)))
    train(TrainConfig(output=str(place / "run"), method="lora", model=model, data=data, max_steps=1))
    return model, data


def save_tiny_decoder(folder: Path, **changes: Any) -> Path:
    """As `save_tiny_model`: a decoder whose tokenizer has a chat template."""
    save_tiny_model(folder, "Llama", "ForCausalLM", **changes)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


FIRST = {name: words[0] for name, words in WORDS.items()}


def completions(rows: int) -> list[dict[str, str]]:
    """Prompts that say what the completion is."""
    return [{"prompt": text, "completion": f" {FIRST[label]}"} for text, label in reviews(rows)]


def chats(rows: int) -> list[dict[str, Any]]:
    """Conversations in which the assistant says what it was told."""
    return [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": FIRST[label]}]}
        for text, label in reviews(rows)
    ]


def eleven_steps(folder: Path, place: Path) -> TrainConfig:
    """A run of LoRA on what is in `place`, with eleven steps an epoch, into `folder`."""
    data = write_csv(folder / "reviews.csv", reviews(90))
    return TrainConfig(
        output=str(folder / "run"), method="lora", model=str(place / "model"), data=str(data), batch_size=8
    )


def weights_of(folder: Path) -> dict[str, Tensor]:
    """The weights in the one file of a folder that has some."""
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def points_of(folder: Path, name: str) -> list[tuple[int, float]]:
    """The values of a run's curve, with their steps."""
    return [(step, value) for step, value in json.loads((folder / "curves.json").read_text())[name]]
