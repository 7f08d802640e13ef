"""Commands against the live api: what they change there, what they print, and how they fail."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from typer.testing import CliRunner

from api.jobs.models import Job, JobStatus
from api.jobs.repository import add_event
from api.models.models import Adapter
from api.projects.models import Project
from api.projects.service import create_api_key
from cli.main import app
from tests.api.rows import add_adapter, add_file, add_job
from tests.api.support import ROOT, Service
from tests.cli.conftest import Run
from uora.cli import app as core
from uora.spec import UoraSpec

ROWS = b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n' * 2


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_bytes(ROWS)
    return path


def new_job(service: Service, **values: Any) -> str:
    with service.sessions.begin() as session:
        file_id = add_file(session, service.tenant).id
        adapter = UoraSpec(r=8).model_dump(mode="json")
        return add_job(session, service.tenant, training_file=file_id, adapter=adapter, **values).id


def said(run: Run, *arguments: str) -> str:
    """What a command prints, which must succeed."""
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    return str(done.stdout)


def listed(run: Run, *arguments: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(said(run, *arguments, "--json"))
    return found


def read_until(terminal: int, text: bytes) -> bytes:
    """What a terminal shows until it shows this, and what came with it."""
    shown = b""
    while text not in shown:
        shown += os.read(terminal, 65536)
    return shown


class TestFiles:
    def test_from_upload_to_delete(self, uora: Run, rows: Path, tmp_path: Path) -> None:
        file_id = said(uora, "files", "upload", str(rows)).strip()
        assert [file["id"] for file in listed(uora, "files", "list")] == [file_id]
        assert file_id in said(uora, "files", "list")
        assert "train.jsonl" in said(uora, "files", "get", file_id)
        out = tmp_path / "copy.jsonl"
        said(uora, "files", "download", file_id, "--out", str(out))
        assert out.read_bytes() == ROWS
        again = uora("files", "download", file_id, "--out", str(out))
        assert (again.exit_code, f"{out} is there already" in again.stderr) == (1, True)
        said(uora, "files", "delete", file_id)
        assert listed(uora, "files", "list") == []
        assert said(uora, "files", "list").strip() == "There are none."

    def test_a_large_file_goes_in_parts(
        self, uora: Run, client: OpenAI, rows: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("cli.files.MAX_WHOLE_BYTES", 10)
        file_id = said(uora, "files", "upload", str(rows)).strip()
        assert client.files.content(file_id).read() == ROWS

    def test_reports(self, uora: Run, rows: Path, tmp_path: Path) -> None:
        good = said(uora, "files", "upload", str(rows)).strip()
        assert "2 read, 2 usable" in said(uora, "files", "report", good)
        assert json.loads(said(uora, "files", "report", good, "--json"))["report"]["rows_read"] == 2
        (tmp_path / "bad.jsonl").write_text('{"messages": []}\n')
        bad = said(uora, "files", "upload", str(tmp_path / "bad.jsonl")).strip()
        assert uora("files", "report", bad).exit_code == 1


class TestJobs:
    def test_what_is_asked_for_is_what_is_made(self, uora: Run, service: Service, rows: Path) -> None:
        options = ["--model", "tiny", "--training-file", str(rows), "--validation-file", str(rows)]
        options += ["--suffix", "tone", "--epochs", "2", "--batch-size", "auto", "--learning-rate-multiplier", "0.5"]
        options += ["--rank", "8", "--targets", "q,v", "--metadata", "team=a=b", "--set", "training.packing=false"]
        plan = json.loads(said(uora, "jobs", "create", *options, "--dry-run", "--json"))
        assert plan["object"] == "fine_tuning.job.plan"
        assert listed(uora, "jobs", "list") == []

        job_id = said(uora, "jobs", "create", *options, "--seed", "7").strip()
        with service.sessions() as session:
            job = session.query(Job).filter_by(id=job_id).one()
        assert (job.seed, job.suffix, job.labels) == (7, "tone", {"team": "a=b"})
        assert job.hyperparameters == {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": 0.5}
        assert (job.adapter["r"], job.adapter["targets"], job.options["packing"]) == (8, "q,v", False)
        assert job.training_file == job.validation_file  # uploaded once
        assert [found["id"] for found in listed(uora, "jobs", "list", "--metadata", "team=a=b")] == [job_id]
        assert listed(uora, "jobs", "list", "--metadata", "team=") == []
        assert job_id in said(uora, "jobs", "get", job_id)

    def test_moves(self, uora: Run, service: Service) -> None:
        job_id = new_job(service, status=JobStatus.QUEUED)
        for move, status in (("pause", "paused"), ("resume", "queued"), ("cancel", "cancelled")):
            assert json.loads(said(uora, "jobs", move, job_id, "--json"))["status"] == status
        again = said(uora, "jobs", "retry", job_id).strip()
        wider = said(uora, "jobs", "clone", job_id, "--set", "peft.r=16", "--set", "suffix=wider").strip()
        compared = json.loads(said(uora, "jobs", "compare", again, wider, "--json"))
        assert compared["differences"]["peft.r"] == {again: 8, wider: 16}
        table = said(uora, "jobs", "compare", again, wider)
        assert [line.split() for line in table.splitlines() if line.strip().startswith("peft.r")] == [
            ["peft.r", "8", "16"]
        ]
        said(uora, "jobs", "delete", job_id)
        assert {job["id"] for job in listed(uora, "jobs", "list")} == {again, wider}

    def test_events_and_checkpoints(self, uora: Run, service: Service) -> None:
        job_id = new_job(service, status=JobStatus.SUCCEEDED)
        with service.sessions.begin() as session:
            job = session.query(Job).filter_by(id=job_id).one()
            job.fine_tuned_model = add_adapter(session, service.tenant, job).id
            for step, loss in ((5, 0.5), (10, 0.75)):
                add_adapter(session, service.tenant, job, step=step, valid_loss=loss)
            for number in range(120):
                add_event(session, job_id, message=f"event {number}")
        assert [event["message"] for event in listed(uora, "jobs", "events", job_id, "--limit", "110")] == [
            f"event {number}" for number in reversed(range(10, 120))
        ]
        assert "event 119" in said(uora, "jobs", "events", job_id)
        assert [found["step_number"] for found in listed(uora, "jobs", "checkpoints", job_id)] == [10, 5]
        done = uora("jobs", "promote", job_id)
        assert "answers as of step 5" in done.stderr

    def test_an_estimate(self, uora: Run, service: Service, rows: Path) -> None:
        file_id = said(uora, "files", "upload", str(rows)).strip()
        bad = uora("jobs", "estimate", "--model", "nobody", "--training-file", file_id)
        assert (bad.exit_code, "model_not_found" in bad.stderr) == (1, True)


class TestModels:
    def test_from_list_to_delete(self, uora: Run, service: Service, tmp_path: Path) -> None:
        with service.sessions.begin() as session:
            job = add_job(session, service.tenant, status=JobStatus.SUCCEEDED, model="org/slashed")
            name = add_adapter(session, service.tenant, job).id
        assert [model["id"] for model in listed(uora, "models", "list")] == [name, "tiny", "org/slashed"]
        assert name in said(uora, "models", "list")
        assert "org/slashed" in said(uora, "models", "get", name)
        out = tmp_path / "adapter.safetensors"
        said(uora, "models", "export", name, "--out", str(out))
        with service.sessions() as session:
            assert out.read_bytes() == session.query(Adapter).filter_by(id=name).one().artifact
        refused = uora("models", "import", str(out), "--base-model", "tiny")
        assert (refused.exit_code, "Expected an adapter of this service" in refused.stderr) == (1, True)
        said(uora, "models", "delete", name)
        assert name not in said(uora, "models", "list")


class TestChat:
    def test_one_question(self, uora: Run, service: Service) -> None:
        assert said(uora, "chat", "tiny", "hi", "--system", "Be brief.", "--max-tokens", "5") == "Hello\n"
        (asked,) = service.engine.requests
        assert [message["content"] for message in asked["messages"]] == ["Be brief.", "hi"]

    def test_a_question_from_a_pipe(self, uora: Run, service: Service) -> None:
        done = uora("chat", "tiny", input="what\nnow\n")
        assert done.stdout == "Hello\n"
        assert service.engine.requests[0]["messages"] == [{"role": "user", "content": "what\nnow"}]
        assert uora("chat", "tiny", input="").exit_code == 1

    def test_the_base_model_beside_it(self, uora: Run, service: Service) -> None:
        with service.sessions.begin() as session:
            name = add_adapter(session, service.tenant, add_job(session, service.tenant)).id
        heads, answers = (
            line for line in said(uora, "chat", name, "hi", "--compare-base").splitlines() if line[0] in "┃│"
        )
        assert [cell.strip() for cell in heads.strip("┃").split("┃")] == [name, "tiny"]
        assert [cell.strip() for cell in answers.strip("│").split("│")] == ["Hello", "Hello"]
        assert "is a base model" in uora("chat", "tiny", "hi", "--compare-base").stderr

    def test_a_conversation(self, uora: Run, service: Service) -> None:
        """On a real terminal: each question has what was said before it, and Ctrl-D ends it."""
        ours, theirs = os.openpty()
        command = [sys.executable, "-m", "cli", "chat", "tiny"]
        process = subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        try:
            # Only the prompt is awaited: one read can bring the answer and the prompt after it.
            shown = b""
            for typed in (b"first\n", b"second\n", b"\x04"):
                shown += read_until(ours, b"> ")
                os.write(ours, typed)
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.wait()
            os.close(ours)
        assert shown.count(b"Hello") == 2
        _, last = service.engine.requests
        assert [message["content"] for message in last["messages"]] == ["first", "Hello", "second"]


class TestAdministration:
    def test_keys(self, uora: Run, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
        secret = said(uora, "keys", "create", "laptop", "--scope", "read", "--expires-in-days", "1").strip()
        (made,) = [key for key in listed(uora, "keys", "list") if key["name"] == "laptop"]
        assert made["scopes"] == ["read"]
        with monkeypatch.context() as patched:
            patched.setenv("UORA_API_KEY", secret)
            assert uora("jobs", "list").exit_code == 0
            assert uora("keys", "list").exit_code == 1
        assert said(uora, "keys", "rotate", made["id"]).strip() not in ("", secret)
        said(uora, "keys", "revoke", made["id"])
        assert made["id"] not in said(uora, "keys", "list")

    def test_projects_and_keys_of_the_organization(
        self, uora: Run, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert "organization" in uora("admin", "projects", "create", "x").stderr
        with service.sessions.begin() as session:
            project = session.query(Project).filter_by(id=service.tenant.project_id).one()
            monkeypatch.setenv("UORA_API_KEY", create_api_key(session, project, name="root", organization_wide=True))
        made = json.loads(said(uora, "admin", "projects", "create", "Lab", "--slug", f"lab-{project.slug}", "--json"))
        said(uora, "admin", "projects", "rename", made["id"], "Laboratory")
        assert "Laboratory" in said(uora, "admin", "projects", "list")
        assert "choose one with --project" in uora("keys", "create", "x").stderr
        assert said(uora, "keys", "create", "x", "--project", made["id"])
        assert said(uora, "keys", "create", "all", "--organization")
        (key,) = [key for key in listed(uora, "keys", "list", "--organization") if key["name"] == "all"]
        assert said(uora, "keys", "rotate", key["id"], "--organization")
        said(uora, "keys", "revoke", key["id"], "--organization")
        said(uora, "admin", "projects", "archive", made["id"])
        events = [entry["type"] for entry in listed(uora, "admin", "audit", "--project", made["id"])]
        assert events[::-1] == ["project.created", "project.updated", "api_key.created", "project.archived"]
        assert "project.archived" in said(
            uora, "admin", "audit", "--event", "project.archived", "--since", "2026-01-01"
        )

    def test_webhooks(self, uora: Run) -> None:
        secret = said(uora, "webhooks", "create", "ours", "https://example.com/hook").strip()
        assert secret.startswith("whsec_")
        (made,) = listed(uora, "webhooks", "list")
        assert len(made["event_types"]) == 3
        assert made["id"] in said(uora, "webhooks", "list")
        said(uora, "webhooks", "delete", made["id"])
        assert listed(uora, "webhooks", "list") == []


def answer_in_part(listener: socket.socket) -> None:
    """Answer one request with half of what is announced."""
    connection, _ = listener.accept()
    with connection:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf!")


class TestErrors:
    """One line on stderr, which says what to do; status 1."""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("jobs", "get", "ftjob-none"), "No such fine-tuning job: 'ftjob-none'. (job_not_found)"),
            (("jobs", "watch", "ftjob-none"), "No such fine-tuning job"),
            (("files", "get", "../jobs"), "Unknown URL GET /v1/files/../jobs"),
            (("models", "delete", "tiny"), "tiny"),
            (("chat", "nobody", "hi"), "model_not_found"),
            (("jobs", "clone", "ftjob-none", "--set", "seed"), "--set 'seed': expected KEY=VALUE"),
            (("jobs", "clone", "x", "--set", "a=1", "--set", "a.b=1"), "a is a value, which nothing is below"),
            (("webhooks", "create", "ours", "ftp://x"), "url"),
        ],
    )
    def test_of_the_service_and_of_arguments(self, uora: Run, arguments: tuple[str, ...], message: str) -> None:
        failed = uora(*arguments)
        assert failed.exit_code == 1, failed.output
        assert (failed.stdout, failed.stderr.count("\n")) == ("", 1)
        assert failed.stderr.startswith("Error: ")
        assert message in failed.stderr

    def test_without_a_login(self, bare: Run) -> None:
        failed = bare("jobs", "list")
        assert (failed.exit_code, "run `uora login`" in failed.stderr) == (1, True)

    def test_without_a_service(self, uora: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{taken.getsockname()[1]}"
            monkeypatch.setenv("UORA_BASE_URL", url)
            failed = uora("jobs", "list")
        assert failed.exit_code == 1
        assert failed.stderr.startswith(f"Error: No service answers on {url}: start one with `uora up`")

    def test_a_download_that_breaks_off_leaves_no_file(self, uora: Run, service: Service, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            thread = threading.Thread(target=answer_in_part, args=(listener,))
            thread.start()
            options = ["--out", str(tmp_path / "model.zip")]
            failed = CliRunner().invoke(
                app,
                ["models", "export", "ft:x", *options],
                env={"UORA_BASE_URL": f"http://127.0.0.1:{listener.getsockname()[1]}"},
            )
            thread.join()
        assert failed.exit_code == 1
        assert failed.stderr.startswith("Error: The answer broke off")
        assert [path.name for path in tmp_path.iterdir() if path.is_file()] == []

    def test_of_a_stream(self, uora: Run, service: Service) -> None:
        service.engine.lines = [service.engine.lines[0], {"type": "error", "code": "engine_fault", "message": "lost"}]
        failed = uora("chat", "tiny", "hi")
        assert (failed.exit_code, failed.stderr) == (1, "Error: lost\n")


def test_it_starts_without_what_it_does_not_need() -> None:
    """In a process of its own: neither torch nor the service's own code is read for a list of jobs."""
    script = (
        "import sys, cli.main\n"
        "from cli.client import make_client\n"
        "from cli.profiles import Profile\n"
        "assert 'openai' not in sys.modules\n"
        "make_client(Profile('http://127.0.0.1:1/v1', 'x')).fine_tuning.jobs\n"
        "heavy = {'torch', 'transformers', 'numpy', 'sqlalchemy', 'fastapi', 'api', 'worker', 'uora.cli'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_offline_commands_are_those_of_the_core(bare: Run) -> None:
    listed_in_help = bare("--help").stdout
    for name in ("validate", "methods", "export", "up"):
        assert f" {name} " in listed_in_help
    help_of_core = CliRunner().invoke(core, ["validate", "--help"]).stdout
    assert bare("validate", "--help").stdout.splitlines()[4:] == help_of_core.splitlines()[4:]


def test_up_is_the_launcher_of_the_service(config: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "cli", "up", "--port", str(port)]
        environment = os.environ | {"UORA_HOME": str(tmp_path)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"Port {port} on 127.0.0.1 is taken" in done.stderr
