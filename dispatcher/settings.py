"""Every setting, once: name, default, bounds and what it is for.

Each is read from `DISPATCHER_<NAME>`, or from a TOML file (`--config`, or `DISPATCHER_CONFIG`), the environment
first. A bad value stops the start
with a sentence that names the setting. README's table is held to this one by a test.
"""

import ipaddress
import os
import re
import tomllib
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, FilePath, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from dispatcher.domain.address import AddressPolicy, ReceiverSite, parse_networks, parse_ports
from dispatcher.domain.mail import MailServer, check_address, parse_smtp
from dispatcher.domain.proxy import Proxy, parse_proxy
from dispatcher.domain.sealing import Keyring, parse_keys
from dispatcher.domain.url import receiver_site
from dispatcher.errors import InputError

ENV_PREFIX = "DISPATCHER_"
LOGO_TYPES = {
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
}
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
SECRETS = ("database_url", "proxy_url", "encryption_keys", "smtp_url")  # no message and no listing shows them
FROM_FILES = ("database_url", "proxy_url", "smtp_url")  # may be in a file; encryption_keys has one key a line there


# Names that begin as ours do and are none: where the settings are, and what `dispatcher listen` reads (cli/listen.py).
NO_SETTINGS = (f"{ENV_PREFIX}CONFIG", f"{ENV_PREFIX}API_URL", f"{ENV_PREFIX}API_KEY")


def default_data_dir() -> Path:
    if os.geteuid() == 0:
        return Path("/var/lib/dispatcher")
    return Path(os.environ.get("XDG_DATA_HOME", Path.home() / ".local/share")) / "dispatcher"


class Settings(BaseSettings):
    """The effective settings of one process. Immutable; made once by `load`."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True)

    # ── database ──
    database_url: str | None = Field(
        None,
        repr=False,
        description="PostgreSQL to use (postgresql://user:password@host/db). Unset: an embedded server in data_dir.",
    )
    database_url_file: FilePath | None = Field(None, description="File with the same; instead of the other.")
    data_dir: Path = Field(
        default_factory=default_data_dir, description="Where the embedded PostgreSQL keeps its data and its socket."
    )
    doorbell: Literal["on", "off"] = Field(
        "on",
        description="off: no NOTIFY from producers, the dispatcher polls (for two-phase commit). Applied by migrate.",
    )
    poll_ms: int = Field(5, ge=1, le=1000, description="How often an idle dispatcher polls when doorbell is off.")
    payload_bytes_max: int = Field(
        262_144, ge=1_024, le=16_777_216, description="Largest payload that the outbox accepts. Applied by migrate."
    )
    statement_timeout_s: float = Field(
        10, ge=0.5, le=300, description="A statement that takes longer counts as a database that is away."
    )

    # ── secrets ──
    encryption_keys: str | None = Field(
        None,
        repr=False,
        description="Keys for secrets at rest (base64 of 32 bytes, comma-separated): the first encrypts, all decrypt. Unset: plain text.",
    )
    encryption_keys_file: FilePath | None = Field(
        None, description="File with the same, one key a line; instead of the other."
    )

    # ── delivering ──
    slots: int = Field(4_000, ge=1, le=60_000, description="POSTs in flight in all.")
    in_flight_max: int = Field(
        100, ge=1, le=4_000, description="POSTs in flight per endpoint, unless the endpoint says otherwise."
    )
    sockets_max: int = Field(5_000, ge=1, le=64_000, description="Open sockets in all.")
    sockets_per_origin_max: int = Field(
        1_000, ge=1, le=64_000, description="Open sockets per origin (scheme, host, port)."
    )
    idle_socket_s: float = Field(30, ge=0.1, le=3_600, description="An idle connection is kept this long.")
    connect_timeout_s: float = Field(
        5, ge=0.1, le=60, description="Longest name look-up, connect and TLS handshake together."
    )
    headers_timeout_s: float = Field(
        10,
        ge=0.1,
        le=60,
        description="Longest wait for an answer's headers; an endpoint's own timeout bounds the whole POST.",
    )
    response_header_bytes_max: int = Field(
        32_768, ge=1_024, le=1_048_576, description="Longest head of an answer, 1xx answers included."
    )
    response_body_bytes_max: int = Field(
        65_536, ge=0, le=16_777_216, description="Body bytes read before the connection is dropped."
    )
    response_head_kept_bytes: int = Field(
        2_048, ge=0, le=65_536, description="What is kept of a failed attempt's answer."
    )
    transport: Literal["thin", "aiohttp"] = Field(
        "thin",
        description="Which HTTP client POSTs: our own, or aiohttp's, which costs several times as much CPU.",
    )
    proxy_url: str | None = Field(
        None,
        repr=False,
        description="Outbound proxy for all POSTs: http://user:password@host:port (CONNECT), or socks5://… with the extra `socks`.",
    )
    proxy_url_file: FilePath | None = Field(None, description="File with the same; instead of the other.")
    local_address: str | None = Field(
        None,
        description="Addresses that POSTs go out from, comma-separated: at most one IPv4 and one IPv6. Unset: the system chooses.",
    )
    dns_ttl_s: float = Field(30, ge=1, le=3_600, description="Upper bound on how long a looked-up address is used.")
    ca_file: FilePath | None = Field(
        None, description="CA bundle (PEM) for endpoints' certificates. Unset: the system's."
    )
    allow_http: bool = Field(False, description="Allow plain http:// endpoints anywhere.")
    allowed_networks: Annotated[str, NoDecode] = Field(
        "",
        description="Networks that endpoints may be in although they are private, comma-separated CIDRs; http:// is allowed there too.",
    )
    allowed_ports: Annotated[str, NoDecode] = Field(
        "80,443,1024-65535",
        description="Ports that endpoints' URLs may have, comma-separated, ranges too. Below 1024 other protocols listen.",
    )
    user_agent: str = Field(
        "dispatcher/1 (webhooks)", max_length=200, pattern=r"^[!-~][ -~]*$", description="User-Agent of every POST."
    )

    # ── lanes ──
    queue_events_max: int = Field(
        1_000, ge=1, le=100_000, description="Events queued in memory per endpoint; beyond that the lane lags."
    )
    memory_events_max: int = Field(20_000, ge=100, le=5_000_000, description="Events in memory in all.")
    memory_bytes_max: int = Field(
        67_108_864,
        ge=1_048_576,
        le=17_179_869_184,
        description="Payload bytes in memory in all.",
    )

    # ── retrying ──
    retry_schedule_s: Annotated[tuple[int, ...], NoDecode] = Field(
        (5, 30, 120, 600, 1_800, 3_600, 10_800, 21_600, 43_200, 86_400),
        description="Waits between attempts, comma-separated seconds; each is spread by ×0.8–1.2.",
    )
    retry_age_max_s: int = Field(
        259_200, ge=1, le=2_592_000, description="A delivery older than this since its first attempt is given up."
    )
    disable_after_s: int = Field(
        432_000, ge=60, le=31_536_000, description="An endpoint that failed this long without one success is disabled."
    )
    failing_after_s: int = Field(
        900,
        ge=0,
        le=31_536_000,
        description="An endpoint that failed this long without one success is told of as failing.",
    )
    breaker_failures: int = Field(
        7, ge=1, le=1_000, description="Consecutive failures that open an endpoint's breaker."
    )
    breaker_wait_s: float = Field(
        5, ge=0.05, le=3_600, description="First wait of an open breaker; doubles at each failed probe."
    )
    breaker_wait_max_s: float = Field(300, ge=0.05, le=86_400, description="Longest wait of an open breaker.")
    replay_rate_per_s: float = Field(
        200,
        ge=0.001,
        le=100_000,
        description="Deliveries a second of a resend or replay, unless it is given a rate of its own.",
    )

    # ── retention ──
    retention_days: float = Field(
        7,
        ge=0.01,
        le=3_650,
        description="Events and their attempts are kept this long, and until their whole partition is as old; longer than retry_age_max_s.",
    )
    retention_bytes_max: int | None = Field(
        None,
        ge=16_777_216,
        le=1 << 60,
        description="Above this size of events and attempts on disk the oldest partition goes before its time. Unset: no bound.",
    )
    dead_letter_retention_days: float = Field(
        30, ge=0.01, le=3_650, description="Dead letters and finished resends and replays are kept this long."
    )

    # ── recording and stopping ──
    record_rows_max: int = Field(
        5_000,
        ge=1,
        le=10_000,
        description="Results per recorded batch at most; with a fifth of that, none waits for more.",
    )
    record_wait_ms: int = Field(
        10, ge=0, le=1_000, description="How long the first result of a batch waits for others."
    )
    unrecorded_max: int = Field(
        20_000, ge=100, le=1_000_000, description="Results that may wait for the database; above, no POST starts."
    )
    grace_s: float = Field(
        15,
        ge=0,
        le=600,
        description="At SIGTERM, how long POSTs in flight may take to finish; a second at most while a standby waits to go on.",
    )

    # ── panel and API ──
    web_listen: str | None = Field(
        None,
        description="host:port where `run` serves panel and API. Unset: it doesn't; `dispatcher web` takes 127.0.0.1:8080.",
    )
    public_url: str | None = Field(
        None,
        description="What people and programs outside use for it: https://hooks.example.com/webhooks. Unset: http:// and where it listens.",
    )
    web_base_path: str | None = Field(
        None,
        description="The path before every path as requests arrive, if a proxy changes it. Unset: that of public_url.",
    )
    web_connect: str | None = Field(
        None,
        description="address:port at which this process reaches panel and API, for the built-in receiver. Unset: web_listen's.",
    )
    web_pool_size: int = Field(
        4, ge=1, le=50, description="Database connections of panel and API; two more for long work."
    )
    web_statement_timeout_s: float = Field(
        5, ge=0.1, le=120, description="Longest statement of a request; the counts before a replay too."
    )
    web_connections_max: int = Field(1_000, ge=10, le=20_000, description="Connections to panel and API in all.")
    endpoints_per_account_max: int = Field(
        100,
        ge=1,
        le=100_000,
        description="Endpoints that an account may make by panel and API; operators may make more.",
    )
    web_streams_max: int = Field(400, ge=1, le=10_000, description="Live streams of events to browsers in all.")
    frame_ancestors: str = Field(
        "", description="Origins that may show the panel in a frame, comma-separated. Needs an https:// public_url."
    )
    web_trusted_proxies: str = Field(
        "", description="Networks of proxies whose X-Forwarded-For is believed, and web_login_header, comma-separated."
    )
    web_login_header: str | None = Field(
        None,
        pattern=r"^[A-Za-z][A-Za-z0-9-]{0,63}$",
        description="Header in which a trusted proxy names the operator that it has let in, such as X-Forwarded-User.",
    )
    session_s: int = Field(43_200, ge=60, le=2_592_000, description="An operator's login lasts so long.")
    portal_session_s: int = Field(
        28_800, ge=60, le=2_592_000, description="A customer's login by a portal link lasts so long."
    )
    portal_link_s: int = Field(600, ge=10, le=604_800, description="A portal link can be opened for so long.")
    source_addresses: str = Field(
        "", description="Addresses that POSTs come from, comma-separated, for customers' firewalls. Told, not used."
    )
    product_name: str = Field(
        "Webhooks", min_length=1, max_length=60, description="What panel and API call themselves."
    )
    logo_url: str | None = Field(None, description="Logo in the panel: an https:// address.")
    logo_file: FilePath | None = Field(
        None, description="Logo in the panel: an SVG, PNG, JPEG or WebP file that it serves itself."
    )
    accent_color: str = Field(
        "#1f5fbf",
        pattern=r"^#[0-9a-fA-F]{6}$",
        description="Colour of buttons and links in the panel; on dark: accent_color_dark.",
    )
    accent_color_dark: str = Field(
        "#7fb0ff", pattern=r"^#[0-9a-fA-F]{6}$", description="The same on a dark background."
    )

    # ── mail ──
    smtp_url: str | None = Field(
        None,
        repr=False,
        description="Mail server for alerts: smtp://user:password@host:587 (STARTTLS), smtps://… (TLS) or smtp+plain://…. Unset: no mail.",
    )
    smtp_url_file: FilePath | None = Field(None, description="File with the same; instead of the other.")
    mail_from: str | None = Field(
        None, validate_default=True, description="Address that mails come from; needed with smtp_url."
    )
    mail_sender_name: str | None = Field(
        None, min_length=1, max_length=60, description="Name that mails come from. Unset: product_name."
    )
    alert_mails_per_hour: int = Field(
        10, ge=1, le=1_000, description="Mails an hour to an account's recipients; what is beyond is told in one."
    )

    # ── health and logs ──
    health_listen: str | None = Field(
        None,
        description="host:port of /livez, /readyz and /metrics, without a login: for machines of yours only. Unset: they aren't served.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Lowest level logged. SIGHUP reads it again, SIGUSR1 turns debug on and off."
    )
    log_format: Literal["auto", "json", "journal", "console"] = Field(
        "auto",
        description="journal: JSON with a priority for journald. auto: console on a terminal, journal under systemd, else json.",
    )
    log_repeats_per_minute: int = Field(
        20,
        ge=0,
        le=1_000_000,
        description="Lines a minute of one kind about one endpoint; the rest are counted in one. 0: no bound. On debug none is left out.",
    )

    @model_validator(mode="before")
    @classmethod
    def _read_secret_files(cls, values: Any) -> Any:
        """Put what a file holds in the place of the setting that it stands for."""
        values = dict(values)
        for name in FROM_FILES:
            path = values.get(f"{name}_file")
            if path is None:
                continue
            if values.get(name) is not None:
                raise ValueError(
                    f"{ENV_PREFIX}{name.upper()} and {ENV_PREFIX}{name.upper()}_FILE are both set; give one of the two"
                )
            try:
                values[name] = Path(path).read_text().strip() or None
            except (OSError, UnicodeDecodeError, TypeError) as exc:
                raise ValueError(f"{ENV_PREFIX}{name.upper()}_FILE can't be read: {exc}") from exc
            if values[name] is None:
                raise ValueError(f"{ENV_PREFIX}{name.upper()}_FILE: {path} is empty")
        return values

    @field_validator("retry_schedule_s", mode="before")
    @classmethod
    def _split_schedule(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = value.replace(",", " ").split()
        if not isinstance(value, list | tuple) or not 1 <= len(value) <= 50:
            raise ValueError("give 1 to 50 comma-separated seconds, such as 5,30,120")
        return value

    @field_validator("retry_schedule_s")
    @classmethod
    def _check_schedule(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if min(value) < 1:
            raise ValueError("every wait must be at least 1 second")
        return value

    @field_validator("allowed_networks", mode="before")
    @classmethod
    def _check_networks(cls, value: Any) -> Any:
        text = ",".join(map(str, value)) if isinstance(value, list | tuple) else value
        if not isinstance(text, str):
            raise ValueError("give networks separated by commas, such as 10.1.0.0/16,fd00:1::/48")
        try:
            parse_networks(text)
        except InputError as exc:
            raise ValueError(str(exc)) from exc
        return text

    @field_validator("database_url")
    @classmethod
    def _check_database_url(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():  # to asyncpg that would be a server on this machine
            raise ValueError("it is empty; give postgresql://user:password@host/db, or unset it for an embedded server")
        return value

    @field_validator("encryption_keys")
    @classmethod
    def _check_keys(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                parse_keys(value)
            except InputError as exc:
                raise ValueError(str(exc)) from exc
        return value

    @field_validator("encryption_keys_file")
    @classmethod
    def _check_keys_file(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if value is not None:
            if info.data.get("encryption_keys") is not None:
                raise ValueError(f"{ENV_PREFIX}ENCRYPTION_KEYS is set too; give one of the two")
            try:
                parse_keys(value.read_text())
            except (InputError, OSError, UnicodeDecodeError) as exc:
                raise ValueError(str(exc)) from exc
        return value

    @cached_property
    def keyring(self) -> Keyring:
        """The keys, as they were when they were first asked for: what one part of a process seals, all of it can open."""
        if self.encryption_keys is not None:
            return Keyring(parse_keys(self.encryption_keys))
        if self.encryption_keys_file is not None:
            return Keyring(parse_keys(self.encryption_keys_file.read_text()))
        return Keyring()

    @field_validator("allowed_ports", mode="before")
    @classmethod
    def _check_ports(cls, value: Any) -> Any:
        text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        try:
            parse_ports(text)
        except InputError as exc:
            raise ValueError(str(exc)) from exc
        return text

    @field_validator("proxy_url")
    @classmethod
    def _check_proxy(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                parse_proxy(value)
            except InputError as exc:
                raise ValueError(str(exc)) from exc
        return value

    @field_validator("smtp_url")
    @classmethod
    def _check_smtp(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                parse_smtp(value)
            except InputError as exc:
                raise ValueError(str(exc)) from exc
        return value

    @field_validator("mail_from")
    @classmethod
    def _check_mail_from(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None and info.data.get("smtp_url") is not None:
            raise ValueError("mails come from somebody: set it beside smtp_url")
        if value is not None:
            try:
                check_address(value)
            except InputError as exc:
                raise ValueError(str(exc)) from exc
        return value

    @field_validator("local_address")
    @classmethod
    def _check_local(cls, value: str | None) -> str | None:
        if value is not None:
            versions = [
                ipaddress.ip_address(part).version for part in _listed(value)
            ]  # its ValueError says what is wrong
            if not versions or len(set(versions)) != len(versions):
                raise ValueError("give one IPv4 address, one IPv6 address, or one of each")
        return value

    @field_validator("web_listen", "web_connect", "health_listen")
    @classmethod
    def _check_listen(cls, value: str | None) -> str | None:
        if value is not None:
            split_listen(value)
        return value

    @field_validator("public_url")
    @classmethod
    def _check_public_url(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parts = urlsplit(value)
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or parts.query
            or parts.fragment
            or "@" in parts.netloc
        ):
            raise ValueError("give an address such as https://hooks.example.com/webhooks")
        _check_path(parts.path)
        return value.rstrip("/")

    @field_validator("web_base_path")
    @classmethod
    def _check_base_path(cls, value: str | None) -> str | None:
        return None if value is None else _check_path(value)

    @field_validator("frame_ancestors")
    @classmethod
    def _check_ancestors(cls, value: str, info: ValidationInfo) -> str:
        if value and not (info.data.get("public_url") or "").startswith("https://"):
            raise ValueError("browsers keep a frame's cookies under https:// only; set public_url too")
        for origin in _listed(value):
            if not re.fullmatch(r"https?://(\*\.)?[A-Za-z0-9.-]+(:[0-9]{1,5})?", origin):
                raise ValueError(
                    "give origins separated by commas, such as https://app.example.com,https://*.example.org"
                )
        return value

    @field_validator("web_trusted_proxies", "source_addresses")
    @classmethod
    def _check_listed_networks(cls, value: str) -> str:
        for network in _listed(value):
            ipaddress.ip_network(network)  # its ValueError says what is wrong
        return value

    @field_validator("web_login_header")
    @classmethod
    def _check_login_header(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and not info.data.get("web_trusted_proxies"):
            raise ValueError("anybody could send it; say in web_trusted_proxies whom to believe")
        return value

    @field_validator("logo_url")
    @classmethod
    def _check_logo(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"https://[A-Za-z0-9.-]+(:[0-9]{1,5})?/[!#-&(-+\--:<-~]*", value):
            raise ValueError("give an https:// address of a picture")
        return value

    @field_validator("logo_file")
    @classmethod
    def _check_logo_file(cls, value: Path | None) -> Path | None:
        if value is not None and value.suffix.lower() not in LOGO_TYPES:
            raise ValueError(f"a logo's file ends in {', '.join(LOGO_TYPES)}")
        return value

    @field_validator("product_name", "mail_sender_name")
    @classmethod
    def _check_product_name(cls, value: str | None) -> str | None:
        if value is not None and not value.isprintable():
            raise ValueError("give printable characters")
        return value

    @property
    def local_addresses(self) -> tuple[str, ...]:
        return () if self.local_address is None else _listed(self.local_address)

    @property
    def frame_origins(self) -> tuple[str, ...]:
        return _listed(self.frame_ancestors)

    @property
    def trusted_proxies(self) -> tuple[Network, ...]:
        return tuple(ipaddress.ip_network(network) for network in _listed(self.web_trusted_proxies))

    @property
    def proxy(self) -> Proxy | None:
        return None if self.proxy_url is None else parse_proxy(self.proxy_url)

    @property
    def mail_server(self) -> MailServer | None:
        return None if self.smtp_url is None or self.mail_from is None else parse_smtp(self.smtp_url)

    @cached_property
    def address_policy(self) -> AddressPolicy:
        return AddressPolicy(
            allowed_networks=parse_networks(self.allowed_networks),
            allow_http=self.allow_http,
            ports=parse_ports(self.allowed_ports),
            receiver=self.receiver_site,
        )

    @property
    def receiver_site(self) -> ReceiverSite | None:
        """Where the built-in receiver is; None: the settings don't say where to reach it."""
        where = self.web_connect or self.web_listen
        if where is None:
            return None
        host, port = split_listen(where)
        host = _ONE_OF_ALL.get(host, host)
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return None  # a name may come to mean something else
        if port == 0:
            return None
        public = self.public_url or f"http://{f'[{host}]' if ':' in host else host}:{port}"
        mount = urlsplit(public).path if self.web_base_path is None else self.web_base_path
        return receiver_site(public, mount, host, port)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        path = os.environ.get("DISPATCHER_CONFIG")
        toml = (TomlConfigSettingsSource(settings_cls, Path(path)),) if path else ()
        return (init_settings, env_settings, *toml)


# Who listens on all addresses, or by this machine's name, is reached at:
_ONE_OF_ALL = {"0.0.0.0": "127.0.0.1", "::": "::1", "localhost": "127.0.0.1"}  # noqa: S104 - not bound to  # nosec B104


def split_listen(text: str) -> tuple[str, int]:
    """Split host:port, [::1]:port too."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 <= int(port) <= 65_535:
        raise ValueError("give host:port, such as 127.0.0.1:8080 or 0.0.0.0:8080")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _check_path(path: str) -> str:
    path = path.rstrip("/")
    if path and not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", path):
        raise ValueError("a path has plain words between slashes, such as /webhooks")
    return path


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def load(config: Path | None = None, **overrides: Any) -> Settings:
    """Read the settings from `overrides`, the environment and the TOML file, in that order.

    Raises InputError that names every bad setting, its value's source and the remedy.
    """
    if config is not None:
        os.environ["DISPATCHER_CONFIG"] = str(config)
    path = os.environ.get("DISPATCHER_CONFIG")
    if path and not Path(path).is_file():
        raise InputError(f"the settings file {path} does not exist; correct --config or DISPATCHER_CONFIG")
    unknown = sorted(
        name for name in os.environ if name.startswith(ENV_PREFIX) and name not in NO_SETTINGS and not _known(name)
    )
    if unknown:
        raise InputError(f"{unknown[0]} is not a setting; see `dispatcher run --help` or the table in README.md")
    try:
        return Settings(**overrides)
    except ValidationError as exc:
        raise InputError("\n".join(_explain(error, path) for error in exc.errors())) from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise InputError(f"the settings file {path} is not valid TOML: {exc}") from exc
    except OSError as exc:
        raise InputError(
            f"the settings file {path} can't be read: {exc.strerror}; let its group or this user read it"
        ) from exc


def _known(env_name: str) -> bool:
    return env_name[len(ENV_PREFIX) :].lower() in Settings.model_fields


def _explain(error: Any, path: str | None) -> str:
    if not error["loc"]:  # of two settings, which the sentence names
        return str(error["msg"].removeprefix("Value error, "))
    name = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        return f"{name} in {path} is not a setting; see the table in README.md"
    message = error["msg"].removeprefix("Value error, ")
    shown = "" if name in SECRETS else f" (got {error['input']!r})"
    return f"setting {ENV_PREFIX}{name.upper()}: {message}{shown}"
