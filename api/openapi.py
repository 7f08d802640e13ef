"""The OpenAPI document: what FastAPI finds in the routes, how to sign in, and a real example of every call.

The examples are recorded from a running service by ``python -m scripts.record_examples``.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute

from api.scopes import needed_scope

EXAMPLES = Path(__file__).with_name("examples.json")
METHODS = ("get", "post", "delete")
_VALUES = {"model": ".+"}


def operation_id(route: APIRoute) -> str:
    """The endpoint's name: what client generators call the operation."""
    return route.name


def operations(document: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Method and path of each operation of a document, by its id."""
    return {
        each["operationId"]: (method.upper(), path)
        for path, item in document["paths"].items()
        for method, each in item.items()
        if method in METHODS
    }


def path_pattern(path: str) -> re.Pattern[str]:
    """What the paths of an operation look like; names of models may have slashes."""
    return re.compile(re.sub(r"\{(\w+)\}", lambda found: f"(?P<{found[1]}>{_VALUES.get(found[1], '[^/]+')})", path))


def document(app: FastAPI, *, public_routes: frozenset[str]) -> None:
    """Let the app's document name keys and scopes, and show the examples."""
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        made_before = app.openapi_schema is not None
        found = describe()
        if not made_before:
            _add_keys(found, public_routes)
            _add_examples(found, json.loads(EXAMPLES.read_text()))
        return found

    app.openapi = openapi  # type: ignore[method-assign] # as FastAPI's documentation says


def _add_keys(found: dict[str, Any], public_routes: frozenset[str]) -> None:
    found["components"]["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer", "description": "An API key; the scopes are those it must have."}
    }
    for method, path in operations(found).values():
        if path not in public_routes:
            scope = needed_scope(method, path)
            found["paths"][path][method.lower()]["security"] = [{"key": [str(scope)]}]


def _add_examples(found: dict[str, Any], examples: dict[str, dict[str, Any]]) -> None:
    for name, (method, path) in operations(found).items():
        if name in examples:
            _add_example(found["paths"][path][method.lower()], examples[name], method=method, path=path)


def _add_example(operation: dict[str, Any], example: dict[str, Any], *, method: str, path: str) -> None:
    operation["x-codeSamples"] = [
        {"lang": "Python", "label": "OpenAI's client", "source": example["python"]},
        {"lang": "Shell", "label": "curl", "source": curl(method, example)},
    ]
    in_path = path_pattern(path).fullmatch(example["path"])
    values = {**(in_path.groupdict() if in_path else {}), **example["query"]}
    for parameter in operation.get("parameters", ()):
        if parameter["name"] in values:
            parameter["example"] = values[parameter["name"]]
    if "body" in example and "requestBody" in operation:
        operation["requestBody"]["content"]["application/json"]["example"] = example["body"]
    if "answer" in example:
        content = operation["responses"][str(example["status"])].setdefault("content", {})
        content.setdefault(example["content_type"], {})["example"] = example["answer"]


def curl(method: str, example: dict[str, Any]) -> str:
    """A command that sends the example; ``$UORA`` is the service's address, ``$KEY`` a key."""
    query = "&".join(f"{name}={value}" for name, value in example["query"].items())
    lines = [f'curl "$UORA{example["path"]}{"?" + query if query else ""}" -H "Authorization: Bearer $KEY"']
    if method != {"body": "POST", "form": "POST"}.get(next((k for k in ("body", "form") if k in example), ""), "GET"):
        lines[0] = lines[0].replace("curl", f"curl -X {method}", 1)
    lines += [f"-F {shlex.quote(f'{name}={value}')}" for name, value in example.get("form", {}).items()]
    if "body" in example:
        lines.append('-H "Content-Type: application/json"')
        lines.append(f"-d {shlex.quote(json.dumps(example['body'], ensure_ascii=False))}")
    return " \\\n  ".join(lines)
