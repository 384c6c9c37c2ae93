"""A test's verdict, and what it says is at fault."""

import pytest

from dispatcher.domain.outcome import Fault, Outcome
from dispatcher.domain.verdict import at_fault, verdict


@pytest.mark.parametrize(
    ("outcome", "fault", "said"),
    [
        (Outcome(None, 204), None, "passed"),
        (Outcome(Fault.STATUS, 302), "redirect", "give the final address"),
        (Outcome(Fault.STATUS, 404), "answer", "check the URL"),
        (Outcome(Fault.STATUS, 500), "answer", "its logs will say why"),
        (Outcome(Fault.TLS, detail="self-signed"), "certificate", "its chain complete (self-signed)"),
        (Outcome(Fault.DNS), "address", "check its spelling"),
        (Outcome(Fault.BLOCKED, detail="10.0.0.1 is private"), "address", "10.0.0.1 is private"),
        (Outcome(Fault.TIMEOUT), "timeout", "work afterwards"),
        (Outcome(Fault.CONNECT), "receiver", "is the server running"),
    ],
)
def test_each_outcome_says_what_to_do(outcome: Outcome, fault: str | None, said: str) -> None:
    assert at_fault(outcome) == fault
    assert said in verdict(outcome)


def test_every_fault_of_a_post_has_words() -> None:
    for fault in Fault:
        if fault is not Fault.EXPIRED:  # no POST was made
            outcome = Outcome(fault, 500 if fault is Fault.STATUS else None)
            assert at_fault(outcome)
            assert verdict(outcome)


def test_where_a_redirect_leads_is_said_without_what_a_terminal_obeys() -> None:
    said = verdict(Outcome(Fault.STATUS, 301), "https://a.example/\x1b[2J" + "x" * 1_000)
    assert "https://a.example/\\x1b[2J" in said
    assert len(said) < 500
