"""``uora jobs``"""

from __future__ import annotations

import json
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from cli.client import connect, get, path, post, when_made
from cli.output import (
    AsJson,
    Json,
    Limit,
    as_dict,
    as_dicts,
    console,
    print_item,
    print_json,
    print_list,
    say,
    when,
)
from cli.requests import assign, job_request, number_or_auto, parse_pairs, with_uploaded_files

if TYPE_CHECKING:
    from openai import OpenAI

app = typer.Typer(no_args_is_help=True, help="Fine-tuning jobs.")

JOBS = "/fine_tuning/jobs"

JobId = Annotated[str, typer.Argument(metavar="JOB", help="An id, ftjob-...")]
Model = Annotated[str, typer.Option("--model", "-m", help="A base model, or ft:... to train that one further.")]
TrainingFile = Annotated[
    str, typer.Option("--training-file", "-f", help="A file's id; or a path here, which is uploaded.")
]
ValidationFile = Annotated[str | None, typer.Option(help="The same.")]
Suffix = Annotated[str | None, typer.Option(help="For the model's name.")]
Seed = Annotated[int | None, typer.Option()]
Task = Annotated[str | None, typer.Option(help="What the rows are for; chat if left out.")]
Epochs = Annotated[str | None, typer.Option(help="A number or auto.")]
BatchSize = Annotated[str | None, typer.Option(help="A number or auto.")]
Multiplier = Annotated[str | None, typer.Option("--learning-rate-multiplier", help="A number or auto.")]
Method = Annotated[str | None, typer.Option(help="uora, vera, lora, olora or osora.")]
Rank = Annotated[int | None, typer.Option(help="The adapter's.")]
Targets = Annotated[str | None, typer.Option(help="all-linear; q,v; or names of modules.")]
Metadata = Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="A label; may be repeated.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Anything else of the request, such as training.packing=false; may be repeated.",
    ),
]
Watch = Annotated[bool, typer.Option("--watch", help="Watch it, as `uora jobs watch` does.")]

_COLUMNS = {
    "id": lambda job: job["id"],
    "status": lambda job: job["status"],
    "done": lambda job: _percent(job),
    "base": lambda job: job["model"],
    "model": lambda job: job["fine_tuned_model"],
    "created": lambda job: when(job["created_at"]),
}
_EVENTS = {
    "time": lambda event: when(event["created_at"]),
    "level": lambda event: event["level"],
    "message": lambda event: event["message"],
}
_CHECKPOINTS = {
    "id": lambda checkpoint: checkpoint["id"],
    "step": lambda checkpoint: checkpoint["step_number"],
    "loss": lambda checkpoint: _number(checkpoint["metrics"].get("train_loss")),
    "validation loss": lambda checkpoint: _number(checkpoint["metrics"].get("valid_loss")),
    "model": lambda checkpoint: checkpoint["fine_tuned_model_checkpoint"],
}


@app.command()
def create(
    ctx: typer.Context,
    model: Model,
    training_file: TrainingFile,
    validation_file: ValidationFile = None,
    suffix: Suffix = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    learning_rate_multiplier: Multiplier = None,
    seed: Seed = None,
    task: Task = None,
    method: Method = None,
    rank: Rank = None,
    targets: Targets = None,
    metadata: Metadata = None,
    settings: Settings = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check it, and tell what it would make.")] = False,
    watch: Watch = False,
    as_json: AsJson = False,
) -> None:
    """Start a job; prints its id."""
    client = connect(ctx)
    body = job_request(
        model=model,
        training_file=training_file,
        validation_file=validation_file,
        suffix=suffix,
        seed=seed,
        task=task,
        hyperparameters=_hyperparameters(epochs, batch_size, learning_rate_multiplier),
        peft={"method": method, "r": rank, "targets": targets},
        metadata=metadata or (),
        settings=settings or (),
    )
    body = with_uploaded_files(client, body)
    query = {"dry_run": True} if dry_run else None
    names: Json = {name: body.pop(name) for name in ("model", "training_file")}
    made = as_dict(client.fine_tuning.jobs.create(**names, extra_body=body, extra_query=query))
    if dry_run:
        print_item(made, as_json=as_json)
        return
    if as_json:
        print_json(made)
    else:
        typer.echo(made["id"])
    if watch:
        _watch(client, made["id"], tail=None)


@app.command()
def estimate(
    ctx: typer.Context,
    model: Model,
    training_file: TrainingFile,
    validation_file: ValidationFile = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    task: Task = None,
    method: Method = None,
    rank: Rank = None,
    targets: Targets = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """What a job would take, without making it. Ends with 1 if it would fail."""
    client = connect(ctx)
    body = job_request(
        model=model,
        training_file=training_file,
        validation_file=validation_file,
        suffix=None,
        seed=None,
        task=task,
        hyperparameters=_hyperparameters(epochs, batch_size, None),
        peft={"method": method, "r": rank, "targets": targets},
        metadata=(),
        settings=settings or (),
    )
    body = with_uploaded_files(client, body)
    answer = when_made(lambda: post(client, "/fine_tuning/estimate", body))
    print_item(answer, as_json=as_json)
    raise typer.Exit(0 if answer.get("trainable") else 1)


@app.command("list")
def list_jobs(
    ctx: typer.Context,
    metadata: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Only with this label; may be repeated.")
    ] = None,
    limit: Limit = 20,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    labels = parse_pairs(metadata or (), option="--metadata")
    # As a mapping the client would leave out what has no value, and so list more.
    query = {f"metadata[{key}]": value for key, value in labels.items()}
    jobs = connect(ctx).fine_tuning.jobs.list(limit=limit, extra_query=query)
    print_list(as_dicts(jobs, limit), _COLUMNS, as_json=as_json)


@app.command("get")
def get_job(ctx: typer.Context, job: JobId, as_json: AsJson = False) -> None:
    """Describe a job."""
    print_item(as_dict(connect(ctx).fine_tuning.jobs.retrieve(job)), as_json=as_json)


@app.command()
def watch(
    ctx: typer.Context,
    job: JobId,
    tail: Annotated[
        int | None, typer.Option(min=0, max=100, help="How many events of before are shown; all if left out.")
    ] = None,
) -> None:
    """Watch a job to its end, also while the service restarts. Ends with 0 if it succeeded, else with 1.

    Ctrl-C ends the watching, not the job.
    """
    _watch(connect(ctx), job, tail=tail)


def _watch(client: OpenAI, job_id: str, *, tail: int | None) -> None:
    from cli.views import make_view
    from cli.watching import Follower

    job: Json = {}
    try:
        with (
            make_view() as view,
            closing(Follower(client, job_id, on_outage=view.outage).updates(tail=tail)) as updates,
        ):
            for update in updates:
                job = update.job
                view.show(update)
    except KeyboardInterrupt:
        say(f"The job goes on. `uora jobs watch {job_id}` watches it again, `uora jobs cancel {job_id}` stops it.")
        raise typer.Exit(130) from None
    if job["status"] != "succeeded":
        raise typer.Exit(1)
    say(f"`uora chat {job['fine_tuned_model']}` asks it.")


@app.command()
def cancel(ctx: typer.Context, job: JobId, as_json: AsJson = False) -> None:
    """Stop a job for good."""
    _print_moved(as_dict(connect(ctx).fine_tuning.jobs.cancel(job)), "cancelled", as_json=as_json)


@app.command()
def pause(ctx: typer.Context, job: JobId, as_json: AsJson = False) -> None:
    """Stop a job so that it can go on later."""
    _print_moved(as_dict(connect(ctx).fine_tuning.jobs.pause(job)), "paused", as_json=as_json)


@app.command()
def resume(ctx: typer.Context, job: JobId, as_json: AsJson = False) -> None:
    """Go on with a paused job, or with a failed one whose state was kept."""
    _print_moved(as_dict(connect(ctx).fine_tuning.jobs.resume(job)), "", as_json=as_json)


@app.command()
def retry(ctx: typer.Context, job: JobId, watch: Watch = False, as_json: AsJson = False) -> None:
    """Make a failed or cancelled job once more, as a new job; prints its id."""
    client = connect(ctx)
    _print_made(client, post(client, path(JOBS + "/{}/retry", job)), watch=watch, as_json=as_json)


@app.command()
def clone(
    ctx: typer.Context,
    job: JobId,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="What is different, such as peft.r=128; null for the default."),
    ] = None,
    watch: Watch = False,
    as_json: AsJson = False,
) -> None:
    """Make a new job of another one's request, with changes; prints its id."""
    client = connect(ctx)
    made = post(client, path(JOBS + "/{}/clone", job), assign({}, settings or ()))
    _print_made(client, made, watch=watch, as_json=as_json)


@app.command()
def delete(
    ctx: typer.Context,
    jobs: Annotated[list[str], typer.Argument(metavar="JOB...")],
    models: Annotated[bool, typer.Option("--models", help="Their final models too.")] = False,
) -> None:
    """Delete jobs that have ended, with their events and checkpoints."""
    client = connect(ctx)
    for job in jobs:
        client.delete(path(JOBS + "/{}", job), cast_to=object, options={"params": {"models": models}})
        say(f"{job} deleted")


@app.command()
def events(ctx: typer.Context, job: JobId, limit: Limit = 20, as_json: AsJson = False) -> None:
    """List the last events of a job, newest first."""
    found = connect(ctx).fine_tuning.jobs.list_events(job, limit=limit)
    print_list(as_dicts(found, limit), _EVENTS, as_json=as_json)


@app.command()
def checkpoints(ctx: typer.Context, job: JobId, limit: Limit = 100, as_json: AsJson = False) -> None:
    """List a job's checkpoints, newest first."""
    found = connect(ctx).fine_tuning.jobs.checkpoints.list(job, limit=limit)
    print_list(as_dicts(found, limit), _CHECKPOINTS, as_json=as_json)


@app.command()
def promote(
    ctx: typer.Context,
    job: JobId,
    checkpoint: Annotated[str, typer.Argument(help="Its id; best is the one of the lowest validation loss.")] = "best",
) -> None:
    """Let a job's model answer as one of its checkpoints."""
    chosen = post(connect(ctx), path(JOBS + "/{}/checkpoints/{}/promote", job, checkpoint))
    say(f"{job} answers as of step {chosen['step_number']}, {chosen['id']}")


@app.command()
def compare(
    ctx: typer.Context,
    jobs: Annotated[list[str], typer.Argument(metavar="JOB...")],
    as_json: AsJson = False,
) -> None:
    """Jobs side by side: what of their requests differs, and what came of it."""
    found = get(connect(ctx), JOBS + "/compare", ids=",".join(jobs))
    if as_json:
        print_json(found)
    else:
        _print_comparison(found)


def _print_comparison(found: Json) -> None:
    """A column for each job: what came of it, and below that what was asked for."""
    jobs: list[Json] = found["jobs"]
    table = Table("", *(job["id"] for job in jobs), box=box.SIMPLE_HEAD)
    outcomes = dict.fromkeys(name for job in jobs for name in job if name not in ("id", "object"))
    for name in outcomes:
        table.add_row(name, *(_cell(job.get(name)) for job in jobs))
    table.add_section()
    for name, values in found["differences"].items():
        table.add_row(name, *(_cell(values.get(job["id"])) for job in jobs))
    console().print(table)


def _hyperparameters(epochs: str | None, batch_size: str | None, multiplier: str | None) -> Json:
    return {
        "n_epochs": number_or_auto(epochs),
        "batch_size": number_or_auto(batch_size),
        "learning_rate_multiplier": number_or_auto(multiplier),
    }


def _print_moved(job: Json, target: str, *, as_json: bool) -> None:
    """A running job gets there in its own time."""
    if as_json:
        print_json(job)
        return
    coming = f", will be {target}" if target and job["status"] != target else ""
    say(f"{job['id']} is {job['status']}{coming}")


def _print_made(client: OpenAI, job: Json, *, watch: bool, as_json: bool) -> None:
    if as_json:
        print_json(job)
    else:
        typer.echo(job["id"])
    if watch:
        _watch(client, job["id"], tail=None)


def _percent(job: Json) -> str:
    percent = (job.get("progress") or {}).get("percent")
    return "" if percent is None else f"{percent:.0f} %"


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)
