"""The dashboard over HTTP: sessions of browsers, what protects them, and the pages' headers. Pages in a real browser:
tests/dashboard."""

from __future__ import annotations

import re
import time
from urllib.parse import urljoin

import httpx
import pytest
from itsdangerous import TimestampSigner, URLSafeTimedSerializer

from api.browser_sessions import COOKIE, LIFETIME, BrowserSessions
from api.caller import CALLER_SECONDS
from api.projects.service import hash_key, new_api_key, revoke_api_key
from api.scopes import MEMBER_SCOPES, Scope
from tests.api.engine import TOKEN
from tests.api.rows import add_adapter, add_file, add_job
from tests.api.support import Service, wait_until

PAGES = ("/dashboard/jobs", "/dashboard/jobs/new", "/dashboard/playground", "/dashboard/models", "/dashboard/keys")
HTML = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


def browser(service: Service, **headers: str) -> httpx.Client:
    """A client that sends what a browser's address bar does, and no key."""
    client = service.http(follow_redirects=False)
    client.headers.pop("authorization")
    client.headers.update(HTML | headers)
    return client


def sign_in(service: Service, key: str | None = None) -> httpx.Client:
    """A browser with a session."""
    client = browser(service)
    answer = client.post("/dashboard/sign-in", data={"key": key or service.tenant.key})
    assert answer.status_code == 303, answer.text
    return client


def token_of(page: httpx.Response) -> str:
    """What a page's own scripts send."""
    found = re.search(r'<meta name="csrf-token" content="(\w+)">', page.text)
    assert found, page.text
    return found[1]


def test_a_key_begins_a_session_that_scripts_cannot_read(service: Service) -> None:
    answer = browser(service).post("/dashboard/sign-in", data={"key": f" {service.tenant.key} "})
    assert answer.headers["location"] == "/dashboard/jobs"
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith(f"{COOKIE}=")
    attributes = {part.strip().lower() for part in cookie.split(";")}
    assert attributes >= {"httponly", "samesite=lax", "path=/", f"max-age={int(LIFETIME.total_seconds())}"}
    assert "secure" not in attributes  # over http, where it would never be sent
    assert service.tenant.key not in cookie


def test_over_https_the_cookie_stays_there(service: Service) -> None:
    over_https = browser(service, **{"X-Forwarded-Proto": "https"})
    answer = over_https.post("/dashboard/sign-in", data={"key": service.tenant.key})
    assert "; Secure" in answer.headers["set-cookie"]


@pytest.mark.parametrize("key", ["", "sk-uora-unknown", "é"])
def test_another_key_begins_none(service: Service, key: str) -> None:
    answer = browser(service).post("/dashboard/sign-in", data={"key": key, "next": "/dashboard/models"})
    assert answer.status_code == 401
    assert "set-cookie" not in answer.headers
    assert 'role="alert"' in answer.text
    assert 'value="/dashboard/models"' in answer.text  # kept for the next try


def test_a_key_that_may_not_read_is_told_so(service: Service) -> None:
    with service.sessions.begin() as session:
        _, key = new_api_key(session, service.tenant.project_id, name="infer", scopes=[Scope.INFER])
    answer = browser(service).post("/dashboard/sign-in", data={"key": key})
    assert answer.status_code == 403
    assert "Missing scopes: read" in answer.text


@pytest.mark.parametrize(
    ("wanted", "to"),
    [
        ("/dashboard/models?search=a", "/dashboard/models?search=a"),
        ("https://elsewhere.example/dashboard/", "/dashboard/jobs"),
        ("//elsewhere.example/dashboard/", "/dashboard/jobs"),
        ("/\\elsewhere.example", "/dashboard/jobs"),
        ("/dashboard/\\elsewhere.example", "/dashboard/jobs"),
        ("/dashboard/\r\nSet-Cookie: a=b", "/dashboard/jobs"),
        ("/dashboard.elsewhere.example", "/dashboard/jobs"),
        ("/v1/models", "/dashboard/jobs"),
        ("javascript:alert(1)", "/dashboard/jobs"),
        ("", "/dashboard/jobs"),
    ],
)
def test_signing_in_leads_to_a_page_of_the_dashboard_only(service: Service, wanted: str, to: str) -> None:
    answer = browser(service).post("/dashboard/sign-in", data={"key": service.tenant.key, "next": wanted})
    assert (answer.status_code, answer.headers["location"]) == (303, to)


def test_without_a_session_a_browser_is_led_to_sign_in_and_back(service: Service) -> None:
    answer = browser(service).get("/dashboard/models?search=a%26b")
    assert answer.status_code == 303
    assert answer.headers["location"] == "/dashboard/sign-in?next=%2Fdashboard%2Fmodels%3Fsearch%3Da%2526b"
    form = browser(service).get(answer.headers["location"])
    assert 'name="next" value="/dashboard/models?search=a%26b"' in form.text


def test_pages_and_the_api_take_the_cookie(service: Service) -> None:
    client = sign_in(service)
    for page in PAGES:
        assert client.get(page).status_code == 200
    assert client.get("/v1/models").json()["object"] == "list"
    assert client.get("/dashboard").headers["location"] == "/dashboard/jobs"
    assert client.get("/dashboard/").headers["location"] == "/dashboard/jobs"


def test_the_session_sees_its_own_project_only(service: Service) -> None:
    with service.sessions.begin() as session:
        job = add_job(session, service.tenant)
    own, foreign = sign_in(service), sign_in(service, service.stranger.key)
    assert own.get(f"/dashboard/jobs/{job.id}").status_code == 200
    page = foreign.get(f"/dashboard/jobs/{job.id}")
    assert (page.status_code, page.headers["content-type"]) == (404, "text/html; charset=utf-8")
    assert "No such fine-tuning job" in page.text
    assert foreign.get(f"/v1/fine_tuning/jobs/{job.id}").status_code == 404


def test_what_a_user_wrote_is_text_on_an_error_page(service: Service) -> None:
    page = sign_in(service).get("/dashboard/jobs/<script>alert(1)<script>")
    assert page.status_code == 404
    assert "<script>alert" not in page.text


def test_a_change_with_the_cookie_alone_is_refused(service: Service) -> None:
    client, other = sign_in(service), sign_in(service, service.stranger.key)
    with service.sessions.begin() as session:
        file = add_file(session, service.tenant)
    service.settings.storage_dir.joinpath(file.id).write_bytes(b"x")
    tokens = {"no": None, "another": "0" * 64, "a foreign": token_of(other.get("/dashboard/jobs")), "an odd": "é"}
    for name, token in tokens.items():
        headers = {} if token is None else {"X-CSRF-Token": token.encode()}
        answer = client.delete(f"/v1/files/{file.id}", headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "csrf_token_invalid"), name
    own = token_of(client.get("/dashboard/jobs"))
    assert client.delete(f"/v1/files/{file.id}", headers={"X-CSRF-Token": own}).json()["deleted"]


def test_a_key_wins_over_the_cookie_and_needs_no_token(service: Service) -> None:
    client = sign_in(service)
    with service.sessions.begin() as session:
        job = add_job(session, service.stranger)
    as_stranger = {"Authorization": f"Bearer {service.stranger.key}"}
    assert client.post(f"/v1/fine_tuning/jobs/{job.id}/cancel", headers=as_stranger).status_code == 200
    assert client.get("/v1/models", headers={"Authorization": "Bearer sk-uora-wrong"}).status_code == 401


def test_a_cookie_is_no_key_and_a_key_no_cookie(service: Service) -> None:
    client = sign_in(service)
    cookie = client.cookies[COOKIE]
    assert client.get("/v1/models").status_code == 200  # and is believed for a second
    for authorization in (f"Bearer {cookie}", cookie, f"None', '{cookie}", f"Bearer {hash_key(service.tenant.key)}"):
        answer = browser(service, Authorization=authorization).get("/v1/models")
        assert answer.status_code == 401, authorization
    for value in (
        service.tenant.key,
        f"Bearer {service.tenant.key}",
        hash_key(service.tenant.key),
        cookie[:-1],
        cookie[1:],
    ):
        answer = browser(service, Cookie=f"{COOKIE}={value}").get("/v1/models")
        assert answer.status_code == 401, value


def test_a_cookie_of_another_secret_is_refused(service: Service) -> None:
    forged = BrowserSessions("another secret").begin(service.tenant.key)
    assert browser(service, Cookie=f"{COOKIE}={forged}").get("/v1/models").status_code == 401


def test_a_session_ends_after_its_time(service: Service) -> None:
    def cookie(age: float) -> str:
        class Earlier(TimestampSigner):
            def get_timestamp(self) -> int:
                return int(time.time() - age)

        made = BrowserSessions(TOKEN)._serializer
        serializer = URLSafeTimedSerializer(TOKEN, salt=made.salt, signer=Earlier, signer_kwargs=made.signer_kwargs)
        return str(serializer.dumps(hash_key(service.tenant.key)))

    seconds = LIFETIME.total_seconds()
    assert browser(service, Cookie=f"{COOKIE}={cookie(seconds - 60)}").get("/v1/models").status_code == 200
    assert browser(service, Cookie=f"{COOKIE}={cookie(seconds + 60)}").get("/v1/models").status_code == 401


@pytest.mark.parametrize("end", ["revoked", "rotated"])
def test_the_session_ends_with_its_key(service: Service, end: str) -> None:
    with service.sessions.begin() as session:
        key, secret = new_api_key(session, service.tenant.project_id, name="laptop", scopes=MEMBER_SCOPES)
        key_id = key.id
    client = sign_in(service, secret)
    assert client.get("/dashboard/jobs").status_code == 200
    if end == "revoked":
        with service.sessions.begin() as session:
            assert revoke_api_key(session, secret)
    else:
        keys = f"/v1/organization/projects/{service.tenant.project_id}/api_keys"
        assert service.http().post(f"{keys}/{key_id}/rotate").status_code == 200
    wait_until(lambda: client.get("/dashboard/jobs").status_code == 303, seconds=CALLER_SECONDS + 5)
    assert client.get("/v1/models").status_code == 401


def test_signing_out_takes_the_cookie_away(service: Service) -> None:
    client = sign_in(service)
    answer = client.post("/dashboard/sign-out")
    assert answer.headers["location"] == "/dashboard/sign-in"
    assert COOKIE not in client.cookies
    assert client.get("/dashboard/jobs").status_code == 303


@pytest.mark.parametrize("path", ["/dashboard/sign-in", "/dashboard/sign-out"])
@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "http://elsewhere.example"},
        {"Origin": "null"},
    ],
)
def test_a_form_of_another_site_is_refused(service: Service, path: str, headers: dict[str, str]) -> None:
    answer = browser(service, **headers).post(path, data={"key": service.tenant.key})
    assert answer.status_code == 403
    assert "set-cookie" not in answer.headers


def test_pages_say_what_browsers_may_do(service: Service) -> None:
    client = sign_in(service)
    for path in (*PAGES, "/dashboard/sign-in", "/dashboard/jobs/none", "/dashboard"):
        headers = client.get(path).headers
        policy = {part.split()[0]: part.split()[1:] for part in headers["content-security-policy"].split(";")}
        assert policy["default-src"] == ["'self'"], path
        assert not any("unsafe" in source for sources in policy.values() for source in sources)
        assert policy["frame-ancestors"] == ["'none'"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"  # a page has the session's token


def test_pages_load_only_what_is_there(service: Service) -> None:
    client = sign_in(service)
    with service.sessions.begin() as session:
        job = f"/dashboard/jobs/{add_job(session, service.tenant).id}"
    loaded = "".join(client.get(page).text for page in (*PAGES, job))
    links = set(re.findall(r'(?:src|href)="(/dashboard/static/[^"]+)"', loaded))
    assert {link.rsplit("/", 1)[1] for link in links} >= {"style.css", "theme.js", "job.js", "uPlot.iife.min.js"}
    assert not re.search(r'(?:src|href)="(?!/dashboard|#)', loaded)  # nothing from elsewhere
    while links:
        link = links.pop()
        asset = client.get(link)
        assert asset.status_code == 200, link
        assert asset.headers["cache-control"] == "public, max-age=31536000, immutable"
        if link.endswith(".js") and "/vendor/" not in link:
            links |= {urljoin(link, name) for name in re.findall(r'from "(\.[^"]+)"', asset.text)}


@pytest.mark.parametrize("name", ["x/none.js", "x/../endpoints.py", "x/%2e%2e/endpoints.py", "x/", "", "x"])
def test_nothing_else_is_served(service: Service, name: str) -> None:
    assert browser(service).get(f"/dashboard/static/{name}").status_code == 404


def test_assets_of_another_version_are_not_kept(service: Service) -> None:
    asset = browser(service).get("/dashboard/static/0000/style.css")
    assert (asset.status_code, asset.headers["cache-control"]) == (200, "no-cache")


def test_the_page_of_keys_needs_admin(service: Service) -> None:
    with service.sessions.begin() as session:
        _, member = new_api_key(session, service.tenant.project_id, name="member", scopes=MEMBER_SCOPES)
    client = sign_in(service, member)
    assert 'href="/dashboard/keys"' not in client.get("/dashboard/jobs").text
    page = client.get("/dashboard/keys")
    assert page.status_code == 403
    assert "Missing scopes: admin" in page.text


def test_models_tell_their_size_and_digest(service: Service) -> None:
    with service.sessions.begin() as session:
        model = add_adapter(session, service.tenant, add_job(session, service.tenant))
        name, digest, size = model.id, model.digest, len(model.artifact)
    http = service.http()
    shown = {row["id"]: row for row in http.get("/v1/models").json()["data"]}
    assert (shown[name]["digest"], shown[name]["bytes"]) == (digest, size)
    assert http.get(f"/v1/models/{name}").json() == shown[name]
    assert (shown["tiny"]["digest"], shown["tiny"]["bytes"]) == (None, None)
