"""Every setting's bounds, where its value comes from, and what is said about a bad one."""

import os
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from annotated_types import Ge, Le, MaxLen

from dispatcher import settings as settings_module
from dispatcher.domain.address import parse_networks
from dispatcher.domain.proxy import Proxy
from dispatcher.errors import InputError
from dispatcher.settings import ENV_PREFIX, Settings, load

FIELDS = Settings.model_fields


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith(ENV_PREFIX)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("DISPATCHER_CONFIG", "")  # so that what `load` writes there is undone
    monkeypatch.delenv("DISPATCHER_CONFIG")


@pytest.fixture
def toml(tmp_path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "settings.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def refusal(config: Path | None = None, **overrides: Any) -> str:
    with pytest.raises(InputError) as caught:
        load(config, **overrides)
    return str(caught.value)


# Bounds


def bound(name: str, kind: type) -> Any:
    (limit,) = [m for m in FIELDS[name].metadata if isinstance(m, kind)] or [None]
    return limit


NUMBERS = sorted(name for name, field in FIELDS.items() if field.annotation in (int, float))
BOUNDS = {  # setting: least, most. Written down once more, so that a bound that moves is a decision
    "poll_ms": (1, 1_000),
    "payload_bytes_max": (1_024, 16_777_216),
    "statement_timeout_s": (0.5, 300),
    "slots": (1, 60_000),
    "in_flight_max": (1, 4_000),
    "sockets_max": (1, 64_000),
    "sockets_per_origin_max": (1, 64_000),
    "idle_socket_s": (0.1, 3_600),
    "connect_timeout_s": (0.1, 60),
    "headers_timeout_s": (0.1, 60),
    "response_header_bytes_max": (1_024, 1_048_576),
    "response_body_bytes_max": (0, 16_777_216),
    "response_head_kept_bytes": (0, 65_536),
    "dns_ttl_s": (1, 3_600),
    "queue_events_max": (1, 100_000),
    "memory_events_max": (100, 5_000_000),
    "memory_bytes_max": (1_048_576, 17_179_869_184),
    "retry_age_max_s": (1, 2_592_000),
    "disable_after_s": (60, 31_536_000),
    "failing_after_s": (0, 31_536_000),
    "alert_mails_per_hour": (1, 1_000),
    "breaker_failures": (1, 1_000),
    "breaker_wait_s": (0.05, 3_600),
    "breaker_wait_max_s": (0.05, 86_400),
    "replay_rate_per_s": (0.001, 100_000),
    "retention_days": (0.01, 3_650),
    "dead_letter_retention_days": (0.01, 3_650),
    "record_rows_max": (1, 10_000),
    "record_wait_ms": (0, 1_000),
    "unrecorded_max": (100, 1_000_000),
    "grace_s": (0, 600),
    "web_pool_size": (1, 50),
    "web_statement_timeout_s": (0.1, 120),
    "web_connections_max": (10, 20_000),
    "web_streams_max": (1, 10_000),
    "endpoints_per_account_max": (1, 100_000),
    "session_s": (60, 2_592_000),
    "portal_session_s": (60, 2_592_000),
    "portal_link_s": (10, 604_800),
    "log_repeats_per_minute": (0, 1_000_000),
}


def test_every_number_has_bounds():
    assert {name: (bound(name, Ge).ge, bound(name, Le).le) for name in NUMBERS} == BOUNDS


@pytest.mark.parametrize("name", BOUNDS)
def test_a_number_at_its_bounds_and_beyond(name, monkeypatch):
    env_name = ENV_PREFIX + name.upper()
    least, most = BOUNDS[name]
    for value in (least, most):
        monkeypatch.setenv(env_name, str(value))
        assert getattr(load(), name) == value
    step = 1 if FIELDS[name].annotation is int else 0.01
    for value, words in ((least - step, "greater than or equal"), (most + step, "less than or equal")):
        monkeypatch.setenv(env_name, str(value))
        text = refusal()
        assert text.startswith(f"setting {env_name}: ")
        assert words in text
        assert text.endswith(f"(got '{value}')")
    for value in ("", "many", "nan", "inf", "-inf", "1e999"):
        monkeypatch.setenv(env_name, value)
        assert refusal().startswith(f"setting {env_name}: ")


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("doorbell", ("on", "off")),
        ("transport", ("thin", "aiohttp")),
        ("log_level", ("debug", "info", "warning", "error")),
        ("log_format", ("auto", "json", "journal", "console")),
    ],
)
def test_a_choice(name, choices, monkeypatch):
    assert (get_origin(FIELDS[name].annotation), get_args(FIELDS[name].annotation)) == (Literal, choices)
    env_name = ENV_PREFIX + name.upper()
    for choice in choices:
        monkeypatch.setenv(env_name, choice)
        assert getattr(load(), name) == choice
    monkeypatch.setenv(env_name, "loud")
    text = refusal()
    assert text.startswith(f"setting {env_name}: ")
    assert all(choice in text for choice in choices)


def test_the_length_of_the_user_agent():
    assert load(user_agent="x" * 200).user_agent == "x" * 200
    assert bound("user_agent", MaxLen).max_length == 200
    for value in ("", "x" * 201, " leading", "a\r\nx-injected: 1", "a\x00b", "ünïcode"):
        assert "DISPATCHER_USER_AGENT" in refusal(user_agent=value)


@pytest.mark.parametrize(("value", "allowed"), [("true", True), ("1", True), ("off", False), ("0", False)])
def test_a_switch(value, allowed, monkeypatch):
    monkeypatch.setenv("DISPATCHER_ALLOW_HTTP", value)
    assert load().allow_http is allowed
    monkeypatch.setenv("DISPATCHER_ALLOW_HTTP", "perhaps")
    assert refusal().startswith("setting DISPATCHER_ALLOW_HTTP: ")


@pytest.mark.parametrize(
    ("value", "schedule"),
    [
        ("5", (5,)),
        ("5,30,120", (5, 30, 120)),
        (" 5, 30 ,120,", (5, 30, 120)),
        ("5 30", (5, 30)),
        (",".join(["1"] * 50), (1,) * 50),
        ([5, 30], (5, 30)),
        ((5, 30), (5, 30)),
    ],
)
def test_a_retry_schedule(value, schedule):
    assert load(retry_schedule_s=value).retry_schedule_s == schedule


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("", "give 1 to 50"),
        (" , ", "give 1 to 50"),
        ([], "give 1 to 50"),
        (",".join(["1"] * 51), "give 1 to 50"),
        (5, "give 1 to 50"),
        (None, "give 1 to 50"),
        ({"a": 1}, "give 1 to 50"),
        ("5,0", "at least 1 second"),
        ("-5", "at least 1 second"),
        ("5,soon", "valid integer"),
        ("1.5", "valid integer"),
        ([[5]], "valid integer"),
    ],
)
def test_a_bad_retry_schedule(value, words):
    text = refusal(retry_schedule_s=value)
    assert text.startswith("setting DISPATCHER_RETRY_SCHEDULE_S: ")
    assert words in text


@pytest.mark.parametrize(
    ("value", "networks"),
    [
        ("", ""),
        ("10.1.0.0/16, fd00:1::/48", "10.1.0.0/16 fd00:1::/48"),
        (["10.1.0.0/16", "::1"], "10.1.0.0/16 ::1"),
        ([], ""),
    ],
)
def test_allowed_networks(value, networks):
    settings = load(allowed_networks=value, allow_http=True)
    assert settings.address_policy.allowed_networks == parse_networks(networks)
    assert settings.address_policy.allow_http
    assert not load().address_policy.allow_http


@pytest.mark.parametrize(
    "value", ["10.0.0.0/33", "everywhere", "10.0.0.1/8", ["10.0.0.0/8", "x"], [5, "x"], 5, None, {"a": 1}]
)
def test_bad_allowed_networks(value):
    assert refusal(allowed_networks=value).startswith("setting DISPATCHER_ALLOWED_NETWORKS: ")


@pytest.mark.parametrize("value", ["443,8000-8999", "443 8000-8999", ["443", "8000-8999"]])
def test_allowed_ports(value):
    assert load(allowed_ports=value).address_policy.ports == (range(443, 444), range(8000, 9000))
    assert load(allowed_ports=443).address_policy.ports == (range(443, 444),)


@pytest.mark.parametrize("value", ["", "0", "65536", "443-80", "https", "443;80"])
def test_bad_allowed_ports(value):
    assert refusal(allowed_ports=value).startswith("setting DISPATCHER_ALLOWED_PORTS: ")


@pytest.mark.parametrize(
    ("value", "proxy"),
    [
        (None, None),
        ("http://proxy.example.com:3128", Proxy("http", "proxy.example.com", 3128)),
        ("http://u:%C3%BC%40@10.0.0.1:80/", Proxy("http", "10.0.0.1", 80, "u", "ü@")),
        ("socks5://u:p@[2600::1]:1080", Proxy("socks5", "2600::1", 1080, "u", "p")),
        ("HTTP://Proxy:1", Proxy("http", "proxy", 1)),
    ],
)
def test_a_proxy(value, proxy, monkeypatch):
    assert load(proxy_url=value).proxy == proxy
    if value is not None:
        monkeypatch.setenv("DISPATCHER_PROXY_URL", value)
        assert load().proxy == proxy


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("", "begins with http:// or socks5://"),
        ("proxy.example.com:3128", "begins with"),
        ("https://u:hunter2@h:1", "begins with"),
        ("socks4://u:hunter2@h:1", "begins with"),
        ("socks5h://u:hunter2@h:1", "write socks5"),
        ("http://u:hunter2@h", "a scheme, a host and a port"),
        ("http://u:hunter2@:1", "a scheme, a host and a port"),
        ("http://u:hunter2@h:0", "a scheme, a host and a port"),
        ("http://u:hunter2@h:1/path", "a scheme, a host and a port"),
        ("http://u:hunter2@h:1?x", "a scheme, a host and a port"),
        ("http://u:hunter2@h:99999", "not a proxy's URL"),
        ("http://u:hunter2@h:x", "not a proxy's URL"),
        ("http://u:hunter2@[::1:1", "not a proxy's URL"),
        ("http://hunter2@h:1", "a user and a password"),
        ("http://:hunter2@h:1", "a user and a password"),
        ("http://a%3Ab:hunter2@h:1", "colon"),
        ("http://u:hunter2" + "x" * 255 + "@h:1", "255 bytes"),
        ("socks5://u:hunter2%C3%BC@h:1", "ASCII"),
        (["hunter2"], "valid string"),
    ],
)
def test_a_bad_proxy(value, words):
    text = refusal(proxy_url=value)
    assert text.startswith("setting DISPATCHER_PROXY_URL: ")
    assert words in text
    assert "hunter2" not in text


def test_no_listing_shows_the_proxy(monkeypatch):
    monkeypatch.setenv("DISPATCHER_PROXY_URL", "http://u:hunter2@h:1")
    settings = load()
    assert "hunter2" not in f"{settings} {settings!r} {settings.proxy!r}"
    monkeypatch.setenv("DISPATCHER_SLOTS", "0")
    assert "hunter2" not in refusal()


KEY, OTHER = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=", "AQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA="


def test_encryption_keys_from_a_variable_or_a_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# first\n{KEY}\n{OTHER}\n")
    assert load().keyring.first_id is None
    given, read = load(encryption_keys=f"{KEY},{OTHER}"), load(encryption_keys_file=str(file))
    assert repr(given.keyring) == repr(read.keyring)
    assert given.keyring.first_id == load(encryption_keys=KEY).keyring.first_id
    for text in (repr(given), str(given), repr(given.keyring)):
        assert KEY not in text


@pytest.mark.parametrize("value", ["", "hunter2", "aHVudGVyMg==", f"{KEY},{KEY}", ["hunter2"]])
def test_bad_encryption_keys(value, tmp_path):
    text = refusal(encryption_keys=value)
    assert text.startswith("setting DISPATCHER_ENCRYPTION_KEYS: ")
    assert "hunter2" not in text
    assert KEY not in text
    if isinstance(value, str):
        file = tmp_path / "keys"
        file.write_text(value)
        text = refusal(encryption_keys_file=str(file))
        assert text.startswith("setting DISPATCHER_ENCRYPTION_KEYS_FILE: ")
        assert "hunter2" not in text
        assert KEY not in text


def test_encryption_keys_are_given_once(tmp_path):
    file = tmp_path / "keys"
    file.write_text(KEY)
    assert "give one of the two" in refusal(encryption_keys=KEY, encryption_keys_file=str(file))
    assert refusal(encryption_keys_file=str(tmp_path / "none")).startswith("setting DISPATCHER_ENCRYPTION_KEYS_FILE: ")
    file.write_bytes(b"\xff\xfe")
    assert refusal(encryption_keys_file=str(file)).startswith("setting DISPATCHER_ENCRYPTION_KEYS_FILE: ")


def test_a_bound_of_the_logs_size_is_optional(monkeypatch):
    assert load().retention_bytes_max is None
    monkeypatch.setenv("DISPATCHER_RETENTION_BYTES_MAX", "16777216")
    assert load().retention_bytes_max == 16_777_216
    for value in ("16777215", str((1 << 60) + 1), "much"):
        monkeypatch.setenv("DISPATCHER_RETENTION_BYTES_MAX", value)
        assert refusal().startswith("setting DISPATCHER_RETENTION_BYTES_MAX: ")


# Panel and API: setting, (good values, bad values)

WEB = [
    ("web_listen", ("127.0.0.1:8080", "[::1]:0", "localhost:65535"), ("8080", "a:b", "a:65536", ":80")),
    ("web_connect", ("127.0.0.1:8080", "[::1]:1"), ("8080", "a:65536")),
    ("public_url", ("https://a.example", "http://a:1/b/c"), ("a.example", "ftp://a", "https://a/?b", "https://u:p@a/", "https://a/b c")),
    ("web_base_path", ("", "/a", "/a/b-c"), ("a", "/a b", "//a", "/{a}")),
    ("web_trusted_proxies", ("", "10.0.0.0/8, ::1"), ("10.0.0.1/8", "proxy")),
    ("health_listen", ("0.0.0.0:9090", "[::1]:0"), ("9090", "h:port")),
    ("local_address", ("192.0.2.1", "2001:db8::1, 192.0.2.1"), ("", "eth0", "192.0.2.1,192.0.2.2", "192.0.2.0/24")),
    ("source_addresses", ("192.0.2.1,2001:db8::/32",), ("many",)),
    ("mail_from", ("alerts@acme.example",), ("alerts", "a@b\nc", "A <a@b.example>")),
    ("mail_sender_name", ("Acme",), ("", "a\nb", "x" * 61)),
    ("product_name", ("Acme hooks",), ("", "a\nb", "x" * 61)),
    ("logo_url", ("https://a.example/logo.svg?v=2",), ("http://a.example/l.svg", "https://a.example/;b", "javascript:alert(1)")),
    ("logo_file", (), (__file__, "/nothing/here.svg")),
    ("accent_color", ("#12abEF",), ("red", "#fff", "#12345g", "#123456;")),
    ("accent_color_dark", ("#12abef",), ("#fff",)),
    ("frame_ancestors", ("",), ("https://app.example.com",)),  # without a public_url of https://
    ("web_login_header", (), ("X-User",)),  # without trusted proxies
]  # fmt: skip


@pytest.mark.parametrize(("name", "good", "bad"), WEB, ids=lambda v: v if isinstance(v, str) else "")
def test_panel_and_api(name, good, bad):
    for value in good:
        assert getattr(load(**{name: value}), name) == value
    for value in bad:
        assert refusal(**{name: value}).startswith(f"setting {ENV_PREFIX}{name.upper()}: ")


def test_what_a_frame_and_a_proxy_need():
    settings = load(
        public_url="https://a.example/hooks/", frame_ancestors="https://app.example.com, https://*.b.example:8443"
    )
    assert settings.public_url == "https://a.example/hooks"
    assert settings.frame_origins == ("https://app.example.com", "https://*.b.example:8443")
    for origin in ("app.example.com", "https://a.example/path", "*", "https://a;b"):
        assert "origins" in refusal(public_url="https://a.example", frame_ancestors=origin)
    assert load(web_trusted_proxies="10.0.0.1", web_login_header="X-User").web_login_header == "X-User"
    assert refusal(web_trusted_proxies="10.0.0.1", web_login_header="X User").startswith(
        "setting DISPATCHER_WEB_LOGIN_HEADER: "
    )


def test_a_logo(tmp_path):
    logo = tmp_path / "logo.svg"
    logo.write_text("<svg/>")
    assert load(logo_file=logo).logo_file == logo


def test_paths_and_texts():
    settings = load(data_dir="/a/b", ca_file=__file__, database_url="postgresql://h/d")
    assert (settings.data_dir, settings.ca_file, settings.database_url) == (
        Path("/a/b"),
        Path(__file__),
        "postgresql://h/d",
    )
    assert refusal(ca_file=5).startswith("setting DISPATCHER_CA_FILE: ")


def test_every_setting_is_tried_here():
    tried = {
        *BOUNDS,
        "doorbell",
        "transport",
        "proxy_url",
        "smtp_url",  # tests/mail/test_mailer.py
        "log_level",
        "log_format",
        "user_agent",
        "allow_http",
        "retry_schedule_s",
        "allowed_networks",
        "allowed_ports",
        "retention_bytes_max",
        "encryption_keys",
        "encryption_keys_file",
        *(f"{name}_file" for name in settings_module.FROM_FILES),
        *(name for name, _, _ in WEB),
    }
    assert set(FIELDS) == tried | {"data_dir", "ca_file", "database_url"}


def test_every_setting_says_what_it_is_for():
    for name, field in FIELDS.items():
        assert field.description, name
        assert field.description.endswith("."), name


def test_the_defaults_are_good():
    settings = Settings.model_validate(load().model_dump())
    assert settings == load()
    for name in BOUNDS:
        assert BOUNDS[name][0] <= getattr(settings, name) <= BOUNDS[name][1]


def test_settings_do_not_change():
    with pytest.raises(ValueError, match="frozen"):
        load().slots = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("euid", "xdg", "path"),
    [
        (0, None, "/var/lib/dispatcher"),
        (0, "/x", "/var/lib/dispatcher"),
        (1000, "/x", "/x/dispatcher"),
        (1000, None, "/home/u/.local/share/dispatcher"),
    ],
)
def test_where_data_is_kept(euid, xdg, path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: euid)
    monkeypatch.setenv("HOME", "/home/u")
    if xdg is None:
        monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_DATA_HOME", xdg)
    assert load().data_dir == Path(path)


# Where values come from


def test_an_override_goes_before_the_environment_the_file_and_the_default(toml, monkeypatch):
    default = load().slots
    path = toml("slots = 11\nin_flight_max = 12\npoll_ms = 13\n")
    monkeypatch.setenv("DISPATCHER_SLOTS", "21")
    monkeypatch.setenv("DISPATCHER_IN_FLIGHT_MAX", "22")
    settings = load(path, slots=31)
    assert (settings.slots, settings.in_flight_max, settings.poll_ms) == (31, 22, 13)
    assert default not in (11, 21, 31)


def test_the_environment_may_name_the_file(toml, monkeypatch):
    monkeypatch.setenv("DISPATCHER_CONFIG", str(toml("slots = 11")))
    assert load().slots == 11


def test_a_file_may_hold_every_setting(toml):
    settings = load(
        toml(
            'database_url = "postgresql://h/d"\nretry_schedule_s = [5, 30]\nallowed_networks = ["10.0.0.0/8", "::1"]\n'
            f'allow_http = true\ngrace_s = 1.5\nlog_level = "debug"\nca_file = "{__file__}"\n'
        )
    )
    assert (settings.retry_schedule_s, settings.allow_http, settings.grace_s) == ((5, 30), True, 1.5)
    assert settings.address_policy.allowed_networks == parse_networks("10.0.0.0/8 ::1")


FILED = {
    "database_url": "postgresql://u:hunter2@h/d",
    "proxy_url": "http://u:hunter2@proxy.example:3128",
    "smtp_url": "smtp://u:hunter2@mail.example:587",
}


@pytest.mark.parametrize("value", ["", "  "])
def test_an_empty_database_url_is_no_other_database(value):
    assert refusal(database_url=value).startswith("setting DISPATCHER_DATABASE_URL: it is empty")


@pytest.mark.parametrize("name", settings_module.FROM_FILES)
def test_a_secret_may_be_in_a_file(name, toml, tmp_path, monkeypatch):
    secret = tmp_path / "secret"
    secret.write_text(f"{FILED[name]}\n")
    monkeypatch.setenv("DISPATCHER_MAIL_FROM", "a@b.example")
    assert getattr(load(toml(f'{name}_file = "{secret}"')), name) == FILED[name]
    monkeypatch.delenv("DISPATCHER_CONFIG")
    monkeypatch.setenv(f"DISPATCHER_{name.upper()}_FILE", str(secret))
    settings = load()
    assert getattr(settings, name) == FILED[name]
    assert "hunter2" not in repr(settings)
    monkeypatch.setenv(f"DISPATCHER_{name.upper()}", FILED[name])
    text = refusal()
    assert f"DISPATCHER_{name.upper()} and DISPATCHER_{name.upper()}_FILE are both set" in text
    assert "hunter2" not in text
    monkeypatch.delenv(f"DISPATCHER_{name.upper()}")
    secret.write_text("\n")
    assert f"DISPATCHER_{name.upper()}_FILE: {secret} is empty" in refusal()
    secret.write_bytes(b"\xff\xfe")
    assert f"DISPATCHER_{name.upper()}_FILE can't be read" in refusal()
    monkeypatch.setenv(f"DISPATCHER_{name.upper()}_FILE", str(tmp_path / "none"))
    assert f"DISPATCHER_{name.upper()}_FILE" in refusal()


def test_a_bad_value_in_a_file_is_not_shown(tmp_path, monkeypatch):
    secret = tmp_path / "secret"
    secret.write_text("ftp://u:hunter2@h")
    monkeypatch.setenv("DISPATCHER_PROXY_URL_FILE", str(secret))
    text = refusal()
    assert text.startswith("setting DISPATCHER_PROXY_URL: ")
    assert "hunter2" not in text


# What is said about a bad one


def test_all_bad_settings_are_named_at_once(toml, monkeypatch):
    monkeypatch.setenv("DISPATCHER_SLOTS", "0")
    lines = refusal(toml("poll_ms = 0\nretry_schedule_s = 5\n")).splitlines()
    assert [line.split(":")[0] for line in sorted(lines)] == [
        "setting DISPATCHER_POLL_MS",
        "setting DISPATCHER_RETRY_SCHEDULE_S",
        "setting DISPATCHER_SLOTS",
    ]


def test_what_listen_reads_is_no_unknown_name(monkeypatch):
    monkeypatch.setenv("DISPATCHER_API_URL", "https://hooks.example.com")
    monkeypatch.setenv("DISPATCHER_API_KEY", "dk_x")
    assert load() == load()


def test_a_file_that_may_not_be_read_is_told_as_such(toml, monkeypatch):
    path = toml("slots = 5")

    def refused(**_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(settings_module, "Settings", refused)
    assert (
        refusal(path)
        == f"the settings file {path} can't be read: Permission denied; let its group or this user read it"
    )


@pytest.mark.parametrize("name", ["DISPATCHER_SLOT", "DISPATCHER_", "DISPATCHER_CONFIGS", "DISPATCHER_SLOTS_"])
def test_an_unknown_name_in_the_environment_is_refused(name, monkeypatch):
    monkeypatch.setenv(name, "hunter2")
    text = refusal()
    assert text.startswith(f"{name} is not a setting")
    assert "hunter2" not in text


def test_others_environment_is_none_of_our_business(monkeypatch):
    monkeypatch.setenv("DISPATCH_SLOTS", "0")
    monkeypatch.setenv("SLOTS", "0")
    assert load() == load()


def test_an_unknown_name_in_the_file_is_refused(toml):
    path = toml('slot = "hunter2"')
    assert refusal(path) == f"slot in {path} is not a setting; see the table in README.md"


@pytest.mark.parametrize("content", ["slots = ", "slots 5", b"\xff = 1", 'a = "', "slots = 1\nslots = 2"])
def test_a_file_that_is_no_toml_is_refused(content, toml):
    path = toml(content)
    assert refusal(path).startswith(f"the settings file {path} is not valid TOML: ")


def test_a_file_that_is_not_there_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "none.toml"
    assert refusal(path) == f"the settings file {path} does not exist; correct --config or DISPATCHER_CONFIG"
    assert "does not exist" in refusal(tmp_path)  # a directory
    monkeypatch.setenv("DISPATCHER_CONFIG", str(path))
    assert "does not exist" in refusal()


@pytest.mark.parametrize(
    "text",
    [
        'database_url = ["postgresql://u:hunter2@h/d"]',
        'database_uri = "postgresql://u:hunter2@h/d"',
        "[database_url]\nx = 'postgresql://u:hunter2@h/d'",
        "database_url = 'postgresql://u:hunter2@h/d'\nslots = 0",
        "database_url = 'postgresql://u:hunter2@h/d",
        "database_url = postgresql://u:hunter2@h/d",
    ],
)
def test_no_error_shows_the_database_url(text, toml):
    assert "hunter2" not in refusal(toml(text))


def test_no_listing_shows_the_database_url(monkeypatch):
    monkeypatch.setenv("DISPATCHER_DATABASE_URL", "postgresql://u:hunter2@h/d")
    settings = load()
    assert settings.database_url == "postgresql://u:hunter2@h/d"
    assert "hunter2" not in f"{settings} {settings!r}"
    monkeypatch.setenv("DISPATCHER_SLOTS", "0")
    assert "hunter2" not in refusal()


def test_the_prefix_is_the_documented_one():
    assert settings_module.ENV_PREFIX == "DISPATCHER_"
