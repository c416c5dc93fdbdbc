"""The command line: `fastpeft train | eval | predict | compare | export | serve | info`."""

from __future__ import annotations

import io
import shlex
import sys
from pathlib import Path
from typing import Any

import typer

from fastpeft.cli_commands import Command, Group, showing
from fastpeft.cli_evaluation import evaluate_decoder, evaluate_prompt, evaluate_run
from fastpeft.cli_options import (
    BUDGET,
    COMPARISON,
    FIELDS,
    QUIET,
    SETTINGS,
    check_budget,
    panel_option,
    parse_settings,
    run_options,
    typed,
)
from fastpeft.comparison.variants import DECIDED, PROMPTED, ZERO_SHOT, split_items, variant_message
from fastpeft.data.names import DEMO
from fastpeft.data.tables import READERS, TEXT_READERS, check_there
from fastpeft.errors import FastpeftError
from fastpeft.methods.peft_types import PREFIX
from fastpeft.methods.registry import METHODS
from fastpeft.support.adapter_files import holds_adapter
from fastpeft.support.import_hook import import_when_used, import_without
from fastpeft.support.launcher import is_first
from fastpeft.training.config import ADVANCED, OUTPUT, TrainConfig
from fastpeft.training.run_folder import RunFolder, read_config
from fastpeft.version import __version__

# what imports PyTorch is imported in the commands, so that `fastpeft train --help` and wrong paths answer at once

_NAMES = ", ".join((*METHODS, f"{PREFIX}TYPE", ZERO_SHOT))


app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune transformers with little memory.",
    epilog="To begin: fastpeft train --data reviews.csv",
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fastpeft {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", "-V", is_eager=True, callback=_show_version, help="Show the version and exit."
    ),
) -> None:
    pass


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _run_config(values: dict[str, Any], file: Path | None, settings: dict[str, Any], resume: bool) -> TrainConfig:
    """The run that `train` is asked for: by options, by the `run.json` of --config, or by the folder to resume."""
    if file is not None:
        written = read_config(file)
        begun = RunFolder(file.parent)
        if resume and begun.config_file == file and (begun.finished or begun.checkpoints.is_dir()):
            written["output"] = str(file.parent)  # the file has it as seen from where the run was begun
        values = {**written, **values}
    given = [*values, *settings]
    if "output" not in values:
        data = Path(str(values.get("data", DEMO))).stem.replace(":", "-")  # which a hub data set's name may have
        values["output"] = f"runs/{values.get('method', 'siva')}-{data}"
    folder = RunFolder(values["output"])
    if file is None and resume and folder.started:
        values = {**folder.config(), **values}
    elif resume and given == ["output"]:
        raise FastpeftError(
            f"there is no run in {str(folder.path)!r} to resume. Check --output; to start a new run there, give its "
            "options too, such as --method and --data."
        )
    if settings:
        values["settings"] = {**(values.get("settings") or {}), **settings}
    return TrainConfig.from_values(values)


@app.command(cls=Command)
@run_options("found_prompt", "settings")
def train(
    *,
    config: Path | None = panel_option(
        None, panel=ADVANCED, metavar="FILE", help="Repeat the run of this run.json; other options override its values."
    ),
    settings: list[str] | None = SETTINGS,
    resume: bool = panel_option(
        False, "--resume", panel=OUTPUT, common=True, help="Resume the run in the output folder."
    ),
    overwrite: bool = panel_option(False, "--overwrite", panel=OUTPUT, help="Replace the run in the output folder."),
    quiet: bool = QUIET,
    dry_run: bool = panel_option(
        False,
        "--dry-run",
        panel=OUTPUT,
        common=True,
        help="Show what would be trained, its memory and time; write nothing.",
    ),
    memory_budget: float | None = BUDGET,
    **values: Any,
) -> None:
    """Fine-tune a model."""
    first = is_first()  # of the processes of a launcher; it alone shows anything
    if not first:
        quiet = True
    run = _run_config(_given(values), config, parse_settings(settings), resume)
    folder = RunFolder(run.output)
    check_budget(memory_budget, dry_run)
    if not dry_run:
        folder.check_files(run.values(), resume=resume, overwrite=overwrite)
    if run.data != DEMO and not (resume and folder.finished):
        check_there(run.data, TEXT_READERS if run.objective else READERS)
    command = shlex.join(["fastpeft", *sys.argv[1:]])
    from fastpeft.progress import shown

    with shown(quiet):
        from fastpeft import console
        from fastpeft.training.recipe import train as train_run

        console.show_messages(quiet)
        if dry_run:
            plan = console.run_plan(run, memory_budget)
        else:
            result = train_run(run, resume=resume, overwrite=overwrite, command=command)
    if not first:
        return
    if dry_run:
        console.show_run_plan(run, plan, memory_budget)
    elif not quiet:
        console.show_metrics(result.folder, result.metrics)


@app.command(name="eval", cls=Command)
def evaluate(
    folder: Path | None = typer.Argument(None, metavar="DIR", help="Folder of a finished run."),
    data: str | None = typer.Option(
        None,
        "--data",
        "-d",
        help="Data in place of the run's own: all rows of a file (with --prompt auto only the rows held out of it), or "
        "the dev part of a folder or hub data set.",
    ),
    model: str | None = typer.Option(
        None,
        "--model",
        "-m",
        help="In place of DIR: a model without fine-tuning, which classifies by --prompt or, "
        "with --objective causal, predicts next tokens.",
    ),
    objective: str | None = typer.Option(
        None,
        metavar="causal",
        help="With --model: evaluate a decoder on the texts, completions or assistant's turns of --data.",
    ),
    prompt: str | None = typer.Option(
        None,
        metavar="TEMPLATE|NAME|auto",
        help="The prompt, with --model; auto finds one on the training rows of --data.",
    ),
    label_words: str | None = typer.Option(None, help="Label words of --prompt, as for train."),
    calibrate: bool = typer.Option(
        False,
        "--calibrate",
        help="With --prompt: calibrate, that is, subtract the log-probabilities of the label words for an empty text.",
    ),
    text_column: str | None = typer.Option(None, help="Column of texts in --data, or two joined by a comma for pairs."),
    label_column: str | None = typer.Option(None, help="Column of classes in --data."),
    max_new_tokens: int | None = typer.Option(
        None,
        help="Maximum number of tokens that a language model generates for a prompt, for BLEU and ROUGE; 0 skips both "
        "(default: 64).",
    ),
) -> None:
    """Evaluate a finished run, or a model without fine-tuning, on dev rows."""
    columns = {"text_column": text_column, "label_column": label_column}
    of_prompts = (prompt, label_words, calibrate) != (None, None, False)
    if objective is not None:
        others = folder is not None or label_column is not None or of_prompts
        title, metrics = evaluate_decoder(objective, model, data, text_column, max_new_tokens, others=others)
    elif folder is not None:
        others = bool(model) or of_prompts
        title, metrics = evaluate_run(folder, data, columns, max_new_tokens, others=others)
    else:
        title, metrics = evaluate_prompt(model, prompt, label_words, data or DEMO, columns, calibrate, max_new_tokens)
    from fastpeft import console

    console.show_table(
        title,
        [*console.measured(metrics), ("loss", f"{metrics['loss']:.3f}"), ("rows", f"{metrics['dev_rows']:,}")],
    )
    console.show_warnings(metrics)


@app.command(cls=Command)
def predict(
    folder: Path = typer.Argument(..., metavar="DIR", help="Folder of a finished run."),
    texts: list[str] | None = typer.Argument(
        None, metavar="TEXT", help="Texts to classify; separate the two texts of a pair by a tab."
    ),
    file: str | None = typer.Option(
        None,
        help="A csv, tsv, jsonl or parquet file, read as by train; or a txt file with one text per line (for pairs: "
        "two texts separated by a tab). - reads standard input, as txt unless --format is given.",
    ),
    kind: str | None = typer.Option(
        None, "--format", help="What --file is: csv, tsv, jsonl, parquet or txt (default: by its name)"
    ),
    text_column: str | None = typer.Option(None, help="Column of texts in --file, or two joined by a comma for pairs."),
    every: bool = typer.Option(
        False, "--all", help="Show the probability of every class, not only of the predicted one."
    ),
    output: Path | None = typer.Option(
        None,
        "--output",
        "-o",
        help="Write texts, classes, probabilities and other columns of --file to this csv, tsv, jsonl or parquet file.",
    ),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace the output file if it exists."),
    max_new_tokens: int | None = typer.Option(
        None, help="Maximum number of tokens that a language model generates for a text (default: 64)."
    ),
) -> None:
    """Classify texts: prints class, probability and text, separated by tabs.

    A run on numbers prints the number's name, its value and the text; one on tags prints tag, probability and word, a
    word a line, and an empty line after each text. A language model prints what it generates, and an empty line.

    Exit code 1: empty texts or rows of the file were left out, each named on standard error.
    """
    if not texts and file is None:
        raise FastpeftError("nothing to classify; give texts, or --file with a row for each.")
    if kind is not None and file is None:
        raise FastpeftError(f"--format is {kind!r}, but there is no --file. Give --file, or remove --format.")
    if overwrite and output is None:
        raise FastpeftError("--overwrite is given, but there is no --output. Give --output, or remove --overwrite.")
    if every and output is not None:
        raise FastpeftError(
            "--all changes only what is printed, but --output writes a file, which always has the probability of every "
            "class or label (of tags, that of the most likely tag). Remove --all."
        )
    RunFolder(folder).check_finished()
    with showing():
        from fastpeft import console
        from fastpeft.data.output_tables import check_output
        from fastpeft.training.prediction_files import Predictions

        target = None if output is None else check_output(output, overwrite)
        found = Predictions(
            folder, texts or [], file, kind=kind, text_column=text_column, max_new_tokens=max_new_tokens
        )
    if every and not found.labels:
        raise FastpeftError(
            "--all shows the probability of every class, tag or label, but the run has none. Leave it out."
        )
    left_out = console.show_predictions(found, target, every)
    raise typer.Exit(1 if left_out else 0)


@app.command(cls=Command)
@run_options(*DECIDED, *PROMPTED)
def compare(
    *,
    output: str = panel_option(
        ...,
        "--output",
        "-o",
        panel=OUTPUT,
        common=True,
        metavar="DIR",
        help="Folder of the comparison; a comparison that is already there is continued.",
    ),
    suite: str | None = panel_option(
        None,
        panel=COMPARISON,
        common=True,
        metavar="NAME",
        help="Add the rows of this table or figure of the paper: table1, table2 or figure5.",
    ),
    methods: list[str] | None = panel_option(
        None,
        panel=COMPARISON,
        common=True,
        metavar="VARIANT,...",
        help=f"Variants to compare. A variant is a method ({_NAMES}) and its options after colons: "
        "k-lst:window=5, or lora:rank=8. Inside a value write + for a comma, or put the value in double quotes. "
        "zero-shot:prompt=sst2 is not trained; lst:init_from=mezo starts from another variant.",
    ),
    protocol: str | None = panel_option(
        None,
        panel=COMPARISON,
        common=True,
        metavar="NAME",
        help="quick: one seed, the learning rates of the recipes, one epoch (MeZO: its recipe's). full: three seeds, "
        "and for each variant without a learning rate the best of three on a slice of the training rows.",
    ),
    seeds: int | None = panel_option(
        None,
        panel=COMPARISON,
        common=True,
        metavar="N",
        help="Runs of each variant, with the seeds 0, 1, ... (default: the protocol's, or 1)",
    ),
    prompts: list[str] | None = panel_option(
        None,
        panel=COMPARISON,
        metavar="PROMPT,...",
        help="Run every variant that has no prompt of its own once with each of these: templates, names, auto or none; "
        "fields follow after colons, such as sst2:label_words=bad+good. With --suite give one prompt, for the rows "
        "of the paper that have one; none skips these rows.",
    ),
    jobs: int | None = panel_option(
        None,
        "--jobs",
        "-j",
        panel=COMPARISON,
        common=True,
        metavar="N",
        help="Run N cells at once: the CPU threads are divided among them, and each has a GPU where there are several "
        "(default: 1; with --executor ray one a GPU, or one a node)",
    ),
    executor: str = panel_option(
        "local",
        panel=COMPARISON,
        metavar="local|ray",
        help="Where cells run: on this machine, or on the Ray cluster that RAY_ADDRESS names, else one started here.",
    ),
    settings: list[str] | None = SETTINGS,
    quiet: bool = QUIET,
    dry_run: bool = panel_option(
        False,
        "--dry-run",
        panel=OUTPUT,
        common=True,
        help="Show the cells with the time and memory that each would take; write nothing.",
    ),
    memory_budget: float | None = BUDGET,
    **common: Any,
) -> None:
    """Train by several methods, each run in a process of its own, and make one table of them.

    Repeat the same command to continue: finished runs are kept, failed ones are tried again.

    Exit code 1: a run failed, or with --dry-run would fail.
    """
    check_budget(memory_budget, dry_run)
    new_settings = parse_settings(settings)
    for name in new_settings:
        if name in FIELDS and name not in DECIDED:
            raise FastpeftError(f"{name} cannot be set as a setting; use `{name}`.")
    from fastpeft.progress import shown

    with shown(quiet, lines=False):
        from fastpeft import console
        from fastpeft.comparison.plan import CompareConfig
        from fastpeft.comparison.run import Comparison

        console.show_messages(quiet)
        config = CompareConfig(
            output=output,
            methods=[item for text in methods or [] for item in split_items(text)],
            suite=suite,
            protocol=protocol,
            prompts=[item for text in prompts or [] for item in split_items(text)],
            seeds=seeds,
            common={**new_settings, **_given(common)},
        )
        comparison = Comparison(config, shlex.join(["fastpeft", *sys.argv[1:]]), jobs, executor)
        known = console.estimates(comparison, memory_budget) if dry_run else {}
    if dry_run:
        failing = console.show_plan(comparison, known, memory_budget)
        for variant, error in failing.items():
            message = FastpeftError(variant_message(variant, FastpeftError(error))).message_for(typed)
            typer.echo(f"{variant} would fail: {message}", err=True)
        raise typer.Exit(1 if failing else 0)
    try:
        with console.live_comparison(comparison, quiet):
            result = comparison.run()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"Interrupted. Finished runs are kept in {output}; repeat the same command to continue."
        ) from None
    if not quiet:
        console.show_report(comparison)
    for name, error in result.failed.items():
        typer.echo(f"{name} failed: {error}", err=True)
    raise typer.Exit(1 if result.failed else 0)


@app.command(cls=Command)
def export(
    folder: Path = typer.Argument(..., metavar="RUN", help="Folder of a finished run or of a PEFT adapter."),
    output: Path = typer.Argument(..., metavar="OUT", help="Folder to write to; it must not exist."),
    to: str = typer.Option(
        "merged",
        help="merged: a plain transformers model; lora: a SiVA adapter as a LoRA of twice its rank, for its base "
        "model; onnx: a file for ONNX Runtime, of side networks too.",
    ),
    step: int | None = typer.Option(
        None, help="For a MeZO run: export the weights after this step, replayed from the journal."
    ),
) -> None:
    """Export the model of a run, or of an adapter saved by save_pretrained, in a form that other libraries can load."""
    if not holds_adapter(folder):
        RunFolder(folder).check_finished()
    with showing():
        from fastpeft.training import export as exporting

        saved = exporting.export(folder, output, to, step)
    typer.echo(f"saved in {saved}")


@app.command(cls=Command)
def serve(
    items: list[str] = typer.Argument(
        ..., metavar="RUN", help="Folders of finished runs. NAME=RUN names a task (default: the folder's name)."
    ),
    host: str = typer.Option(
        "127.0.0.1", metavar="ADDRESS", help="Address to listen on; 0.0.0.0 is reached from other machines."
    ),
    port: int = typer.Option(8000, min=0, max=65535, metavar="N", help="Port to listen on; 0 is any free one."),
    max_rows: int = typer.Option(
        64, min=1, metavar="N", help="Maximum number of texts per forward pass; on a CPU 16 at most."
    ),
    max_wait: float = typer.Option(
        0.004, min=0, max=10, metavar="SECONDS", help="Seconds that a request waits for others to share a pass."
    ),
    max_length: int | None = typer.Option(
        None,
        min=2,
        metavar="N",
        help="Truncate texts to N tokens (default and most: the max_length of the run). For a language model: refuse a "
        "prompt that with its answer has more than N (default and most: what the model can read)",
    ),
    device: str | None = typer.Option(
        None, metavar="DEVICE", help="cpu, cuda, cuda:1 (default: the accelerator, or the CPU)"
    ),
    runs: Path | None = typer.Option(
        None, metavar="DIR", help="Let clients add runs from this folder, and remove tasks."
    ),
) -> None:
    """Serve the predictions of one or more runs over HTTP.

    Side networks (k-LST, LST) on equal backbones share one backbone, and a pass answers for all of them. Any other run
    is served beside them, with a model of its own; equal weights of these are held once. Language models answer in the
    form of OpenAI's endpoints.

    The server has no authentication: put it behind a proxy that has, above all with --runs. Requires the extra serve.
    """
    from fastpeft.progress import shown

    with showing():
        from fastpeft.serving import server

    server.serve(
        items,
        host=host,
        port=port,
        max_rows=max_rows,
        max_wait=max_wait,
        max_length=max_length,
        device=device,
        runs=runs,
        loading=shown(lines=False),
        say=typer.echo,
    )


@app.command(cls=Command)
def info() -> None:
    """Show versions, devices, and what each op runs on and why."""
    with showing():
        from fastpeft import console
        from fastpeft.ops import backends
        from fastpeft.support import environment

    ops = [(f"{choice.op} on {choice.device}", f"{choice.backend}: {choice.reason}") for choice in backends.choices()]
    console.show_table("versions", environment.versions().items())
    console.show_table("devices", environment.devices().items())
    console.show_table("ops", ops)


def main() -> None:
    """Entry point of the `fastpeft` command."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # what it cannot encode is escaped, as on standard error
        sys.stdout.reconfigure(errors="backslashreplace")
    import_when_used("datasets")  # the Trainer's module imports it: 85 MB, and own rows need none of it
    import_without("sklearn.utils.fixes", "pandas")  # 62 MB, for tables of pandas that nobody gives it
    app(prog_name="fastpeft")
