"""What the operator sees of a running service: metrics, logs and traces of one job and one answer."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import yaml

from scripts.demo import free_port
from tests.e2e.support import Running, ask, chat_rows, service, upload, wait_job
from tests.metrics import Labels, parse, value
from tests.otlp import Received, collecting
from worker.up import ROOT

#: In what users send, and nowhere else.
PROMPT = "a-prompt-that-nobody-else-may-read"
TRAINED = "a-row-that-nobody-else-may-read"
TOKEN = "token-of-whoever-reads-metrics"
#: Of the client's own.
CLIENTS_TRACE = "0123456789abcdef0123456789abcdef"
STEPS = 8


@dataclass
class Seen:
    """What there was to see once a job had succeeded and its model had answered."""

    job_id: str
    key: str
    log: list[str]
    spans: list[Received]
    samples: dict[str, list[tuple[Labels, float]]]


def three_ports() -> int:
    """The first of three free ones in a row."""
    while True:
        first = free_port()
        try:
            for port in range(first, first + 3):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, base_models: dict[str, str]) -> Iterator[Seen]:
    home = tmp_path_factory.mktemp("operations")
    engine, celery = free_port(), three_ports()
    with collecting() as collector:
        options = {
            "UORA_CACHE_DIR": str(home / "cache"),
            "UORA_DTYPE": "float32",
            "UORA_TORCH_THREADS": "1",
            "UORA_SPARE_TRAINER": "false",
            "UORA_SWEEP_INTERVAL": "PT1S",
            "UORA_ENGINE_ADVERTISE_URL": f"http://127.0.0.1:{engine}",
            "UORA_METRICS_TOKEN": TOKEN,
            "UORA_METRICS_PORT": str(celery),
            "UORA_LOG_LEVEL": "DEBUG",
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        }
        with service(home, base_models, **options) as running:
            urls = [running.url, *(f"http://127.0.0.1:{port}" for port in (engine, celery, celery + 1, celery + 2))]
            job_id, key = use(running)
            samples = parse("".join(scrape(url) for url in urls))
        # Every process has sent its last spans by now.
        yield Seen(job_id, key, running.log.read_text().splitlines(), collector.spans, samples)


def use(running: Running) -> tuple[str, str]:
    """Train a model, and ask it; the job's id and the key that was used."""
    client = running.client("acme")
    client = client.with_options(default_headers={"traceparent": f"00-{CLIENTS_TRACE}-00f067aa0ba902b7-01"})
    rows = upload(client, chat_rows([(f"{TRAINED} {number}", "yes") for number in range(8)]))
    hyperparameters = {"n_epochs": 2, "batch_size": 2}
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=rows,
        validation_file=rows,
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},  # type: ignore[typeddict-item]
    )
    job = wait_job(client, job.id)
    assert job.status == "succeeded", job.error
    ask(client, str(job.fine_tuned_model), PROMPT)
    return job.id, client.api_key


def scrape(url: str) -> str:
    assert httpx.get(f"{url}/metrics").status_code == 401
    answer = httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {TOKEN}"})
    assert answer.status_code == 200, answer.text
    return answer.text


def test_the_metrics_tell_what_happened(seen: Seen) -> None:
    def found(name: str, **labels: str) -> float:
        return value(seen.samples, name, **labels)

    assert found("uora_request_seconds_count", route="/v1/fine_tuning/jobs", method="POST", status="200") == 1
    assert found("uora_request_seconds_count", route="/generate", status="200") == 1
    assert found("uora_jobs", status="succeeded") == 1
    assert found("uora_engines", base_model="tiny") == 1
    assert found("uora_training_attempts_total", outcome="succeeded") == 1
    assert found("uora_training_steps_total", base_model="tiny") == STEPS
    assert found("uora_trained_tokens_total", base_model="tiny") > STEPS
    assert found("uora_tokens_total", type="prompt") > len(PROMPT) / 2
    assert 1 <= found("uora_tokens_total", type="completion") <= 8
    assert found("uora_time_to_first_token_seconds_count", base_model="tiny") == 1
    assert found("uora_batch_rows_count", work="text") >= found("uora_tokens_total", type="completion")
    assert found("uora_adapters_resident") >= 1
    assert found("uora_adapter_bytes") > 1000
    assert found("uora_task_seconds_count", task="training.run", outcome="done") >= 1
    assert len(seen.samples["process_resident_memory_bytes"]) == 5


def named(expression: str) -> set[str]:
    """Metrics of an expression or a text."""
    return set(re.findall(r"\b(?:uora|process)_[a-z_]+\b", expression))


def test_the_dashboard_shows_what_there_is(seen: Seen) -> None:
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "uora.json").read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    shown = set().union(*map(named, expressions))
    assert len(shown) > 20
    assert shown <= seen.samples.keys()
    for panel in panels:
        assert {panel["datasource"]["uid"], *(each["datasource"]["uid"] for each in panel["targets"])} == {
            "${datasource}"
        }
    assert [each["name"] for each in dashboard["templating"]["list"]] == ["datasource"]
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places) == len({panel["id"] for panel in dashboard["panels"]})


def test_the_page_lists_every_metric(seen: Seen) -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    listed = set(re.findall(r"^\| `(uora_[a-z_]+)`", page, flags=re.MULTILINE))
    suffix = re.compile(r"_(bucket|count|sum)$")
    scraped = {suffix.sub("", name) for name in seen.samples if name.startswith("uora_")}
    assert listed == scraped


def test_prometheus_asks_where_the_processes_of_compose_answer() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    jobs = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())["scrape_configs"]
    asked = {name: each["port"] for job in jobs for each in job["dns_sd_configs"] for name in each["names"]}
    celery = dict.fromkeys(("trainer", "sweeper", "webhooks"), services["trainer"]["environment"]["UORA_METRICS_PORT"])
    servers = {name: services[name]["environment"]["UVICORN_PORT"] for name in ("api", "engine")}
    assert asked == servers | celery
    (token_file,) = {job["authorization"]["credentials_file"] for job in jobs}
    assert token_file in " ".join(services["prometheus"]["entrypoint"])


def test_every_line_is_json_and_names_what_it_is_about(seen: Seen) -> None:
    lines = [json.loads(line) for line in said(seen, "api", "engine", "trainer", "sweeper", "webhooks")]
    (created,) = [line for line in lines if line["event"] == "job_created"]
    assert created["job_id"] == seen.job_id
    (posted,) = [line for line in lines if line["event"] == "request" and line["path"] == "/v1/fine_tuning/jobs"]
    assert posted["request_id"] == created["request_id"]
    asked = [line for line in lines if line.get("path") in ("/v1/chat/completions", "/generate")]
    assert len(asked) == 2
    assert len({line["request_id"] for line in asked}) == 1
    by_the_trainer = [line for line in lines if line.get("logger") == "worker.tasks.training"]
    assert by_the_trainer
    assert {line["job_id"] for line in by_the_trainer} == {seen.job_id}
    loggers = {str(line.get("logger")).partition(".")[0] for line in lines}
    assert {"uvicorn", "celery", "worker"} <= loggers


def said(seen: Seen, *processes: str) -> Iterator[str]:
    """What processes logged, without what honcho puts before it, nor what Celery says to a terminal on Ctrl-C."""
    pattern = re.compile(rf"^\S+ (?:{'|'.join(processes)})\S*\s+\| (.*)$")
    for line in seen.log:
        found = pattern.match(re.sub(r"\x1b\[\d*m", "", line))
        if found and found[1] and not found[1].startswith("worker: "):
            yield found[1]


def test_no_line_has_a_key_or_what_users_wrote(seen: Seen) -> None:
    """With every logger at DEBUG."""
    log = "\n".join(seen.log)
    assert '"debug"' in log
    assert seen.job_id in log
    for secret in (seen.key, PROMPT, TRAINED, TOKEN):
        assert secret not in log


def test_one_trace_leads_from_the_request_to_the_steps(seen: Seen) -> None:
    (posted,) = [span for span in seen.spans if span.name == "POST /v1/fine_tuning/jobs"]
    trace = [span for span in seen.spans if span.trace_id == posted.trace_id]
    by_id = {span.span_id: span for span in trace}
    names = {span.name for span in trace}
    assert names == {
        "POST /v1/fine_tuning/jobs",
        "send files.validate",
        "files.validate",
        "send training.run",
        "training.attempt",
        "training.start",
        "training.steps",
        "training.evaluation",
        "training.state",
        "training.commit",
    }
    assert all(span.parent_id in by_id for span in trace if span is not posted)
    assert posted.attributes["http.response.status_code"] == 200
    assert str(posted.attributes["uora.project_id"]).startswith("proj")
    (attempt,) = [span for span in trace if span.name == "training.attempt"]
    assert (attempt.parent_id, attempt.service) == (posted.span_id, "uora-trainer")
    assert (attempt.attributes["uora.job_id"], attempt.attributes["uora.outcome"]) == (seen.job_id, "succeeded")
    parts = [span for span in trace if span.parent_id == attempt.span_id]
    steps = [span for span in parts if span.name == "training.steps"]
    told = [range(a, b + 1) for a, b in (first_and_last(span) for span in steps)]
    assert sorted(step for each in told for step in each) == list(range(1, STEPS + 1))
    assert sum(span.seconds for span in parts) <= attempt.seconds + 0.1


def first_and_last(span: Received) -> tuple[int, int]:
    attributes: Any = span.attributes
    return attributes["uora.first_step"], attributes["uora.last_step"]


def test_a_clients_own_trace_is_named_and_not_joined(seen: Seen) -> None:
    assert CLIENTS_TRACE not in {span.trace_id for span in seen.spans}
    (posted,) = [span for span in seen.spans if span.name == "POST /v1/fine_tuning/jobs"]
    assert posted.links == (CLIENTS_TRACE,)


def test_an_answers_trace_has_the_engines_part(seen: Seen) -> None:
    (asked,) = [span for span in seen.spans if span.name == "POST /v1/chat/completions"]
    trace = {span.name: span for span in seen.spans if span.trace_id == asked.trace_id}
    engines = trace["POST /generate"]
    assert (engines.service, engines.parent_id) == ("uora-engine", asked.span_id)
    parts = {name for name, span in trace.items() if span.parent_id == engines.span_id}
    assert parts == {"generate.queue", "generate.prefill", "generate.decode"}
    assert trace["generate.decode"].attributes["uora.completion_tokens"]


def test_spans_have_no_contents(seen: Seen) -> None:
    everything = repr(seen.spans)
    for secret in (seen.key, PROMPT, TRAINED):
        assert secret not in everything
