"""The bytes of a POST: an endpoint's ready-made head, what differs per attempt, the body.

Rendered once per endpoint and once per attempt; there is no header dict on the way. An endpoint's own headers and its authentication are part
of the head. Where the endpoint wants another body than the envelope that all share, or an extra signature, `ShapedRequests` does
that; all others are `Requests` and know nothing of it.
"""

from collections.abc import Iterable, Sequence

from dispatcher.domain.event import Event
from dispatcher.domain.pointer import tree_of, without
from dispatcher.domain.shape import Shape
from dispatcher.domain.signing import Signer, make_signer
from dispatcher.domain.url import Target


def render_head(target: Target, user_agent: str, headers: Iterable[tuple[str, str]] = ()) -> bytes:
    """Render what every request to an endpoint begins with, up to the value of `webhook-id`."""
    own = "".join([f"{name}: {value}\r\n" for name, value in headers])
    return (
        f"POST {target.request_target} HTTP/1.1\r\nhost: {target.host_header}\r\nuser-agent: {user_agent}\r\n"
        f"content-type: application/json\r\n{own}webhook-id: "
    ).encode("ascii")


def make_requests(target: Target, user_agent: str, secrets: Sequence[str], shape: Shape) -> "Requests":
    """Prepare what renders the requests to an endpoint."""
    head = render_head(target, user_agent, shape.headers)
    signer = make_signer(secrets)
    return Requests(head, signer) if shape.is_plain else ShapedRequests(head, signer, shape)


class Requests:
    """Renders whole requests. `timestamp`: seconds since 1970, of this attempt; `number`: which attempt it is."""

    __slots__ = ("_head", "_signer")

    def __init__(self, head: bytes, signer: Signer) -> None:
        self._head = head
        self._signer = signer

    def render(self, event: Event, timestamp: bytes, number: int) -> bytes:
        public_id, body = event.public_id, event.envelope()
        return b"%b%b\r\nwebhook-timestamp: %b\r\nwebhook-signature: %b\r\n%bx-attempt: %d\r\ncontent-length: %d\r\n\r\n%b" % (
            self._head, public_id, timestamp, self._signer.sign(public_id, timestamp, body),
            b"" if event.traceparent is None else b"traceparent: %b\r\n" % event.traceparent, number, len(body), body,
        )  # fmt: skip


class ShapedRequests(Requests):
    __slots__ = ("_shape", "_tree")

    def __init__(self, head: bytes, signer: Signer, shape: Shape) -> None:
        super().__init__(head, signer)
        self._shape = shape
        self._tree = tree_of(shape.pointers) if shape.pointers else None

    def render(self, event: Event, timestamp: bytes, number: int) -> bytes:
        shape, public_id = self._shape, event.public_id
        data = event.payload if self._tree is None else without(event.payload, self._tree)
        body = data if shape.bare else event.wrap(data)
        extra = b"" if event.traceparent is None else b"traceparent: %b\r\n" % event.traceparent
        if shape.extra_signature is not None:
            name = shape.extra_signature.header.encode()
            extra += b"%b: %b\r\n" % (name, shape.extra_signature.value(timestamp, body))
        return (
            b"%b%b\r\nwebhook-timestamp: %b\r\nwebhook-signature: %b\r\n%bx-attempt: %d\r\ncontent-length: %d\r\n\r\n%b"
            % (
                self._head, public_id, timestamp, self._signer.sign(public_id, timestamp, body), extra, number, len(body), body
            )
        )  # fmt: skip
