"""Who gets in, how, and with what cookie."""

import asyncio
import contextlib
import hmac
import re
from types import SimpleNamespace
from typing import Any

import pytest
from multidict import CIMultiDict

from dispatcher.domain import verify
from dispatcher.errors import BusyError
from dispatcher.store import access
from dispatcher.web import sessions
from dispatcher.web.limits import FAILURES_MAX, TRIALS_MAX, TRIALS_OF_ACCOUNT_MAX, Trials
from tests.web.conftest import Site, cookie_of, site

HTML = {"Accept": "text/html"}


async def test_a_browser_without_a_login_is_sent_to_log_in(web: Site):
    answer = await web.ask("GET", "/?a=1", headers=HTML)
    assert (answer.status, answer.headers["Location"]) == (303, "/login?next=/?a%3D1")


async def test_a_program_without_a_key_is_told(web: Site):
    answer = await web.ask("GET", "/", headers={"Accept": "application/json"})
    assert answer.status == 401
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json["code"] == "login_needed"


async def test_a_key_logs_in_with_a_cookie(web: Site):
    answer = await web.ask("POST", "/login", form={"key": await web.key(), "next": "/endpoints/7"})
    assert (answer.status, answer.headers["Location"]) == (303, "/endpoints/7")
    [cookie] = answer.cookies()
    assert re.fullmatch(r"webhooks_login=\d+\.\d+\.[\w-]{43}; Max-Age=4\d{4}; Path=/; HttpOnly; SameSite=Lax", cookie)
    assert (await web.ask("GET", "/", cookie=cookie_of(answer), headers=HTML)).status == 303


async def test_nobody_gets_in_with_what_is_no_key(web: Site):
    key = await web.key()
    for tried in ("", "whkey_", key[:-1], key + "A", "x" * 10_000, "whkey_\x00", "whkey_é"):
        answer = await web.ask("POST", "/login", form={"key": tried})
        assert (answer.status, answer.cookies()) == (401, []), tried[:50]


async def test_who_fails_too_often_must_wait(web: Site):
    """Also with the right key, where it is typed in: it is the address that waits. A program's key goes on, or others of its address, who behind
    a proxy that isn't trusted are everybody, could keep all from the API."""
    key = await web.key()
    for n in range(FAILURES_MAX):
        tried = {"key": "wrong"} if n % 2 else {}
        await (web.ask("POST", "/login", form=tried) if tried else web.ask("GET", "/api/v1/me", key="whkey_wrong"))
    answer = await web.ask("POST", "/login", form={"key": key}, headers=HTML)
    assert answer.status == 429
    assert 0 < int(answer.headers["Retry-After"]) <= 301
    assert (await web.ask("GET", "/api/v1/me", key="whkey_wrong")).status == 429
    assert (await web.ask("GET", "/api/v1/me", key=key)).status == 200
    assert (await web.ask("GET", "/api/v1/openapi.json")).status == 200, "what needs no login goes on"


async def test_a_revoked_key_ends_its_logins(web: Site):
    cookie, _ = await web.login(await web.key())
    assert (await web.ask("GET", "/api/v1/me", cookie=cookie)).status == 200
    await web.query("UPDATE webhook.api_key SET revoked_at = now()")
    assert (await web.ask("GET", "/api/v1/me", cookie=cookie)).status == 401


async def test_an_expired_key_is_none(web: Site):
    key = await web.key()
    await web.query("UPDATE webhook.api_key SET expires_at = now() - interval '1 s'")
    assert (await web.ask("GET", "/api/v1/me", key=key)).status == 401


async def test_a_key_is_not_in_the_database(web: Site):
    key = await web.key()
    [row] = await web.query(
        "SELECT k::text AS text, prefix, octet_length(hash) AS bytes, last_used_at FROM webhook.api_key AS k"
    )
    assert key not in row["text"]
    assert (row["prefix"], row["bytes"], row["last_used_at"]) == (key[:12], 32, None)
    await web.ask("GET", "/api/v1/me", key=key)
    assert (await web.query("SELECT last_used_at FROM webhook.api_key"))[0]["last_used_at"] is not None


async def test_logging_out_ends_the_login_for_good(web: Site):
    cookie, token = await web.login(await web.key())
    answer = await web.ask("POST", "/logout", cookie=cookie, form={"csrf_token": token})
    assert (answer.status, answer.headers["Location"]) == (303, "/login")
    assert answer.cookies()[0].startswith("webhooks_login=; Max-Age=0")
    assert (await web.ask("GET", "/api/v1/me", cookie=cookie)).status == 401, "also for who kept the cookie"


async def test_a_cookie_is_worth_nothing_unless_signed(web: Site):
    cookie, _ = await web.login(await web.key())
    name, _, value = cookie.partition("=")
    login_id, expires, mac = value.split(".")
    later = str(int(expires) + 1)
    other = await web.login(await web.key("acct"))
    others_id = other[0].partition("=")[2].split(".")[0]
    for forged in (
        f"{login_id}.{later}.{mac}", f"{others_id}.{expires}.{mac}", f"{login_id}.{expires}.{mac[:-1]}", f"{login_id}.{expires}.",
        f"-1.{expires}.{mac}", f"{login_id}.{expires}", "", "..", "a.b.c", "9" * 30 + f".{expires}.{mac}",
    ):  # fmt: skip
        assert (await web.ask("GET", "/api/v1/me", cookie=f"{name}={forged}")).status == 401, forged


async def test_a_login_is_over_at_its_time(web: Site):
    cookie, _ = await web.login(await web.key())
    await web.query("UPDATE webhook.login SET expires_at = now() - interval '1 s'")
    assert (await web.ask("GET", "/api/v1/me", cookie=cookie)).status == 401


async def test_a_planted_cookie_is_not_the_one_that_is_logged_in(web: Site):
    """Session fixation: whoever planted theirs in the victim's browser has nothing when the victim logs in, and the planted login is over."""
    planted, token = await web.login(await web.key("attacker"))
    answer = await web.ask("POST", "/login", cookie=planted, form={"key": await web.key("victim"), "csrf_token": token})
    assert answer.status == 303
    mine = cookie_of(answer)
    assert mine != planted
    assert (await web.ask("GET", "/api/v1/me", cookie=mine)).json["account_id"] == "victim"
    assert (await web.ask("GET", "/api/v1/me", cookie=planted)).status == 401


async def test_another_site_can_not_log_a_browser_in(web: Site):
    key = await web.key()
    for headers in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Origin": "null"}):
        assert (await web.ask("POST", "/login", form={"key": key}, headers=headers)).status == 403
    assert (await web.ask("POST", "/login", form={"key": key}, headers={"Origin": web.url})).status == 303


async def test_where_to_go_on_is_here(web: Site):
    for path in (
        "//evil.example",
        "https://evil.example",
        "/\\evil.example",
        "javascript:alert(1)",
        "/a\r\nb",
        "/" + "a" * 2_000,
        "é",
    ):
        answer = await web.ask("POST", "/login", form={"key": await web.key(), "next": path})
        assert answer.headers["Location"] == "/", path


# ── links ──


async def link(web: Site, **more: object) -> str:
    answer = await web.ask("POST", "/api/v1/portal-links", key=await web.key(), json={"account_id": "acct"} | more)
    assert answer.status == 201, answer.text
    assert answer.json["url"].startswith(web.url + "/enter/")
    return str(answer.json["url"]).removeprefix(web.url)


async def test_a_portal_link_lets_its_account_in_once(web: Site):
    path = await link(web)
    assert (await web.ask("HEAD", path)).status == 405, "a look ahead doesn't use it up"
    answer = await web.ask("GET", path + "?next=/endpoints/7", headers=HTML)
    assert (answer.status, answer.headers["Location"]) == (303, "/endpoints/7")
    me = (await web.ask("GET", "/api/v1/me", cookie=cookie_of(answer))).json
    assert (me["account_id"], me["is_operator"]) == ("acct", False)
    again = await web.ask("GET", path, headers=HTML)
    assert (again.status, again.cookies()) == (403, [])
    assert "used" in again.text


async def test_a_link_may_be_opened_several_times_but_not_for_ever(web: Site):
    path = await link(web, uses=2)
    assert [(await web.ask("GET", path)).status for _ in range(3)] == [303, 303, 403]
    path = await link(web)
    await web.query("UPDATE webhook.login_link SET expires_at = now()")
    assert (await web.ask("GET", path)).status == 403


async def test_a_revoked_link_ends_its_logins(web: Site):
    cookie = cookie_of(await web.ask("GET", await link(web)))
    [row] = await web.query("SELECT id FROM webhook.login_link")
    assert (await web.ask("DELETE", f"/api/v1/portal-links/{row['id']}", key=await web.key())).status == 200
    assert (await web.ask("GET", "/api/v1/me", cookie=cookie)).status == 401


async def test_two_who_open_a_link_at_once_are_not_both_let_in(web: Site):
    path = await link(web)
    answers = await asyncio.gather(*(web.ask("GET", path) for _ in range(4)))
    assert sorted(answer.status for answer in answers) == [303, 403, 403, 403]


# ── behind a proxy, and in a frame ──


async def test_cookies_and_paths_behind_a_proxy(dsn: str):
    async with site(dsn, public_url="https://hooks.example.com/panel") as web:
        answer = await web.ask(
            "POST", "/panel/login", form={"key": await web.key()}, headers={"Origin": "https://hooks.example.com"}
        )
        assert (answer.status, answer.headers["Location"]) == (303, "/panel/")
        [cookie] = answer.cookies()
        assert cookie.startswith("__Secure-webhooks_login=")
        assert cookie.endswith("; Path=/panel; HttpOnly; Secure; SameSite=Lax")
        page = await web.ask("GET", "/panel/api/v1/docs", cookie=cookie_of(answer))
        assert re.findall(r'(?:href|src|action)="(?!/panel/|#)', page.text) == []
        style = re.search(r'href="(/panel/static/[^"]+/base\.css)"', page.text)
        assert style is not None
        assert (await web.ask("GET", style[1])).headers["Cache-Control"] == "public, max-age=31536000, immutable"
        assert (await web.ask("GET", "/login")).status == 404
        made = await web.ask("POST", "/panel/api/v1/portal-links", key=await web.key(), json={"account_id": "a"})
        assert made.json["url"].startswith("https://hooks.example.com/panel/enter/")


async def test_a_proxy_that_strips_the_path(dsn: str):
    async with site(dsn, public_url="https://hooks.example.com/panel", web_base_path="") as web:
        answer = await web.ask("GET", "/login", headers=HTML)
        assert answer.status == 200
        assert 'action="/panel/login"' in answer.text


async def test_in_a_frame(dsn: str):
    async with site(dsn, public_url="https://hooks.example.com", frame_ancestors="https://app.example.com") as web:
        answer = await web.ask("POST", "/login", form={"key": await web.key()})
        assert answer.cookies()[0].startswith("__Host-webhooks_login=")
        assert answer.cookies()[0].endswith("; Path=/; HttpOnly; Secure; SameSite=None; Partitioned")
        assert "frame-ancestors https://app.example.com" in answer.headers["Content-Security-Policy"]
        assert "X-Frame-Options" not in answer.headers


async def test_headers_of_every_answer(web: Site):
    for path in (
        "/login",
        "/nothing",
        "/api/v1/me",
        "/api/v1/openapi.json",
        web.web.files.path("base.css"),
        "/static/a/b.css",
    ):
        headers = (await web.ask("GET", path)).headers
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert "unsafe" not in policy
        assert policy.endswith("frame-ancestors 'none'")
        assert (headers["X-Content-Type-Options"], headers["X-Frame-Options"]) == ("nosniff", "DENY")
        assert headers["Referrer-Policy"] == "same-origin"
        assert "Server" not in headers
        assert headers["Cache-Control"] == (
            "no-store" if "base.css" not in path else "public, max-age=31536000, immutable"
        )


async def test_a_trusted_proxy_says_who_it_is(dsn: str):
    async with site(dsn, web_trusted_proxies="127.0.0.1", web_login_header="X-User") as web:
        answer = await web.ask("GET", "/login?next=/a", headers={"X-User": "ada"})
        assert (answer.status, answer.headers["Location"]) == (303, "/a")
        cookie = cookie_of(answer)
        me = await web.ask("GET", "/api/v1/me", cookie=cookie, headers={"X-User": "ada"})
        assert me.json == {"actor": "proxy user ada", "account_id": None, "is_operator": True}
        for headers in ({}, {"X-User": "eve"}, {"X-User": ""}):
            assert (await web.ask("GET", "/api/v1/me", cookie=cookie, headers=headers)).status == 401, (
                "the proxy has another before it"
            )


async def test_nobody_else_says_who_they_are(dsn: str):
    async with site(dsn, web_trusted_proxies="10.0.0.0/8", web_login_header="X-User") as web:
        answer = await web.ask("GET", "/login", headers={"X-User": "ada"})
        assert (answer.status, answer.cookies()) == (200, [])


async def test_the_clients_address_is_the_proxys_word(dsn: str):
    async with site(dsn, web_trusted_proxies="127.0.0.1,10.0.0.0/8") as web:
        hops = {"X-Forwarded-For": "1.1.1.1, 192.0.2.7, 10.0.0.3"}
        await web.ask("POST", "/api/v1/keys", key=await web.key(), json={}, headers=hops)
        assert [row["address"] for row in await web.query("SELECT address FROM webhook.audit")] == ["192.0.2.7"]


async def test_large_and_late_bodies_are_refused(web: Site):
    key = await web.key()
    body = b'{"name": "' + b"a" * 70_000 + b'"}'
    answer = await web.ask("POST", "/api/v1/keys", key=key, data=body, headers={"Content-Type": "application/json"})
    assert (answer.status, answer.json["code"]) == (413, "too_large")
    assert (await web.ask("POST", "/login", form={"key": "a" * 70_000})).status == 413


async def test_the_audit_tells_who_changed_what(web: Site):
    key = await web.key(name="deploy")
    made = (await web.ask("POST", "/api/v1/keys", key=key, json={"account_id": "acct"})).json
    await web.ask("DELETE", f"/api/v1/keys/{made['id']}", key=key)
    await web.ask("DELETE", "/api/v1/keys/999", key=key)
    entries = (await web.ask("GET", "/api/v1/audit", key=key)).json["data"]
    told = [(one["actor"], one["action"], one["subject"], one["status"]) for one in entries]
    assert told == [
        ("key 1 (deploy)", "key.revoke", "key_id=999", 404),
        ("key 1 (deploy)", "key.revoke", f"key_id={made['id']}", 200),
        ("key 1 (deploy)", "key.create", f"key_id={made['id']} account_id=acct", 201),
    ]


@pytest.mark.parametrize(
    ("module", "accepts"),
    [
        (sessions, lambda: sessions.unsign(b"k", sessions.sign(b"k", 7, 2_000_000_000), 0.0)),
        (sessions, lambda: sessions.is_csrf_token(b"k", 7, sessions.csrf_token(b"k", 7))),
        (
            verify,
            lambda: verify._fits_secret(hmac.digest(bytes(32), b"x", "sha256"), b"x", ["whsec_" + "A" * 43 + "="]),
        ),
    ],
    ids=["cookie", "csrf token", "signature"],
)
def test_what_is_secret_is_compared_in_constant_time(module: Any, accepts: Any, monkeypatch: pytest.MonkeyPatch):
    """`compare_digest` alone decides: with one that never agrees nothing is accepted, and a `==` would still accept it."""
    assert accepts()
    blind = SimpleNamespace(compare_digest=lambda a, b: False, digest=hmac.digest)
    monkeypatch.setattr(module, "hmac", blind)
    assert not accepts()


async def test_a_portal_link_is_no_way_to_a_key(web: Site):
    """Which would live on when the link, and the login by it, are over."""
    answer = await web.ask("GET", await link(web))
    cookie = cookie_of(answer)
    csrf = await web.csrf(cookie)
    made = await web.ask("POST", "/api/v1/keys", cookie=cookie, headers={"X-CSRF-Token": csrf}, json={})
    assert (made.status, made.json["code"]) == (403, "forbidden")
    assert [
        row["created_by"]
        for row in await web.query("SELECT created_by FROM webhook.api_key WHERE created_by LIKE 'link%'")
    ] == []


async def test_a_key_makes_none_that_outlives_it(web: Site):
    made = (await web.ask("POST", "/api/v1/keys", key=await web.key(), json={"account_id": "acct", "ttl_s": 600})).json
    by_cookie = await web.login(made["key"])
    for ttl_s, status in ((None, 400), (700, 400), (500, 201)):
        answer = await web.ask("POST", "/api/v1/keys", key=made["key"], json={"ttl_s": ttl_s})
        assert (answer.status, answer.json.get("field")) == (status, "ttl_s" if status == 400 else None)
        again = await web.ask(
            "POST", "/api/v1/keys", cookie=by_cookie[0], headers={"X-CSRF-Token": by_cookie[1]}, json={"ttl_s": ttl_s}
        )
        assert again.status == status


@pytest.mark.parametrize(
    "lines", [["192.0.2.7, 10.0.0.3"], ["1.1.1.1", "192.0.2.7", "10.0.0.3"], ["1.1.1.1, 192.0.2.7", "10.0.0.3"]]
)
async def test_a_proxy_that_adds_a_line_of_its_own_is_believed(dsn: str, lines: list[str]):
    """Read from the first line only, the address was the client's own word."""
    async with site(dsn, web_trusted_proxies="127.0.0.1,10.0.0.0/8") as web:
        hops = CIMultiDict([("X-Forwarded-For", line) for line in lines])
        await web.ask("POST", "/api/v1/keys", key=await web.key(), json={}, headers=hops)
        assert [row["address"] for row in await web.query("SELECT address FROM webhook.audit")] == ["192.0.2.7"]


async def test_what_was_done_is_answered_though_its_end_cant_be_written(web: Site, monkeypatch: pytest.MonkeyPatch):
    """Answered 503, it would be done twice."""

    async def busy(*args: object) -> None:
        raise BusyError("no connection is free")

    monkeypatch.setattr(access, "end_change", busy)
    answer = await web.ask("POST", "/api/v1/keys", key=await web.key(), json={"account_id": "acct"})
    assert (answer.status, answer.json["account_id"]) == (201, "acct")
    assert [row["status"] for row in await web.query("SELECT status FROM webhook.audit")] == [None]


@pytest.mark.parametrize("path", ["/catalogue?cursor=%00", "/api/v1/audit?account_id=%00"])
async def test_what_the_database_can_not_take_is_no_fault_of_ours(web: Site, path: str):
    key = await web.key()
    cookie, _ = await web.login(key)
    assert (await web.ask("GET", path, cookie=cookie)).status == 400


async def test_an_account_that_there_is_nothing_of_is_not_erased(web: Site):
    answer = await web.ask("POST", "/api/v1/erasures", key=await web.key(), json={"account_id": "acct_4Z"})
    assert (answer.status, "acct_4Z" in answer.json["detail"]) == (404, True)
    assert await web.query("SELECT FROM webhook.erasure") == []


def test_tests_under_way_have_a_bound_for_all_and_one_for_each_account():
    trials = Trials()
    with contextlib.ExitStack() as stack:
        for n in range(TRIALS_MAX):
            stack.enter_context(trials.under_way(f"acct_{n // TRIALS_OF_ACCOUNT_MAX}" if n % 2 else None))
        for account in ("new", None):
            with pytest.raises(BusyError), trials.under_way(account):
                pass
    assert not trials._of
