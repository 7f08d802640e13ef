"""What the api must not do, read from the code itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from api.caller import Caller
from api.files.repository import FileRepository
from api.jobs.repository import JobRepository
from api.models.repository import AdapterRepository
from api.permissions.repository import PermissionRepository
from api.reports.repository import ReportRepository
from api.sweeps.repository import SweepRepository
from api.uploads.repository import UploadRepository
from api.webhooks.repository import EndpointRepository
from tests.api.support import ROOT

SOURCES = sorted((ROOT / "api").rglob("*.py"))


def test_the_api_runs_without_torch() -> None:
    """In a process of its own, since other tests import what the api must not."""
    script = (
        "import sys, api.main, api.embedded_broker\n"
        "heavy = {'torch', 'transformers', 'peft', 'accelerate', 'numpy', 'worker'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "services = [name for name in sys.modules if name.startswith('api.')]\n"
        "assert 'api.jobs.service' in services\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_the_worker_shares_runs_without_fastapi() -> None:
    script = (
        "import sys\n"
        "import api.jobs.repository, api.files.repository, api.models.repository, api.models.service\n"
        "import api.projects.service, api.storage, api.unit_of_work, api.queue\n"
        "assert 'fastapi' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_queries_are_in_repositories_and_commits_in_the_unit_of_work(path: Path) -> None:
    """A query elsewhere could forget the tenant, and a commit elsewhere would split a request's transaction."""
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    names = {call.id for call in calls if isinstance(call, ast.Name)}
    attributes = {call.attr for call in calls if isinstance(call, ast.Attribute)}
    if path.name != "repository.py":
        assert not names & {"select", "update", "delete", "insert"}
    if path.name != "unit_of_work.py":
        assert "commit" not in attributes


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_environment_is_read_in_the_settings_only(path: Path) -> None:
    """Except OpenTelemetry's own variables, which its SDK reads by itself."""
    used = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    assert path.name == "tracing.py" or not used & {"environ", "getenv"}


@pytest.mark.parametrize(
    "repository",
    [
        FileRepository,
        JobRepository,
        AdapterRepository,
        SweepRepository,
        PermissionRepository,
        EndpointRepository,
        ReportRepository,
        UploadRepository,
    ],
)
def test_a_repository_needs_a_project(repository: type[FileRepository]) -> None:
    with pytest.raises(TypeError):
        repository(None)  # type: ignore[arg-type, call-arg]
    with pytest.raises(ValueError, match="project id"):
        repository(None, "")  # type: ignore[arg-type]
    assert Caller(project_id="p", project_slug="s", key_id="k").project_id == "p"
