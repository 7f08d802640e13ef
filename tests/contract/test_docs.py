"""The scripts and commands of docs/webhooks.md, docs/usage.md and docs/keys.md are run as they stand."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from tests.api.support import ROOT, Service, wait_until


def scripts_of(page: str, language: str = "python") -> list[str]:
    """What is marked as Python in it, or as something else."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / page).read_text(), flags=re.DOTALL)


MAKE, RECEIVE = scripts_of("webhooks.md")
USAGE, RATE_LIMITS = scripts_of("usage.md")


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


RUN_HERE = {"webhooks.md", "usage.md", "keys.md"}
#: Pages whose commands no test runs, and why.
NOT_RUN = {
    "api.md": "made by scripts/api_reference.py from what scripts/record_examples.py did to a running service",
    "dashboard.md": "the command makes the page's pictures anew",
    "results.md": "the commands of the study, hours in all",
}


def test_every_page_with_commands_has_a_test() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__))
    for page in (ROOT / "docs").glob("*.md"):
        commands = re.findall(r"^```(?:sh|bash|python|py)$", page.read_text(), flags=re.MULTILINE)
        if commands and page.name not in {*NOT_RUN, *RUN_HERE}:
            assert f'"{page.name}"' in sources, f"no test runs the commands of docs/{page.name}"


def test_the_receiver_takes_what_the_endpoint_is_sent(
    service: Service,
    client: OpenAI,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", f"{service.url}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", service.tenant.key)
    names: dict[str, Any] = {}
    exec(MAKE, names)  # noqa: S102 - the page's own script
    endpoint = names["endpoint"]
    assert capsys.readouterr().out.strip() == endpoint.signing_secret

    port = free_port()
    client.webhooks.update(endpoint.id, url=f"http://127.0.0.1:{port}/hook")
    (tmp_path / "receiver.py").write_text(RECEIVE)
    environment = os.environ | {"PORT": str(port), "OPENAI_WEBHOOK_SECRET": endpoint.signing_secret}
    with (tmp_path / "said").open("w") as said:
        receiver = subprocess.Popen(
            [sys.executable, "receiver.py"], cwd=tmp_path, env=environment, stdout=said, stderr=said
        )
        try:
            wait_until(lambda: status_of(client, endpoint.id) == 204)
            client.webhooks.rotate_secret(endpoint.id)
            assert status_of(client, endpoint.id) == 401
        finally:
            receiver.terminate()
            receiver.wait(timeout=10)
    assert "fine_tuning.job.succeeded ftjob-sample\n" in (tmp_path / "said").read_text()


def test_usage_is_read_and_quotas_are_changed(
    service: Service, client: OpenAI, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", f"{service.url}/v1")
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(name, service.tenant.key)
    client.completions.create(model="tiny", prompt="x")
    wait_until(lambda: client.get("/usage", cast_to=httpx.Response).json()["data"][-1]["results"] != [])
    names: dict[str, Any] = {}
    exec(USAGE, names)  # noqa: S102 - the page's own script
    assert capsys.readouterr().out.split()[1:] == ["tiny", "1", "7", "2"]
    exec(RATE_LIMITS, names)  # noqa: S102 - the page's own script
    assert capsys.readouterr().out.split() == ["rl-all-models", "0", "0"]
    found = next(iter(names["limits"].list_rate_limits(service.tenant.project_id)))
    assert (found.max_requests_per_1_minute, found.max_tokens_per_1_minute) == (600, 0)


def test_each_command_is_answered(service: Service) -> None:
    environment = {
        "PATH": os.environ["PATH"],
        "BASE": f"{service.url}/v1",
        "KEY": service.tenant.key,
        "PROJECT": service.tenant.project_id,
    }
    said = []
    for command in [*scripts_of("keys.md", "sh"), *scripts_of("usage.md", "sh")]:
        script = command.replace("curl -s", "curl --fail-with-body --show-error -s")
        done = subprocess.run(["/bin/sh", "-ec", script], env=environment, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stdout + done.stderr
        said.append(json.loads(done.stdout))
    key, usage, quotas = said
    assert (key["name"], set(key["scopes"])) == ("laptop", {"read", "infer"})
    assert usage["object"] == "page"
    assert (quotas["jobs_running"], quotas["bytes_stored"]) == (2, 10_000_000_000)


def status_of(client: OpenAI, endpoint_id: str) -> int | None:
    """What the receiver answers; None while it starts."""
    try:
        return client.webhooks.test(endpoint_id, event_type="fine_tuning.job.succeeded").status_code
    except openai.BadRequestError:
        return None
