"""Server-sent events: many browsers, few questions to the database.

A *topic* is what several streams watch: a run's progress, an endpoint's state. It is looked at once every `every_s`, for as
long as somebody listens, and what was found is handed to all of them. Looks are spread over that time: a hundred at
once would hold up deliveries. A stream that can't keep up loses the oldest messages and is told so; none makes another
wait, and none grows without a bound.

    async def look(db: Connection, seen: int | None) -> tuple[int, list[Message]]:
        ...                                 # what is new since `seen`, and what `seen` is now

    async def live(visit: Visit) -> StreamResponse:
        return await visit.web.streams.follow(visit, ("deliveries", visit.principal.account_id), look)

Where hundreds watch hundreds of things of one kind, one look is for many topics (`follow_one_of`): a question costs the server and the loop
about the same however many it is about.

The topic must say everything that `look` depends on, whose account it is first of all. Messages named in `kept` say how something stands:
who joins later gets the last of each at once. Those named in `repeated` say what happened: who joins gets what was said of the last
REPEATED_S. So nothing is missed between a page and its stream, and the page leaves out what it has.
"""

import asyncio
import itertools
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Hashable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import orjson
import structlog
from aiohttp import web

from dispatcher.errors import DispatcherError
from dispatcher.store.pool import Pool
from dispatcher.store.session import Connection
from dispatcher.web.problems import ProblemError
from dispatcher.web.turns import others_first

if TYPE_CHECKING:
    from dispatcher.store.access import Login
    from dispatcher.web.visit import Visit

_log = structlog.get_logger(room="web")

Message = tuple[str, Any]  # the event's name, and its data: anything that orjson can say
Looked = tuple[Any, list[Message]]
Look = Callable[[Connection, Any], Awaitable[Looked]]
# By topic; one that is gone may be left out.
LookAtAll = Callable[[Connection, dict[Any, Any]], Awaitable[Mapping[Any, Looked]]]

QUEUE_MAX = 200  # messages that wait for one stream
REPEATED_S = 10.0  # longer than a page takes to come and to open its stream
KEEP_ALIVE_S = 15.0  # a comment, so that proxies keep the stream open and a dead browser is noticed
LOOKS_AT_ONCE = 2  # one that takes long doesn't stop the others
TOPICS_A_LOOK = 20
# Of all topics of a kind: with 8 and 200 streams deliveries' p99 was 1.5 times what it is without, with 32 1.2.
LOOKS_A_ROUND = 32
GOLDEN = 0.618034  # multiples of it, without their whole parts, lie far from each other however many there are
ASK_AGAIN_S = 30.0  # whether it may still look: a key may have been revoked, a link too, or an account erased
LIFE_S = 300.0  # then the browser connects again, and is asked again who it is
RETRY_MS = 2_000


class Streams:
    def __init__(self, pool: Pool, *, streams_max: int) -> None:
        self._pool = pool
        self._streams_max = streams_max
        self._lookers: dict[Hashable, _Looker] = {}
        self._looking = asyncio.Semaphore(LOOKS_AT_ONCE)
        self._topics_made = itertools.count(1)
        self._open = 0
        self._closing = asyncio.Event()

    @property
    def open(self) -> int:
        return self._open

    @property
    def topics(self) -> int:
        return sum(len(looker.topics) for looker in self._lookers.values())

    async def follow(
        self, visit: "Visit", topic: Hashable, look: Look, *, every_s: float = 1.0, kept: Collection[str] = (), repeated: Collection[str] = (),
    ) -> web.StreamResponse:  # fmt: skip
        """Answer with a stream of what `look` finds, until the browser leaves or LIFE_S is over."""
        return await self.follow_one_of(
            visit, topic, topic, _alone(topic, look), every_s=every_s, kept=kept, repeated=repeated
        )

    async def follow_one_of(
        self, visit: "Visit", kind: Hashable, topic: Hashable, look: LookAtAll, *, every_s: float = 1.0, kept: Collection[str] = (),
        repeated: Collection[str] = (),
    ) -> web.StreamResponse:  # fmt: skip
        """The same, where one look is for many topics of a kind. Whoever begins a kind brings the look for all of it."""
        if self._open >= self._streams_max or self._closing.is_set():
            raise ProblemError(
                503, "there are too many live streams; the page works without", headers={"Retry-After": "30"}
            )
        self._open += 1
        stream = _Stream(lambda: visit.request.transport is None, visit.login)
        try:
            looker = self._looker(kind, look, every_s)
            found = looker.topic(topic, kept, repeated)
            found.add(stream)
            try:
                return await self._send(visit, stream)
            finally:
                found.remove(stream)
                if not found.streams and looker.topics.get(topic) is found:
                    del looker.topics[topic]
                if not looker.topics and self._lookers.get(kind) is looker:
                    del self._lookers[kind]
                    await looker.stop()
        finally:
            self._open -= 1

    def _looker(self, kind: Hashable, look: LookAtAll, every_s: float) -> "_Looker":
        found = self._lookers.get(kind)
        if found is None:
            found = self._lookers[kind] = _Looker(self._pool, look, every_s, self._looking, self._topics_made)
        return found

    def end(self, login: "Login") -> None:
        """End the streams of a login that is over."""
        for stream in self._streams():
            if stream.login is not None and stream.login.id == login.id:
                stream.is_over = True
                stream.wake.set()

    async def close(self) -> None:
        """End every stream; browsers connect again in a moment."""
        self._closing.set()
        for stream in self._streams():
            stream.wake.set()

    def _streams(self) -> Iterator["_Stream"]:
        for looker in self._lookers.values():
            for topic in looker.topics.values():
                yield from topic.streams

    async def _send(self, visit: "Visit", stream: "_Stream") -> web.StreamResponse:
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        )
        loop = asyncio.get_running_loop()
        ends, asked = loop.time() + LIFE_S, loop.time()
        try:
            await response.prepare(visit.request)
            await response.write(b"retry: %d\n\n" % RETRY_MS)
            while (now := loop.time()) < ends and not self._closing.is_set():
                try:
                    async with asyncio.timeout(min(KEEP_ALIVE_S, ends - now)):
                        await stream.wake.wait()
                except TimeoutError:
                    await response.write(b":\n\n")
                stream.wake.clear()
                if stream.is_over or stream.has_left():
                    break
                if loop.time() - asked >= ASK_AGAIN_S:
                    if not await _may_look(visit):
                        break
                    asked = loop.time()
                # In one piece: each piece is a call to the kernel here, and to the browser's.
                said = b"".join(stream.messages)
                stream.messages.clear()
                if said:
                    await response.write(said)
        except ConnectionResetError:
            pass  # the browser has left: that is how streams end
        return response


async def _may_look(visit: "Visit") -> bool:
    try:
        return await visit.is_still_let_in()
    except DispatcherError as exc:  # busy, or away: nobody is let in or out by that
        _log.info("stream.ask", error=str(exc))
        return True


class _Stream:
    """One browser. `messages` are ready to send; beyond QUEUE_MAX the oldest are dropped and it is told."""

    def __init__(self, has_left: Callable[[], bool], login: "Login | None" = None) -> None:
        self.login = login
        self.is_over = False
        self.has_left = has_left
        self.messages: deque[bytes] = deque()
        self.wake = asyncio.Event()

    def put(self, message: bytes) -> None:
        if len(self.messages) >= QUEUE_MAX:
            self.messages.clear()
            self.messages.append(_encode("missed", None))
        self.messages.append(message)
        self.wake.set()


class _Topic:
    """What its streams have been told and what was seen of it. `due_at`: when it is looked at next."""

    def __init__(self, kept: Collection[str], repeated: Collection[str], due_at: float) -> None:
        self.streams: dict[_Stream, None] = {}
        self.seen: Any = None
        self.due_at = due_at
        self.is_new = True
        self._kept = kept
        self._repeated = repeated
        self._last: dict[str, bytes] = {}
        self._lately: deque[tuple[float, bytes]] = deque(maxlen=QUEUE_MAX // 2)

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

    def wake_who_left(self) -> None:
        """Have streams end whose browser is gone: nothing says so to one that waits, and until KEEP_ALIVE_S it would count among those open."""
        for stream in self.streams:
            if stream.has_left():
                stream.wake.set()

    def tell(self, messages: list[Message], now: float) -> None:
        for event, data in messages:
            encoded = _encode(event, data)
            if event in self._kept:
                self._last[event] = encoded
            elif event in self._repeated:
                self._lately.append((now, encoded))
            for stream in self.streams:
                stream.put(encoded)


class _Looker:
    """Owns the task that looks at the topics of a kind, as many at a time as are due. It begins with the first and is stopped after the last."""

    def __init__(
        self, pool: Pool, look: LookAtAll, every_s: float, looking: asyncio.Semaphore, topics_made: Iterator[int]
    ) -> None:
        self.topics: dict[Hashable, _Topic] = {}
        self._pool = pool
        self._look = look
        self._every_s = every_s
        self._looking = looking
        self._topics_made = topics_made
        self._new = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    def topic(self, key: Hashable, kept: Collection[str], repeated: Collection[str]) -> _Topic:
        found = self.topics.get(key)
        if found is None:
            found = self.topics[key] = _Topic(kept, repeated, asyncio.get_running_loop().time())
            self._new.set()
        return found

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._new.clear()
            began = loop.time()
            due = [key for key, topic in self.topics.items() if topic.due_at <= began]
            due.sort(key=lambda key: self.topics[key].due_at)  # where looks take long, everybody waits the same
            if due:
                await self._look_at(due[:TOPICS_A_LOOK])
            if len(due) > TOPICS_A_LOOK:
                continue
            next_at = min((topic.due_at for topic in self.topics.values()), default=began)
            with suppress(TimeoutError):
                async with asyncio.timeout_at(max(next_at, began + self._every_s / LOOKS_A_ROUND)):
                    await self._new.wait()

    async def _look_at(self, keys: list[Hashable]) -> None:
        loop = asyncio.get_running_loop()
        topics = {key: self.topics[key] for key in keys}
        try:
            async with self._looking, self._pool.connection() as db:
                looked = await self._look(db, {key: topic.seen for key, topic in topics.items()})
            for key, (seen, messages) in looked.items():
                topics[key].seen = seen
                topics[key].tell(messages, loop.time())
                await others_first()
        except DispatcherError as exc:
            _log.info("stream.look", error=str(exc))  # busy, or away: the next look may succeed
        except Exception:  # noqa: BLE001 - logged with its trace; one look's fault must not end the streams
            _log.exception("stream.look")
        now = loop.time()
        for topic in topics.values():
            wait_s = self._every_s
            if topic.is_new:  # who came together doesn't stay together
                wait_s, topic.is_new = next(self._topics_made) * GOLDEN % 1 * self._every_s, False
            topic.due_at = now + wait_s
            topic.wake_who_left()  # now: the last one's end stops this task, which should not be in the middle of a question


def _alone(topic: Hashable, look: Look) -> LookAtAll:
    async def look_at_it(db: Connection, seen: dict[Hashable, Any]) -> dict[Hashable, Looked]:
        return {topic: await look(db, seen[topic])}

    return look_at_it


def _encode(event: str, data: Any) -> bytes:
    """One event as the stream has it. JSON has no line ends of its own."""
    return b"event: %b\ndata: %b\n\n" % (event.encode(), orjson.dumps(data, default=str))
