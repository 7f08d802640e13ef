"""Write ``docs/openapi.json`` and ``docs/api.md`` from the routes: ``python -m scripts.api_reference``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from api.main import create_app
from api.openapi import METHODS
from api.settings import Settings
from worker.up import ROOT

OPENAPI = ROOT / "docs" / "openapi.json"
PAGE = ROOT / "docs" / "api.md"

INTRODUCTION = """\
# Every call

Made by `python -m scripts.api_reference` from [openapi.json](openapi.json), which a running service gives at
`/openapi.json` and shows at `/docs`, also without a network. What was sent and answered was recorded from a running
service with SmolLM2-135M-Instruct by `python -m scripts.record_examples`; secrets are cut. In the commands, `$UORA` is
the service's address, such as `http://127.0.0.1:8000`, and `$KEY` an API key with the scope that is named
([keys.md](keys.md)). In Python, `client` is `OpenAI(base_url=f"{UORA}/v1", api_key=KEY)` and `MODEL` the name of the
base model; each call goes on from those before it.

An error is `{"error": {"message", "type", "param", "code"}}`: what was found, what was expected, what to do.
"""


def main() -> None:
    """Write both."""
    document = make_document()
    OPENAPI.write_text(to_json(document))
    PAGE.write_text(to_page(document))


def make_document() -> dict[str, Any]:
    """As the api gives it, whatever the environment's settings."""
    document: dict[str, Any] = create_app(Settings(_env_file=None, engine_token="none")).openapi()  # noqa: S106
    return document


def to_json(document: dict[str, Any]) -> str:
    """Text of the committed document."""
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def to_page(document: dict[str, Any]) -> str:
    """Text of the page."""
    by_tag: dict[str, list[str]] = {}
    for path, item in document["paths"].items():
        for method in METHODS:
            if method in item:
                tag = item[method]["tags"][0]
                by_tag.setdefault(tag, []).append("\n".join(describe(document, path, method.upper(), item[method])))
    sections = (f"## {tag.capitalize()}\n\n" + "\n".join(calls) for tag, calls in by_tag.items())
    return INTRODUCTION + "\n" + "\n".join(sections)


def describe(document: dict[str, Any], path: str, method: str, operation: dict[str, Any]) -> Iterator[str]:
    """The lines about one call."""
    yield f"### {method} {path}\n"
    scopes = [scope for each in operation.get("security", ()) for scope in each["key"]]
    needs = f"Needs the scope `{scopes[0]}`." if scopes else "Needs no key."
    yield f"{operation['description'].replace('``', '`')} {needs}\n"
    yield from table(rows_of(document, operation))
    for sample in operation.get("x-codeSamples", ()):
        yield f"```{sample['lang'].lower()}\n{sample['source']}\n```\n"
    yield from answers(operation)


def rows_of(document: dict[str, Any], operation: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """What can be sent: name, place, kind, meaning."""
    for each in operation.get("parameters", ()):
        kind = kind_of(document, each["schema"])
        yield each["name"], each["in"], kind, note(each["schema"], each["required"], each.get("description", ""))
    for content in operation.get("requestBody", {}).get("content", {}).values():
        schema = resolve(document, content["schema"])
        required = schema.get("required", ())
        for name, each in schema.get("properties", {}).items():
            yield name, "body", kind_of(document, each), note(each, name in required, each.get("description", ""))


def note(schema: dict[str, Any], required: bool, description: str) -> str:
    """What is to be said of a parameter beside its kind."""
    default = schema.get("default")
    shown = "" if default is None or isinstance(default, (dict, list)) else f"default `{json.dumps(default)}`"
    parts = ["required" if required else shown, description]
    return "; ".join(part for part in parts if part).replace("\n", " ").replace("|", "\\|")


def kind_of(document: dict[str, Any], schema: dict[str, Any]) -> str:
    """A schema in a word."""
    if "anyOf" in schema or "oneOf" in schema:
        kinds = [kind_of(document, each) for each in schema.get("anyOf") or schema["oneOf"]]
        return " or ".join(dict.fromkeys(kind for kind in kinds if kind != "null"))
    schema = resolve(document, schema)
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if schema.get("type") == "array":
        return f"list of {kind_of(document, schema.get('items', {}))}"
    if schema.get("format") == "binary" or "contentMediaType" in schema:
        return "file"
    return str(schema.get("type", "any"))


def resolve(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """The schema that a reference names."""
    if "$ref" not in schema:
        return schema
    found: dict[str, Any] = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return found


def table(rows: Iterator[tuple[str, str, str, str]]) -> Iterator[str]:
    """A table, if there are rows."""
    lines = [f"| `{name}` | {place} | {kind} | {meaning} |" for name, place, kind, meaning in rows]
    if lines:
        yield "\n".join(["| parameter | in | kind | |", "|---|---|---|---|", *lines]) + "\n"


def answers(operation: dict[str, Any]) -> Iterator[str]:
    """The recorded answer."""
    for status, response in operation["responses"].items():
        for kind, content in response.get("content", {}).items():
            if "example" in content:
                example = content["example"]
                shown = (
                    example.replace("\r", "")
                    if isinstance(example, str)
                    else json.dumps(example, indent=2, ensure_ascii=False)
                )
                yield f"{status} `{kind}`\n\n```{'json' if kind == 'application/json' else ''}\n{shown.rstrip()}\n```\n"


if __name__ == "__main__":
    main()
