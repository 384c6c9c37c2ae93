"""The cookie of a login, and the token that a page must show before it changes anything.

The cookie is the login's id, when it ends, and a signature over both: nothing that isn't signed reaches the database.
What the login may do is in its row. The CSRF token is derived from the same key and id, so there is nothing to store;
a new login has new ones, and a cookie planted before a login is worth nothing after it.
"""

import hmac
from base64 import urlsafe_b64encode
from dataclasses import dataclass
from urllib.parse import urlsplit

from dispatcher.settings import Settings


@dataclass(frozen=True, slots=True)
class Cookies:
    """How this installation's cookie is written: name, path, and who may send it back."""

    name: str
    attributes: str

    @classmethod
    def of(cls, settings: Settings, base: str) -> "Cookies":
        is_secure = urlsplit(settings.public_url or "").scheme == "https"
        path = base or "/"
        attributes = f"Path={path}; HttpOnly"
        if settings.frame_origins:
            # In somebody else's frame: SameSite=None, and a jar of its own for each site that shows it.
            attributes += "; Secure; SameSite=None; Partitioned"
        else:
            attributes += "; Secure; SameSite=Lax" if is_secure else "; SameSite=Lax"
        prefix = ("__Host-" if path == "/" else "__Secure-") if is_secure else ""
        return cls(f"{prefix}webhooks_login", attributes)

    def put(self, value: str, max_age_s: int) -> str:
        """Return the value of Set-Cookie. (http.cookies doesn't know Partitioned before Python 3.14.)"""
        return f"{self.name}={value}; Max-Age={max_age_s}; {self.attributes}"

    def clear(self) -> str:
        return self.put("", 0)


def sign(key: bytes, login_id: int, expires: int) -> str:
    """Return the cookie's value. `expires`: seconds since 1970."""
    return f"{login_id}.{expires}.{_mac(key, f'login {login_id} {expires}')}"


def unsign(key: bytes, value: str, now: float) -> int | None:
    """Return the login's id if the value is signed and its time isn't over."""
    login_id, _, rest = value.partition(".")
    expires, _, mac = rest.partition(".")
    if not (_is_number(login_id) and _is_number(expires)) or not mac.isascii():
        return None
    if not hmac.compare_digest(mac, _mac(key, f"login {login_id} {expires}")) or int(expires) <= now:
        return None
    return int(login_id)


def csrf_token(key: bytes, login_id: int) -> str:
    return _mac(key, f"csrf {login_id}")


def is_csrf_token(key: bytes, login_id: int, given: str) -> bool:
    return given.isascii() and hmac.compare_digest(given, csrf_token(key, login_id))


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 19


def _mac(key: bytes, text: str) -> str:
    return urlsafe_b64encode(hmac.digest(key, text.encode(), "sha256")).rstrip(b"=").decode()
