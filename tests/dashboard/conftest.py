"""The whole service with a tiny model, and a real browser before it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from tests.e2e.support import Running, chat_rows, service, upload, wait_job
from tests.tiny import make_tiny_llama

#: Without it these tests fail; scripts/browser.sh installs it.
BROWSER = os.environ.get("UORA_TEST_BROWSER", "/usr/bin/chromium")
LAPTOP = {"width": 1280, "height": 800}
PHONE = {"width": 360, "height": 740}
#: Of each step; the machine has other things to do.
PATIENCE_MS = 20_000


@dataclass(frozen=True)
class Dashboard:
    """A service with one project, whose first job has succeeded."""

    url: str
    key: str
    client: openai.OpenAI
    running: Running
    job_id: str
    model: str

    def start_long_job(self, **fields: object) -> str:
        """A job that ends only by being cancelled; its id."""
        return self.client.fine_tuning.jobs.create(
            model="tiny",
            training_file=self.client.files.list(purpose="fine-tune").data[0].id,
            method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 50, "batch_size": 1}}},
            **fields,  # type: ignore[arg-type]
        ).id


@pytest.fixture(scope="package")
def dashboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    home = tmp_path_factory.mktemp("dashboard")
    model = make_tiny_llama(home / "tiny", max_tokens=512)
    options = {"UORA_CACHE_DIR": str(home / "cache"), "UORA_DTYPE": "float32", "UORA_TORCH_THREADS": "1"}
    options |= {"UORA_SPARE_TRAINER": "false", "UORA_HEARTBEAT_INTERVAL": "PT0.5S"}
    with service(home / "service", {"tiny": f"path:{model}"}, **options) as running:
        client = running.client("acme")
        file = upload(client, chat_rows([(f"What is {n}?", "one") for n in range(16)]))
        job = client.fine_tuning.jobs.create(
            model="tiny",
            training_file=file,
            validation_file=file,
            suffix="first",
            method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 4, "batch_size": 4}}},
            extra_body={"peft": {"r": 8}},
        )
        job = wait_job(client, job.id)
        assert job.status == "succeeded", job.error
        assert job.fine_tuned_model is not None
        yield Dashboard(running.url, client.api_key, client, running, job.id, job.fine_tuned_model)


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    assert Path(BROWSER).exists(), f"NOT TESTED in a browser: there is none at {BROWSER}; run scripts/browser.sh"
    with (
        sync_playwright() as playwright,
        # Chromium's own sandbox refuses to run as root.
        playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"]) as launched,
    ):
        yield launched


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """A window of its own, whose cookies no other test has."""
    with browser.new_context(viewport=LAPTOP) as opened:
        opened.set_default_timeout(PATIENCE_MS)
        expect.set_options(timeout=PATIENCE_MS)
        yield opened


@pytest.fixture
def complaints() -> list[str]:
    """What the pages of the test wrote to the console as an error, or threw. It must be empty in the end."""
    return []


@pytest.fixture
def page(context: BrowserContext, complaints: list[str]) -> Iterator[Page]:
    opened = context.new_page()
    opened.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    yield opened
    assert complaints == []


@pytest.fixture
def signed_in(page: Page, dashboard: Dashboard) -> Page:
    """A page of a session."""
    sign_in(page, dashboard)
    return page


def sign_in(page: Page, dashboard: Dashboard) -> None:
    """As a user does: from the address of the dashboard, by keyboard."""
    page.goto(f"{dashboard.url}/dashboard")
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type(dashboard.key)
    page.keyboard.press("Enter")
    page.wait_for_url("**/dashboard/jobs")
