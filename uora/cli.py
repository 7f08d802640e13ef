"""The command line of the core."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from uora.artifact import Artifact, loads, stored_bytes
from uora.data import MAX_PREVIEWS, DatasetReport, Overlong
from uora.errors import BaseModelError, ExportError, UoraError
from uora.estimate import Prices
from uora.layout import ModuleShape, trainable_parameters
from uora.reportview import render_report
from uora.spec import (
    METHODS,
    AdapterSpec,
    HyperparameterRequest,
    LoraSpec,
    OsoraSpec,
    Task,
    TrainingOptions,
    TrainingSpec,
    UoraSpec,
    parse_adapter,
    resolve,
)

if TYPE_CHECKING:
    from uora.models import LocalModel

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)

TaskOrAuto = Literal["auto", Task]
ExportForm = Literal["lora", "merged", "uora"]
ExportDtype = Literal["float32", "bfloat16", "float16"]


@app.callback()
def main() -> None:
    """UORA: fine-tuned models as tiny vectors over frames that come from seeds."""


@app.command()
def methods(
    model: Annotated[str, typer.Option(help="A known model's name, hub:ORG/NAME or path:/directory.")],
    targets: Annotated[
        str, typer.Option(help="all-linear; q,v; or names of modules with commas between.")
    ] = "all-linear",
    task: Annotated[Task, typer.Option(help="What the adapter is for.")] = "chat",
    rank: Annotated[int | None, typer.Option(help="Of every method; each has its own default.")] = None,
) -> None:
    """What an adapter of each method trains and stores on a base model."""
    with _one_line_errors():
        specs = [_spec(method, targets, rank) for method in METHODS]
        modules = _modules(model, specs[0], task)
        Console().print(_table(model, specs, modules))


@app.command()
def validate(
    file: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="JSONL, JSON, CSV, Parquet, zip of images.")
    ],
    model: Annotated[str, typer.Option(help="A known model's name, hub:ORG/NAME or path:/directory.")],
    task: Annotated[TaskOrAuto, typer.Option(help="What the rows are for; auto tells by the first.")] = "auto",
    max_length: Annotated[int | None, typer.Option(min=8, help="Tokens of a row; the model's context if less.")] = None,
    overlong: Annotated[Overlong, typer.Option(help="What happens to longer rows.")] = "error",
    training: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="The training file that this one validates.")
    ] = None,
    previews: Annotated[int, typer.Option(min=0, max=MAX_PREVIEWS, help="Rows that are shown.")] = 1,
    price_per_second: Annotated[
        float, typer.Option(min=0, envvar="UORA_PRICE_PER_SECOND", help="Of training, for the estimate.")
    ] = 0.0,
    price_per_thousand_tokens: Annotated[
        float, typer.Option(min=0, envvar="UORA_PRICE_PER_THOUSAND_TOKENS", help="Of all epochs, for the same.")
    ] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """What a file of rows is, what it costs a model in tokens, and what is wrong with it.

    Ends with 0 if the file can be trained on, with 1 if it has problems, with 2 if the command has.
    """
    with _one_line_errors():
        report = _report(
            file,
            model,
            task,
            max_length=max_length,
            overlong=overlong,
            training=training,
            n_previews=previews,
            prices=Prices(price_per_second, price_per_thousand_tokens),
        )
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
    else:
        Console().print(render_report(report))
    raise typer.Exit(0 if report.trainable else 1)


@app.command()
def export(
    adapter: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A stored adapter.")],
    out: Annotated[Path, typer.Argument(help="A new directory; for uora a new file.")],
    to: Annotated[
        ExportForm, typer.Option(help="lora: a PEFT directory; merged: a whole model; uora: a verified copy.")
    ],
    model: Annotated[
        str | None, typer.Option(help="The base model, if the name in the adapter does not say where it is.")
    ] = None,
    dtype: Annotated[
        ExportDtype | None, typer.Option(help="Of a merged model; as the base is stored, or bfloat16 if quantised.")
    ] = None,
) -> None:
    """Write a fine-tuned model for other servers (docs/handover.md)."""
    with _one_line_errors():
        if dtype and to != "merged":
            raise ExportError(f"--dtype is of merged models only; leave it out for {to}.")
        content = adapter.read_bytes()
        artifact = loads(content)
        if to == "lora":
            _export_lora(artifact, out, model)
        elif to == "merged":
            _export_merged(artifact, out, model, dtype)
        else:
            _write_new(out, content)
    typer.echo(f"{out}: {_size(out):,} bytes")


def _export_lora(artifact: Artifact, out: Path, model: str | None) -> None:
    from uora.convert import write_lora

    base = None
    if isinstance(artifact.manifest.adapter, OsoraSpec):  # the only one that stands on the weights
        from uora.svd import BaseWeights

        base = BaseWeights.of_local(_base_of(artifact, model), artifact.manifest.task, _cache_dir())
    write_lora(artifact, out, base=base, cache_dir=_cache_dir())


def _export_merged(artifact: Artifact, out: Path, model: str | None, dtype: ExportDtype | None) -> None:
    import torch

    from uora.merging import write_merged

    chosen = None if dtype is None else getattr(torch, dtype)
    write_merged(artifact, out, local=_base_of(artifact, model), dtype=chosen, cache_dir=_cache_dir())


def _base_of(artifact: Artifact, model: str | None) -> LocalModel:
    try:
        return _fetch(model or artifact.manifest.base_model)
    except BaseModelError as error:
        raise BaseModelError(f"{error.message} --model says where the base model is.") from error


def _write_new(out: Path, content: bytes) -> None:
    try:
        with out.open("xb") as file:
            file.write(content)
    except OSError as error:
        raise ExportError(
            f"{out} cannot be made: {error.strerror}. Name a new file in a directory there is."
        ) from error


def _size(out: Path) -> int:
    return sum(file.stat().st_size for file in (out.iterdir() if out.is_dir() else [out]))


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except UoraError as error:
        Console(stderr=True).print(
            f"{type(error).__name__}: {error.message}", style="red", highlight=False, soft_wrap=True
        )
        raise typer.Exit(2) from error


def _report(
    file: Path,
    model: str,
    task: TaskOrAuto,
    *,
    max_length: int | None,
    overlong: Overlong,
    training: Path | None,
    n_previews: int,
    prices: Prices,
) -> DatasetReport:
    from uora.encoders import report_file  # they take seconds to import
    from uora.sizing import with_estimate

    base = _fetch(model)
    told = None if task == "auto" else task
    report = report_file(
        file, base, task=told, max_length=max_length, overlong=overlong, training=training, n_previews=n_previews
    )
    if not report.trainable or training is not None or report.task is None:
        return report
    options = TrainingOptions(max_length=max_length, overlong=overlong)
    return with_estimate(report, _default_training(report.task, report.rows_usable, options), base, prices=prices)


def _default_training(task: Task, rows: int, options: TrainingOptions) -> TrainingSpec:
    """What a job does that asks for nothing in particular."""
    return resolve(
        HyperparameterRequest(),
        adapter=UoraSpec(),
        learning_rate=None,
        seed=0,
        n_examples=rows,
        task=task,
        options=options,
    )


def _spec(method: str, targets: str, rank: int | None) -> AdapterSpec:
    chosen = targets if targets in ("all-linear", "q,v") else tuple(name.strip() for name in targets.split(","))
    return parse_adapter({"method": method, "targets": chosen} | ({} if rank is None else {"r": rank}))


def _modules(model: str, spec: AdapterSpec, task: Task) -> list[ModuleShape]:
    from uora import targets
    from uora.models import load_skeleton  # they take seconds to import

    skeleton = load_skeleton(_fetch(model), task=task)
    return list(targets.find(skeleton, spec.targets).values())


def _fetch(model: str) -> LocalModel:
    from uora.models import fetch

    source = model if ":" in model else f"known:{model}"
    return fetch(model, source, cache_dir=_cache_dir())


def _cache_dir() -> Path:
    return Path(os.environ.get("UORA_CACHE_DIR", Path.home() / ".cache" / "uora"))


def _table(model: str, specs: list[AdapterSpec], modules: list[ModuleShape]) -> Table:
    lora = LoraSpec(r=8)
    lora_bytes = stored_bytes(lora, modules)
    table = Table(title=f"{model}: {len(modules)} modules")
    for name in ("method", "rank", "trainable parameters", "stored bytes", "LoRA r=8 is larger by"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for spec in specs:
        size = stored_bytes(spec, modules)
        row = (spec.method, f"{spec.r}", f"{trainable_parameters(spec, modules):,}", f"{size:,}")
        table.add_row(*row, f"{lora_bytes / size:.2f} x")
    return table
