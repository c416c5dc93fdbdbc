"""The text of a model card: what a saved adapter or model is and how to load it."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastpeft.version import __version__

ONNX_FILE = "model.onnx"

HUB_ID = re.compile(r"(?!\.)[\w.-]+(/[\w.-]+)?")

_OWN = "<!-- fastpeft writes this card at every save; remove this line to keep your own words -->"
_BLANK = "<!-- Provide a quick summary of what the model is/does. -->"  # of PEFT's template

HEADS = {  # PEFT's task types, as its and transformers' Auto classes name them
    "SEQ_CLS": "SequenceClassification",
    "TOKEN_CLS": "TokenClassification",
    "QUESTION_ANS": "QuestionAnswering",
    "CAUSAL_LM": "CausalLM",
    "SEQ_2_SEQ_LM": "Seq2SeqLM",
    "FEATURE_EXTRACTION": "FeatureExtraction",
}


def loading_snippet(
    folder: str,
    *,
    base_model: str,
    task_type: str | None,
    adapter: bool = True,
    registered: bool = True,
    ladder: bool = False,
    chained: bool = False,
    labels: Sequence[str] = (),
    problem_type: str | None = None,
    prompt_head: str | None = None,
    masked_words: bool = False,
    decoder: bool = False,
    tokenizer: bool = False,
) -> str:
    """Python code that loads what was saved in `folder`.

    Args:
        folder: where it was saved.
        base_model: path or hub id of the model under an adapter.
        task_type: one of PEFT's, or None for a model of another kind.
        adapter: whether an adapter was saved, or a whole model.
        registered: whether PEFT knows the kind of adapter from this library alone.
        ladder: whether the model is a side network beside its base.
        chained: whether what was saved goes onto more than a model as its folder has it, as that of a run that started
            from another or kept the model in bfloat16; it is then found through its own folder.
        labels: names of the classes, where there are some.
        problem_type: as transformers' configuration has it; an adapter keeps neither it nor the labels.
        prompt_head: head of the prompt that was saved too, None where there was none.
        masked_words: whether the model predicts masked words.
        decoder: whether what a prompt's label words are read from is a decoder.
        tokenizer: whether the tokenizer was saved too; it was with classes and masked words.
    """
    if chained and (adapter or ladder):
        return _chained_snippet(folder, prompt_head)
    if prompt_head == "label_words":
        return _prompted_snippet(folder, base_model, adapter, decoder)
    head = "MaskedLM" if masked_words else HEADS.get(task_type or "")
    registers = f"import fastpeft  # registers its methods with {'PEFT' if adapter else 'transformers'}"
    lines = [registers] if (adapter and registered) or ladder else []
    if head is None:
        lines.append("from peft import PeftModel")
        call = f"PeftModel.from_pretrained(base, {folder!r})  # base: {base_model!r}, loaded as for training"
    else:
        adapted = "AutoPeftModel" if masked_words else f"AutoPeftModelFor{head}"  # the file then names the head's class
        name = adapted if adapter else f"AutoModelFor{head}"
        # the base may have a head for other classes, in whose place the adapter's comes
        new_head = f", id2label={dict(enumerate(labels))!r}, ignore_mismatched_sizes=True"
        known = new_head if adapter and labels else ""
        # where it is not told, a pipeline takes classes of which one applies
        if known and problem_type in ("regression", "multi_label_classification"):
            known += f", problem_type={problem_type!r}"
        lines += ["import torch", f"from {'peft' if adapter else 'transformers'} import {name}"]
        call = f"{name}.from_pretrained({folder!r}{known}, dtype=torch.float32)"
    with_tokenizer = labels or masked_words or tokenizer
    if with_tokenizer and lines[-1].startswith("from transformers"):
        lines[-1] += ", AutoTokenizer"
    elif with_tokenizer:
        lines.append("from transformers import AutoTokenizer")
    lines += ["", f"model = {call}"]
    if with_tokenizer:
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained({folder!r})")
    if prompt_head is not None:
        lines.insert(0, "from fastpeft import Prompt")
        lines.append(_prompt_line(folder))
    return "\n".join(lines)


def _prompted_snippet(folder: str, base_model: str, adapter: bool, decoder: bool) -> str:
    """Python code that loads a `PromptModel`, or an adapter around one."""
    auto_class = f"AutoModelFor{'CausalLM' if decoder else 'MaskedLM'}"
    names = f"{auto_class}, AutoTokenizer" if adapter else "AutoTokenizer"
    lines = ["import torch", "from fastpeft import Prompt, PromptModel", f"from transformers import {names}"]
    end = [f"tokenizer = AutoTokenizer.from_pretrained({folder!r})", _prompt_line(folder)]
    if adapter:
        lines.insert(2, "from peft import PeftModel")
        end += [
            f"base = {auto_class}.from_pretrained({base_model!r}, dtype=torch.float32)",
            f"model = PeftModel.from_pretrained(PromptModel(base, tokenizer, prompt), {folder!r})",
        ]
    else:
        end.append(f"model = PromptModel.from_pretrained({folder!r}, dtype=torch.float32)")
    return "\n".join([*lines, "", *end])


def _chained_snippet(folder: str, prompt_head: str | None) -> str:
    """Python code that loads a model through the runs that it came from."""
    lines = [
        "from fastpeft.training.loading import load_run",
        "",
        f"run = load_run({folder!r})  # with the models that it was trained on",
        "model, tokenizer = run.loaded.model, run.loaded.tokenizer",
        "# with run.autocast(): the model computes as it did in training",
    ]
    if prompt_head is not None:
        lines.append("prompt = run.prompt  # prompt.encode(tokenizer, texts) makes the model's inputs")
    return "\n".join(lines)


def onnx_snippet(folder: str, *, max_length: int, pairs: bool, words: bool) -> str:
    """Python code that runs the ONNX model in `folder`, which reads texts, `pairs` of them or lists of `words`."""
    texts = '[["A", "warm", "film"]], is_split_into_words=True' if words else '["A warm film."]'
    texts += ', ["Two friends meet."]' if pairs else ""
    texts += f", padding=True, truncation=True, max_length={max_length}"
    return (
        "import onnxruntime\n"
        "from transformers import AutoTokenizer\n\n"
        f"tokenizer = AutoTokenizer.from_pretrained({folder!r})\n"
        f"session = onnxruntime.InferenceSession({folder + '/' + ONNX_FILE!r})\n"
        f'batch = tokenizer({texts}, return_tensors="np")\n'
        "inputs = {each.name: batch[each.name] for each in session.get_inputs()}\n"
        'logits = session.run(["logits"], inputs)[0]  # config.json has the names of its columns in id2label'
    )


def _prompt_line(folder: str) -> str:
    return f"prompt = Prompt.load({folder!r})  # prompt.encode(tokenizer, texts) makes what the model reads"


def model_card(
    *,
    base_model: str | None,
    on_hub: bool = True,
    method: str,
    snippet: str,
    library: str = "peft",
    data: str | None = None,
    labels: Sequence[str] = (),
    labels_are: str = "classes",
    answers: str | None = None,
    chosen_by: str | None = None,
    metrics: Mapping[str, str] | None = None,
    settings: Mapping[str, object] | None = None,
) -> str:
    """A model card in Markdown, with the header that model hubs read.

    Args:
        base_model: path or hub id of the model that was fine-tuned; None where it is not known.
        on_hub: whether that may be a hub id. Hubs read the header's as one, so it names nothing else.
        method: the method's title, as "SiVA".
        snippet: Python code that loads what was saved.
        library: the one that loads it: `peft` for adapters, `onnx`, else `transformers`.
        data: what it was trained on, in words.
        labels: names of the model's outputs.
        labels_are: what those are, in one word.
        answers: how answers follow from outputs; None: the most likely class is the answer, or the number.
        chosen_by: the metric by which the checkpoint was chosen; None: it is that of the last step.
        metrics: results, each with its formatted value.
        settings: hyper-parameters, in the order to show.
    """
    named = base_model and on_hub and HUB_ID.fullmatch(base_model) and not Path(base_model).exists()
    header = [f"base_model: {base_model}"] if named else []
    base_model = base_model and _in_line(base_model)
    header += [f"library_name: {library}", "tags:", "- fastpeft"]
    lines = ["---", *header, "---", "", f"# {method} of {base_model}" if base_model else f"# {method}", ""]
    lines += [f"Fine-tuned by fastpeft {__version__}.", ""]
    if base_model:
        lines.append(f"- Base model: `{base_model}`")
    lines.append(f"- Method: {method}")
    if data:
        lines.append(f"- Data: {_in_line(data)}")
    if labels:
        lines.append(f"- {labels_are.capitalize()}: {', '.join(map(_in_line, labels))}")
    if answers:
        lines.append(f"- Predictions: {_in_line(answers)}")
    if chosen_by:
        lines.append(f"- Checkpoint: the best by {chosen_by} on the dev rows, on which the results were measured too")
    for title, values in (("Results", metrics), ("Settings", settings)):
        if values:
            lines += ["", f"## {title}", "", "| | |", "|---|---|"]
            lines += [f"| {_in_line(name)} | {_in_line(value)} |" for name, value in values.items()]
    lines += ["", "## Loading", "", "```python", snippet, "```", ""]
    return "\n".join(lines)


def _in_line(value: object) -> str:
    """A value as a line of Markdown shows it: not as the end of a cell or line, a tag of HTML, a link or a picture."""
    return html.escape(" ".join(str(value).split()), quote=False).replace("|", "&#124;").replace("](", "]&#40;")


def write_card(folder: Path, text: str) -> None:
    """Write a card in place of an earlier one of ours, or of PEFT's blank one; any other is kept."""
    card = folder / "README.md"
    if not card.exists() or any(mark in card.read_text(encoding="utf-8") for mark in (_OWN, _BLANK)):
        card.write_text(f"{text}\n{_OWN}\n", encoding="utf-8")
