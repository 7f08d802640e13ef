"""Record an example of every call from a running service: ``python -m scripts.record_examples``.

Starts the service with a database of its own and SmolLM2-135M-Instruct, carries out the steps below through OpenAI's
client, and writes what was sent and answered into ``api/examples.json``, from where it reaches the OpenAPI document
and ``docs/api.md`` (``scripts.api_reference``). A few minutes; run it again when a call is new or answers otherwise.
"""

from __future__ import annotations

import json
import os
import re
import time
from email import message_from_bytes, policy
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import httpx2
from openai import OpenAI
from rich.console import Console
from sqlalchemy.orm import Session

from api.database import make_engine
from api.main import create_app
from api.openapi import EXAMPLES, operations, path_pattern
from api.projects.service import create_api_key, ensure_project
from api.settings import Settings
from scripts.demo import own_settings, running_service
from worker.up import ROOT

MODEL = "SmolLM2-135M-Instruct"
#: Longer answers that are not JSON are cut.
MAX_TEXT = 1_000
console = Console()

CHATS = [
    ("Is the shop open on Sunday?", "Yes, from ten to four."),
    ("Do you repair watches?", "We do; most are ready within a week."),
    ("Can I pay by card?", "Yes, every card and also in cash."),
    ("Where can I park?", "Behind the house, free for two hours."),
] * 4

#: Run in this order with the same names; the first that ends with a call is shown as the way to make it.
STEPS = """
file = client.files.create(file=open("train.jsonl", "rb"), purpose="fine-tune")

client.files.list(purpose="fine-tune", limit=2)

client.files.retrieve(file.id)

client.files.content(file.id).text

client.get(f"/files/{file.id}/report", cast_to=object)

upload = client.uploads.create(
    filename="more.jsonl", purpose="fine-tune", mime_type="text/jsonl", bytes=len(more), expires_after=None
)

part = client.uploads.parts.create(upload.id, data=more)

client.uploads.complete(upload.id, part_ids=[part.id])

other = client.uploads.create(filename="not.jsonl", purpose="fine-tune", mime_type="text/jsonl", bytes=100)
client.uploads.cancel(other.id)

client.post("/fine_tuning/estimate", cast_to=object, body={"model": MODEL, "training_file": file.id})

job = client.fine_tuning.jobs.create(
    model=MODEL,
    training_file=file.id,
    validation_file=file.id,
    suffix="shop",
    seed=7,
    metadata={"customer": "17"},
    method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 4}}},
    extra_body={"peft": {"method": "uora", "r": 64, "targets": "q,v"}},
)

client.fine_tuning.jobs.list(limit=1, metadata={"customer": "17"})

client.fine_tuning.jobs.retrieve(job.id)

client.get("/fine_tuning/jobs/states", cast_to=object, options={"params": {"ids": job.id, "wait": 5}})

client.fine_tuning.jobs.pause(job.id)

client.fine_tuning.jobs.resume(job.id)

job = wait_for(job)
client.fine_tuning.jobs.list_events(job.id, limit=2)

checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id, limit=1)

client.post(f"/fine_tuning/jobs/{job.id}/checkpoints/best/promote", cast_to=object)

again = client.post(f"/fine_tuning/jobs/{job.id}/clone", cast_to=FineTuningJob, body={"peft": {"r": 16}})

client.fine_tuning.jobs.cancel(again.id)

wait_for(again)
third = client.post(f"/fine_tuning/jobs/{again.id}/retry", cast_to=FineTuningJob)

client.get("/fine_tuning/jobs/compare", cast_to=object, options={"params": {"ids": f"{job.id},{again.id}"}})

client.delete(f"/fine_tuning/jobs/{again.id}", cast_to=object)

sweep = client.post(
    "/fine_tuning/sweeps",
    cast_to=dict,
    body={
        "model": MODEL,
        "training_file": file.id,
        "validation_file": file.id,
        "sweep": {"seeds": [1, 2], "learning_rates": [0.02, 0.05]},
    },
)

client.get(f"/fine_tuning/sweeps/{sweep['id']}", cast_to=object)

client.models.list()

model = client.models.retrieve(job.fine_tuned_model)

client.chat.completions.create(
    model=model.id, messages=[{"role": "user", "content": "Can I pay by card?"}], max_tokens=16, temperature=0
)

client.completions.create(model=MODEL, prompt="The shop is", max_tokens=8, temperature=0)

adapter = client.get(
    f"/models/{model.id}/adapter", cast_to=HttpxBinaryResponseContent, options={"params": {"format": "uora"}}
).read()

imported = client.post(
    "/models",
    cast_to=Model,
    body={"base_model": MODEL, "suffix": "imported"},
    files={"file": ("adapter.safetensors", adapter)},
    options={"headers": {"Content-Type": "multipart/form-data"}},
)

client.models.delete(imported.id)

project = client.admin.organization.projects.create(name="Second shop")

client.admin.organization.projects.list(limit=1)

client.admin.organization.projects.retrieve(project.id)

client.admin.organization.projects.update(project.id, name="The second shop")

key = client.post(
    f"/organization/projects/{project.id}/api_keys",
    cast_to=dict,
    body={"name": "till", "scopes": ["read", "infer"], "expires_in_seconds": 2_592_000},
)

client.admin.organization.projects.api_keys.list(project.id, limit=1)

client.admin.organization.projects.api_keys.retrieve(key["id"], project_id=project.id)

client.admin.organization.projects.api_keys.update(key["id"], project_id=project.id, scopes=["infer"])

client.post(
    f"/organization/projects/{project.id}/api_keys/{key['id']}/rotate", cast_to=object, body={"grace_seconds": 3600}
)

client.admin.organization.projects.api_keys.delete(key["id"], project_id=project.id)

permission = client.fine_tuning.checkpoints.permissions.create(model.id, project_ids=[project.id]).data[0]

client.fine_tuning.checkpoints.permissions.list(model.id)

client.fine_tuning.checkpoints.permissions.delete(permission.id, fine_tuned_model_checkpoint=model.id)

client.get(f"/organization/projects/{project.id}/quotas", cast_to=object)

client.post(
    f"/organization/projects/{project.id}/quotas",
    cast_to=object,
    body={"jobs_running": 2, "bytes_stored": 10_000_000_000},
)

client.admin.organization.projects.rate_limits.list_rate_limits(project.id)

client.admin.organization.projects.rate_limits.update_rate_limit(
    "rl-all-models", project_id=project.id, max_requests_per_1_minute=600
)

client.admin.organization.projects.archive(project.id)

admin_key = client.admin.organization.admin_api_keys.create(name="nightly audit")

client.admin.organization.admin_api_keys.list(limit=1)

client.admin.organization.admin_api_keys.retrieve(admin_key.id)

client.post(f"/organization/admin_api_keys/{admin_key.id}/rotate", cast_to=object, body={"grace_seconds": 0})

client.admin.organization.admin_api_keys.delete(admin_key.id)

client.admin.organization.audit_logs.list(limit=2)

client.get("/webhook_event_types", cast_to=object)

endpoint = client.webhooks.create(
    name="shop", url=receiver, event_types=["fine_tuning.job.succeeded", "fine_tuning.job.failed"]
)

client.webhooks.list()

client.webhooks.retrieve(endpoint.id)

client.webhooks.update(endpoint.id, name="the shop's")

client.webhooks.test(endpoint.id, event_type="fine_tuning.job.succeeded")

client.get(f"/webhook_endpoints/{endpoint.id}/deliveries", cast_to=object)

client.webhooks.rotate_secret(endpoint.id, keep_old_secret_active_for_24_hours=True)

client.webhooks.delete(endpoint.id)

for unfinished in client.fine_tuning.jobs.list():
    if unfinished.status in ("validating_files", "queued", "running"):
        client.fine_tuning.jobs.cancel(unfinished.id)

labels = client.files.create(file=open("labels.jsonl", "rb"), purpose="fine-tune")
classifier = wait_for(
    client.fine_tuning.jobs.create(
        model=MODEL,
        training_file=labels.id,
        suffix="mood",
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}},
        extra_body={"task": "classification"},
    )
)
client.post(
    "/classify", cast_to=object, body={"model": classifier.fine_tuned_model, "input": ["What a fine day", "It rains"]}
)

client.files.delete(labels.id)

client.admin.organization.usage.completions(start_time=today, bucket_width="1d", group_by=["model"])

client.get("/usage", cast_to=object, options={"params": {"bucket_width": "1d", "group_by[]": "operation", "limit": 1}})

client.get("/usage.csv", cast_to=str, options={"params": {"bucket_width": "1d"}})

client.get("/usage/quotas", cast_to=object)

client.get(f"{service}/healthz", cast_to=object)

client.get(f"{service}/readyz", cast_to=object)
"""


class Recorder:
    """Keeps the last exchange of a client."""

    def __init__(self) -> None:
        self.request: httpx2.Request | None = None
        self.response: httpx2.Response | None = None

    def on_response(self, response: httpx2.Response) -> None:
        """Called by the HTTP client."""
        response.read()
        self.request, self.response = response.request, response


def main() -> None:
    """Record."""
    settings = own_settings(ROOT / ".uora" / "examples")
    os.environ["UORA_WEBHOOK_ALLOW_PRIVATE"] = "true"
    write_files(settings.home)
    found = operations(create_app(settings).openapi())
    with running_service(settings) as unrecorded:
        recorder = Recorder()
        http = httpx2.Client(event_hooks={"response": [recorder.on_response]}, timeout=600)
        client = OpenAI(
            base_url=unrecorded.base_url,
            api_key=organization_key(settings),
            admin_api_key=organization_key(settings),
            http_client=http,
        )
        examples = record(client, recorder, found, folder=settings.home)
    missing = sorted(set(found) - set(examples))
    if missing:
        raise SystemExit(f"No step calls {', '.join(missing)}; add one to STEPS.")
    EXAMPLES.write_text(json.dumps({name: examples[name] for name in found}, indent=1, ensure_ascii=False) + "\n")
    console.print(f"{len(examples)} calls recorded in {EXAMPLES.relative_to(ROOT)}")


def write_files(folder: Path) -> None:
    """The files that the steps upload."""
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in CHATS]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    moods = [("A fine day", "good"), ("I lost my keys", "bad"), ("Lovely", "good"), ("It hurts", "bad")] * 4
    (folder / "labels.jsonl").write_text("".join(json.dumps({"text": t, "label": m}) + "\n" for t, m in moods))


def organization_key(settings: Settings) -> str:
    """A key that may do everything."""
    with Session(make_engine(settings.database_url)) as session, session.begin():
        return create_api_key(session, ensure_project(session, name="demo"), name="examples", organization_wide=True)


def record(
    client: OpenAI, recorder: Recorder, found: dict[str, tuple[str, str]], *, folder: Path
) -> dict[str, dict[str, Any]]:
    """Carry out the steps; the exchange that each ends with, by the name of its operation."""
    from openai._legacy_response import HttpxBinaryResponseContent
    from openai.types import Model
    from openai.types.fine_tuning import FineTuningJob

    def wait_for(job: FineTuningJob) -> FineTuningJob:
        while job.status not in ("succeeded", "failed", "cancelled"):
            time.sleep(1)
            job = client.fine_tuning.jobs.retrieve(job.id)
        return job

    service = str(client.base_url).removesuffix("/v1/")
    names: dict[str, Any] = {
        "client": client,
        "MODEL": MODEL,
        "more": (folder / "train.jsonl").read_bytes(),
        "service": service,
        "receiver": f"{service}/healthz",
        "today": int(time.time()) // 86_400 * 86_400,
        "wait_for": wait_for,
        "FineTuningJob": FineTuningJob,
        "Model": Model,
        "HttpxBinaryResponseContent": HttpxBinaryResponseContent,
    }
    examples: dict[str, dict[str, Any]] = {}
    os.chdir(folder)
    for step in STEPS.strip().split("\n\n"):
        exec(step, names)  # noqa: S102 - the steps above
        assert recorder.request is not None  # noqa: S101 - a step that sends nothing is a mistake above
        assert recorder.response is not None  # noqa: S101
        name = find_operation(recorder.request, found)
        examples.setdefault(name, show(step, recorder.request, recorder.response))
        console.print(f"{recorder.response.status_code} {name}")
    return examples


def find_operation(request: httpx2.Request, found: dict[str, tuple[str, str]]) -> str:
    """The operation that a request is for: the one whose path says most of it."""
    matches = [
        (path.count("{"), -len(path), name)
        for name, (method, path) in found.items()
        if method == request.method and path_pattern(path).fullmatch(request.url.path)
    ]
    return min(matches)[2]


def show(step: str, request: httpx2.Request, response: httpx2.Response) -> dict[str, Any]:
    """An exchange as the document has it, without secrets."""
    sent = urlsplit(str(request.url))
    shown: dict[str, Any] = {
        "python": step,
        "path": sent.path,
        "query": dict(parse_qsl(sent.query)),
        "status": response.status_code,
        "content_type": response.headers.get("content-type", "").partition(";")[0],
    }
    kind = request.headers.get("content-type", "")
    if kind.startswith("multipart/"):
        shown["form"] = read_form(kind, request.read())
    elif request.read():
        shown["body"] = json.loads(request.read())
    if shown["content_type"] == "application/json":
        shown["answer"] = response.json()
    elif shown["content_type"].startswith("text/"):
        shown["answer"] = response.text[:MAX_TEXT]
    port = f":{request.url.port}"
    text = json.dumps(shown, ensure_ascii=False).replace(f"127.0.0.1{port}", "127.0.0.1:8000")
    return json.loads(re.sub(r"(sk-[a-z]+-(?:[a-z]+-)?\w{4}|whsec_\w{4})[\w+/=-]{8,}", r"\1...", text))


def read_form(kind: str, body: bytes) -> dict[str, str]:
    """The fields of a form; a file as ``@`` and its name, as curl takes it."""
    form = message_from_bytes(f"Content-Type: {kind}\r\n\r\n".encode() + body, policy=policy.HTTP)
    fields: dict[str, str] = {}
    for part in form.iter_parts():
        name = str(part.get_param("name", header="content-disposition"))
        filename = part.get_filename()
        fields[name] = f"@{filename}" if filename else part.get_content().strip()
    return fields


if __name__ == "__main__":
    main()
