"""Against the real event port when the extension is built; the port's contract is its stub."""

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.loop import on_loop
from kata_hybrid._native import events, vsock
from kata_hybrid.aio.events import NativeEvents
from kata_hybrid.errors import InternalError, UnavailableError

TIMEOUT_S = 10.0


@on_loop
async def test_a_failed_operation_raises_the_class_of_its_code() -> None:
    native = NativeEvents(events.EventPort())
    io = vsock.IoThread(native.port)
    with pytest.raises(Exception, match=r".") as caught:
        await native.call(lambda token: io.dial(token, "unix:///no/such", 1, timeout_ms=50))
    assert getattr(caught.value, "code", 0) in {4, 14}
    io.close()
    native.close()


@on_loop
async def test_a_descriptor_arrives_and_belongs_to_us(tmp_path: Path) -> None:
    native = NativeEvents(events.EventPort())
    io = vsock.IoThread(native.port)
    path = tmp_path / "s"
    server = await asyncio.start_unix_server(lambda _, writer: writer.close(), path)
    async with asyncio.timeout(TIMEOUT_S):
        fd = await native.call(lambda token: io.dial(token, f"unix://{path}", 1, timeout_ms=5000))
    assert isinstance(fd, int)
    os.close(fd)
    server.close()
    io.close()
    native.close()


@on_loop
async def test_a_refused_start_forgets_its_token() -> None:
    native = NativeEvents(events.EventPort())
    io = vsock.IoThread(native.port)
    with pytest.raises(ValueError, match=r"."):
        await native.call(lambda token: io.dial(token, "nonsense", 1, timeout_ms=50))
    io.close()
    native.close()


@on_loop
async def test_closing_tells_whoever_waits() -> None:
    native = NativeEvents(events.EventPort())
    _, future = native.expect()
    native.close()
    with pytest.raises(UnavailableError):
        await future
    with pytest.raises(UnavailableError):
        native.expect()


@dataclass(frozen=True)
class FatalEvent:
    """What the native side queues when its thread panics."""

    token: int = 0
    code: int = 13
    message: str = "panicked"
    value: None = None


class PanickedPort:
    """A port whose only news is that its thread is dead."""

    def __init__(self) -> None:
        self._fd = os.eventfd(1)

    def fileno(self) -> int:
        return self._fd

    def drain(self) -> list[FatalEvent]:
        os.eventfd_read(self._fd)
        return [FatalEvent()]


@on_loop
async def test_a_panicked_thread_fails_everything_under_way() -> None:
    port = PanickedPort()
    native = NativeEvents(port)  # type: ignore[arg-type]
    _, future = native.expect()
    async with asyncio.timeout(TIMEOUT_S):
        with pytest.raises(InternalError, match="panicked"):
            await future
