"""``uora keys``: keys of a project, or with ``--organization`` those that administer all projects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.client import connect, path, post
from cli.errors import CliError
from cli.output import AsJson, Json, Limit, as_dicts, print_json, print_list, say, when

if TYPE_CHECKING:
    from openai import OpenAI

app = typer.Typer(no_args_is_help=True, help="API keys. A key with the scope admin is needed.")

KeyId = Annotated[str, typer.Argument(metavar="KEY", help="Its id, not the secret.")]
Project = Annotated[str | None, typer.Option(help="Whose keys; needed if yours administers several projects.")]
Organization = Annotated[bool, typer.Option("--organization", help="Keys that administer all projects.")]

_DAY = 86_400
_COLUMNS = {
    "id": lambda key: key["id"],
    "name": lambda key: key["name"],
    "key": lambda key: key["redacted_value"],
    "scopes": lambda key: " ".join(key.get("scopes", [])),
    "last used": lambda key: when(key.get("last_used_at")),
    "expires": lambda key: when(key.get("expires_at")),
}


@app.command("list")
def list_keys(
    ctx: typer.Context,
    project: Project = None,
    organization: Organization = False,
    limit: Limit = 100,
    as_json: AsJson = False,
) -> None:
    """List keys, newest first."""
    client = connect(ctx)
    admin = client.admin.organization
    if organization:
        found = as_dicts(admin.admin_api_keys.list(), limit)
    else:
        found = as_dicts(admin.projects.api_keys.list(choose_project(client, project)), limit)
    print_list(found, _COLUMNS, as_json=as_json)


@app.command()
def create(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="What it is for.")],
    scope: Annotated[
        list[str] | None, typer.Option(help="read, write, infer, admin; all but admin if left out. Repeat it for more.")
    ] = None,
    expires_in_days: Annotated[float | None, typer.Option(min=0, help="Never if left out.")] = None,
    project: Project = None,
    organization: Organization = False,
    as_json: AsJson = False,
) -> None:
    """Make a key; its secret is shown now and never again."""
    client = connect(ctx)
    if organization and scope:
        raise CliError("Keys of the organization may administer it, and nothing else: leave --scope out.")
    body: Json = {"name": name}
    if scope:
        body["scopes"] = scope
    if expires_in_days is not None:
        body["expires_in_seconds"] = round(expires_in_days * _DAY)
    _print_secret(post(client, _keys(client, project, organization=organization), body), as_json=as_json)


@app.command()
def rotate(
    ctx: typer.Context,
    key: KeyId,
    grace_hours: Annotated[float, typer.Option(min=0, help="For how long the old secret goes on.")] = 0,
    project: Project = None,
    organization: Organization = False,
    as_json: AsJson = False,
) -> None:
    """Give a key a new secret, which is shown now and never again."""
    client = connect(ctx)
    url = _keys(client, project, organization=organization) + path("/{}/rotate", key)
    _print_secret(post(client, url, {"grace_seconds": round(grace_hours * 3600)}), as_json=as_json)


@app.command()
def revoke(ctx: typer.Context, key: KeyId, project: Project = None, organization: Organization = False) -> None:
    """Refuse a key from now on."""
    client = connect(ctx)
    admin = client.admin.organization
    if organization:
        admin.admin_api_keys.delete(key)
    else:
        admin.projects.api_keys.delete(key, project_id=choose_project(client, project))
    say(f"{key} revoked")


def choose_project(client: OpenAI, project: str | None) -> str:
    """The project, which needs no name where the key administers a single one.

    Raises:
        CliError: it administers several.
    """
    if project is not None:
        return project
    found = client.admin.organization.projects.list(limit=20).data
    if len(found) != 1:
        names = ", ".join(f"{each.id} ({each.name})" for each in found)
        raise CliError(f"Your key administers several projects; choose one with --project: {names}.")
    return found[0].id


def _keys(client: OpenAI, project: str | None, *, organization: bool) -> str:
    if organization:
        return "/organization/admin_api_keys"
    return path("/organization/projects/{}/api_keys", choose_project(client, project))


def _print_secret(key: Any, *, as_json: bool) -> None:
    if as_json:
        print_json(key)
        return
    say(f"{key['id']}, {key['name']}. The secret, shown only now:")
    typer.echo(key["value"])
