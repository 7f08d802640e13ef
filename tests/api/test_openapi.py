"""The OpenAPI document: the committed one is the api's, and every call has an example that its schema allows."""

from __future__ import annotations

import re
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from api.openapi import operations
from scripts.api_reference import OPENAPI, PAGE, make_document, to_json, to_page
from tests.api.support import Service

DOCUMENT = make_document()
OPERATIONS = [(name, DOCUMENT["paths"][path][method.lower()]) for name, (method, path) in operations(DOCUMENT).items()]
every_operation = pytest.mark.parametrize("operation", [each for _, each in OPERATIONS], ids=[n for n, _ in OPERATIONS])
WRITE = "run python -m scripts.api_reference"


def test_the_committed_document_is_the_apis() -> None:
    assert OPENAPI.read_text() == to_json(DOCUMENT), WRITE
    assert PAGE.read_text() == to_page(DOCUMENT), WRITE


def test_no_two_operations_have_one_name() -> None:
    count = sum(len(item) for item in DOCUMENT["paths"].values())
    assert len(OPERATIONS) == count > 60


@every_operation
def test_every_call_has_an_example(operation: dict[str, Any]) -> None:
    assert "x-codeSamples" in operation, "add a step to scripts/record_examples.py and run it"
    python, shell = (sample["source"] for sample in operation["x-codeSamples"])
    compile(python, "sample", "exec")
    assert shell.startswith("curl ")
    assert ("security" in operation) == ("/v1/" in shell)


@every_operation
def test_an_example_is_what_the_schema_says(operation: dict[str, Any]) -> None:
    for part in (operation.get("requestBody", {}), *operation["responses"].values()):
        for content in part.get("content", {}).values():
            if "example" in content and content.get("schema"):
                errors = Draft202012Validator(closed(content["schema"])).iter_errors(content["example"])
                assert [error.message for error in errors] == []


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """With all that it refers to, and with no keys but those that it names."""

    def close(part: Any) -> Any:
        if isinstance(part, list):
            return [close(each) for each in part]
        if not isinstance(part, dict):
            return part
        shut = {key: close(value) for key, value in part.items()}
        if shut.get("type") == "object" and "properties" in shut:
            shut.setdefault("additionalProperties", False)
        return shut

    result: dict[str, Any] = close({**schema, "components": {"schemas": DOCUMENT["components"]["schemas"]}})
    return result


def test_the_page_of_the_calls_needs_no_other_server(service: Service) -> None:
    http = service.http()
    page = http.get("/docs")
    found = re.findall(r"(?:src|href)=\"([^\"]+)\"|url: '([^']+)'", page.text)
    addresses = [one or other for one, other in found]
    assert len(addresses) >= 3
    assert {http.get(address).status_code for address in addresses} == {200}
    assert all(address.startswith("/") for address in addresses)
