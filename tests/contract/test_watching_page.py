"""The commands of docs/watching.md are run as they stand, but for their waits."""

from __future__ import annotations

import json
import os
import re
import subprocess

import pytest

from api.jobs.models import JobStatus
from api.jobs.repository import add_event
from tests.api.rows import add_file, add_job
from tests.api.support import ROOT, Service
from uora.spec import UoraSpec

PAGE = (ROOT / "docs" / "watching.md").read_text()
BLOCKS = [block for block in re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL) if "curl" in block]


@pytest.fixture
def environment(service: Service) -> dict[str, str]:
    """What the page exports, of jobs that have ended: streams end too."""
    with service.sessions.begin() as session:
        values = {
            "training_file": add_file(session, service.tenant).id,
            "adapter": UoraSpec(r=8).model_dump(mode="json"),
            "status": JobStatus.SUCCEEDED,
        }
        jobs = [add_job(session, service.tenant, **values).id for _ in range(2)]
        event = add_event(session, jobs[0], message="first").id
    names = {"URL": f"{service.url}/v1", "KEY": service.tenant.key, "JOB": jobs[0], "JOB2": jobs[1], "EVENT": event}
    return {"PATH": os.environ["PATH"], "TAG": '"none"', **names}


def run(block: str, environment: dict[str, str]) -> str:
    script = block.replace("wait=60", "wait=0.1").replace("curl -s", "curl -sS --fail-with-body -s")
    done = subprocess.run(
        ["/bin/bash", "-euo", "pipefail", "-c", script], env=environment, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_has_its_commands() -> None:
    assert len(BLOCKS) == 6


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_each_command_is_answered(environment: dict[str, str], block: str) -> None:
    assert run(block, environment)


def test_a_tag_that_was_cut_out_gives_304(environment: dict[str, str]) -> None:
    (block,) = [block for block in BLOCKS if "TAG=$(" in block]
    assert run(block, environment).startswith("HTTP/1.1 304")


def test_a_stream_tells_the_end(environment: dict[str, str]) -> None:
    (block,) = [block for block in BLOCKS if "curl -sN" in block]
    *_, kind, data = run(block, environment).strip().splitlines()
    assert (kind, json.loads(data.removeprefix("data: "))["status"]) == ("event: end", "succeeded")
