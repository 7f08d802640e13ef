"""Chat completions through the official client, with a scripted engine behind the gateway."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from sqlalchemy import text

from api.jobs.models import JobStatus
from tests.api.engine import START, delta, finish
from tests.api.rows import add_adapter, add_job
from tests.api.support import Service, wait_until

HI: list[Any] = [{"role": "user", "content": "hi"}]
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"const": None}}}
#: What the engine is asked when the client says no more than the model.
ASKED: dict[str, Any] = {
    "base_model": "tiny",
    "adapter": None,
    "project": "",
    "messages": None,
    "prompts": None,
    "n": 1,
    "echo": False,
    "max_tokens": None,
    "temperature": 1.0,
    "top_p": 1.0,
    "seed": None,
    "stop": [],
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": {},
    "top_logprobs": None,
    "response_format": None,
    "deadline_seconds": 120.0,
}


@pytest.fixture
def tuned(service: Service) -> str:
    """The name of a fine-tuned model of the first project."""
    with service.sessions.begin() as session:
        job = add_job(session, service.tenant, status=JobStatus.SUCCEEDED)
        return add_adapter(session, service.tenant, job).id


class TestAnswer:
    """stream=False"""

    def test_the_base_model(self, service: Service, client: OpenAI) -> None:
        answer = client.chat.completions.create(model="tiny", messages=HI)
        assert answer.id.startswith("chatcmpl-")
        assert (answer.object, answer.model, answer.system_fingerprint) == ("chat.completion", "tiny", "fp_test")
        choice = answer.choices[0]
        assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
        assert (choice.message.role, choice.message.content) == ("assistant", "Hello")
        assert answer.usage
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (7, 2, 9)
        assert service.engine.requests == [ASKED | {"messages": HI, "project": service.tenant.project_id}]

    def test_a_fine_tuned_model_is_asked_for_with_its_digest(
        self, service: Service, client: OpenAI, tuned: str
    ) -> None:
        assert client.chat.completions.create(model=tuned, messages=HI).model == tuned
        request = service.engine.requests[0]
        assert (request["base_model"], request["adapter"]) == ("tiny", {"id": tuned, "digest": "d" * 64, "data": None})

    def test_all_parameters_reach_the_engine(self, service: Service, client: OpenAI) -> None:
        service.engine.lines = [START, *(finish(index=index) for index in (1, 0))]
        client.chat.completions.create(
            model="tiny",
            messages=[
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": "c"},
                {"role": "user", "content": ""},
            ],
            max_completion_tokens=5,
            temperature=0,
            top_p=0.5,
            n=2,
            stop="\n",
            seed=-3,
            user="u",
            metadata={"k": "v"},
            presence_penalty=-2,
            frequency_penalty=0.5,
            logit_bias={"5": -100, "6": 1.5},  # type: ignore[dict-item] # the client's type has whole numbers only
            logprobs=True,
            top_logprobs=3,
            response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}},
        )
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "a\nb"},
            {"role": "assistant", "content": "c"},
            {"role": "user", "content": ""},
        ]
        assert service.engine.requests == [
            ASKED
            | {
                "project": service.tenant.project_id,
                "messages": messages,
                "n": 2,
                "max_tokens": 5,
                "temperature": 0.0,
                "top_p": 0.5,
                "seed": -3,
                "stop": ["\n"],
                "presence_penalty": -2.0,
                "frequency_penalty": 0.5,
                "logit_bias": {"5": -100.0, "6": 1.5},
                "top_logprobs": 3,
                "response_format": {"json_schema": SCHEMA},
            }
        ]

    @pytest.mark.parametrize(
        ("asked", "sent"),
        [
            ({"stop": ["a", "b", "c", "d"]}, {"stop": ["a", "b", "c", "d"]}),
            ({"max_tokens": 3}, {"max_tokens": 3}),
            ({"logprobs": True}, {"top_logprobs": 0}),
            ({"logprobs": False, "top_logprobs": None}, {"top_logprobs": None}),
            ({"response_format": {"type": "text"}}, {"response_format": None}),
            ({"response_format": {"type": "json_object"}}, {"response_format": {"json_schema": None}}),
        ],
        ids=str,
    )
    def test_ways_to_say_it(self, service: Service, client: OpenAI, asked: Any, sent: dict[str, Any]) -> None:
        client.chat.completions.create(model="tiny", messages=HI, **asked)
        assert service.engine.requests[0].items() >= sent.items()

    def test_choices_are_told_apart(self, service: Service, client: OpenAI) -> None:
        service.engine.lines = [
            START,
            delta("b", index=1),
            delta("a"),
            finish(tokens=3),
            delta("B", index=1),
            finish(index=1, reason="length", tokens=4),
        ]
        answer = client.chat.completions.create(model="tiny", messages=HI, n=2)
        assert [(choice.index, choice.message.content, choice.finish_reason) for choice in answer.choices] == [
            (0, "a", "stop"),
            (1, "bB", "length"),
        ]
        assert answer.usage
        assert answer.usage.completion_tokens == 7

    def test_an_answer_can_go_back_into_the_conversation(self, client: OpenAI) -> None:
        message = client.chat.completions.create(model="tiny", messages=HI).choices[0].message
        messages: list[Any] = [*HI, message, *HI]
        assert client.chat.completions.create(model="tiny", messages=messages).choices

    def test_neutral_values_of_what_is_not_offered_pass(self, client: OpenAI) -> None:
        assert client.chat.completions.create(
            model="tiny",
            messages=HI,
            frequency_penalty=0,
            presence_penalty=0.0,
            logit_bias={},
            logprobs=False,
            response_format={"type": "text"},
            tools=[],
            tool_choice="none",
            store=False,
        ).choices


class TestRefusal:
    """What never reaches the engine."""

    def test_a_classifier_writes_no_text(self, service: Service, client: OpenAI) -> None:
        with service.sessions.begin() as session:
            job = add_job(session, service.tenant, status=JobStatus.SUCCEEDED, task="classification")
            name = add_adapter(session, service.tenant, job).id
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=name, messages=HI)
        assert (caught.value.code, caught.value.param) == ("model_not_supported", "model")
        assert service.engine.requests == []

    @pytest.mark.parametrize("name", ["gpt-4o", "ft:tiny:acme-corp::00000000", "tiny ", "org%2Fslashed", "Tiny"])
    def test_an_unknown_model_is_never_the_base_model(self, service: Service, client: OpenAI, name: str) -> None:
        for stream in (False, True):
            with pytest.raises(openai.NotFoundError) as caught:
                client.chat.completions.create(model=name, messages=HI, stream=stream)
            assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
        assert service.engine.requests == []

    def test_a_model_of_another_project_is_unknown(self, service: Service, tuned: str) -> None:
        with pytest.raises(openai.NotFoundError):
            service.client(service.stranger).chat.completions.create(model=tuned, messages=HI)
        assert service.engine.requests == []

    def test_each_project_gets_its_own_model(self, service: Service) -> None:
        """Two projects that call their models alike have different names, digests and no way to the other's."""
        digests = {service.tenant: "a" * 64, service.stranger: "b" * 64}
        with service.sessions.begin() as session:
            names = {}
            for tenant, digest in digests.items():
                job = add_job(session, tenant, status=JobStatus.SUCCEEDED, suffix="tone")
                adapter = add_adapter(session, tenant, job)
                adapter.digest = digest
                names[tenant] = adapter.id
        for tenant, name in names.items():
            service.client(tenant).chat.completions.create(model=name, messages=HI)
            sent = service.engine.requests[-1]
            assert (sent["project"], sent["adapter"]["digest"]) == (tenant.project_id, digests[tenant])
        for tenant, other in ((service.tenant, service.stranger), (service.stranger, service.tenant)):
            with pytest.raises(openai.NotFoundError):
                service.client(tenant).chat.completions.create(model=names[other], messages=HI)
        assert len(service.engine.requests) == 2

    @pytest.mark.parametrize(
        ("change", "param"),
        [
            ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
            ({"response_format": {"type": "grammar"}}, "response_format.type"),
            ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
            (
                {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
                "response_format.json_schema.name",
            ),
            ({"logprobs": 5}, "logprobs"),
            ({"top_logprobs": 5}, "top_logprobs"),
            ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
            ({"logit_bias": {"5": 101}}, "logit_bias.5"),
            ({"logit_bias": {"-5": 1}}, "logit_bias.-5"),
            ({"logit_bias": {"five": 1}}, "logit_bias.five"),
            ({"frequency_penalty": 2.1}, "frequency_penalty"),
            ({"presence_penalty": -3}, "presence_penalty"),
            ({"best_of": 2}, "best_of"),
            ({"reasoning_effort": "low"}, "reasoning_effort"),
            ({"tempratur": 1}, "tempratur"),
            ({"stream_options": {"include_usage": True}}, "stream_options"),
            ({"temperature": 2.1}, "temperature"),
            ({"top_p": 0}, "top_p"),
            ({"n": 5}, "n"),
            ({"n": 0}, "n"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
            ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
            ({"stop": ""}, "stop"),
            ({"seed": 1.5}, "seed"),
            ({"messages": []}, "messages"),
            ({"messages": "hi"}, "messages"),
            ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "y"}]}, "messages[0].role"),
            ({"messages": [{"role": "user"}]}, "messages[0].content"),
            ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content"),
            ({"messages": [*HI, {"role": "user", "content": "x", "name": "bob"}]}, "messages[1].name"),
            (
                {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
                "messages[0].content[0].type",
            ),
            ({"model": None}, "model"),
        ],
        ids=str,
    )
    def test_it_names_the_parameter(self, service: Service, change: dict[str, Any], param: str) -> None:
        body = {"model": "tiny", "messages": HI, **change}
        answer = service.http().post("/v1/chat/completions", json=body)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error"), error
        assert service.engine.requests == []


class TestStream:
    """stream=True"""

    def test_events_are_openais(self, service: Service) -> None:
        service.engine.lines = [START, delta("a\u2028b\n"), delta("😀"), finish(reason="length")]
        body = {"model": "tiny", "messages": HI, "stream": True, "stream_options": {"include_usage": True}}
        answer = service.http().post("/v1/chat/completions", json=body)
        assert answer.headers["content-type"].startswith("text/event-stream")
        *events, last, end = answer.text.split("\n\n")
        assert (last, end) == ("data: [DONE]", "")
        chunks = [json.loads(event.removeprefix("data: ")) for event in events]
        for chunk in chunks:
            assert (chunk["object"], chunk["model"]) == ("chat.completion.chunk", "tiny")
            assert chunk["system_fingerprint"] == "fp_test"
        assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
        assert [(chunk["choices"][0]["delta"], chunk["choices"][0]["finish_reason"]) for chunk in chunks[:-1]] == [
            ({"role": "assistant", "content": "", "refusal": None}, None),
            ({"content": "a\u2028b\n"}, None),
            ({"content": "😀"}, None),
            ({}, "length"),
        ]
        assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * 4
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"] == {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}

    def test_without_usage_there_is_none(self, client: OpenAI, service: Service) -> None:
        chunks = list(client.chat.completions.create(model="tiny", messages=HI, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello"
        assert all("usage" not in chunk.model_fields_set for chunk in chunks)

    def test_a_failure_in_the_middle_is_raised_by_the_client(self, service: Service, client: OpenAI) -> None:
        service.engine.lines = [START, delta("Hel"), {"type": "error", "code": "out_of_memory", "message": "no room"}]
        stream = client.chat.completions.create(model="tiny", messages=HI, stream=True)
        with pytest.raises(openai.APIError, match="no room") as caught:
            list(stream)
        assert caught.value.code == "out_of_memory"

    @pytest.mark.parametrize(
        ("lines", "code"),
        [
            ([START, delta("Hel")], "engine_interrupted"),
            ([START, delta("Hel", index=1), finish()], "engine_protocol"),
            ([START, "{not json"], "engine_unavailable"),
        ],
    )
    def test_a_broken_answer_is_no_answer(self, service: Service, client: OpenAI, lines: list[Any], code: str) -> None:
        service.engine.lines = lines
        with pytest.raises(openai.APIError) as caught:
            list(client.chat.completions.create(model="tiny", messages=HI, stream=True))
        assert caught.value.code == code
        with pytest.raises(openai.InternalServerError) as whole:
            client.chat.completions.create(model="tiny", messages=HI)
        assert (whole.value.status_code, whole.value.code) == (503, code)

    def test_no_database_connection_is_held(self, service: Service, client: OpenAI) -> None:
        service.engine.pause_seconds = 0.2
        with client.chat.completions.create(model="tiny", messages=HI, stream=True) as stream:
            next(iter(stream))
            if service.database.dialect.name == "postgresql":
                held = text(
                    "SELECT count(*) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND state = 'idle in transaction'"
                )
                with service.database.connect() as connection:
                    assert connection.scalar(held) == 0
            with service.database.begin() as connection:  # waits for any other writer on SQLite
                connection.exec_driver_sql("UPDATE projects SET name = name")


class TestEngineTrouble:
    """Refusals and silences of the engine, in both modes."""

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(
        ("refusal", "expected"),
        [
            ((404, "adapter_not_found", "gone", None), (404, "model_not_found", "model")),
            ((404, "model_not_found", "serves another", None), (404, "model_not_found", "model")),
            ((400, "context_length_exceeded", "too long", "messages"), (400, "context_length_exceeded", "messages")),
            ((400, "invalid_token", "token 999", "logit_bias"), (400, "invalid_token", "logit_bias")),
            ((503, "engine_busy", "full", None), (503, "engine_busy", None)),
            ((429, "rate_limit_exceeded", "own", None), (429, "rate_limit_exceeded", None)),
            ((500, "internal", "secret detail", None), (503, "engine_unavailable", None)),
        ],
        ids=str,
    )
    def test_refusals_are_translated(
        self, service: Service, client: OpenAI, refusal: tuple[Any, ...], expected: tuple[Any, ...], stream: bool
    ) -> None:
        status, code, message, param = refusal
        service.engine.refusal = (status, {"error": {"code": code, "message": message, "param": param}})
        with pytest.raises(openai.APIStatusError) as caught:
            client.chat.completions.create(model="tiny", messages=HI, stream=stream)
        assert (caught.value.status_code, caught.value.code, caught.value.param) == expected
        assert "secret detail" not in caught.value.message
        assert ("retry-after" in caught.value.response.headers) == (expected[0] in (429, 503))

    def test_a_busy_engine_is_asked_again_by_the_client(self, service: Service) -> None:
        service.engine.refusal = (503, {"error": {"code": "engine_busy", "message": "full", "param": None}})
        with pytest.raises(openai.InternalServerError):
            service.client(max_retries=1).chat.completions.create(model="tiny", messages=HI)
        assert len(service.engine.requests) == 2

    def test_a_wrong_token_is_our_fault_not_the_clients(self, service: Service, client: OpenAI) -> None:
        service.engine.token = "another"
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model="tiny", messages=HI)
        assert caught.value.code == "engine_unavailable"

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_client_that_leaves_cancels_the_generation(self, service: Service, stream: bool) -> None:
        service.engine.lines = [START, *(delta(str(step)) for step in range(1000)), finish()]
        service.engine.pause_seconds = 0.05
        body = {"model": "tiny", "messages": HI, "stream": stream}
        with service.http() as http, pytest.raises(httpx.ReadTimeout):
            http.post("/v1/chat/completions", json=body, timeout=httpx.Timeout(5, read=0.3)) if not stream else (
                leave_after_first_event(http, body)
            )
        wait_until(lambda: service.engine.cancelled == 1, seconds=5)
        assert service.engine.completed == 0


def leave_after_first_event(http: httpx.Client, body: dict[str, Any]) -> None:
    """Read one event and close the connection, in the way a timeout does."""
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        next(response.iter_lines())
        raise httpx.ReadTimeout("left")
