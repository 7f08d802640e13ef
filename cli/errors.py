"""Errors as one line: what is wrong, and what to do."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from uora.errors import UoraError

if TYPE_CHECKING:
    import openai


class CliError(Exception):
    """What the user can put right; shown as it is."""


def explain(error: Exception) -> str | None:
    """The line that is shown of an error; None of one that is a fault of ours."""
    return _one_line(_explain(error))


def _explain(error: Exception) -> str | None:
    if isinstance(error, CliError):
        return str(error)
    if isinstance(error, UoraError):
        return error.message
    if isinstance(error, ModuleNotFoundError):
        return f"This needs the module {error.name!r}, which is not installed: pip install 'uora[worker]'."
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}."
    if "openai" in sys.modules:  # if it was never imported, nothing of it was raised
        return _explain_openai(error)
    return None


def _explain_openai(error: Exception) -> str | None:
    import httpx2  # what the client does not translate: an answer that breaks off
    import openai

    if isinstance(error, openai.APITimeoutError):
        return f"{_url(error)} did not answer in time; try again, or look at the service's log."
    if isinstance(error, openai.APIConnectionError):
        return (
            f"No service answers on {_url(error)}: start one with `uora up`, or name another one with `uora login` or "
            "UORA_BASE_URL."
        )
    if isinstance(error, openai.APIStatusError):
        return _explain_status(error)
    if isinstance(error, openai.APIError):
        return error.message
    if isinstance(error, openai.OpenAIError):
        return str(error)
    if isinstance(error, httpx2.HTTPError):
        return f"The answer broke off ({error}); try again."
    return None


def _explain_status(error: openai.APIStatusError) -> str:
    body: Any = error.body
    said = body.get("message") if isinstance(body, dict) else None
    if not said:
        return f"{_url(error)} answered {error.status_code}, but not as this service does: check the base URL."
    if error.status_code == 401:
        return f"{said} `uora login` stores another key."
    if error.code == "missing_scope":
        return f"{said} `uora keys create` makes a key with it, `uora login` stores it."
    if error.status_code >= 500 and error.code is None:
        return f"{said} The service's log has more about the request {error.request_id}."
    return f"{said} ({error.code})" if error.code else str(said)


def _url(error: openai.APIError) -> str:
    return f"{error.request.url.scheme}://{error.request.url.netloc.decode()}"


def _one_line(text: str | None) -> str | None:
    return None if text is None else " ".join(text.split())
