"""Live streams: one look a topic however many watch, bounds, and their ends."""

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from dispatcher.errors import BusyError
from dispatcher.store.pool import Pool
from dispatcher.web import streams as streams_module
from dispatcher.web.streams import (
    LOOKS_A_ROUND,
    LOOKS_AT_ONCE,
    QUEUE_MAX,
    TOPICS_A_LOOK,
    Look,
    Looked,
    Message,
    Streams,
    _alone,
    _Stream,
)
from dispatcher.web.visit import Route, Visit
from tests.rig import until
from tests.web.conftest import Site, site

LOOKS = [0]


async def look(db: Any, seen: int | None) -> tuple[int, list[tuple[str, Any]]]:
    LOOKS[0] += 1
    now = (seen or 0) + 1
    return now, [("tick", {"n": now})]


async def live(visit: Visit) -> Any:
    return await visit.web.streams.follow(
        visit, ("ticks", visit.principal.account_id), look, every_s=0.02, kept=("tick",)
    )


async def silence(db: Any, seen: None) -> tuple[None, list[Message]]:
    return None, []


async def silent(visit: Visit) -> Any:
    return await visit.web.streams.follow(visit, "silence", silence, every_s=0.02)


@pytest.fixture
async def live_site(dsn: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Site]:
    from dispatcher.web import panel

    monkeypatch.setattr(
        panel, "ROUTES", (*panel.ROUTES, Route("GET", "/live-test", live), Route("GET", "/silent-test", silent))
    )
    async with site(dsn, web_streams_max=3) as made:
        yield made


async def opened(web: Site, key: str, path: str = "/live-test") -> aiohttp.ClientResponse:
    return await web.http.get(web.url + path, headers={"Authorization": f"Bearer {key}"})


async def message(response: aiohttp.ClientResponse) -> str:
    lines = []
    async with asyncio.timeout(10):
        while line := (await response.content.readline()).decode().strip():
            lines.append(line)
    return "\n".join(lines)


async def test_those_who_watch_the_same_share_one_look(live_site: Site):
    key = await live_site.key("a")
    watchers = [await opened(live_site, key) for _ in range(3)]
    for response in watchers:
        assert response.headers["Content-Type"] == "text/event-stream"
        assert await message(response) == "retry: 2000"
    assert live_site.web.streams.topics == 1
    before = LOOKS[0]
    texts = [await message(response) for response in watchers]
    assert all(text.startswith("event: tick\ndata: {") for text in texts)
    assert LOOKS[0] - before < 20, "one a tick, not one a stream and tick"
    for response in watchers:
        response.close()
    await until(lambda: live_site.web.streams.open == 0, what="the streams have ended")
    assert live_site.web.streams.topics == 0, "nobody watches: nobody looks"


async def test_who_joins_is_told_at_once_how_it_stands(live_site: Site):
    key = await live_site.key("a")
    first = await opened(live_site, key)
    await message(first)
    await message(first)
    [looker] = live_site.web.streams._lookers.values()
    looker._every_s = 3_600.0
    await asyncio.sleep(0.2)  # the last look but one may be over; from now on there is none
    looks = LOOKS[0]
    joined = await opened(live_site, key)
    assert await message(joined) == "retry: 2000"
    assert (await message(joined)).startswith("event: tick\ndata: {")
    assert LOOKS[0] == looks
    first.close()
    joined.close()


@pytest.mark.parametrize("by", ["key", "login"])
async def test_a_revoked_key_ends_what_it_watches(live_site: Site, monkeypatch: pytest.MonkeyPatch, by: str):
    monkeypatch.setattr(streams_module, "ASK_AGAIN_S", 0.05)
    key = await live_site.key("a")
    if by == "key":
        watching = await opened(live_site, key)
    else:
        cookie, _ = await live_site.login(key)
        watching = await live_site.http.get(live_site.url + "/live-test", headers={"Cookie": cookie})
    for _ in range(5):
        await message(watching)
    await live_site.query("UPDATE webhook.api_key SET revoked_at = now() WHERE account_id = 'a' RETURNING id")
    async with asyncio.timeout(10):
        while await message(watching):
            pass
    assert watching.content.at_eof()
    await until(lambda: live_site.web.streams.open == 0, what="the stream has ended")


async def test_streams_are_few(live_site: Site):
    key = await live_site.key()
    watchers = [await opened(live_site, key) for _ in range(3)]
    refused = await opened(live_site, key)
    assert (refused.status, refused.headers["Retry-After"]) == (503, "30")
    for response in watchers:
        response.close()


async def test_a_browser_that_leaves_makes_room_soon(live_site: Site):
    """Also where there is nothing to tell it, so that no write finds out."""
    key = await live_site.key("a")
    watchers = [await opened(live_site, key, "/silent-test") for _ in range(3)]
    for response in watchers:
        assert await message(response) == "retry: 2000"
    watchers.pop().close()
    soon_s = streams_module.KEEP_ALIVE_S / 3
    await until(lambda: live_site.web.streams.open == 2, what="who left counts no longer", within_s=soon_s)
    for response in watchers:
        response.close()


async def test_accounts_do_not_share_a_topic(live_site: Site):
    watchers = [await opened(live_site, await live_site.key(account)) for account in ("a", "b")]
    assert live_site.web.streams.topics == 2
    for response in watchers:
        response.close()


async def test_a_stream_ends_after_its_life(live_site: Site, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(streams_module, "LIFE_S", 0.1)
    response = await opened(live_site, await live_site.key())
    async with asyncio.timeout(10):
        await response.read()
    assert live_site.web.streams.open == 0


async def test_a_stream_ends_with_its_login(live_site: Site):
    key = await live_site.key("a")
    (leaving, token), (staying, _) = await live_site.login(key), await live_site.login(key)
    first, second = [
        await live_site.http.get(f"{live_site.url}/silent-test", headers={"Cookie": cookie})
        for cookie in (leaving, staying)
    ]
    assert (await live_site.ask("POST", "/logout", cookie=leaving, form={"csrf_token": token})).status == 303
    async with asyncio.timeout(10):
        await first.read()
    await until(lambda: live_site.web.streams.open == 1)  # it is counted out a moment after it has ended
    assert not second.content.at_eof(), "the other browser's goes on"
    second.close()


async def test_the_server_ends_streams_when_it_stops(dsn: str, monkeypatch: pytest.MonkeyPatch):
    from dispatcher.web import panel

    monkeypatch.setattr(panel, "ROUTES", (*panel.ROUTES, Route("GET", "/live-test", live)))
    async with site(dsn) as web:
        response = await opened(web, await web.key())
        await message(response)
        loop = asyncio.get_running_loop()
        began = loop.time()
    assert loop.time() - began < 5
    response.close()


async def test_a_look_that_fails_is_tried_again(dsn: str):
    tried = 0

    async def look(db: Any, seen: int | None) -> tuple[int, list[Message]]:
        nonlocal tried
        tried += 1
        if tried <= 2:
            raise BusyError("not now") if tried == 1 else ValueError("a mistake of ours")
        return tried, [("tick", tried)]

    pool = Pool(dsn, size=1, statement_timeout_s=1)
    looker = Streams(pool, streams_max=1)._looker("one", _alone("one", look), 0.01)
    stream = _Stream(lambda: False)
    looker.topic("one", (), ()).add(stream)
    await until(lambda: bool(stream.messages))
    await looker.stop()
    await pool.close()
    assert stream.messages[0] == b"event: tick\ndata: 3\n\n"


async def test_who_joins_gets_what_was_said_lately(dsn: str, monkeypatch: pytest.MonkeyPatch):
    """What happened while the page was on its way, of what happens; and the last of what says how something stands."""

    async def look(db: Any, seen: int | None) -> tuple[int, list[Message]]:
        n = (seen or 0) + 1
        return n, [("attempt", n), ("standing", n), ("other", n)] if n <= 3 else []

    pool = Pool(dsn, size=1, statement_timeout_s=1)
    streams = Streams(pool, streams_max=1)
    looker = streams._looker("one", _alone("one", look), 0.01)
    topic = looker.topic("one", ("standing",), ("attempt",))
    first, second, late = _Stream(lambda: False), _Stream(lambda: False), _Stream(lambda: False)
    topic.add(first)
    await until(lambda: len(first.messages) == 9)
    topic.add(second)
    assert [text.split()[1::2] for text in second.messages] == [
        [b"standing", b"3"], [b"attempt", b"1"], [b"attempt", b"2"], [b"attempt", b"3"],
    ]  # fmt: skip
    monkeypatch.setattr(streams_module, "REPEATED_S", 0.0)
    topic.add(late)
    assert [text.split()[1::2] for text in late.messages] == [[b"standing", b"3"]]
    await looker.stop()
    await pool.close()


async def test_topics_look_one_after_another_and_spread_over_the_second(dsn: str):
    """A hundred people who come at one instant don't look at one instant from then on."""
    looking, most, looks = 0, 0, defaultdict[int, list[float]](list)
    loop = asyncio.get_running_loop()

    def look_of(n: int) -> Look:
        async def look(db: Any, seen: Any) -> tuple[Any, list[Message]]:
            nonlocal looking, most
            looking += 1
            most = max(most, looking)
            looks[n].append(loop.time())
            await asyncio.sleep(0.001)
            looking -= 1
            return None, []

        return look

    pool = Pool(dsn, size=4, statement_timeout_s=1)
    streams = Streams(pool, streams_max=100)
    lookers = [streams._looker(n, _alone(n, look_of(n)), 0.5) for n in range(20)]
    for n, looker in enumerate(lookers):
        looker.topic(n, (), ())
    await until(lambda: len(looks) == 20 and min(map(len, looks.values())) >= 3)
    for looker in lookers:
        await looker.stop()
    await pool.close()
    assert most == LOOKS_AT_ONCE
    at = sorted(times[1] - min(times[0] for times in looks.values()) for times in looks.values())
    assert at[-1] - at[0] > 0.3, "second looks come spread over the half second"


async def test_one_look_is_for_all_topics_of_a_kind_that_are_due(dsn: str):
    """And who came together doesn't stay together: each look is for a part of them, and none is for more than TOPICS_A_LOOK."""
    looks: list[list[int]] = []

    async def look(db: Any, seen: dict[int, int | None]) -> dict[int, Looked]:
        looks.append(list(seen))
        found: dict[int, Looked] = {n: ((before or 0) + 1, [("n", n)]) for n, before in seen.items()}
        found.pop(7, None)  # it is gone
        return found

    pool = Pool(dsn, size=1, statement_timeout_s=1)
    streams = Streams(pool, streams_max=1)
    looker = streams._looker("numbers", look, 0.4)
    topics = [looker.topic(n, (), ()) for n in range(6 * TOPICS_A_LOOK)]
    first, gone = _Stream(lambda: False), _Stream(lambda: False)
    topics[0].add(first)
    topics[7].add(gone)
    await until(lambda: (topics[0].seen or 0) >= 4)
    await looker.stop()
    await pool.close()
    assert [len(at) for at in looks[:6]] == [TOPICS_A_LOOK] * 6
    assert sorted(n for at in looks[:6] for n in at) == list(range(6 * TOPICS_A_LOOK))
    later = looks[6:-1]
    assert max(map(len, later)) <= TOPICS_A_LOOK
    assert len(later) <= 4 * 2 * LOOKS_A_ROUND, "as many as that are due together, not one a topic"
    assert first.messages[0] == b"event: n\ndata: 0\n\n"
    assert (list(gone.messages), topics[7].seen) == ([], None)


async def test_where_looks_take_long_all_topics_have_their_turn(dsn: str):
    looks: Counter[int] = Counter()

    async def look(db: Any, seen: dict[int, Any]) -> dict[int, Looked]:
        looks.update(list(seen))
        await asyncio.sleep(0.02)
        return {}

    pool = Pool(dsn, size=1, statement_timeout_s=1)
    looker = Streams(pool, streams_max=1)._looker("numbers", look, 0.01)
    topics = range(3 * TOPICS_A_LOOK)
    for n in topics:
        looker.topic(n, (), ())
    await until(lambda: looks[0] >= 5)
    await looker.stop()
    await pool.close()
    assert min(looks[n] for n in topics) >= 3


def test_a_slow_stream_loses_the_oldest_and_is_told():
    stream = _Stream(lambda: False)
    for n in range(QUEUE_MAX + 1):
        stream.put(b"%d" % n)
    assert list(stream.messages) == [b"event: missed\ndata: null\n\n", b"%d" % QUEUE_MAX]
