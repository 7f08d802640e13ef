"""``uora``: the service from a terminal. What a command needs is imported when it runs, so that all start at once."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cli import admin, chat, files, jobs, keys, login, models, webhooks
from cli.errors import explain
from cli.output import complain
from cli.profiles import DEFAULT_PROFILE

#: Commands of ``python -m uora``: they need no service.
OFFLINE = ("validate", "methods", "export")


class Root(TyperGroup):
    """The commands of the service and those of the core; errors of both end as one line."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All names."""
        return [*super().list_commands(ctx), *OFFLINE]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of a name; the core's are imported for it."""
        if cmd_name not in OFFLINE:
            return super().get_command(ctx, cmd_name)
        from uora.cli import app as core

        group = typer.main.get_command(core)
        assert isinstance(group, TyperGroup)  # noqa: S101 - it has a callback and several commands
        return group.get_command(ctx, cmd_name)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; an error that the user can do something about is one line and status 1."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            text = explain(error)
            if text is None:
                raise
            complain(text)
            raise typer.Exit(1) from error


app = typer.Typer(cls=Root, no_args_is_help=True, pretty_exceptions_show_locals=False)


@app.callback()
def main(
    ctx: typer.Context,
    profile: Annotated[
        str, typer.Option(envvar="UORA_PROFILE", help="Which of the services that you logged in to.")
    ] = DEFAULT_PROFILE,
) -> None:
    """Fine-tune models, watch jobs, ask models. UORA_BASE_URL and UORA_API_KEY win over what `uora login` stored."""
    ctx.obj = profile


@app.command()
def up(
    host: Annotated[str, typer.Option(help="Where it listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
) -> None:
    """Run the whole service on this machine until Ctrl-C."""
    from worker.up import main as run

    run(["--host", host, "--port", str(port)])


app.command()(login.login)
app.add_typer(files.app, name="files")
app.add_typer(jobs.app, name="jobs")
app.add_typer(models.app, name="models")
app.command()(chat.chat)
app.add_typer(keys.app, name="keys")
app.add_typer(webhooks.app, name="webhooks")
app.add_typer(admin.app, name="admin")
