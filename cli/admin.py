"""``uora admin``"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

import typer

from cli.client import connect
from cli.output import AsJson, Limit, as_dict, as_dicts, print_item, print_list, say, when

app = typer.Typer(no_args_is_help=True, help="Projects and the audit log.")
projects = typer.Typer(no_args_is_help=True, help="Projects. Changing them needs an organization-wide key.")
app.add_typer(projects, name="projects")

ProjectId = Annotated[str, typer.Argument(metavar="PROJECT")]

_PROJECTS = {
    "id": lambda project: project["id"],
    "name": lambda project: project["name"],
    "slug": lambda project: project.get("slug"),
    "status": lambda project: project["status"],
    "created": lambda project: when(project["created_at"]),
}
_ENTRIES = {
    "time": lambda entry: when(entry["effective_at"]),
    "what": lambda entry: entry["type"],
    "object": lambda entry: entry.get(entry["type"], {}).get("id"),
    "key": lambda entry: entry["actor"]["api_key"]["id"],
    "project": lambda entry: entry["project"]["id"],
    "address": lambda entry: entry.get("ip_address"),
    "request": lambda entry: entry.get("request_id"),
}


@projects.command("list")
def list_projects(
    ctx: typer.Context,
    archived: Annotated[bool, typer.Option("--archived", help="Those too.")] = False,
    limit: Limit = 100,
    as_json: AsJson = False,
) -> None:
    """List the projects that your key administers."""
    found = connect(ctx).admin.organization.projects.list(include_archived=archived)
    print_list(as_dicts(found, limit), _PROJECTS, as_json=as_json)


@projects.command()
def create(
    ctx: typer.Context,
    name: str,
    slug: Annotated[str | None, typer.Option(help="For the names of its models; made of the name if left out.")] = None,
    as_json: AsJson = False,
) -> None:
    """Add a project."""
    more = None if slug is None else {"slug": slug}
    made = connect(ctx).admin.organization.projects.create(name=name, extra_body=more)
    print_item(as_dict(made), as_json=as_json)


@projects.command()
def rename(ctx: typer.Context, project: ProjectId, name: str, as_json: AsJson = False) -> None:
    """Give a project another name; its slug stays, since the names of its models have it."""
    changed = connect(ctx).admin.organization.projects.update(project, name=name)
    print_item(as_dict(changed), as_json=as_json)


@projects.command()
def archive(ctx: typer.Context, project: ProjectId) -> None:
    """Refuse a project's keys from now on; what it has stays."""
    connect(ctx).admin.organization.projects.archive(project)
    say(f"{project} archived")


@app.command()
def audit(
    ctx: typer.Context,
    event: Annotated[
        list[str] | None, typer.Option(help="Only this, such as api_key.created; may be repeated.")
    ] = None,
    key: Annotated[list[str] | None, typer.Option(help="Only what this key did; may be repeated.")] = None,
    project: Annotated[list[str] | None, typer.Option(help="Only of this project; may be repeated.")] = None,
    since: Annotated[datetime | None, typer.Option(help="Only from then on, by your clock.")] = None,
    limit: Limit = 50,
    as_json: AsJson = False,
) -> None:
    """List what was changed, by which key, newest first."""
    query: dict[str, Any] = {"event_types": event, "actor_ids": key, "project_ids": project}
    if since is not None:
        query["effective_at"] = {"gte": int(since.timestamp())}
    given = {name: value for name, value in query.items() if value}
    found = connect(ctx).admin.organization.audit_logs.list(limit=limit, **given)
    print_list(as_dicts(found, limit), _ENTRIES, as_json=as_json)
