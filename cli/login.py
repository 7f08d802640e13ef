"""``uora login``"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.client import make_client
from cli.errors import CliError
from cli.output import say
from cli.profiles import DEFAULT_BASE_URL, Profile, normalise, store_profile

if TYPE_CHECKING:
    from openai import OpenAI


def login(
    ctx: typer.Context,
    base_url: Annotated[
        str, typer.Option(envvar="UORA_BASE_URL", prompt="Base URL", help="Where the service answers.")
    ] = DEFAULT_BASE_URL,
    api_key: Annotated[
        str,
        typer.Option(
            envvar="UORA_API_KEY", prompt="API key", prompt_required=True, hide_input=True, help="A key of the service."
        ),
    ] = ...,  # type: ignore[assignment] # Typer's mark of an option that is asked for
) -> None:
    """Check a service and a key, and store them for all commands."""
    profile = Profile(base_url=normalise(base_url), api_key=api_key.strip())
    check(make_client(profile))
    path = store_profile(ctx.obj, profile)
    say(f"Logged in to {profile.base_url}; stored in {path}, which only you may read.")


def check(client: OpenAI) -> None:
    """Whether the key is one of the service's; one that may not read is one too.

    Raises:
        CliError: something else answers there.
    """
    import openai

    try:
        models: Any = client.get("/models", cast_to=object)
    except openai.PermissionDeniedError as error:
        if error.code != "missing_scope":
            raise
        return
    if not isinstance(models, dict) or models.get("object") != "list":
        raise CliError(f"What answers on {client.base_url} is not this service: check the base URL.")
