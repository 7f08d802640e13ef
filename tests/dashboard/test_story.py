"""What people do with the dashboard, in a real browser, on a live service that trains."""

from __future__ import annotations

import re
from pathlib import Path

from playwright.sync_api import Page, expect

from tests.dashboard.conftest import Dashboard
from tests.e2e.support import chat_rows, wait_for


def steps_done(page: Page) -> int:
    """The step that the curve of training losses has come to, as the plot tells screen readers."""
    told = page.locator("#chart").get_attribute("aria-label") or ""
    found = re.search(r"train loss of .* at step (\d+)", told)
    return int(found[1]) if found else 0


def drawn(page: Page) -> str:
    """The pixels of the plot."""
    return str(page.evaluate("document.querySelector('#chart canvas').toDataURL()"))


def test_a_job_from_an_uploaded_file_is_started_watched_and_cancelled(
    signed_in: Page, dashboard: Dashboard, tmp_path: Path
) -> None:
    page = signed_in
    file = tmp_path / "questions.jsonl"
    file.write_bytes(chat_rows([(f"How much is {n}?", "two") for n in range(64)]))
    page.get_by_role("link", name="New job").click()
    page.get_by_label("Upload a training file").set_input_files(file)
    report = page.locator("#report")
    expect(report).to_contain_text("64")
    expect(report).to_contain_text("jsonl, messages")
    page.get_by_label("Rank").fill("8")
    page.get_by_label("Name (suffix)").fill("watched")
    page.get_by_label("Epochs").fill("50")
    page.get_by_label("Batch size").fill("1")
    page.get_by_role("button", name="Estimate").click()
    expect(page.locator("#estimated")).to_contain_text("3,200")  # steps

    page.get_by_role("button", name="Start job").click()
    page.wait_for_url("**/dashboard/jobs/ftjob-*")
    expect(page.locator("#status")).to_contain_text("running", timeout=60_000)
    expect(page.locator("#legend")).to_contain_text("train", timeout=120_000)  # the trainer starts
    first, picture = steps_done(page), drawn(page)
    assert first > 0
    wait_for(lambda: steps_done(page) > first + 20, seconds=60)
    assert drawn(page) != picture  # without a reload
    expect(page.locator("#numbers")).to_contain_text(re.compile(r"Time left\s*\d+ (s|min)"))
    page.get_by_label("Log scale").check()
    page.get_by_label("Smoothing").fill("0.9")
    assert drawn(page) != picture

    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="No, go back").click()
    expect(page.locator("#status")).to_contain_text("running")
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Cancel the job").click()
    expect(page.locator("#status")).to_contain_text("cancelled", timeout=30_000)
    expect(page.get_by_role("button", name="Retry")).to_be_visible()
    expect(page.get_by_role("button", name="Pause")).to_have_count(0)
    job_id = page.url.rsplit("/", 1)[1]
    assert dashboard.client.fine_tuning.jobs.retrieve(job_id).status == "cancelled"

    page.get_by_label("Compare with").select_option(dashboard.job_id)
    expect(page.locator("#legend")).to_contain_text("first: validation")
    page.get_by_label("Level").select_option("all")
    expect(page.locator("#events")).to_contain_text("Step 1/3200")
    page.get_by_label("Level").select_option("error")
    expect(page.locator("#events")).to_have_text("None of this level.")


def test_jobs_are_listed_live_searched_and_filtered(signed_in: Page, dashboard: Dashboard) -> None:
    page = signed_in
    rows = page.locator("#jobs tbody tr")
    own = page.locator(f'tr[data-id="{dashboard.job_id}"]')
    expect(own).to_contain_text("succeeded")
    made = dashboard.start_long_job(metadata={"team": "zebras"})
    row = page.locator(f'tr[data-id="{made}"]')
    expect(row).to_be_visible()  # without a reload
    page.get_by_label("Search").fill("zebras")
    expect(rows).to_have_count(1)
    page.get_by_label("Status").select_option("succeeded")
    expect(rows).to_have_count(0)
    page.get_by_label("Status").select_option("cancelled")
    dashboard.client.fine_tuning.jobs.cancel(made)
    expect(row).to_contain_text("cancelled")
    page.get_by_label("Search").fill("no such job")
    expect(page.locator("#jobs")).to_contain_text("No job matches")


def test_models_answer_the_same_prompt_side_by_side(signed_in: Page, dashboard: Dashboard) -> None:
    page = signed_in
    page.get_by_role("link", name="Playground").click()
    expect(page.get_by_label("Model 1", exact=True).last).to_have_value("tiny")
    expect(page.get_by_label("Model 2", exact=True).last).to_have_value(dashboard.model)
    asked: list[dict[str, object]] = []
    page.on("request", lambda sent: asked.append(sent.post_data_json) if sent.method == "POST" else None)
    page.get_by_label("Tokens at most").fill("12")
    page.get_by_label("Prompt").fill("What is 3?")
    page.get_by_label("Prompt").press("Control+Enter")
    feet = page.locator(".answer-foot")
    for number in (0, 1):
        expect(feet.nth(number)).to_contain_text("tokens after")
    assert [body.pop("model") for body in asked] == ["tiny", dashboard.model]
    assert asked[0] == asked[1]
    assert asked[0]["stream"] is True
    greedy = dashboard.client.chat.completions.create(
        model=dashboard.model, messages=[{"role": "user", "content": "What is 3?"}], max_tokens=12, temperature=0
    )
    expect(page.get_by_role("region", name="Answer 2")).to_have_text(
        greedy.choices[0].message.content or "An empty answer."
    )

    page.get_by_label("Tokens at most").fill("400")
    page.get_by_role("button", name="Ask all").click()
    page.get_by_role("button", name="Stop").click()
    expect(feet.nth(0)).to_contain_text(re.compile("stopped|tokens after"))
    expect(page.get_by_role("button", name="Ask all")).to_be_enabled()


def test_what_is_wrong_stands_at_its_field(signed_in: Page, dashboard: Dashboard, complaints: list[str]) -> None:
    page = signed_in
    page.goto(f"{dashboard.url}/dashboard/jobs/new?from={dashboard.job_id}")
    expect(page.get_by_label("Epochs")).to_have_value("4")
    for label, value, words in (
        ("Rank", "many", "peft.r: found 'many'; expected a valid integer"),
        ("Rank", "9999", "less than or equal to 4096"),
        ("Epochs", "0", "greater than or equal to 1"),
        ("Warm-up", "2", "less than 1"),
    ):
        field = page.get_by_label(label)
        if not field.is_visible():
            page.get_by_text("More", exact=True).click()
        before = field.input_value()
        field.fill(value)
        page.get_by_role("button", name="Start job").click()
        expect(field).to_have_attribute("aria-invalid", "true")
        expect(field).to_be_focused()
        note = page.locator(f'[id="{field.get_attribute("aria-describedby")}"]')
        expect(note).to_contain_text(words)
        field.fill(before)
    page.get_by_role("button", name="Start job").click()
    page.wait_for_url("**/dashboard/jobs/ftjob-*")
    clone = dashboard.client.fine_tuning.jobs.retrieve(page.url.rsplit("/", 1)[1])
    assert clone.to_dict()["origin_job"] == dashboard.job_id
    dashboard.client.fine_tuning.jobs.cancel(clone.id)
    refused = [said for said in complaints if "status of 400" in said]
    assert len(refused) == 4
    complaints[:] = [said for said in complaints if said not in refused]


def test_a_checkpoint_is_used_a_model_taken_away_and_deleted(signed_in: Page, dashboard: Dashboard) -> None:
    page = signed_in
    page.goto(f"{dashboard.url}/dashboard/jobs/{dashboard.job_id}")
    checkpoints = page.locator("#checkpoints")
    expect(checkpoints.locator("tbody tr")).to_have_count(4)
    before = dashboard.client.models.retrieve(dashboard.model).to_dict()
    last = checkpoints.locator("tbody tr").last
    last.get_by_role("button", name="Use this one").click()
    page.get_by_role("dialog").get_by_role("button", name="Use this one").click()
    expect(last).to_contain_text("in use")
    after = dashboard.client.models.retrieve(dashboard.model).to_dict()
    assert after["digest"] != before["digest"]

    page.get_by_role("link", name="Models").click()
    card = page.get_by_role("region", name=dashboard.model)
    expect(card).to_contain_text(str(after["digest"]))
    for form, ending in (("Adapter", ".safetensors"), ("LoRA for PEFT", "-lora.zip")):
        with page.expect_download() as downloading:
            card.get_by_role("button", name=f"Export {dashboard.model}: {form}").click()
        assert downloading.value.suggested_filename.endswith(ending)
        assert downloading.value.path().stat().st_size > 1000
    card.get_by_text("Use it in a program").click()
    expect(card.locator("pre").first).to_contain_text(f'base_url="{dashboard.url}/v1"')
    expect(card.locator("pre").last).to_contain_text(dashboard.model)


def test_a_key_is_made_shown_once_and_revoked(signed_in: Page, dashboard: Dashboard) -> None:
    page = signed_in
    page.get_by_role("link", name="Keys").click()
    page.get_by_label("Name").fill("laptop")
    page.get_by_label("write").uncheck()
    page.get_by_role("button", name="Make key").click()
    secret = page.locator("#new-secret").inner_text()
    assert secret.startswith("sk-uora-")
    made = dashboard.client.with_options(api_key=secret)
    assert made.models.list().data
    page.reload()
    row = page.get_by_role("row", name="laptop")
    expect(row).to_contain_text("infer, read")
    expect(page.locator("main")).not_to_contain_text(secret)
    row.get_by_role("button", name="Revoke").click()
    page.get_by_role("dialog").get_by_role("button", name="Revoke").click()
    expect(row).to_have_count(0)
