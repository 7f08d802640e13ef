"""The command line of the core."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from uora.artifact import stored_bytes
from uora.errors import UoraError
from uora.layout import ModuleShape, trainable_parameters
from uora.spec import METHODS, AdapterSpec, LoraSpec, Task, parse_adapter

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)
_console = Console()


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
    try:
        specs = [_spec(method, targets, rank) for method in METHODS]
        modules = _modules(model, specs[0], task)
        table = _table(model, specs, modules)
    except UoraError as error:
        Console(stderr=True).print(
            f"{type(error).__name__}: {error.message}", style="red", highlight=False, soft_wrap=True
        )
        raise typer.Exit(2) from error
    _console.print(table)


def _spec(method: str, targets: str, rank: int | None) -> AdapterSpec:
    chosen = targets if targets in ("all-linear", "q,v") else tuple(name.strip() for name in targets.split(","))
    return parse_adapter({"method": method, "targets": chosen} | ({} if rank is None else {"r": rank}))


def _modules(model: str, spec: AdapterSpec, task: Task) -> list[ModuleShape]:
    from uora import targets
    from uora.models import fetch, load_skeleton  # they take seconds to import

    source = model if ":" in model else f"known:{model}"
    cache_dir = Path(os.environ.get("UORA_CACHE_DIR", Path.home() / ".cache" / "uora"))
    skeleton = load_skeleton(fetch(model, source, cache_dir=cache_dir), task=task)
    return list(targets.find(skeleton, spec.targets).values())


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
