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
class FakeEvent:
    """What the native side queues."""

    token: int
    code: int = 0
    message: str = ""
    value: int | None = None


class FakePort:
    """A port with news that a test wrote."""

    def __init__(self, *news: FakeEvent) -> None:
        self._fd = os.eventfd(1)
        self._news = news

    def fileno(self) -> int:
        return self._fd

    def drain(self) -> list[FakeEvent]:
        os.eventfd_read(self._fd)
        news, self._news = self._news, ()
        return list(news)


@on_loop
async def test_a_panicked_thread_fails_everything_under_way() -> None:
    port = FakePort(FakeEvent(token=0, code=13, message="panicked"))
    native = NativeEvents(port)  # type: ignore[arg-type]
    _, future = native.expect()
    async with asyncio.timeout(TIMEOUT_S):
        with pytest.raises(InternalError, match="panicked"):
            await future


@on_loop
async def test_a_token_for_a_log_gets_any_number_of_lines_and_those_dropped_as_a_number() -> None:
    port = FakePort(
        FakeEvent(token=1, message="one"),
        FakeEvent(token=1, message="two"),
        FakeEvent(token=1, code=8, message="lines were dropped", value=3),
    )
    native = NativeEvents(port)  # type: ignore[arg-type]
    lines: list[str] = []
    assert native.follow(lines.append) == 1
    native.close()
    assert lines == ["one", "two", "[3 lines dropped]"]
    with pytest.raises(UnavailableError):
        native.follow(lines.append)
