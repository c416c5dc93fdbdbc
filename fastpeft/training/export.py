"""A finished run, or a saved adapter, as what other libraries load: a plain model, or a plain LoRA."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel

from fastpeft.data.models import Classifier, resolve_model
from fastpeft.data.problems import MASKED_WORDS
from fastpeft.errors import FastpeftError
from fastpeft.methods.registry import METHODS
from fastpeft.methods.saved_adapters import load_adapter
from fastpeft.methods.wrapping import merge
from fastpeft.mezo import Journal
from fastpeft.siva.export import save_as_lora
from fastpeft.support import files
from fastpeft.support.adapter_files import holds_adapter
from fastpeft.support.model_card import loading_snippet, model_card
from fastpeft.training.loading import FinishedRun, assemble
from fastpeft.training.results import answers_in_words, chosen_by, results
from fastpeft.training.run_folder import RunFolder
from fastpeft.training.setup import RunSetup, setup_of_run
from fastpeft.training.task import draw_start, prepare

logger = logging.getLogger(__name__)

FORMS = ("merged", "lora")


def export(folder: str | Path, output: str | Path, to: str = "merged", step: int | None = None) -> Path:
    """Write the model of a finished run, or of a saved adapter, to a new folder, with tokenizer, prompt and model card.

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
        card = _card_of_adapter(model, output, to, tokenizer is not None)
    else:
        setup = setup_of_run(source)
        setup.method.check_export(to, f"the run in {str(source.path)!r}")
        if to == "lora" and setup.config.init_from is not None:
            logger.info("the LoRA goes onto the model of the run in %s: export that to merged", setup.config.init_from)
        run = assemble(source) if step is None else _replay(source, setup, step)
        model, tokenizer, prompt = run.classifier.model, run.classifier.tokenizer, run.prompt
        card = _card_of_run(run, setup.method.title, source.metrics(), output, to, step)
    existing = next(parent for parent in output.absolute().parents if parent.is_dir())
    remedy = "Give the name of a new folder where one can be made, with room in it."
    with (
        files.saving(f"to {str(output)!r}", lambda: remedy),
        tempfile.TemporaryDirectory(prefix=".export-", dir=existing) as temporary,
    ):
        staged = Path(temporary) / output.name
        _save(model, to, staged)
        if tokenizer is not None:
            tokenizer.save_pretrained(staged)
        if prompt is not None:
            prompt.save(staged)
        files.write_text(staged / "README.md", card)
        output.parent.mkdir(parents=True, exist_ok=True)
        files.publish(staged, output)
    return output


def _save(model: Any, to: str, folder: Path) -> None:
    if to == "lora":
        save_as_lora(model, folder, model.active_adapter)
    elif isinstance(model, PeftModel):
        merge(model).save_pretrained(folder)
    else:
        model.save_pretrained(folder)


def _card_of_adapter(model: PeftModel, output: Path, to: str, has_tokenizer: bool) -> str:
    config, kind = model.active_peft_config, type(model.get_base_model())
    adapter, method = to == "lora", config.peft_type.lower()
    title = METHODS[method].title if method in METHODS else config.peft_type.value
    labels = getattr(model.config, "id2label", None) if config.task_type in ("SEQ_CLS", "TOKEN_CLS") else None
    if config.task_type is None and not adapter:
        snippet = (
            f"from {kind.__module__} import {kind.__name__}\n\nmodel = {kind.__name__}.from_pretrained({str(output)!r})"
        )
    else:
        snippet = loading_snippet(
            str(output),
            base_model=config.base_model_name_or_path or "the base model",
            task_type=config.task_type,
            adapter=adapter,
            registered=False,
            labels=list(labels.values()) if labels and has_tokenizer else (),
        )
    return model_card(
        base_model=config.base_model_name_or_path,
        method=f"{title}, as a LoRA" if adapter else title,
        snippet=snippet,
        library="peft" if adapter else "transformers",
    )


def _card_of_run(
    run: FinishedRun, title: str, metrics: Mapping[str, Any], output: Path, to: str, step: int | None
) -> str:
    """The model card; weights from within a run have no results of their own."""
    config, adapter = run.config, to == "lora"
    onto_chain = adapter and config.init_from is not None
    base = f"the model of the run in {config.init_from}, exported to merged"
    shown = {name: getattr(config, name) for name in ("prompt", "init_from", "batch_size", "seed")}
    settings = {"learning_rate": metrics["learning_rate"], "steps": metrics["steps"], **shown, **config.settings}
    if step is not None:
        settings["steps"] = f"{step} of {metrics['steps']}"
    return model_card(
        base_model=config.model,
        method=f"{title}, as a LoRA" if adapter else title,
        snippet=loading_snippet(
            str(output),
            base_model=base if onto_chain else resolve_model(config.model),
            task_type=None if onto_chain else run.problem.task_type,
            adapter=adapter,
            registered=False,
            labels=run.labels,
            prompt_head=None if run.prompt is None else run.prompt.head,
            masked_words=run.problem is MASKED_WORDS and not onto_chain,
        ),
        library="peft" if adapter else "transformers",
        data=config.data,
        labels=run.labels,
        labels_are=run.problem.labels,
        answers=answers_in_words(metrics if step is None else {**metrics, "threshold": None}),
        chosen_by=chosen_by(metrics) if step is None else None,
        metrics=results(metrics) if step is None else None,
        settings={name: value for name, value in settings.items() if value is not None},
    )


def _replay(folder: RunFolder, setup: RunSetup, step: int) -> FinishedRun:
    """The run as it was after `step` of its steps."""
    if not setup.method.optimization.keeps_journal:
        raise FastpeftError(
            f"step is {step}, but the run in {str(folder.path)!r} was made by {setup.method.title}: only the "
            "journal of the method 'mezo' tells of single steps. Leave it out."
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
    start = draw_start(setup)
    model: Any = prepare(start, setup)
    journal.replay(model, stop=step)
    return FinishedRun.of(setup, folder.metrics(), Classifier(model.eval(), start.tokenizer, start.head))
