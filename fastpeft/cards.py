"""The text of a model card: what a saved adapter or model is and how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import fastpeft

_LOADING = {
    True: """\
import fastpeft  # registers its methods with PEFT
import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

model = AutoPeftModelForSequenceClassification.from_pretrained(
    {folder!r}, id2label={labels!r}, dtype=torch.float32
)
tokenizer = AutoTokenizer.from_pretrained({folder!r})""",
    False: """\
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained({folder!r}, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained({folder!r})""",
}


_AUTO_CLASSES = {
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}


def adapter_snippet(folder: str, base_model: str, task_type: str | None) -> str:
    """Python code that loads a saved adapter on its base model, for any of PEFT's task types."""
    name = _AUTO_CLASSES.get(task_type or "")
    if name is None:
        return (
            "import fastpeft  # registers its methods with PEFT\nfrom peft import PeftModel\n\n"
            f"model = PeftModel.from_pretrained(base, {folder!r})  # base: {base_model}, loaded as for training"
        )
    return (
        f"import fastpeft  # registers its methods with PEFT\nfrom peft import {name}\n\n"
        f"model = {name}.from_pretrained({folder!r})  # and what the base model took: num_labels, dtype"
    )


def classification_snippet(folder: str, labels: Sequence[str], adapter: bool) -> str:
    """Python code that loads a saved sequence classifier."""
    return _LOADING[adapter].format(folder=folder, labels=dict(enumerate(labels)))


def model_card(
    *,
    base_model: str,
    method: str,
    snippet: str,
    adapter: bool = True,
    data: str | None = None,
    labels: Sequence[str] = (),
    metrics: Mapping[str, str] | None = None,
    settings: Mapping[str, object] | None = None,
) -> str:
    """A model card in Markdown, with the header that model hubs read.

    Args:
        base_model: path or hub id of the model that was fine-tuned.
        method: the method's title, as "SiVA".
        snippet: Python code that loads what was saved.
        adapter: whether an adapter was saved, or a whole model.
        data: what it was trained on, in words.
        labels: names of the classes.
        metrics: results, each with its formatted value.
        settings: hyper-parameters that differ from nothing, in the order to show.
    """
    lines = ["---", f"base_model: {base_model}", f"library_name: {'peft' if adapter else 'transformers'}"]
    lines += ["tags:", "- fastpeft", "---", "", f"# {method} of {base_model}", ""]
    lines += [f"Fine-tuned by fastpeft {fastpeft.__version__}.", ""]
    lines += [f"- Base model: `{base_model}`", f"- Method: {method}"]
    if data:
        lines.append(f"- Data: {data}")
    if labels:
        lines.append(f"- Classes: {', '.join(labels)}")
    for title, values in (("Results", metrics), ("Settings", settings)):
        if values:
            lines += ["", f"## {title}", "", "| | |", "|---|---|"]
            lines += [f"| {name} | {value} |" for name, value in values.items()]
    lines += ["", "## Loading", "", "```python", snippet, "```", ""]
    return "\n".join(lines)
