"""A finished run, or a saved adapter, as what other libraries load: a plain model, a plain LoRA, or an ONNX file."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel
from transformers import DataCollatorWithPadding

from fastpeft.data.examples import Examples
from fastpeft.data.problems import MASKED_WORDS, NEXT_WORDS
from fastpeft.errors import FastpeftError, refuse
from fastpeft.ladder import LadderModel
from fastpeft.methods.registry import METHODS
from fastpeft.methods.saved_adapters import load_adapter
from fastpeft.methods.wrapping import merge
from fastpeft.mezo import Journal
from fastpeft.models import LoadedModel, resolve_model
from fastpeft.prompts.template import Prompt, is_of_decoder
from fastpeft.siva.export import save_as_lora
from fastpeft.support import files
from fastpeft.support.adapter_files import holds_adapter
from fastpeft.support.model_card import ONNX_FILE, loading_snippet, model_card, onnx_snippet
from fastpeft.support.stages import report
from fastpeft.training.generation import tell_ends
from fastpeft.training.lineage import check_places, check_start
from fastpeft.training.loading import FinishedRun, assemble, assemble_in_float32
from fastpeft.training.onnx_model import check_onnx, write_onnx
from fastpeft.training.results import card_fields
from fastpeft.training.run_folder import RunFolder
from fastpeft.training.setup import RunSetup, setup_of_run
from fastpeft.training.task import draw_start, prepare

logger = logging.getLogger(__name__)

FORMS = ("merged", "lora", "onnx")
_TEXTS = ("A warm film.", "It is long, and its end surprises nobody who has read the book.", "Good.")


def export(folder: str | Path, output: str | Path, to: str = "merged", step: int | None = None) -> Path:
    """Write the model of a finished run, or of a saved adapter, to a new folder, with tokenizer, prompt and model card.

    Args:
        folder: folder of the run, or one to which `save_pretrained` of PEFT wrote an adapter whose configuration names
            a base model that can be loaded.
        output: the folder to make.
        to: "merged", a plain transformers model: a whole one as it is, an adapter merged into its base, which may be
            that of a chain of runs; "lora", the adapter of a SiVA run as a LoRA of twice its rank, for its base, see
            `fastpeft.siva.export.save_as_lora` for who takes it; or "onnx", the merged model or the side network with
            its backbone as `model.onnx`, compared with PyTorch on a few texts.
        step: of a run by MeZO, the weights after so many of its steps, made again from its journal. None: those that
            the run left.

    Returns:
        `output`.

    Raises:
        FastpeftError: the run cannot be loaded or has no such form, `output` exists, or a library is not installed.
            Nothing is written then.

    Example:
        >>> export("runs/siva-demo", "model")  # doctest: +SKIP
        >>> AutoModelForSequenceClassification.from_pretrained("model")  # doctest: +SKIP
    """
    output = files.path_of(output)
    refuse(
        {
            f"a run is exported to {to!r}; allowed are {', '.join(FORMS)}. Choose one of these.": to not in FORMS,
            f"the output {str(output)!r} exists and is left alone. Give the name of a new folder.": (
                os.path.lexists(output)
            ),
        }
    )
    source = RunFolder(folder)
    load = _load_adapter if holds_adapter(source.path) and not source.started else _load_run
    model, tokenizer, prompt, card, batches = load(source, output, to, step)
    existing = next(parent for parent in output.absolute().parents if parent.is_dir())
    remedy = "Give the name of a new folder where one can be made, with room in it."
    with (
        files.saving(f"to {str(output)!r}", lambda: remedy),
        tempfile.TemporaryDirectory(prefix=".export-", dir=existing) as temporary,
    ):
        staged = Path(temporary) / output.name
        if to == "lora":
            save_as_lora(model, staged, model.active_adapter)
        elif to == "onnx":
            _save_onnx(_plain(model), batches, staged)
        else:
            _plain(model).save_pretrained(staged)
        if tokenizer is not None:
            tokenizer.save_pretrained(staged)
        if prompt is not None:
            prompt.save(staged)
        files.write_text(staged / "README.md", card)
        output.parent.mkdir(parents=True, exist_ok=True)
        files.publish(staged, output)
    return output


class _Loaded(NamedTuple):
    """What is to be written: a model with what goes beside it, and texts on which an ONNX file of it is compared."""

    model: Any
    tokenizer: Any
    prompt: Prompt | None
    card: str
    batches: Sequence[Any] = ()


def _load_adapter(source: RunFolder, output: Path, to: str, step: int | None) -> _Loaded:
    """A saved adapter on its base model."""
    refuse(
        {
            f"step is {step}, but {str(source.path)!r} holds an adapter alone. Leave it out.": step is not None,
            f"{str(source.path)!r} holds an adapter alone, and only a run is exported to onnx. Export it to merged, or "
            "call write_onnx of fastpeft.training.onnx_model on its model.": to == "onnx",
        }
    )
    model, tokenizer = load_adapter(source.path)
    return _Loaded(model, tokenizer, None, _card_of_adapter(model, output, to, tokenizer is not None))


def _load_run(source: RunFolder, output: Path, to: str, step: int | None) -> _Loaded:
    """The model of a finished run, or as it was after `step` of its steps."""
    setup = setup_of_run(source)
    setup.method.check_export(to, f"the run in {str(source.path)!r}")
    if to == "onnx":
        _check_onnx(setup, source)
    load = assemble if to == "lora" else assemble_in_float32  # a LoRA is made of the adapter alone
    run = load(source) if step is None else _replay(source, setup, step)
    model = run.loaded.model
    if to == "lora" and setup.config.init_from is not None:
        logger.info("the LoRA goes onto the model of the run in %s: export that to merged", setup.config.init_from)
        # not the model that the chain began with, onto which PEFT would put it without a word
        model.active_peft_config.base_model_name_or_path = _start_in_words(setup.config.init_from)
    if run.problem is NEXT_WORDS:  # at a turn's end too, which the configuration of a base that never chatted lacks
        tell_ends(model, run.loaded.tokenizer, chats=run.chats)
    card = _card_of_run(run, setup.method.title, source.metrics(), output, to, step)
    return _Loaded(model, run.loaded.tokenizer, run.prompt, card, _batches(run) if to == "onnx" else ())


def _check_onnx(setup: RunSetup, folder: RunFolder) -> None:
    """Raise `FastpeftError` where a run has no head that an ONNX file is written of, or a library is missing."""
    if setup.head.by_words or setup.head.prompt is not None:
        has = f"learned {setup.problem.labels}" if setup.problem.of_texts_alone else "has a prompt"
        raise FastpeftError(
            f"the run in {str(folder.path)!r} {has}; exported to onnx are runs that learned labels by a head of their "
            "own, without a prompt. Load it from its own folder."
        )
    check_onnx()


def _batches(run: FinishedRun) -> list[Any]:
    """A few texts as the model of a run reads them, in several shapes."""
    texts: list[Any] = [text.split() if run.problem.per_token else text for text in _TEXTS]
    if run.is_pair:
        texts = list(zip(texts, reversed(texts)))
    labels: list[Any] = [[0] * len(text) if run.problem.per_token else 0 for text in texts]
    rows = run.encoder.encode(Examples(texts, labels))
    for row in rows:
        del row["labels"]
    pad = DataCollatorWithPadding(run.loaded.tokenizer)
    return [dict(pad(some)) for some in (rows[:2], rows[2:], rows)]


def _save_onnx(model: Any, batches: Sequence[Any], folder: Path) -> None:
    folder.mkdir()
    report("writing ONNX")
    difference = write_onnx(model, batches, folder / ONNX_FILE)
    (model.backbone.core if isinstance(model, LadderModel) else model).config.save_pretrained(folder)
    logger.info("ONNX Runtime agrees with PyTorch on %d texts to %.0e of the largest output", len(_TEXTS), difference)


def _plain(model: Any) -> Any:
    return merge(model) if isinstance(model, PeftModel) else model


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
            problem_type=getattr(model.config, "problem_type", None),
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
    start = config.init_from if adapter else None  # the run whose model a LoRA goes onto
    steps = metrics["steps"] if step is None else f"{step} of {metrics['steps']}"
    recipe = {"learning_rate": metrics["learning_rate"], "steps": steps}
    if to == "onnx":
        snippet = onnx_snippet(str(output), max_length=run.max_length, pairs=run.is_pair, words=run.problem.per_token)
    else:
        snippet = loading_snippet(
            str(output),
            base_model=resolve_model(config.model) if start is None else _start_in_words(start),
            task_type=run.problem.task_type if start is None else None,
            adapter=adapter,
            registered=False,
            labels=run.labels,
            problem_type=run.problem.name,
            prompt_head=None if run.prompt is None else run.prompt.head,
            masked_words=run.problem is MASKED_WORDS and start is None,
            decoder=is_of_decoder(run.loaded.tokenizer),
            tokenizer=run.problem is NEXT_WORDS,
        )
    return model_card(
        method=f"{title}, as a LoRA" if adapter else title,
        snippet=snippet,
        library={"lora": "peft", "merged": "transformers"}.get(to, to),
        data=Path(config.data).name if Path(config.data).is_absolute() else config.data,
        **card_fields(config, metrics, recipe, measured=step is None),
    )


def _start_in_words(init_from: str) -> str:
    return f"the model of the run in {init_from}, exported to merged"


def _replay(folder: RunFolder, setup: RunSetup, step: int) -> FinishedRun:
    """The run as it was after `step` of its steps."""
    if not setup.method.zeroth_order:
        raise FastpeftError(
            f"step is {step}, but the run in {str(folder.path)!r} was made by {setup.method.title}: only the "
            "journal of the method 'mezo' tells of single steps. Leave it out."
        )
    journal = Journal.open(folder.journal)
    first = journal.header["first_step"]
    refuse(
        {
            f"the journal of the run in {str(folder.path)!r} begins after step {first}, and the weights it began with "
            "are not kept. Leave step out.": first != 0,
            f"step is {step}; the run in {str(folder.path)!r} made {journal.steps}. Give 0 to that.": (
                not 0 <= step <= journal.steps
            ),
        }
    )
    check_places(folder)
    check_start(folder)
    start = draw_start(setup)
    model: Any = prepare(start, setup)
    journal.replay(model, stop=step)
    return FinishedRun.of(setup, folder.metrics(), LoadedModel(model.eval(), start.tokenizer, start.head))
