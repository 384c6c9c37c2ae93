"""A test's verdict: what happened in words, what its owner should do about it, and what is at fault."""

from dispatcher.domain.outcome import Fault, Outcome
from dispatcher.domain.text import clean

LOCATION_CHARS_MAX = 300

_BY_STATUS = {
    400: "the endpoint did not like the request; it must accept any JSON body with the webhook-… headers",
    401: "the endpoint wants a login; a receiver checks the signature instead",
    403: "the endpoint, or a firewall before it, forbids the request",
    404: "nothing is at this path; check the URL",
    405: "the path exists, but does not take POST",
    410: "Gone: the receiver says that this endpoint is no more; in operation this disables it",
    413: "the receiver's limit on body size is too low",
    429: "the receiver is limiting us; set a rate limit on the endpoint",
}

_BY_FAULT = {
    Fault.TIMEOUT: "no whole answer in time; answer first with 2xx and work afterwards",
    Fault.CONNECT: "no connection; is the server running and reachable from here, and the port right?",
    Fault.DNS: "the host name does not resolve; check its spelling",
    Fault.TLS: "no trusted TLS connection; the certificate must be valid for the host and its chain complete",
    Fault.PROTOCOL: "what came back is not HTTP/1.1; is the port right, and is it http where https is expected?",
    Fault.RESET: "the receiver closed the connection before a whole answer",
    Fault.BLOCKED: "the address may not be delivered to",
    Fault.STALE: "the receiver closed the connection before a whole answer",
}


# What to look at, in a word. `answer`: the receiver's code; `receiver`: its server, or the network before it.
_AT_FAULT = {
    Fault.TIMEOUT: "timeout",
    Fault.CONNECT: "receiver",
    Fault.DNS: "address",
    Fault.TLS: "certificate",
    Fault.PROTOCOL: "receiver",
    Fault.RESET: "receiver",
    Fault.BLOCKED: "address",
    Fault.STALE: "receiver",
}


def at_fault(outcome: Outcome) -> str | None:
    """Return what is at fault: redirect, certificate, address, timeout, receiver or answer; None if it passed."""
    if outcome.fault is None:
        return None
    if outcome.fault is not Fault.STATUS:
        return _AT_FAULT[outcome.fault]
    return "redirect" if 300 <= (outcome.status or 0) <= 399 else "answer"


def verdict(outcome: Outcome, location: str | None = None) -> str:
    """Return one sentence for the owner of the endpoint. `location`: where a redirect leads, as the receiver says."""
    if outcome.fault is None:
        return f"{outcome.status}: passed"
    if outcome.fault is not Fault.STATUS:
        detail = f" ({outcome.detail})" if outcome.detail else ""
        return f"{outcome.fault.value}: {_BY_FAULT[outcome.fault]}{detail}"
    status = outcome.status or 0
    if 300 <= status <= 399:
        final = f": {clean(location[:LOCATION_CHARS_MAX])}" if location else ""
        return f"{status}: redirects are not followed; give the final address{final}"
    if status in _BY_STATUS:
        return f"{status}: {_BY_STATUS[status]}"
    if status >= 500:
        return f"{status}: the receiver failed; its logs will say why"
    return f"{status}: only 2xx is success"
