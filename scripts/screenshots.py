"""The pictures of docs/dashboard.md: ``python -m scripts.screenshots``.

Starts the service with a database of its own and a base model small enough for a minute, trains three jobs, and takes a
picture of each page in Chromium. ``--real`` takes SmolLM2-135M-Instruct and movie reviews instead, in some minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import openai
from playwright.sync_api import Page, sync_playwright

from scripts.demo import MODEL
from scripts.demo_data import SYSTEM, load_split
from tests.e2e.support import service, upload, wait_for, wait_job
from tests.tiny import make_tiny_llama
from worker.up import ROOT

PICTURES = ROOT / "docs" / "images"
BROWSER = os.environ.get("UORA_TEST_BROWSER", "/usr/bin/chromium")
LAPTOP = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}


@dataclass(frozen=True)
class Scene:
    """What is in the pictures."""

    base_model: str
    source: str
    train: Path
    validation: Path
    system: str
    prompt: str
    #: Epochs of the jobs that end, and of the one that is still trained.
    epochs: tuple[int, int]
    batch_size: int
    eval_steps: int


def main() -> None:
    """Take all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="SmolLM2-135M-Instruct on movie reviews")
    arguments = parser.parse_args()
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        scene = real_scene(home) if arguments.real else tiny_scene(home)
        options = {} if arguments.real else {"UORA_CACHE_DIR": str(home / "cache"), "UORA_DTYPE": "float32"}
        options |= {"UORA_COTRAIN_JOBS": "1"}
        with service(home / "service", {scene.base_model: scene.source}, **options) as running:
            client = running.client("acme")
            jobs = train(client, scene)
            photograph(running.url, client, scene, jobs)


def tiny_scene(home: Path) -> Scene:
    """Sums of small numbers, which the tiny model learns in part."""
    rows = [
        {"messages": [{"role": "user", "content": f"{a} + {b} ="}, {"role": "assistant", "content": str(a + b)}]}
        for a in range(12)
        for b in range(12)
    ]
    train, validation = home / "sums.jsonl", home / "sums-held-out.jsonl"
    for path, chosen in ((train, rows[::2] + rows[1::4]), (validation, rows[3::4])):
        path.write_text("".join(json.dumps(row) + "\n" for row in chosen))
    source = f"path:{make_tiny_llama(home / 'tiny', max_tokens=512)}"
    return Scene("tiny-llama", source, train, validation, "", "3 + 4 =", (12, 50), 4, 40)


def real_scene(home: Path) -> Scene:
    """The demo's reviews."""
    split = load_split(Path.home() / ".cache" / "uora", train=120, validation=24, held_out=20)
    train, validation = home / "reviews.jsonl", home / "reviews-held-out.jsonl"
    train.write_text("".join(review.row() + "\n" for review in split.train))
    validation.write_text("".join(review.row() + "\n" for review in split.validation))
    return Scene(MODEL, f"known:{MODEL}", train, validation, SYSTEM, split.held_out[0].text, (1, 3), 4, 10)


def train(client: openai.OpenAI, scene: Scene) -> list[str]:
    """Two jobs that have ended and one that runs, newest first."""
    train, validation = (upload(client, path.read_bytes(), path.name) for path in (scene.train, scene.validation))

    def start(suffix: str, epochs: int, **peft: object) -> str:
        return client.fine_tuning.jobs.create(
            model=scene.base_model,
            training_file=train,
            validation_file=validation,
            suffix=suffix,
            seed=1,
            metadata={"name": suffix},
            method={
                "type": "supervised",
                "supervised": {"hyperparameters": {"n_epochs": epochs, "batch_size": scene.batch_size}},
            },
            extra_body={"peft": peft, "training": {"eval_steps": scene.eval_steps}},
        ).id

    name = scene.train.stem
    done = [start(name, scene.epochs[0], r=16), start(f"{name}-lora", scene.epochs[0], method="lora", r=8)]
    for job in done:
        wait_job(client, job, seconds=900)
    return [start(f"{name}-wide", scene.epochs[1], r=64), *reversed(done)]


def photograph(url: str, client: openai.OpenAI, scene: Scene, jobs: Sequence[str]) -> None:
    """Sign in and take them."""
    running, lora, uora = jobs
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"]) as launched,
    ):
        page = launched.new_context(viewport=LAPTOP, color_scheme="light").new_page()
        page.goto(f"{url}/dashboard")
        take(page, "sign-in")
        page.get_by_label("API key").fill(client.api_key)
        page.keyboard.press("Enter")
        page.wait_for_url("**/dashboard/jobs")

        wait_job(client, running, until=("running",), seconds=900)
        page.goto(f"{url}/dashboard/jobs/{running}?with={uora}")
        page.wait_for_selector("#legend :text('validation') >> nth=1", timeout=600_000)
        # Not wait_for_function, whose eval the pages' policy forbids.
        wait_for(lambda: page.evaluate("document.querySelector('#bar').value > 30"), seconds=900)
        page.get_by_label("Smoothing").fill("0.6")
        take(page, "job")
        page.goto(f"{url}/dashboard/jobs")
        page.wait_for_selector("#jobs tr")
        take(page, "jobs")
        client.fine_tuning.jobs.cancel(running)

        page.goto(f"{url}/dashboard/jobs/new?from={uora}")
        page.wait_for_selector("#report dl")
        page.get_by_role("button", name="Estimate").click()
        page.wait_for_selector("#estimated dl")
        take(page, "new-job")
        page.goto(f"{url}/dashboard/playground")
        page.get_by_label("System message").fill(scene.system)
        page.get_by_label("Prompt").fill(scene.prompt)
        page.get_by_label("Tokens at most").fill("32")
        page.get_by_role("button", name="Ask all").click()
        page.wait_for_selector(".answer-foot:text('tokens') >> nth=1")
        take(page, "playground")
        page.goto(f"{url}/dashboard/models")
        page.locator("summary").first.click()
        take(page, "models")
        page.goto(f"{url}/dashboard/usage")
        page.wait_for_selector("#quotas tr")
        take(page, "usage")
        page.goto(f"{url}/dashboard/keys")
        page.wait_for_selector("#keys tr")
        take(page, "keys")

        page.emulate_media(color_scheme="dark")
        page.goto(f"{url}/dashboard/jobs/{lora}?with={uora}")
        page.wait_for_selector("#legend :text('validation') >> nth=1")
        page.get_by_label("Log scale").check()
        take(page, "dark")
        page.emulate_media(color_scheme="light")
        page.set_viewport_size(PHONE)
        page.reload()
        page.wait_for_selector("#checkpoints tr")
        take(page, "phone")


def take(page: Page, name: str) -> None:
    """One picture of what is in view, once nothing moves."""
    page.evaluate("scrollTo(0, 0); document.activeElement.blur()")
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)
    page.screenshot(path=PICTURES / f"dashboard-{name}.png")


if __name__ == "__main__":
    main()
