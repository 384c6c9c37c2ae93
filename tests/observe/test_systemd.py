"""sd_notify: what is said, to whom, and that nobody's silence matters."""

import os
import socket

import pytest

from dispatcher.observe.systemd import Notifier


@pytest.fixture
def heard(monkeypatch):
    """An abstract socket, as systemd gives to containers."""
    name = f"@dispatcher-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + name[1:])
        sock.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield sock


def test_what_is_said(heard):
    notifier = Notifier()
    assert notifier.is_heard
    notifier.ready("owner")
    assert heard.recv(1000) == b"READY=1\nSTATUS=owner"
    notifier.status("owner")  # nothing new
    notifier.status("owner: 1")
    assert heard.recv(1000) == b"STATUS=owner: 1"
    notifier.reloading()
    assert heard.recv(1000).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
    notifier.stopping()
    assert heard.recv(1000).startswith(b"STOPPING=1")


def test_the_watchdog_is_this_process_s_or_none(heard, monkeypatch):
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    assert Notifier().watchdog_s == 30
    Notifier().alive()
    assert heard.recv(1000) == b"WATCHDOG=1"
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert Notifier().watchdog_s == 30
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert Notifier().watchdog_s is None


def test_without_a_manager_nothing_is_said(monkeypatch):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    notifier = Notifier()
    notifier.ready("x")
    assert not notifier.is_heard
    assert notifier.watchdog_s is None


def test_a_manager_that_is_gone_or_full_is_no_trouble(tmp_path, monkeypatch):
    path = str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    Notifier().ready("x")  # nobody there
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(path)
        for n in range(1_000):  # it reads none of them
            Notifier().status(str(n))
