"""The commands of docs/cli.md as they stand, and every call of the official client, against the running service."""

from __future__ import annotations

import re
import shlex
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from sqlalchemy.orm import Session
from typer.testing import CliRunner

from api.database import make_engine
from api.projects.service import create_api_key, create_project
from cli.client import make_client
from cli.main import app
from cli.profiles import Profile
from scripts import every_call
from tests.e2e.support import EMBEDDED, ENDED, Running, chat_rows, upload, wait_job
from worker.up import ROOT

BLOCKS = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "cli.md").read_text(), flags=re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]
#: What is no command against a running service: it starts one (tests/cli, and every other test of this folder).
NOT_RUN = {"uora up"}
ROWS = chat_rows([("up", "down"), ("left", "right")] * 8)

pytestmark = EMBEDDED


def client_of(running: Running, name: str, *, organization_wide: bool) -> openai.OpenAI:
    """The client with a key of a new project; the first start makes one for the whole organization."""
    with Session(make_engine(running.database_url)) as session, session.begin():
        project = create_project(session, name, slug=name)
        key = create_api_key(session, project, name=name, organization_wide=organization_wide)
    return make_client(Profile(f"{running.url}/v1", key))


@dataclass
class Reader:
    """Somebody who types the page's commands one after the other."""

    client: openai.OpenAI
    administrator: openai.OpenAI
    variables: dict[str, str]
    finished: str  # a job that succeeded
    long: str  # a job that goes on until it is cancelled

    def type(self, line: str) -> None:
        """Run a line; its command must succeed."""
        first, _, piped = line.rpartition(" | ")
        text = shlex.split(first)[1] if first else None
        arguments = shlex.split(string.Template(piped).substitute(self._variables(piped)))
        assert arguments[0] == "uora"
        # Projects are made by somebody who administers all of them.
        env = {"UORA_API_KEY": self.administrator.api_key} if line.startswith("uora admin projects") else {}
        done = CliRunner().invoke(app, arguments[1:], input=text, env=env)
        assert done.exit_code == 0, f"{line}\n{done.output}"
        if arguments[1:3] == ["files", "upload"]:
            self.variables["FILE"] = done.stdout.strip()
        if arguments[1:3] == ["files", "delete"]:
            self.variables["FILE"] = upload(self.client, ROWS)

    def _variables(self, line: str) -> dict[str, str]:
        """What the command can be used on."""
        found = dict(self.variables, JOB=self.finished, JOB2=self.long)
        match line.split()[1:3]:
            case ["jobs", "pause" | "resume" | "cancel"]:
                found["JOB"] = self.long
            case ["jobs", "retry" | "delete"]:
                found["JOB"] = wait_job(self.client, self.long).id
            case ["keys", _]:
                (project,) = self.client.admin.organization.projects.list()
                found["KEY_ID"] = self.client.admin.organization.projects.api_keys.list(project.id).data[0].id
            case ["admin", _]:
                found["PROJECT"] = self.administrator.admin.organization.projects.list(limit=1).data[0].id
            case ["webhooks", "delete"]:
                found["ENDPOINT"] = self.client.webhooks.list().data[0].id
            case ["validate", _]:
                found["BASE_MODEL"] = self.variables["BASE_MODEL_HERE"]
        return found


@pytest.fixture
def reader(
    running: Running, base_models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Reader]:
    for name in ("UORA_BASE_URL", "UORA_API_KEY", "UORA_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_bytes(ROWS)
    client = client_of(running, "typist", organization_wide=False)
    file_id = upload(client, ROWS)
    asked: dict[str, Any] = {"model": "tiny", "training_file": file_id, "extra_body": {"peft": {"r": 8}}}
    finished = client.fine_tuning.jobs.create(**asked, validation_file=file_id, hyperparameters={"n_epochs": 1})
    done = wait_job(client, finished.id)
    assert done.fine_tuned_model, done.error
    long = client.fine_tuning.jobs.create(**asked, hyperparameters={"n_epochs": 50, "batch_size": 1})
    variables = {
        "URL": running.url,
        "KEY": client.api_key,
        "BASE_MODEL": "tiny",
        "BASE_MODEL_HERE": base_models["tiny"],
        "MODEL": done.fine_tuned_model,
    }
    yield Reader(
        client, client_of(running, "root", organization_wide=True), variables, finished=finished.id, long=long.id
    )
    for job in client.fine_tuning.jobs.list():
        if job.status not in ENDED:
            client.fine_tuning.jobs.cancel(job.id)


def test_the_commands_of_the_page(reader: Reader) -> None:
    assert len(COMMANDS) > 40
    for line in COMMANDS:
        if line not in NOT_RUN:
            reader.type(line)


def test_every_call(running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    client = client_of(running, "caller", organization_wide=True)
    failures = every_call.run(client, base_model=None)
    printed = capsys.readouterr().out
    assert failures == 0, printed
    called = set(re.findall(r"^✓ ([\w.]+)", printed, flags=re.MULTILINE))
    assert called == every_call.public_calls(client)
    refused = set(
        re.findall(r"^✓ ([\w.]+): refused, as it must be \((?:no reinforcement|answers)", printed, flags=re.MULTILINE)
    )
    assert refused == every_call.NOT_OFFERED.keys()


def test_a_call_that_is_not_made_is_a_failure(
    running: Running, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = running.client("idle")
    monkeypatch.setattr(every_call, "STEPS", (every_call.use_uploads,))
    failures = every_call.run(client, base_model="tiny")
    missing = set(re.findall(r"^✗ ([\w.]+): was not called$", capsys.readouterr().out, flags=re.MULTILINE))
    assert len(missing) == failures
    assert missing == {name for name in every_call.public_calls(client) if not name.startswith("uploads.")}
    assert {"fine_tuning.jobs.list_events", "fine_tuning.checkpoints.permissions.delete"} <= missing
