"""Secrets at rest in PostgreSQL: under which keys they are, and putting them under another while others go on."""

from typing import Any

import asyncpg
import orjson
import pytest

from dispatcher import settings as settings_module
from dispatcher.domain.sealing import Keyring, key_id, parse_keys, secret_place
from dispatcher.errors import InputError, SealedError
from dispatcher.store import sealing
from dispatcher.store.admin import Admin
from dispatcher.store.sealing import KeyUse, Rotated, check_keys, keys_in_use, rotate_key

OLD = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
NEW = "AQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA="


def keyring(*texts: str) -> Keyring:
    return Keyring([key for text in texts for key in parse_keys(text)])


def name(text: str) -> str:
    return key_id(parse_keys(text)[0])


def admin(db: asyncpg.Connection, *keys: str) -> Admin:
    settings = settings_module.Settings(encryption_keys=",".join(keys) or None)
    return Admin(db, settings)


async def endpoints(db: asyncpg.Connection, count: int, *keys: str) -> list[int]:
    """Endpoints with a secret each, and credentials in force and proposed."""
    opened = admin(db, *keys)
    made = []
    for n in range(count):
        view = await opened.create("acct", {"url": "https://a.example/", "bearer": f"token-{n}"}, live=True)
        await opened.update(view.id, {"headers": {"x-n": f"value-{n}"}})
        made.append(view.id)
    return made


async def opened_all(db: asyncpg.Connection, *keys: str) -> list[tuple[Any, ...]]:
    views = [
        await admin(db, *keys).get(row["id"]) for row in await db.fetch("SELECT id FROM webhook.endpoint ORDER BY id")
    ]
    return [(view.secrets, view.credentials, view.proposed_credentials) for view in views]


async def uses(db: asyncpg.Connection, *keys: str) -> dict[str | None, tuple[str, int]]:
    return {use.key_id: (use.role, use.texts) for use in await keys_in_use(db, keyring(*keys))}


def quietly(rotated: Rotated) -> None:
    pass


async def test_plain_becomes_sealed_and_old_becomes_new(db: asyncpg.Connection) -> None:
    await endpoints(db, 3)
    plain = await opened_all(db)
    assert await uses(db) == {None: ("plain", 9)}
    assert "plain text" in (await check_keys(db, keyring()))[0]
    assert "9 secrets are in plain text" in (await check_keys(db, keyring(OLD)))[0]
    assert (await rotate_key(db, keyring(OLD), quietly)).texts == 9
    assert await uses(db, OLD) == {name(OLD): ("first", 9)}
    assert await check_keys(db, keyring(OLD)) == []
    assert await opened_all(db, OLD) == plain

    rotated = await rotate_key(db, keyring(NEW, OLD), quietly)
    assert (rotated.texts, rotated.total, rotated.failed) == (9, 9, [])
    assert await uses(db, NEW, OLD) == {name(NEW): ("first", 9)}
    assert await opened_all(db, NEW) == plain, "the old one may go"
    again = await rotate_key(db, keyring(NEW), quietly)
    assert (again.texts, again.total) == (0, 0)


async def test_it_goes_on_where_it_was_interrupted(db: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "PAGE_ROWS", 2)
    await endpoints(db, 5, OLD)
    before = await opened_all(db, OLD)
    told: list[tuple[int, int]] = []

    def stop_in_the_middle(rotated: Rotated) -> None:
        told.append((rotated.texts, rotated.total))
        if len(told) in (2, 5):
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            await rotate_key(db, keyring(NEW, OLD), stop_in_the_middle)
        assert await opened_all(db, NEW, OLD) == before, "half of one and half of the other is fine"
        assert set(await uses(db, NEW, OLD)) == {name(NEW), name(OLD)}
    assert told[:2] == [(2, 15), (4, 15)]
    assert told[2][1] == 11, "what is done is done"
    await rotate_key(db, keyring(NEW, OLD), quietly)
    assert await opened_all(db, NEW) == before


async def test_a_missing_key_stops_it_before_anything_is_changed(db: asyncpg.Connection) -> None:
    await endpoints(db, 1)
    await endpoints(db, 2, OLD)
    before = await db.fetch("SELECT secret FROM webhook.endpoint_secret ORDER BY id")
    for keys in ((), (NEW,)):
        with pytest.raises(SealedError, match=name(OLD)):
            await check_keys(db, keyring(*keys))
    with pytest.raises(SealedError, match="DISPATCHER_ENCRYPTION_KEYS"):
        await rotate_key(db, keyring(NEW), quietly)
    with pytest.raises(InputError, match="no key to encrypt with"):
        await rotate_key(db, keyring(), quietly)
    assert await db.fetch("SELECT secret FROM webhook.endpoint_secret ORDER BY id") == before
    assert KeyUse(name(OLD), "missing", 6) in await keys_in_use(db, keyring(NEW))


async def test_no_plain_text_is_put_beside_what_is_encrypted(db: asyncpg.Connection) -> None:
    [endpoint] = await endpoints(db, 1, OLD)
    keyless = admin(db)
    for work in (
        keyless.create("acct", {"url": "https://a.example/"}),
        keyless.rotate_secret(endpoint),
        keyless.update(endpoint, {"signing": "v1,v1a"}),
    ):
        with pytest.raises(SealedError, match="DISPATCHER_ENCRYPTION_KEYS"):
            await work
    assert None not in await uses(db, OLD)
    assert await db.fetchval("SELECT count(*) FROM webhook.endpoint") == 1


async def test_what_does_not_open_is_told_and_left(db: asyncpg.Connection) -> None:
    bad, good = await endpoints(db, 2, OLD)
    await db.execute(
        "UPDATE webhook.endpoint_secret SET secret = (SELECT secret FROM webhook.endpoint_secret WHERE endpoint_id = $1) WHERE endpoint_id = $2",
        good, bad,
    )  # fmt: skip
    rotated = await rotate_key(db, keyring(NEW, OLD), quietly)
    assert rotated.texts == 5
    assert len(rotated.failed) == 1
    assert secret_place(bad) in rotated.failed[0]
    assert await uses(db, NEW, OLD) == {name(NEW): ("first", 5), name(OLD): ("known", 1)}


async def test_dispatchers_are_not_told(db: asyncpg.Connection) -> None:
    """It is the same configuration; a dispatcher that doesn't know the new key yet goes on with what it has."""
    await endpoints(db, 3, OLD)
    changes = await db.fetchval("SELECT count(*) FROM webhook.config_change")
    await rotate_key(db, keyring(NEW, OLD), quietly)
    assert await db.fetchval("SELECT count(*) FROM webhook.config_change") == changes


async def test_an_edit_of_credentials_is_told(db: asyncpg.Connection) -> None:
    [endpoint] = await endpoints(db, 1, OLD)
    changes = await db.fetchval("SELECT count(*) FROM webhook.config_change")
    await admin(db, OLD).update(endpoint, {"bearer": "another"}, live=True)
    assert await db.fetchval("SELECT count(*) FROM webhook.config_change") > changes


async def test_only_credentials_are_sealed_in_a_draft(db: asyncpg.Connection) -> None:
    [endpoint] = await endpoints(db, 1, OLD)
    draft = orjson.loads(await db.fetchval("SELECT draft FROM webhook.endpoint WHERE id = $1", endpoint))
    assert draft["url"] == "https://a.example/"
    assert draft["credentials"].startswith("sealed:")
    assert not {"bearer", "headers"} & set(draft)


@pytest.mark.parametrize(
    ("column", "value", "constraint"),
    [
        ("signing", "v2", "endpoint_signing_known"),
        ("body_format", "xml", "endpoint_body_format_known"),
        ("omit", [f"/{n}" for n in range(33)], "endpoint_omit_form"),
        ("omit", [None], "endpoint_omit_form"),
        ("extra_signature", "md5:x", "endpoint_extra_signature_form"),
        ("credentials", "hunter2", "endpoint_credentials_form"),
        ("credentials", "sealed:xyz", "endpoint_credentials_form"),
    ],
)
async def test_the_database_holds_the_forms(db: asyncpg.Connection, column: str, value: Any, constraint: str) -> None:
    with pytest.raises(asyncpg.CheckViolationError) as caught:
        await db.execute(
            f"INSERT INTO webhook.endpoint (account_id, url, {column}) VALUES ('a', 'https://a.example/', $1)", value
        )
    assert caught.value.constraint_name == constraint


@pytest.mark.parametrize(
    ("scheme", "secret", "public_key", "constraint"),
    [
        ("v1", "whsk_QUJD", None, "endpoint_secret_form"),
        ("v1a", "whsec_QUJD", "whpk_QUJD", "endpoint_secret_form"),
        ("v1", "hunter2", None, "endpoint_secret_form"),
        ("v1", "sealed:0000:QUJD", None, "endpoint_secret_form"),
        ("v1a", "whsk_QUJD", None, "endpoint_secret_public_key"),
        ("v1", "whsec_QUJD", "whpk_QUJD", "endpoint_secret_public_key"),
        ("v2", "whsk_QUJD", None, "endpoint_secret_scheme_known"),
    ],
)
async def test_the_database_holds_the_forms_of_secrets(
    db: asyncpg.Connection, scheme: str, secret: str, public_key: str | None, constraint: str
) -> None:
    [endpoint] = await endpoints(db, 1)
    with pytest.raises(asyncpg.CheckViolationError) as caught:
        await db.execute(
            "INSERT INTO webhook.endpoint_secret (endpoint_id, scheme, secret, public_key) VALUES ($1, $2, $3, $4)",
            endpoint, scheme, secret, public_key,
        )  # fmt: skip
    assert caught.value.constraint_name == constraint
