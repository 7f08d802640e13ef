"""Every page, as it is looked at: in light and dark, on a phone, with a keyboard, and under its own policy."""

from __future__ import annotations

import re

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import BrowserContext, Page, expect

from tests.dashboard.conftest import LAPTOP, PHONE, Dashboard

#: A part of each page that is there once its data is.
PAGES = {
    "sign-in": "#key",
    "jobs": "#jobs tr",
    "jobs/new": "#model option",
    "jobs/{job}": "#checkpoints tr",
    "playground": ".answer select",
    "models": ".model",
    "usage": "#quotas tr",
    "keys": "#keys tr",
    "jobs/none": "h1",  # an error
}

#: Lowest and highest losses.
RANGES = [[0.000104887, 4.08], [0.1048, 3.4], [3.4, 6.0], [1e-7, 2.0], [0.5, 0.5]]


def visit(page: Page, dashboard: Dashboard, name: str) -> None:
    """Open a page and wait until it shows what it has."""
    page.goto(f"{dashboard.url}/dashboard/{name.format(job=dashboard.job_id)}")
    expect(page.locator(PAGES[name]).first).to_be_attached()


@pytest.fixture
def forgiving(complaints: list[str]) -> list[str]:
    """The page of an error is one: the browser says so."""
    yield complaints
    complaints[:] = [said for said in complaints if "status of 404" not in said]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_page_has_a_serious_barrier(
    page: Page, signed_in: Page, dashboard: Dashboard, forgiving: list[str], theme: str
) -> None:
    page.emulate_media(color_scheme=theme)
    found = []
    for name in PAGES:
        visit(page, dashboard, name)
        assert page.evaluate("document.documentElement.scrollWidth") <= LAPTOP["width"], name
        for details in page.locator("details").all():
            details.evaluate("found => { found.open = true; }")
        for violation in Axe().run(page).response["violations"]:
            if violation["impact"] in ("serious", "critical"):
                found += [(name, violation["id"], node["html"], node["failureSummary"]) for node in violation["nodes"]]
    assert found == []


def test_a_phone_shows_all_of_it_without_scrolling_sideways(
    page: Page, signed_in: Page, dashboard: Dashboard, forgiving: list[str]
) -> None:
    page.set_viewport_size(PHONE)
    for name in PAGES:
        visit(page, dashboard, name)
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= PHONE["width"], name
    visit(page, dashboard, "jobs")
    for link in ("Jobs", "Playground", "Models", "Usage", "Keys"):
        expect(page.get_by_role("link", name=link, exact=True)).to_be_in_viewport()


def test_the_theme_is_chosen_and_kept(signed_in: Page, dashboard: Dashboard) -> None:
    page = signed_in
    page.emulate_media(color_scheme="light")

    def background() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    light = background()
    button = page.get_by_role("button", name="Colours")
    button.click()
    assert background() == light
    button.click()
    dark = background()
    assert dark != light
    page.reload()
    assert background() == dark


def test_the_keyboard_reaches_everything_and_shows_where_it_is(signed_in: Page, dashboard: Dashboard) -> None:
    page = signed_in
    visit(page, dashboard, "jobs")
    seen: list[str] = []
    while "first" not in seen and len(seen) < 60:
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.innerText || ''"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", seen
    assert seen[0] == "Skip to the content"
    assert {"Jobs", "Models", "theme", "Sign out", "New job", "search", "status"} <= set(seen), seen
    visit(page, dashboard, "jobs/{job}")
    page.get_by_role("button", name="Delete").press("Enter")
    expect(page.get_by_role("button", name="No, go back")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)


def test_usage_is_told_by_model_key_and_operation(signed_in: Page, dashboard: Dashboard) -> None:
    page = signed_in
    visit(page, dashboard, "usage")
    trained = page.locator("#totals tr", has_text="tiny").first
    expect(trained).to_contain_text(" s")  # the seconds of the first job's training
    page.locator("select[name=amount]").select_option("trained_tokens")
    expect(page.locator("#chart canvas")).to_be_visible()
    expect(page.locator("#chart")).to_have_attribute("aria-label", re.compile(r"^Trained tokens: [1-9]"))
    page.locator("select[name=group]").select_option("operation")
    expect(page.locator("#totals tbody tr", has_text="training")).to_have_count(1)
    page.locator("select[name=group]").select_option("api_key_id")
    expect(page.locator("#totals tbody tr")).to_have_count(1)
    expect(page.locator("#totals tbody tr")).not_to_contain_text("key_")  # its name instead
    with page.expect_download() as saved:
        page.get_by_role("link", name="CSV").click()
    assert saved.value.path().read_text().startswith("start_time,end_time,api_key_id,model,operation,")


def test_nothing_that_is_written_into_a_page_runs(signed_in: Page, dashboard: Dashboard, complaints: list[str]) -> None:
    page = signed_in
    made = dashboard.start_long_job(metadata={"name": "<img src=x onerror=alert(1)>"})
    expect(page.locator("#jobs")).to_contain_text("<img src=x")
    dashboard.client.fine_tuning.jobs.cancel(made)
    ran = page.evaluate(
        """() => {
          const script = document.createElement("script");
          script.textContent = "window.ran = true";
          document.head.append(script);
          document.body.insertAdjacentHTML("beforeend", '<p style="color: red" onclick="window.ran = true">x</p>');
          document.body.lastElementChild.click();
          return [window.ran, getComputedStyle(document.body.lastElementChild).color];
        }"""
    )
    assert ran[0] is None
    assert ran[1] != "rgb(255, 0, 0)"
    refused = [said for said in complaints if "Content Security Policy" in said]
    assert len(refused) >= 3
    complaints[:] = [said for said in complaints if said not in refused]


def test_signing_out_and_a_lost_session_lead_to_the_form(
    signed_in: Page, dashboard: Dashboard, context: BrowserContext, complaints: list[str]
) -> None:
    page = signed_in
    context.clear_cookies()
    page.wait_for_url("**/dashboard/sign-in?next=%2Fdashboard%2Fjobs")  # the list looks for new jobs
    page.get_by_label("API key").fill(dashboard.key)
    page.get_by_label("API key").press("Enter")
    page.wait_for_url("**/dashboard/jobs")
    page.get_by_role("button", name="Sign out").click()
    page.wait_for_url("**/dashboard/sign-in")
    page.goto(f"{dashboard.url}/dashboard/models")
    assert page.url.endswith("/dashboard/sign-in?next=%2Fdashboard%2Fmodels")
    complaints[:] = [said for said in complaints if "status of 401" not in said]


def test_a_log_scale_takes_losses_of_any_size(signed_in: Page, dashboard: Dashboard) -> None:
    """uPlot's own ticks of a log scale have no end for some ranges that begin between two magnitudes."""
    visit(signed_in, dashboard, "jobs/{job}")
    heights = signed_in.evaluate(
        """async (ranges) => {
          const module = new URL("../lib/chart.js", document.querySelector("script[type=module]").src);
          const { LossChart } = await import(module);
          const [holder, legend] = [document.createElement("div"), document.createElement("ul")];
          document.body.append(holder, legend);
          const chart = new LossChart(holder, legend, {});
          chart.log = true;
          const heights = [];
          for (const [number, [low, high]] of ranges.entries()) {
            chart.show([{ id: String(number), name: "", train: [[1, high], [2, 0], [3, low]], valid: [] }]);
            await new Promise((drawn) => setTimeout(drawn, 50));
            heights.push(holder.querySelector(".uplot").offsetHeight);
          }
          return heights;
        }""",
        RANGES,
    )
    assert heights == [320] * len(RANGES)
