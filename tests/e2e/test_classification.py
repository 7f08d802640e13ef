"""A classifier from its file to its answers, by the requests of docs/classification.md as they stand."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.support import EMBEDDED, Running, upload, wait_job
from worker.up import ROOT

PAGE = (ROOT / "docs" / "classification.md").read_text()
(SCRIPT,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
(REQUEST,) = re.findall(r"-d '(.*?)'", PAGE)
(ANSWER,) = re.findall(r"```json\n(.*?)```", PAGE, flags=re.DOTALL)
WRITTEN_URL = "http://127.0.0.1:8000"
FRUIT = ["ripe and sweet", "soft and sweet", "ripe and juicy", "sweet"]
TOOLS = ["sharp and heavy", "heavy and hard", "sharp and steel", "heavy"]


def rows(*classes: tuple[str, list[str]]) -> bytes:
    """A training file of texts and labels."""
    found = [{"text": text, "label": label} for label, texts in classes for text in texts]
    return "".join(json.dumps(row) + "\n" for row in found * 4).encode()


def trained(client: openai.OpenAI) -> str:
    """The model of a small classification job."""
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=upload(client, rows(("fruit", FRUIT), ("tool", TOOLS))),
        seed=1,
        hyperparameters={"n_epochs": 8, "batch_size": 8},
        extra_body={"task": "classification", "peft": {"method": "uora", "r": 16, "learning_rate": 0.03}},
    )
    done = wait_job(client, job.id)
    assert done.status == "succeeded", done.error
    return done.fine_tuned_model or ""


def shape(value: Any) -> Any:
    """The names and types of an answer."""
    if isinstance(value, dict):
        return {name: shape(each) for name, each in value.items()}
    return [shape(each) for each in value] if isinstance(value, list) else type(value)


@EMBEDDED
def test_the_guide(running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    client = running.client("sorter")
    model = trained(client)
    body, documented = json.loads(REQUEST), json.loads(ANSWER)
    assert documented["model"] == body["model"]
    service = httpx.Client(
        base_url=running.url, headers={"Authorization": f"Bearer {client.api_key}"}, timeout=60, trust_env=False
    )
    answer = service.post("/v1/classify", json=body | {"model": model})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert shape(found) == shape(documented)
    assert found["labels"] == documented["labels"]
    assert [each["label"] for each in found["data"]] == [each["label"] for each in documented["data"]]
    assert re.fullmatch(r"base=\w{16}; frames=\w{16}; adapter=\w{16}", answer.headers["x-uora-provenance"])

    assert WRITTEN_URL in SCRIPT
    exec(SCRIPT.replace(WRITTEN_URL, running.url), {"key": client.api_key, "model": model})  # noqa: S102 # our own
    assert capsys.readouterr().out == "fruit\n"

    # What cannot be answered, by the table's codes; the same engine writes text for the base model.
    for wanted, code in (
        ({"model": "tiny"}, "model_not_supported"),
        ({"input": "word " * 1000}, "context_length_exceeded"),
        ({"input": {"image": "data:image/png;base64,AAAA"}}, "invalid_item"),
        ({"input": ["a"] * 257}, "too_many_items"),
    ):
        refused = service.post("/v1/classify", json={"model": model, "input": "a"} | wanted)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, code)
        assert f"| 400 | `{code}` |" in PAGE
    with pytest.raises(openai.BadRequestError, match="classification"):
        client.chat.completions.create(model=model, messages=[{"role": "user", "content": "a"}])
    assert client.completions.create(model="tiny", prompt="a", max_tokens=2).usage
