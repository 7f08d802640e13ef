"""The one place where errors become answers, always in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from sqlalchemy.exc import DataError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from api.errors import ApiError, InvalidRequest
from api.idempotency.service import Replayed

_HTTP_CODES = {
    404: ("unknown_url", "Unknown URL {method} {path}; check the path, which begins with /v1."),
    405: ("method_not_allowed", "{path} does not answer to {method}."),
    413: ("request_too_large", ""),
}


class ErrorDetail(BaseModel):
    """OpenAI's error. All four keys are there in every answer."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Body of every answer that is no success."""

    error: ErrorDetail


def install_handlers(app: FastAPI) -> None:
    """Translate all errors that endpoints, parsing and routing raise."""
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(DataError, _data_error)
    app.add_exception_handler(Replayed, _replayed)


def _answer(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers())


async def _api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)  # noqa: S101 - registered for this class
    return _answer(error)


async def _validation_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for this class
    return _answer(explain(error.errors(), body=error.body))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for this class
    code, template = _HTTP_CODES.get(error.status_code, ("invalid_request", ""))
    message = template.format(method=request.method, path=request.url.path) or str(error.detail)
    translated = InvalidRequest(message, code=code)
    headers = {**translated.headers(), **(error.headers or {})}
    return JSONResponse(translated.body(), status_code=error.status_code, headers=headers)


async def _data_error(_request: Request, _error: Exception) -> Response:
    # PostgreSQL takes no NUL in a text, and SQLite does: such a value is nobody's id and no one's name.
    return _answer(InvalidRequest("Found a value that the database cannot take, such as a NUL character."))


async def _replayed(_request: Request, replayed: Exception) -> Response:
    assert isinstance(replayed, Replayed)  # noqa: S101 - registered for this class
    headers = {"idempotent-replayed": "true"}
    return Response(replayed.body, replayed.status, headers=headers, media_type="application/json")


def explain(errors: Sequence[Mapping[str, Any]], *, body: Any) -> InvalidRequest:
    """One error for the first parameter at fault, with all that pydantic says about that parameter.

    Args:
        errors: of ``ValidationError.errors()``; ``loc`` begins with ``body``, ``query``, ``path`` or ``header``.
        body: what was sent, to tell its keys from the names of union branches in ``loc``.
    """
    paths = [_path(error, body=body) for error in errors]
    first = _deepest(paths)
    same = [error for error, path in zip(errors, paths, strict=True) if path == first]
    if same[0]["type"] == "json_invalid":
        return InvalidRequest(f"The body is not valid JSON: {same[0]['ctx']['error']}.", code="invalid_json")
    if same[0]["type"] == "missing":
        return InvalidRequest(f"Missing {first or 'a JSON body'}.", param=first, code="missing_required_parameter")
    if same[0]["type"] == "extra_forbidden":
        return InvalidRequest(
            f"Unknown parameter {first}; check its spelling or leave it out.",
            param=first,
            code="unknown_parameter",
        )
    if same[0]["type"] == "union_tag_invalid":
        found, expected = _shorten(same[0]["ctx"]["tag"]), same[0]["ctx"]["expected_tags"]
        return InvalidRequest(f"{first}: found {found}; expected one of {expected}.", param=first)
    found = _shorten(same[0].get("input"))
    return InvalidRequest(f"{first or 'body'}: found {found}; expected {_expectations(same)}.", param=first)


def _path(error: Mapping[str, Any], *, body: Any) -> str | None:
    """``("body", "a", 0, "b", <union branch>)`` -> ``a[0].b``: what leads nowhere in the body is no step."""
    place, *steps = error["loc"]
    if place != "body":
        return str((steps or [place])[0])  # of a list, the list
    path, cursor = "", body
    for step in steps:
        if isinstance(cursor, Mapping) and step in cursor:
            path += f".{step}" if path else str(step)
            cursor = cursor[step]
        elif isinstance(cursor, list) and isinstance(step, int):
            path += f"[{step}]"
            cursor = cursor[step]
    if error["type"] == "union_tag_invalid":  # the key that tells the branches apart, in quotes
        path += "." + error["ctx"]["discriminator"].strip("'")
    if error["type"] == "missing" and steps:  # its last step is what the body does not have
        path += f".{steps[-1]}" if path else str(steps[-1])
    return path or None


def _deepest(paths: Sequence[str | None]) -> str | None:
    """Below the first path, the one that says most: where a value fits no branch of a union, each has its own."""
    first = paths[0] or ""
    below = [path for path in paths if path and path.startswith((first + ".", first + "["))]
    return max(below, key=lambda path: path.count(".") + path.count("["), default=paths[0])


def _expectations(errors: Iterable[Mapping[str, Any]]) -> str:
    wanted = [str(error["msg"]).removeprefix("Value error, ").removeprefix("Input should be ") for error in errors]
    return " or ".join(dict.fromkeys(wanted))


def _shorten(value: Any, *, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
