"""The event port as an event loop sees it."""

import select
from pathlib import Path

import pytest

from kata_hybrid._native.events import EventPort
from kata_hybrid._native.vsock import IoThread


def is_readable(port: EventPort) -> bool:
    return bool(select.select([port.fileno()], [], [], 0)[0])


def test_a_fresh_port_has_no_events() -> None:
    port = EventPort()
    assert not is_readable(port)
    assert port.drain() == []


def test_a_port_is_readable_until_it_is_drained(tmp_path: Path) -> None:
    port = EventPort()
    io = IoThread(port)
    io.dial(7, f"unix://{tmp_path}/none", 1024, timeout_ms=60_000)
    io.close()
    assert is_readable(port)
    (event,) = port.drain()
    assert (event.token, event.code, event.value) == (7, 1, None)
    assert "closed" in event.message
    assert not is_readable(port)


def test_an_event_is_frozen(tmp_path: Path) -> None:
    port = EventPort()
    io = IoThread(port)
    io.dial(7, f"unix://{tmp_path}/none", 1024, timeout_ms=60_000)
    io.close()
    (event,) = port.drain()
    with pytest.raises(AttributeError):
        setattr(event, "token", 8)  # noqa: B010 - what mypy forbids is what is tested
