"""``uora webhooks``"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cli.client import connect
from cli.output import AsJson, Limit, as_dict, as_dicts, print_json, print_list, say

app = typer.Typer(no_args_is_help=True, help="Webhooks: who is told that a job has ended.")

_COLUMNS = {
    "id": lambda endpoint: endpoint["id"],
    "name": lambda endpoint: endpoint["name"],
    "url": lambda endpoint: endpoint["url"],
    "events": lambda endpoint: " ".join(endpoint["event_types"]),
    "state": lambda endpoint: "enabled" if endpoint.get("enabled") else endpoint.get("disabled_reason"),
}


@app.command("list")
def list_webhooks(ctx: typer.Context, limit: Limit = 100, as_json: AsJson = False) -> None:
    """List endpoints, newest first."""
    print_list(as_dicts(connect(ctx).webhooks.list(), limit), _COLUMNS, as_json=as_json)


@app.command()
def create(
    ctx: typer.Context,
    name: str,
    url: Annotated[str, typer.Argument(help="Where events are posted to.")],
    event: Annotated[
        list[str] | None, typer.Option(help="Such as fine_tuning.job.failed; all if left out. Repeat it for more.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Add an endpoint; its signing secret is shown now and never again."""
    client = connect(ctx)
    event_types: Any = event or client.webhooks.event_types.list().data
    made = as_dict(client.webhooks.create(name=name, url=url, event_types=event_types))
    if as_json:
        print_json(made)
        return
    say(f"{made['id']}, {made['name']}. The signing secret, shown only now:")
    typer.echo(made["signing_secret"])


@app.command()
def delete(ctx: typer.Context, endpoint: Annotated[str, typer.Argument(metavar="ENDPOINT")]) -> None:
    """Delete an endpoint; nothing more is sent to it."""
    connect(ctx).webhooks.delete(endpoint)
    say(f"{endpoint} deleted")
