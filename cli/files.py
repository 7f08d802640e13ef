"""``uora files``"""

from __future__ import annotations

import mimetypes
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.client import connect, get, path, when_made
from cli.output import (
    AsJson,
    Json,
    Limit,
    Out,
    as_dict,
    as_dicts,
    console,
    print_item,
    print_json,
    print_list,
    say,
    size,
    when,
    write_new,
)

if TYPE_CHECKING:
    from openai import OpenAI

app = typer.Typer(no_args_is_help=True, help="Files: training rows, results.")

FileId = Annotated[str, typer.Argument(metavar="FILE", help="An id, file-...")]

#: Larger files are uploaded in parts: a service takes no more in one request, unless it is told to.
MAX_WHOLE_BYTES = 512 * 1024 * 1024
_COLUMNS = {
    "id": lambda file: file["id"],
    "name": lambda file: file["filename"],
    "purpose": lambda file: file["purpose"],
    "bytes": lambda file: size(file["bytes"]),
    "status": lambda file: file["status"],
    "created": lambda file: when(file["created_at"]),
}


@app.command()
def upload(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="JSONL, JSON, CSV, Parquet, zip.")],
    purpose: Annotated[str, typer.Option(help="What it is for.")] = "fine-tune",
    as_json: AsJson = False,
) -> None:
    """Upload a file; prints its id."""
    found = upload_file(connect(ctx), file, purpose=purpose)
    if as_json:
        print_json(found)
    else:
        typer.echo(found["id"])


def upload_file(client: OpenAI, file: Path, *, purpose: str = "fine-tune") -> Json:
    """The uploaded file as the service shows it."""
    asked: Any = purpose  # the service says what it knows
    if file.stat().st_size > MAX_WHOLE_BYTES:
        mime_type = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
        done = client.uploads.upload_file_chunked(file=file, mime_type=mime_type, purpose=asked)
        assert done.file is not None  # noqa: S101 - of a completed upload
        return as_dict(done.file)
    return as_dict(client.files.create(file=file, purpose=asked))


@app.command("list")
def list_files(
    ctx: typer.Context,
    purpose: Annotated[str | None, typer.Option(help="Of this purpose only.")] = None,
    limit: Limit = 20,
    as_json: AsJson = False,
) -> None:
    """List files, newest first."""
    query: Any = {} if purpose is None else {"purpose": purpose}
    files = as_dicts(connect(ctx).files.list(limit=limit, **query), limit)
    print_list(files, _COLUMNS, as_json=as_json)


@app.command("get")
def get_file(ctx: typer.Context, file: FileId, as_json: AsJson = False) -> None:
    """Describe a file."""
    print_item(as_dict(connect(ctx).files.retrieve(file)), as_json=as_json)


@app.command()
def delete(ctx: typer.Context, files: Annotated[list[str], typer.Argument(metavar="FILE...")]) -> None:
    """Delete files that no unfinished job needs."""
    client = connect(ctx)
    for file in files:
        client.files.delete(file)
        say(f"{file} deleted")


@app.command()
def report(
    ctx: typer.Context,
    file: FileId,
    model: Annotated[str | None, typer.Option(help="Whose tokens are counted, and whose rows are shown.")] = None,
    task: Annotated[str | None, typer.Option(help="What the rows are for; told by the first if left out.")] = None,
    max_length: Annotated[int | None, typer.Option(min=8, help="Tokens of a row.")] = None,
    overlong: Annotated[str | None, typer.Option(help="error, truncate or drop: what happens to longer rows.")] = None,
    training_file: Annotated[str | None, typer.Option(help="The training file that this one validates.")] = None,
    as_json: AsJson = False,
) -> None:
    """What is in a file and what is wrong with it. Ends with 1 if it cannot be trained on."""
    client = connect(ctx)
    query = {
        "model": model,
        "task": task,
        "max_length": max_length,
        "overlong": overlong,
        "training_file": training_file,
    }
    answer = when_made(lambda: get(client, path("/files/{}/report", file), **query))
    if as_json:
        print_json(answer)
    elif answer["report"] is None:
        say(f"There is no report: {(answer['error'] or {}).get('message', answer['status'])}")
    else:
        _print_report(answer["report"])
    raise typer.Exit(0 if (answer["report"] or {}).get("trainable") else 1)


#: What a report without a model does not say.
_UNCOUNTED: Json = {
    "tokens": 0,
    "learned_tokens": 0,
    "lengths": None,
    "rows_truncated": 0,
    "rows_dropped": 0,
    "previews": [],
    "leak": None,
}


def _print_report(report: Json) -> None:
    from uora.data import DatasetReport
    from uora.reportview import render_report

    console().print(render_report(DatasetReport.model_validate(_UNCOUNTED | report)))


@app.command()
def download(ctx: typer.Context, file: FileId, out: Out = None) -> None:
    """Write a file's bytes as they were uploaded."""
    client = connect(ctx)
    target = out or Path(Path(client.files.retrieve(file).filename).name)
    with client.files.with_streaming_response.content(file) as response:
        write_new(target, response.iter_bytes())
