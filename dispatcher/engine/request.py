"""The bytes of a POST: an endpoint's ready-made head, what differs per attempt, the event's body.

Rendered once per endpoint and once per attempt; there is no header dict on the way.
"""

from dispatcher.domain.signing import Signer
from dispatcher.domain.url import Target


def render_head(target: Target, user_agent: str) -> bytes:
    """Render what every request to an endpoint begins with, up to the value of `webhook-id`."""
    return (
        f"POST {target.request_target} HTTP/1.1\r\nhost: {target.host_header}\r\nuser-agent: {user_agent}\r\n"
        "content-type: application/json\r\nwebhook-id: "
    ).encode("ascii")


def render(head: bytes, signer: Signer, public_id: bytes, timestamp: bytes, number: int, body: bytes) -> bytes:
    """Render a whole request. `timestamp`: seconds since 1970, of this attempt; `number`: which attempt it is."""
    return (
        b"%b%b\r\nwebhook-timestamp: %b\r\nwebhook-signature: %b\r\nx-attempt: %d\r\ncontent-length: %d\r\n\r\n%b"
        % (head, public_id, timestamp, signer.sign(public_id, timestamp, body), number, len(body), body)
    )
