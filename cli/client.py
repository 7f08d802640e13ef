"""The official client, and what is asked through it that it has no method for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote

import typer

from cli.profiles import Profile, current_profile

if TYPE_CHECKING:
    import httpx2  # the openai client's own HTTP
    from openai import OpenAI

Json = dict[str, Any]
#: Between two looks at what a worker is making.
POLL_SECONDS = 0.5


def connect(ctx: typer.Context) -> OpenAI:
    """A client of the service of the chosen profile; raises ``CliError`` without a key."""
    return make_client(current_profile(ctx.obj))


def make_client(profile: Profile) -> OpenAI:
    """A client with the profile's key for everything, whatever OpenAI's own variables say."""
    from openai import Omit, OpenAI  # half a second, which --help has no need of

    return OpenAI(
        base_url=profile.base_url,
        api_key=profile.api_key,
        admin_api_key=profile.api_key,
        default_headers=cast(Any, {"OpenAI-Organization": Omit(), "OpenAI-Project": Omit()}),
    )


def path(template: str, *parts: str) -> str:
    """``path("/models/{}", name)`` with whatever a name has made safe."""
    return template.format(*(quote(part, safe="") for part in parts))


def get(client: OpenAI, path: str, **query: Any) -> Json:
    """A JSON answer; parameters that are None are left out."""
    given = {name: value for name, value in query.items() if value is not None}
    return cast(Json, client.get(path, cast_to=object, options={"params": given}))


def post(client: OpenAI, path: str, body: Json | None = None) -> Json:
    """A JSON answer."""
    return cast(Json, client.post(path, cast_to=object, body=body))


@contextmanager
def streamed(client: OpenAI, path: str, query: Json) -> Iterator[httpx2.Response]:
    """An answer of any size, whose bytes are read as they are used."""
    import httpx2
    from openai import Stream

    # With this class the client gives the response itself, and not a stream of events.
    answer: Any = client.get(
        path, cast_to=httpx2.Response, options={"params": query}, stream=True, stream_cls=Stream[object]
    )
    with closing(answer):
        yield answer


def when_made(ask: Callable[[], Json]) -> Json:
    """The answer once a worker has made it."""
    while (answer := ask())["status"] == "in_progress":
        time.sleep(POLL_SECONDS)
    return answer
