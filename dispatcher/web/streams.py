"""Server-sent events: many browsers, one question to the database a second for each topic.

A *topic* is what several streams watch: an account's deliveries, an endpoint's state. One task a topic looks, once every
`every_s`, for as long as somebody listens, and hands what it found to all of them. Topics look one after another, spread
over the second: a hundred that looked at once would hold up deliveries. A stream that can't keep up loses the
oldest messages and is told so; none makes another wait, and none grows without a bound.

    async def look(db: Connection, seen: int | None) -> tuple[int, list[Message]]:
        ...                                 # what is new since `seen`, and what `seen` is now

    async def live(visit: Visit) -> StreamResponse:
        return await visit.web.streams.follow(visit, ("deliveries", visit.principal.account_id), look)

The topic must say everything that `look` depends on, whose account it is first of all. Messages named in `kept` say how something stands:
who joins later gets the last of each at once. Those named in `repeated` say what happened: who joins gets what was said of the last
REPEATED_S. So nothing is missed between a page and its stream, and the page leaves out what it has.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Hashable
from typing import TYPE_CHECKING, Any

import orjson
import structlog
from aiohttp import web

from dispatcher.errors import DispatcherError
from dispatcher.store.pool import Pool
from dispatcher.store.session import Connection
from dispatcher.web.problems import ProblemError

if TYPE_CHECKING:
    from dispatcher.web.visit import Visit

_log = structlog.get_logger(room="web")

Message = tuple[str, Any]  # the event's name, and its data: anything that orjson can say
Look = Callable[[Connection, Any], Awaitable[tuple[Any, list[Message]]]]

QUEUE_MAX = 200  # messages that wait for one stream
REPEATED_S = 10.0  # longer than a page takes to come and to open its stream
KEEP_ALIVE_S = 15.0  # a comment, so that proxies keep the stream open and a dead browser is noticed
LOOKS_AT_ONCE = 2  # one that takes long doesn't stop the others
GOLDEN = 0.618034  # multiples of it, without their whole parts, lie far from each other however many there are
LIFE_S = 300.0  # then the browser connects again, and is asked again who it is
RETRY_MS = 2_000


class Streams:
    def __init__(self, pool: Pool, *, streams_max: int) -> None:
        self._pool = pool
        self._streams_max = streams_max
        self._topics: dict[Hashable, _Topic] = {}
        self._topics_made = 0
        self._looking = asyncio.Semaphore(LOOKS_AT_ONCE)
        self._open = 0
        self._closing = asyncio.Event()

    @property
    def open(self) -> int:
        return self._open

    @property
    def topics(self) -> int:
        return len(self._topics)

    async def follow(
        self, visit: "Visit", topic: Hashable, look: Look, *, every_s: float = 1.0, kept: Collection[str] = (), repeated: Collection[str] = (),
    ) -> web.StreamResponse:  # fmt: skip
        """Answer with a stream of what `look` finds, until the browser leaves or LIFE_S is over."""
        if self._open >= self._streams_max or self._closing.is_set():
            raise ProblemError(
                503, "there are too many live streams; the page works without", headers={"Retry-After": "30"}
            )
        self._open += 1
        stream = _Stream()
        try:
            found = self._topic(topic, look, every_s, kept, repeated)
            found.add(stream)
            try:
                return await self._send(visit, stream)
            finally:
                found.remove(stream)
                if not found.streams and self._topics.get(topic) is found:
                    del self._topics[topic]
                    await found.stop()
        finally:
            self._open -= 1

    def _topic(
        self, topic: Hashable, look: Look, every_s: float, kept: Collection[str], repeated: Collection[str]
    ) -> "_Topic":
        found = self._topics.get(topic)
        if found is None:
            self._topics_made += 1
            offset_s = self._topics_made * GOLDEN % 1 * every_s
            found = self._topics[topic] = _Topic(self._pool, look, every_s, kept, repeated, offset_s, self._looking)
        return found

    async def close(self) -> None:
        """End every stream; browsers connect again in a moment."""
        self._closing.set()
        for topic in list(self._topics.values()):
            for stream in topic.streams:
                stream.wake.set()

    async def _send(self, visit: "Visit", stream: "_Stream") -> web.StreamResponse:
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        )
        loop = asyncio.get_running_loop()
        ends = loop.time() + LIFE_S
        try:
            await response.prepare(visit.request)
            await response.write(b"retry: %d\n\n" % RETRY_MS)
            while (now := loop.time()) < ends and not self._closing.is_set():
                try:
                    async with asyncio.timeout(min(KEEP_ALIVE_S, ends - now)):
                        await stream.wake.wait()
                except TimeoutError:
                    await response.write(b":\n\n")
                    continue
                stream.wake.clear()
                while stream.messages:
                    await response.write(stream.messages.popleft())
        except ConnectionResetError:
            pass  # the browser has left: that is how streams end
        return response


class _Stream:
    """One browser. `messages` are ready to send; beyond QUEUE_MAX the oldest are dropped and it is told."""

    def __init__(self) -> None:
        self.messages: deque[bytes] = deque()
        self.wake = asyncio.Event()

    def put(self, message: bytes) -> None:
        if len(self.messages) >= QUEUE_MAX:
            self.messages.clear()
            self.messages.append(_encode("missed", None))
        self.messages.append(message)
        self.wake.set()


class _Topic:
    """Owns the task that looks. It begins with the first stream and is stopped after the last. `offset_s` lie between the first look and the
    second."""

    def __init__(
        self, pool: Pool, look: Look, every_s: float, kept: Collection[str], repeated: Collection[str], offset_s: float,
        looking: asyncio.Semaphore,
    ) -> None:  # fmt: skip
        self.streams: dict[_Stream, None] = {}
        self._pool = pool
        self._look = look
        self._every_s = every_s
        self._offset_s = offset_s
        self._looking = looking
        self._kept = kept
        self._repeated = repeated
        self._last: dict[str, bytes] = {}
        self._lately: deque[tuple[float, bytes]] = deque(maxlen=QUEUE_MAX // 2)
        self._task = asyncio.create_task(self._run())

    def add(self, stream: _Stream) -> None:
        self.streams[stream] = None
        for message in self._last.values():
            stream.put(message)
        since = asyncio.get_running_loop().time() - REPEATED_S
        for at, message in self._lately:
            if at > since:
                stream.put(message)

    def remove(self, stream: _Stream) -> None:
        del self.streams[stream]

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        seen: Any = None
        wait_s = self._offset_s
        while True:
            try:
                async with self._looking, self._pool.connection() as db:
                    seen, messages = await self._look(db, seen)
                for event, data in messages:
                    encoded = _encode(event, data)
                    if event in self._kept:
                        self._last[event] = encoded
                    elif event in self._repeated:
                        self._lately.append((asyncio.get_running_loop().time(), encoded))
                    for stream in self.streams:
                        stream.put(encoded)
            except DispatcherError as exc:
                _log.info("stream.look", error=str(exc))  # busy, or away: the next look may succeed
            except Exception:  # noqa: BLE001 - logged with its trace; one topic's fault must not end the others' streams
                _log.exception("stream.look")
            await asyncio.sleep(wait_s)
            wait_s = self._every_s


def _encode(event: str, data: Any) -> bytes:
    """One event as the stream has it. JSON has no line ends of its own."""
    return b"event: %b\ndata: %b\n\n" % (event.encode(), orjson.dumps(data, default=str))
