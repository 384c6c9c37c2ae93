"""Secrets taken out of texts that others wrote: a library's error may show the URL, the DSN or the header that it was given."""

import re

HIDDEN = "***"
_MARKS = ("://", "whsec_", "whsk_", "earer ", "asic ", "assword")  # most texts have none, and cost a look
_SECRETS = re.compile(
    r"(?P<url>[a-z][a-z0-9+.-]*://)[^\s/@'\"]+@"  # user and password before a host
    r"|(?P<key>\b(?:whsec|whsk)_)[A-Za-z0-9+/=_-]+"  # what signs
    r"|(?P<header>\b(?:[Bb]earer|[Bb]asic) )[A-Za-z0-9+/=._~-]{8,}"
    r"|(?P<word>\b[Pp]assword['\"]?\s?[=:]\s?)(?:'[^']*'|\"[^\"]*\"|[^\s,;&'\"]+)"
)


def redact(text: str) -> str:
    """Return `text` with logins in URLs, signing secrets, credentials and passwords hidden."""
    if not any(mark in text for mark in _MARKS):
        return text
    return _SECRETS.sub(_hide, text)


def _hide(found: "re.Match[str]") -> str:
    kept = found["url"] or found["key"] or found["header"] or found["word"]
    return f"{kept}{HIDDEN}@" if found["url"] else f"{kept}{HIDDEN}"
