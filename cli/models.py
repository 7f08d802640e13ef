"""``uora models``"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from cli.client import connect, path, streamed
from cli.output import AsJson, Json, Limit, Out, as_dict, as_dicts, print_item, print_json, print_list, say, write_new

app = typer.Typer(no_args_is_help=True, help="Models: the base models and your own.")

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A name, ft:...")]
ImportedTask = Literal["chat", "completion"]
Form = Literal["uora", "lora", "merged"]
Dtype = Literal["float32", "bfloat16", "float16"]

_COLUMNS = {
    "model": lambda model: model["id"],
    "base": lambda model: model.get("root"),
    "from": lambda model: model.get("parent"),
    "owner": lambda model: model["owned_by"],
}


@app.command("list")
def list_models(ctx: typer.Context, limit: Limit = 100, as_json: AsJson = False) -> None:
    """List your models, those that are shared with you, and the base models."""
    print_list(as_dicts(connect(ctx).models.list(), limit), _COLUMNS, as_json=as_json)


@app.command("get")
def get_model(ctx: typer.Context, model: ModelName, as_json: AsJson = False) -> None:
    """Describe a model."""
    print_item(as_dict(connect(ctx).models.retrieve(model)), as_json=as_json)


@app.command()
def delete(ctx: typer.Context, models: Annotated[list[str], typer.Argument(metavar="MODEL...")]) -> None:
    """Delete models of your own with their checkpoints."""
    client = connect(ctx)
    for model in models:
        client.models.delete(model)
        say(f"{model} deleted")


@app.command()
def export(
    ctx: typer.Context,
    model: ModelName,
    to: Annotated[
        Form,
        typer.Option(help="uora: as it is stored; lora: a zip of the equal LoRA for PEFT; merged: of the whole model."),
    ] = "uora",
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of a merged model's weights; the base model's if left out.")
    ] = None,
    out: Out = None,
) -> None:
    """Download a model. `uora export` makes the same forms of a downloaded one, without a service."""
    client = connect(ctx)
    url = path("/models/{}/adapter", model)
    query = {"format": to} | ({} if dtype is None else {"dtype": dtype})
    with streamed(client, url, query) as response:
        named = re.search(r'filename="([\w.-]+)"', response.headers.get("content-disposition", ""))
        write_new(out or Path(named[1] if named else "adapter"), response.iter_bytes())


@app.command("import")
def import_model(
    ctx: typer.Context,
    file: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="An adapter of this service, or a zip or tar of PEFT's.")
    ],
    base_model: Annotated[str, typer.Option(help="The base model that it was trained on.")],
    suffix: Annotated[str | None, typer.Option(help="For its name.")] = None,
    task: Annotated[ImportedTask | None, typer.Option(help="Of a PEFT folder; chat if left out.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a model of an adapter that was trained elsewhere; prints its name."""
    fields = {"base_model": base_model, "suffix": suffix, "task": task}
    answer: Any = connect(ctx).post(
        "/models",
        cast_to=object,
        body={name: value for name, value in fields.items() if value is not None},
        files=[("file", (file.name, file.read_bytes()))],
        options={"headers": {"Content-Type": "multipart/form-data"}},
    )
    made = cast(Json, answer)
    if as_json:
        print_json(made)
    else:
        typer.echo(made["id"])
