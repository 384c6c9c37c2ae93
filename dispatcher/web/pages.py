"""Templates and static files: read once at the start, never from anywhere else.

A static file's address has the hash of its content (`/static/1a2b3c4d5e6f/base.css`), so browsers keep it for ever and a
new version is another address. Templates escape everything; scripts and styles are files, because the policy allows
neither inline.
"""

import asyncio
import hashlib
import math
import mimetypes
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import jinja2
import jinja2.bccache
import orjson
from aiohttp import web

from dispatcher.domain.text import amount
from dispatcher.settings import LOGO_TYPES, Settings
from dispatcher.web.turns import SLICE_S, others_first

HERE = Path(__file__).parent
TEMPLATES = (HERE / "panel" / "templates", HERE / "templates")
STATIC = (HERE / "panel" / "static", HERE / "static")
STATIC_BYTES_MAX = 1 << 20

OPERATORS_MENU = (("/overview", "Overview"),)
MENU = (
    ("/endpoints", "Endpoints"),
    ("/deliveries", "Deliveries"),
    ("/events", "Events"),
    ("/recover", "Recover"),
    ("/dead-letters", "Dead letters"),
    ("/catalogue", "Event types"),
    ("/alerts", "Alerts"),
    ("/receivers", "Receiver"),
    ("/api/v1/docs", "API"),
)  # of every page, for whoever is logged in

_TYPES = {
    ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml", ".woff2": "font/woff2", ".json": "application/json"
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StaticFile:
    name: str
    digest: str
    body: bytes
    content_type: str


class StaticFiles:
    """All static files of the panel, in memory; a few hundred kilobytes."""

    def __init__(self, settings: Settings) -> None:
        self._files: dict[str, StaticFile] = {}
        for directory in reversed(STATIC):
            for path in sorted(directory.rglob("*")) if directory.is_dir() else ():
                if path.is_file():
                    self._add(path.relative_to(directory).as_posix(), path.read_bytes(), _type_of(path))
        self._add("brand.css", _brand(settings).encode(), "text/css")
        if settings.logo_file is not None:
            suffix = settings.logo_file.suffix.lower()
            self._add(f"logo{suffix}", settings.logo_file.read_bytes(), LOGO_TYPES[suffix])

    def path(self, name: str) -> str:
        """Return the file's address below the base path. Raises KeyError for one that isn't there."""
        return f"/static/{self._files[name].digest}/{name}"

    def respond(self, digest: str, name: str) -> web.Response:
        found = self._files.get(name)
        if found is None or found.digest != digest:
            raise web.HTTPNotFound
        headers = {"Cache-Control": "public, max-age=31536000, immutable"}
        return web.Response(body=found.body, content_type=found.content_type, charset=_charset(found), headers=headers)

    def _add(self, name: str, body: bytes, content_type: str) -> None:
        assert len(body) <= STATIC_BYTES_MAX, f"{name} is too large to keep in memory"
        self._files[name] = StaticFile(name, hashlib.sha256(body).hexdigest()[:12], body, content_type)


class _Compiled(jinja2.BytecodeCache):
    """What templates were compiled to, for the life of the process: other installations in it (tests) needn't again."""

    def __init__(self) -> None:
        self._kept: dict[str, bytes] = {}

    def load_bytecode(self, bucket: jinja2.bccache.Bucket) -> None:
        if (kept := self._kept.get(bucket.key)) is not None:
            bucket.bytecode_from_string(kept)

    def dump_bytecode(self, bucket: jinja2.bccache.Bucket) -> None:
        self._kept[bucket.key] = bucket.bytecode_to_string()


_COMPILED = _Compiled()


_METHODS = frozenset(dir(dict))


class _Environment(jinja2.Environment):
    def getattr(self, obj: Any, attribute: str) -> Any:
        """Find the same as Jinja does. That asks a dict for a method of the name first, which costs an exception for each field of a row; here
        only where there is one: a filter may be called `items`."""
        if type(obj) is dict and attribute in obj and attribute not in _METHODS:
            return obj[attribute]
        return super().getattr(obj, attribute)


class Templates:
    """Jinja2, with what every page needs: `static(name)`, `url(path)`, `brand`."""

    def __init__(self, settings: Settings, files: StaticFiles, base: str) -> None:
        self._environment = _Environment(
            loader=jinja2.FileSystemLoader([directory for directory in TEMPLATES if directory.is_dir()]),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
            bytecode_cache=_COMPILED,
        )
        logo = settings.logo_url
        if settings.logo_file is not None:
            logo = base + files.path(f"logo{settings.logo_file.suffix.lower()}")
        self._environment.globals.update(
            static=lambda name: base + files.path(name),
            url=lambda path: base + path,
            menu=MENU,
            operators_menu=OPERATORS_MENU,
            brand={"name": settings.product_name, "logo": logo},
        )
        self._environment.filters["time"] = _time
        self._environment.filters["json"] = _json
        self._environment.filters["percent"] = _percent
        self._environment.filters["duration"] = _duration
        self._environment.filters["tone"] = tone
        self._environment.filters["amount"] = amount

        self._rendering = asyncio.Lock()

    def compile(self) -> None:
        """Compile all templates, so that no page's first visitor holds the loop with it: up to 40 ms each. Called in a thread, at the start."""
        for name in self._environment.list_templates(extensions=["html"]):
            self._environment.get_template(name)

    def render(self, name: str, context: dict[str, Any]) -> str:
        return self._environment.get_template(name).render(context)

    async def render_by_turns(self, name: str, context: dict[str, Any]) -> str:
        """Render in slices: a page takes up to 10 ms, and deliveries don't wait for it. One page at a time, or ten would have a slice each in a
        turn of the loop."""
        pieces = []
        async with self._rendering:
            began = perf_counter()
            for piece in self._environment.get_template(name).generate(context):
                pieces.append(piece)
                if perf_counter() - began > SLICE_S:
                    await others_first()
                    began = perf_counter()
        return "".join(pieces)


def tone(fate: str) -> str:
    """Return the class of what became of a delivery, in words as `dispatcher.store.fates` has them."""
    if fate.startswith("delivered"):
        return "good"
    if "dead letter" in fate or "failed" in fate:
        return "bad"
    return "warn" if "waiting for attempt" in fate else "muted"


def _json(value: Any) -> str:
    """Show JSON to people, in its own order; it is escaped as text. The standard library's, which indents in Python, took a tenth of a page."""
    return orjson.dumps(value, option=orjson.OPT_INDENT_2).decode()


def _time(at: datetime | None) -> str:
    """Show a moment to people; scripts turn <time datetime> into the reader's own zone."""
    return "–" if at is None else f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def _duration(seconds: int) -> str:
    for unit, of in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= of and seconds % of == 0:
            return f"{seconds // of} {unit}"
    return f"{seconds} s"


def _percent(share: float) -> str:
    """Show a share to people; what isn't all is never rounded up to it."""
    return f"{math.floor(share * 1_000) / 10:g} %"


def _brand(settings: Settings) -> str:
    return (
        f":root {{ --accent: {settings.accent_color}; }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ --accent: {settings.accent_color_dark}; }} }}\n"
    )


def _type_of(path: Path) -> str:
    return _TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0] or "application/octet-stream"


def _charset(file: StaticFile) -> str | None:
    return "utf-8" if file.content_type.startswith("text/") else None
