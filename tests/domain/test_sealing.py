"""Encryption at rest: who can open what, and what is said when nobody can."""

import base64

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatcher.domain.sealing import (
    KEYS_MAX,
    Keyring,
    credentials_place,
    draft_place,
    key_id,
    new_encryption_key,
    parse_keys,
    secret_place,
)
from dispatcher.errors import InputError, SealedError

OLD, NEW, STRANGE = bytes(range(32)), bytes(range(1, 33)), bytes(32)
PLACE = secret_place(7)


@settings(deadline=None)
@given(st.text(max_size=300))
def test_what_is_sealed_opens_and_shows_nothing(text):
    ring = Keyring([NEW])
    sealed = ring.seal(text, PLACE)
    assert ring.open(sealed, PLACE) == text
    assert sealed != ring.seal(text, PLACE), "a nonce of its own each time"
    assert len(base64.b64decode(sealed.split(":")[2])) == 12 + len(text.encode()) + 16
    assert not text.isalnum() or len(text) < 12 or text not in sealed


def test_the_first_key_seals_and_all_open():
    sealed = Keyring([OLD]).seal("x", PLACE)
    both = Keyring([NEW, OLD])
    assert both.open(sealed, PLACE) == "x"
    assert not both.is_current(sealed)
    again = both.seal(both.open(sealed, PLACE), PLACE)
    assert both.is_current(again)
    assert Keyring([NEW]).open(again, PLACE) == "x"


@pytest.mark.parametrize("place", [secret_place(8), credentials_place(7), draft_place(7)])
def test_it_opens_in_its_own_place_only(place):
    ring = Keyring([NEW])
    with pytest.raises(SealedError, match="moved from another row"):
        ring.open(ring.seal("x", PLACE), place)


@pytest.mark.parametrize(
    "change", ["sealed:", "sealed:00000000", "sealed:{id}:", "sealed:{id}:????", "sealed:{id}:AAAA"]
)
def test_what_was_cut_or_changed_does_not_open(change):
    with pytest.raises(SealedError, match="not what was sealed"):
        Keyring([NEW]).open(change.format(id=key_id(NEW)), PLACE)


def test_every_flipped_byte_is_noticed():
    ring = Keyring([NEW])
    sealed = ring.seal("hunter2", PLACE)
    head, _, body = sealed.rpartition(":")
    raw = base64.b64decode(body)
    for n in range(len(raw)):
        changed = raw[:n] + bytes([raw[n] ^ 1]) + raw[n + 1 :]
        with pytest.raises(SealedError):
            ring.open(f"{head}:{base64.b64encode(changed).decode()}", PLACE)


def test_a_missing_key_is_named_with_its_remedy():
    sealed = Keyring([OLD]).seal("x", PLACE)
    for ring in (Keyring(), Keyring([NEW])):
        with pytest.raises(SealedError) as caught:
            ring.open(sealed, PLACE)
        for words in (PLACE, key_id(OLD), "DISPATCHER_ENCRYPTION_KEYS", "rotate-key"):
            assert words in str(caught.value)


def test_without_keys_nothing_is_sealed_and_plain_is_read_with_keys_too():
    assert Keyring().seal("x", PLACE) == "x"
    assert Keyring().open("x", PLACE) == Keyring([NEW]).open("x", PLACE) == "x"
    assert Keyring().is_current("x")
    assert not Keyring([NEW]).is_current("x")


def test_a_keyring_shows_no_key():
    text = repr(Keyring([NEW, OLD]))
    assert text == f"Keyring({key_id(NEW)}, {key_id(OLD)})"
    assert NEW.hex() not in text


def text_of(key: bytes) -> str:
    return base64.b64encode(key).decode()


def test_keys_are_read_from_a_line_or_a_file():
    assert parse_keys(f"{text_of(NEW)},{text_of(OLD)}") == (NEW, OLD)
    assert parse_keys(f"# of March\n{text_of(NEW)}\n\n{text_of(OLD)}  # until April\n") == (NEW, OLD)
    assert len(parse_keys(new_encryption_key())[0]) == 32


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no key"),
        (" , \n# none\n", "no key"),
        ("hunter2!", "key 1 is not base64"),
        (f"{text_of(NEW)},aHVudGVyMg==", "key 2 holds 7 bytes, it must be 32"),
        (f"{text_of(NEW)},{text_of(NEW)}", "twice"),
        (",".join(text_of(bytes([n] * 32)) for n in range(KEYS_MAX + 1)), "more than"),
    ],
)
def test_bad_keys(text, words):
    with pytest.raises(InputError, match=words) as caught:
        parse_keys(text)
    for word in text.replace(",", " ").split():
        assert len(word) < 5 or word not in str(caught.value)
