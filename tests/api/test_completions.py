"""Completions of raw prompts through the official client, and what both kinds of completions have beside the text."""

from __future__ import annotations

import base64
import json
from typing import Any

import openai
import pytest
from openai import OpenAI

from api.completions.schemas import ChatCompletion, Completion
from api.jobs.models import JobStatus
from tests.api.engine import START, delta, finish, logprob
from tests.api.rows import add_adapter, add_job
from tests.api.support import Service
from tests.api.test_chat import ASKED, HI
from tests.uora.toys import artifact
from uora.artifact import Artifact, dumps

TOKENS = [logprob("é", -0.5, é=-0.5, e=-1.5), logprob("!", -2.0, é=-0.25)]


@pytest.fixture(scope="module")
def adapter() -> Artifact:
    """A trained-looking adapter of some base model."""
    return artifact()


def in_base64(content: bytes) -> dict[str, Any]:
    """The extension's field."""
    return {"adapter": {"data": base64.b64encode(content).decode()}}


class TestAnswer:
    """stream=False"""

    def test_one_prompt(self, service: Service, client: OpenAI) -> None:
        answer = client.completions.create(model="tiny", prompt="Once")
        assert answer.id.startswith("cmpl-")
        assert (answer.object, answer.model, answer.system_fingerprint) == ("text_completion", "tiny", "fp_test")
        choice = answer.choices[0]
        assert (choice.index, choice.text, choice.finish_reason, choice.logprobs) == (0, "Hello", "stop", None)
        assert answer.usage
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (7, 2, 9)
        asked = {"prompts": ["Once"], "max_tokens": 16, "project": service.tenant.project_id}
        assert service.engine.requests == [ASKED | asked]

    @pytest.mark.parametrize(
        ("prompt", "sent"),
        [
            (["a", "b"], ["a", "b"]),
            ([1, 2], [[1, 2]]),
            ([[1, 2], [3]], [[1, 2], [3]]),
            (["a"], ["a"]),
            (" ", [" "]),
        ],
        ids=str,
    )
    def test_kinds_of_prompts(self, service: Service, client: OpenAI, prompt: Any, sent: list[Any]) -> None:
        service.engine.lines = [
            START | {"prompt_tokens": [3] * len(sent)},
            *(
                line
                for index in range(2 * len(sent))
                for line in (delta(f"<{index}>", index=index), finish(index=index))
            ),
        ]
        answer = client.completions.create(model="tiny", prompt=prompt, n=2)
        assert service.engine.requests[0]["prompts"] == sent
        assert [(choice.index, choice.text) for choice in answer.choices] == [
            (index, f"<{index}>") for index in range(2 * len(sent))
        ]
        assert answer.usage
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3 * len(sent), 4 * len(sent))

    def test_all_parameters_reach_the_engine(self, service: Service, client: OpenAI) -> None:
        service.engine.lines = [START, finish(index=0), finish(index=1)]
        client.completions.create(
            model="tiny",
            prompt="p",
            n=2,
            best_of=2,
            echo=True,
            max_tokens=5,
            temperature=0,
            top_p=0.5,
            stop=["x", "y"],
            seed=3,
            presence_penalty=1,
            frequency_penalty=-1,
            logit_bias={"7": 3},
            user="u",
        )
        sent = service.engine.requests[0]
        expected = {"prompts": ["p"], "n": 2, "echo": True, "max_tokens": 5, "temperature": 0.0, "top_p": 0.5}
        expected |= {"stop": ["x", "y"], "seed": 3, "presence_penalty": 1.0, "frequency_penalty": -1.0}
        assert sent == ASKED | expected | {"logit_bias": {"7": 3.0}, "project": service.tenant.project_id}

    def test_log_probabilities(self, service: Service, client: OpenAI) -> None:
        service.engine.lines = [START, delta("é", logprobs=TOKENS[:1]), delta("!", logprobs=TOKENS[1:]), finish()]
        logprobs = client.completions.create(model="tiny", prompt="p", logprobs=2).choices[0].logprobs
        assert service.engine.requests[0]["top_logprobs"] == 2
        assert logprobs
        assert (logprobs.tokens, logprobs.token_logprobs) == (["é", "!"], [-0.5, -2.0])
        assert logprobs.top_logprobs == [{"é": -0.5, "e": -1.5}, {"é": -0.25, "!": -2.0}]
        assert logprobs.text_offset == [0, 1]

    @pytest.mark.parametrize(
        ("change", "param"),
        [
            ({"prompt": ""}, "prompt"),
            ({"prompt": []}, "prompt"),
            ({"prompt": ["a", ""]}, "prompt[1]"),
            ({"prompt": [[]]}, "prompt[0]"),
            ({"prompt": [1.5]}, "prompt[0]"),
            ({"prompt": [-1]}, "prompt[0]"),
            ({"prompt": None}, "prompt"),
            ({"suffix": "end"}, "suffix"),
            ({"best_of": 3}, "best_of"),
            ({"echo": True, "logprobs": 1}, "echo"),
            ({"logprobs": 6}, "logprobs"),
            ({"logprobs": True, "messages": HI}, "messages"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"prompt": ["a", "b", "c"], "n": 2}, "n"),
            ({"tools": []}, "tools"),
            ({"stream_options": {"include_usage": True}}, "stream_options"),
        ],
        ids=str,
    )
    def test_a_refusal_names_the_parameter(self, service: Service, change: dict[str, Any], param: str) -> None:
        body = {"model": "tiny", "prompt": "p", **change}
        answer = service.http().post("/v1/completions", json=body)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error"), error
        assert service.engine.requests == []


class TestStream:
    """stream=True"""

    def test_pieces_look_like_the_answer(self, service: Service, client: OpenAI) -> None:
        service.engine.lines = [START, delta("é", logprobs=TOKENS[:1]), delta("!", logprobs=TOKENS[1:]), finish()]
        stream = client.completions.create(
            model="tiny", prompt="p", logprobs=1, stream=True, stream_options={"include_usage": True}
        )
        *pieces, last = list(stream)
        assert {piece.object for piece in (*pieces, last)} == {"text_completion"}
        assert [(piece.choices[0].text, piece.choices[0].finish_reason) for piece in pieces] == [
            ("é", None),
            ("!", None),
            ("", "stop"),
        ]
        offsets = [piece.choices[0].logprobs.text_offset for piece in pieces if piece.choices[0].logprobs]
        assert offsets == [[0], [1]]
        assert last.choices == []
        assert last.usage
        assert last.usage.total_tokens == 9

    def test_chat_has_log_probabilities_too(self, service: Service, client: OpenAI) -> None:
        service.engine.lines = [START, delta("é!", logprobs=TOKENS), finish()]
        expected = [
            {
                "token": token["token"],
                "bytes": token["bytes"],
                "logprob": token["logprob"],
                "top_logprobs": token["top"],
            }
            for token in TOKENS
        ]
        whole = client.chat.completions.create(model="tiny", messages=HI, logprobs=True, top_logprobs=2)
        assert whole.choices[0].logprobs
        assert whole.choices[0].logprobs.model_dump() == {"content": expected, "refusal": None}
        chunks = list(
            client.chat.completions.create(model="tiny", messages=HI, logprobs=True, top_logprobs=2, stream=True)
        )
        found = [chunk.choices[0].logprobs for chunk in chunks]
        assert [logprobs.model_dump() for logprobs in found if logprobs] == [{"content": expected, "refusal": None}]

    def test_the_documented_shapes_are_those_of_the_answers(self, service: Service) -> None:
        service.engine.lines = [START, delta("é!", logprobs=TOKENS), finish()]
        http = service.http()
        chat = http.post("/v1/chat/completions", json={"model": "tiny", "messages": HI, "logprobs": True}).json()
        legacy = http.post("/v1/completions", json={"model": "tiny", "prompt": "p", "logprobs": 0}).json()
        assert ChatCompletion.model_validate(chat).model_dump() == chat
        assert Completion.model_validate(legacy).model_dump() == legacy


@pytest.mark.parametrize(
    ("path", "prompt"), [("/v1/chat/completions", {"messages": HI}), ("/v1/completions", {"prompt": "p"})]
)
class TestBoth:
    """What the two kinds have in common."""

    @pytest.mark.parametrize("stream", [False, True])
    def test_the_header_names_what_answered(
        self, service: Service, path: str, prompt: dict[str, Any], stream: bool
    ) -> None:
        answer = service.http().post(path, json={"model": "tiny", "stream": stream, **prompt})
        named = f"base={'b' * 16}; frames={'f' * 16}; adapter={'a' * 16}"
        assert answer.headers["x-uora-provenance"] == named
        service.engine.lines[0] = START | {"provenance": {"base": "b" * 64}}
        answer = service.http().post(path, json={"model": "tiny", "stream": stream, **prompt})
        assert answer.headers["x-uora-provenance"] == f"base={'b' * 16}"

    def test_a_request_can_ask_for_less_time(self, service: Service, path: str, prompt: dict[str, Any]) -> None:
        body = {"model": "tiny", **prompt}
        for asked in ("1.5", "900"):
            service.http().post(path, json=body, headers={"x-request-timeout-seconds": asked}).raise_for_status()
        assert [request["deadline_seconds"] for request in service.engine.requests] == [1.5, 120.0]
        for wrong in ("0", "-1", "soon", "nan", "inf"):
            answer = service.http().post(path, json=body, headers={"x-request-timeout-seconds": wrong})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-request-timeout-seconds")

    def test_an_adapter_comes_with_the_request(
        self, service: Service, path: str, prompt: dict[str, Any], adapter: Artifact
    ) -> None:
        field = in_base64(dumps(adapter))
        answer = service.http().post(path, json={"model": "tiny", **prompt, **field})
        assert answer.status_code == 200, answer.text
        sent = service.engine.requests[0]["adapter"]
        assert (sent["digest"], sent["data"]) == (None, field["adapter"]["data"])

    def test_its_digest_alone_is_nothing(
        self, service: Service, path: str, prompt: dict[str, Any], adapter: Artifact
    ) -> None:
        http, digest = service.http(service.stranger), adapter.manifest.digest
        attempts: list[dict[str, Any]] = [
            {"model": "tiny", "adapter": {"data": "AAAA", "digest": digest}},
            {"model": "tiny", "adapter": {"digest": digest}},
            {"model": "tiny", "adapter": {"id": "x", "digest": digest}},
            {"model": "tiny", "adapter": digest},
            {"model": digest},
        ]
        assert [http.post(path, json={**prompt, **attempt}).status_code for attempt in attempts] == [400] * 4 + [404]
        assert service.engine.requests == []

    def test_it_has_a_size(self, service: Service, path: str, prompt: dict[str, Any]) -> None:
        limit, http = service.settings.max_inline_adapter_bytes, service.http()
        http.post(path, json={"model": "tiny", **prompt, **in_base64(b"x" * limit)}).raise_for_status()
        for content, code in ((b"x" * (limit + 1), "adapter_too_large"), (b"", "invalid_value")):
            answer = http.post(path, json={"model": "tiny", **prompt, **in_base64(content)})
            error = answer.json()["error"]
            assert (answer.status_code, error["code"], error["param"]) == (400, code, "adapter.data")
        assert len(service.engine.requests) == 1

    def test_not_base64_or_beside_a_fine_tuned_model(
        self, service: Service, path: str, prompt: dict[str, Any], adapter: Artifact
    ) -> None:
        http = service.http()
        answer = http.post(path, json={"model": "tiny", **prompt, "adapter": {"data": "&%$"}})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "adapter.data")
        with service.sessions.begin() as session:
            name = add_adapter(session, service.tenant, add_job(session, service.tenant)).id
        answer = http.post(path, json={"model": name, **prompt, **in_base64(dumps(adapter))})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "adapter")
        assert service.engine.requests == []

    def test_a_checkpoint_answers_while_its_job_runs(self, service: Service, path: str, prompt: dict[str, Any]) -> None:
        with service.sessions.begin() as session:
            job = add_job(session, service.tenant, status=JobStatus.RUNNING)
            name = add_adapter(session, service.tenant, job, step=20).id
        assert name.endswith(":ckpt-step-20")
        http = service.http()
        assert http.post(path, json={"model": name, **prompt}).json()["model"] == name
        assert service.engine.requests[0]["adapter"] == {"id": name, "digest": "0" * 64, "data": None}
        for unknown in (name.removesuffix(":ckpt-step-20"), name[:-2] + "40"):
            assert http.post(path, json={"model": unknown, **prompt}).status_code == 404
        assert service.http(service.stranger).post(path, json={"model": name, **prompt}).status_code == 404

    @pytest.mark.parametrize(
        ("status", "code", "wait", "expected"),
        [
            (429, "rate_limit_exceeded", 2.2, (429, "rate_limit_exceeded", "3")),
            (503, "engine_busy", 7, (503, "engine_busy", "7")),
            (503, "engine_stopping", None, (503, "engine_unavailable", "1")),
        ],
    )
    def test_a_full_queue_says_when_to_come_again(
        self, service: Service, path: str, prompt: dict[str, Any], status: int, code: str, wait: Any, expected: Any
    ) -> None:
        error = {"code": code, "message": "full", "param": None, "retry_after": wait}
        service.engine.refusal = (status, {"error": error})
        answer = service.http().post(path, json={"model": "tiny", **prompt})
        assert (answer.status_code, answer.json()["error"]["code"], answer.headers["retry-after"]) == expected

    def test_a_deadline(self, service: Service, path: str, prompt: dict[str, Any]) -> None:
        service.engine.lines = [START, delta("a"), {"type": "error", "code": "deadline_exceeded", "message": "late"}]
        answer = service.http().post(path, json={"model": "tiny", **prompt})
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert answer.headers["x-should-retry"] == "false"
        streamed = service.http().post(path, json={"model": "tiny", "stream": True, **prompt}).text
        last = json.loads(streamed.strip().rpartition("data: ")[2])
        assert last["error"]["code"] == "deadline_exceeded"


def test_the_client_is_told_when_to_come_again(service: Service, client: OpenAI) -> None:
    error = {"code": "rate_limit_exceeded", "message": "own", "param": None, "retry_after": 4.0}
    service.engine.refusal = (429, {"error": error})
    with pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(model="tiny", prompt="p")
    assert caught.value.response.headers["retry-after"] == "4"
