"""The receivers: hosts with moods. What a host does with one request is drawn from the kinds of misbehaviour of the seed while its mood is bad.

Remembers what arrived and what was answered with 2xx: the truth that the dispatcher's rows are held against.
"""

import random
from collections.abc import Callable
from typing import Any

from dispatcher.domain.outcome import Fault, Outcome
from dispatcher.domain.url import Origin
from dispatcher.ports import Limits
from dispatcher.transport.memory import Dial, Reply
from tests.simulation.plan import Plan

HOSTS = 3


class Network:
    """`on_request(host, path, public id, attempt, request)` is told what arrives."""

    def __init__(self, plan: Plan, rng: random.Random) -> None:
        self.rng = rng
        self.hosts = {f"h{n}.test": Host(f"h{n}.test", plan, rng, self) for n in range(HOSTS)}
        self.limits = Limits(
            sockets_max=rng.choice((2, 6, 100)),
            sockets_per_origin_max=rng.choice((1, 3, 100)),
            idle_s=rng.choice((0.5, 5.0)),
            connect_s=1.0,
            headers_s=1.5,
        )
        self.on_request: Callable[[str, str, bytes, int, bytes], None] = lambda *_: None
        self.answered: set[tuple[str, bytes, int]] = set()  # path, public id, attempt: with 2xx
        self.requests = 0

    def find(self, origin: Origin) -> "Host | None":
        host = self.hosts[origin.host]
        return host if host.resolves else None

    def heal(self) -> None:
        for host in self.hosts.values():
            host.bad, host.resolves = 0.0, True


class Host:
    def __init__(self, name: str, plan: Plan, rng: random.Random, network: Network) -> None:
        self.name = name
        self.bad = 0.0  # how likely a request is met badly
        self.resolves = True
        self._rng = rng
        self._network = network
        self._replies = list(_replies(plan))
        self._dials = [Dial(0.0, Outcome(Fault.CONNECT, detail="refused")), Dial(5.0), Dial(0.3)]
        self._unreachable = plan.has("unreachable")
        self._slow = plan.has("slow answers")

    def change_mood(self) -> None:
        self.bad = self._rng.choice((0.0, 0.0, 0.3, 1.0))
        self.resolves = not (self._unreachable and self._rng.random() < 0.2)

    def dial(self) -> Dial:
        if self._unreachable and self._rng.random() < self.bad:
            return self._rng.choice(self._dials)
        return Dial(self._rng.choice((0.0, 0.002)))

    def take(self, request: bytes) -> Reply:
        self._network.requests += 1
        head, _, _ = request.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        path = lines[0].split(" ")[1]
        fields = dict(line.split(": ", 1) for line in lines[1:])
        public_id, attempt = fields["webhook-id"].encode(), int(fields["x-attempt"])
        self._network.on_request(self.name, path, public_id, attempt, request)
        reply = self._draw()
        if reply.status is not None and 200 <= reply.status <= 299 and reply.fault is None:
            self._network.answered.add((path, public_id, attempt))
        return reply

    def _draw(self) -> Reply:
        rng = self._rng
        if self._replies and rng.random() < self.bad:
            return rng.choice(self._replies)
        if self._slow and rng.random() < 0.1:
            return Reply(200, head_s=rng.uniform(0, 1.2), body_s=rng.uniform(0, 0.5))
        return Reply(200, head_s=rng.choice((0.0, 0.001, 0.02)))


def _replies(plan: Plan) -> Any:
    if plan.has("failing"):
        yield from (Reply(500), Reply(500), Reply(404), Reply(302), Reply(503, head_s=0.2))
    if plan.has("hanging"):
        yield from (Reply(None), Reply(200, head_s=9.0), Reply(200, body_s=9.0))
    if plan.has("resetting"):
        yield from (
            Reply(None, fault=Fault.RESET),
            Reply(200, fault=Fault.RESET, body_s=0.1),
            Reply(None, fault=Fault.PROTOCOL),
            Reply(200, then="close"),
        )
    if plan.has("throttling"):
        yield from (Reply(429, "1"), Reply(503, "2"), Reply(429))
    if plan.has("gone"):
        yield Reply(410)
    if plan.has("stale"):
        yield from (Reply(200, then="stale"), Reply(200, then="stale"), Reply(500, then="stale"))
