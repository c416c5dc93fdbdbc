"""A finished run, or a saved adapter, as what other libraries load: a plain model, or a plain LoRA."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from peft import PeftModel

from fastpeft import files
from fastpeft.adapters import holds_adapter, load_adapter
from fastpeft.errors import FastpeftError
from fastpeft.loading import FinishedRun, assemble, outline
from fastpeft.methods import get_method
from fastpeft.mezo import Journal
from fastpeft.models import Classifier
from fastpeft.runs import RunFolder
from fastpeft.siva.export import save_as_lora
from fastpeft.task import draw_start, prepare

logger = logging.getLogger(__name__)

FORMS = ("merged", "lora")


def export(folder: str | Path, output: str | Path, to: str = "merged", step: int | None = None) -> Path:
    """Write the model of a finished run, or of a saved adapter, to a new folder, with its tokenizer and its prompt.

    Args:
        folder: folder of the run, or one to which `save_pretrained` of PEFT wrote an adapter whose configuration names
            a base model that can be loaded.
        output: the folder to make.
        to: "merged", a plain transformers model: a whole one as it is, an adapter merged into its base, which may be
            that of a chain of runs; or "lora", the adapter of a SiVA run as a LoRA of twice its rank, for its base.
            See `fastpeft.siva.export.save_as_lora` for who takes it.
        step: of a run by MeZO, the weights after so many of its steps, made again from its journal. None: those that
            the run left.

    Returns:
        `output`.

    Raises:
        FastpeftError: the run cannot be loaded or has no such form, or `output` exists. Nothing is written then.

    Example:
        >>> export("runs/siva-demo", "model")  # doctest: +SKIP
        >>> AutoModelForSequenceClassification.from_pretrained("model")  # doctest: +SKIP
    """
    if to not in FORMS:
        raise FastpeftError(f"a run is exported to {to!r}; allowed are {' and '.join(FORMS)}. Choose one of these.")
    output = Path(output).expanduser()
    if os.path.lexists(output):
        raise FastpeftError(f"the output {str(output)!r} exists and is left alone. Give the name of a new folder.")
    source = RunFolder(folder)
    if holds_adapter(source.path) and not source.started:
        if step is not None:
            raise FastpeftError(f"step is {step}, but {str(source.path)!r} holds an adapter alone. Leave it out.")
        (model, tokenizer), prompt = load_adapter(source.path), None
    else:
        _check_form(source, to)
        run = assemble(source) if step is None else _replay(source, step)
        model, tokenizer, prompt = run.classifier.model, run.classifier.tokenizer, run.prompt
    existing = next(parent for parent in output.absolute().parents if parent.is_dir())
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=existing) as temporary:
            staged = Path(temporary) / output.name
            _save(model, to, staged)
            if tokenizer is not None:
                tokenizer.save_pretrained(staged)
            if prompt is not None:
                prompt.save(staged)
            output.parent.mkdir(parents=True, exist_ok=True)
            files.publish(staged, output)
    except OSError as error:
        raise FastpeftError(
            f"cannot write to {str(output)!r} ({error.strerror}). Give the name of a new folder where one can be made."
        ) from error
    return output


def _check_form(source: RunFolder, to: str) -> None:
    """Raise `FastpeftError` where the model of a run cannot take the form `to`."""
    config, _ = outline(source)
    method = get_method(config.method, config.settings)
    if method.ladder:
        raise FastpeftError(
            f"the run in {str(source.path)!r} trained a side network ({method.title}), which works beside the layers "
            "of its backbone and cannot become a part of them. Load it from its own folder."
        )
    if to == "lora" and not method.adapts:
        raise FastpeftError(
            f"the run in {str(source.path)!r} trained a whole model ({method.title}); only a SiVA adapter is exported "
            "to lora. Export it to merged."
        )
    if to == "lora" and config.init_from is not None:
        logger.info("the LoRA goes onto the model of the run in %s: export that one to merged", config.init_from)


def _save(model: Any, to: str, folder: Path) -> None:
    if to == "lora":
        save_as_lora(model, folder, model.active_adapter)
    elif isinstance(model, PeftModel):
        model.merge_and_unload().save_pretrained(folder)
    else:
        model.save_pretrained(folder)


def _replay(folder: RunFolder, step: int) -> FinishedRun:
    """The run as it was after `step` of its steps."""
    config, head = outline(folder)
    if not get_method(config.method, config.settings).zeroth_order:
        raise FastpeftError(
            f"step is {step}, but the run in {str(folder.path)!r} was not by MeZO, whose journal alone tells of single "
            "steps. Leave it out."
        )
    journal = Journal.open(folder.journal)
    first = journal.header["first_step"]
    if first != 0:
        raise FastpeftError(
            f"the journal of the run in {str(folder.path)!r} begins after step {first}, and the weights it began with "
            "are not kept. Leave step out."
        )
    if not 0 <= step <= journal.steps:
        raise FastpeftError(f"step is {step}; the run in {str(folder.path)!r} made {journal.steps}. Give 0 to that.")
    folder.check_start()
    start = draw_start(config, head)
    model: Any = prepare(start, config, head)
    journal.replay(model, stop=step)
    metrics = folder.metrics()
    classifier = Classifier(model.eval(), start.tokenizer, start.head)
    return FinishedRun(
        classifier, config, head.problem, head.labels, metrics["pairs"], head.prompt, metrics["max_length"]
    )
