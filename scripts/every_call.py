"""Every call of the official client that a fine-tuning service has to answer, against a running one.

``python -m scripts.every_call http://127.0.0.1:8000/v1 sk-uora-...`` with an organization-wide key, as the one that
the first start prints. The client's own classes say which calls there are: one that this script does not make is a
failure too. It prints a line for each call, and ends with 1 if any failed. What it makes, it deletes.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import hmac
import inspect
import json
import secrets
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import openai
from openai._resource import SyncAPIResource
from pydantic import BaseModel

#: Parts of the client that are called in full.
RESOURCES = ("files", "uploads", "models", "fine_tuning", "completions", "chat.completions", "webhooks")
#: Calls that the service refuses, with a clear error; why it does not offer them.
NOT_OFFERED = {
    "fine_tuning.alpha.graders.run": "no reinforcement learning",
    "fine_tuning.alpha.graders.validate": "no reinforcement learning",
    "chat.completions.list": "answers are not stored",
    "chat.completions.retrieve": "answers are not stored",
    "chat.completions.update": "answers are not stored",
    "chat.completions.delete": "answers are not stored",
    "chat.completions.messages.list": "answers are not stored",
}
ENDED = ("succeeded", "failed", "cancelled")
HELLO: list[Any] = [{"role": "user", "content": "What is the opposite of up?"}]
ROW = {"messages": [*HELLO, {"role": "assistant", "content": "down"}]}
ROWS = (json.dumps(ROW) + "\n").encode() * 16


class CheckFailed(Exception):
    """A call was answered, but not as it must be."""


def check(condition: object, what: str) -> None:
    """Go on if it holds."""
    if not condition:
        raise CheckFailed(what)


@dataclass
class Record:
    """What was called, what failed, and whether the next call has to be refused."""

    called: set[str] = field(default_factory=set)
    failures: int = 0
    _refusal_code: str | None = None
    refusal: openai.APIStatusError | None = None

    def passed(self, name: str, note: str = "") -> None:
        """Print a call that did as it should."""
        self.called.add(name)
        print(f"✓ {name}{note and f': {note}'}", flush=True)

    def failed(self, name: str, why: str) -> None:
        """Print a failure."""
        self.failures += 1
        print(f"✗ {name}: {' '.join(why.split())}", flush=True)

    @contextmanager
    def refusing(self, code: str) -> Iterator[None]:
        """The calls inside have to be refused with this code and a message, at the first attempt."""
        self._refusal_code = code
        try:
            yield
        finally:
            self._refusal_code = None

    def call(self, name: str, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Make a call; raises what it raises."""
        try:
            answer = method(*args, **kwargs)
        except openai.APIStatusError as error:
            if self._refusal_code is None:
                self.failed(name, f"{error.status_code} {error.message}")
                raise
            self._check_refusal(name, error)
            return None
        except Exception as error:
            self.failed(name, f"{type(error).__name__}: {error}")
            raise
        check(self._refusal_code is None, f"{name} was not refused")
        self.passed(name)
        return answer

    def _check_refusal(self, name: str, error: openai.APIStatusError) -> None:
        found = (error.code, error.request.headers.get("x-stainless-retry-count"))
        self.refusal = error
        if found != (self._refusal_code, "0") or not error.message or error.status_code >= 500:
            self.failed(name, f"found {error.status_code} {found}; expected {self._refusal_code} at the first attempt")
            return
        self.passed(name, f"refused, as it must be ({NOT_OFFERED.get(name, error.code)})")


class Recorded:
    """The client, or a part of it: everything that is called through it is recorded."""

    def __init__(self, record: Record, target: Any, path: str = "") -> None:
        self._record, self._target, self._path = record, target, path

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._target, name)
        path = f"{self._path}.{name}".lstrip(".")
        if isinstance(found, SyncAPIResource):
            return Recorded(self._record, found, path)
        if inspect.ismethod(found) and isinstance(self._target, SyncAPIResource):
            return lambda *args, **kwargs: self._record.call(path, found, *args, **kwargs)
        return found


def public_calls(client: openai.OpenAI) -> set[str]:
    """The names of all calls of `RESOURCES`, from the client's own classes."""

    def walk(resource: SyncAPIResource, path: str) -> Iterator[str]:
        for name in dir(resource):
            if name.startswith("_"):
                continue
            found = getattr(resource, name)
            if isinstance(found, SyncAPIResource):
                yield from walk(found, f"{path}.{name}")
            elif inspect.ismethod(found):
                yield f"{path}.{name}"

    calls: set[str] = set()
    for path in RESOURCES:
        resource: Any = client
        for name in path.split("."):
            resource = getattr(resource, name)
        calls.update(walk(resource, path))
    return calls


@dataclass
class World:
    """What the steps share: the recorded client, the plain one, and what earlier steps made."""

    client: Any  # Recorded: the client's calls under their own names
    plain: openai.OpenAI
    record: Record
    base_model: str
    training_file: str = ""
    job: str = ""
    model: str = ""


def use_files(world: World) -> None:
    """Files, as a whole."""
    files = world.client.files
    made = files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
    check(files.wait_for_processing(made.id, poll_interval=0.2).status == "processed", "the file is processed")
    check(files.retrieve(made.id).bytes == len(ROWS), "the size is told")
    check(files.content(made.id).read() == ROWS, "the bytes come back")
    check(files.retrieve_content(made.id) == ROWS.decode(), "the text comes back")
    nameless = files.create(file=ROWS, purpose="fine-tune")
    listed = [file.id for file in files.list(purpose="fine-tune", limit=1)]
    check(listed[:2] == [nameless.id, made.id], "all pages are listed, newest first")
    check(files.delete(nameless.id).deleted, "the file is deleted")
    with world.record.refusing("file_not_found"):
        files.retrieve(nameless.id)
    world.training_file = made.id


def use_uploads(world: World) -> None:
    """Files in parts."""
    uploads, half = world.client.uploads, len(ROWS) // 2
    announced: dict[str, Any] = {"filename": "parts.jsonl", "mime_type": "application/jsonl", "purpose": "fine-tune"}
    upload = uploads.create(bytes=len(ROWS), **announced)
    parts = [uploads.parts.create(upload.id, data=part).id for part in (ROWS[:half], ROWS[half:])]
    file = uploads.complete(upload.id, part_ids=parts).file
    check(world.plain.files.content(file.id).read() == ROWS, "the parts are put together")
    check(uploads.cancel(uploads.create(bytes=1, **announced).id).status == "cancelled", "an upload is cancelled")
    whole = uploads.upload_file_chunked(file=ROWS, bytes=len(ROWS), part_size=half, **announced).file
    check(whole.bytes == len(ROWS), "the client's own helper works")
    for made in (file, whole):
        world.plain.files.delete(made.id)


def use_jobs(world: World) -> None:
    """A job to its end, and one that is paused, resumed and cancelled."""
    jobs, label = world.client.fine_tuning.jobs, secrets.token_hex(8)
    asked: dict[str, Any] = {
        "model": world.base_model,
        "training_file": world.training_file,
        "validation_file": world.training_file,
        "metadata": {"every_call": label},
        "extra_body": {"peft": {"method": "uora", "r": 8}},
    }
    job = jobs.create(**asked, suffix="every-call", seed=1, method=supervised(n_epochs=1))
    check(job.adapter["r"] == 8, "extensions of the request are taken, and shown")
    other = jobs.create(**asked, method=supervised(n_epochs=50))
    listed = [found.id for found in jobs.list(limit=1, metadata={"every_call": label})]
    check(listed == [other.id, job.id], "jobs are found by their metadata, in several pages")
    jobs.pause(other.id)
    wait(world, other.id, "paused", *ENDED)
    with world.record.refusing("file_in_use"):
        world.client.files.delete(world.training_file)
    check(jobs.resume(other.id).status == "queued", "a paused job goes on")
    jobs.cancel(other.id)
    wait(world, other.id, *ENDED)
    with world.record.refusing("job_not_cancellable"):
        jobs.cancel(other.id)
    with world.record.refusing("invalid_value"):
        jobs.create(**asked, method=supervised(n_epochs=0))
    param = world.record.refusal and world.record.refusal.param
    check(param == "method.supervised.hyperparameters.n_epochs", "a refusal names the parameter")
    wait(world, job.id, *ENDED)
    done = jobs.retrieve(job.id)
    check(done.status == "succeeded", f"the job succeeds: {done.status}, {done.error}")
    check(any(event.type == "metrics" for event in jobs.list_events(job.id, limit=2)), "events have measurements")
    check(jobs.checkpoints.list(job.id).data[0].metrics.valid_loss is not None, "checkpoints have losses")
    world.job, world.model = job.id, done.fine_tuned_model
    world.plain.delete(f"/fine_tuning/jobs/{other.id}", cast_to=object)


def supervised(**hyperparameters: Any) -> Any:
    """``method`` of a job."""
    return {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}


def wait(world: World, job_id: str, *statuses: str, seconds: float = 600) -> None:
    """Until the job has one of the statuses."""
    deadline = time.monotonic() + seconds
    while world.plain.fine_tuning.jobs.retrieve(job_id).status not in statuses:
        check(time.monotonic() < deadline, f"{job_id} is one of {statuses} within {seconds:.0f} s")
        time.sleep(0.3)


def use_models(world: World) -> None:
    """Models, as far as they are not deleted."""
    models = world.client.models
    check(world.model in [model.id for model in models.list()], "the job's model is listed")
    check(models.retrieve(world.model).root == world.base_model, "a model names its base model")
    with world.record.refusing("model_not_found"):
        models.retrieve("some-org/with-a-slash")


def use_permissions(world: World) -> None:
    """Another project may use the model, and then no more."""
    permissions, projects = world.client.fine_tuning.checkpoints.permissions, world.plain.admin.organization.projects
    guest = projects.create(name=f"every call {secrets.token_hex(4)}")
    try:
        made = permissions.create(world.model, project_ids=[guest.id]).data[0]
        check(permissions.list(world.model, order="ascending").data[-1].project_id == guest.id, "it is listed")
        check(permissions.retrieve(world.model).data[0].id == made.id, "the deprecated call lists it too")
        check(permissions.delete(made.id, fine_tuned_model_checkpoint=world.model).deleted, "it is taken back")
    finally:
        projects.archive(guest.id)


def use_chat(world: World) -> None:
    """Chat, in all four ways of the client."""

    class Answer(BaseModel):
        word: Literal["down", "up"]

    completions = world.client.chat.completions
    asked: dict[str, Any] = {"model": world.model, "messages": HELLO, "temperature": 0}
    answer = completions.create(**asked, max_tokens=8, logprobs=True, top_logprobs=2)
    check(answer.model == world.model and answer.system_fingerprint, "an answer names what made it")
    chunks = list(completions.create(**asked, max_tokens=8, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    check(text == answer.choices[0].message.content, "a stream says the same as the whole answer")
    check(chunks[-1].usage.completion_tokens == answer.usage.completion_tokens, "its last chunk has the usage")
    with completions.stream(**asked, max_tokens=8) as stream:
        # Its final completion is none for an answer of all its tokens: the client raises.
        pieces = [event.delta for event in stream if event.type == "content.delta"]
    check("".join(pieces) == text, "the streaming helper has it too")
    # Long enough for all the white space that a model may like between the parts.
    parsed = completions.parse(**asked, max_tokens=256, response_format=Answer)
    check(parsed.choices[0].message.parsed.word in ("down", "up"), "an answer keeps to its schema")
    with world.record.refusing("model_not_found"):
        completions.create(model="ft:nobody", messages=HELLO)


def use_completions(world: World) -> None:
    """Raw prompts."""
    asked: dict[str, Any] = {"model": world.model, "prompt": "up", "max_tokens": 8, "temperature": 0}
    whole = world.client.completions.create(**asked).choices[0].text
    chunks = world.client.completions.create(**asked, stream=True)
    check("".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole, "a stream says the same")


def use_webhooks(world: World) -> None:
    """An endpoint, and the signature of what is sent to it."""
    webhooks, event_type = world.client.webhooks, "fine_tuning.job.succeeded"
    check(event_type in webhooks.event_types.list().data, "the event is offered")
    with receiver() as (url, received):
        private = takes_private(world.plain, url)
        url = url if private else "https://receiver.invalid/hook"
        made = webhooks.create(name="every call", url=url, event_types=[event_type])
        check(made.id in [endpoint.id for endpoint in webhooks.list()], "it is listed")
        check(webhooks.retrieve(made.id).url == url, "it is there")
        check(webhooks.update(made.id, name="renamed").name == "renamed", "it is renamed")
        secret = webhooks.rotate_secret(made.id).signing_secret
        check(secret != made.signing_secret, "it has another secret")
        if private:
            check(webhooks.test(made.id, event_type=event_type).status_code == 204, "a sample arrives")
        else:  # the service sends to public addresses only, and this machine's is none
            with world.record.refusing("webhook_unreachable"):
                webhooks.test(made.id, event_type=event_type)
            received.append(signed_sample(secret))
        body, headers = received[-1]
        webhooks.verify_signature(body, headers, secret=secret)
        check(webhooks.unwrap(body, headers, secret=secret).type == event_type, "the event is read")
        check(webhooks.delete(made.id).deleted, "it is deleted")


@contextmanager
def receiver() -> Iterator[tuple[str, list[tuple[bytes, dict[str, str]]]]]:
    """A receiver on this machine: its URL, and bodies and headers as they come."""
    received: list[tuple[bytes, dict[str, str]]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            received.append((self.rfile.read(int(headers["content-length"])), headers))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing to stderr."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/hook", received
        server.shutdown()


def takes_private(client: openai.OpenAI, url: str) -> bool:
    """Whether the service sends to this machine: ``UORA_WEBHOOK_ALLOW_PRIVATE``."""
    try:
        client.webhooks.delete(
            client.webhooks.create(name="probe", url=url, event_types=["fine_tuning.job.succeeded"]).id
        )
    except openai.BadRequestError:
        return False
    return True


def signed_sample(secret: str) -> tuple[bytes, dict[str, str]]:
    """An event as the service signs it, where none can be received."""
    event = {
        "id": "evt_sample",
        "object": "event",
        "created_at": int(time.time()),
        "type": "fine_tuning.job.succeeded",
        "data": {"id": "ftjob-sample"},
    }
    body, stamp = json.dumps(event).encode(), str(int(time.time()))
    key = base64.b64decode(secret.removeprefix("whsec_"))
    digest = hmac.new(key, f"evt_sample.{stamp}.".encode() + body, hashlib.sha256).digest()
    signature = f"v1,{base64.b64encode(digest).decode()}"
    return body, {"webhook-id": "evt_sample", "webhook-timestamp": stamp, "webhook-signature": signature}


def use_what_is_not_offered(world: World) -> None:
    """All of it is refused as unknown."""
    completions, graders = world.client.chat.completions, world.client.fine_tuning.alpha.graders
    grader: Any = {"type": "string_check", "name": "g", "input": "a", "reference": "a", "operation": "eq"}
    calls: list[Callable[[], object]] = [
        lambda: graders.run(grader=grader, model_sample="a"),
        lambda: graders.validate(grader=grader),
        lambda: completions.retrieve("chatcmpl-x"),
        lambda: completions.update("chatcmpl-x", metadata={}),
        lambda: completions.delete("chatcmpl-x"),
        lambda: completions.messages.list("chatcmpl-x"),
    ]
    for call in calls:
        with world.record.refusing("unknown_url"):
            call()
    with world.record.refusing("method_not_allowed"):
        completions.list()


def delete_all(world: World) -> None:
    """The model, and with it everything else that is left."""
    check(world.client.models.delete(world.model).deleted, "the model is deleted")
    with world.record.refusing("model_not_found"):
        world.client.models.retrieve(world.model)
    result_files = world.plain.fine_tuning.jobs.retrieve(world.job).result_files
    world.plain.delete(f"/fine_tuning/jobs/{world.job}", cast_to=object)
    for file in (world.training_file, *result_files):
        world.plain.files.delete(file)


STEPS = (
    use_files,
    use_uploads,
    use_jobs,
    use_models,
    use_permissions,
    use_chat,
    use_completions,
    use_webhooks,
    use_what_is_not_offered,
    delete_all,
)


def base_model_of(client: openai.OpenAI) -> str:
    """The first base model of the service."""
    return next(model.id for model in client.models.list() if model.owned_by == "system")


def run(client: openai.OpenAI, *, base_model: str | None) -> int:
    """Take all steps; how many failures there were. A step that fails does not keep the others from theirs."""
    record = Record()
    world = World(Recorded(record, client), client, record, base_model or base_model_of(client))
    for step in STEPS:
        before = record.failures
        try:
            step(world)
        except Exception as error:
            if record.failures == before:  # the call itself was no failure
                record.failed(step.__name__, f"{type(error).__name__}: {error}")
    for name in sorted(public_calls(client) - record.called):
        record.failed(name, "was not called")
    print(f"{len(record.called)} calls, {record.failures} failures")
    return record.failures


def main() -> None:
    """Run against the service of the command line."""
    parser = argparse.ArgumentParser(description="Every call of the official client, against a running service.")
    parser.add_argument("base_url", help="such as http://127.0.0.1:8000/v1")
    parser.add_argument("api_key", help="an organization-wide key")
    parser.add_argument("--model", help="the base model to train; else the first of the service")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", DeprecationWarning)  # deprecated calls are calls too
    client = openai.OpenAI(
        base_url=arguments.base_url, api_key=arguments.api_key, admin_api_key=arguments.api_key, timeout=120
    )
    sys.exit(1 if run(client, base_model=arguments.model) else 0)


if __name__ == "__main__":
    main()
