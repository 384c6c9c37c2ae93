"""The verbs around an endpoint's requests, its keys and their encryption, as a person and a script use them."""

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from dispatcher.domain.sealing import new_encryption_key
from dispatcher.domain.shape import HIDDEN
from dispatcher.domain.signing import new_private_key, public_key
from tests.conftest import dsn_of
from tests.test_cli import Cli, sink_process, sql

_numbers = itertools.count(1)
URL = "https://a.example/hook"


@pytest.fixture
def run(server) -> Iterator[Cli]:
    name = f"cli_shape_{next(_numbers)}"
    sql(server.dsn, f"CREATE DATABASE {name}")
    made = Cli(dsn_of(server.dsn, name))
    made.ok("migrate")
    yield made
    sql(server.dsn, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    issued = trustme.CA().issue_cert("ann.example", common_name="ann.example")
    directory: Path = tmp_path_factory.mktemp("pem")
    (directory / "cert.pem").write_bytes(issued.cert_chain_pems[0].bytes())
    (directory / "key.pem").write_bytes(issued.private_key_pem.bytes())
    return str(directory / "cert.pem"), str(directory / "key.pem")


def test_everything_is_given_and_nothing_secret_is_shown_again(run: Cli, pem: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "token").write_text("token-hunter2\n")
    created = run.json(
        "endpoint", "create", "a", URL, "--signing", "v1,v1a", "--body", "payload", "--omit", "/b", "--omit", "/a",
        "--header", "X-Tenant: header-hunter2", "--header", "x-more:1", "--bearer", f"@{tmp_path / 'token'}",
        "--client-cert", pem[0], "--client-key", pem[1],
        "--extra-signature", "hex:X-Hub-Signature-256:sha256=", "--extra-signature-key", "signature-hunter2",
    )  # fmt: skip
    assert created["secret"].startswith("whsec_")
    assert created["public_key"].startswith("whpk_")
    assert created["extra_signature_key"] == "signature-hunter2", "shown once"
    endpoint = str(created["id"])
    shown = run.json("endpoint", "show", endpoint)
    assert (shown["signing"], shown["body_format"], shown["omit"]) == ("v1,v1a", "payload", ["/a", "/b"])
    assert shown["extra_signature"] == "hex:x-hub-signature-256:sha256="
    assert shown["headers"] == {"x-more": HIDDEN, "x-tenant": HIDDEN}
    assert (shown["bearer"], shown["basic"], shown["client_key"]) == (HIDDEN, None, HIDDEN)
    assert "ann.example" in shown["client_certificate"]
    assert shown["public_keys"] == [created["public_key"]]
    for output in (run.ok("endpoint", "show", endpoint), json.dumps(shown)):
        assert "hunter2" not in output
        assert "PRIVATE" not in output
        assert created["secret"] not in output
    text = run.ok("endpoint", "show", endpoint)
    assert re.search(r"header +x-tenant: \(hidden\)", text)
    assert re.search(r"public key +whpk_", text)

    revealed = run.ok("endpoint", "show", endpoint, "--secret")
    assert created["secret"] in revealed
    assert "signature-hunter2" in revealed
    assert "whsk_" not in revealed, "nobody needs it elsewhere"
    assert "header-hunter2" not in revealed
    assert "token-hunter2" not in revealed
    assert "PRIVATE" not in revealed
    stored = sql(run.dsn, "SELECT credentials::json ->> 'bearer' AS bearer FROM webhook.endpoint")
    assert stored[0]["bearer"] == "token-hunter2", "the line break is the file's"


def test_an_edit_adds_and_takes_out(run: Cli) -> None:
    endpoint = str(
        run.json(
            "endpoint", "create", "a", URL, "--header", "x-a: 1", "--header", "x-b: 2", "--basic", "u:p", "--live"
        )["id"]
    )
    shown = run.ok(
        "endpoint",
        "update",
        endpoint,
        "--header",
        "x-c: 3",
        "--remove-header",
        "X-A",
        "--bearer",
        "t",
        "--omit",
        "/text",
    )
    assert "headers: x-a: (hidden), x-b: (hidden) → x-b: (hidden), x-c: (hidden)" in shown
    assert "basic: (hidden) → –" in shown
    assert "bearer: – → (hidden)" in shown
    assert "proposed edit" in run.ok("endpoint", "show", endpoint)
    assert "stays as it is; no edit waits" in run.ok(
        "endpoint",
        "update",
        endpoint,
        "--header",
        "x-a: 1",
        "--remove-header",
        "x-c",
        "--basic",
        "u:p",
        "--unset",
        "omit",
    )
    edited = run.json(
        "endpoint",
        "update",
        endpoint,
        "--live",
        "--unset",
        "headers",
        "--unset",
        "auth",
        "--extra-signature",
        "timestamped:x-sig",
    )
    assert (edited["headers"], edited["basic"], edited["extra_signature_key"]) == ({}, None, HIDDEN)
    key = run.json("endpoint", "show", endpoint, "--secret")["extra_signature_key"]
    assert len(key) == 64
    assert key in run.ok("endpoint", "update", endpoint, "--extra-signature", "hex:x-sig"), (
        "told before the edit is in force"
    )
    edited = run.json("endpoint", "update", endpoint, "--live", "--unset", "extra-signature")
    assert (edited["extra_signature"], edited["extra_signature_key"]) == (None, None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--header", "hunter2"), "'Name: value'"),
        (("--header", "Host: hunter2"), "the header host is set by the dispatcher"),
        (("--header", "x-a: hunter2\r\nx-b: 1"), "U+000D"),
        (("--header", "x-ü: hunter2"), "not a header's name"),
        (("--basic", "hunter2"), "user:password"),
        (("--bearer", "hunter2 x"), "a bearer token"),
        (("--bearer", "t", "--basic", "u:hunter2"), "one authorization"),
        (("--bearer", "@/nowhere/hunter"), "/nowhere/hunter can't be read"),
        (("--omit", "text"), "not a JSON pointer"),
        (("--extra-signature", "x-sig"), "is not a signature"),
        (("--extra-signature-key", "hunter2-hunter2"), "give both"),
        (("--secret", "whsk_hunter2"), "not base64"),
        (("--secret", new_private_key()), "is for scheme v1a, and this endpoint signs in v1"),
    ],
)
def test_what_is_refused_is_refused_in_words_without_the_secret(run: Cli, options: tuple[str, ...], words: str) -> None:
    text = run.refused("endpoint", "create", "a", URL, *options)
    assert words in text
    assert "hunter2" not in text
    assert sql(run.dsn, "SELECT count(*) AS n FROM webhook.endpoint")[0]["n"] == 0


def test_a_key_of_ones_own_and_its_rotation(run: Cli) -> None:
    first, second = new_private_key(), new_private_key()
    created = run.json("endpoint", "create", "a", URL, "--signing", "v1a", "--secret", first)
    assert (created["public_key"], created["secret"]) == (public_key(first), None)
    endpoint = str(created["id"])
    text = run.ok("endpoint", "rotate-secret", endpoint, "--overlap", "1h", "--secret", second)
    assert public_key(second) in text
    assert second not in text
    assert "The old one signs too until" in text
    assert run.json("endpoint", "show", endpoint)["public_keys"] == [public_key(second), public_key(first)]
    rotated = run.json("endpoint", "rotate-secret", endpoint, "--overlap", "0")
    assert rotated["public_keys"] == [rotated["public_key"]]


def test_a_test_sends_the_credentials_and_doesnt_show_them(run: Cli) -> None:
    with sink_process("--quiet") as url:
        endpoint = str(
            run.json("endpoint", "create", "a", f"{url}/hook", "--header", "x-key: hunter2", "--signing", "v1a")["id"]
        )
        tested = run.json("endpoint", "test", endpoint)
    assert tested["passed"]
    assert "x-key: (hidden)" in tested["request"]
    assert "hunter2" not in json.dumps(tested)
    assert "v1a," in tested["request"]
    run.ok("endpoint", "go-live", endpoint)


def test_the_sink_checks_asymmetric_signatures(run: Cli) -> None:
    key, other = new_private_key(), new_private_key()
    for public, expected in ((public_key(key), " ok"), (public_key(other), " BAD")):
        with subprocess.Popen(
            [sys.executable, "-m", "dispatcher", "sink", "--port", "0", "--secret", public],
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            url = process.stdout.readline().split()[-1].strip()
            endpoint = str(run.json("endpoint", "create", "a", url, "--signing", "v1a", "--secret", key)["id"])
            run.ok("endpoint", "test", endpoint)
            assert expected in process.stdout.readline()
            process.terminate()


def test_encryption_is_turned_on_and_its_key_rotated(run: Cli, tmp_path: Path) -> None:
    endpoint = str(run.json("endpoint", "create", "a", URL, "--bearer", "hunter2")["id"])
    assert "no key to encrypt with" in run.refused("rotate-key")
    assert run.json("rotate-key", "--check") == [{"key": None, "role": "plain", "secrets": 2}]
    old, new = new_encryption_key(), new_encryption_key()
    file = tmp_path / "keys"
    file.write_text(old)
    old_only = {"DISPATCHER_ENCRYPTION_KEYS_FILE": str(file)}
    text = run.ok("rotate-key", env=old_only)
    assert "2 secrets were put under key" in text
    assert "2 of 2" in text
    assert run.json("rotate-key", "--check", env=old_only)[0]["role"] == "first"

    both = {"DISPATCHER_ENCRYPTION_KEYS": f"{new},{old}"}
    assert run.json("rotate-key", env=both) == {"encrypted": 2, "failed": []}
    assert "0 secrets were put" in run.ok("rotate-key", env=both)
    new_only = {"DISPATCHER_ENCRYPTION_KEYS": new}
    assert "whsec_" in run.ok("endpoint", "show", endpoint, "--secret", env=new_only)
    for env in ({}, old_only):
        assert "DISPATCHER_ENCRYPTION_KEYS" in run.refused("endpoint", "show", endpoint, "--secret", env=env)
        text = run.ok("endpoint", "show", endpoint, env=env)
        assert re.search(r"credentials +endpoint.credentials of endpoint \d+ can't be read", text), (
            "the rest is shown without"
        )
        assert run.json("endpoint", "show", endpoint, env=env)["sealed"]
        assert run.json("rotate-key", "--check", env=env)[0]["role"] == "missing"
    for command in (
        ("endpoint", "create", "a", URL), ("endpoint", "rotate-secret", endpoint), ("endpoint", "update", endpoint, "--bearer", "x"),
    ):  # fmt: skip
        assert "DISPATCHER_ENCRYPTION_KEYS" in run.refused(*command), "no plain text beside what is encrypted"
    assert run.json("endpoint", "delete", endpoint, "--yes")["state"] == "deleted"


def test_run_refuses_to_start_without_the_key(run: Cli) -> None:
    key = new_encryption_key()
    run.ok("endpoint", "create", "a", URL, env={"DISPATCHER_ENCRYPTION_KEYS": key})
    for keys in ({}, {"DISPATCHER_ENCRYPTION_KEYS": new_encryption_key()}):
        text = run.refused("run", env=keys)
        assert "DISPATCHER_ENCRYPTION_KEYS" in text
        assert run("run", env=keys).exception.exit_code == 5
