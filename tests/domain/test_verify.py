"""The receiver's side of the standard, against the sender's."""

import pytest

from dispatcher.domain.signing import make_signer, new_private_key, new_secret, public_key
from dispatcher.domain.verify import MISSING, OLD, TOLERANCE_S, VALID, WRONG, judge

NOW = 1_795_458_926
SECRET, OTHER, PRIVATE = new_secret(), new_secret(), new_private_key()


def signed(*keys: str, at: int = NOW, body: bytes = b"{}") -> dict[str, str]:
    value = make_signer(keys).sign(b"evt_1", b"%d" % at, body).decode()
    return {"webhook-id": "evt_1", "webhook-timestamp": str(at), "webhook-signature": value}


@pytest.mark.parametrize("keys", [(SECRET,), (OTHER, SECRET), (PRIVATE,), (OTHER, PRIVATE)])
def test_what_we_sign_is_valid(keys: tuple[str, ...]) -> None:
    assert judge(signed(*keys), b"{}", [SECRET], [public_key(PRIVATE)], NOW) == VALID


def test_bytes_that_are_no_text_are_judged_as_they_came():
    headers = signed(SECRET) | {"webhook-id": b"\xff".decode("utf-8", "surrogateescape")}
    assert judge(headers, b"{}", [SECRET], [], NOW) == WRONG


def test_another_key_body_id_or_time_is_wrong() -> None:
    assert judge(signed(OTHER), b"{}", [SECRET], [public_key(PRIVATE)], NOW) == WRONG
    assert judge(signed(SECRET), b"{ }", [SECRET], [], NOW) == WRONG
    assert judge(signed(SECRET) | {"webhook-id": "evt_2"}, b"{}", [SECRET], [], NOW) == WRONG
    assert judge(signed(SECRET) | {"webhook-timestamp": str(NOW + 1)}, b"{}", [SECRET], [], NOW) == WRONG
    assert judge(signed(SECRET), b"{}", [], [], NOW) == WRONG
    assert judge(signed(PRIVATE), b"{}", [SECRET], ["whpk_AAAA", public_key(new_private_key())], NOW) == WRONG


@pytest.mark.parametrize(
    ("off_s", "verdict"), [(0, VALID), (TOLERANCE_S, VALID), (TOLERANCE_S + 1, OLD), (-TOLERANCE_S - 1, OLD)]
)
def test_an_old_one_is_told_from_a_wrong_one(off_s: int, verdict: str) -> None:
    assert judge(signed(SECRET), b"{}", [SECRET], [], NOW + off_s) == verdict


@pytest.mark.parametrize("name", ["webhook-id", "webhook-timestamp", "webhook-signature"])
def test_without_a_header_it_is_not_signed(name: str) -> None:
    headers = signed(SECRET)
    del headers[name]
    assert judge(headers, b"{}", [SECRET], [], NOW) == MISSING


@pytest.mark.parametrize(
    "value", ["", "v1", "v1,", "v1,!!", "v2,AAAA", "v1,é", " " * 50, "v1,AAAA " * 1_000, "v1a,AAAA"]
)
def test_nonsense_is_wrong(value: str) -> None:
    assert judge(signed(SECRET) | {"webhook-signature": value}, b"{}", [SECRET], [public_key(PRIVATE)], NOW) == WRONG
    assert judge(signed(SECRET) | {"webhook-timestamp": value or "x"}, b"{}", [SECRET], [], NOW) == WRONG
