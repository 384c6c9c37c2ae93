"""The server beside the engine: what goes wrong in one is not the other's trouble, and everything has a bound."""

import asyncio
import re
from datetime import timedelta
from typing import Any

import asyncpg
import pytest
import structlog

from bench.network import Network
from dispatcher import settings as settings_module
from dispatcher.errors import BusyError, DatabaseAwayError, InputError
from dispatcher.main import make_transport
from dispatcher.store import access, search, stats
from dispatcher.store.pool import Pool
from dispatcher.web import server as server_module
from dispatcher.web.app import routes
from dispatcher.web.limits import ADDRESSES_MAX, FAILURES_MAX, WINDOW_S, FailedLogins
from dispatcher.web.server import WebServer
from tests.rig import until
from tests.web.conftest import Site, site


async def test_an_address_in_use_is_said_and_tried_again(dsn: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server_module, "AGAIN_S", 0.01)
    async with site(dsn) as first:
        settings = settings_module.load(web_listen=f"127.0.0.1:{first.server.port}")
        transport = make_transport(settings)
        second = WebServer(settings, dsn, transport)
        with pytest.raises(InputError, match="can't listen at 127"):
            await second.run()
        beside = asyncio.create_task(second.run_beside())
        await asyncio.sleep(0.05)
        assert not beside.done(), "it goes on trying, and nobody else ends"
    await until(second.ready.is_set, what="the address is free: it serves")
    beside.cancel()
    await asyncio.gather(beside, return_exceptions=True)
    await transport.close()


async def test_a_fault_of_ours_is_an_answer_and_a_line_in_the_log(
    web: Site, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    async def broken(*args: Any, **more: Any) -> None:
        raise RuntimeError("nobody expected this")

    key = await web.key()
    monkeypatch.setattr(access, "keys", broken)
    with structlog.testing.capture_logs() as logged:
        answer = await web.ask("GET", "/api/v1/keys", key=key)
    assert (answer.status, answer.json["code"]) == (500, "internal")
    assert "nobody expected" not in answer.text
    assert [(line["event"], line["exc_info"]) for line in logged] == [("request.failed", True)]
    assert (await web.ask("GET", "/api/v1/me", key=key)).status == 200


async def test_a_login_links_token_is_in_no_log():
    async with site("postgresql://127.0.0.1:1/none") as away:
        with structlog.testing.capture_logs() as logged:
            answer = await away.ask("GET", "/enter/a-token-that-logs-in")
    assert answer.status == 503
    (line,) = [line for line in logged if line["event"] == "request.refused"]
    assert line["path"] == "/enter/{token}"
    assert "a-token-that-logs-in" not in str(logged)


async def test_a_load_balancer_is_told_whether_pages_can_be_answered(web: Site):
    answer = await web.ask("GET", "/healthz")
    assert (answer.status, answer.json) == (200, {"ready": True})
    async with site("postgresql://127.0.0.1:1/none") as away:
        answer = await away.ask("GET", "/healthz")
        assert (answer.status, answer.json) == (503, {"ready": False})


async def test_requests_are_counted_by_area_and_status_and_answers_are_timed(web: Site):
    counts = web.server.requests.counts
    before = dict(counts)
    key = await web.key()
    for method, path, expected, area, status in (
        ("GET", "/login", 200, "panel", "2xx"),
        ("GET", "/nothing", 404, "panel", "4xx"),
        ("GET", "/endpoints", 303, "panel", "3xx"),
        ("GET", "/api/v1/me", 401, "api", "4xx"),
        ("POST", "/r/" + "x" * 43, 410, "receiver", "4xx"),
        ("GET", "/static/0/nothing.css", 404, "static", "4xx"),
        ("GET", "/healthz", 200, "health", "2xx"),
    ):
        answer = await web.ask(method, path)
        assert answer.status == expected, (path, answer.text)
        assert counts[area, status] == before[area, status] + 1, path
        before = dict(counts)
    assert sum(web.server.requests.answer_us.counts) == 5, "not those of files and probes"
    async with web.http.get(f"{web.url}/overview/live", headers={"Authorization": f"Bearer {key}"}) as stream:
        assert stream.headers["Content-Type"].startswith("text/event-stream")
        await until(lambda: web.server.streams == 1)
        assert counts == before, "it is counted when it ends"
    await until(lambda: web.server.streams == 0, what="its client has left")
    await until(lambda: counts["stream", "2xx"] == before["stream", "2xx"] + 1, what="its end has been counted")
    assert {area for area, _ in counts} == {"api", "panel", "receiver", "stream", "static", "health"}


async def test_a_fault_of_ours_counts_as_one(web: Site, monkeypatch: pytest.MonkeyPatch):
    async def broken(*args: Any, **more: Any) -> None:
        raise RuntimeError("nobody expected this")

    key = await web.key()
    monkeypatch.setattr(access, "keys", broken)
    with structlog.testing.capture_logs():
        assert (await web.ask("GET", "/api/v1/keys", key=key)).status == 500
    assert web.server.requests.counts["api", "5xx"] == 1


async def test_a_database_that_is_away_is_an_answer():
    async with site("postgresql://127.0.0.1:1/none") as web:
        for headers in ({"Authorization": "Bearer whkey_x"}, {"Cookie": "webhooks_login=1.99999999999.x"}):
            answer = await web.ask("GET", "/api/v1/me", headers=headers)
            assert (answer.status, answer.json["code"], answer.headers["Retry-After"]) == (503, "database_away", "2")
        assert (await web.ask("GET", "/api/v1/docs")).status == 200


async def test_connections_that_were_lost_are_made_again(web: Site):
    key = await web.key()
    assert (await web.ask("GET", "/api/v1/me", key=key)).status == 200
    await web.query(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'dispatcher web' AND datname = current_database()"
    )

    async def back() -> bool:
        return (await web.ask("GET", "/api/v1/me", key=key)).status == 200

    await until(back)


async def test_beyond_the_bound_connections_are_hung_up_on(dsn: str):
    async with site(dsn, web_connections_max=10) as web:
        held = [await asyncio.open_connection("127.0.0.1", web.server.port) for _ in range(10)]
        await until(lambda: web.server.connections == 10)
        reader, writer = await asyncio.open_connection("127.0.0.1", web.server.port)
        try:
            assert await asyncio.wait_for(reader.read(), 10) == b""
        except ConnectionResetError:
            pass  # hung up on either way
        for _, open_writer in [*held, (reader, writer)]:
            open_writer.close()

        await until(lambda: web.server.connections == 0)
        assert (await web.ask("GET", "/login")).status == 200


async def test_a_request_waits_for_a_connection_and_then_is_told(dsn: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dispatcher.store.pool.WAIT_S", 0.05)
    pool = Pool(dsn, size=1, statement_timeout_s=0.2)
    async with pool.connection() as db:
        assert await db.fetchval("SHOW statement_timeout") == "200ms"
        assert await db.fetchval("SHOW application_name") == "dispatcher web"
        with pytest.raises(BusyError, match="no room"):
            async with pool.connection():
                pass
        async with pool.connection(long=True) as other:
            assert await other.fetchval("SHOW statement_timeout") == "2min"
    with pytest.raises(BusyError, match=r"longer than 0\.2 s"):
        async with pool.connection() as db:
            await db.execute("SELECT pg_sleep(5)")
    async with pool.connection() as db:
        assert await db.fetchval("SHOW statement_timeout") == "200ms", "as it was lent the first time"
    await pool.close()
    away = Pool("postgresql://127.0.0.1:1/none", size=1, statement_timeout_s=1)
    with pytest.raises(DatabaseAwayError):
        async with away.connection():
            pass
    await away.close()


async def test_two_who_change_the_same_are_told_to_try_again(dsn: str):
    pool = Pool(dsn, size=2, statement_timeout_s=5)
    with pytest.raises(BusyError, match="try again"):
        async with pool.connection() as db:
            await db.execute(
                "DO $$ BEGIN RAISE EXCEPTION 'as a deadlock ends' USING ERRCODE = 'deadlock_detected'; END $$"
            )
    await pool.close()


async def test_a_database_that_falls_silent_is_away_and_its_connection_is_made_again(dsn: str):
    """To give the connection back fails too then: that ended `dispatcher web`, when it was the sweep's."""
    async with Network(dsn) as network:
        pool = Pool(network.dsn, size=1, statement_timeout_s=0.1)
        await pool.ask()
        network.cut()
        with pytest.raises(DatabaseAwayError):
            await pool.ask()
        network.heal()
        await pool.ask()
        await pool.close()


async def test_what_is_cancelled_in_a_transaction_leaves_none_open(dsn: str):
    pool = Pool(dsn, size=1, statement_timeout_s=5)
    begun = asyncio.Event()

    async def work() -> None:
        async with pool.connection() as db, db.transaction():
            begun.set()
            await db.execute("SELECT pg_sleep(4)")

    task = asyncio.create_task(work())
    await begun.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    async with pool.connection() as db:
        assert not db.is_in_transaction()
    await pool.close()


async def test_what_has_expired_is_swept(db: asyncpg.Connection):
    await db.execute(
        "INSERT INTO webhook.login (actor, expires_at) VALUES ('a', now() - interval '1 s'), ('a', now() + interval '1 h')"
    )
    await db.execute(
        "INSERT INTO webhook.login_link (hash, uses_left, session_s, created_by, expires_at) "
        "VALUES ('a', 1, 1, 'a', now() - interval '32 days'), ('b', 1, 1, 'a', now() - interval '1 day')"
    )
    await db.execute(
        "INSERT INTO webhook.idempotency_key (scope, key, request_hash, created_at) "
        "VALUES ('a', 'old', '', now() - interval '25 h'), ('a', 'new', '', now())"
    )
    await db.execute(
        "INSERT INTO webhook.audit (actor, action, subject, address, at) VALUES ('a', '', '', '', now() - interval '401 days')"
    )
    assert await access.sweep(db) == 4
    assert await access.sweep(db) == 0


def test_failed_logins_are_counted_by_address_and_forgotten():
    failed = FailedLogins()
    for _ in range(FAILURES_MAX):
        assert failed.wait_s("192.0.2.1", 0) == 0
        failed.count("192.0.2.1", 0)
    assert failed.wait_s("192.0.2.1", 1) == WINDOW_S - 1
    assert failed.wait_s("192.0.2.2", 1) == 0
    assert failed.wait_s("192.0.2.1", WINDOW_S) == 0
    for n in range(FAILURES_MAX):
        failed.count(f"2001:db8::{n:x}", 0)
    assert failed.wait_s("2001:db8::ffff", 1) > 0, "one customer's network is one address"
    assert failed.wait_s("2001:db8:0:1::1", 1) == 0
    for n in range(ADDRESSES_MAX + 10):
        failed.count(f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}", 0)
    assert len(failed) == ADDRESSES_MAX


def test_what_one_request_may_hold_the_loop_for_is_bounded_in_size():
    """Under 5 ms on a core that was measured; beyond these sizes it isn't."""
    assert max(route.body_bytes_max for route in routes()) <= 1 << 19
    assert search.LIMIT_MAX <= 100
    assert stats.POINTS_MAX <= 300


# ── plans ──


async def test_hot_lists_read_by_index(db: asyncpg.Connection):
    """On a log of 30,000 events with 100 accounts: no look reads a whole table, whichever filters are given."""
    from dispatcher.store.access import ACCESS
    from dispatcher.store.search import SEARCH
    from dispatcher.store.stats import STATS

    await db.execute("SET session_replication_role = replica")
    await db.execute(
        "INSERT INTO webhook.outbox (account_id, type, payload) SELECT 'a' || n % 100, 't.x', '{}' FROM generate_series(1, 30000) AS n"
    )
    await db.execute(
        "INSERT INTO webhook.endpoint (account_id, url) SELECT 'a' || n % 100, 'https://a.test' FROM generate_series(1, 2000) AS n"
    )
    await db.execute(
        "INSERT INTO webhook.attempt SELECT o.id, e.id, now(), 0, 1, 1, 500, CASE WHEN o.id % 10 = 0 THEN 'status' END "
        "FROM webhook.outbox o JOIN webhook.endpoint e ON e.id = o.id % 100 + 1 WHERE o.id % 10 = 0"
    )
    await db.execute("INSERT INTO webhook.login (actor, expires_at) SELECT 'a', now() FROM generate_series(1, 5000)")
    await db.execute(
        "INSERT INTO webhook.api_key (prefix, hash, created_by) SELECT 'a', sha256(n::text::bytea), 'a' FROM generate_series(1, 5000) AS n"
    )
    await db.execute(
        "INSERT INTO webhook.audit (actor, account_id, action, subject, address) "
        "SELECT 'a', 'a' || n % 100, '', '', '' FROM generate_series(1, 20000) AS n"
    )
    await db.execute(
        "INSERT INTO webhook.endpoint_stat (minute, endpoint_id, epoch, delivered, failed, dead, duration_ms, durations) "
        "SELECT now() - n * interval '1 min', n % 2000, 1, 1, 0, 0, 1, '{}' "
        "FROM generate_series(1, 20000) AS n"
    )
    await db.execute("ANALYZE")
    ids = [30_000 - 100 * n for n in range(100)]
    looks: list[tuple[str, list[Any]]] = [
        (SEARCH.events, ["a5", 20_000, 0, 500, None, None, None]),
        (SEARCH.events, [None, 20_000, 0, 500, ["t.x"], [], "x"]),
        (SEARCH.candidates, ["a5", 20_000, 0, 500, None, None, None]),
        (SEARCH.failed_candidates, [11, 20_000, 0, 500, None, None, None]),
        (SEARCH.deliveries, ["a0", ids, 100, None, None, None, None, 1 << 62, 0, 50, 0, min(ids), max(ids)]),
        (SEARCH.deliveries, ["a0", ids, None, ["dead"], None, None, None, 1 << 62, 0, 50, 0, min(ids), max(ids)]),
        (SEARCH.accounts, ["a5", 50]),
        (STATS.summaries, [list(range(1, 51)), timedelta(hours=1)]),
        (ACCESS.key_by_hash, [b"x"]),
        (ACCESS.login, [5]),
        (ACCESS.audit, ["a5", 1 << 62, 50]),
        (ACCESS.audit, [None, 1 << 62, 50]),
    ]
    for statement, values in looks:
        plan = "\n".join(row[0] for row in await db.fetch(f"EXPLAIN (ANALYZE, TIMING off) {statement}", *values))
        # A page of an account's endpoints may be read from few thousand; of what grows with the traffic only empty partitions are.
        scanned = {(table, int(rows)) for table, rows in re.findall(r"Seq Scan on (\w+).*?actual rows=(\d+)", plan)}
        large = {
            table for table, rows in scanned if rows and table not in ("endpoint", "subscription", "lane", "retry")
        }
        assert large == set(), plan
        removed = [int(n) for n in re.findall(r"Rows Removed by (?:Join )?Filter: (\d+)", plan)]
        assert max(removed, default=0) <= 2_000, plan
