import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.domain.redact import redact


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("can't reach postgresql://u:hunter2@db.example:5432/w", "can't reach postgresql://***@db.example:5432/w"),
        ("proxy socks5://user@proxy:1080 refused", "proxy socks5://***@proxy:1080 refused"),
        ("https://example.com/hooks", "https://example.com/hooks"),
        ("https://example.com/a@b", "https://example.com/a@b"),
        ("secret whsec_hunter2+/hunter2== is short", "secret whsec_*** is short"),
        ("whsk_hunter2", "whsk_***"),
        ("whpk_public", "whpk_public"),
        ("authorization: Bearer hunter2hunter2", "authorization: Bearer ***"),
        ("Basic dXNlcjpodW50ZXIy", "Basic ***"),
        ("a Basic idea", "a Basic idea"),
        ("password=hunter2 host=db", "password=*** host=db"),
        ("Password: 'hunter2 hunter2', next", "Password: ***, next"),
        ("password authentication failed for user x", "password authentication failed for user x"),
        ("nothing here", "nothing here"),
    ],
)
def test_secrets_are_hidden_and_the_rest_is_left(text, shown):
    assert redact(text) == shown


@given(st.text())
def test_it_says_the_same_twice(text):
    assert redact(redact(text)) == redact(text)
